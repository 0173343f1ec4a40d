"""What goes into the layers of one block, over all samples: a walk's products become stats. Fits nothing."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from arrow_quant_v2.calibration.collect import seen
from arrow_quant_v2.calibration.stats import InputStats
from arrow_quant_v2.engines.one_core import each_on_one_core

if TYPE_CHECKING:
    from collections.abc import Sequence

    from arrow_quant_v2.calibration.blocks import Walk
    from arrow_quant_v2.calibration.sample import Sample
    from arrow_quant_v2.calibration.stats import Seen
    from arrow_quant_v2.timestep import TimeGroups

SAMPLES_AT_ONCE = 8  # whose inputs are in memory together; part of the result, so it never follows the machine


@dataclass(frozen=True, kw_only=True, eq=False)
class Strata:
    """The time group of every sample, and the weight that gives every group the same say."""

    groups: tuple[int, ...]
    weights: tuple[float, ...]
    count: int


def strata(samples: Sequence[Sample], groups: TimeGroups) -> Strata:
    """Weights are 1 on average: samples / (groups that were seen * samples of this group)."""
    own = tuple(groups.group_of(sample.timestep) for sample in samples)
    members = Counter(own)
    weights = tuple(len(own) / (len(members) * members[group]) for group in own)
    return Strata(groups=own, weights=weights, count=groups.count)


def observe(walk: Walk, block: int, layers: tuple[str, ...], parts: Strata) -> InputStats | None:
    """The stats of the input that these layers share, or None where no sample gives them any but zeros.

    Samples run at the same time, one on each core, and are added up in their order.

    Raises:
        QuantizationError: inputs are not finite.
    """
    stats: InputStats | None = None
    for start in range(0, len(parts.groups), SAMPLES_AT_ONCE):
        numbers = range(start, min(start + SAMPLES_AT_ONCE, len(parts.groups)))
        found = each_on_one_core(lambda number: _seen(walk, block, layers, number), numbers)
        flat = [(one, number) for number, several in zip(numbers, found, strict=True) for one in several]
        if not flat:
            continue
        first = flat[0][0]
        stats = stats or InputStats(layers, parts.count, columns=first.rows.shape[1], channels=len(first.absmax))
        stats.add(
            [one for one, _ in flat],
            [parts.groups[number] for _, number in flat],
            [parts.weights[number] for _, number in flat],
        )
    return stats if stats is not None and stats.second.matrix.diagonal().any() else None


def _seen(walk: Walk, block: int, layers: tuple[str, ...], number: int) -> list[Seen]:
    """Nothing of products without tokens: experts that a sample does not need are given such."""
    products = walk.watch(block, layers, number).products
    return [seen(product, seed=number) for product in products if product.inputs.numel()]

"""What goes into the layers of one block, over all samples: a walk's products become stats. Fits nothing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from arrow_quant_v2.calibration.collect import MOST_ROWS, seen
from arrow_quant_v2.calibration.importance import ALIKE
from arrow_quant_v2.calibration.stats import InputStats
from arrow_quant_v2.engines.one_core import each_on_one_core

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from arrow_quant_v2.calibration.blocks import Walk
    from arrow_quant_v2.calibration.drift import Drift
    from arrow_quant_v2.calibration.importance import Importance
    from arrow_quant_v2.calibration.sample import Sample
    from arrow_quant_v2.calibration.stats import Seen
    from arrow_quant_v2.time_groups import TimeGroups

SAMPLES_AT_ONCE = 8  # whose inputs are in memory together; part of the result, so it never follows the machine
ROOM = 512 * 2**20  # bytes of them at most, where all inputs of a block are seen at once


@dataclass(frozen=True, kw_only=True, eq=False)
class Strata:
    """The time group of every sample, the weight that gives every group the same say, and what each row's is beside."""

    groups: tuple[int, ...]
    weights: tuple[float, ...]
    count: int
    importance: Importance = ALIKE

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many calls of the model each time group has."""
        return tuple(self.groups.count(group) for group in range(self.count))

    def alone(self) -> Strata:
        """The same samples as if there were one time group."""
        return replace(self, groups=(0,) * len(self.groups), weights=(1.0,) * len(self.groups), count=1)


def strata(samples: Sequence[Sample], groups: TimeGroups) -> Strata:
    """Weights are 1 on average: samples / (groups that were seen * samples of this group)."""
    own = tuple(groups.group_of(sample.timestep) for sample in samples)
    say = weights([own.count(group) for group in range(groups.count)])
    return Strata(groups=own, weights=tuple(say[group] for group in own), count=groups.count)


def weights(sizes: Sequence[int]) -> tuple[float, ...]:
    """What a sample of each time group weighs, given how many there are of each; 0.0 where there are none."""
    seen_groups = sum(size > 0 for size in sizes)
    return tuple(sum(sizes) / (seen_groups * size) if size else 0.0 for size in sizes)


def observe(
    walk: Walk, block: int, layers: tuple[str, ...], parts: Strata, drift: Drift | None = None
) -> InputStats | None:
    """The stats of the input that these layers share, or None where no sample gives them any but zeros.

    With `drift`, the block also runs with its original weights, to see how far its input is from the original one.
    Samples run at the same time, one on each core, and are added up in their order.

    Raises:
        QuantizationError: inputs are not finite.
    """
    stats: InputStats | None = None
    for start in range(0, len(parts.groups), SAMPLES_AT_ONCE):
        numbers = range(start, min(start + SAMPLES_AT_ONCE, len(parts.groups)))
        found = each_on_one_core(lambda number: _seen(walk, block, layers, number, parts.importance), numbers)
        stats = _added(stats, layers, dict(zip(numbers, found, strict=True)), parts)
        if drift is not None:
            there = [walk.beside(number) for number in numbers]
            with drift.originals.in_place():
                beside = each_on_one_core(lambda number: _seen(walk, block, layers, number), there)
            drift.add(found, beside, [parts.weights[number] for number in numbers])
    return stats if stats is not None and stats.second.matrix.diagonal().any() else None


def observe_block(
    walk: Walk, block: int, samples: Sequence[int], parts: Strata
) -> dict[tuple[str, ...], InputStats | None]:
    """The stats of every input of a block, from one run of it for each of these samples, which finishes them.

    Rounded otherwise than by `observe`, because other samples are added up together.

    Raises:
        QuantizationError: inputs are not finite.
    """
    stats: dict[tuple[str, ...], InputStats | None] = dict.fromkeys(walk.blocks[block].inputs)
    at_once = _at_once(walk, block)
    for start in range(0, len(samples), at_once):
        numbers = samples[start : start + at_once]
        found = each_on_one_core(lambda number: _seen_by_input(walk, block, number), numbers)
        for place, layers in enumerate(stats):
            mine = {number: inputs[place] for number, inputs in zip(numbers, found, strict=True)}
            stats[layers] = _added(stats[layers], layers, mine, parts)
    return stats


def _at_once(walk: Walk, block: int) -> int:
    """How many samples' inputs fit in the room, each of as many rows as are ever kept."""
    columns = sum(walk.parameters[layers[0]].shape[1:].numel() for layers in walk.blocks[block].inputs)
    return max(1, min(SAMPLES_AT_ONCE, ROOM // max(1, 4 * MOST_ROWS * columns)))


def _seen_by_input(walk: Walk, block: int, number: int) -> list[list[Seen]]:
    """What each input of the block was in one sample."""
    watch = walk.watch_all(block, number)
    found = []
    for layers in walk.blocks[block].inputs:
        mine = [watch.products[product] for product in dict.fromkeys(at for name, at in watch.log if name in layers)]
        found.append([seen(product, seed=number) for product in mine if product.inputs.numel()])
    return found


def _added(
    stats: InputStats | None, layers: tuple[str, ...], found: Mapping[int, Sequence[Seen]], parts: Strata
) -> InputStats | None:
    """The stats with what some samples gave, by their numbers; None where nothing was seen yet."""
    flat = [(one, number) for number, several in found.items() for one in several]
    if not flat:
        return stats
    first = flat[0][0]
    columns, channels = first.rows.shape[1], len(first.absmax)
    stats = stats or InputStats(layers, parts.count, columns=columns, channels=channels, device=first.rows.device)
    stats.add(
        [one for one, _ in flat],
        [parts.groups[number] for _, number in flat],
        [parts.weights[number] for _, number in flat],
    )
    return stats


def _seen(walk: Walk, block: int, layers: tuple[str, ...], number: int, importance: Importance = ALIKE) -> list[Seen]:
    """Nothing of products without tokens: experts that a sample does not need are given such."""
    sample = number % len(walk.samples)
    products = walk.watch(block, layers, number).products
    found = [seen(product, seed=sample) for product in products if product.inputs.numel()]
    return found if len(found) != 1 else [_counted(found[0], importance.of(layers, sample, len(found[0].rows)))]


def _counted(one: Seen, say: Tensor | None) -> Seen:
    return one if say is None else replace(one, say=say.to(one.rows.device))

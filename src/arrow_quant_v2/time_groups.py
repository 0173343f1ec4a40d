"""Time groups: ranges of timesteps that share activation parameters; knows neither tensors nor models."""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from arrow_quant_v2.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, kw_only=True)
class TimeGroups:
    """`edges` ascend; group g holds the timesteps in [edges[g], edges[g + 1]), the last one its end too.

    A timestep outside all of them belongs to the nearest group, so that a sampler may go a little further than the
    one that was seen.
    """

    edges: tuple[float, ...]

    def __post_init__(self) -> None:
        """Refuse edges that do not ascend.

        Raises:
            ConfigurationError: there are fewer than two, or they do not ascend, or one is not finite.
        """
        ascending = all(one < other for one, other in pairwise(self.edges))
        if len(self.edges) < 2 or not ascending or not all(map(math.isfinite, self.edges)):  # noqa: PLR2004 - a range
            raise ConfigurationError(f"the edges of time groups are {self.edges}; two or more ascending numbers needed")

    @property
    def count(self) -> int:
        """How many groups there are."""
        return len(self.edges) - 1

    def group_of(self, timestep: float) -> int:
        """The group that a timestep belongs to.

        Raises:
            ConfigurationError: it is NaN.
        """
        if math.isnan(timestep):
            raise ConfigurationError("the timestep is NaN; give the model's own time argument, or the masked fraction")
        return min(max(bisect.bisect_right(self.edges, timestep) - 1, 0), self.count - 1)

    def ranges(self) -> tuple[tuple[float, float], ...]:
        """(start, end) of every group."""
        return tuple(pairwise(self.edges))


def uniform_groups(timesteps: Sequence[float], count: int) -> TimeGroups:
    """At most `count` groups with equally many of the steps that were seen in each, whatever the noise schedule."""
    return balanced_groups(timesteps, [1.0] * len(timesteps), count)


def balanced_groups(timesteps: Sequence[float], changes: Sequence[float], count: int) -> TimeGroups:
    """At most `count` groups with an equal share of the measured change in each.

    `changes` says for each of the timesteps how much the stats change there (0 or more); equal timesteps are never
    parted, and edges lie halfway between neighbours.
    """
    weight = _weight_of_each(timesteps, changes)
    steps = sorted(weight)
    total = sum(weight.values()) or 1.0
    edges, before = [steps[0]], 0.0
    for step, following in pairwise(steps):
        before += weight[step]
        if before * count >= total * len(edges) - 1e-9 * total and len(edges) < count:
            edges.append(max((step + following) / 2.0, math.nextafter(step, math.inf)))
    return TimeGroups(edges=(*edges, max(steps[-1], math.nextafter(edges[-1], math.inf))))


def _weight_of_each(timesteps: Sequence[float], changes: Sequence[float]) -> dict[float, float]:
    if not timesteps:
        raise ConfigurationError("time groups need timesteps; none was seen")
    weight: dict[float, float] = {}
    for timestep, change in zip(timesteps, changes, strict=True):
        weight[timestep] = weight.get(timestep, 0.0) + max(0.0, change)
    return weight

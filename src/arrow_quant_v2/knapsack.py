"""One choice for each item, so that the loss is least and the sizes stay within a budget; knows nothing of layers.

The multiple-choice knapsack problem, solved exactly: partial solutions are extended item by item, and those are dropped
that another one beats in both size and loss, or that cannot lead to less than the best solution known. What a partial
solution can still lead to is bounded from below by its linear relaxation, in which the last choice may be a fraction
(Sinha and Zoltners, 1979); the best solution known at the start is that relaxation without the fraction.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

Floats: TypeAlias = "NDArray[np.float64]"
Whole: TypeAlias = "NDArray[np.int64]"

ROUNDING = 1e-12  # of the loss: two solutions nearer than this are equally good
MOST_STATES = 2_000_000  # beyond this only the most promising ones are followed; no model that was seen comes near


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One of the choices of an item: its whole size, and what it loses."""

    size: int
    loss: float


@dataclass(frozen=True, kw_only=True)
class _Step:
    """From one choice of an item to the next larger one on the lower hull: more size, less loss."""

    item: int
    size: int
    gain: float

    @property
    def rate(self) -> float:
        return self.gain / self.size


def cheapest(items: Sequence[Sequence[Choice]], budget: int) -> tuple[int, ...] | None:
    """The number of the choice of each item: least loss within the budget, the smaller one of equals.

    None: not even the smallest choices fit.
    """
    hulls = [_hull(item) for item in items]
    least = sum(item[hull[0]].size for item, hull in zip(items, hulls, strict=True))
    if least > budget:
        return None
    steps = _steps(items, hulls)
    best = _rounded_down(items, hulls, steps, budget - least)
    found = _Search(items, hulls, steps, budget).run(_loss(items, best))
    return best if found is None else found


def _hull(item: Sequence[Choice]) -> list[int]:
    """The choices on the lower convex hull of loss over size, from the smallest to the one that loses least."""
    order = sorted(range(len(item)), key=lambda n: (item[n].size, item[n].loss))
    hull: list[int] = []
    for number in order:
        if hull and item[number].loss >= item[hull[-1]].loss:
            continue
        while len(hull) > 1 and _rate(item, hull[-2], number) >= _rate(item, hull[-2], hull[-1]):
            hull.pop()
        hull.append(number)
    return hull


def _rate(item: Sequence[Choice], small: int, large: int) -> float:
    return (item[small].loss - item[large].loss) / (item[large].size - item[small].size)


def _steps(items: Sequence[Sequence[Choice]], hulls: Sequence[Sequence[int]]) -> list[_Step]:
    """All steps, those that gain most for their size first."""
    steps = [
        _Step(item=n, size=item[b].size - item[a].size, gain=item[a].loss - item[b].loss)
        for n, (item, hull) in enumerate(zip(items, hulls, strict=True))
        for a, b in pairwise(hull)
    ]
    return sorted(steps, key=lambda step: -step.rate)


def _rounded_down(
    items: Sequence[Sequence[Choice]], hulls: Sequence[Sequence[int]], steps: Sequence[_Step], room: int
) -> tuple[int, ...]:
    """Steps in their order as long as there is room; an item whose step has none takes no later one."""
    at, stuck = [0] * len(items), set[int]()
    for step in steps:
        if step.item in stuck or step.size > room:
            stuck.add(step.item)
            continue
        at[step.item] += 1
        room -= step.size
    return tuple(hull[place] for hull, place in zip(hulls, at, strict=True))


def _loss(items: Sequence[Sequence[Choice]], chosen: Sequence[int]) -> float:
    return sum(item[number].loss for item, number in zip(items, chosen, strict=True))


class _Search:
    """Partial solutions of the first items: their sizes and losses, and how each was come by."""

    def __init__(
        self, items: Sequence[Sequence[Choice]], hulls: Sequence[Sequence[int]], steps: Sequence[_Step], budget: int
    ) -> None:
        self._items, self._budget = items, budget
        self._of = np.array([step.item for step in steps], dtype=np.int64)
        self._size = np.array([step.size for step in steps], dtype=np.int64)
        self._gain = np.array([step.gain for step in steps])
        smallest = [item[hull[0]] for item, hull in zip(items, hulls, strict=True)]
        self._least = [sum(one.size for one in smallest[n:]) for n in range(len(items) + 1)]
        self._most = [sum(one.loss for one in smallest[n:]) for n in range(len(items) + 1)]
        self._came: list[tuple[Whole, Whole]] = []  # of each item: the state before, and the choice

    def run(self, best: float) -> tuple[int, ...] | None:
        """The choices of a solution that loses less than `best`; None where there is none."""
        sizes, losses = np.zeros(1, dtype=np.int64), np.zeros(1)
        for number, item in enumerate(self._items):
            sizes, losses = self._extended(number, item, sizes, losses, best)
            if not len(sizes):
                return None
        return self._path(int(np.argmin(losses)))

    def _extended(
        self, number: int, item: Sequence[Choice], sizes: Whole, losses: Floats, best: float
    ) -> tuple[Whole, Floats]:
        """All states with one item more, less those that are of no use."""
        more = (sizes[None] + np.array([[one.size] for one in item], dtype=np.int64)).reshape(-1)
        lost = (losses[None] + np.array([[one.loss] for one in item])).reshape(-1)
        bounds = lost + self._bound(number + 1, self._budget - more)
        kept = np.flatnonzero(bounds < best - ROUNDING * abs(best))
        kept = kept[np.lexsort((lost[kept], more[kept]))]
        before = np.concatenate([[np.inf], np.minimum.accumulate(lost[kept])[:-1]]) if len(kept) else lost[kept]
        kept = kept[lost[kept] < before]  # else a smaller one loses no more
        if len(kept) > MOST_STATES:
            kept = np.sort(kept[np.argpartition(bounds[kept], MOST_STATES)[:MOST_STATES]])
        self._came.append((kept % len(sizes), kept // len(sizes)))
        return more[kept], lost[kept]

    def _bound(self, first: int, room: Whole) -> Floats:
        """The least that the items from `first` on can lose within each room, fractions allowed; inf: they do not fit.

        A step counts whole or in part, in the order of what it gains for its size.
        """
        later = self._of >= first
        sizes = np.concatenate([[0], np.cumsum(self._size[later])])
        gains = np.concatenate([[0.0], np.cumsum(self._gain[later])])
        spare = room - self._least[first]
        found = self._most[first] - np.interp(np.maximum(spare, 0), sizes, gains)
        return np.where(spare < 0, np.inf, found)

    def _path(self, state: int) -> tuple[int, ...]:
        """The choices that led to a state of the last item."""
        chosen = []
        for before, choice in reversed(self._came):
            chosen.append(int(choice[state]))
            state = int(before[state])
        return tuple(reversed(chosen))

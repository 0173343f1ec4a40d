"""Tensor work in pieces of one core each, so that results do not depend on how many cores share it.

A matrix product of torch rounds differently on two threads than on one. Pieces whose shapes are fixed, each worked on
by one thread, do not. Knows nothing of methods.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import torch

from arrow_quant_v2.engines.local import ordered_map
from arrow_quant_v2.kernels.cpu import threads_per_call

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

Item = TypeVar("Item")
Result = TypeVar("Result")

TILE = 512  # columns of H in a piece; sizes of pieces are part of the result, so they never follow the machine


def tiles(count: int, size: int = TILE) -> list[slice]:
    """[0, count) in slices of `size`; the last one may be shorter."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def each_on_one_core(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """The results in order; as many pieces at once as the kernels may use threads (torch's number, unless said).

    torch.set_num_threads speaks for the thread that calls it, and for threads that start later: so what the caller had
    is said again at the end.
    """
    before = torch.get_num_threads()
    workers = max(1, min(threads_per_call.get() or before, len(items)))

    def alone(item: Item) -> Result:
        torch.set_num_threads(1)
        threads_per_call.set(1)
        return function(item)

    try:
        with ordered_map(alone, items, workers=workers, in_flight=len(items)) as results:
            return list(results)
    finally:
        torch.set_num_threads(before)


@contextmanager
def cores_at_most(count: int) -> Iterator[None]:
    """Inside, `each_on_one_core` and the kernels use `count` threads, and torch between them one; then as before.

    With torch's own threads results would depend on their number, and cores be used that nobody allowed.
    """
    before, asked = torch.get_num_threads(), threads_per_call.set(count)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        threads_per_call.reset(asked)

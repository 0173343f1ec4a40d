"""Many pieces of work on this machine's cores, results in order, few in flight; knows nothing of tensors."""

from __future__ import annotations

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from concurrent.futures import Future

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def ordered_map(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    workers: int,
    in_flight: int,
    room: int = 0,
    size: Callable[[Item], int] = lambda _: 0,
) -> Iterator[Iterator[Result]]:
    """Map in threads: results in the order of the items, few of them started and not yet taken.

    These are at most `in_flight`, or more while the `size` of their results together stays below `room`. Work happens
    while the consumer is busy with earlier results. Leaving the context cancels what has not started and waits for
    what has; an error of the function is raised where its result is taken. Each call sees a copy of the context
    variables of the caller.
    """
    with ThreadPoolExecutor(max_workers=workers, thread_name_prefix="arrow-quant") as pool:
        waiting: deque[tuple[Future[Result], int]] = deque()
        remaining = iter(items)
        taken = 0  # of the room

        def start() -> None:
            nonlocal taken
            while len(waiting) < in_flight or taken < room:
                if not (more := list(islice(remaining, 1))):
                    return
                waiting.append((pool.submit(copy_context().run, function, more[0]), size(more[0])))
                taken += waiting[-1][1]

        def results() -> Iterator[Result]:
            nonlocal taken
            start()
            while waiting:
                future, freed = waiting.popleft()
                result = future.result()
                taken -= freed
                start()
                yield result

        try:
            yield results()
        finally:
            for future, _ in waiting:
                future.cancel()


@contextmanager
def in_background() -> Iterator[Callable[..., object]]:
    """A function that calls another one later, in one thread of its own and in order; its errors are not told.

    For work that only saves time, such as starting to flush a file that is flushed for good in the end. Leaving the
    context drops what has not started.
    """
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="arrow-quant-later")
    try:
        yield pool.submit
    finally:
        pool.shutdown(cancel_futures=True)

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
    function: Callable[[Item], Result], items: Iterable[Item], *, workers: int, in_flight: int
) -> Iterator[Iterator[Result]]:
    """Map in threads: results in the order of the items, at most `in_flight` of them started and not yet taken.

    Work happens while the consumer is busy with earlier results. Leaving the context cancels what has not started
    and waits for what has; an error of the function is raised where its result is taken. Each call sees a copy of
    the context variables of the caller.
    """
    with ThreadPoolExecutor(max_workers=workers, thread_name_prefix="arrow-quant") as pool:
        waiting: deque[Future[Result]] = deque()
        remaining = iter(items)

        def start(count: int) -> None:
            waiting.extend(pool.submit(copy_context().run, function, item) for item in islice(remaining, count))

        def results() -> Iterator[Result]:
            start(in_flight)
            while waiting:
                result = waiting.popleft().result()
                start(1)
                yield result

        try:
            yield results()
        finally:
            for future in waiting:
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

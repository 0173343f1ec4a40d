"""Many pieces of work in order, few in flight."""

from __future__ import annotations

import threading
import time
from contextvars import ContextVar
from typing import TYPE_CHECKING

import pytest

from arrow_quant_v2.engines.local import in_background, ordered_map

if TYPE_CHECKING:
    from collections.abc import Iterator

WAIT = 10.0
flavour: ContextVar[str] = ContextVar("flavour", default="plain")


def counted(taken: list[int], count: int) -> Iterator[int]:
    for item in range(count):
        taken.append(item)
        yield item


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_the_order_of_the_items(workers: int) -> None:
    def later_ones_are_faster(item: int) -> int:
        time.sleep(0.002 * (10 - item))
        return item * item

    with ordered_map(later_ones_are_faster, range(10), workers=workers, in_flight=6) as results:
        assert list(results) == [item * item for item in range(10)]


def test_no_more_items_are_taken_than_may_be_in_flight() -> None:
    taken: list[int] = []
    with ordered_map(str, counted(taken, 100), workers=2, in_flight=5) as results:
        assert taken == []  # nothing starts before the first result is asked for
        for number, _ in enumerate(results, start=1):
            assert len(taken) <= number + 5
    assert len(taken) == 100


def test_more_items_are_taken_while_their_results_fit_the_room() -> None:
    taken: list[int] = []
    with ordered_map(str, counted(taken, 100), workers=2, in_flight=3, room=40, size=lambda item: item) as results:
        assert next(results) == "0"
        assert taken == list(range(10))  # 1 to 8 have less than 40 together, and so have room for one more
        for number, _ in enumerate(results, start=2):
            waiting = taken[number:]
            assert len(waiting) <= 3 or sum(waiting[:-1]) < 40
    assert len(taken) == 100


def test_work_goes_on_while_the_consumer_is_busy() -> None:
    reached = threading.Event()

    def work(item: int) -> int:
        if item == 2:
            reached.set()
        return item

    with ordered_map(work, range(5), workers=1, in_flight=3) as results:
        assert next(results) == 0
        assert reached.wait(WAIT)


def test_nothing_in_nothing_out() -> None:
    with ordered_map(str, [], workers=2, in_flight=4) as results:
        assert list(results) == []


def test_an_error_is_raised_where_its_result_is_taken() -> None:
    def work(item: int) -> int:
        if item == 3:
            raise KeyError(item)
        return item

    taken: list[int] = []
    with ordered_map(work, counted(taken, 100), workers=2, in_flight=4) as results:
        assert [next(results) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(KeyError):
            next(results)
    assert len(taken) <= 8


def test_leaving_waits_for_what_runs_and_cancels_the_rest() -> None:
    started, release, finished = threading.Event(), threading.Event(), []

    def work(item: int) -> None:
        if item == 1:
            started.set()
            release.wait(WAIT)
        finished.append(item)

    def leave() -> None:
        with ordered_map(work, range(50), workers=1, in_flight=8) as results:
            next(results)
            assert started.wait(WAIT)
            threading.Timer(0.05, release.set).start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        leave()
    assert finished[:2] == [0, 1]
    assert len(finished) <= 3
    time.sleep(0.02)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("arrow-quant")]


def test_each_call_sees_the_caller_s_context_and_keeps_its_own() -> None:
    def work(item: int) -> str:
        before = flavour.get()
        flavour.set(f"changed by {item}")
        return before

    token = flavour.set("sweet")
    try:
        with ordered_map(work, range(6), workers=2, in_flight=3) as results:
            assert set(results) == {"sweet"}
        assert flavour.get() == "sweet"
    finally:
        flavour.reset(token)


def test_background_work_is_done_in_order_and_its_errors_are_not_told() -> None:
    done: list[int] = []
    reached = threading.Event()

    def work(item: int) -> None:
        if item == 1:
            raise OSError("too bad")
        done.append(item)
        if item == 3:
            reached.set()

    with in_background() as later:
        for item in range(4):
            later(work, item)
        assert reached.wait(WAIT)
    assert done == [0, 2, 3]


def test_leaving_drops_background_work_that_has_not_started() -> None:
    started, release, done = threading.Event(), threading.Event(), []

    def work(item: int) -> None:
        started.set()
        release.wait(WAIT)
        done.append(item)

    with in_background() as later:
        for item in range(9):
            later(work, item)
        assert started.wait(WAIT)
        threading.Timer(0.05, release.set).start()
    assert done == [0]

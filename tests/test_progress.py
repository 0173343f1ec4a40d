"""What a progress callback hears, and that it cannot lose a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from small_models import save_model

from arrow_quant_v2 import progress as room
from arrow_quant_v2.api import ArrowQuantV2
from arrow_quant_v2.progress import Progress, duration

if TYPE_CHECKING:
    from pathlib import Path


class Clock:
    """Time that passes when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(room.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_the_message_says_how_long_it_will_take(clock: Clock) -> None:
    heard: list[tuple[str, float]] = []
    told = Progress(lambda message, fraction: heard.append((message, fraction)), total=100)
    clock.now += 30
    told.advance(25, "b")
    told.tell("1/4 a")
    assert heard == [("b, about 1 min 30 s left", 0.25), ("1/4 a, about 1 min 30 s left", 0.25)]


def test_no_guess_is_made_from_too_little(clock: Clock) -> None:
    heard: list[str] = []
    told = Progress(lambda message, _: heard.append(message), total=100)
    clock.now += 0.5
    told.advance(1, "a")
    told.tell("a")
    assert heard == ["a"]


def test_work_of_an_earlier_run_says_nothing_about_speed(clock: Clock) -> None:
    heard: list[tuple[str, float]] = []
    told = Progress(lambda message, fraction: heard.append((message, fraction)), total=100)
    clock.now += 50
    told.skip(80)
    clock.now += 10
    told.advance(10, "a")
    assert heard == [("a, about 10 s left", 0.9)]


def test_what_is_left_of_work_that_is_done_several_times_follows_from_the_time_that_it_took(clock: Clock) -> None:
    heard: list[str] = []
    told = Progress(lambda message, _: heard.append(message), total=100)
    for left in (3, 2):
        told.repeat(left)
        told.begin(100)
        clock.now += 40
        told.advance(80, "most of it")
        clock.now += 10
        told.advance(20, "all of it")
    assert heard == [
        "most of it, about 1 min 50 s left",
        "all of it, about 1 min 40 s left",
        "most of it, about 1 min 0 s left",
        "all of it, about 50 s left",
    ]


def test_another_round_begins_at_nothing_and_not_in_the_middle() -> None:
    heard: list[float] = []
    told = Progress(lambda _, fraction: heard.append(fraction), total=100)
    for _ in range(2):
        told.begin(80)
        for _ in range(2):
            told.tell("a layer")
            told.advance(40, "a layer")
        told.tell("all layers")
    assert heard == [0.0, 0.5, 1.0, 0.0, 0.5, 1.0]


def test_a_long_layer_is_heard_of_every_five_seconds(clock: Clock) -> None:
    heard: list[str] = []
    told = Progress(lambda message, _: heard.append(message), total=1000)
    for _ in range(20):
        clock.now += 1
        told.advance(1, "long")
    assert len(heard) == 4


def test_nothing_to_do_is_done() -> None:
    heard: list[float] = []
    Progress(lambda _, fraction: heard.append(fraction), total=0).tell("empty")
    assert heard == [1.0]


def test_a_callback_that_raises_is_reported_once_and_the_run_goes_on(tmp_path: Path) -> None:
    calls = []

    def broken(message: str, _: float) -> None:
        calls.append(message)
        raise ValueError("no such window")

    with pytest.warns(UserWarning, match="progress_callback raised ValueError: no such window") as caught:
        ArrowQuantV2().quantize_diffusion_model(
            save_model(tmp_path / "model"), tmp_path / "out", progress_callback=broken
        )
    assert (len(calls), len(caught)) == (1, 1)
    assert (tmp_path / "out" / "metadata.json").exists()


def test_an_interrupt_inside_the_callback_is_no_failure_of_it() -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Progress(interrupted, total=1).tell("a")


def test_every_layer_is_told_and_the_fraction_only_rises(tmp_path: Path) -> None:
    heard: list[tuple[str, float]] = []
    ArrowQuantV2().quantize_diffusion_model(
        save_model(tmp_path / "model"),
        tmp_path / "out",
        progress_callback=lambda message, fraction: heard.append((message, fraction)),
    )
    assert [message.split(",")[0].split()[0] for message, _ in heard] == [f"{i}/24" for i in range(1, 25)]
    fractions = [fraction for _, fraction in heard]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")]
)
def test_durations_read_like_words(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_work_that_is_done_several_times_is_counted_as_often() -> None:
    heard: list[float] = []
    progress = Progress(lambda _, fraction: heard.append(fraction), 1)
    for times in (2, 1):
        progress.repeat(times)
        progress.begin(100)
        progress.skip(100)
        progress.tell("done")
    assert heard == [0.5, 1.0]

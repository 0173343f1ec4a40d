"""A progress bar in a terminal, plain lines without one; knows nothing of the work."""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SECONDS_BETWEEN_LINES = 5.0
BAR = 20


@contextmanager
def told_progress(*, quiet: bool) -> Iterator[Callable[[str, float], object] | None]:
    """A callback for (message, fraction) that shows it on stderr; None when nothing is to be shown."""
    console = Console(stderr=True)
    if quiet:
        yield None
    elif not console.is_terminal:
        yield _lines()
    else:
        columns = (BarColumn(BAR), TaskProgressColumn(), TextColumn("{task.description}", markup=False))
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("starting", total=1.0)
            room = console.width - BAR - len(" 100% ")
            yield lambda message, fraction: bar.update(
                task, description=fitted(message, room), completed=percent(fraction) / 100
            )


@contextmanager
def told_steps(*, quiet: bool) -> Iterator[Callable[[int, int, str], object]]:
    """A callback for (step, steps, text so far) that shows both on stderr, in place where it is a terminal."""
    console = Console(stderr=True)
    if quiet:
        yield lambda _step, _steps, _text: None
    elif not console.is_terminal:
        yield _step_lines()
    else:
        with Live(console=console, transient=True, auto_refresh=False) as live:
            yield lambda step, steps, text: live.update(
                Group(Text(printable(text)), Text(f"step {step} of {steps}", style="dim")), refresh=True
            )


def printable(text: str) -> str:
    """The text without what a terminal would obey instead of showing."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "\ufffd" for letter in text)


def _step_lines() -> Callable[[int, int, str], None]:
    """A line for every step with a text; without one, as for `_lines`."""
    tell = _lines()

    def tell_step(step: int, steps: int, text: str) -> None:
        if text:
            sys.stderr.write(f"{step}/{steps} {printable(text)}\n")
        else:
            tell(f"step {step} of {steps}", step / steps)

    return tell_step


def percent(fraction: float) -> int:
    """Whole percents that are done: 100 at the end, not before."""
    return int(100 * fraction)


def fitted(message: str, room: int) -> str:
    """The message with its middle left out where it is too long: the count and the time left stay."""
    start = message.find(" ") + 1
    end = room - start - 1
    return message if len(message) <= room or end < 1 else f"{message[:start]}\u2026{message[-end:]}"


def _lines() -> Callable[[str, float], None]:
    """A line at once, then every five seconds, and one at the end."""
    last = -SECONDS_BETWEEN_LINES

    def tell(message: str, fraction: float) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES or fraction >= 1.0:
            last = now
            sys.stderr.write(f"{percent(fraction):3d}% {message}\n")

    return tell

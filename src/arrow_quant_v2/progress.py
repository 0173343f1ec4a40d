"""How far a run is and how long it will still take, told to a callback; knows nothing of the work."""

from __future__ import annotations

import time
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from typing_extensions import Self

SECONDS_BETWEEN_REPORTS = 5.0
SECONDS_BEFORE_A_GUESS = 1.0


class Progress:
    """Counts bytes of finished work and tells `callback(message, fraction)`.

    Reports every finished layer, and at least every five seconds inside a long one. A callback that raises is
    reported once as a warning and not called again; the run goes on.
    """

    def __init__(self, callback: Callable[[str, float], object] | None, total: int) -> None:
        self._callback = callback
        self._total = total
        self._done = self._fresh = 0
        self.times = 1  # that work which begins will be done
        self._started = self._told = time.monotonic()

    def repeat(self, times: int) -> None:
        """Work that begins will be done this many times, the first one counted."""
        self.times = times

    def begin(self, total: int) -> None:
        """The whole work, once it is known better; the time until now says nothing about speed.

        Where all work that was known is done, this is another round, and begins at nothing.
        """
        if self._done >= self._total:
            self._done = 0
        self._total = self._done + total * self.times
        self._fresh = 0
        self._started = time.monotonic()

    @property
    def left(self) -> int:
        """What is still to do, in bytes."""
        return max(0, self._total - self._done)

    def advance(self, amount: int, what: str) -> None:
        """`amount` bytes of fresh work are done; told when the last report is long ago."""
        self._done += amount
        self._fresh += amount
        if time.monotonic() - self._told >= SECONDS_BETWEEN_REPORTS:
            self.tell(what)

    def skip(self, amount: int) -> None:
        """`amount` bytes were done by an earlier run; they say nothing about speed."""
        self._done += amount
        if not self._fresh:
            self._started = time.monotonic()

    def tell(self, what: str) -> None:
        """Report now."""
        self._told = time.monotonic()
        if self._callback is None:
            return
        fraction = min(1.0, self._done / self._total) if self._total else 1.0
        with _Survived() as outcome:
            self._callback(f"{what}{self._remaining()}", fraction)
        if outcome.failed:
            self._callback = None

    def _remaining(self) -> str:
        elapsed = time.monotonic() - self._started
        if elapsed < SECONDS_BEFORE_A_GUESS or not self._fresh or self._done >= self._total:
            return ""
        seconds = elapsed * (self._total - self._done) / self._fresh
        return f", about {duration(seconds)} left"


class _Survived:
    """Turns what a caller's own code raises into one warning."""

    failed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> bool:
        self.failed = isinstance(error, Exception)
        if self.failed:
            warnings.warn(
                f"progress_callback raised {type(error).__name__}: {error}; the run goes on without it", stacklevel=4
            )
        return self.failed


def duration(seconds: float) -> str:
    """Like "40 s", "3 min 20 s" or "2 h 5 min"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"

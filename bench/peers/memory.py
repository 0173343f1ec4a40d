"""By how much a process grew while something was done in it; for this environment and for ours."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self


class PeakMemory:
    """10^6 bytes by which the process grew at most inside; 0.0 where the system does not tell, as Linux does."""

    def __init__(self) -> None:
        self.megabytes = 0.0
        self._before: float | None = None

    def __enter__(self) -> Self:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
            self._before = resident("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            self.megabytes = max(0.0, resident("VmHWM") - self._before)


def resident(what: str) -> float:
    """10^6 bytes of this process's own memory: VmRSS now, VmHWM at most."""
    line = next(one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith(what))
    return int(line.split()[1]) * 1024 / 1e6

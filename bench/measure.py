"""What every bench needs: the machine in words, timing against the memory bandwidth, tables and JSON."""

from __future__ import annotations

import json
import platform
import re
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import Tensor

CONSOLE = Console(width=None if Console().is_terminal else 120)


def machine() -> dict[str, Any]:
    """Processor, threads and torch; Linux tells the processor's name only in /proc/cpuinfo."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    name = found.group(1) if found else platform.processor()
    return {"cpu": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def seconds(run: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def read_gb_per_s(memory: Tensor) -> float:
    """1e9 bytes per second that torch reads with all its threads: the better of a sum and a maximum."""
    return memory.nbytes / min(seconds(memory.sum), seconds(memory.amax)) / 1e9


@dataclass
class Timing:
    """Rounds of one call, each beside the memory bandwidth of that moment: on a shared machine both vary."""

    nbytes: int
    rates: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)

    def add(self, taken: float, read: float) -> None:
        """Count a round: `taken` seconds while memory was read at `read` GB/s."""
        self.rates.append(self.nbytes / taken / 1e9)
        self.ratios.append(self.rates[-1] / read)

    @property
    def gb_per_s(self) -> float:
        """Median over the rounds."""
        return statistics.median(self.rates)

    @property
    def of_read(self) -> float:
        """Median of the ratios to the memory bandwidth of the same round."""
        return statistics.median(self.ratios)


def show(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print one table; the first column is text, the others are figures."""
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column == columns[0] else "right")
    for row in rows:
        table.add_row(*row)
    CONSOLE.print(table)


def verdict(value: float, bar: float) -> str:
    """Whether a figure reaches its bar."""
    return f"{'pass' if value >= bar else 'miss'} (>= {bar:g})"


def write_json(path: Path, figures: dict[str, Any]) -> None:
    """Keep the figures of one run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures, indent=2) + "\n")

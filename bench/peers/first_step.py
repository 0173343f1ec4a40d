"""Seconds to load a model, and memory until its first step is done, in a process of its own; in either environment.

Libraries are imported before; what a model takes of them beyond that is counted.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import torch
from memory import PeakMemory

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

CAN_BE = 600  # seconds that no such process takes


def first_step(load: Callable[[], Callable[[], object]]) -> dict[str, float]:
    """`load` gives a step."""
    torch.ones(64, 64) @ torch.ones(64, 64)
    with PeakMemory() as peak:
        started = time.perf_counter()
        step = load()
        loaded = time.perf_counter() - started
        step()
    return {"load_seconds": loaded, "peak_mb": peak.megabytes}


def in_own_process(file: str, words: Sequence[str]) -> dict[str, Any]:
    """What `file` prints in its last line when it is run with these words, else as `load_failure` its error's."""
    done = subprocess.run([sys.executable, file, *words], capture_output=True, text=True, check=False, timeout=CAN_BE)
    if done.returncode:
        return {"load_failure": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found

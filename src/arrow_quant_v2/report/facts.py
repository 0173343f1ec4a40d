"""How a run can be made again: its command, settings, data, versions and machine, in words. Knows no figures."""

from __future__ import annotations

import os
import platform
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from arrow_quant_v2.progress import duration

if TYPE_CHECKING:
    from collections.abc import Mapping

    from arrow_quant_v2.config import DiffusionQuantConfig

LIBRARIES = ("torch", "numpy", "pyarrow", "transformers", "diffusers")
CPU_FACTS = Path("/proc/cpuinfo")
SETTINGS = "settings.yaml"


def run_facts(
    source: str, out: Path, config: DiffusionQuantConfig, seconds: float, calibration: Mapping[str, object] | None
) -> dict[str, str]:
    """What `arrow-quant quantize` was asked, of what, when, how long it took, and on what."""
    return {
        "model": source,
        "command": f"arrow-quant quantize MODEL {out.name} --config {SETTINGS}",
        SETTINGS: config.to_yaml(),
        "calibration": _calibration(calibration),
        "made": f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC, in {duration(seconds)}",
        "versions": versions(),
        "hardware": hardware(),
    }


def versions() -> str:
    """Python and those libraries that are installed, with their versions."""
    found = (f"{library} {version}" for library in LIBRARIES if (version := _version(library)))
    return ", ".join([f"Python {platform.python_version()}", *found])


def _version(library: str) -> str | None:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


def hardware() -> str:
    """Processor, cores, memory and system of this machine, and its GPU where there is one."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    parts = [_cpu(), f"{os.cpu_count()} cores", f"{memory:.0f} GiB", f"{platform.system()} {platform.machine()}"]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    return ", ".join(parts)


def _cpu() -> str:
    """The processor's own name, which Linux keeps in a file."""
    try:
        lines = CPU_FACTS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _calibration(shown: Mapping[str, object] | None) -> str:
    if not shown:
        return "none: quantized from the weights alone"
    groups = shown.get("time_groups")
    count = len(groups) if isinstance(groups, list) else 1
    return f"{shown['samples']} samples: {shown['origin']}; {count} time group{'s' * (count != 1)}, {shown['method']}"

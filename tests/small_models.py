"""Model folders made in a moment, what lies in a folder, and programs run beside the tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

import arrow_quant_v2

if TYPE_CHECKING:
    from collections.abc import Mapping

ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(Path(arrow_quant_v2.__file__).parents[1]),
    "ARROW_QUANT_ENABLE_CALIBRATION": "false",  # few folders here hold a model that runs
}


@dataclass(frozen=True)
class Run:
    """How a command ended."""

    code: int
    out: str
    err: str


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Weights as trained ones are distributed."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05
    return values.to(dtype)


REPORTS = {"report.html", "report.json"}


def layers(count: int = 12, rows: int = 64, columns: int = 96) -> dict[str, torch.Tensor]:
    """`count` linear layers with their biases."""
    weights = {f"layers.{i:02d}.weight": normal(rows, columns, seed=i) for i in range(count)}
    return weights | {f"layers.{i:02d}.bias": normal(rows, seed=100 + i) for i in range(count)}


def save_model(folder: Path, tensors: Mapping[str, torch.Tensor] | None = None, **config: Any) -> Path:
    """A transformers folder of a text model."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(layers() if tensors is None else tensors), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architectures": ["BertForMaskedLM"]} | config))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def content_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its relative path, but the reports: they tell times, which differ between runs."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in REPORTS
    }


def run_python(code: str, *arguments: object, timeout: float = 120, **environment: str) -> Run:
    """A Python program of its own."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(
        command, env=ENVIRONMENT | environment, capture_output=True, text=True, check=False, timeout=timeout
    )
    return Run(code=done.returncode, out=done.stdout, err=done.stderr)


def run_command(*arguments: object, cwd: Path | None = None, timeout: float = 120, **environment: str) -> Run:
    """`arrow-quant` as a process of its own."""
    command = [sys.executable, "-m", "arrow_quant_v2", *map(str, arguments)]
    done = subprocess.run(
        command, env=ENVIRONMENT | environment, cwd=cwd, capture_output=True, text=True, check=False, timeout=timeout
    )
    return Run(code=done.returncode, out=done.stdout, err=done.stderr)

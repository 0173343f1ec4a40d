"""Linear layers that run on packed weights beside torch's in bfloat16 and float32: one row of inputs to many.

Every round runs torch's and ours one after the other, on the same inputs; ratios are of a round, and their median
counts. Inputs are bfloat16 for ours and for torch's bfloat16, which is slow on a processor without instructions for it:
so the ratio to the faster of torch's two is shown as well.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from measure import CONSOLE, machine, seconds, show, verdict, write_json
from torch import nn

from arrow_quant_v2.config import LayerSpec
from arrow_quant_v2.kernels import cpu
from arrow_quant_v2.packed import Layout
from arrow_quant_v2.quantizers import quantizer
from arrow_quant_v2.runtime.modules import run_packed
from arrow_quant_v2.runtime.packed_weight import PackedWeight

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from arrow_quant_v2.packed import PackedTensor

SHAPES = [(4096, 4096), (11008, 4096)]
COUNTS = (1, 8, 32, 256, 1024)
FORMATS = [(2, 64, "affine"), (2, 64, "r2q"), (4, 64, "affine"), (4, 128, "affine"), (8, 128, "affine")]
ALONE = {"linear": {2: 3.5, 4: 2.5, 8: 1.8}, "linear_dynamic": {2: 6.0, 4: 3.5, 8: 1.8}}  # one row
ACTIVATIONS: dict[str, Any] = {"linear": None, "linear_dynamic": "dynamic"}
FEW = 1.5  # 8 and 32 rows, 4 bits
MANY = {"linear": 0.9, "linear_dynamic": 1.3}


def bar_of(name: str, bits: int, grid: str, count: int) -> float | None:
    """How many times as fast as torch's bfloat16 it should be."""
    if grid != "affine":
        return None
    if count == 1:
        return ALONE[name][bits]
    if count < 256:
        return FEW if bits == 4 else None
    return MANY[name]


@dataclass
class Cell:
    """One op on one weight and so many inputs, and its times."""

    name: str
    shape: tuple[int, int]
    count: int
    bits: int
    group_size: int
    grid: str
    run: Callable[[], object]
    times: list[float] = field(default_factory=list)

    def ratio(self, rivals: list[list[float]]) -> float:
        """How many times as fast as the fastest rival of each round."""
        fastest = map(min, zip(*rivals, strict=True))
        return statistics.median(theirs / ours for theirs, ours in zip(fastest, self.times, strict=True))

    def figures(self, torch_times: dict[str, list[float]]) -> dict[str, Any]:
        """What goes into the JSON."""
        return {
            "op": self.name,
            "shape": list(self.shape),
            "inputs": self.count,
            "bits": self.bits,
            "group_size": self.group_size,
            "grid": self.grid,
            "ms": 1e3 * statistics.median(self.times),
            **{f"torch_{name}_ms": 1e3 * statistics.median(times) for name, times in torch_times.items()},
            "times_bfloat16": self.ratio([torch_times["bfloat16"]]),
            "times_float32": self.ratio([torch_times["float32"]]),
            "times_fastest": self.ratio(list(torch_times.values())),
            "bar": bar_of(self.name, self.bits, self.grid, self.count),
        }


def plain(weight: Tensor) -> nn.Linear:
    """Torch's own layer."""
    layer = nn.Linear(*reversed(weight.shape), bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def coded(weight: Tensor, bits: Any, group_size: int, grid: Any) -> PackedTensor:
    """The weight in codes, chosen by the quickest method of its grid."""
    method = "r2q" if grid == "r2q" else "rtn"
    layout = Layout(shape=tuple(weight.shape), bits=bits, quant_axis=1, group_size=group_size, grid=grid)
    spec = LayerSpec(bits=bits, group_size=group_size, method=method, symmetric=False)
    return quantizer(method)(weight, spec).packed("weight", "float32", layout)


def cells_of(weight: Tensor, x: Tensor) -> list[Cell]:
    cells = []
    for bits, group_size, grid in FORMATS:
        packed = PackedWeight(coded(weight, bits, group_size, grid))
        for name, activations in ACTIVATIONS.items():
            layer = run_packed(plain(weight), packed)
            layer.activations = activations
            shape = (weight.shape[0], weight.shape[1])
            cells.append(Cell(name, shape, len(x), bits, group_size, grid, partial(layer, x)))
    return cells


def measure(weight: Tensor, x: Tensor, rounds: int) -> list[dict[str, Any]]:
    """Figures of every op for one weight and one number of inputs."""
    cells = cells_of(weight, x)
    torchs = {"bfloat16": partial(plain(weight.bfloat16()), x), "float32": partial(plain(weight), x.float())}
    torch_times: dict[str, list[float]] = {name: [] for name in torchs}
    for number in range(rounds + 1):
        for name, run in torchs.items():
            torch_times[name].append(seconds(run))
        for cell in cells:
            cell.times.append(seconds(cell.run))
        if number == 0:  # the first round warms up
            for times in (*torch_times.values(), *(cell.times for cell in cells)):
                times.clear()
    return [cell.figures(torch_times) for cell in cells]


def row_of(found: dict[str, Any]) -> tuple[str, ...]:
    label = f"{found['op']} INT{found['bits']} g{found['group_size']} {found['grid']}"
    torchs = f"{found['torch_bfloat16_ms']:.3g} / {found['torch_float32_ms']:.3g}"
    ratios = (f"{found[key]:.2f} x" for key in ("times_bfloat16", "times_fastest"))
    bar = verdict(found["times_bfloat16"], found["bar"]) if found["bar"] else ""
    return label, str(found["inputs"]), f"{found['ms']:.3g}", torchs, *ratios, bar


def asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--inputs", type=int, nargs="*", default=COUNTS)
    return parser.parse_args()


def main() -> None:
    ask = asked()
    torch.set_num_threads(ask.threads)
    torch.set_grad_enabled(False)
    about = machine() | {"isa": cpu.activate()}
    CONSOLE.print("{cpu}, {threads} threads, torch {torch}, kernels: {isa}".format(**about))
    random, figures = torch.Generator().manual_seed(0), []
    for rows, columns in SHAPES:
        weight = torch.randn(rows, columns, generator=random) * 0.02
        found = []
        for count in ask.inputs:
            rounds = 7 * ask.rounds if count == 1 else ask.rounds if count < 256 else max(1, ask.rounds // 3)
            found += measure(weight, torch.randn(count, columns, generator=random).bfloat16(), rounds)
        columns_shown = ("op", "inputs", "ms", "torch bf16 / fp32 ms", "of bf16", "of faster", "bar")
        show(f"{rows} x {columns}", columns_shown, map(row_of, found))
        figures += found
    if ask.json:
        write_json(ask.json, {"machine": about, "cells": figures})


if __name__ == "__main__":
    main()

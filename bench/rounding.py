"""Speed of the kernels on CPU, beside the memory bandwidth of the same moments, the torch reference and the peers.

python bench/rounding.py [--json FILE] [--threads 2] [--rounds 7]
python bench/rounding.py --weights FILE.safetensors     only writes the weights, for bench/peers/quantize.py
python bench/rounding.py --peers FILE.json              adds what bench/peers/quantize.py measured
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable  # noqa: TC003 - a field of a dataclass
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import CONSOLE, Timing, machine, read_gb_per_s, seconds, show, verdict, write_json
from safetensors.torch import save_file
from torch import Tensor

from arrow_quant_v2.kernels import cpu, ops, reference
from arrow_quant_v2.packed import WIDTHS, WeightError
from arrow_quant_v2.quantizers.affine import STRETCHES

SHAPES = [(4096, 4096)] * 4 + [(11008, 4096)] * 2
REFERENCE_ROWS = 256
BAR_OF_READ = 0.5
BAR_OF_PEERS = 5.0


def seeded_weights() -> tuple[Tensor, list[Tensor]]:
    """All weights as one stretch of memory, 630 MB, and as the matrices in it."""
    sizes = [rows * columns for rows, columns in SHAPES]
    memory = torch.empty(sum(sizes)).normal_(std=0.02, generator=torch.Generator().manual_seed(0))
    return memory, [part.view(shape) for part, shape in zip(torch.split(memory, sizes), SHAPES, strict=True)]


@dataclass
class Cell:
    """One operation at one width: how it is run over all weights, and what was measured."""

    operation: str
    bits: int
    group_size: int | None
    dtype: str
    run: Callable[[], object]
    timing: Timing
    error: Callable[[], WeightError] | None = None

    @property
    def label(self) -> str:
        group = f" g{self.group_size}" if self.group_size else ""
        return f"{self.operation} INT{self.bits}{group} {self.dtype}"

    @property
    def has_bar(self) -> bool:
        return (self.operation, self.group_size, self.dtype) == ("nearest", 64, "float32") and self.bits != max(WIDTHS)

    def figures(self) -> dict[str, Any]:
        return {
            "operation": self.operation,
            "bits": self.bits,
            "group_size": self.group_size,
            "dtype": self.dtype,
            "gb_per_s": self.timing.gb_per_s,
            "of_read": self.timing.of_read,
            "cosine": self.error().cosine if self.error else None,
        }


def words(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def nbytes(weights: list[Tensor]) -> int:
    return sum(weight.nbytes for weight in weights)


class Quantize:
    """Quantizes every weight and keeps the error of the last pass."""

    def __init__(
        self, operator: Callable[..., Any], weights: list[Tensor], bits: int, group_size: int, method: str
    ) -> None:
        stretches = STRETCHES[bits] if method == "clip" else ()
        self.weights = weights
        self.quantize = partial(
            operator, bits=bits, group_size=group_size, symmetric=False, stretches=stretches, importance=None
        )
        self.sums: list[Tensor] = []

    def __call__(self) -> None:
        self.sums = [self.quantize(weight)[-1].sum(dim=0) for weight in self.weights]

    def error(self) -> WeightError:
        original, quantized, difference = torch.stack(self.sums).sum(dim=0).tolist()
        count = sum(weight.numel() for weight in self.weights)
        return WeightError(original=original, quantized=quantized, difference=difference, count=count)


def quantize_cell(weights: list[Tensor], method: str, bits: int, group_size: int) -> Cell:
    run = Quantize(ops.quantize, weights, bits, group_size, method)
    dtype = words(weights[0].dtype)
    return Cell(method, bits, group_size, dtype, run, Timing(nbytes(weights)), run.error)


def quantize_cells(weights: list[Tensor]) -> list[Cell]:
    halves = [weight.bfloat16() for weight in weights]
    return [
        quantize_cell(inputs, method, bits, group_size)
        for method in ("nearest", "clip")
        for inputs in (weights, halves)
        for group_size in (64, 128)
        for bits in WIDTHS
    ]


def restore_cells(weight: Tensor) -> list[Cell]:
    """Dequantize, unpack and pack one weight; bytes are those of the unpacked side."""
    cells = []
    for bits in WIDTHS:
        stored, columns = ops.quantize(weight, bits, 64, False, ())[:4], weight.shape[1]  # noqa: FBT003
        for dtype in (torch.float32, torch.bfloat16):
            run = partial(ops.dequantize, *stored, bits, columns, 64, dtype)
            cells.append(Cell("dequantize", bits, 64, words(dtype), run, Timing(weight.numel() * dtype.itemsize)))
            pairs = (stored[0], stored[1].repeat_interleave(2, dim=1), *stored[2:])
            run = partial(ops.dequantize_r2q, *pairs, bits, columns, 64, dtype)
            cells.append(Cell("dequantize r2q", bits, 64, words(dtype), run, Timing(weight.numel() * dtype.itemsize)))
        codes = ops.unpack(stored[0], bits, columns)
        unpack, pack = partial(ops.unpack, stored[0], bits, columns), partial(ops.pack, codes, bits)
        cells.append(Cell("unpack", bits, None, "uint8", unpack, Timing(codes.nbytes)))
        cells.append(Cell("pack", bits, None, "uint8", pack, Timing(codes.nbytes)))
    return cells


def reference_cells(weight: Tensor) -> list[Cell]:
    """The plain torch that defines the results, on a few rows: it is slow."""
    rows = [weight[:REFERENCE_ROWS]]
    cells = []
    for method in ("nearest", "clip"):
        for bits in (2, 4):
            run = Quantize(reference.quantize, rows, bits, 64, method)
            cells.append(Cell(f"reference {method}", bits, 64, "float32", run, Timing(nbytes(rows)), run.error))
    return cells


def measure(cells: list[Cell], memory: Tensor, rounds: int) -> float:
    """Run every cell once per round, each right after a reading of the memory; the median bandwidth of all."""
    bandwidth = Timing(1)
    for cell in cells:
        cell.run()
    for number in range(rounds):
        CONSOLE.print(f"round {number + 1} of {rounds}", style="dim")
        for cell in cells:
            read = read_gb_per_s(memory)
            bandwidth.add(1e-9 / read, read)
            cell.timing.add(seconds(cell.run), read)
    return bandwidth.gb_per_s


def show_cells(cells: list[Cell], read: float) -> None:
    rows = []
    for cell in cells:
        bar = verdict(cell.timing.of_read, BAR_OF_READ) if cell.has_bar else ""
        cosine = f"{cell.error().cosine:.5f}" if cell.error else ""
        rows.append((cell.label, f"{cell.timing.gb_per_s:.3g}", f"{cell.timing.of_read:.3f}", cosine, bar))
    title = f"Kernels; memory is read at {read:.1f} GB/s; GB/s of the input, or of what is written by dequantize"
    show(title, ("operation", "GB/s", "of read", "cosine", "bar"), rows)


@dataclass(frozen=True)
class Rival:
    """One peer's cell beside ours of the same width and group size."""

    cell: dict[str, Any]
    ours: Cell

    @property
    def ratio(self) -> float:
        """How many times faster we are."""
        return float(self.ours.timing.gb_per_s / self.cell["gb_per_s"])

    def row(self, bar: str) -> tuple[str, ...]:
        speed, cosine = self.cell["gb_per_s"], self.cell["cosine"]
        label = f"{self.cell['peer']} INT{self.cell['bits']} g{self.cell['group_size']}"
        return label, f"{speed:.3f}", f"{cosine:.4f}", f"{self.ratio:.1f} x", bar


def rivals(peers: list[dict[str, Any]], cells: list[Cell]) -> list[Rival]:
    ours = {(c.bits, c.group_size): c for c in cells if (c.operation, c.dtype) == ("nearest", "float32")}
    found = [cell for cell in peers if not cell["error"] and (cell["bits"], cell["group_size"]) in ours]
    return [Rival(cell, ours[cell["bits"], cell["group_size"]]) for cell in found]


def against_peers(peers: list[dict[str, Any]], cells: list[Cell]) -> dict[str, float]:
    """Print every peer, with the bar at the fastest as shipped; how many times faster we are than it, per width.

    A peer that this bench wraps in torch.compile is shown, but no user gets it so.
    """
    found, rows, fastest = rivals(peers, cells), [], {}
    for bits in sorted({rival.cell["bits"] for rival in found}):
        field = [rival for rival in found if rival.cell["bits"] == bits]
        shipped = [rival for rival in field if not rival.cell.get("compiled")]
        best = min(shipped, key=lambda rival: rival.ratio, default=None)
        rows += [rival.row(verdict(rival.ratio, BAR_OF_PEERS) if rival is best else "") for rival in field]
        if best:
            fastest[f"INT{bits}"] = best.ratio
    rows += [(f"{cell['peer']} INT{cell['bits']}", "failed", "", "", "") for cell in peers if cell["error"]]
    show("Peers, round to nearest, same tensors", ("peer", "GB/s", "cosine", "ours is", "bar"), rows)
    return fastest


def asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--peers", type=Path, help="figures of bench/peers/quantize.py")
    parser.add_argument("--weights", type=Path, help="write the weights to this safetensors file, and stop")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    return parser.parse_args()


def main() -> None:
    ask = asked()
    torch.set_num_threads(ask.threads)
    memory, weights = seeded_weights()
    if ask.weights:
        ask.weights.parent.mkdir(parents=True, exist_ok=True)
        save_file({f"{i}.weight": weight.clone() for i, weight in enumerate(weights)}, ask.weights)
        return
    about = machine() | {"isa": cpu.activate()}
    CONSOLE.print("{cpu}, {threads} threads, torch {torch}, kernels: {isa}".format(**about))
    cells = quantize_cells(weights) + restore_cells(weights[0]) + reference_cells(weights[0])
    read = measure(cells, memory, ask.rounds)
    show_cells(cells, read)
    peers = json.loads(ask.peers.read_text())["cells"] if ask.peers else []
    figures = {"machine": about, "read_gb_per_s": read, "cells": [cell.figures() for cell in cells]}
    if peers:
        figures |= {"peers": peers, "times_the_fastest_peer": against_peers(peers, cells)}
    if ask.json:
        write_json(ask.json, figures)


if __name__ == "__main__":
    main()

"""Convolutions with packed weights beside torch's, in bfloat16 and float32, in the shapes of the terrain UNet.

Every round runs torch's and ours one after the other, on the same inputs; ratios are of a round, and their median
counts.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from measure import machine, seconds, show, write_json
from torch.nn.functional import conv2d

from arrow_quant_v2.kernels import cpu, ops
from arrow_quant_v2.kernels.convolution import How, convolution

if TYPE_CHECKING:
    from collections.abc import Callable

GROUP = 64
SHAPES = [  # rows, channels, height and width, kernel
    (32, 32, 128, 3),
    (32, 64, 128, 3),
    (32, 64, 128, 1),
    (32, 32, 64, 3),
    (64, 64, 32, 3),
    (192, 64, 32, 1),
    (96, 96, 16, 3),
    (128, 128, 8, 3),
    (384, 128, 8, 1),
]


def runs_of(shape: tuple[int, int, int, int], dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Torch's convolution and ours of every width."""
    rows, channels, side, kernel = shape
    weight = torch.randn(rows, channels, kernel, kernel)
    x, how = (
        torch.randn(1, channels, side, side, dtype=dtype),
        How((kernel,) * 2, (1, 1), (kernel // 2,) * 2, (1, 1), 1),
    )
    runs: dict[str, Callable[[], object]] = {"torch": partial(conv2d, x, weight.to(dtype), padding=kernel // 2)}
    for bits in (2, 4, 8):
        stored = ops.quantize(weight.flatten(1), bits, GROUP, False, ())[:4]  # noqa: FBT003
        runs[f"INT{bits}"] = partial(convolution, x, *stored, None, bits, GROUP, "affine", *how)
    return runs


def measure(shape: tuple[int, int, int, int], dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """How many times as fast as torch's every width is."""
    runs = runs_of(shape, dtype)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            taken = seconds(run)
            if number:  # the first round warms up
                times[name].append(taken)
    ratios = {
        name: statistics.median(theirs / ours for theirs, ours in zip(times["torch"], of, strict=True))
        for name, of in times.items()
    }
    microseconds = {name: 1e6 * statistics.median(of) for name, of in times.items()}
    return {"shape": shape, "dtype": str(dtype), "microseconds": microseconds, "ratios": ratios}


def row_of(found: dict[str, Any]) -> tuple[str, ...]:
    """Torch's time, and the ratios to it."""
    rows, channels, side, kernel = found["shape"]
    label = f"{channels} to {rows}, {side} x {side}, {kernel} x {kernel}"
    ratios = [f"{found['ratios'][f'INT{bits}']:.2f}" for bits in (2, 4, 8)]
    return label, found["dtype"].removeprefix("torch."), f"{found['microseconds']['torch']:.0f}", *ratios


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    cpu.activate()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    print(machine())
    with torch.inference_mode():
        found = [measure(shape, dtype, given.rounds) for dtype in (torch.bfloat16, torch.float32) for shape in SHAPES]
    columns = ("convolution", "dtype", "torch, us", "INT2", "INT4", "INT8")
    show("speed as a multiple of torch's", columns, [row_of(one) for one in found])
    if given.json:
        write_json(given.json, {"machine": machine(), "convolutions": found})


if __name__ == "__main__":
    main()

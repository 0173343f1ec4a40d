"""Speed and weight error of the peers' round-to-nearest on CPU; knows nothing of how a peer rounds.

Run it with the peers' own Python: .venv-peers/bin/python bench/peers/quantize.py --weights FILE.safetensors.
Every cell (peer x bits) runs in a process of its own, so that a peer that fails costs its own cell only.
"""

import argparse
import json
import math
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

ERROR_CHARACTERS = 600


@dataclass(frozen=True, kw_only=True)
class Peer:
    """One way to round a weight: a function of a module beside this file."""

    package: str
    module: str
    function: str = "quantize"
    compiled: bool = False  # wrapped in torch.compile by this bench; no peer ships it so
    tensors: int | None = None  # a slow one is measured on the first few tensors only


PEERS = {
    "torchao": Peer(package="torchao", module="with_torchao"),
    "hqq": Peer(package="hqq", module="with_hqq"),
    "hqq optimized": Peer(package="hqq", module="with_hqq", function="quantize_optimized", tensors=1),
    "quanto": Peer(package="optimum-quanto", module="with_quanto"),
    "sdnq": Peer(package="sdnq", module="with_sdnq"),
    "torchao compiled": Peer(package="torchao", module="with_torchao", compiled=True),
    "hqq compiled": Peer(package="hqq", module="with_hqq", compiled=True),
    "quanto compiled": Peer(package="optimum-quanto", module="with_quanto", compiled=True),
    "sdnq compiled": Peer(package="sdnq", module="with_sdnq", compiled=True),
}


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What one cell measured over all its tensors together."""

    gb_per_s: float  # 1e9 bytes of fp32 input per second
    seconds: float  # of the median pass
    best_seconds: float  # of the fastest pass: what a busy machine cannot slow down
    cosine: float
    relative_error: float
    bits_per_weight: float  # as held in memory, scales and zero points included
    tensors: int


def matrices(path: Path) -> Iterator[Tensor]:
    """Every 2-D tensor of the file as fp32."""
    with safe_open(path, framework="pt") as file:
        for name in sorted(file.keys()):
            if len(file.get_slice(name).get_shape()) == 2:
                yield file.get_tensor(name).float()


def seconds_of_pass(quantize: Callable[[Tensor], Any], weights: list[Tensor]) -> float:
    """Wall time to quantize every weight once; each result is dropped before the next."""
    start = time.perf_counter()
    for weight in weights:
        quantize(weight)
    return time.perf_counter() - start


@dataclass
class Comparison:
    """Running sums over all weights w and their restored r, taken as one long vector, in fp64."""

    dot: float = 0.0
    weight_square: float = 0.0
    restored_square: float = 0.0
    error_square: float = 0.0

    def add(self, weight: Tensor, restored: Tensor) -> None:
        """Count one tensor, a few rows at a time: fp64 copies of a whole one cost more than the rounding."""
        for w_rows, r_rows in zip(weight.chunk(64), restored.chunk(64), strict=True):
            w, r = w_rows.flatten().double(), r_rows.flatten().double()
            self.dot += float(w @ r)
            self.weight_square += float(w @ w)
            self.restored_square += float(r @ r)
            self.error_square += float((w - r).square().sum())

    def cosine(self) -> float:
        return self.dot / math.sqrt(self.weight_square * self.restored_square)

    def relative_error(self) -> float:
        """|w - r| / |w|."""
        return math.sqrt(self.error_square / self.weight_square)


def measure(peer: Peer, bits: int, ask: argparse.Namespace) -> Figures:
    """Time the peer after one warm-up pass, then compare what it restores with what it was given."""
    module = import_module(peer.module)
    function = getattr(module, peer.function)
    rounding = torch.compile(function, dynamic=False) if peer.compiled else function
    weights = list(matrices(ask.weights))[: peer.tensors]

    def quantize(weight: Tensor) -> Any:
        return rounding(weight, bits, ask.group_size)

    seconds_of_pass(quantize, weights)
    passes = [seconds_of_pass(quantize, weights) for _ in range(ask.repeats)]
    comparison, stored = Comparison(), 0
    for weight in weights:
        quantized = quantize(weight)
        comparison.add(weight, module.restore(quantized))
        stored += sum(tensor.nbytes for tensor in module.stored(quantized))
    return Figures(
        gb_per_s=sum(weight.nbytes for weight in weights) / statistics.median(passes) / 1e9,
        seconds=statistics.median(passes),
        best_seconds=min(passes),
        cosine=comparison.cosine(),
        relative_error=comparison.relative_error(),
        bits_per_weight=8 * stored / sum(weight.numel() for weight in weights),
        tensors=len(weights),
    )


def raised(stderr: str, status: int) -> str:
    """The type and message that ended a Python process, or the end of what it said."""
    last_traceback = stderr.rpartition("Traceback (most recent call last):\n")
    message = re.search(r"^\S.*", last_traceback[2], re.DOTALL | re.MULTILINE) if last_traceback[1] else None
    text = message.group() if message else f"exit status {status}: {stderr[-ERROR_CHARACTERS:]}"
    return text[:ERROR_CHARACTERS].strip()


def cell(name: str, bits: int, ask: argparse.Namespace) -> dict[str, Any]:
    """Run this file again for one peer and width, and return its row of the JSON file."""
    command = [sys.executable, __file__, "--weights", str(ask.weights), "--group-size", str(ask.group_size)]
    command += ["--threads", str(ask.threads), "--repeats", str(ask.repeats), "--bits", str(bits), "--cell", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    peer, failed = PEERS[name], done.returncode != 0
    label = name.replace(name.split(maxsplit=1)[0], f"{peer.package} {version(peer.package)}", 1)
    figures = dict.fromkeys(Figures.__annotations__) if failed else json.loads(done.stdout.splitlines()[-1])
    return {
        "peer": label,
        "compiled": peer.compiled,
        "bits": bits,
        "group_size": ask.group_size,
        **figures,
        "error": raised(done.stderr, done.returncode) if failed else None,
    }


def row(cell: dict[str, Any]) -> str:
    """One line of the printed table."""
    head = f"{cell['peer']:<32}{cell['bits']:>5}"
    if cell["error"]:
        return f"{head}  {cell['error'].splitlines()[0]}"
    return (
        f"{head}{cell['gb_per_s']:>9.3f}{cell['seconds']:>9.3f}{cell['best_seconds']:>9.3f}{cell['cosine']:>9.4f}"
        f"{cell['relative_error']:>12.4f}{cell['bits_per_weight']:>13.3f}{cell['tensors']:>9}"
    )


def cpu() -> str:
    """The processor's name; Linux tells it only in /proc/cpuinfo."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found.group(1) if found else platform.processor()


def asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, required=True, help="safetensors file; its 2-D tensors count")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3, help="passes after the warm-up; the median counts")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--cell", choices=PEERS, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    ask = asked()
    torch.set_num_threads(ask.threads)
    torch.set_grad_enabled(False)
    if ask.cell:
        print(json.dumps(asdict(measure(PEERS[ask.cell], ask.bits[0], ask))))
        return
    columns = f"{'GB/s':>9}{'seconds':>9}{'best s':>9}{'cosine':>9}{'rel. error':>12}{'bits/weight':>13}{'tensors':>9}"
    print(f"{'peer':<32}{'bits':>5}{columns}")
    cells = []
    for name in ask.peers:
        for bits in ask.bits:
            cells.append(cell(name, bits, ask))
            print(row(cells[-1]), flush=True)
    machine = {"cpu": cpu(), "threads": ask.threads, "torch": torch.__version__}
    if ask.json:
        ask.json.write_text(json.dumps({"machine": machine, "cells": cells}, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Seconds of one denoising step under each peer on the CPU, beside the original in the same process.

Run it with the peers' own Python: .venv-peers/bin/python bench/peers/speed.py --folder bench/out/speed. There lie
the models as bench/speed.py wrote them. Every cell (model x peer x bits) runs in a process of its own, so that a peer
that fails costs its own cell only; it says so with its own error.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from quantize import raised
from safetensors.torch import load_file
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[2] / "tests"))

GROUP = 64


def with_torchao(model: nn.Module, bits: int) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_

    config = Int8WeightOnlyConfig() if bits == 8 else IntxWeightOnlyConfig(torch.int4, granularity=PerGroup(GROUP))
    quantize_(model, config)


def with_torchao_int8(model: nn.Module, bits: int) -> None:
    """Inputs rounded to 8 bits too, row by row."""
    from torchao.quantization import (
        Int8DynamicActivationInt8WeightConfig,
        Int8DynamicActivationIntxWeightConfig,
        PerGroup,
        quantize_,
    )

    narrow = Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(GROUP))
    quantize_(model, Int8DynamicActivationInt8WeightConfig() if bits == 8 else narrow)


def with_quanto(model: nn.Module, bits: int) -> None:
    from optimum.quanto import freeze, qint4, qint8, quantize

    quantize(model, weights=qint8 if bits == 8 else qint4)
    freeze(model)


def with_hqq(model: nn.Module, bits: int) -> None:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=bits, group_size=GROUP)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear and child.in_features % GROUP == 0:
                setattr(parent, name, HQQLinear(child, config, compute_dtype=torch.float32, device="cpu"))


def with_sdnq(model: nn.Module, bits: int) -> None:
    from sdnq import sdnq_post_load_quant

    sdnq_post_load_quant(model, weights_dtype=f"uint{bits}", group_size=GROUP, quant_conv=True)


def with_sdnq_int8(model: nn.Module, bits: int) -> None:
    """Inputs rounded to 8 bits too, multiplied as integers."""
    from sdnq import sdnq_post_load_quant

    sdnq_post_load_quant(
        model, weights_dtype=f"int{bits}", group_size=GROUP, quant_conv=True, use_quantized_matmul=True
    )


PEERS: dict[str, tuple[str, Callable[[nn.Module, int], None]]] = {
    "torchao": ("torchao", with_torchao),
    "torchao, int8 inputs": ("torchao", with_torchao_int8),
    "quanto": ("optimum-quanto", with_quanto),
    "hqq": ("hqq", with_hqq),
    "sdnq": ("sdnq", with_sdnq),
    "sdnq, int8 inputs": ("sdnq", with_sdnq_int8),
}


def antiberty(folder: Path) -> nn.Module:
    from transformers import BertForMaskedLM

    return BertForMaskedLM.from_pretrained(folder, dtype=torch.float32).eval()


def terrain(folder: Path) -> nn.Module:
    from terrain_unet import TerrainUNet

    model = TerrainUNet()
    model.load_state_dict(load_file(next(folder.glob("*.safetensors"))))
    return model.eval()


MODELS = {"antiberty": antiberty, "terrain": terrain}


def output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    found = model(**inputs)
    return getattr(found, "logits", found)


def seconds(model: nn.Module, inputs: dict[str, Tensor]) -> float:
    start = time.perf_counter()
    output(model, inputs)
    return time.perf_counter() - start


def measure(name: str, peer: str, bits: int, ask: argparse.Namespace) -> dict[str, Any]:
    """Original and quantized in turns, after one warm-up each."""
    folder = ask.folder / name
    inputs = load_file(ask.folder / f"{name}.inputs.safetensors")
    original, quantized = MODELS[name](folder), MODELS[name](folder)
    PEERS[peer][1](quantized, bits)
    exact, rounded = output(original, inputs), output(quantized, inputs).float()
    turns = [(seconds(original, inputs), seconds(quantized, inputs)) for _ in range(ask.repeats)]
    fp32, own = (statistics.median(times) for times in zip(*turns, strict=True))
    return {"seconds": own, "fp32_seconds": fp32, "error": float((rounded - exact).var() / exact.var())}


def cell(name: str, peer: str, bits: int, ask: argparse.Namespace) -> dict[str, Any]:
    """Run this file again for one cell, and return its row of the JSON file."""
    command = [sys.executable, __file__, "--folder", str(ask.folder), "--threads", str(ask.threads)]
    command += ["--repeats", str(ask.repeats), "--cell", name, peer, str(bits)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    failed = done.returncode != 0
    figures = {} if failed else json.loads(done.stdout.splitlines()[-1])
    package = PEERS[peer][0]
    said = raised(done.stderr, done.returncode) if failed else None
    return {"model": name, "peer": f"{peer} ({version(package)})", "bits": bits, **figures, "failure": said}


def line(row: dict[str, Any]) -> str:
    head = f"{row['model']:<10} {row['peer']:<34} INT{row['bits']}"
    if row["failure"]:
        return f"{head}  {row['failure'].splitlines()[0]}"
    ratio = row["fp32_seconds"] / row["seconds"]
    return f"{head}{1000 * row['seconds']:>9.1f} ms{ratio:>8.2f} times fp32's speed, error {row['error']:.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--cell", nargs=3, help=argparse.SUPPRESS)
    ask = parser.parse_args()
    torch.set_num_threads(ask.threads)
    torch.set_grad_enabled(False)
    if ask.cell:
        name, peer, bits = ask.cell
        print(json.dumps(measure(name, peer, int(bits), ask)))
        return
    rows = []
    for name in ask.models:
        for peer in ask.peers:
            for bits in ask.bits:
                rows.append(cell(name, peer, bits, ask))
                print(line(rows[-1]), flush=True)
    if ask.json:
        ask.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()

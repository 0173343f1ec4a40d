"""Seconds of one denoising step under each peer on the CPU, beside the float32 original in the same process.

Then a process of its own loads what torch.save wrote of the quantized model, as no two peers have a format in common,
and makes one step: seconds of loading, and the memory until then.

Run it with the peers' own Python: .venv-peers/bin/python bench/peers/speed.py --folder bench/out/speed. There lie
the models as bench/speed.py wrote them. Every cell (model x peer x bits x dtype) runs in a process of its own, so that
a peer that fails costs its own cell only; it says so with its own error.
"""

import argparse
import json
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import torch
from first_step import first_step, in_own_process
from quantize import raised
from safetensors.torch import load_file
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[2] / "tests"))

GROUP = 64
DTYPES = ["float32", "bfloat16"]


def with_torchao(model: nn.Module, bits: int) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_

    config = Int8WeightOnlyConfig() if bits == 8 else IntxWeightOnlyConfig(torch.int4, granularity=PerGroup(GROUP))
    quantize_(model, config)
    forget_names(model)


def forget_names(model: nn.Module) -> None:
    """Without the words that torchao puts into modules for printing, which cannot be pickled."""
    for module in model.modules():
        vars(module).pop("extra_repr", None)


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
    forget_names(model)


def with_quanto(model: nn.Module, bits: int) -> None:
    from optimum.quanto import freeze, qint4, qint8, quantize

    quantize(model, weights=qint8 if bits == 8 else qint4)
    freeze(model)


def with_hqq(model: nn.Module, bits: int) -> None:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config, dtype = BaseQuantizeConfig(nbits=bits, group_size=GROUP), next(model.parameters()).dtype
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear and child.in_features % GROUP == 0:
                setattr(parent, name, HQQLinear(child, config, compute_dtype=dtype, device="cpu"))


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


def bert() -> Any:
    from transformers import BertForMaskedLM

    return BertForMaskedLM


def unet() -> Any:
    from terrain_unet import TerrainUNet

    return TerrainUNet


CLASSES = {"antiberty": bert, "terrain": unet}


def antiberty(folder: Path) -> nn.Module:
    return bert().from_pretrained(folder, dtype=torch.float32).eval()


def terrain(folder: Path) -> nn.Module:
    model = unet()()
    model.load_state_dict(load_file(next(folder.glob("*.safetensors"))))
    return model.eval()


MODELS = {"antiberty": antiberty, "terrain": terrain}


UNDER_AUTOCAST = "terrain"  # whose own embeddings stay float32


def step_of(name: str, model: nn.Module, inputs: dict[str, Tensor]) -> Callable[[], Tensor]:
    """One step in the dtype of the model."""
    half = next(model.parameters()).dtype == torch.bfloat16

    def step() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=half and name == UNDER_AUTOCAST):
            found = model(**inputs)
            return getattr(found, "logits", found).float()

    return step


def seconds(step: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def first(quantized: nn.Module, name: str, peer: str, ask: argparse.Namespace) -> dict[str, Any]:
    """From a file to the first output: seconds to load it, memory until then, its size; or why it cannot be."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.pt"
        try:
            torch.save(quantized, file)
        except (AttributeError, NotImplementedError, RuntimeError, TypeError, pickle.PicklingError) as error:
            return {"load_failure": f"{type(error).__name__}: {error}"}
        words = ["--folder", str(ask.folder), "--threads", str(ask.threads), "--first", name, peer, str(file)]
        return {"file_mb": file.stat().st_size / 1e6} | in_own_process(__file__, words)


def loaded(name: str, peer: str, file: str, ask: argparse.Namespace) -> dict[str, float]:
    """What `first` asks of a process of its own."""
    PEERS[peer][1](nn.Sequential(nn.Linear(GROUP, GROUP)), 8)  # imports what the peer needs
    CLASSES[name]()
    inputs = load_file(ask.folder / f"{name}.inputs.safetensors")
    return first_step(lambda: step_of(name, torch.load(file, weights_only=False), inputs))


def measure(name: str, peer: str, bits: int, dtype: str, ask: argparse.Namespace) -> dict[str, Any]:
    """Original and quantized in turns, after one warm-up each."""
    folder = ask.folder / name
    inputs = load_file(ask.folder / f"{name}.inputs.safetensors")
    quantized = MODELS[name](folder).to(getattr(torch, dtype))
    PEERS[peer][1](quantized, bits)
    beginning = first(quantized, name, peer, ask)
    original, own = step_of(name, MODELS[name](folder), inputs), step_of(name, quantized, inputs)
    exact, rounded = original(), own()
    turns = [(seconds(original), seconds(own)) for _ in range(ask.repeats)]
    fp32, narrow = (statistics.median(times) for times in zip(*turns, strict=True))
    error = float((rounded - exact).var() / exact.var())
    return {"seconds": narrow, "fp32_seconds": fp32, "error": error} | beginning


def cell(name: str, peer: str, bits: int, dtype: str, ask: argparse.Namespace) -> dict[str, Any]:
    """Run this file again for one cell, and return its row of the JSON file."""
    command = [sys.executable, __file__, "--folder", str(ask.folder), "--threads", str(ask.threads)]
    command += ["--repeats", str(ask.repeats), "--cell", name, peer, str(bits), dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    failed = done.returncode != 0
    figures = {} if failed else json.loads(done.stdout.splitlines()[-1])
    package = PEERS[peer][0]
    said = raised(done.stderr, done.returncode) if failed else None
    what = {"model": name, "peer": f"{peer} ({version(package)})", "bits": bits, "dtype": dtype}
    return {**what, **figures, "failure": said}


def line(row: dict[str, Any]) -> str:
    head = f"{row['model']:<10} {row['peer']:<34} INT{row['bits']} {row['dtype']:<8}"
    if row["failure"]:
        return f"{head}  {row['failure'].splitlines()[0]}"
    ratio = row["fp32_seconds"] / row["seconds"]
    loading = row.get("load_failure") or f"loaded in {row['load_seconds']:.2f} s, {row['peak_mb']:.0f} MB"
    return (
        f"{head}{1000 * row['seconds']:>9.1f} ms{ratio:>8.2f} times fp32's speed, error {row['error']:.3g}, {loading}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--cell", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--first", nargs=3, help=argparse.SUPPRESS)
    ask = parser.parse_args()
    torch.set_num_threads(ask.threads)
    torch.set_grad_enabled(False)
    if ask.cell:
        name, peer, bits, dtype = ask.cell
        print(json.dumps(measure(name, peer, int(bits), dtype, ask)))
        return
    if ask.first:
        print(json.dumps(loaded(*ask.first, ask)))
        return
    rows = []
    for which in product(ask.models, ask.peers, ask.bits, ask.dtypes):
        rows.append(cell(*which, ask))
        print(line(rows[-1]), flush=True)
    if ask.json:
        ask.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()

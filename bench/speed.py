"""Seconds of one denoising step from packed weights, beside the original in float32 and bfloat16 in the same run.

    python bench/speed.py [--folder bench/out/speed] [--peers FILE] [--json FILE]

AntiBERTy's step is one call on a sequence that is all [MASK]; the terrain UNet's is one call on noise. The models and
their inputs are written to the folder first, where bench/peers/speed.py finds them; its figures are shown with --peers.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from measure import machine, show, write_json
from safetensors.torch import load_file, save_file
from transformers import BertForMaskedLM

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from real_models import ANTIBODIES, CLS, MASK, SEP, antiberty_folder, terrain_file
from terrain_unet import TerrainUNet, load_terrain, save_terrain, trajectory

import arrow_quant_v2 as aq

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

GROUP = 64


def write_models(folder: Path) -> None:
    """Both models as folders, and one step's inputs of each."""
    shutil.rmtree(folder, ignore_errors=True)
    antiberty_folder(folder / "antiberty")
    hidden = [CLS, *[MASK] * len(ANTIBODIES[0]), SEP]
    save_file({"input_ids": torch.tensor([hidden])}, folder / "antiberty.inputs.safetensors")
    model = load_terrain(terrain_file())
    (folder / "terrain").mkdir()
    save_terrain(model, folder / "terrain")
    inputs, _ = next(trajectory(model, 0, difficulty=(0.37,)))
    save_file({name: value.contiguous() for name, value in inputs.items()}, folder / "terrain.inputs.safetensors")


def antiberty(folder: Path) -> nn.Module:
    """The original."""
    model: nn.Module = BertForMaskedLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model


def terrain(folder: Path) -> nn.Module:
    """The original."""
    model = TerrainUNet()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()


ORIGINALS: dict[str, Callable[[Path], nn.Module]] = {"antiberty": antiberty, "terrain": terrain}


def packed(folder: Path, name: str, bits: int, activations: Any) -> nn.Module:
    """Quantized from its weights alone, and loaded again: how weights were chosen makes no difference to speed."""
    out = folder / f"{name}-int{bits}"
    if not out.exists():
        config = aq.DiffusionQuantConfig(
            bit_width=bits, group_size=GROUP, method="clip", enable_calibration=False, min_accuracy=0.0
        )
        aq.ArrowQuantV2().quantize_diffusion_model(folder / name, out, config)
    into = TerrainUNet() if name == "terrain" else None
    return aq.load(out, activations=activations, into=into)


def output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Logits, or the map."""
    found = model(**inputs)
    tensor: Tensor = getattr(found, "logits", found)
    return tensor.float()


def in_bfloat16(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The same of a model that was cast; the terrain UNet's own embeddings stay float32 and are cast by autocast."""
    with torch.autocast("cpu", torch.bfloat16, enabled=isinstance(model, TerrainUNet)):
        return output(model, inputs)


def steps_of(folder: Path, name: str) -> dict[str, Callable[[], Tensor]]:
    """What is timed: a name and one step."""
    inputs = load_file(folder / f"{name}.inputs.safetensors")
    original, half = ORIGINALS[name](folder / name), ORIGINALS[name](folder / name).bfloat16()
    steps = {
        "original float32": lambda: output(original, inputs),
        "original bfloat16": lambda: in_bfloat16(half, inputs),
    }
    for bits in (8, 4, 2):
        steps[f"INT{bits}"] = partial(output, packed(folder, name, bits, None), inputs)
        for label, activations in (("bfloat16", None), ("bfloat16, int8 inputs", "dynamic")):
            model = packed(folder, name, bits, activations).bfloat16()
            steps[f"INT{bits}, {label}"] = partial(in_bfloat16, model, inputs)
    return steps


def measure(steps: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, dict[str, float]]:
    """Medians of steps that are taken in turns, and how far their results are from float32's."""
    exact = steps["original float32"]()
    errors = {name: float((step() - exact).var() / exact.var()) for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    return {name: {"seconds": statistics.median(times[name]), "error": errors[name]} for name in steps}


def fastest(found: dict[str, dict[str, float]]) -> float:
    """Seconds of the original in its faster dtype."""
    return min(found[f"original {dtype}"]["seconds"] for dtype in ("float32", "bfloat16"))


def rows_of(name: str, found: dict[str, dict[str, float]], peers: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Every step beside the original; a peer's speed is its own ratio to float32 in its own process."""
    best, fp32 = fastest(found), found["original float32"]["seconds"]
    rows = [
        (
            label,
            f"{1000 * f['seconds']:.1f}",
            f"{best / f['seconds']:.2f}",
            f"{fp32 / f['seconds']:.2f}",
            f"{f['error']:.2e}",
        )
        for label, f in found.items()
    ]
    for peer in peers:
        if peer["model"] == name:
            label = f"{peer['peer']}, INT{peer['bits']}, {peer['dtype']}"
            if peer["failure"]:
                rows.append((label, "", "", "", peer["failure"].splitlines()[0][:60]))
            else:
                ratio = peer["fp32_seconds"] / peer["seconds"]
                rows.append((label, f"{1000 * peer['seconds']:.1f}", "", f"{ratio:.2f}", f"{peer['error']:.2e}"))
    return rows


def main() -> None:
    """Write, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("bench/out/speed"))
    parser.add_argument("--models", nargs="+", choices=ORIGINALS, default=list(ORIGINALS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", type=Path, help="what bench/peers/speed.py measured")
    parser.add_argument("--write", action="store_true", help="only write the models, for bench/peers/speed.py")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    torch.set_grad_enabled(False)
    if given.write or not given.folder.exists():
        write_models(given.folder)
    if given.write:
        return
    print(machine())
    peers = json.loads(given.peers.read_text()) if given.peers else []
    figures: dict[str, Any] = {"machine": machine(), "peers": peers}
    columns = ("one step", "ms", "of the fastest original", "of float32", "error (variance ratio)")
    for name in given.models:
        found = measure(steps_of(given.folder, name), given.rounds)
        show(f"{name}: speed as a multiple", columns, rows_of(name, found, peers))
        figures[name] = found
    if given.json:
        write_json(given.json, figures)


if __name__ == "__main__":
    main()

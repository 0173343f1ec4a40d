"""Seconds of one denoising step from packed weights, beside the original in float32 and bfloat16 in the same run.

    python bench/speed.py [--folder bench/out/speed] [--peers FILE] [--json FILE] [--into PAGE]

AntiBERTy's step is one call on a sequence that is all [MASK]; the terrain UNet's is one call on noise. The models and
their inputs are written to the folder first, where bench/peers/speed.py finds them; its figures are shown with --peers.
Loading and the memory until the first step is done are measured in processes of their own, one for each candidate.
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
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from measure import machine, show, write_json
from safetensors.torch import load_file, save_file
from speed_table import filled
from transformers import BertForMaskedLM

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from real_models import ANTIBODIES, CLS, MASK, SEP, antiberty_folder, terrain_file
from terrain_unet import TerrainUNet, load_terrain, save_terrain, trajectory

sys.path.append(str(Path(__file__).parent / "peers"))

from first_step import first_step, in_own_process

import arrow_quant_v2 as aq

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

GROUP = 64
TRAINED_WITH = "training_args.bin"  # beside AntiBERTy's weights


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
    with torch.device("meta"):  # weights of its own would be thrown away
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


Step: TypeAlias = "Callable[[], Tensor]"


def candidates(folder: Path, name: str) -> dict[str, Callable[[], Step]]:
    """What is timed: a name, and what loads the model and gives one step."""
    inputs = load_file(folder / f"{name}.inputs.safetensors")

    def original() -> nn.Module:
        return ORIGINALS[name](folder / name)

    found: dict[str, Callable[[], Step]] = {
        "original float32": lambda: partial(output, original(), inputs),
        "original bfloat16": lambda: partial(in_bfloat16, original().bfloat16(), inputs),
    }
    for bits in (8, 4, 2):
        found[f"INT{bits}"] = partial(exact, folder, name, bits, inputs)
        for label, activations in (("bfloat16", None), ("bfloat16, int8 inputs", "dynamic")):
            found[f"INT{bits}, {label}"] = partial(narrow, folder, name, bits, inputs, activations)
    return found


def exact(folder: Path, name: str, bits: int, inputs: dict[str, Tensor]) -> Step:
    """One step of ours in float32."""
    return partial(output, packed(folder, name, bits, None), inputs)


def narrow(folder: Path, name: str, bits: int, inputs: dict[str, Tensor], activations: str | None) -> Step:
    """One step of ours in bfloat16."""
    return partial(in_bfloat16, packed(folder, name, bits, activations).bfloat16(), inputs)


def beginning(folder: Path, name: str, label: str) -> dict[str, Any]:
    """Seconds to load, memory until the first step is done, and the size of the weights."""
    found = in_own_process(__file__, ["--folder", str(folder), "--first", name, label])
    width = label.split(",", maxsplit=1)[0].lower()
    place = folder / (name if label.startswith("original") else f"{name}-{width}")
    weights = [file for kind in ("*.parquet", "*.safetensors", "*.bin") for file in place.glob(kind)]
    return found | {"file_mb": sum(file.stat().st_size for file in weights if file.name != TRAINED_WITH) / 1e6}


def measure(steps: dict[str, Step], rounds: int) -> dict[str, dict[str, Any]]:
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


def fastest(found: dict[str, dict[str, Any]]) -> float:
    """Seconds of the original in its faster dtype."""
    return min(found[f"original {dtype}"]["seconds"] for dtype in ("float32", "bfloat16"))


def rows_of(name: str, found: dict[str, dict[str, Any]], peers: list[dict[str, Any]]) -> list[tuple[str, ...]]:
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
    parser.add_argument("--into", type=Path, nargs="+", default=[], help="pages whose table is made again")
    parser.add_argument("--first", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    torch.set_grad_enabled(False)
    if given.write or not given.folder.exists():
        write_models(given.folder)
    if given.write:
        return
    if given.first:
        name, label = given.first
        print(json.dumps(first_step(candidates(given.folder, name)[label])))
        return
    print(machine())
    peers = json.loads(given.peers.read_text()) if given.peers else []
    figures: dict[str, Any] = {"machine": machine(), "peers": peers}
    columns = ("one step", "ms", "of the fastest original", "of float32", "error (variance ratio)")
    for name in given.models:
        steps = {label: load() for label, load in candidates(given.folder, name).items()}
        found = measure(steps, given.rounds)
        del steps
        for label in found:
            found[label] |= beginning(given.folder, name, label)
        show(f"{name}: speed as a multiple", columns, rows_of(name, found, peers))
        figures[name] = found
    if given.json:
        write_json(given.json, figures)
    for page in given.into:
        page.write_text(filled(page.read_text(encoding="utf-8"), figures), encoding="utf-8")


if __name__ == "__main__":
    main()

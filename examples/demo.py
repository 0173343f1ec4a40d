"""Real models for text, images, proteins and terrain in 8, 4 and 2 bits: what `make demo` shows.

Each is quantized, run beside its original on inputs that it was not fitted to, and shown in demo/report.html, where
originals and quantized stand side by side at equal seed.
"""

from __future__ import annotations

import shutil
import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import transformers
from rich.console import Console
from rich.table import Table

from arrow_quant_v2 import ArrowQuantV2, DiffusionQuantConfig
from arrow_quant_v2.report.write import write_page
from arrow_quant_v2.validation.judge import Heard, Wish

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from real_models import antiberty_folder, terrain_file
from terrain_unet import load_terrain, trajectory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

    from arrow_quant_v2.validation.findings import Findings

OUT, MODELS = Path("demo"), Path(__file__).parent / "models"
WIDTHS = (8, 4, 2)
BAR = 0.85
COLUMNS = ("model", "MB", "smaller", "bits/weight", "weight cosine", "output cosine", "error", "bar", "seconds")
SAMPLES_AT_8 = 8


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One model: its folder or itself, how it is quantized, and what both are shown."""

    original: Path | torch.nn.Module
    settings: dict[str, Any]
    wish: dict[str, Any] = field(default_factory=dict)


def text() -> Subject:
    """Masked diffusion over words of the King James Bible, calibrated on what it writes itself."""
    return Subject(original=MODELS / "text", settings={"group_size": 32, "calibration_samples": 64})


def image() -> Subject:
    """Latent diffusion of handwritten digits, calibrated along its own denoising trajectory."""
    return Subject(original=MODELS / "image", settings={"group_size": 32, "calibration_samples": 64})


def antiberty() -> Subject:
    """Masked diffusion over antibodies."""
    folder = antiberty_folder(OUT / "antiberty")
    return Subject(original=folder, settings={"group_size": 64, "calibration_samples": 24})


def terrain() -> Subject:
    """A UNet that makes height maps, a live module; from its weights alone, because calibrating it takes minutes."""

    def states(module: torch.nn.Module) -> Iterator[tuple[Any, float]]:
        for seed in range(2):
            yield from trajectory(module, seed, difficulty=(0.37 * seed,))

    settings = {"group_size": 32, "modality": "image", "enable_calibration": False}
    wish = {"provider": states, "modality": "image"}
    return Subject(original=load_terrain(terrain_file()), settings=settings, wish=wish)


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "text": text,
    "image": image,
    "antiberty": antiberty,
    "terrain": terrain,
}


def row(name: str, bits: int, result: dict[str, Any], found: Findings, seconds: tuple[float, float]) -> tuple[str, ...]:
    """One line of the table."""
    figures = {one.name: one.value for one in found.metrics}
    error = figures.get("output error")
    return (
        f"{name} INT{bits}",
        f"{result['model_size_mb']:.2f}",
        f"{result['compression_ratio']:.1f}x",
        f"{result['bits_per_weight']:.2f}",
        f"{result['cosine_similarity']:.4f}",
        "" if found.accuracy is None else f"{found.accuracy:.4f}",
        "" if error is None else f"{error:.2g}",
        "met" if found.passed else "missed",
        f"{seconds[0]:.0f} + {seconds[1]:.0f}",
    )


def config_of(subject: Subject, bits: int) -> DiffusionQuantConfig:
    """At 8 bits fewer samples do, and no sweeps: hardly anything is left to fit."""
    few = {"calibration_samples": SAMPLES_AT_8, "code_sweeps": 0} if bits == 8 else {}
    settings = {"bit_width": bits, "min_accuracy": 0.0, "calibration_tokens": 0} | subject.settings | few
    return DiffusionQuantConfig(**settings)


def show(name: str, subject: Subject, table: Table) -> dict[str, Findings]:
    """Quantize one model in three widths, and run each beside the original."""
    quantizer, heard, shown = ArrowQuantV2(), Heard(), {}
    for bits in WIDTHS:
        out, started = OUT / f"{name}-int{bits}", time.perf_counter()
        result = quantizer.quantize_diffusion_model(subject.original, out, config_of(subject, bits))
        made = time.perf_counter()
        found = quantizer.find_out(subject.original, out, Wish(min_accuracy=BAR, pairs=1, **subject.wish), heard=heard)
        table.add_row(*row(name, bits, result, found, (made - started, time.perf_counter() - made)))
        shown[f"{name} INT{bits}"] = found
    return shown


def main() -> None:
    """Run the demo and say where everything lies."""
    warnings.simplefilter("ignore")
    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    table = Table(title=f"everything stored counted; the bar is an output cosine of {BAR}")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "model" else "right")
    found: dict[str, Findings] = {}
    console = Console(width=120)
    for name, subject in SUBJECTS.items():
        console.print(f"{name}: quantizing to {', '.join(map(str, WIDTHS))} bits, and judging")
        found |= show(name, subject(), table)
    write_page(OUT / "report.html", found, "Real models in 8, 4 and 2 bits")
    console.print(table)
    console.print(
        "error: |original - quantized|^2 / |original|^2 of outputs; seconds: quantizing + judging", highlight=False
    )
    console.print(f"originals and quantized, side by side: {OUT / 'report.html'}", highlight=False)


if __name__ == "__main__":
    main()

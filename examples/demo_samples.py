"""What the text and image models of examples/models make in 8, 4 and 2 bits, at equal seed; the end of `make demo`."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from PIL import Image

import arrow_quant_v2 as aq
from arrow_quant_v2 import ArrowQuantV2, DiffusionQuantConfig

MODELS, OUT = Path(__file__).parent / "models", Path("demo")
WIDTHS = (8, 4, 2)
STEPS, SAMPLES = 20, 64


def quantized(name: str, bits: int) -> Path:
    """The model in this width, calibrated on its own trajectory."""
    out = OUT / f"{name}-int{bits}"
    config = DiffusionQuantConfig(
        bit_width=bits, group_size=32, min_accuracy=0.3, calibration_samples=SAMPLES, calibration_tokens=0
    )
    result = ArrowQuantV2().quantize_diffusion_model(MODELS / name, out, config, overwrite=True)
    sys.stdout.write(f"{name} in {bits} bits: {result['model_size_mb']:.2f} MB\n")
    return out


def digits(pipeline: Any) -> np.ndarray:
    """One picture of each digit, side by side."""
    pipeline.set_progress_bar_config(disable=True)
    draw = torch.Generator().manual_seed(0)
    made = pipeline.to(torch.float32)(class_labels=list(range(10)), num_inference_steps=STEPS, generator=draw).images
    return np.concatenate([np.asarray(one) for one in made], axis=1)


def pictures() -> None:
    rows = [digits(DiffusionPipeline.from_pretrained(MODELS / "image"))]
    rows += [digits(aq.load_pipeline(quantized("image", bits))) for bits in WIDTHS]
    grid = Image.fromarray(np.concatenate(rows))
    path = OUT / "digits.png"
    grid.resize((3 * grid.width, 3 * grid.height)).save(path)
    sys.stdout.write(f"{path}: digits of the original, then in {', '.join(map(str, WIDTHS))} bits, at the same seed\n")


def texts() -> None:
    for bits in WIDTHS:
        made = ArrowQuantV2().generate(quantized("text", bits), "And the king said", seed=0, length=60)
        sys.stdout.write(f"{made['text']}\n\n")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    diffusers_logging.set_verbosity_error()
    OUT.mkdir(exist_ok=True)
    pictures()
    texts()

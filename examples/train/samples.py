"""Shows what the models of examples/models make: texts, pictures and sounds, put into their cards.

Needs nothing but the models. Files lie in examples/models/samples, so that no copy of a model carries them.
"""

from __future__ import annotations

import wave
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from keeping import CARD, MODELS
from PIL import Image

from arrow_quant_v2.calibration.transformers_model import open_transformers
from arrow_quant_v2.runtime.generate_text import generate_text
from arrow_quant_v2.runtime.spectrogram import spectrogram_of
from arrow_quant_v2.sources.folder import open_model

if TYPE_CHECKING:
    from pathlib import Path

    from arrow_quant_v2.calibration.runnable import Runnable

HEADING = "## Samples"
OUT = MODELS / "samples"
STEPS, ROWS, LARGER = 25, 3, 2
PROMPTS = {
    "text": ("In the beginning", "And the king said unto", "Blessed are", ""),
    "code": ("def __init__(self", "    for ", "import ", ""),
}


def opened(folder: Path) -> Runnable:
    """A text model that is not quantized, with its tokenizer."""
    with open_model(folder) as model:
        return open_transformers(model, "text")


def texts(name: str) -> str:
    runnable = opened(MODELS / name)
    made = [
        generate_text(runnable, prompt, seed=seed, steps=None, length=100, told=lambda *_: None).text
        for seed, prompt in enumerate(PROMPTS[name])
    ]
    asked = [f"Prompt `{prompt}`:" if prompt else "No prompt:" for prompt in PROMPTS[name]]
    return "\n\n".join(f"{said}\n\n```\n{text.strip()}\n```" for said, text in zip(asked, made, strict=True))


def drawn(folder: Path, seed: int) -> list[Image.Image]:
    """One picture of each class, by the model as it lies in the folder."""
    pipeline: Any = DiffusionPipeline.from_pretrained(folder).to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    draw = torch.Generator().manual_seed(seed)
    return pipeline(class_labels=list(range(10)), num_inference_steps=STEPS, generator=draw).images


def side_by_side(rows: list[list[Image.Image]], path: Path) -> None:
    grid = np.concatenate([np.concatenate([np.asarray(one) for one in row], axis=1) for row in rows])
    high, wide = grid.shape
    Image.fromarray(grid).resize((LARGER * wide, LARGER * high), Image.Resampling.NEAREST).save(path)


def pictures() -> str:
    side_by_side([drawn(MODELS / "image", seed) for seed in range(ROWS)], OUT / "image.png")
    return "Zero to nine, three times:\n\n![digits](../samples/image.png)"


def sounds() -> str:
    shown = spectrogram_of(MODELS / "audio")
    if shown is None:
        raise SystemExit(f"{MODELS / 'audio'}: has no spectrogram.json; train it again")
    row = drawn(MODELS / "audio", 0)
    side_by_side([row], OUT / "audio.png")
    waves = torch.cat([shown.wave(torch.from_numpy(np.asarray(one, np.float32) / 255)) for one in row])
    with wave.open(str(OUT / "audio.wav"), "wb") as file:
        file.setparams((1, 2, shown.rate, 0, "NONE", ""))
        file.writeframes((waves * 32767).round().to(torch.int16).numpy().tobytes())
    return "Zero to nine: [the sound](../samples/audio.wav), and what it looks like:\n\n![digits](../samples/audio.png)"


def put(name: str, samples: str) -> None:
    """Below the heading of the card, in place of what stood there."""
    card = MODELS / name / CARD
    kept = card.read_text(encoding="utf-8").partition(HEADING)[0].rstrip()
    card.write_text(f"{kept}\n\n{HEADING}\n\n{samples}\n", encoding="utf-8")


def main() -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    for name in PROMPTS:
        put(name, texts(name))
    put("image", pictures())
    put("audio", sounds())


if __name__ == "__main__":
    main()

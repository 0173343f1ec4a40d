"""What share of what the small models make can be recognised: at 8, 4 and 2 bits, beside the original's.

    python bench/recognised.py [--models image audio text code] [--json FILE] [--into PAGE ...]

A picture counts where the judge of tests/judges sees the digit that was asked for in it (one in ten by chance), a sound
where it is more like that digit's clips than like any other's, a word where it is one of the 2,500 most frequent ones
of what the text model was shown, a name of code where every Python knows it. All are made from the same seeds; widths
are calibrated on the model's own trajectory, as `arrow-quant quantize` does it.
"""

from __future__ import annotations

import argparse
import builtins
import keyword
import re
import sys
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import numpy as np
import torch
import transformers
from measure import CONSOLE, machine, show, write_json
from quality_table import markdown_table

sys.path.append(str(Path(__file__).parents[1] / "examples" / "train"))

import judges
from make_audio import LENGTH
from samples import opened

import arrow_quant_v2 as aq
from arrow_quant_v2 import ArrowQuantV2, DiffusionQuantConfig
from arrow_quant_v2.runtime.generate_text import generate_text
from arrow_quant_v2.runtime.spectrogram import spectrogram_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Settings = dict[str, Any]
    Counted = tuple[int, int]  # what was recognised, of how many

ROOT = Path(__file__).parents[1]
MODELS, JUDGES = ROOT / "examples" / "models", ROOT / "tests" / "judges"
ORIGINAL = "original"
WIDTHS: dict[str, Settings] = {
    "INT8": {"bit_width": 8, "group_size": 32},
    "INT4": {"bit_width": 4, "group_size": 32},
    "INT2": {"bit_width": 2, "group_size": 32},
    "INT2, tuned": {"bit_width": 2, "group_size": 32, "tuning_steps": 100},
}
STEPS, LONG = 20, 60  # of the sampler; tokens of a text
TEXTS = {
    "text": ("And the king said", "Blessed are", "In the beginning", "", ""),
    "code": ("def __init__(self", "import ", "    for ", "class ", "    if ", ""),
}
KNOWN_TO_PYTHON = frozenset((*keyword.kwlist, *dir(builtins), "self", "cls", "args", "kwargs"))
START, END = "<!-- recognised -->\n", "<!-- end of recognised -->"


# Pictures and sounds


def drawn(name: str, folder: Path, seeds: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures (n, high, wide) from 0 to 1, and the digit that was asked for in each."""
    pipeline: Any = (
        diffusers.DiffusionPipeline.from_pretrained(folder) if folder == MODELS / name else aq.load_pipeline(folder)
    )
    pipeline.set_progress_bar_config(disable=True)
    labels, draw = list(range(10)) * seeds, torch.Generator().manual_seed(0)
    made = pipeline.to(torch.float32)(class_labels=labels, num_inference_steps=STEPS, generator=draw).images
    return torch.from_numpy(np.stack([np.asarray(one, np.float32) / 255 for one in made])), torch.tensor(labels)


def pictures(folder: Path, seeds: int) -> Counted:
    """Digits that are seen in pictures."""
    made, asked = drawn("image", folder, seeds)
    said = judges.pictures_say(made[:, None] * 2 - 1, JUDGES / "pictures.safetensors")
    return int((said == asked).sum()), len(asked)


def sounds(folder: Path, seeds: int) -> Counted:
    """Digits that are heard in pictures of a voice."""
    made, asked = drawn("audio", folder, seeds)
    shown = spectrogram_of(MODELS / "audio")
    if shown is None:
        raise SystemExit(f"{MODELS / 'audio'}: has no spectrogram.json; train it again")
    waves = torch.stack([shown.wave(picture) for picture in made])
    padded = torch.nn.functional.pad(waves, (0, LENGTH - waves.shape[1]))
    said = judges.likeness(padded, JUDGES / "voices.safetensors").argmax(dim=1)
    return int((said == asked).sum()), len(asked)


# Texts and code


def written(name: str, folder: Path, seeds: int) -> str:
    """What stands behind the prompts, from every seed."""
    runnable = opened(MODELS / name)
    model = runnable if folder == MODELS / name else replace(runnable, module=aq.load(folder))
    return "\n".join(
        generate_text(model, prompt, seed=seed, steps=2 * STEPS, length=LONG, told=lambda *_: None).text[len(prompt) :]
        for seed in range(seeds)
        for prompt in TEXTS[name]
    )


def words(folder: Path, seeds: int) -> Counted:
    """Words that the text model was shown often."""
    known = frozenset((JUDGES / "words.txt").read_text(encoding="utf-8").split())
    return counted(re.findall(r"[a-z]+", written("text", folder, seeds).lower()), known)


def names(folder: Path, seeds: int) -> Counted:
    """Names that every Python knows."""
    return counted(re.findall(r"[A-Za-z_]{2,}", written("code", folder, seeds)), KNOWN_TO_PYTHON)


def counted(found: list[str], known: frozenset[str]) -> Counted:
    """How many of them are known, and how many they are."""
    return sum(one in known for one in found), len(found)


# All models


SHOWN: dict[str, tuple[str, int, Callable[[Path, int], Counted]]] = {
    "image": ("digits seen", 20, pictures),
    "audio": ("digits heard", 10, sounds),
    "text": ("words known", 3, words),
    "code": ("names known to every Python", 3, names),
}


def shares(name: str) -> dict[str, Counted]:
    """The original's, then those of each width."""
    _, seeds, recognised = SHOWN[name]
    found = {ORIGINAL: recognised(MODELS / name, seeds)}
    for label, settings in WIDTHS.items():
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / name
            config = DiffusionQuantConfig(min_accuracy=0.0, **settings)
            ArrowQuantV2().quantize_diffusion_model(MODELS / name, out, config)
            found[label] = recognised(out, seeds)
    return found


def row(name: str, found: Mapping[str, Counted]) -> tuple[str, ...]:
    """One model: what is looked for, then shares in percent."""
    return (f"{name}: {SHOWN[name][0]}, %", *(f"{100 * right / total:.0f}" for right, total in found.values()))


def rows_of(every: Mapping[str, Mapping[str, Counted]]) -> list[tuple[str, ...]]:
    """One row for each model; of how many stands behind."""
    return [(*row(name, found), str(found[ORIGINAL][1])) for name, found in every.items()]


COLUMNS = ("recognised", ORIGINAL, *WIDTHS, "of")


def filled(text: str, every: Mapping[str, Mapping[str, Counted]]) -> str:
    """A page with the table between its marks; one without marks stays as it is."""
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    return f"{before}{start}\n{markdown_table(COLUMNS, rows_of(every))}\n\n{end}{after}" if end else text


def main() -> None:
    """Make, look, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SHOWN, default=list(SHOWN))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--into", type=Path, nargs="+", default=[], help="pages whose table is made again")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    torch.set_num_threads(given.threads)
    torch.set_grad_enabled(False)
    every: dict[str, dict[str, Counted]] = {}
    for name in given.models:
        every[name] = shares(name)
        CONSOLE.print(f"{name}: {every[name]}", highlight=False)
    show("Recognised", COLUMNS, rows_of(every))
    if given.json:
        write_json(given.json, {"machine": machine(), "shares": every})
    for page in given.into:
        page.write_text(filled(page.read_text(encoding="utf-8"), every), encoding="utf-8")


if __name__ == "__main__":
    main()

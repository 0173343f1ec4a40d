"""One door for text, pictures, videos and sounds: what a folder makes, and how long it took. Does no work itself."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from arrow_quant_v2.calibration.runnable import Runnable
from arrow_quant_v2.calibration.transformers_model import mask_token_of, tokenizer_of
from arrow_quant_v2.errors import ConfigurationError, SourceError
from arrow_quant_v2.runtime.generate_arguments import PipelineWish, refuse_no_numbers
from arrow_quant_v2.runtime.generate_pipeline import NOTHING, endings_of, generate_file, open_whole_pipeline
from arrow_quant_v2.runtime.generate_text import generate_blocks, generate_text, in_blocks
from arrow_quant_v2.runtime.load import load, stated_mask_token
from arrow_quant_v2.runtime.spectrogram import spectrogram_of
from arrow_quant_v2.sources.files import read_json
from arrow_quant_v2.sources.folder import PIPELINE
from arrow_quant_v2.sources.modality import detect_modality
from arrow_quant_v2.store.reader import StoredModel
from arrow_quant_v2.store.writer import explained

if TYPE_CHECKING:
    from collections.abc import Callable

    Told = Callable[[int, int, str], object]

CONFIG = "config.json"
DEFAULT_NAME = "generated"
SEEDS = 2**63
OF_TEXT = ("length", "temperature", "block_length", "chat")
OF_PIPELINES = tuple(PipelineWish.__dataclass_fields__)


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What is to be made; None: as the model has it.

    prompt        what a text begins with, a picture shows, or a sound is; or the number of a class
    steps         of denoising
    length        hidden tokens behind the prompt, for text alone
    temperature   of sampling, for text alone; 0: the likeliest tokens
    block_length  for text alone: blocks of so many tokens are finished from left to right
    chat          for text alone: the prompt is a user's message in the tokenizer's chat template
    pipeline      what pipelines alone are told
    device        where it runs
    out           the file to write; for text it is shown alone where there is none
    """

    prompt: str | None = None
    seed: int = 0
    steps: int | None = None
    length: int | None = None
    temperature: float | None = None
    block_length: int | None = None
    chat: bool = False
    pipeline: PipelineWish = NOTHING
    device: str = "cpu"
    out: Path | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Refuse what is no number, and a seed that torch does not take.

        Raises:
            ConfigurationError: it does not.
        """
        refuse_no_numbers(self, whole=("seed", "steps", "length", "block_length"), real=("temperature",))
        if not -SEEDS <= self.seed < SEEDS:
            raise ConfigurationError(f"seed is {self.seed}; allowed: whole numbers of 64 bits, such as 0 and more")


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What was made: `kind` is text, image, video or audio.

    `seconds` are those without loading, `peak_memory` is in bytes of the process.
    """

    kind: str
    text: str | None
    path: Path | None
    tokens: int | None
    steps: int
    seconds: float
    load_seconds: float
    peak_memory: int | None


def generate(folder: Path, wish: Wish, told: Told) -> Generation:
    """Run the model of a folder; `told` is called with (step, steps, text so far, or "") after each step.

    Raises:
        ConfigurationError: the wish does not fit the model, or a package is missing.
        SourceError: no model lies there, or it is of a kind that makes nothing.
        StoreError: a stored model is damaged, or the result cannot be written.
        QuantizationError: the model fails.
    """
    if not folder.exists():
        raise SourceError(f"{folder}: does not exist; give a model folder, such as quantize wrote")
    if (folder / PIPELINE).is_file():
        return _of_pipeline(folder, wish, told)
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    if "_class_name" in config:
        raise SourceError(
            f"{folder}: is one part of a pipeline, a {config['_class_name']}; give the pipeline's folder, which has a"
            f" {PIPELINE}"
        )
    if not config:
        raise SourceError(f"{folder}: has neither {PIPELINE} nor {CONFIG}; give a model folder, such as quantize wrote")
    return _of_text_model(folder, wish, told)


def _of_text_model(folder: Path, wish: Wish, told: Told) -> Generation:
    _refuse(folder, {name: getattr(wish.pipeline, name) for name in OF_PIPELINES}, "writes text")
    out = None if wish.out is None else _allowed(wish.out, wish, (".txt",))
    start = time.perf_counter()
    runnable = _text_model(folder, wish.device)
    loaded = time.perf_counter()
    write = generate_blocks if in_blocks(runnable) else generate_text
    asked = {name: getattr(wish, name) for name in ("seed", "steps", *OF_TEXT)}
    made = write(runnable, wish.prompt or "", told=told, **asked)
    seconds = time.perf_counter() - loaded
    if out is not None:
        with explained(out):
            out.write_text(made.text + "\n", encoding="utf-8")
    return Generation(
        kind="text",
        text=made.text,
        path=out,
        tokens=made.tokens,
        steps=made.steps,
        seconds=seconds,
        load_seconds=loaded - start,
        peak_memory=peak_memory(),
    )


def _text_model(folder: Path, device: str) -> Runnable:
    module = load(folder, device)
    tokenizer = tokenizer_of(folder)
    with StoredModel(folder) as stored:
        mask = mask_token_of(module, tokenizer, stated_mask_token(stored))
    return Runnable(module=module, modality="text", names={}, tokenizer=tokenizer, mask_token=mask)


def _of_pipeline(folder: Path, wish: Wish, told: Told) -> Generation:
    if wish.steps is not None and wish.steps < 1:
        raise ConfigurationError(f"steps is {wish.steps}; allowed: 1 and more")
    _refuse(folder, {name: getattr(wish, name) for name in OF_TEXT}, "is a pipeline, which writes no text")
    endings = endings_of(folder, detect_modality(folder, ""))
    spectrogram = spectrogram_of(folder)
    out = _allowed(wish.out or Path(DEFAULT_NAME + endings[0]), wish, endings)
    start = time.perf_counter()
    pipeline = open_whole_pipeline(folder, wish.device)
    loaded = time.perf_counter()
    made = generate_file(
        pipeline,
        wish.prompt,
        out,
        seed=wish.seed,
        steps=wish.steps,
        told=told,
        spectrogram=spectrogram,
        wish=wish.pipeline,
    )
    return Generation(
        kind=made.kind,
        text=None,
        path=made.path,
        tokens=None,
        steps=made.steps,
        seconds=time.perf_counter() - loaded,
        load_seconds=loaded - start,
        peak_memory=peak_memory(),
    )


def _refuse(folder: Path, asked: dict[str, object], what: str) -> None:
    """Refuse what has no meaning for such a model."""
    names = [name.replace("_", "-") for name, value in asked.items() if value not in (None, False)]
    if names:
        raise ConfigurationError(f"{folder}: {what}; leave {', '.join(f'--{name}' for name in names)} out")


def _allowed(out: Path, wish: Wish, endings: tuple[str, ...]) -> Path:
    """The file to write, refused before any work where it cannot be."""
    if out.suffix.lower() not in endings:
        known = ", ".join(f"*{ending}" for ending in endings)
        raise ConfigurationError(f"{out}: the result is written as {known}; give --out such a name")
    if out.exists() and not wish.overwrite:
        raise ConfigurationError(f"{out}: exists; choose another name with --out, or say --overwrite")
    if not out.absolute().parent.is_dir():
        raise ConfigurationError(f"{out}: its folder does not exist; make it first")
    return out


def peak_memory() -> int | None:
    """The most bytes that this process held at once; None on systems that do not tell."""
    if os.name != "posix":
        return None
    import resource  # noqa: PLC0415 - not on Windows

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024

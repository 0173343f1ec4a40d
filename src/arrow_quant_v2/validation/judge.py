"""Any two models in, everything that is known of how close they are out; shows nothing and writes nothing.

Outputs decide wherever the original can be run, and weights where it cannot; the findings say which of the two it was.
"""

from __future__ import annotations

import json
import math
import platform
import shlex
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from arrow_quant_v2 import __version__
from arrow_quant_v2.budget import available_bytes, megabytes
from arrow_quant_v2.calibration import chance
from arrow_quant_v2.calibration.given import is_text
from arrow_quant_v2.calibration.samples import Asked, gather
from arrow_quant_v2.config import DiffusionQuantConfig
from arrow_quant_v2.errors import ConfigurationError, QuantizationError, SourceError, ValidationError
from arrow_quant_v2.preparation import open_runnable
from arrow_quant_v2.progress import Progress
from arrow_quant_v2.publish import source_hash
from arrow_quant_v2.runtime.spectrogram import spectrogram_of
from arrow_quant_v2.sources.files import read_json
from arrow_quant_v2.sources.folder import PIPELINE, open_model
from arrow_quant_v2.sources.modality import detect_modality
from arrow_quant_v2.sources.module import ModuleSource
from arrow_quant_v2.sources.parquet import ParquetSource
from arrow_quant_v2.time_groups import TimeGroups, uniform_groups
from arrow_quant_v2.validation.findings import (
    WEIGHT_METRIC,
    Findings,
    LayerFinding,
    Metric,
    finite,
    stated_bar,
)
from arrow_quant_v2.validation.layer_outputs import LayerOutputs, chosen, layer_outputs
from arrow_quant_v2.validation.metrics import decibels
from arrow_quant_v2.validation.outputs import compare_outputs, model_outputs, other_values, replaced
from arrow_quant_v2.validation.pictures import latent_metrics, media_pairs, open_original_pipeline, pair_metrics
from arrow_quant_v2.validation.text import (
    SEQUENCES,
    decoded_agreement,
    embedding_metrics,
    hide,
    judged,
    loss_metrics,
    plain_sentences,
    sequences_of,
    text_pairs,
    written,
)
from arrow_quant_v2.validation.weights import compare_weights
from arrow_quant_v2.workfolder import METADATA

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from torch import nn

    from arrow_quant_v2.calibration.runnable import Runnable
    from arrow_quant_v2.calibration.sample import Sample, Samples
    from arrow_quant_v2.config import Modality
    from arrow_quant_v2.preparation import Provider
    from arrow_quant_v2.sources.base import Source
    from arrow_quant_v2.sources.folder import Model
    from arrow_quant_v2.store.entries import LayerEntry
    from arrow_quant_v2.validation.findings import SamplePair, StepFinding
    from arrow_quant_v2.validation.weights import LayerAccuracy

    Report = Callable[[str, float], object]

Said = TypeVar("Said")
HIDDEN_OUTPUTS = "output cosine: probabilities of masked tokens, mean over tokens"
TOKEN_OUTPUTS = "output cosine: last hidden states or logits, mean over tokens"  # noqa: S105 - no password
SAMPLE_OUTPUTS = "output cosine: what the denoiser says, mean over samples"
GROUPS = 10
TRAJECTORY = 32  # samples of continuous models, whose trajectories go through every step and both branches
TEXTS = 16
STEPS = 16  # of a trajectory, and of every picture and sound that is made
COPIES = 2  # of the model in float32
ROOM = 2**30  # outputs and libraries
WEIGHTS_PART, OUTPUTS_PART = 0.3, 0.8  # of the progress bar: until weights, and then outputs, are compared
UNRUNNABLE = (ConfigurationError, SourceError, QuantizationError, ValidationError)


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What is to be found out.

    min_accuracy  the bar; None: the one that the model was made with, else 0.85
    component     of a pipeline; None: the one that was quantized, else its denoiser
    weights_only  run nothing
    samples       a file of held-out data, as for calibration; None: the original's own trajectory
    provider      a function of the user's own instead: module -> (inputs, timestep)
    count         samples; None: as many as it takes to see every part of the trajectory
    seed          of every choice; None: another one than calibration had
    mask_token    where neither the tokenizer nor the quantized model tells it
    modality      where the files do not tell it
    pairs         texts, pictures or sounds that both models make from one seed; 0: none
    steps         of each of them
    judge         the folder of a causal language model that reads the texts
    """

    min_accuracy: float | None = None
    component: str | None = None
    weights_only: bool = False
    samples: Path | None = None
    provider: Provider | None = None
    count: int | None = None
    seed: int | None = None
    mask_token: int | None = None
    modality: Modality | None = None
    pairs: int = 2
    steps: int = STEPS
    judge: Path | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be.

        Raises:
            ConfigurationError: a number is out of range.
        """
        if self.min_accuracy is not None and not 0.0 <= self.min_accuracy <= 1.0:
            raise ConfigurationError(f"min_accuracy is {self.min_accuracy}; allowed: a number from 0 to 1")
        for name, least in (("count", 1), ("steps", 1), ("pairs", 0)):
            number = getattr(self, name)
            if number is not None and number < least:
                raise ConfigurationError(f"{name} is {number}; allowed: {least} and more")


class Heard:
    """What one original said, for several quantized models that are judged beside it; nothing of theirs."""

    def __init__(self) -> None:
        self._said: dict[tuple[object, ...], Any] = {}

    def once(self, key: tuple[object, ...], say: Callable[[], Said]) -> Said:
        """What was said to this, now or before."""
        if key not in self._said:
            self._said[key] = say()
        said: Said = self._said[key]
        return said


@dataclass(frozen=True, kw_only=True, eq=False)
class _Models:
    """Both models, opened; `stated` is what the quantized one says of how it was made."""

    name: str
    original: Source
    other: Source
    model: Model | None
    module: nn.Module | None
    folder: Path
    stated: Mapping[str, Any]
    wish: Wish
    heard: Heard

    def once(self, what: str, say: Callable[[], Said]) -> Said:
        """What the original says to this wish, asked only where it was not asked beside another model."""
        mask_token = self.configuration.get("mask_token") if self.wish.mask_token is None else self.wish.mask_token
        modality, component = self.stated.get("modality"), self.stated.get("component")
        return self.heard.once((what, self.wish, self.seed, mask_token, modality, component), say)

    @property
    def configuration(self) -> Mapping[str, Any]:
        found = self.stated.get("configuration")
        return found if isinstance(found, dict) else {}

    @property
    def bar(self) -> float:
        asked = self.wish.min_accuracy
        return stated_bar(self.configuration) if asked is None else asked

    @property
    def seed(self) -> int:
        stated = self.configuration.get("seed")
        if self.wish.seed is not None:
            return self.wish.seed
        return chance.held_out(stated if isinstance(stated, int) else 0, chance.VALIDATION)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Ran:
    """What running both models gave; nothing but notes where they could not be run."""

    accuracy: float | None = None
    metric: str = WEIGHT_METRIC
    metrics: tuple[Metric, ...] = ()
    steps: tuple[StepFinding, ...] = ()
    layers: Mapping[str, LayerOutputs] | None = None
    groups: TimeGroups | None = None
    pairs: tuple[SamplePair, ...] = ()
    notes: tuple[str, ...] = ()
    shown: str = "nothing: weights alone"


def find_out(
    original: Path | nn.Module,
    quantized: Path,
    wish: Wish | None = None,
    report: Report | None = None,
    heard: Heard | None = None,
) -> Findings:
    """Everything about two models with the same tensors: quantized by us, converted, or by anyone else.

    Weights are compared tensor by tensor, whatever the size of the models. Where the original can be run, and memory
    holds it twice in float32, both are shown the same held-out inputs, and make samples from the same seeds. `heard` is
    what this original said beside another model already, and is added to.

    Raises:
        ConfigurationError: the wish cannot be met; or what it names, samples or a judge, cannot be used.
        ValidationError: the models do not hold the same tensors.
        SourceError: one of them cannot be read, or the judge.
        StoreError: a stored model is damaged.
    """
    wish = wish or Wish()
    with ExitStack() as stack:
        models = _opened(stack, original, quantized, wish, Heard() if heard is None else heard)
        run_too = not wish.weights_only
        weights = compare_weights(models.original, models.other, part(report, 0.0, WEIGHTS_PART if run_too else 1.0))
        ran = _run(models, part(report, WEIGHTS_PART, 1.0)) if run_too else _Ran(notes=("weights only, as asked",))
        return _findings(models, weights, ran)


def part(report: Report | None, start: float, stop: float) -> Report | None:
    """A report for one part of the work, from `start` to `stop` of the whole."""
    if report is None:
        return None
    return lambda message, fraction: report(message, start + fraction * (stop - start))


def _opened(stack: ExitStack, original: Path | nn.Module, quantized: Path, wish: Wish, heard: Heard) -> _Models:
    stated = read_json(quantized / METADATA) if (quantized / METADATA).is_file() else {}
    named = stated.get("component")
    component = wish.component or (named if isinstance(named, str) and named else None)
    other = stack.enter_context(open_model(quantized, component)).source
    make = partial(_Models, other=other, folder=quantized, stated=stated, wish=wish, heard=heard)
    if isinstance(original, torch.nn.Module):
        return make(original=ModuleSource(original), model=None, module=original, name=type(original).__name__)
    model = stack.enter_context(open_model(original, component))
    return make(original=model.source, model=model, module=None, name=str(original))


# Running both


def _run(models: _Models, report: Report | None) -> _Ran:
    """Outputs, or why there are none: only what a person asked for is an error."""
    progress = Progress(report, 1)
    progress.tell("opening the model")
    wish = models.wish
    try:
        runnable, samples = _prepared(models)
        shown = _Shown(models, runnable, samples, report)
        ran = shown.compared()
    except UNRUNNABLE as error:
        if wish.samples is not None or wish.provider is not None or wish.judge is not None:
            raise
        progress.begin(0)
        progress.tell("weights only")
        return _Ran(notes=(f"weights only, the model was not run: {error}",))
    return shown.with_samples(ran)


def _prepared(models: _Models) -> tuple[Runnable, Samples]:
    wish = models.wish
    _refuse_larger_than_memory(models.original)
    runnable = open_runnable(models.model, models.module, _modality(models), _config(models))
    count = wish.count or (TEXTS if is_text(runnable) else TRAJECTORY)
    asked = Asked(count=count, seed=models.seed, data=wish.samples, callable=wish.provider, steps=wish.steps)
    samples = models.once("samples", lambda: _held_out(runnable, asked))
    if not samples.calls:
        raise ConfigurationError(f"{samples.origin} gave no samples; give some that fit the model")
    return runnable, samples


def _held_out(runnable: Runnable, asked: Asked) -> Samples:
    samples = gather(runnable, asked)
    return plain_sentences(runnable, asked.count) or samples if samples.synthetic else samples


def _refuse_larger_than_memory(source: Source) -> None:
    needed = 4 * COPIES * sum(math.prod(info.shape) for info in source.tensors) + ROOM
    there = available_bytes()
    if needed > there:
        raise ValidationError(
            f"{source.location}: running both models takes {megabytes(needed)}, {megabytes(there)} are there"
        )


def _modality(models: _Models) -> Modality:
    stated: Any = models.wish.modality or models.stated.get("modality")
    if stated is not None:
        found: Modality = stated
        return found
    if models.model is None:
        raise ConfigurationError("a live module has no files that tell its modality; give modality=")
    return detect_modality(models.model.root, models.model.component)


def _config(models: _Models) -> DiffusionQuantConfig:
    """Only what opening a model needs of one: the mask token."""
    stated = models.wish.mask_token if models.wish.mask_token is not None else models.configuration.get("mask_token")
    return DiffusionQuantConfig(mask_token=stated, enable_calibration=True)


class _Shown:
    """Both models on the same inputs; the other one's weights are read once."""

    def __init__(self, models: _Models, runnable: Runnable, samples: Samples, report: Report | None) -> None:
        self.models, self.runnable, self.samples = models, runnable, samples
        times = [call.timestep for call in samples.calls]
        self.groups = _stored_groups(models.other) or uniform_groups(times, _group_count(models, len(set(times))))
        self._values = other_values(runnable, models.other)
        self._report = report
        self._start = (OUTPUTS_PART - WEIGHTS_PART) / (1.0 - WEIGHTS_PART)

    def other(self) -> AbstractContextManager[None]:
        """Inside, the runnable is the other model."""
        return replaced(self.runnable, self._values)

    def compared(self) -> _Ran:
        """Outputs of the whole model, and of each layer, to the held-out inputs."""
        calls = self.samples.calls
        few = chosen(calls, self.groups)
        progress = Progress(part(self._report, 0.0, self._start), 2 * len(calls) + len(few))

        def done(_: Sample) -> None:
            progress.advance(1, "comparing outputs")

        progress.tell(f"comparing outputs on {self.samples.count} samples: {self.samples.origin}")
        layers = layer_outputs(self.runnable, self._values, few, self.groups, done)
        own = model_outputs(self.runnable, calls, done)
        with self.other():
            theirs = model_outputs(self.runnable, calls, done)
        found = compare_outputs(own, theirs, calls, self.groups)
        progress.tell("outputs compared")
        made_up = ("outputs are those to random inputs: give held-out data (--samples FILE)",)
        return _Ran(
            accuracy=found.cosine,
            metric=self._metric(),
            metrics=(*_output_metrics(found.cosine, found.error), *self._more(own, theirs)),
            steps=found.steps if len({call.timestep for call in calls}) > 1 else (),
            layers=layers,
            groups=self.groups,
            notes=(*(made_up if self.samples.synthetic else ()), *self.samples.notes),
            shown=f"{self.samples.count} samples, seed {self.models.seed}: {self.samples.origin}",
        )

    def _metric(self) -> str:
        if not is_text(self.runnable):
            return SAMPLE_OUTPUTS
        return TOKEN_OUTPUTS if self.runnable.mask_token is None else HIDDEN_OUTPUTS

    def _more(self, own: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> list[Metric]:
        """Of encoders: whole sentences."""
        speaks = getattr(self.runnable.module, "get_output_embeddings", lambda: None)() is not None
        if not is_text(self.runnable) or self.runnable.mask_token is not None or speaks:
            return []
        return embedding_metrics(own, theirs)

    def with_samples(self, ran: _Ran) -> _Ran:
        """What both make, end to end; where they cannot, a note says why."""
        progress = Progress(part(self._report, self._start, 1.0), 3)
        progress.tell("making samples")
        try:
            if is_text(self.runnable):
                metrics, pairs = self._texts(progress)
            else:
                metrics, pairs = self._media(progress)
        except UNRUNNABLE as error:
            if self.models.wish.judge is not None:
                raise
            metrics, pairs = [], []
            ran = replace(ran, notes=(*ran.notes, f"no samples were made: {error}"))
        progress.begin(0)
        progress.tell("samples compared")
        return replace(ran, metrics=(*ran.metrics, *metrics), pairs=tuple(pairs))

    def _texts(self, progress: Progress) -> tuple[list[Metric], list[SamplePair]]:
        """Losses at hidden tokens of held-out texts, else of those that the original writes; and what both write."""
        runnable, wish, seed = self.runnable, self.models.wish, self.models.seed
        if runnable.mask_token is None:
            return [], []
        count = max(wish.pairs, 1) if wish.samples is not None else max(wish.pairs, SEQUENCES)
        writes = wish.pairs or wish.samples is None
        own = self.models.once("texts", lambda: written(runnable, count, seed)) if writes else []
        given = [] if wish.samples is None else sequences_of(runnable, wish.samples, seed)
        progress.advance(1, "texts")
        hidden = hide(runnable, given or own, seed) if given or own else None
        metrics = [] if hidden is None else loss_metrics(runnable, self.other, hidden)
        progress.advance(1, "texts")
        if not wish.pairs:
            return metrics, []
        with self.other():
            theirs = written(runnable, len(own), seed)
        metrics.append(decoded_agreement(runnable, own, theirs))
        pairs = text_pairs(runnable, own, theirs, seed)
        if wish.judge is not None:
            metrics.append(judged(wish.judge, [str(p.original) for p in pairs], [str(p.quantized) for p in pairs]))
        return metrics, pairs[: wish.pairs]

    def _media(self, progress: Progress) -> tuple[list[Metric], list[SamplePair]]:
        """The latents of both trajectories, and pictures or sounds of the whole pipeline."""
        wish, model, seed = self.models.wish, self.models.model, self.models.seed
        metrics: list[Metric] = []
        if self.runnable.scheduler is not None and wish.provider is None and self._own_way():
            asked = Asked(count=len(self.samples.calls), seed=seed, data=wish.samples, steps=wish.steps)
            with self.other():
                theirs = gather(self.runnable, asked)
            metrics += latent_metrics(self.samples.calls, theirs.calls)
        progress.advance(1, "trajectories")
        if not wish.pairs or model is None or not (model.root / PIPELINE).is_file():
            return metrics, []
        try:
            pipeline = open_original_pipeline(model.root, model.component, self.runnable)
            pairs = media_pairs(
                pipeline,
                self.runnable,
                self.other,
                count=wish.pairs,
                seed=seed,
                steps=wish.steps,
                spectrogram=spectrogram_of(model.root),
            )
        except UNRUNNABLE as error:
            return [*metrics, Metric(name="samples at equal seed", value=None, note=str(error))], []
        return [*metrics, *pair_metrics(pairs)], pairs

    def _own_way(self) -> bool:
        """Whether the samples are a trajectory of the original's, and not inputs from a file."""
        return "trajectory" in self.samples.origin


def _output_metrics(cosine: float, error: float) -> list[Metric]:
    sqnr = decibels(error)
    return [
        Metric(name="output cosine", value=cosine),
        Metric(name="output error", value=finite(error), better="lower", note="|a - b|^2 / |a|^2"),
        Metric(name="output SQNR", value=finite(sqnr), unit="dB"),
    ]


def _group_count(models: _Models, timesteps: int) -> int:
    """As many as the model was made with, but no fewer than two timesteps in each."""
    stated = models.configuration.get("num_time_groups")
    return min(stated if isinstance(stated, int) else GROUPS, max(1, timesteps // 2))


def _stored_groups(source: Source) -> TimeGroups | None:
    """The time groups that the layers of a stored model were calibrated in; None where it holds none."""
    entries = source.stored.entries if isinstance(source, ParquetSource) else ()
    timed = next((one.time_aware_quant for one in entries if (one.time_aware_quant or {}).get("enabled")), None)
    ranges = [group["time_range"] for group in (timed or {}).get("time_group_params") or []]
    if not ranges or any(one is None for one in ranges):
        return None
    return TimeGroups(edges=(*(one["start"] for one in ranges), ranges[-1]["end"]))


# Putting it together


def _findings(models: _Models, weights: Sequence[LayerAccuracy], ran: _Ran) -> Findings:
    layers = _layers(models, weights, ran)
    judged_layers = [layer.weight_cosine for layer in layers if not is_kept(layer) and layer.weight_cosine is not None]
    mean = sum(judged_layers) / len(judged_layers) if judged_layers else None
    weight = Metric(name="weight cosine", value=mean, note="mean over quantized layers")
    groups = ran.groups or (None if ran.layers is not None else _stored_groups(models.other))
    return Findings(
        accuracy=mean if ran.accuracy is None else ran.accuracy,
        metric=ran.metric,
        min_accuracy=models.bar,
        passed=min(judged_layers, default=1.0) >= models.bar if ran.accuracy is None else ran.accuracy >= models.bar,
        metrics=(*ran.metrics, weight),
        layers=layers,
        steps=ran.steps,
        samples=ran.pairs,
        time_groups=() if groups is None else groups.ranges(),
        size_bytes=stored_bytes(models.other),
        original_bytes=stored_bytes(models.original),
        fallbacks_per_method=_fallbacks(models),
        notes=ran.notes,
        facts=_facts(models, ran),
    )


def is_kept(layer: LayerFinding) -> bool:
    """Whether a stored model keeps this layer as it was; of any other model nobody knows, so none is."""
    return layer.decision.startswith("kept")


def _layers(models: _Models, weights: Sequence[LayerAccuracy], ran: _Ran) -> tuple[LayerFinding, ...]:
    stored: dict[str, LayerEntry] = {}
    if isinstance(models.other, ParquetSource):
        stored = {one.layer_name: one for one in models.other.stored.entries if one.chunk == 0}
    described = {info.name: info for info in models.other.tensors}
    make = partial(_layer, ran=ran)
    return tuple(make(one, described[one.name], stored.get(one.name)) for one in weights)


def _layer(found: LayerAccuracy, info: Any, entry: LayerEntry | None, *, ran: _Ran) -> LayerFinding:
    seen = (ran.layers or {}).get(found.name)
    error = seen.error if seen is not None else None
    if ran.layers is None and entry is not None and entry.output_error:
        error = tuple(entry.output_error)
    return LayerFinding(
        name=found.name,
        shape=tuple(info.shape),
        quant_type=info.dtype if entry is None else entry.quant_type,
        bits_per_weight=8 * info.nbytes / max(1, info.numel) if entry is None else entry.bits_per_weight,
        method=None if entry is None else entry.method,
        decision="" if entry is None else entry.decision,
        weight_cosine=found.cosine,
        weight_mse=found.mse,
        output_cosine=None if seen is None else seen.cosine,
        output_error=error,
    )


def stored_bytes(source: Source) -> int:
    """Bytes of a model's weights as they lie there: files of ours whole, tensors of others."""
    if isinstance(source, ParquetSource):
        return sum(path.stat().st_size for path in source.weight_files)
    return sum(info.nbytes for info in source.tensors)


def _fallbacks(models: _Models) -> dict[str, int]:
    found = models.stated.get("fallbacks_per_method")
    return {str(method): int(count) for method, count in found.items()} if isinstance(found, dict) else {}


def _facts(models: _Models, ran: _Ran) -> dict[str, str]:
    """How to find the same again."""
    command = shlex.join(["arrow-quant", "validate", models.name, str(models.folder)])
    made = models.stated.get("program_version")
    return {
        "command": command,
        "compared on": ran.shown,
        "program": f"arrow-quant-v2 {__version__}" + (f", quantized with {made}" if made else ""),
        "libraries": f"Python {platform.python_version()}, torch {torch.__version__}",
        "hardware": f"{platform.machine()}, {torch.get_num_threads()} threads, {platform.system()}",
        "tensors of the original": source_hash(models.original.tensors),
        "values of the original": str(models.stated.get("source_content_hash", "")),
        "configuration": json.dumps(dict(models.configuration), sort_keys=True),
    }

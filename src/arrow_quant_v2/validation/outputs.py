"""What a model says to given inputs, beside what it says with other weights; does not judge, and makes no inputs."""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from arrow_quant_v2.calibration.given import is_text
from arrow_quant_v2.engines.one_core import each_on_one_core
from arrow_quant_v2.errors import ArrowQuantError, ValidationError
from arrow_quant_v2.validation.findings import StepFinding
from arrow_quant_v2.validation.metrics import ratio, row_cosines, squares

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from arrow_quant_v2.calibration.runnable import Runnable
    from arrow_quant_v2.calibration.sample import Sample
    from arrow_quant_v2.sources.base import Source
    from arrow_quant_v2.time_groups import TimeGroups

ROOM = 2**28  # numbers of all outputs together, 1 GiB; of a larger vocabulary fewer tokens are looked at
MATRIX = 2  # axes


@dataclass(frozen=True, kw_only=True)
class OutputAccuracy:
    """How close a model's outputs are to the original's, both given the same inputs.

    cosine      mean over rows: tokens of text, whole samples of pictures and sounds
    error       |a - b|^2 / |a|^2 over all rows together
    per_sample  the mean cosine of each call's rows
    steps       the same for each time group that a sample hit; their timestep is the mean of those samples'
    """

    cosine: float
    error: float
    per_sample: tuple[float, ...]
    steps: tuple[StepFinding, ...]


def model_outputs(
    runnable: Runnable, samples: Sequence[Sample], done: Callable[[Sample], object] | None = None
) -> list[torch.Tensor]:
    """What the model says to each call, as rows (n, width) in float32.

    Masked language models: probabilities of the hidden tokens (of all, where nothing is hidden). Their logits would
    hide what a model lost: tokens that never come have so low ones that all rows look alike. Other text models: the
    last hidden state, or the logits, of every token that is no padding. Denoisers: one row a sample. Any other nested
    output: its first floating-point tensor, one row a sample. Where rows are very long and many, some evenly spread
    ones, always the same. `done` is told each sample, by any thread.

    Raises:
        ValidationError: the model cannot be called, or gives no tensor of floating-point numbers.
    """
    return _each(runnable, samples, done, lambda sample, output: meaning_of(runnable, sample, output))


def hidden_logits(
    runnable: Runnable, samples: Sequence[Sample], done: Callable[[Sample], object] | None = None
) -> list[torch.Tensor]:
    """Logits (hidden, vocabulary) of the hidden tokens of each call, in float32.

    Raises:
        ValidationError: the model cannot be called, or gives no logits over hidden tokens.
    """

    def logits_of(sample: Sample, output: Any) -> torch.Tensor:
        logits = hidden_logits_of(runnable, sample, output)
        if logits is None:
            raise ValidationError(f"{type(runnable.module).__name__}: gives no logits for hidden tokens")
        return logits

    return _each(runnable, samples, done, logits_of)


def _each(
    runnable: Runnable,
    samples: Sequence[Sample],
    done: Callable[[Sample], object] | None,
    meaning: Callable[[Sample, Any], torch.Tensor],
) -> list[torch.Tensor]:
    def one(sample: Sample) -> torch.Tensor:
        rows = _evenly(meaning(sample, call(runnable, sample)), ROOM // max(1, len(samples)))
        if done is not None:
            done(sample)
        return rows

    return each_on_one_core(one, samples)


def compare_outputs(
    reference: Sequence[torch.Tensor],
    other: Sequence[torch.Tensor],
    samples: Sequence[Sample],
    groups: TimeGroups | None = None,
) -> OutputAccuracy:
    """How close `other` is to `reference`, both from `model_outputs` of the same samples; without groups no steps.

    Raises:
        ValidationError: there is nothing to compare, shapes differ, or the original's outputs are not finite.
    """
    if not samples or not len(reference) == len(other) == len(samples):
        raise ValidationError(f"outputs of {len(reference)} and {len(other)} calls for {len(samples)} samples")
    pairs = [_pair(a, b) for a, b in zip(reference, other, strict=True)]
    everything = _joined(pairs)
    at = [sample.timestep for sample in samples]
    steps = [] if groups is None else [_step(group, groups, at, samples, pairs) for group in range(groups.count)]
    return OutputAccuracy(
        cosine=everything.cosine,
        error=everything.error,
        per_sample=tuple(pair.cosine for pair in pairs),
        steps=tuple(step for step in steps if step is not None),
    )


def other_values(runnable: Runnable, source: Source) -> dict[str, torch.Tensor]:
    """Another model's tensor for every place in the module that has a name in the files, in that place's dtype.

    `source` is a quantized or any other model with the same names of tensors; of those without a place in the module
    nothing is read. Both models are in memory then.

    Raises:
        ValidationError: the runnable's weights are not in memory; or a tensor is missing or has another shape.
        SourceError: the source cannot be read.
        StoreError: it is damaged.
    """
    if runnable.on_demand is not None:
        raise ValidationError(f"{source.location}: larger than memory; compare the weights alone (--weights-only)")
    places = dict(_places(runnable.module))
    _refuse_misfits(runnable, source, places)
    return {
        place: source.read(name).reshape(places[place].shape).to(places[place])
        for name, place in runnable.names.items()
    }


@contextmanager
def replaced(runnable: Runnable, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Inside, the module's parameters and buffers of these names have these values; afterwards their own again."""
    places = dict(_places(runnable.module))
    before = [(places[place], places[place].data) for place in values]
    try:
        for place, value in values.items():
            places[place].data = value
        yield
    finally:
        for tensor, own in reversed(before):
            tensor.data = own


def _places(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _refuse_misfits(runnable: Runnable, source: Source, places: dict[str, torch.Tensor]) -> None:
    there = {info.name: math.prod(info.shape) for info in source.tensors}
    for name, place in runnable.names.items():
        if there.get(name) != places[place].numel():
            found = f"has {there[name]} values there" if name in there else "is missing there"
            raise ValidationError(
                f"{source.location}: {name} {found}, {places[place].numel()} are needed; give a copy of the same model"
            )


# What a call gives


def evenly(rows: torch.Tensor, room: int) -> torch.Tensor:
    """As many rows as `room` numbers have room for, evenly spread and always the same."""
    most = max(1, room // max(1, rows.shape[1]))
    return rows[torch.arange(most) * len(rows) // most] if len(rows) > most else rows


def _evenly(rows: torch.Tensor, room: int) -> torch.Tensor:
    """As many rows as there is room for, evenly spread, a copy of their own."""
    return evenly(rows, room).detach().float().contiguous().clone()


def call(runnable: Runnable, sample: Sample) -> Any:
    """Everything that the model says to one call.

    Raises:
        ValidationError: it cannot be called.
    """
    try:
        with torch.no_grad():
            return runnable.module(*sample.arguments, **sample.keywords)
    except (ArrowQuantError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:
        raise ValidationError(
            f"{type(runnable.module).__name__}: its forward fails: {type(error).__name__}: {error};"
            " give samples that it takes (--samples FILE), or compare the weights alone (--weights-only)"
        ) from error


def meaning_of(runnable: Runnable, sample: Sample, output: Any) -> torch.Tensor:
    """(rows, width) of the tensor that matters."""
    logits = hidden_logits_of(runnable, sample, output)
    if logits is not None:
        return logits.float().softmax(dim=-1)
    ids: Any = sample.keywords.get("input_ids")
    states: Any = getattr(output, "last_hidden_state", getattr(output, "logits", None))
    if is_text(runnable) and _is_tokens(states, ids):
        shown: torch.Tensor = states[_shown(sample, ids)]
        return shown
    found = first_tensor(output)
    if found is None:
        raise ValidationError(
            f"{type(runnable.module).__name__}: gives {type(output).__name__} without a tensor of floating-point"
            " numbers; compare the weights alone (--weights-only)"
        )
    return found.reshape(len(found) if found.ndim >= MATRIX else 1, -1)


def hidden_logits_of(runnable: Runnable, sample: Sample, output: Any) -> torch.Tensor | None:
    """(rows, vocabulary) of hidden tokens, of all where nothing is hidden; None where the model hides no tokens."""
    ids: Any = sample.keywords.get("input_ids")
    logits: Any = getattr(output, "logits", None)
    if runnable.mask_token is None or not _is_tokens(logits, ids):
        return None
    hidden = ids == runnable.mask_token
    found: torch.Tensor = logits[hidden] if bool(hidden.any()) else logits[_shown(sample, ids)]
    return found


def _is_tokens(states: Any, ids: Any) -> bool:
    """Whether states are (batch, tokens, width) for ids (batch, tokens)."""
    tensors = isinstance(states, torch.Tensor) and isinstance(ids, torch.Tensor)
    return tensors and states.ndim == ids.ndim + 1 and states.shape[:-1] == ids.shape


def _shown(sample: Sample, ids: Any) -> torch.Tensor:
    """Bool (batch, tokens): which are no padding."""
    mask = sample.keywords.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.shape == ids.shape:
        return mask.bool()
    return torch.ones_like(ids, dtype=torch.bool)


def first_tensor(output: Any) -> torch.Tensor | None:
    """The first floating-point tensor in a nested output; lists of tensors of one shape, one a sample, are stacked."""
    if isinstance(output, torch.Tensor):
        return output if output.is_floating_point() else None
    if isinstance(output, dict):
        output = tuple(output.values())
    if not isinstance(output, (list, tuple)):
        return None
    tensors = [one for one in output if isinstance(one, torch.Tensor) and one.is_floating_point()]
    if isinstance(output, list) and len(tensors) == len(output) and len({one.shape for one in tensors}) == 1:
        return torch.stack(tensors)
    return next((found for one in output if (found := first_tensor(one)) is not None), None)


# How close two are


@dataclass(frozen=True, kw_only=True, eq=False)
class _Pair:
    """Cosines (rows,), |a - b|^2 and |a|^2 of one or several calls."""

    cosines: torch.Tensor
    difference: float
    original: float

    @property
    def cosine(self) -> float:
        return float(self.cosines.mean())

    @property
    def error(self) -> float:
        return ratio(self.difference, self.original)


def _pair(a: torch.Tensor, b: torch.Tensor) -> _Pair:
    if a.shape != b.shape or not a.numel():
        raise ValidationError(
            f"outputs {tuple(a.shape)} and {tuple(b.shape)} cannot be compared; give copies of a model"
        )
    if not bool(a.isfinite().all()):
        raise ValidationError("the original's own outputs are not finite; compare its weights with a fresh download")
    difference, original = squares(a, b)
    return _Pair(cosines=row_cosines(a, b), difference=difference, original=original)


def _joined(pairs: Sequence[_Pair]) -> _Pair:
    return _Pair(
        cosines=torch.cat([pair.cosines for pair in pairs]),
        difference=math.fsum(pair.difference for pair in pairs),
        original=math.fsum(pair.original for pair in pairs),
    )


def _step(
    group: int, groups: TimeGroups, at: Sequence[float], samples: Sequence[Sample], pairs: Sequence[_Pair]
) -> StepFinding | None:
    mine = [i for i, timestep in enumerate(at) if groups.group_of(timestep) == group]
    if not mine:
        return None
    together = _joined([pairs[i] for i in mine])
    return StepFinding(
        timestep=sum(at[i] for i in mine) / len(mine),
        error=together.error,
        cosine=together.cosine,
        samples=sum(samples[i].count for i in mine),
    )

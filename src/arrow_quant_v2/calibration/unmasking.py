"""A masked diffusion model's own trajectories, from all tokens hidden to none; knows nothing of texts or files.

Each step shows the sequence to the model, samples a token for every hidden place at temperature 1, and keeps those
that the model is surest of (LLaDA's low-confidence remasking, arXiv 2502.09992). To the log of its confidence comes
Gumbel noise that fades from step to step (MaskGIT, Chang et al., 2022, arXiv 2202.04200): without it all sequences
begin at the same few places, and are much alike. On the way every sequence leaves one state behind, exactly at the time
that it was asked for: these are on-policy. The finished sequences are masked again, as texts are, so that the visible
tokens of a state also lie where unmasking would not have put them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from arrow_quant_v2.calibration import chance
from arrow_quant_v2.calibration.masked_text import hidden_count, masked_fraction, masked_states
from arrow_quant_v2.calibration.tokens import keywords, shown_together, spread_lengths, vocabulary_of
from arrow_quant_v2.engines.one_core import each_on_one_core
from arrow_quant_v2.errors import ArrowQuantError, QuantizationError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from arrow_quant_v2.calibration.runnable import Runnable
    from arrow_quant_v2.calibration.sample import Sample
    from arrow_quant_v2.calibration.tokens import Vocabulary

STEPS = 16
ROWS = 4  # sequences in a batch; part of the result, so it never follows the machine
USES = 4  # of each sequence: once on the way and three times masked again, because making it is what takes long
NOISE = 4.0  # of the log confidence at the first step, as MaskGIT has it; none at the last


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """Sequences with `inner` hidden tokens each that are generated together; row i leaves a state at time i."""

    number: int
    inner: int
    times: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class MaskedModel:
    """A model that can be called, and what it takes; `mask` is the hidden token, `ordinary` bool (size,) are text."""

    module: torch.nn.Module
    vocabulary: Vocabulary
    mask: int
    ordinary: torch.Tensor


def own_trajectory(
    runnable: Runnable, count: int, seed: int, *, steps: int = STEPS, length: int | None = None
) -> tuple[Sample, ...]:
    """Calls with `count` states together, in random order: a quarter on-policy, the others masked again.

    A call shows up to four states of one length and of nearly one time, and its timestep is their mean.

    Times are stratified over (0, 1]; of every four neighbouring strata one is on-policy. Each of the ceil(count / 4)
    sequences is used four times. Lengths go from 3/4 of `length` to all of it.

    Raises:
        QuantizationError: the model cannot be called, or gives no finite logits over its vocabulary.
    """
    model = masked_model(runnable)
    draw = chance.generator(seed, "own trajectory")
    times = chance.stratified(count, draw)
    here = [min(first + chance.whole(0, USES - 1, draw), count - 1) for first in range(0, count, USES)]
    again = [times[i] for i in sorted({*range(count)} - {*here})]
    states, finished = generate(runnable, [times[i] for i in here], seed, steps=steps, length=length)
    others = [finished[-1 - i % len(finished)] for i in range(len(again))]
    states += masked_states(others, again, mask=model.mask, special=model.vocabulary.special, draw=draw)
    calls = shown_together(model.module, states, [masked_fraction(ids, model.mask) for ids in states])
    return tuple(calls[i] for i in chance.shuffled(len(calls), draw))


def generate(
    runnable: Runnable, times: Sequence[float], seed: int, *, steps: int = STEPS, length: int | None = None
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """For each time a sequence of its own: its ids (length,) at that time, and when nothing is hidden any more.

    Raises:
        QuantizationError: as for `own_trajectory`.
    """
    model = masked_model(runnable)
    batches = _batches(model.vocabulary, times, length, seed)
    made = each_on_one_core(lambda batch: _unmasked(model, batch, seed, steps), batches)
    places = [(i % len(batches), i // len(batches)) for i in range(len(times))]
    return [made[batch][0][row] for batch, row in places], [made[batch][1][row] for batch, row in places]


def masked_model(runnable: Runnable) -> MaskedModel:
    """What is needed to unmask with it.

    Raises:
        QuantizationError: it takes no tokens, has no mask token, or no other tokens than special ones.
    """
    vocabulary = vocabulary_of(runnable)
    ordinary = vocabulary.ordinary()
    if vocabulary.mask is None or not ordinary.any():
        lacking = "mask token" if vocabulary.mask is None else "token but special ones"
        raise QuantizationError(
            f"{type(runnable.module).__name__}: has no {lacking}, so it has no trajectory of its own;"
            " name its mask token, or give calibration data (--calibration)"
        )
    return MaskedModel(module=runnable.module, vocabulary=vocabulary, mask=vocabulary.mask, ordinary=ordinary)


def _batches(vocabulary: Vocabulary, times: Sequence[float], length: int | None, seed: int) -> list[_Batch]:
    """Sequence i goes to batch i modulo their number, so that every batch, and so every length, meets every time."""
    count = -(-len(times) // ROWS)
    sizes = spread_lengths(vocabulary, count, length, chance.generator(seed, "lengths"))
    return [_Batch(number=n, inner=sizes[n], times=tuple(times[n::count])) for n in range(count)]


@torch.no_grad()
def _unmasked(model: MaskedModel, batch: _Batch, seed: int, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The states (rows, length) at the batch's times, and the finished sequences."""
    draw = chance.generator(seed, "unmasking", batch.number)
    ids = model.vocabulary.wrapped(torch.full((len(batch.times), batch.inner), model.mask))
    states, wanted = ids.clone(), _wanted(batch, ids.shape[1])
    for step, hidden in enumerate(_schedule(batch.inner, wanted, steps)[1:], start=1):
        if (ids == model.mask).any():
            ids = revealed(model, ids, hidden, NOISE * (1.0 - step / steps), draw)
        states = torch.where((hidden == wanted)[:, None], ids, states)
    return states, ids


def _wanted(batch: _Batch, length: int) -> torch.Tensor:
    """How many tokens (rows,) are hidden at each row's time."""
    return torch.tensor([hidden_count(time, length, batch.inner) for time in batch.times])


def _schedule(inner: int, wanted: torch.Tensor, steps: int) -> torch.Tensor:
    """Hidden tokens (steps + 1, rows) after each step: the same number less every time, from all to none.

    In each row the step that comes nearest to the number wanted is moved to it; all of them are wanted at step 0.
    """
    even = torch.linspace(inner, 0, steps + 1, dtype=torch.float64).round().long()
    table = even[:, None].repeat(1, len(wanted))
    for row, number in enumerate(wanted.tolist()):
        if number < inner and steps > 1:
            table[1 + int((even[1:-1] - number).abs().argmin()), row] = number
    return table


def revealed(
    model: MaskedModel,
    ids: torch.Tensor,
    hidden: torch.Tensor,
    noise: float,
    draw: torch.Generator,
    *,
    temperature: float = 1.0,
    within: torch.Tensor | None = None,
) -> torch.Tensor:
    """The ids (rows, length) with tokens sampled in the surest places, such that `hidden` (rows,) stay hidden.

    At `temperature` 0 the likeliest tokens are taken, and there is no noise; how sure the model is of a token never
    depends on it. Only places of `within`, bool (rows, length), are uncovered and counted; None: all.
    """
    masked = ids == model.mask if within is None else (ids == model.mask) & within
    chances = _chances(model, ids, masked)
    tokens = _sampled(chances, temperature, draw)
    sure = torch.full(ids.shape, -torch.inf)
    sure[masked] = chances.gather(1, tokens)[:, 0].log()
    if temperature > 0:
        sure[masked] += noise * temperature * _gumbel(len(tokens), draw)
    rank = sure.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    proposed = ids.clone()
    proposed[masked] = tokens[:, 0]
    return torch.where(rank < (masked.sum(dim=1) - hidden)[:, None], proposed, ids)


def _chances(model: MaskedModel, ids: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    """Of every token (places, size), at the hidden places."""
    logits = _logits(model, ids)[masked][:, : model.vocabulary.size].to(torch.float32)
    chances = torch.softmax(logits.masked_fill(~model.ordinary, -torch.inf), dim=-1)
    if not chances.isfinite().all():
        raise QuantizationError(f"{type(model.module).__name__}: its logits for masked tokens are not finite")
    return chances


def _sampled(chances: torch.Tensor, temperature: float, draw: torch.Generator) -> torch.Tensor:
    """A token (places, 1) for every hidden place."""
    if temperature == 0:
        return chances.argmax(dim=1, keepdim=True)
    if temperature != 1:
        chances = torch.softmax(chances.log() / temperature, dim=1)
    return torch.multinomial(chances, 1, generator=draw)


def _gumbel(count: int, draw: torch.Generator) -> torch.Tensor:
    """(count,) of the standard Gumbel distribution, finite."""
    exponential = -torch.rand(count, generator=draw).clamp(min=1e-30).log()
    return -exponential.clamp(min=1e-30).log()


def _logits(model: MaskedModel, ids: torch.Tensor) -> torch.Tensor:
    """Logits (rows, length, size of the vocabulary or more), where the ids lie, wherever the model runs."""
    name = type(model.module).__name__
    devices = (parameter.device for parameter in model.module.parameters() if not parameter.is_meta)  # on demand
    try:
        output = model.module(**keywords(model.module, ids.to(next(devices, ids.device))))
    except (ArrowQuantError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:
        raise QuantizationError(
            f"{name}: its forward fails on {tuple(ids.shape)} masked tokens: {type(error).__name__}: {error};"
            " give calibration data that it takes (--calibration)"
        ) from error
    logits = getattr(output, "logits", output[0] if isinstance(output, tuple) else output)
    needed = (*ids.shape, model.vocabulary.size)
    if isinstance(logits, torch.Tensor) and logits.shape[:2] == ids.shape and logits.shape[2:] >= needed[2:]:
        return logits.to(ids.device)
    found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
    raise QuantizationError(f"{name}: gives {found}; logits {needed} are needed for a trajectory of its own")

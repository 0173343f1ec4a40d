"""What is known of a text model's tokens, and the call that shows it a sequence; knows nothing of masks or files."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch

from arrow_quant_v2.calibration import chance
from arrow_quant_v2.calibration.sample import Sample
from arrow_quant_v2.errors import QuantizationError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from arrow_quant_v2.calibration.runnable import Runnable

LENGTH = 128  # tokens of a sequence that is made, where nothing is said
LENGTHS = 8  # different ones, at most, among sequences that are made
TOGETHER = 4  # sequences in one call
PROBE = "a"  # any text: only what the tokenizer puts around it is looked at
UNLIMITED = 10**9  # tokenizers without a limit state one of 30 digits


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The ids that a model takes.

    size     ids are 0 to size - 1
    special  ids that are no text: [CLS], [SEP], [PAD], [UNK], [MASK]; without a tokenizer only the mask is known
    before   what the tokenizer puts before a sequence
    after    what it puts behind one
    mask     the id that stands for a hidden token, None where there is none
    context  the longest sequence; None: unlimited, or unknown
    """

    size: int
    special: frozenset[int] = frozenset()
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    mask: int | None = None
    context: int | None = None

    @property
    def around(self) -> int:
        """How many special tokens stand around a sequence."""
        return len(self.before) + len(self.after)

    def ordinary(self) -> torch.Tensor:
        """Bool (size,): the ids that may stand inside a text."""
        allowed = torch.ones(self.size, dtype=torch.bool)
        allowed[sorted(self.special)] = False
        return allowed

    def wrapped(self, inner: torch.Tensor) -> torch.Tensor:
        """Ids (rows, n) with the special tokens around every row: (rows, n + around)."""
        sides = (torch.tensor(side, dtype=torch.long).expand(len(inner), -1) for side in (self.before, self.after))
        before, after = sides
        return torch.cat([before, inner, after], dim=1)


def vocabulary_of(runnable: Runnable) -> Vocabulary:
    """What the model's embedding, its config and its tokenizer tell.

    Raises:
        QuantizationError: the model has no embedding of tokens.
    """
    embedding = getattr(runnable.module, "get_input_embeddings", lambda: None)()
    size = getattr(embedding, "num_embeddings", None)
    if not isinstance(size, int):
        raise QuantizationError(
            f"{type(runnable.module).__name__}: has no embedding of tokens, so it cannot be shown text;"
            " give calibration data that its forward takes (--calibration)"
        )
    known = _of_tokenizer(runnable.tokenizer, size) if runnable.tokenizer is not None else {}
    special = {*known.pop("special", ()), *(() if runnable.mask_token is None else (runnable.mask_token,))}
    context = _context(getattr(runnable.module, "config", None), runnable.tokenizer)
    return Vocabulary(size=size, special=frozenset(special), mask=runnable.mask_token, context=context, **known)


def spread_lengths(vocabulary: Vocabulary, count: int, length: int | None, draw: torch.Generator) -> list[int]:
    """Tokens between the special ones in `count` sequences: stratified from 3/4 of what fits `length` to all of it.

    There are few different lengths, so that sequences can be shown together. Much shorter ones are worse: where a model
    knows things of one size, what it writes into half of the room is no whole one.
    """
    whole = min(length or LENGTH, vocabulary.context or LENGTH)
    longest = max(1, whole - vocabulary.around)
    parts = chance.stratified(min(count, LENGTHS), draw)
    return [max(1, round(longest * (3 + parts[i % len(parts)]) / 4)) for i in range(count)]


def mean_length(runnable: Runnable, length: int | None) -> int:
    """Tokens of a sequence of `spread_lengths`, on average."""
    vocabulary = vocabulary_of(runnable)
    return max(1, 7 * min(length or LENGTH, vocabulary.context or LENGTH) // 8)


def _of_tokenizer(tokenizer: Any, size: int) -> dict[str, Any]:
    """Special ids, and what stands around a sequence. Rows of the embedding beyond the tokenizer's are padding."""
    bare = list(tokenizer(PROBE, add_special_tokens=False)["input_ids"])
    full = list(tokenizer(PROBE)["input_ids"])
    starts = (i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare)
    start = next(starts, 0)
    special = {*tokenizer.all_special_ids, *range(len(tokenizer), size)}
    return {
        "special": {token for token in special if 0 <= token < size},
        "before": tuple(full[:start]),
        "after": tuple(full[start + len(bare) :]),
    }


def _context(config: Any, tokenizer: Any) -> int | None:
    limits = (getattr(config, "max_position_embeddings", None), getattr(tokenizer, "model_max_length", None))
    found = [int(limit) for limit in limits if limit is not None and 0 < limit < UNLIMITED]
    return min(found, default=None)


def shown(module: torch.nn.Module, ids: torch.Tensor, timestep: float) -> Sample:
    """The call that shows one sequence of `ids` (length,) to the model, alone and without padding."""
    return Sample(keywords=keywords(module, ids[None]), timestep=timestep)


def shown_together(
    module: torch.nn.Module, sequences: Sequence[torch.Tensor], times: Sequence[float]
) -> tuple[Sample, ...]:
    """Calls that show up to TOGETHER sequences of one length and of neighbouring times; their timestep is the mean."""
    ranked = sorted(range(len(sequences)), key=lambda i: (len(sequences[i]), times[i], i))
    calls = []
    for _, group in groupby(ranked, key=lambda i: len(sequences[i])):
        members = list(group)
        for start in range(0, len(members), TOGETHER):
            here = members[start : start + TOGETHER]
            rows = torch.stack([sequences[i] for i in here])
            calls.append(Sample(keywords=keywords(module, rows), timestep=sum(times[i] for i in here) / len(here)))
    return tuple(calls)


def keywords(module: torch.nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """The arguments of the forward for `ids` (rows, length): with an attention mask where it takes one."""
    ids = ids.to(torch.long).contiguous()
    mask = {"attention_mask": torch.ones_like(ids)} if "attention_mask" in argument_names(module) else {}
    return {"input_ids": ids, **mask}


def argument_names(module: torch.nn.Module) -> tuple[str, ...]:
    """The forward's arguments by name, in order, without * and **."""
    stars = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    arguments = inspect.signature(module.forward).parameters.values()
    return tuple(argument.name for argument in arguments if argument.kind not in stars)

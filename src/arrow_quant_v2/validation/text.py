"""Two text models end to end: losses at hidden tokens, tokens decoded from one seed, sentences and their neighbours.

Both are one runnable, with its own weights and, inside `other`, with those of the other model. Opens no folder but a
judge's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from arrow_quant_v2.calibration import chance
from arrow_quant_v2.calibration.given import from_file, is_text
from arrow_quant_v2.calibration.masked_text import maskable
from arrow_quant_v2.calibration.prompts import PICTURES, SOUNDS
from arrow_quant_v2.calibration.sample import Samples
from arrow_quant_v2.calibration.tokens import shown, vocabulary_of
from arrow_quant_v2.calibration.transformers_model import open_transformers
from arrow_quant_v2.calibration.unmasking import generate
from arrow_quant_v2.errors import ValidationError
from arrow_quant_v2.sources.folder import open_model
from arrow_quant_v2.validation.findings import Metric, SamplePair
from arrow_quant_v2.validation.metrics import agreement, perplexity, retrieval_agreement, row_cosines, row_divergences
from arrow_quant_v2.validation.metrics import row_losses as losses
from arrow_quant_v2.validation.outputs import call, hidden_logits

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from arrow_quant_v2.calibration.runnable import Runnable
    from arrow_quant_v2.calibration.sample import Sample

    Other = Callable[[], AbstractContextManager[None]]

RATIOS = (0.15, 0.5, 0.85)
SEQUENCES = 4  # whose tokens are hidden and told again
SENTENCES = (*PICTURES, *SOUNDS)
STRANGE = 0.1  # share of unknown tokens beyond which a text is in another language
NATS = "nats/token"


@dataclass(frozen=True, kw_only=True, eq=False)
class Hidden:
    """Sequences with hidden tokens, and what was hidden: (hidden,) ids of each; `ratio` None: one of the bound's."""

    calls: tuple[Sample, ...]
    truths: tuple[torch.Tensor, ...]
    ratios: tuple[float | None, ...]


def written(runnable: Runnable, count: int, seed: int) -> list[torch.Tensor]:
    """`count` sequences of ids that the model writes from all tokens hidden; the same seed, the same choices."""
    return generate(runnable, [1.0] * count, seed)[1]


def sequences_of(runnable: Runnable, path: Path, seed: int) -> list[torch.Tensor]:
    """The texts of a file as ids, nothing hidden; none where it holds no texts."""
    plain = from_file(replace(runnable, mask_token=None), path, SEQUENCES, seed)
    ids = [sample.keywords.get("input_ids") for sample in plain.calls]
    whole = [rows[0] for rows in ids if isinstance(rows, torch.Tensor)]
    return [sequence for sequence in whole if not _masked(runnable, sequence).any()]


def plain_sentences(runnable: Runnable, count: int) -> Samples | None:
    """Up to `count` plain English sentences, one a call; None where the model reads no such texts.

    Of models without a trajectory: better than the random tokens that calibration would have made up for them.
    """
    if not is_text(runnable) or runnable.tokenizer is None:
        return None
    ids = [torch.tensor(runnable.tokenizer(text)["input_ids"], dtype=torch.long) for text in SENTENCES[:count]]
    unknown = getattr(runnable.tokenizer, "unk_token_id", None)
    if unknown is not None and int((torch.cat(ids) == unknown).sum()) > STRANGE * sum(map(len, ids)):
        return None
    calls = tuple(shown(runnable.module, row, 0.0) for row in ids)
    return Samples(calls=calls, origin="plain English sentences", identity="plain English sentences")


def hide(runnable: Runnable, sequences: Sequence[torch.Tensor], seed: int) -> Hidden:
    """Each sequence at every ratio, and twice at ratios stratified over (0, 1] for the bound.

    Places are drawn evenly from those that hold no special token.
    """
    draw = chance.generator(seed, "hidden tokens")
    special = vocabulary_of(runnable).special
    asked: list[tuple[float | None, float, torch.Tensor]] = [(r, r, ids) for r in RATIOS for ids in sequences]
    twice = [*sequences, *sequences]
    asked += [(None, t, ids) for t, ids in zip(chance.stratified(len(twice), draw), twice, strict=True)]
    states = [_hidden(ids, ratio, int(runnable.mask_token or 0), special, draw) for _, ratio, ids in asked]
    found = [i for i, (_, ratio, ids) in enumerate(asked) if _masked(runnable, states[i]).any()]
    return Hidden(
        calls=tuple(shown(runnable.module, states[i], asked[i][1]) for i in found),
        truths=tuple(asked[i][2][_masked(runnable, states[i])] for i in found),
        ratios=tuple(asked[i][0] for i in found),
    )


def _masked(runnable: Runnable, ids: torch.Tensor) -> torch.Tensor:
    return ids == torch.tensor(-1 if runnable.mask_token is None else runnable.mask_token)


def _hidden(ids: torch.Tensor, ratio: float, mask: int, special: frozenset[int], draw: torch.Generator) -> torch.Tensor:
    free = maskable(ids, special)
    count = min(len(free), max(1, round(ratio * len(free))))
    state = ids.clone()
    state[free[torch.randperm(len(free), generator=draw)[:count]]] = mask
    return state


def loss_metrics(
    runnable: Runnable, other: Other, hidden: Hidden, done: Callable[[Sample], object] | None = None
) -> list[Metric]:
    """NLL at each masked ratio, the bound of the likelihood (NELBO), and KL at hidden tokens.

    NELBO: mean over masked fractions t, stratified over (0, 1], of the mean loss of what is hidden, in nats a token;
    that is E_t 1/(t n) sum -log p, the bound of LLaDA (arXiv 2502.09992) and MDLM (arXiv 2406.07524).
    """
    own = hidden_logits(runnable, hidden.calls, done)
    with other():
        theirs = hidden_logits(runnable, hidden.calls, done)
    pairs = [
        (losses(a, truth), losses(b, truth), row_divergences(a, b))
        for a, b, truth in zip(own, theirs, hidden.truths, strict=True)
    ]
    found = [
        _loss(f"NLL at {ratio:.0%} masked", [p for p, at in zip(pairs, hidden.ratios, strict=True) if at == ratio])
        for ratio in RATIOS
    ]
    bound = [p for p, at in zip(pairs, hidden.ratios, strict=True) if at is None]
    found.append(_loss("NELBO", [tuple(part.mean()[None] for part in p) for p in bound]))
    divergence = float(torch.cat([p[2] for p in pairs]).mean())
    return [*found, Metric(name="KL at masked tokens", value=divergence, unit=NATS, better="lower")]


def _loss(name: str, pairs: Sequence[tuple[torch.Tensor, ...]]) -> Metric:
    own, theirs = (float(torch.cat([pair[i] for pair in pairs]).mean()) for i in (0, 1))
    return Metric(name=name, value=theirs, original=own, unit=NATS, better="lower")


# Text that both write


def text_pairs(
    runnable: Runnable, own: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor], seed: int
) -> list[SamplePair]:
    """What both wrote, side by side."""
    return [
        SamplePair(
            kind="text",
            title=f"text {number}, from all tokens hidden",
            seed=seed,
            original=spelled(runnable, a),
            quantized=spelled(runnable, b),
        )
        for number, (a, b) in enumerate(zip(own, theirs, strict=True), start=1)
    ]


def spelled(runnable: Runnable, ids: torch.Tensor) -> str:
    """The text of a sequence without what stands around it; the ids themselves where there is no tokenizer."""
    inner = _inner(runnable, ids).tolist()
    return str(runnable.tokenizer.decode(inner)) if runnable.tokenizer is not None else " ".join(map(str, inner))


def decoded_agreement(runnable: Runnable, own: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> Metric:
    """The share of places where both wrote the same token; one other choice early on changes all that follow."""
    a, b = (torch.cat([_inner(runnable, ids) for ids in texts]) for texts in (own, theirs))
    return Metric(name="agreement of decoded tokens", value=agreement(a, b), note="same seed, sampled at temperature 1")


def _inner(runnable: Runnable, ids: torch.Tensor) -> torch.Tensor:
    around = vocabulary_of(runnable)
    return ids[len(around.before) : len(ids) - len(around.after)]


# A judge


def judged(folder: Path, own: Sequence[str], theirs: Sequence[str]) -> Metric:
    """Perplexity of what both wrote under another, autoregressive model: e to the mean loss of each next token.

    Raises:
        ValidationError: the folder holds no model that tells the next token, or no tokenizer.
        SourceError: it cannot be opened.
    """
    with open_model(folder) as model:
        judge = open_transformers(model, "text")
    if judge.tokenizer is None or _looks_ahead(judge):
        lacks = "has no tokenizer" if judge.tokenizer is None else "sees what comes after a token"
        raise ValidationError(f"{folder}: {lacks}; a judge is a causal language model with the files of its tokenizer")
    return Metric(
        name=f"perplexity under {folder.name}",
        value=_judged(judge, theirs),
        original=_judged(judge, own),
        better="lower",
    )


def _looks_ahead(judge: Runnable) -> bool:
    """Whether what is said of a token depends on the next one."""
    one, other = (_logits(judge, torch.tensor([0, last]))[0, 0] for last in (0, 1))
    return not torch.allclose(one, other)


def _logits(judge: Runnable, ids: torch.Tensor) -> torch.Tensor:
    logits: Any = getattr(call(judge, shown(judge.module, ids, 0.0)), "logits", None)
    if logits is None:
        raise ValidationError(f"{type(judge.module).__name__}: gives no logits; a judge tells the next token of a text")
    found: torch.Tensor = logits.float()
    return found


def _judged(judge: Runnable, texts: Sequence[str]) -> float:
    every = [loss for text in texts if (loss := _next_token_losses(judge, text)) is not None]
    if not every:
        raise ValidationError("a judge was given texts of one token or none; make longer ones, or leave it out")
    return perplexity(float(torch.cat(every).mean()))


def _next_token_losses(judge: Runnable, text: str) -> torch.Tensor | None:
    limit = vocabulary_of(judge).context
    ids = torch.tensor(judge.tokenizer(text)["input_ids"][:limit], dtype=torch.long)
    if len(ids) < 2:  # noqa: PLR2004 - one to see, one to guess
        return None
    return losses(_logits(judge, ids)[0, :-1], ids[1:])


# Embeddings


def embedding_metrics(own: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> list[Metric]:
    """Of encoders: cosine of whole sequences (mean over their tokens), and whether neighbours stay the same."""
    a, b = (torch.stack([rows.mean(dim=0) for rows in states]) for states in (own, theirs))
    found = [Metric(name="embedding cosine", value=float(row_cosines(a, b).mean()), note="mean of a sequence's tokens")]
    if len(a) > 2:  # noqa: PLR2004 - else there is one neighbour
        note = f"nearest of {len(a) - 1} others"
        found.append(Metric(name="retrieval agreement", value=retrieval_agreement(a, b), note=note))
    return found

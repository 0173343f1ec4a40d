"""A small masked diffusion model of text: its tokenizer, its network, its loss, and what it writes.

Each token is hidden with probability t, t even over (0, 1] (LLaDA, arXiv 2502.09992). To learn, every hidden token
counts alike, which is calmer; to measure, errors weigh 1 / t, which bounds the likelihood of the text. Knows nothing of
where the text comes from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import ModernBertConfig, ModernBertForMaskedLM
from transformers import PreTrainedTokenizerFast as Words

if TYPE_CHECKING:
    from torch import nn

VOCABULARY, LENGTH, ROWS = 1024, 128, 32
PAD, MASK = "[PAD]", "[MASK]"
LEAST = 0.05  # hidden fraction; at less the few hidden tokens weigh too much
HELD_OUT = 0.02  # the last part of every text, never trained on


def tokenizer_of(text: str) -> Words:
    """Byte pairs learnt from the text: every text can be spelled, and nothing is unknown."""
    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pairs.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, MASK],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pairs.train_from_iterator(text.splitlines(keepends=True), trainer)
    return Words(
        tokenizer_object=pairs,
        pad_token=PAD,
        mask_token=MASK,
        model_max_length=LENGTH,
        clean_up_tokenization_spaces=False,
    )


def network(tokenizer: Words, seed: int) -> ModernBertForMaskedLM:
    """1.7 million weights: five layers of 192, of which the first and the fourth see the whole sequence.

    The others see eight tokens on each side, so that what stands side by side is learnt first. Weights begin at three
    times the usual size, which is too small for so narrow a network: it would stay at the counts of tokens for long.
    """
    torch.manual_seed(seed)
    return ModernBertForMaskedLM(
        ModernBertConfig(
            vocab_size=VOCABULARY,
            hidden_size=192,
            intermediate_size=256,
            num_hidden_layers=5,
            num_attention_heads=6,
            max_position_embeddings=LENGTH,
            global_attn_every_n_layers=3,
            local_attention=16,
            initializer_range=0.06,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=None,
            cls_token_id=None,
            sep_token_id=None,
            mask_token_id=tokenizer.mask_token_id,
            attn_implementation="eager",  # whose backward pass is faster on a CPU
        )
    )


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Token ids to learn from (n,), and those held out."""

    learnt: torch.Tensor
    held: torch.Tensor
    mask: int


def corpus_of(text: str, tokenizer: Words) -> Corpus:
    """All of a text as tokens; the last part is held out."""
    ids = torch.tensor(tokenizer.backend_tokenizer.encode(text).ids)
    cut = len(ids) - int(HELD_OUT * len(ids))
    return Corpus(learnt=ids[:cut], held=ids[cut:], mask=tokenizer.mask_token_id)


def loss_of(model: nn.Module, corpus: Corpus, draw: torch.Generator) -> torch.Tensor:
    """Mean error of the hidden tokens, in nats."""
    starts = torch.randint(len(corpus.learnt) - LENGTH, (ROWS,), generator=draw)
    ids = corpus.learnt[starts[:, None] + torch.arange(LENGTH)]
    hidden, _ = _hidden(ids, draw)
    return _errors(model, ids, hidden, corpus.mask).mean()


def bound(model: nn.Module, ids: torch.Tensor, mask: int, draw: torch.Generator) -> torch.Tensor:
    """Nats per token of these sequences (rows, length) at most, by one drawing of what is hidden."""
    hidden, times = _hidden(ids, draw)
    weights = (1 / times)[:, None].expand(ids.shape)[hidden]
    return (_errors(model, ids, hidden, mask) * weights).sum() / ids.numel()


def _hidden(ids: torch.Tensor, draw: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tokens (rows, length) are hidden, and the times (rows,), which are spread evenly over the rows."""
    rows = len(ids)
    times = LEAST + (1.0 - LEAST) * ((torch.rand(1, generator=draw) + torch.arange(rows) / rows) % 1.0)
    return torch.rand(ids.shape, generator=draw) < times[:, None], times


def _errors(model: nn.Module, ids: torch.Tensor, hidden: torch.Tensor, mask: int) -> torch.Tensor:
    logits = model(input_ids=ids.masked_fill(hidden, mask)).logits[hidden].float()
    return torch.nn.functional.cross_entropy(logits, ids[hidden], reduction="none")


@torch.no_grad()
def held_out_bound(model: nn.Module, corpus: Corpus, rows: int = 64) -> float:
    """Nats per token of held-out text, over four drawings of what is hidden."""
    usable = len(corpus.held) // LENGTH
    ids = corpus.held[: usable * LENGTH].view(usable, LENGTH)[:rows]
    draw = torch.Generator().manual_seed(1)
    return sum(float(bound(model, ids, corpus.mask, draw)) for _ in range(4)) / 4

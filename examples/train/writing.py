"""Trains a masked diffusion model on a text and keeps it as a folder of transformers; shared by text and code."""

from __future__ import annotations

import copy
import json
import math
import sys
from typing import TYPE_CHECKING

import masked
import torch
from keeping import Asked, asked, weights_of, write_card
from loop import Course, Learnt, learn

if TYPE_CHECKING:
    from collections.abc import Mapping


def train(name: str, text: str, about: Mapping[str, str], steps: int) -> None:
    """Read the command line, train, save the folder and its card."""
    ask = asked(name, steps)
    tokenizer = masked.tokenizer_of(text)
    corpus = masked.corpus_of(text, tokenizer)
    sys.stderr.write(f"{name}: {len(text)} characters, {len(corpus.learnt)} tokens\n")
    learnt = learn(
        masked.network(tokenizer, ask.seed),
        Course(steps=ask.steps, rate=2.5e-3, seed=ask.seed, bfloat16=True),
        lambda model, _, draw: masked.loss_of(model, corpus, draw),
        lambda learnt: _save(ask, learnt, tokenizer),
    )
    _save(ask, learnt, tokenizer)
    letters = len(text) / (len(corpus.learnt) + len(corpus.held))
    write_card(ask, learnt, dict(about) | _figures(learnt, corpus, letters), weights_of(learnt.model))


def _figures(learnt: Learnt, corpus: masked.Corpus, letters: float) -> dict[str, str]:
    held = masked.held_out_bound(learnt.model, corpus)
    return {
        "loss": f"{learnt.loss:.3f} nats per hidden token of what it learns, mean of the last tenth of the steps",
        "held-out text": f"at most {held:.3f} nats per token, {held / letters / math.log(2):.2f} bits per character",
    }


def _save(ask: Asked, learnt: Learnt, tokenizer: masked.Words) -> None:
    copy.deepcopy(learnt.model).to(torch.float16).save_pretrained(ask.out)
    tokenizer.save_pretrained(ask.out)
    (ask.out / "metadata.json").write_text(json.dumps({"modality": ask.name}) + "\n")

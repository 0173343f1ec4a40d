"""Real models that packages hold, and how their outputs are measured."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

# Two antibodies of the AntiBERTy package's own README: a heavy and a light chain.
ANTIBODIES = (
    "EVQLVQSGPEVKKPGTSVKVSCKASGFTFMSSAVQWVRQARGQRLEWIGWIVIGSGNTNYAQKFQERVTITRDMSTSTAYMELSSLRSEDTAVYYCAAPYCSSISCNDGFDIWGQGTMVTVS",
    "DVVMTQTPFSLPVSLGDQASISCRSSQSLVHSNGNTYLHWYLQKPGQSPKLLIYKVSNRFSGVPDRFSGSGSGTDFTLKISRVEAEDLGVYFCSQSTHVPYTFGGGTKLEIK",
)
CLS, SEP, MASK = 2, 3, 4
MASKINGS = 24


def packaged(package: str, folder: str) -> Path:
    """Where an installed package keeps its model; the package is not imported."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise SystemExit(f"{package} is not installed; `make setup` installs it")
    return Path(next(iter(found.submodule_search_locations))) / folder


def minilm_states(module: nn.Module, tokenizer: Any, texts: Sequence[str]) -> dict[str, torch.Tensor]:
    """The states of all tokens, (tokens, 384), and of whole sentences, their means (texts, 384)."""
    tokens, means = [], []
    with torch.no_grad():
        for text in texts:
            given = tokenizer(text, return_tensors="pt", truncation=True, max_length=128)
            states = module(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).last_hidden_state[0]
            tokens.append(states)
            means.append(states.mean(dim=0))
    return {"token cosine": torch.cat(tokens), "sentence cosine": torch.stack(means)}


def encoder_nll(module: nn.Module, sequences: Sequence[str], vocabulary: Path, ratios: Sequence[float]) -> list[float]:
    """Mean negative log-likelihood in nats of hidden residues, at each masked fraction, over seeded maskings."""
    words = vocabulary.read_text().split()
    losses = []
    for ratio in ratios:
        draw = torch.Generator().manual_seed(1)
        total, count = 0.0, 0
        for sequence in sequences:
            ids = torch.tensor([CLS, *(words.index(residue) for residue in sequence), SEP]).repeat(MASKINGS, 1)
            hidden = torch.zeros_like(ids, dtype=torch.bool)
            for row in hidden:
                row[1 + torch.randperm(len(sequence), generator=draw)[: round(ratio * len(sequence))]] = True
            with torch.no_grad():
                logits = module(input_ids=ids.masked_fill(hidden, MASK)).logits[hidden]
            total += float(torch.nn.functional.cross_entropy(logits, ids[hidden], reduction="sum"))
            count += int(hidden.sum())
        losses.append(total / count)
    return losses

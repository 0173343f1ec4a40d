"""Real models that packages hold, and how their outputs are measured."""

from __future__ import annotations

import importlib.util
import pydoc_data.topics
import random
import re
import shutil
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
SENTENCE = re.compile(r"[A-Z][^.:*|`\\]{40,220}\.(?=\s)")
MASKINGS = 24


def packaged(package: str, folder: str) -> Path:
    """Where an installed package keeps its model; the package is not imported."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise SystemExit(f"{package} is not installed; `make setup` installs it")
    return Path(next(iter(found.submodule_search_locations))) / folder


def antiberty_folder(folder: Path) -> Path:
    """AntiBERTy there, with its vocabulary, which lies beside its folder, where no tokenizer would find it."""
    source = packaged("antiberty", "trained_models/AntiBERTy_md_smooth")
    shutil.copytree(source, folder, dirs_exist_ok=True)
    shutil.copy(source.parent / "vocab.txt", folder)
    return folder


def terrain_file() -> Path:
    """The terrain UNet, as an ONNX file: see terrain_unet."""
    return packaged("terrain_diffusion", "weights") / "terrain_consistency_unet_difficulty100.onnx"


def manual_sentences() -> list[str]:
    """Sentences of Python's own manual, shuffled."""
    text = "\n".join(pydoc_data.topics.topics.values())
    found = sorted({" ".join(match.split()) for match in SENTENCE.findall(text)})
    random.Random(0).shuffle(found)
    return found


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

"""Text models made in a moment, and what tests ask of samples."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors.torch import save_file

from arrow_quant_v2.calibration.runnable import Runnable
from arrow_quant_v2.calibration.transformers_model import open_transformers
from arrow_quant_v2.sources.folder import open_model

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from arrow_quant_v2.calibration.sample import Sample

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [
    "the", "sea", "was", "calm", "and", "a", "white", "whale", "rose", "slowly", "from", "deep", "water", "near", "our",
    "ship",
]  # fmt: skip
SMALL = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 64,
}  # fmt: skip


def small_module(class_name: str, seed: int = 0, **settings: Any) -> Any:
    """A model of a class of transformers with the weights that this seed gives."""
    found = getattr(transformers, class_name)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        module = found(found.config_class(**(SMALL | settings)))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(5.0)  # logits that differ from each other
    return module.eval()


def save_folder(folder: Path, module: Any, tensors: dict[str, torch.Tensor] | None = None, **entries: Any) -> Path:
    """A module as a transformers folder; `tensors` and `entries` are what is to be in its files instead."""
    folder.mkdir(parents=True, exist_ok=True)
    state = module.state_dict() if tensors is None else tensors
    save_file({name: tensor.clone().contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    config = module.config.to_dict() | {"architectures": [type(module).__name__]} | entries
    (folder / "config.json").write_text(json.dumps({key: entry for key, entry in config.items() if entry is not ...}))
    return folder


def save_bert(folder: Path, class_name: str, words: Sequence[str] = (), **entries: Any) -> Path:
    """A small BERT; with a tokenizer where there are words."""
    save_folder(folder, small_module(class_name), **entries)
    if words:
        (folder / "vocab.txt").write_text("\n".join([*SPECIAL, *words]) + "\n")
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    return folder


def opened(folder: Path, mask_token: int | None = None) -> Runnable:
    with open_model(folder) as model:
        return open_transformers(model, "text", mask_token)


def ids_of(call: Sample) -> torch.Tensor:
    """The one sequence (length,) that a call shows."""
    ids = call.keywords["input_ids"]
    assert isinstance(ids, torch.Tensor)
    assert ids.dtype == torch.int64
    assert ids.shape[0] == 1
    return ids[0]


def same_calls(first: Iterable[Sample], second: Iterable[Sample]) -> bool:
    pairs = list(zip(first, second, strict=True))
    return all(torch.equal(_ids(a), _ids(b)) and a.timestep == b.timestep for a, b in pairs)


def _ids(call: Sample) -> torch.Tensor:
    ids = call.keywords["input_ids"]
    assert isinstance(ids, torch.Tensor)
    return ids


class Denoiser(torch.nn.Module):
    """A model of images as diffusers has them."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.config = SimpleNamespace(**config)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: Any = None) -> torch.Tensor:
        assert timestep.shape == (1,)
        return sample * self.scale


def image_model(**config: Any) -> Runnable:
    return Runnable(module=Denoiser(**({"in_channels": 3, "sample_size": 4} | config)), modality="image", names={})

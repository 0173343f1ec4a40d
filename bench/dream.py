"""A model folder with Dream-7B's shapes and random weights, written shard by shard; knows nothing of quantization."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

HIDDEN, LAYERS, INTERMEDIATE, HEADS, KV_HEADS, VOCABULARY = 3584, 28, 18944, 28, 4, 152064
HEAD = HIDDEN // HEADS
BLOCK = 2**25  # random values are made once and cut at different places: enough for size, speed and memory
LAYERS_PER_SHARD = 4
CONFIG = {"model_type": "dream", "architectures": ["DreamModel"]}


def layer_shapes(index: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one transformer layer."""
    name = f"model.layers.{index}"
    return {
        f"{name}.self_attn.q_proj.weight": (HIDDEN, HIDDEN),
        f"{name}.self_attn.q_proj.bias": (HIDDEN,),
        f"{name}.self_attn.k_proj.weight": (KV_HEADS * HEAD, HIDDEN),
        f"{name}.self_attn.k_proj.bias": (KV_HEADS * HEAD,),
        f"{name}.self_attn.v_proj.weight": (KV_HEADS * HEAD, HIDDEN),
        f"{name}.self_attn.v_proj.bias": (KV_HEADS * HEAD,),
        f"{name}.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        f"{name}.mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
        f"{name}.mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
        f"{name}.mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
        f"{name}.input_layernorm.weight": (HIDDEN,),
        f"{name}.post_attention_layernorm.weight": (HIDDEN,),
    }


def shards(layers: int) -> Iterator[dict[str, tuple[int, ...]]]:
    """Shapes of one file after the other: embedding, layers, head."""
    yield {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for first in range(0, layers, LAYERS_PER_SHARD):
        shard: dict[str, tuple[int, ...]] = {}
        for index in range(first, min(layers, first + LAYERS_PER_SHARD)):
            shard |= layer_shapes(index)
        yield shard
    yield {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def write_model(folder: Path, layers: int = LAYERS, config: dict[str, object] = CONFIG) -> int:
    """Write the folder in bfloat16; bytes of its tensors."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    block = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(torch.bfloat16)
    plans, total, places = list(shards(layers)), 0, {}
    for number, shapes in enumerate(plans, start=1):
        file = f"model-{number:05d}-of-{len(plans):05d}.safetensors"
        tensors = {name: _weight(block, name, shape, total + i) for i, (name, shape) in enumerate(shapes.items())}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        total += sum(tensor.nbytes for tensor in tensors.values())
        places |= dict.fromkeys(shapes, file)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _weight(block: torch.Tensor, name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Normal with a deviation of 0.02, as trained weights have; around 1 where it scales what was normalized."""
    count = int(torch.Size(shape).numel())
    start = seed * 9973 % BLOCK
    repeated = torch.cat([block[start:], block[:start]]).repeat(-(-count // BLOCK))
    values = repeated[:count].reshape(shape).clone()
    return values + 1.0 if name.endswith("norm.weight") else values

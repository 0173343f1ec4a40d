"""Checkpoints of experts as transformers writes them, a matrix each, run as the stacks that its classes have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from packed_models import Pair, distance, pair
from safetensors.torch import load_file, save_file
from text_models import small_module

import arrow_quant_v2 as aq
from arrow_quant_v2.errors import SourceError
from arrow_quant_v2.runtime.packed_weight import PackedWeight

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
CLASSES: dict[str, dict[str, Any]] = {
    "Qwen3MoeForCausalLM": WIDE | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
    "MixtralForCausalLM": WIDE | {"num_local_experts": 12},  # more than ten: in order of numbers, not of letters
    "DeepseekV3ForCausalLM": WIDE
    | {"moe_intermediate_size": 48, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
    | {"first_k_dense_replace": 0, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
    | {"v_head_dim": 16},
}
IDS = torch.randint(3, 40, (2, 12), generator=torch.Generator().manual_seed(3))
ALONE = {"modality": "text", "enable_calibration": False, "min_accuracy": 0.0}


@torch.no_grad()
def logits(module: nn.Module) -> torch.Tensor:
    out: torch.Tensor = module(input_ids=IDS).logits
    return out


def saved(class_name: str, folder: Path) -> Path:
    """As the library itself writes it."""
    small_module(class_name, **CLASSES[class_name]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    root = tmp_path_factory.mktemp("qwen")
    return pair(saved("Qwen3MoeForCausalLM", root / "source"), root, **ALONE)


@pytest.mark.parametrize("class_name", CLASSES)
def test_experts_stay_packed_and_compute_what_their_twin_does(class_name: str, tmp_path: Path) -> None:
    source = saved(class_name, tmp_path / "source")
    assert any(".experts.3." in name for name in load_file(source / "model.safetensors")), "a matrix each"
    both = pair(source, tmp_path, **ALONE)
    model = aq.load(both.quantized)
    twin = getattr(transformers, class_name).from_pretrained(both.dequantized, dtype="float32").eval()
    assert distance(logits(model), logits(twin)) < 1e-4
    stacks = [part for name, part in model.named_modules() if ".experts." in name and isinstance(part, PackedWeight)]
    assert {len(part.shape) for part in stacks} == {3}
    assert model.arrow_quant_decisions == ()


def test_the_library_loads_and_saves_them_too(qwen: Pair, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(qwen.quantized)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(model), logits(aq.load(qwen.quantized)))
    assert torch.equal(logits(model), logits(aq.load(tmp_path / "again")))


def test_experts_that_were_kept_are_stacked_as_they_are(tmp_path: Path) -> None:
    source = saved("Qwen3MoeForCausalLM", tmp_path / "source")
    both = pair(source, tmp_path, keep=["*.experts.*"], **ALONE)
    twin = transformers.AutoModelForCausalLM.from_pretrained(both.dequantized, dtype="float32").eval()
    assert distance(logits(aq.load(both.quantized)), logits(twin)) < 1e-4


def test_experts_of_several_widths_do_not_become_one_stack(tmp_path: Path) -> None:
    source = saved("Qwen3MoeForCausalLM", tmp_path / "source")
    both = pair(source, tmp_path, layer_bit_widths={"*.experts.2.down_proj.weight": 8}, **ALONE)
    with pytest.raises(
        SourceError, match=r"down_proj: its experts are stored in several ways, int4 .*, int8 as in .*2"
    ):
        aq.load(both.quantized)


def test_an_expert_that_is_missing_is_told(tmp_path: Path) -> None:
    source = saved("Qwen3MoeForCausalLM", tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    lost = {name: tensor for name, tensor in tensors.items() if ".experts.3.up_proj" not in name}
    save_file(lost, source / "model.safetensors")
    aq.ArrowQuantV2().quantize_diffusion_model(source, tmp_path / "out", aq.DiffusionQuantConfig(bit_width=4, **ALONE))
    with pytest.raises(SourceError, match=r"gate_up_proj: is a stack of 4 experts, of which the file holds 4, 3"):
        aq.load(tmp_path / "out")

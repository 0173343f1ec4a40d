"""What a class keeps in float32 stays so in every dtype, as in the library's own loading."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import diffusers
import pytest
import torch
import transformers
from packed_models import distance, normal, pair
from small_pipelines import PIPELINES
from text_models import save_folder, small_module
from torch import nn

import arrow_quant_v2 as aq
from arrow_quant_v2.runtime.float32 import stays_float32

if TYPE_CHECKING:
    from collections.abc import Mapping

    from packed_models import Pair

NARROW = (torch.bfloat16, torch.float16)
T5 = {"vocab_size": 60, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 1, "num_heads": 4}


def dtypes(module: nn.Module) -> dict[str, torch.dtype]:
    return {name: parameter.dtype for name, parameter in module.named_parameters()}


def packed_dtypes(module: nn.Module, names: Mapping[str, Any]) -> dict[str, torch.dtype]:
    """Of the same tensors, packed ones by what they give."""
    found = {}
    for name in names:
        owner, _, leaf = name.rpartition(".")
        found[name] = getattr(module.get_submodule(owner), leaf).dtype
    return found


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    root = tmp_path_factory.mktemp("wan")
    return pair(PIPELINES["wan"].save(root / "source"), root)


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    root = tmp_path_factory.mktemp("t5")
    model = small_module("T5EncoderModel", **T5)
    return pair(save_folder(root / "source", model), root, modality="text")


@pytest.mark.parametrize("dtype", NARROW)
def test_a_class_of_diffusers_keeps_its_float32(wan: Pair, dtype: torch.dtype) -> None:
    theirs = dtypes(diffusers.WanTransformer3DModel.from_pretrained(wan.dequantized / "transformer", torch_dtype=dtype))
    ours = aq.load(wan.quantized, dtype=dtype)
    assert packed_dtypes(ours, theirs) == theirs
    assert {torch.float32, dtype} == set(theirs.values())
    again = diffusers.WanTransformer3DModel.from_pretrained(wan.quantized / "transformer", torch_dtype=dtype)
    assert packed_dtypes(again, theirs) == theirs


@pytest.mark.parametrize("dtype", NARROW)
def test_a_class_of_transformers_keeps_its_float32(t5: Pair, dtype: torch.dtype) -> None:
    theirs = dtypes(transformers.T5EncoderModel.from_pretrained(t5.dequantized, dtype=dtype))
    ours = aq.load(t5.quantized, dtype=dtype)
    assert packed_dtypes(ours, theirs) == theirs
    assert (torch.float32 in theirs.values()) == (dtype == torch.float16), "wo, in float16 alone"
    again = transformers.T5EncoderModel.from_pretrained(t5.quantized, dtype=dtype)
    assert packed_dtypes(again, theirs) == theirs


@torch.no_grad()
def test_such_a_model_computes_what_its_twin_does(wan: Pair) -> None:
    states, said, time = normal(1, 4, 2, 8, 8).bfloat16(), normal(1, 5, 24).bfloat16(), torch.tensor([500.5])
    twin = diffusers.WanTransformer3DModel.from_pretrained(wan.dequantized / "transformer", torch_dtype=torch.bfloat16)
    ours, theirs = (
        model(hidden_states=states, encoder_hidden_states=said, timestep=time)[0]
        for model in (aq.load(wan.quantized, dtype=torch.bfloat16), twin.eval())
    )
    assert ours.dtype == torch.bfloat16
    assert distance(ours.float(), theirs.float()) < 0.01


def test_what_no_class_says_is_as_asked_for() -> None:
    assert not stays_float32(nn.Linear(2, 2), "weight", torch.float16)


def test_patterns_are_those_of_transformers() -> None:
    class Strict(nn.Module):
        _keep_in_fp32_modules = ("wo",)
        _keep_in_fp32_modules_strict = ("norm.*scale",)

    module = Strict()
    found = {(n, d): stays_float32(module, n, d) for n in ("a.wo.weight", "norm.1.scale") for d in NARROW}
    assert found == {
        ("a.wo.weight", torch.bfloat16): False,
        ("a.wo.weight", torch.float16): True,
        ("norm.1.scale", torch.bfloat16): True,
        ("norm.1.scale", torch.float16): True,
    }
    assert not stays_float32(module, "norm.1.scale", torch.float32)

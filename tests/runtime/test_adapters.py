"""LoRA adapters of peft on packed layers do what they do on the dequantized ones, and cannot be merged into codes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from packed_models import distance, normal, packed
from torch import nn

from arrow_quant_v2.errors import QuantizationError
from arrow_quant_v2.runtime.modules import run_packed
from arrow_quant_v2.runtime.packed_weight import PackedWeight

peft = pytest.importorskip("peft")
LORA = {"r": 4, "init_lora_weights": False}


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.conv, self.head = nn.Embedding(40, 64), nn.Conv1d(64, 64, 3, padding=1), nn.Linear(64, 48)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.conv(self.table(ids).mT).mT)
        return out


def both() -> tuple[nn.Module, nn.Module]:
    """One model with the dequantized weights, one on the codes."""
    plain = Small()
    runs = copy.deepcopy(plain)
    for at, name in enumerate(("table", "conv", "head")):
        twin, layer = plain.get_submodule(name), runs.get_submodule(name)
        shape = twin.weight.shape  # type: ignore[union-attr]
        weight = PackedWeight(packed(normal(*shape, seed=at), rotation=16))
        with torch.no_grad():
            twin.weight.copy_(weight.dequantized())  # type: ignore[operator,union-attr]
        run_packed(layer, weight)
    return plain, runs


def adapted(**settings: Any) -> tuple[Any, Any]:
    config = peft.LoraConfig(**LORA | {"target_modules": ["table", "conv", "head"]} | settings)
    plain, runs = (peft.get_peft_model(module, config) for module in both())
    adapters = {name: tensor for name, tensor in plain.state_dict().items() if "base_layer" not in name}
    runs.load_state_dict(adapters, strict=False)
    return plain, runs


IDS = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(1))


def test_an_adapter_takes_effect_and_can_be_switched_off() -> None:
    plain, runs = adapted()
    assert distance(runs(IDS), plain(IDS)) < 3e-5
    with runs.disable_adapter():
        assert distance(runs(IDS), plain(IDS)) > 0.1


@pytest.mark.parametrize("bias", ["none", "all"])
def test_an_adapter_is_trained_as_on_the_dequantized_model(bias: str) -> None:
    plain, runs = adapted(bias=bias)
    for model in (plain, runs):
        model(IDS).square().sum().backward()
    expected = {name: one.grad for name, one in plain.named_parameters() if one.requires_grad}
    found = {name: one.grad for name, one in runs.named_parameters() if one.requires_grad}
    assert found.keys() == expected.keys()
    assert all(distance(found[name], grad) < 1e-4 for name, grad in expected.items())


def test_merging_into_codes_is_refused() -> None:
    _, runs = adapted()
    with pytest.raises(QuantizationError, match="its values are 4-bit codes and cannot be written to; keep adapters"):
        runs.merge_and_unload()


def test_a_model_on_codes_can_be_trained_beside_them() -> None:
    _, runs = adapted()
    optimizer = torch.optim.Adam([one for one in runs.parameters() if one.requires_grad], lr=0.01)
    codes = runs.base_model.model.head.base_layer.weight.codes.clone()
    losses = []
    for _ in range(5):
        loss = runs(IDS).square().mean()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert torch.equal(codes, runs.base_model.model.head.base_layer.weight.codes)

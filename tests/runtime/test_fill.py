"""A module filled with a stored model: every tensor finds its place, or nothing is said to be loaded."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from packed_models import Net, distance, pair
from safetensors.torch import load_file
from torch import nn

from arrow_quant_v2 import ConfigurationError
from arrow_quant_v2.errors import SourceError
from arrow_quant_v2.runtime.fill import Filled, fill
from arrow_quant_v2.runtime.modules import QuantizedConv1d, QuantizedEmbedding, QuantizedLinear
from arrow_quant_v2.runtime.packed_weight import PackedWeight
from arrow_quant_v2.store.reader import StoredModel

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

IDS = torch.randint(0, 60, (2, 9), generator=torch.Generator().manual_seed(1))
OWN_WAY = ["attention.in_proj_weight", "attention.out_proj.weight", "back.weight"]


def net(*, untied: bool = False) -> Net:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        made = Net().eval()
        if untied:
            made.head = nn.Linear(64, 60, bias=False)
        return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return pair(net(), tmp_path_factory.mktemp("net"), modality="text")


@pytest.fixture(scope="module")
def stored(folder: Any) -> StoredModel:
    return StoredModel(folder.quantized)


@pytest.fixture(scope="module")
def twin(folder: Any) -> nn.Module:
    """The same net with the dequantized weights."""
    made = net()
    made.load_state_dict(load_file(folder.dequantized / "model.safetensors"))
    return made


def filled(stored: StoredModel, module: nn.Module, **how: Any) -> Filled:
    with pytest.warns(UserWarning, match=r"3 weights are dequantized or run otherwise than asked, the first is"):
        return fill(module, stored, **how)


def on_meta() -> Net:
    with torch.device("meta"):
        return Net().eval()


@pytest.mark.parametrize("build", [net, on_meta])
def test_it_computes_what_the_dequantized_module_does(
    stored: StoredModel, twin: nn.Module, build: Callable[[], Net]
) -> None:
    module = build()
    found = filled(stored, module)
    assert distance(module(IDS), twin(IDS)) < 3e-5
    assert sorted(found.packed) == ["first.weight", "head.weight", "table.weight", "wave.weight"]
    kinds = [type(part) for part in (module.table, module.first, module.wave, module.head)]
    assert kinds == [QuantizedEmbedding, QuantizedLinear, QuantizedConv1d, QuantizedLinear]


def test_layers_that_compute_in_their_own_way_are_dequantized_and_say_so(stored: StoredModel) -> None:
    module = net()
    found = filled(stored, module)
    assert [decision.layer_name for decision in found.decisions] == OWN_WAY
    assert str(found.decisions[0]) == (
        "fallback as float32 instead of int4: MultiheadAttention computes with attention.in_proj_weight in its own way,"
        " so the weight is dequantized in memory"
    )
    assert isinstance(module.attention.in_proj_weight, nn.Parameter)
    assert isinstance(module.back.weight, nn.Parameter)


def test_tied_weights_are_one_also_after_a_move_and_a_copy(stored: StoredModel) -> None:
    module = net()
    names = {name: name for name in stored.names if name != "head.weight"}
    filled(stored, module, names=names, unused=["head.weight"])
    for one in (module, copy.deepcopy(module), module.half()):
        assert one.head.weight is one.table.weight
        assert isinstance(one.head.weight, PackedWeight)


def test_ties_can_be_named(stored: StoredModel) -> None:
    module = net(untied=True)
    names = {name: name for name in stored.names if name != "table.weight"}
    filled(stored, module, names=names, unused=["table.weight"], ties=[("table.weight", "head.weight")])
    assert module.head.weight is module.table.weight


def test_kept_tensors_are_copies_and_codes_are_the_file(stored: StoredModel) -> None:
    module = net()
    filled(stored, module)
    with torch.no_grad():
        module.first.bias.zero_()  # would end the process if it were the map of the file
    again = net()
    filled(stored, again)
    assert again.first.bias.any()
    assert module.first.weight.codes.data_ptr() == again.first.weight.codes.data_ptr()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_everything_floating_has_the_dtype_that_was_asked(
    stored: StoredModel, twin: nn.Module, dtype: torch.dtype
) -> None:
    module = net()
    filled(stored, module, dtype=dtype)
    assert {tensor.dtype for tensor in module.parameters()} == {dtype}
    assert module(IDS).dtype == dtype
    assert distance(module(IDS), twin(IDS)) < 5e-2


def lacking(module: Net) -> Net:
    module.extra = nn.Linear(3, 3)
    return module


def other_shape(module: Net) -> Net:
    module.first = nn.Linear(64, 95)
    return module


def without(module: Net) -> Net:
    del module.back
    return module


@pytest.mark.parametrize(
    ("change", "how", "message"),
    [
        (lacking, {}, "the file lacks extra.bias, extra.weight;"),
        (without, {}, "the file also holds back.bias, back.weight, which have no place in it"),
        (other_shape, {}, r"first.bias is \(96,\), and first.bias \(95,\)"),
        (
            net,
            {"names": {"first.weight": "first.weight"}},
            "the file also holds attention.in_proj_bias, .* and \\d+ more",
        ),
        (net, {"unused": ["first.bias"]}, "the file lacks first.bias"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_and_nothing_is_changed(
    stored: StoredModel, change: Any, how: dict[str, Any], message: str
) -> None:
    module = change(net()) if change is not net else net()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(SourceError, match=f"does not fit Net: {message}"):
        fill(module, stored, **how)
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


def test_names_that_the_file_lacks_or_that_meet_are_refused(stored: StoredModel) -> None:
    names = {name: name for name in stored.names}
    with pytest.raises(SourceError, match="the file lacks nowhere"):
        fill(net(), stored, names | {"nowhere": "first.bias"})
    with pytest.raises(SourceError, match=r"both first.bias and norm.bias are for first.bias"):
        fill(net(), stored, names | {"norm.bias": "first.bias"})


def test_parameters_may_become_zeros_where_that_is_said(stored: StoredModel) -> None:
    module = lacking(net())
    filled(stored, module, zeros=["extra.weight", "extra.bias"])
    assert not module.extra.weight.any()


def test_a_buffer_that_nobody_computed_is_found(stored: StoredModel) -> None:
    module = on_meta()
    module.register_buffer("positions", torch.empty(3, device="meta"), persistent=False)
    with pytest.raises(SourceError, match="positions are neither in the file nor computed"):
        fill(module, stored)


def test_settings_that_mean_nothing_are_refused(stored: StoredModel) -> None:
    with pytest.raises(ConfigurationError, match=r"activations is 'int8'; allowed: None, 'dynamic', 'static'"):
        fill(net(), stored, activations="int8")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"dtype is torch.int8; allowed"):
        fill(net(), stored, dtype=torch.int8)


def test_static_activations_without_ranges_are_a_decision(stored: StoredModel) -> None:
    module = net()
    with pytest.warns(UserWarning, match="5 weights are dequantized or run otherwise"):
        found = fill(module, stored, activations="static")
    told = {decision.layer_name: decision.because for decision in found.decisions}
    assert told["first.weight"] == "the file holds no ranges of its inputs: it was not calibrated"
    assert module.first.activations is None


def test_the_root_may_be_the_layer_itself(tmp_path: Path) -> None:
    both = pair(nn.Linear(64, 48), tmp_path, modality="text")
    layer = nn.Linear(64, 48)
    fill(layer, StoredModel(both.quantized))
    weight = load_file(both.dequantized / "model.safetensors")["weight"]
    assert torch.equal(layer.weight.dequantized(), weight)

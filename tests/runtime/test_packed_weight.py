"""A packed weight in the place of a parameter: its values, what torch does with it, how it moves and is saved."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from packed_models import chunks, distance, normal, packed
from torch import nn
from torch.nn import functional

from arrow_quant_v2.errors import QuantizationError
from arrow_quant_v2.kernels import cpu, linear, linear_cpu
from arrow_quant_v2.kernels.tensors import dequantized
from arrow_quant_v2.packed import GRIDS
from arrow_quant_v2.runtime.packed_weight import PackedWeight

BASES = [{}, {"rotation": 32}, {"equalized": True}, {"rotation": 16, "equalized": True}]
WEIGHT = normal(48, 64)


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_its_values_are_those_of_the_file(bits: Any, grid: str, basis: dict[str, Any]) -> None:
    whole = packed(WEIGHT, bits, grid=grid, **basis)
    weight = PackedWeight(whole)
    torch.testing.assert_close(weight.dequantized(), dequantized(whole), rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(weight.dequantized(), weight.rows(torch.arange(48)).reshape(48, 64))
        assert weight.dequantized(torch.bfloat16).dtype == torch.bfloat16
        assert weight.dequantized(torch.float64).dtype == torch.float64


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("grid", ["affine", "row"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_product_is_that_of_its_values(bits: Any, grid: str, basis: dict[str, Any]) -> None:
    weight = PackedWeight(packed(WEIGHT, bits, grid=grid, **basis))
    x, bias = normal(2, 3, 64, seed=1), normal(48, seed=2)
    expected = functional.linear(x, weight.dequantized(), bias)
    assert distance(weight.product(x, bias), expected) < 3e-5
    assert distance(functional.linear(x, weight, bias), expected) < 3e-5
    assert distance(functional.linear(input=x, weight=weight, bias=bias), expected) < 3e-5
    assert distance(x @ weight.T + bias, expected) < 3e-5


@pytest.mark.parametrize("op", [linear.linear, linear.linear_dynamic])
@pytest.mark.parametrize("count", [1, 3, 40])
def test_without_gradients_the_kernel_is_called_itself_and_gives_the_same(count: int, op: Any) -> None:
    weight, x, bias = PackedWeight(packed(WEIGHT, 4)), normal(count, 64, seed=1), normal(48, seed=2)
    asked = weight.product(x, bias, op)
    with torch.no_grad():
        assert (op in linear_cpu.STRAIGHT) == (cpu.activate() != "reference")
        assert torch.equal(weight.product(x, bias, op), asked)


def test_codes_that_were_replaced_are_the_ones_that_are_multiplied() -> None:
    weight, other = PackedWeight(packed(WEIGHT)), PackedWeight(packed(normal(48, 64, seed=9)))
    x = normal(3, 64, seed=1)
    with torch.no_grad():
        weight.product(x)
        for same in (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight)), weight):
            same.load_state_dict(other.state_dict())
            assert torch.equal(same.product(x), other.product(x))
        weight.codes.zero_()
        assert distance(weight.product(x), x @ weight.dequantized().T) < 3e-5
        weight.codes.set_(other.codes.clone())
        assert torch.equal(weight.product(x), other.product(x))


def test_inputs_and_biases_that_do_not_fit_are_refused_without_gradients_too() -> None:
    weight = PackedWeight(packed(WEIGHT))
    with torch.no_grad():
        weight.product(normal(2, 64))
        with pytest.raises(QuantizationError, match="64"):
            weight.product(normal(2, 65))
        with pytest.raises(QuantizationError, match="48 rows"):
            weight.product(normal(2, 64), normal(47))


def test_a_convolution_weight_is_turned_along_its_channels() -> None:
    whole = packed(normal(16, 32, 3, 3), rotation=16, equalized=True)
    weight = PackedWeight(whole)
    assert weight.dequantized().shape == weight.shape == (16, 32, 3, 3)
    torch.testing.assert_close(weight.dequantized().flatten(1), dequantized(whole), rtol=1e-6, atol=1e-6)


def test_rows_that_are_looked_up_are_those_of_the_whole() -> None:
    weight = PackedWeight(packed(WEIGHT, rotation=32, equalized=True))
    ids = torch.tensor([[3, 47], [0, 3]])
    torch.testing.assert_close(weight.looked_up(ids), weight.dequantized()[ids])
    torch.testing.assert_close(functional.embedding(ids, weight, padding_idx=0), weight.dequantized()[ids])


def test_one_expert_is_given_packed_and_shares_the_codes() -> None:
    weight = PackedWeight(packed(normal(4, 48, 64), axis=2, rotation=32))
    x = normal(5, 64, seed=3)
    for at in (0, 3, -1, torch.tensor(2)):
        expert = weight[at]
        assert isinstance(expert, PackedWeight)
        assert expert.shape == (48, 64)
        assert expert.codes.untyped_storage().data_ptr() == weight.codes.untyped_storage().data_ptr()
        torch.testing.assert_close(expert.dequantized(), weight.dequantized()[at])
        assert distance(functional.linear(x, expert), x @ weight.dequantized()[at].T) < 3e-5
    assert weight[1:3].shape == (2, 48, 64)
    with pytest.raises(IndexError, match="expert 4 of 4"):
        weight[4]


def test_the_chunks_of_a_large_layer_become_one() -> None:
    whole = packed(WEIGHT, rotation=32)
    assert torch.equal(PackedWeight(*chunks(whole, 0, 10, 31)).dequantized(), PackedWeight(whole).dequantized())
    with pytest.raises(QuantizationError, match="weight: 31 rows were given of 48"):
        PackedWeight(*chunks(whole, 0, 10, 31)[:2])


def test_to_torch_it_is_a_tensor_of_its_shape() -> None:
    weight = PackedWeight(packed(WEIGHT))
    assert (weight.shape, weight.dtype, weight.device.type, weight.ndim) == ((48, 64), torch.float32, "cpu", 2)
    assert (weight.numel(), weight.size(), weight.size(1), weight.requires_grad) == (48 * 64, (48, 64), 64, False)
    assert torch.equal(weight.to(torch.bfloat16), weight.dequantized().to(torch.bfloat16))
    assert torch.equal(torch.stack([weight, weight])[1], weight.dequantized())
    assert torch.equal(weight.float(), weight.data)


def test_what_would_write_into_it_is_refused() -> None:
    weight = PackedWeight(packed(WEIGHT))
    with pytest.raises(QuantizationError, match=r"weight: data is set, but its values are 4-bit codes"):
        weight.data += 1.0
    with pytest.raises(QuantizationError, match="zero_ is called"):
        weight.zero_()
    with pytest.raises(QuantizationError, match="normal_ is called"):
        nn.init.normal_(weight)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_that_is_cast_keeps_its_codes_and_parameters(dtype: torch.dtype) -> None:
    model = nn.Sequential(PackedWeight(packed(WEIGHT, rotation=32, equalized=True)))
    before = {name: buffer.clone() for name, buffer in model.state_dict().items()}
    after = model.to(dtype).float().to(dtype)
    assert all(torch.equal(before[name], buffer) for name, buffer in after.state_dict().items())
    assert after[0].dtype == after[0].dequantized().dtype == dtype


def test_copies_pickles_and_states_give_the_same() -> None:
    weight = PackedWeight(packed(WEIGHT, 2, grid="r2q", rotation=32, equalized=True))
    other = PackedWeight(packed(normal(48, 64, seed=9), 2, grid="r2q", rotation=32, equalized=True))
    other.load_state_dict(weight.state_dict())
    for same in (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight)), other):
        assert torch.equal(same.dequantized(), weight.dequantized())


def test_codes_of_a_read_only_array_are_copied_before_they_are_written() -> None:
    whole = packed(WEIGHT)
    whole.codes.setflags(write=False)
    before = whole.codes.copy()
    weight = PackedWeight(whole)
    assert weight.codes.data_ptr() == whole.codes.ctypes.data
    weight.load_state_dict(PackedWeight(packed(normal(48, 64, seed=9))).state_dict())
    assert (whole.codes == before).all()


@pytest.mark.parametrize("other", [{"rotation": 16}, {"grid": "r2q", "rotation": 32}, {"bits": 8, "rotation": 32}])
def test_the_state_of_another_format_is_refused(other: dict[str, Any]) -> None:
    weight, state = PackedWeight(packed(WEIGHT, rotation=32)), PackedWeight(packed(WEIGHT, **other)).state_dict()
    with pytest.raises(RuntimeError, match="bits, group size, grid, rotation and shape have to be the same"):
        weight.load_state_dict(state)


def test_integers_are_no_dtype_of_values() -> None:
    with pytest.raises(QuantizationError, match=r"dtype is torch.int8; allowed: torch.float32"):
        PackedWeight(packed(WEIGHT), dtype=torch.int8)

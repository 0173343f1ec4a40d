"""Products with packed weights: what they mean, their gradients, what they refuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from arrow_quant_v2 import ArrowQuantizer
from arrow_quant_v2.config import LayerSpec
from arrow_quant_v2.errors import QuantizationError
from arrow_quant_v2.kernels import linear as products
from arrow_quant_v2.kernels.tensors import dequantized, shared_tensor
from arrow_quant_v2.packed import Layout, PackedTensor
from arrow_quant_v2.quantizers import quantizer

ROWS, COLUMNS, GROUP = 24, 100, 32
OPS = {"linear": (), "linear_dynamic": (), "linear_static": (0.03, 120)}


def packed(bits: Any, *, symmetric: bool = False) -> PackedTensor:
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(bits))
    return ArrowQuantizer(bits=bits, group_size=GROUP, symmetric=symmetric).quantize(weight)


def arguments(weight: PackedTensor, bias: torch.Tensor | None = None) -> tuple[Any, ...]:
    zeros = np.empty((weight.rows, 0), np.uint8) if weight.zero_points is None else weight.zero_points
    parts = [shared_tensor(part) for part in (weight.codes, weight.scales, zeros, weight.row_scales)]
    return (*parts[:3], parts[3].view(torch.bfloat16), bias, weight.layout.bits, GROUP, weight.layout.grid)


def on_the_residual_grid(bits: Any) -> PackedTensor:
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(bits))
    spec = LayerSpec(bits=bits, group_size=GROUP, method="r2q", symmetric=False)
    layout = Layout(shape=(ROWS, COLUMNS), bits=bits, quant_axis=1, group_size=GROUP, grid="r2q")
    return quantizer("r2q")(weight, spec).packed("weight", "float32", layout)


def inputs(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, 3, COLUMNS, generator=torch.Generator().manual_seed(9)).to(dtype)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_product_is_that_of_the_dequantized_weight(bits: Any, symmetric: bool, dtype: torch.dtype) -> None:
    weight, bias, x = packed(bits, symmetric=symmetric), torch.randn(ROWS), inputs(dtype)
    found = products.linear(x, *arguments(weight, bias))
    expected = functional.linear(x.float(), dequantized(weight), bias)
    assert found.dtype == dtype
    added = (x.float().abs() @ dequantized(weight).abs().T).max()  # what its rounding is a part of
    part = {torch.float32: 1.5e-5, torch.float16: 1e-3, torch.bfloat16: 2.0**-8}[dtype]
    assert (found.float() - expected).abs().max() <= part * added


@pytest.mark.parametrize("bits", [2, 4])
def test_the_residual_grid_is_multiplied_too(bits: Any) -> None:
    weight, x = on_the_residual_grid(bits), inputs()
    torch.testing.assert_close(products.linear(x, *arguments(weight)), x @ dequantized(weight).T, rtol=1e-5, atol=1e-3)


def test_rounding_by_run_errs_by_half_a_step_of_the_largest_value() -> None:
    x, run = inputs(), 48
    error = (products.rounded_by_run(x, run) - x).abs()
    for start in range(0, COLUMNS, run):
        part = slice(start, start + run)
        largest = x[..., part].abs().amax(dim=-1, keepdim=True)
        assert (error[..., part] <= largest / 127 / 2 * 1.0001).all()
    assert (products.rounded_by_run(torch.zeros(1, 40), GROUP) == 0).all()


@pytest.mark.parametrize(("group", "run"), [(16, 256), (64, 256), (96, 192), (128, 256), (200, 200), (512, 512)])
def test_a_run_is_whole_groups_and_at_most_256_columns_where_groups_are_no_longer(group: int, run: int) -> None:
    nothing = torch.empty(0)
    assert products.Weight(1024, nothing, nothing, nothing, nothing, None, 4, group, "affine").run == run


def test_rounding_by_scale_clips_to_8_bits() -> None:
    x = torch.tensor([-100.0, -0.04, 0.0, 0.05, 100.0])
    assert products.rounded_by_scale(x, 0.1, 10).tolist() == pytest.approx([-1.0, 0.0, 0.0, 0.0, 24.5])


@pytest.mark.parametrize(("name", "further"), OPS.items())
def test_the_gradient_is_that_of_the_dequantized_weight(name: str, further: tuple[Any, ...]) -> None:
    weight, x = packed(4), inputs().requires_grad_()
    getattr(products, name)(x, *arguments(weight), *further).square().sum().backward()
    found = x.grad
    assert found is not None
    product = getattr(products, name)(x.detach(), *arguments(weight), *further)
    torch.testing.assert_close(found, 2 * product @ dequantized(weight), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "further"), OPS.items())
def test_a_bias_learns(name: str, further: tuple[Any, ...]) -> None:
    bias = torch.zeros(ROWS, dtype=torch.bfloat16, requires_grad=True)
    weigh = torch.arange(2 * 3 * ROWS).reshape(2, 3, ROWS) % 7
    (getattr(products, name)(inputs(), *arguments(packed(4), bias), *further) * weigh).sum().backward()
    assert bias.grad is not None
    assert torch.equal(bias.grad, weigh.sum(dim=(0, 1)).bfloat16())


@pytest.mark.parametrize(("name", "further"), OPS.items())
def test_torch_finds_nothing_wrong_with_the_ops(name: str, further: tuple[Any, ...]) -> None:
    x = inputs().requires_grad_()
    torch.library.opcheck(getattr(products, name), (x, *arguments(packed(2), torch.randn(ROWS)), *further))


def test_what_does_not_fit_is_refused_by_name() -> None:
    weight = arguments(packed(4))
    with pytest.raises(QuantizationError, match="linear: grid 'log'; allowed are affine, r2q"):
        products.linear(inputs(), *weight[:-1], "log")
    with pytest.raises(QuantizationError, match=r"bias is torch\.float32 \(3,\); the weight has 24 rows"):
        products.linear(inputs(), *weight[:4], torch.zeros(3), *weight[5:])
    with pytest.raises(QuantizationError, match=r"x is torch\.int64"):
        products.linear(inputs().long(), *weight)
    with pytest.raises(QuantizationError, match=r"linear_static: scale 0\.0"):
        products.linear_static(inputs(), *weight, 0.0, 3)

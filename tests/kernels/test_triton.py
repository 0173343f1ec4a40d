"""The Triton kernel, on a GPU or under its interpreter: it agrees with the meaning of the ops, whatever the sizes."""

from __future__ import annotations

import importlib
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from arrow_quant_v2.config import LayerSpec
from arrow_quant_v2.kernels import linear as products
from arrow_quant_v2.kernels.tensors import shared_tensor
from arrow_quant_v2.packed import Layout
from arrow_quant_v2.quantizers import quantizer

if TYPE_CHECKING:
    from types import ModuleType

ROWS = 70
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = {  # columns and group: many groups, one group, a ragged tail, groups that no tile divides
    "groups of 64": (256, 64),
    "groups of 32, ragged": (100, 32),
    "one group": (144, 144),
    "groups of 24": (96, 24),
    "groups of 8": (40, 8),
}


@pytest.fixture(scope="module")
def kernels() -> Any:
    """The implementations that are registered for CUDA; tests/conftest.py has them interpreted where there is none."""
    return importlib.import_module("arrow_quant_v2.kernels.triton_cuda")


def weight(columns: int, group: int, bits: Any, method: str, *, symmetric: bool = False) -> tuple[Any, ...]:
    spec = LayerSpec(bits=bits, group_size=group, method=method, symmetric=symmetric)
    layout = Layout(shape=(ROWS, columns), bits=bits, quant_axis=1, group_size=group, grid=spec.grid)
    values = torch.randn(ROWS, columns, generator=torch.Generator().manual_seed(columns + bits))
    packed = quantizer(method)(values, spec).packed("weight", "float32", layout)
    zeros = np.empty((ROWS, 0), np.uint8) if packed.zero_points is None else packed.zero_points
    codes, scales, zero_points, row_scales = (
        shared_tensor(part) for part in (packed.codes, packed.scales, zeros, packed.row_scales)
    )
    return codes, scales, zero_points, row_scales.view(torch.bfloat16)


def inputs(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).to(dtype)


def on_its_device(kernels: ModuleType, op: str, *given: Any) -> torch.Tensor:
    """The result of the kernel, on the CPU."""
    there = [one.to(DEVICE) if isinstance(one, torch.Tensor) else one for one in given]
    result: torch.Tensor = getattr(kernels, f"{op}_cuda")(*there)
    return result.cpu()


def meaning(op: str, x: torch.Tensor, *further: Any) -> torch.Tensor:
    """The result in plain torch: the CPU's own kernels round as well."""
    weight, step = products.asked(op, x, *further[:8]), further[8:]
    rounded = {
        "linear": lambda: x,
        "linear_dynamic": lambda: products.rounded_by_run(x, weight.run),
        "linear_static": lambda: products.rounded_by_scale(x, *step),
    }[op]()
    bias = None if weight.bias is None else weight.bias.float()
    return torch.nn.functional.linear(rounded.float(), weight.values(), bias).to(x.dtype)


def agree(kernels: ModuleType, op: str, x: torch.Tensor, *further: Any) -> None:
    found = on_its_device(kernels, op, x, *further)
    expected = meaning(op, x, *further)
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[x.dtype]
    torch.testing.assert_close(found.float(), expected.float(), rtol=tolerance, atol=20 * tolerance)


@pytest.mark.parametrize(("columns", "group"), SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("method", ["rtn", "r2q"])
def test_any_grid_and_grouping(kernels: ModuleType, columns: int, group: int, bits: Any, method: str) -> None:
    if method == "r2q" and bits == 8:
        method = "clip"
    grid = "r2q" if method == "r2q" else "affine"
    parts = weight(columns, group, bits, method)
    x, bias = inputs(3, columns), torch.randn(ROWS, generator=torch.Generator().manual_seed(1))
    agree(kernels, "linear", x, *parts, bias, bits, group, grid)
    agree(kernels, "linear_dynamic", x, *parts, bias, bits, group, grid)
    agree(kernels, "linear_static", x, *parts, None, bits, group, grid, 0.03, 117)


@pytest.mark.parametrize("rows", [1, 16, 17, 65])
@pytest.mark.parametrize("op", ["linear", "linear_dynamic"])
def test_any_number_of_inputs(kernels: ModuleType, rows: int, op: str) -> None:
    agree(kernels, op, inputs(rows, 256), *weight(256, 64, 4, "rtn"), None, 4, 64, "affine")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [2, 8])
def test_inputs_of_16_bits_without_zero_points(kernels: ModuleType, dtype: torch.dtype, bits: Any) -> None:
    parts = weight(128, 64, bits, "rtn", symmetric=True)
    for op, further in (("linear", ()), ("linear_dynamic", ()), ("linear_static", (0.05, 128))):
        agree(kernels, op, inputs(5, 128, dtype), *parts, None, bits, 64, "affine", *further)


def test_leading_axes_and_nothing_at_all(kernels: ModuleType) -> None:
    parts = weight(128, 64, 4, "rtn")
    agree(kernels, "linear", inputs(6, 128).reshape(2, 3, 128), *parts, None, 4, 64, "affine")
    agree(kernels, "linear", torch.zeros(0, 128), *parts, None, 4, 64, "affine")


@pytest.mark.parametrize(("op", "further"), [("linear", ()), ("linear_dynamic", ()), ("linear_static", (0.03, 9))])
def test_what_is_not_a_number_stays_so_in_its_own_row(kernels: ModuleType, op: str, further: tuple[Any, ...]) -> None:
    x = inputs(3, 128)
    x[1, 70] = torch.nan
    found = on_its_device(kernels, op, x, *weight(128, 64, 4, "rtn"), None, 4, 64, "affine", *further)
    assert found[1].isnan().all()
    assert found[[0, 2]].isfinite().all()


def test_a_tile_never_crosses_a_group(kernels: ModuleType) -> None:
    for columns, group in [(4096, 64), (4096, 48), (96, 24), (50, 50), (50, 8)]:
        width = kernels.columns_at_once(columns, group)
        assert width is None or group >= columns or group % width == 0
    assert kernels.columns_at_once(4096, 24) is None


def test_it_is_what_cuda_tensors_get(kernels: ModuleType) -> None:
    code = (
        "import torch; torch.cuda.is_available = lambda: True; from arrow_quant_v2.kernels import cpu; cpu.activate()"
    )
    told = "print([torch._C._dispatch_has_kernel_for_dispatch_key(f'arrow_quant::{op}', 'CUDA') for op in "
    found = subprocess.run(
        [sys.executable, "-c", f"{code}; {told}('linear', 'linear_dynamic', 'linear_static')])"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert found.stdout.strip() == "[True, True, True]"

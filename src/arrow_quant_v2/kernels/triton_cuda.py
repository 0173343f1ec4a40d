"""The Triton kernel as implementations of the ops on CUDA; knows how inputs are rounded and how tiles are cut.

Where TRITON_INTERPRET=1 is set before this is imported, the same kernel runs on the CPU, slowly, which is how it is
tested where there is no GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton

from arrow_quant_v2.kernels import linear as products
from arrow_quant_v2.kernels import ops, triton_kernels

if TYPE_CHECKING:
    from torch import Tensor

    from arrow_quant_v2.kernels.linear import Weight

SMALLEST, LARGEST = 16, 128  # columns of a tile: what a tensor core takes, and what fits in registers
FEW_ROWS, MANY_ROWS = 16, 64  # inputs in a tile
OUTPUTS = 64  # rows of the weight in a tile
INTERPRETED = bool(triton.knobs.runtime.interpret)
MIDDLE = 128  # between 0 and 255: what is taken off so that an unsigned activation fits in int8


class _Rounded(NamedTuple):
    """Inputs (x + offset) step: x int8 (m, k), steps float32 (m, runs) of `run` columns each."""

    x: Tensor
    steps: Tensor
    run: int
    offset: int


def columns_at_once(columns: int, group: int) -> int | None:
    """Columns of a tile that never lie in two groups, a power of two; None where there is no such tile."""
    if group >= columns:
        return LARGEST
    width = min(LARGEST, group & -group)
    return width if width >= SMALLEST else None


def linear_cuda(x: Tensor, *given: Any) -> Tensor:
    """`linear` of kernels/linear.py."""
    return _product(x, products.asked("linear", x, *given))


def linear_dynamic_cuda(x: Tensor, *given: Any) -> Tensor:
    """`linear_dynamic` of kernels/linear.py."""
    weight = products.asked("linear_dynamic", x, *given)
    if columns_at_once(weight.columns, weight.group) is None:
        return _product(products.rounded_by_run(x, weight.run), weight).to(x.dtype)
    return _product(x, weight, _by_run(x, weight.run))


def linear_static_cuda(x: Tensor, *given: Any) -> Tensor:
    """`linear_static` of kernels/linear.py."""
    *of_weight, scale, zero_point = given
    weight = products.asked("linear_static", x, *of_weight)
    products.check_static(scale, zero_point)
    if columns_at_once(weight.columns, weight.group) is None:
        return _product(products.rounded_by_scale(x, scale, zero_point), weight).to(x.dtype)
    return _product(x, weight, _by_scale(x, scale, zero_point))


def _by_run(x: Tensor, run: int) -> _Rounded:
    whole, step = products.whole_by_run(x.reshape(-1, x.shape[-1]), run)
    return _Rounded(whole.to(torch.int8), step, run, 0)


def _by_scale(x: Tensor, scale: float, zero_point: int) -> _Rounded:
    rows = x.reshape(-1, x.shape[-1])
    whole = products.whole_by_scale(rows, scale, zero_point) - MIDDLE
    steps = torch.where(rows.isnan().any(dim=1, keepdim=True), torch.nan, scale).float()  # NaN is no whole number
    return _Rounded(whole.to(torch.int8), steps, x.shape[-1], MIDDLE - zero_point)


def _product(x: Tensor, weight: Weight, rounded: _Rounded | None = None) -> Tensor:
    """Launch the kernel on inputs as they are, or as they were rounded."""
    codes, scales, zero_points, row_scales = (part.contiguous() for part in weight.stored)
    rows, columns, group, bias = weight.rows, weight.columns, weight.group, weight.bias
    given = x.reshape(-1, columns).contiguous() if rounded is None else rounded.x.contiguous()
    out = x.new_empty((*x.shape[:-1], rows))
    if not out.numel():
        return out
    width = columns_at_once(columns, group)
    block = FEW_ROWS if len(given) <= FEW_ROWS else MANY_ROWS
    launch = triton_kernels.product[(triton.cdiv(len(given), block), triton.cdiv(rows, OUTPUTS))]
    launch(
        given, given if rounded is None else rounded.steps, codes, scales, zero_points, row_scales,
        given if bias is None else bias, out,
        len(given), rows, columns, codes.shape[1], -(-columns // group),
        1 if rounded is None else rounded.steps.shape[1], 0 if rounded is None else rounded.offset,
        BITS=weight.bits, GROUP=group, STEP_GROUP=columns if rounded is None else rounded.run,
        RESIDUAL=weight.grid == "r2q", SYMMETRIC=not zero_points.numel(), HAS_BIAS=bias is not None,
        INTEGER=rounded is not None, ONE_GROUP=width is not None, WIDE=INTERPRETED,
        BLOCK_M=block, BLOCK_N=OUTPUTS, BLOCK_K=width or SMALLEST,
    )  # fmt: skip
    return out


def register() -> None:
    """Let the dispatcher use the kernel for every CUDA tensor."""
    for kernel in (linear_cuda, linear_dynamic_cuda, linear_static_cuda):
        ops.register_kernel(kernel.__name__.removesuffix("_cuda"), "CUDA", kernel)

"""Inputs times packed weights, declared once: schema, shapes, meaning, gradient; knows nothing of modules or devices.

What is registered here is the meaning in plain torch, which runs everywhere; device kernels register beside it. They
add up in another order, and are held to the meaning by its rounding. Where x is bfloat16, they may round W and what x
is rounded to as well; where x of 16 bits is rounded to 8, they may round W so too, a run of a row by the greatest that
its codes can mean. Of the x of a group they may leave out 2^-24 of its greatest, 2^-16 where x is bfloat16 and the
group has at most 256 columns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from arrow_quant_v2.errors import QuantizationError
from arrow_quant_v2.kernels import ops
from arrow_quant_v2.packed import GRIDS

if TYPE_CHECKING:
    from collections.abc import Sequence

WEIGHT = "Tensor codes, Tensor scales, Tensor zero_points, Tensor row_scales, Tensor? bias"
FORMAT = "int bits, int group_size, str grid"
LINEAR_SCHEMA = f"linear(Tensor x, {WEIGHT}, {FORMAT}) -> Tensor"
LINEAR_DYNAMIC_SCHEMA = f"linear_dynamic(Tensor x, {WEIGHT}, {FORMAT}) -> Tensor"
LINEAR_STATIC_SCHEMA = f"linear_static(Tensor x, {WEIGHT}, {FORMAT}, float scale, int zero_point) -> Tensor"
LARGEST = 127  # of a signed activation
TOP = 255  # of an unsigned one
LONGEST_RUN = 256
"""Columns of x that are rounded by one step, as in llama.cpp's Q8_K, where groups are not longer."""


class Weight(NamedTuple):
    """What an op is given of W (rows, columns), in the schema's order: codes, parameters, bias, how they are read."""

    columns: int
    codes: Tensor
    scales: Tensor
    zero_points: Tensor
    row_scales: Tensor
    bias: Tensor | None
    bits: int
    group_size: int
    grid: str

    @property
    def rows(self) -> int:
        """Output channels."""
        return self.codes.shape[0]

    @property
    def group(self) -> int:
        """Columns per group, never more than there are."""
        return min(self.group_size, self.columns)

    @property
    def run(self) -> int:
        """Columns of x that are rounded by one step: as many whole groups as fit in `LONGEST_RUN`, at least one."""
        return max(1, LONGEST_RUN // self.group) * self.group

    @property
    def stored(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Codes, scales, zero points and row scales."""
        return self.codes, self.scales, self.zero_points, self.row_scales

    def values(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start to stop of W, (rows, columns) float32."""
        dequantize = ops.dequantize_r2q if self.grid == "r2q" else ops.dequantize
        codes, scales, zero_points, row_scales = (part[start:stop] for part in self.stored)
        how = (self.bits, self.columns, self.group_size, torch.float32)
        values: Tensor = dequantize(codes, scales, zero_points, row_scales, *how)
        return values


def asked(op: str, x: Tensor, *given: Any) -> Weight:
    """The weight that x is to be multiplied with, of what follows x in the schema of `linear`.

    Raises:
        QuantizationError: a width, shape, dtype or grid is not one of those that `linear` names.
    """
    weight = Weight(x.shape[-1] if x.dim() else 0, *given)
    check_weight(op, weight)
    check_inputs(op, x, weight, weight.bias)
    return weight


def check_weight(op: str, weight: Weight) -> None:
    """Refuse codes and parameters that do not belong together.

    Raises:
        QuantizationError: a width, shape, dtype or grid does not fit.
    """
    if weight.grid not in GRIDS:
        raise QuantizationError(f"{op}: grid {weight.grid!r}; allowed are {', '.join(GRIDS)}")
    name = "dequantize_r2q" if weight.grid == "r2q" else "dequantize"
    ops.check_dequantize(name, *weight.stored, weight.bits, weight.columns, weight.group_size, torch.float32)


def check_inputs(op: str, x: Tensor, weight: Weight, bias: Tensor | None) -> None:
    """Refuse inputs, or a bias, that the weight cannot meet.

    Raises:
        QuantizationError: a shape or dtype does not fit.
    """
    if x.dim() < 1 or x.shape[-1] != weight.columns or x.dtype not in ops.FLOATS:
        asked_for = f"float32, bfloat16 or float16 (..., {weight.columns or 'columns'})"
        raise QuantizationError(f"{op}: x is {x.dtype} {tuple(x.shape)}; {asked_for}")
    if bias is not None and (bias.shape != weight.codes.shape[:1] or not bias.is_floating_point()):
        raise QuantizationError(f"{op}: bias is {bias.dtype} {tuple(bias.shape)}; the weight has {weight.rows} rows")


@ops.operator(LINEAR_SCHEMA)
def linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zero_points: Tensor,
    row_scales: Tensor,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    grid: str,
) -> Tensor:
    """Give x W^T + bias (..., rows), added up in float32, of x (..., columns) float32, bfloat16 or float16.

    The result has the dtype of x. W (rows, columns) is what `dequantize`, or `dequantize_r2q` for grid "r2q", makes of
    codes, scales, zero_points and row_scales; bias (rows,) is of any floating dtype. x and bias have gradients.

    Raises:
        QuantizationError: a width, shape or dtype is not one of these.
    """
    weight = asked("linear", x, codes, scales, zero_points, row_scales, bias, bits, group_size, grid)
    return _product(x, weight)


@ops.operator(LINEAR_DYNAMIC_SCHEMA)
def linear_dynamic(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zero_points: Tensor,
    row_scales: Tensor,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    grid: str,
) -> Tensor:
    """As `linear`, of x with every `Weight.run` columns of a row rounded to 8 bits: see `rounded_by_run`.

    Raises:
        QuantizationError: as `linear`.
    """
    weight = asked("linear_dynamic", x, codes, scales, zero_points, row_scales, bias, bits, group_size, grid)
    return _product(rounded_by_run(x, weight.run), weight).to(x.dtype)


@ops.operator(LINEAR_STATIC_SCHEMA)
def linear_static(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zero_points: Tensor,
    row_scales: Tensor,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    grid: str,
    scale: float,
    zero_point: int,
) -> Tensor:
    """As `linear`, of x rounded to 8 bits with one scale and zero point: see `rounded_by_scale`.

    Raises:
        QuantizationError: as `linear`, or the scale is not above 0, or the zero point is not from 0 to 255.
    """
    weight = asked("linear_static", x, codes, scales, zero_points, row_scales, bias, bits, group_size, grid)
    check_static(scale, zero_point)
    return _product(rounded_by_scale(x, scale, zero_point), weight).to(x.dtype)


def _product(x: Tensor, weight: Weight) -> Tensor:
    bias = None if weight.bias is None else weight.bias.float()
    return functional.linear(x.float(), weight.values(), bias).to(x.dtype)


def rounded_by_run(x: Tensor, run: int) -> Tensor:
    """Round x (..., columns), as float32 of its shape: round(x / s) s with s = absmax / 127 of each run of a row.

    As llama.cpp rounds activations (its Q8_K has runs of 256). A run of zeros stays so.
    """
    columns = x.shape[-1]
    whole, step = whole_by_run(x.reshape(-1, columns), run)
    padded = functional.pad(whole, (0, -columns % run)).unflatten(1, (-1, run))
    rounded: Tensor = (padded * step[..., None]).flatten(1)[:, :columns]
    return rounded.reshape(x.shape)


def whole_by_run(x: Tensor, run: int) -> tuple[Tensor, Tensor]:
    """The whole numbers round(x / s) (rows, columns) of x of that shape, and the steps s (rows, runs), float32."""
    columns = x.shape[1]
    runs = functional.pad(x.float(), (0, -columns % run)).unflatten(1, (-1, run))  # (rows, runs, run)
    step = runs.abs().amax(dim=-1) / LARGEST
    whole = torch.where(step[..., None] > 0, runs / step[..., None], 0.0).round()
    return whole.flatten(1)[:, :columns], step


def rounded_by_scale(x: Tensor, scale: float, zero_point: int) -> Tensor:
    """Round x, as float32 of its shape: (q - zero_point) scale with q = clip(round(x / scale) + zero_point, 0, 255)."""
    return (whole_by_scale(x, scale, zero_point) - zero_point) * scale


def whole_by_scale(x: Tensor, scale: float, zero_point: int) -> Tensor:
    """The whole numbers q = clip(round(x / scale) + zero_point, 0, 255) of x, float32 of its shape."""
    return ((x.float() / scale).round() + zero_point).clamp(0, TOP)


def check_static(scale: float, zero_point: int) -> None:
    """Refuse activation parameters that mean nothing.

    Raises:
        QuantizationError: the scale is not above 0, or the zero point is not from 0 to 255.
    """
    if not scale > 0 or not 0 <= zero_point <= TOP:
        raise QuantizationError(f"linear_static: scale {scale}, zero point {zero_point}; above 0, and from 0 to {TOP}")


def _shapes(x: Tensor, codes: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def _remember(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs[1:5])
    ctx.columns, ctx.format, ctx.after_bias = inputs[0].shape[-1], inputs[6:9], len(inputs) - 6
    ctx.bias_dtype = None if inputs[5] is None else inputs[5].dtype


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Of x as if it had not been rounded (straight through: Bengio et al., 2013, arXiv 1308.3432), and of the bias."""
    of_x = of_bias = None
    if ctx.needs_input_grad[0]:
        codes, scales, zero_points, row_scales = ctx.saved_tensors
        weight = Weight(ctx.columns, codes, scales, zero_points, row_scales, None, *ctx.format)
        of_x = (grad.float() @ weight.values()).to(grad.dtype)
    if ctx.needs_input_grad[5]:
        of_bias = grad.float().reshape(-1, grad.shape[-1]).sum(dim=0).to(ctx.bias_dtype)
    return (of_x, None, None, None, None, of_bias, *(None,) * ctx.after_bias)


for _name in ("linear", "linear_dynamic", "linear_static"):
    ops.shapes_of(_name)(_shapes)
    ops.register_gradient(_name, _gradient, _remember)

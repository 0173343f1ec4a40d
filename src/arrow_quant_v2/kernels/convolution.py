"""Convolutions with packed weights, declared once: schema, shapes, meaning, gradient; knows no modules or devices.

As in kernels/linear.py: what is registered here is the meaning in plain torch, and device kernels, which add up in
another order, are held to it by its rounding; where x is bfloat16, they may round W to it as well.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from arrow_quant_v2.errors import QuantizationError
from arrow_quant_v2.kernels import linear, ops

if TYPE_CHECKING:
    from collections.abc import Sequence

MOST_AXES = 3
CONVOLUTION_SCHEMA = (
    f"convolution(Tensor x, {linear.WEIGHT}, {linear.FORMAT}, int[] kernel, int[] stride, int[] padding,"
    " int[] dilation, int groups, Tensor? equalization=None) -> Tensor"
)


class How(NamedTuple):
    """How a kernel moves, one number per axis, and in how many groups channels are; as torch's functions name them."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @classmethod
    def of(
        cls, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
    ) -> How:
        """The same of any sequences, as operators of torch are given them."""
        return cls(tuple(kernel), tuple(stride), tuple(padding), tuple(dilation), groups)

    def out(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """Sizes of the result, of inputs of these sizes, axis by axis."""
        axes = zip(sizes, *self[:4], strict=True)
        return tuple((size + 2 * pad - step * (width - 1) - 1) // move + 1 for size, width, move, pad, step in axes)


@ops.operator(CONVOLUTION_SCHEMA)
def convolution(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zero_points: Tensor,
    row_scales: Tensor,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    grid: str,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    equalization: Tensor | None = None,
) -> Tensor:
    """Convolve x (batch, channels, *in) over one to three axes: (batch, rows, *out) of the dtype of x, + bias (rows,).

    W (rows, channels / groups, *kernel) is what `dequantize`, or `dequantize_r2q` for grid "r2q", makes of the codes,
    whose columns are channels and, within each, the places of the kernel. kernel, stride, padding (zeros on both
    sides) and dilation have one number per axis, as torch.nn.functional.conv2d has them. The channels of x are divided
    by the equalization (channels,) float32, if there is one. x and bias have gradients.

    Raises:
        QuantizationError: a width, shape or dtype does not fit.
    """
    of_weight = (codes, scales, zero_points, row_scales, bias, bits, group_size, grid)
    how = How.of(kernel, stride, padding, dilation, groups)
    weight = asked(x, *of_weight, how, equalization)
    return with_values(equalized(x, equalization), weight.values(), bias, how).to(x.dtype)


def equalized(x: Tensor, equalization: Tensor | None) -> Tensor:
    """Channels of x (batch, channels, *in), each divided by its number; in float32 what is too large for float16."""
    if equalization is None:
        return x
    divided = x.float() / equalization.reshape(-1, *(1,) * (x.dim() - 2))
    return divided.to(x.dtype) if x.dtype == torch.bfloat16 else divided


def with_values(x: Tensor, values: Tensor, bias: Tensor | None, how: How) -> Tensor:
    """The same with a dequantized weight (rows, columns), by torch's convolution in the dtype of x."""
    weight = values.to(x.dtype).reshape(len(values), -1, *how.kernel)
    added = None if bias is None else bias.to(x.dtype)
    return torch.convolution(x, weight, added, *_moved(how))


def _moved(how: How) -> tuple[Any, ...]:
    """As torch takes it of a convolution that is not transposed."""
    return how.stride, how.padding, how.dilation, False, [0] * len(how.kernel), how.groups


def asked(x: Tensor, *given: Any) -> linear.Weight:
    """The weight that x is to be convolved with, of what follows x in the schema up to grid, how, and equalization.

    Raises:
        QuantizationError: a width, shape or dtype does not fit.
    """
    *of_weight, how, equalization = given
    channels = x.shape[1] if x.dim() > 1 else 0
    weight = linear.Weight(channels // max(1, how.groups) * prod(how.kernel), *of_weight)
    linear.check_weight("convolution", weight)
    check_inputs(x, weight, weight.bias, how, equalization)
    return weight


def check_inputs(x: Tensor, weight: linear.Weight, bias: Tensor | None, how: How, equalization: Tensor | None) -> None:
    """Refuse inputs, a bias or an equalization that the weight cannot meet.

    Raises:
        QuantizationError: a shape or dtype does not fit.
    """
    check_sizes(x.dtype, x.shape, weight.rows, weight.columns, how)
    check_added(x, weight, bias, equalization)


def check_added(x: Tensor, weight: linear.Weight, bias: Tensor | None, equalization: Tensor | None) -> None:
    """Refuse a bias or an equalization that x, or the weight, cannot meet.

    Raises:
        QuantizationError: a shape or dtype does not fit.
    """
    if bias is not None and (bias.shape != weight.codes.shape[:1] or not bias.is_floating_point()):
        raise QuantizationError(f"convolution: bias is {bias.dtype} {tuple(bias.shape)}; there are {weight.rows} rows")
    if equalization is not None and (equalization.shape != x.shape[1:2] or equalization.dtype != torch.float32):
        found = f"equalization is {equalization.dtype} {tuple(equalization.shape)}"
        raise QuantizationError(f"convolution: {found}; float32, one for each of {x.shape[1]} channels")


def check_sizes(dtype: torch.dtype, shape: torch.Size, rows: int, columns: int, how: How) -> None:
    """Refuse inputs of a dtype and a shape that a weight (rows, columns) cannot meet so.

    Raises:
        QuantizationError: a shape or dtype does not fit.
    """
    axes, kernel = len(how.kernel), how.kernel
    if not 1 <= axes <= MOST_AXES or len(shape) != axes + 2 or dtype not in ops.FLOATS:
        found = f"x is {dtype} {tuple(shape)}, the kernel {kernel}"
        raise QuantizationError(
            f"convolution: {found}; float32, bfloat16 or float16 (batch, channels, one size per axis)"
        )
    for name, numbers in how._asdict().items():
        if name != "groups" and len(numbers) != axes:
            raise QuantizationError(
                f"convolution: the numbers of {name} are {len(numbers)}; the kernel has {axes} axes"
            )
    if min(how.stride) < 1 or min(how.dilation) < 1 or min(how.padding) < 0 or how.groups < 1:
        raise QuantizationError(f"convolution: {how}; only padding may be 0, and nothing may be below")
    if min(how.out(shape[2:])) < 1:
        raise QuantizationError(f"convolution: of {tuple(shape[2:])} nothing is left for a kernel of {kernel}")
    if shape[1] * prod(kernel) != columns * how.groups or rows % how.groups:
        found = f"x has {shape[1]} channels in {how.groups} groups, the weight {rows} rows of {columns}"
        raise QuantizationError(f"convolution: {found}; columns are channels / groups * {prod(kernel)}")


def _shapes(x: Tensor, codes: Tensor, *further: Any) -> Tensor:
    how = How.of(*further[7:12])
    return x.new_empty((x.shape[0], codes.shape[0], *how.out(x.shape[2:])))


def _remember(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs[1:5], inputs[14])
    ctx.shape, ctx.format, ctx.how = inputs[0].shape, inputs[6:9], How.of(*inputs[9:14])
    ctx.bias_dtype = None if inputs[5] is None else inputs[5].dtype


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Of x, by torch's own gradient with the weight dequantized again, and of the bias."""
    of_x = of_bias = None
    if ctx.needs_input_grad[0]:
        *stored, equalization = ctx.saved_tensors
        x = grad.new_empty(1).expand(ctx.shape)  # only its shape counts
        weight = asked(x, *stored, None, *ctx.format, ctx.how, equalization)
        values = weight.values().to(grad.dtype).reshape(weight.rows, -1, *ctx.how.kernel)
        wanted = (True, False, False)
        of_x = torch.ops.aten.convolution_backward(grad, x, values, None, *_moved(ctx.how), wanted)[0]
        of_x = equalized(of_x, equalization).to(grad.dtype)
    if ctx.needs_input_grad[5]:
        of_bias = grad.float().sum(dim=[0, *range(2, grad.dim())]).to(ctx.bias_dtype)
    return (of_x, None, None, None, None, of_bias, *(None,) * 9)


ops.shapes_of("convolution")(_shapes)
ops.register_gradient("convolution", _gradient, _remember)

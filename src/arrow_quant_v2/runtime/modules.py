"""Layers of torch that run on a packed weight; they know neither files nor models.

A layer becomes one of these in place, by `run_packed`: it keeps its class's attributes, its bias, its hooks and its
place in every module that holds it.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from arrow_quant_v2.errors import QuantizationError
from arrow_quant_v2.kernels import linear
from arrow_quant_v2.kernels.convolution import How
from arrow_quant_v2.runtime.packed_weight import PackedWeight

if TYPE_CHECKING:
    from arrow_quant_v2.runtime.clock import Clock

Activations: TypeAlias = Literal["dynamic", "static"]
CHECKED_CALLS = 2


@dataclass(frozen=True, kw_only=True)
class StaticRanges:
    """8-bit parameters of a layer's inputs, of each time group: x ~ scale (code - zero_point), code 0 to 255.

    Where the time is not known, `whole` has those of the range that covers all groups.

    smoothed  they are those of inputs whose channels are equalized
    """

    scales: tuple[float, ...]
    zero_points: tuple[int, ...]
    smoothed: bool = False

    def of(self, group: int | None) -> tuple[float, int]:
        """Scale and zero point of a group."""
        return self.whole if group is None else (self.scales[group], self.zero_points[group])

    @property
    def whole(self) -> tuple[float, int]:
        """Scale and zero point that cover every group."""
        pairs = list(zip(self.scales, self.zero_points, strict=True))
        low = min(-zero * scale for scale, zero in pairs)
        high = max((linear.TOP - zero) * scale for scale, zero in pairs)
        scale = (high - low) / linear.TOP
        return scale, min(linear.TOP, max(0, round(-low / scale)))


class PackedLayer(nn.Module):
    """What the layers below share: a packed weight in the place of the parameter, and a look at the first outputs.

    With a parameter in its place, as where peft makes another layer of the same class, they are the layers of torch. A
    layer whose outputs are not finite although its inputs are is named in a warning, in its first two calls.
    """

    weight: Any  # PackedWeight
    bias: Any  # a Tensor, or None
    checks_left = CHECKED_CALLS
    _is_hf_initialized = True  # transformers shall not draw new values for it

    def checked(self, x: Tensor, out: Tensor) -> Tensor:
        """Give `out` again, looked at in the first calls."""
        if self.checks_left and not torch.compiler.is_compiling():
            self.checks_left -= 1
            if not _is_finite(out) and (not x.is_floating_point() or _is_finite(x)):
                warnings.warn(
                    f"{self.weight.name}: its outputs in {out.dtype} are not finite although its inputs are, the first"
                    " layer of which this is so; run the model in bfloat16 or float32, or quantize it again",
                    RuntimeWarning,
                    stacklevel=2,
                )
        return out


def _is_finite(x: Tensor) -> bool:
    """Whether all values are; a sum, which is read in one pass, tells it unless it overflows."""
    return bool(x.sum().isfinite()) or bool(x.isfinite().all())


class QuantizedLinear(PackedLayer, nn.Linear):
    """x W^T + bias from codes, in the dtype of x; on inputs rounded to 8 bits where `activations` says so.

    "dynamic" rounds every group of a row by its own largest value (see kernels/linear.py). "static" rounds by the
    `ranges` of the time group that `clock` is in. `corrections` (groups, out), if there are any, are added to the
    outputs in each time group, nothing where the time is not known.
    """

    activations: Activations | None = None
    ranges: StaticRanges | None = None
    clock: Clock | None = None
    corrections: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        weight = self.weight
        if not isinstance(weight, PackedWeight):
            return super().forward(x)
        out = weight.product(x, self.bias) if self.activations is None else self._rounded(x, weight)
        if self.clock is not None and self.corrections is not None:
            group = self.clock.now()
            out = out if group is None else out + self.corrections[group].to(out.dtype)
        return self.checked(x, out) if self.checks_left else out

    def _rounded(self, x: Tensor, weight: PackedWeight) -> Tensor:
        """(..., in) -> (..., out) of inputs rounded to 8 bits."""
        if self.activations == "dynamic":
            return weight.product(x, self.bias, linear.linear_dynamic)
        if self.activations == "static" and self.ranges is not None:
            group = None if self.clock is None else self.clock.now()
            return self._static(x, *self.ranges.of(group), smoothed=self.ranges.smoothed)
        return weight.product(x, self.bias)

    def _static(self, x: Tensor, scale: float, zero_point: int, *, smoothed: bool) -> Tensor:
        """Ranges are those of x itself, so x is rounded before its channels are turned; its gradient is not.

        Smoothed ones are those of x / s, which the product itself makes of x.
        """
        weight: PackedWeight = self.weight
        if smoothed or not weight.has_basis:
            return weight.product(x, self.bias, linear.linear_static, scale, zero_point)
        rounded = linear.rounded_by_scale(x.detach(), scale, zero_point)
        return weight.product(rounded + (x - x.detach()), self.bias).to(x.dtype)


class _QuantizedConv(PackedLayer):
    """A convolution from codes."""

    def forward(self, x: Tensor) -> Tensor:
        """As the convolution of the original: padding, dilation and groups are those of the layer."""
        weight = self.weight
        if not isinstance(weight, PackedWeight):
            plain: Tensor = cast("Any", super()).forward(x)
            return plain
        batched = x if x.dim() == len(weight.shape) else x[None]
        padded, how = self._padded(batched)
        out = weight.convolved(padded, self.bias, how)
        return self.checked(x, out if batched is x else out[0])

    def _padded(self, x: Tensor) -> tuple[Tensor, How]:
        """Inputs with the padding that a kernel cannot have, that of other values or of one side, and the rest."""
        layer = cast("Any", self)
        sides = layer._reversed_padding_repeated_twice  # noqa: SLF001 - also of padding that is said in words
        moved, padding = (layer.dilation, layer.groups), tuple(reversed(sides[::2]))
        if layer.padding_mode == "zeros" and sides[::2] == sides[1::2]:
            return x, How(layer.kernel_size, layer.stride, padding, *moved)
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        return functional.pad(x, sides, mode=mode), How(layer.kernel_size, layer.stride, (0,) * len(padding), *moved)


class QuantizedConv1d(_QuantizedConv, nn.Conv1d):
    """Conv1d from codes: (batch, in, length)."""


class QuantizedConv2d(_QuantizedConv, nn.Conv2d):
    """Conv2d from codes: (batch, in, height, width)."""


class QuantizedConv3d(_QuantizedConv, nn.Conv3d):
    """Conv3d from codes: (batch, in, depth, height, width)."""


class QuantizedEmbedding(PackedLayer, nn.Embedding):
    """Rows of a packed table; only those that are asked for are dequantized."""

    bias = None

    def forward(self, ids: Tensor) -> Tensor:
        """Integers (...) -> (..., embedding_dim) in the dtype that the model was cast to."""
        if not isinstance(self.weight, PackedWeight):
            return super().forward(ids)
        return self.checked(ids, self.weight.looked_up(ids))


KINDS: dict[type[nn.Module], type[PackedLayer]] = {
    nn.Linear: QuantizedLinear,
    nn.Conv1d: QuantizedConv1d,
    nn.Conv2d: QuantizedConv2d,
    nn.Conv3d: QuantizedConv3d,
    nn.Embedding: QuantizedEmbedding,
}


def can_run_packed(layer: nn.Module) -> bool:
    """Whether there is a packed layer for exactly this class; a class that computes otherwise has none."""
    plain = type(layer) in KINDS and "forward" not in vars(layer) and not hasattr(layer, "parametrizations")
    return plain and getattr(layer, "max_norm", None) is None  # which writes into the table


def run_packed(layer: nn.Module, weight: PackedWeight) -> PackedLayer:
    """Turn a layer of torch into one that runs on a packed weight, in place.

    Raises:
        QuantizationError: there is none for its class, or the weight has another shape.
    """
    if not can_run_packed(layer):
        known = ", ".join(kind.__name__ for kind in KINDS)
        raise QuantizationError(f"{weight.name}: {type(layer).__name__} cannot run packed; {known} itself can")
    expected = getattr(layer.weight, "shape", None)
    if weight.shape != expected:
        raise QuantizationError(f"{weight.name}: is {tuple(weight.shape)}; the layer's weight is {expected}")
    layer.__class__ = KINDS[type(layer)]
    del layer.weight
    layer.weight = weight
    if isinstance(layer, nn.Linear):
        layer.register_buffer("corrections", None)
    return cast("PackedLayer", layer)

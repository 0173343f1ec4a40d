"""Codes, scales and zero points that move by gradients of the weight. Knows no model and no loss."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import pad

from arrow_quant_v2.kernels import ops, reference
from arrow_quant_v2.kernels.tensors import dequantized, shared_tensor
from arrow_quant_v2.quantizers.basis import Basis

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from arrow_quant_v2.packed import PackedTensor

LARGEST = 255  # of a stored number
RATE = 0.15  # usual step of a stored number, times the levels of the grid: at every width as much of a code
CODE_RATE = 0.02  # usual step of a code: one that is felt the same way in 50 steps is another code
MOMENTUM, SPREAD = 0.9, 0.99  # of Adam


class Tunable:
    """The codes of a layer, or of some rows of it, and their grid.

    Stored numbers are whole. What moves are float32 numbers behind them, by Adam (Kingma and Ba, 2015); the model only
    ever sees them rounded, as they would be stored, and its gradient is taken for theirs (straight through). On the row
    grid, which stores no scales, x moves instead in row_scale = start exp(2 x / 255), |x| <= 255, rounded to bfloat16:
    that is felt as a scale of 255 would be.
    """

    def __init__(self, packed: PackedTensor) -> None:
        """Start from codes and a grid as they are."""
        self._packed = packed
        self._start = shared_tensor(packed.row_scales).view(torch.bfloat16).float()
        scales = shared_tensor(packed.scales).float()
        self._moving = [torch.zeros_like(scales) if packed.layout.grid == "row" else scales]
        if packed.zero_points is not None:
            self._moving.append(shared_tensor(packed.zero_points).float())
        self._moving.append(_codes(packed).float())
        rates = [RATE / _last(packed)] * (len(self._moving) - 1) + [CODE_RATE]
        groups = [{"params": [one], "usual": rate} for one, rate in zip(self._moving, rates, strict=True)]
        self._adam = torch.optim.Adam(groups, betas=(MOMENTUM, SPREAD), foreach=False, fused=False)

    @property
    def packed(self) -> PackedTensor:
        """Codes and grid as they are now."""
        return self._packed

    def weight(self) -> Tensor:
        """(rows, columns) float32, in the basis of the model."""
        return dequantized(self._packed)

    def felt(self, of_weight: Tensor) -> list[Tensor]:
        """The gradient (rows, columns) of the weight -> that of the stored scales, zero points, and codes."""
        packed, layout = self._packed, self._packed.layout
        scale = None if packed.equalization is None else shared_tensor(packed.equalization)
        basis = Basis(channels=layout.channels or 1, rotation=packed.rotation, equalization=scale)
        codes = _codes(packed)
        of_coded = basis.inputs(of_weight)  # the transpose of what is done to codes
        of_grid = _residual(packed, codes, of_coded) if layout.grid == "r2q" else _affine(packed, codes, of_coded)
        return [*of_grid, of_coded * reference.per_column(_step(packed), layout.group, layout.columns)]

    def move(self, felt: Sequence[Tensor], share: float) -> None:
        """Make one step against the gradient, `share` times as large as the usual one."""
        for moving, gradient in zip(self._moving, felt, strict=True):
            moving.grad = gradient
        for group in self._adam.param_groups:
            group["lr"] = group["usual"] * share
        self._adam.step()
        scales, *zeros, codes = self._moving
        changed = self._moved(scales)
        for moving in zeros:
            changed["zero_points"] = _whole(moving, LARGEST).numpy()
        changed["codes"] = ops.pack(_whole(codes, _last(self._packed)), self._packed.layout.bits).numpy()
        self._packed = replace(self._packed, **changed)

    def _moved(self, scales: Tensor) -> dict[str, Any]:
        """The stored scales, or the rows' where they are alone."""
        if self._packed.layout.grid != "row":
            return {"scales": _ordered(_whole(scales, LARGEST), self._packed).numpy()}
        farther = torch.exp(scales.clamp_(-LARGEST, LARGEST)[:, 0].double() * (2.0 / LARGEST))
        rows = reference.only_scales(self._start * farther.float(), cover_all=False)
        return {"row_scales": rows.view(torch.uint16).numpy()}


def _last(packed: PackedTensor) -> int:
    """The largest code."""
    return int(2**packed.layout.bits - 1)


def _codes(packed: PackedTensor) -> Tensor:
    """(rows, columns) uint8."""
    return ops.unpack(shared_tensor(packed.codes), packed.layout.bits, packed.layout.columns)


def _whole(moving: Tensor, largest: int) -> Tensor:
    """The numbers as they are stored; those behind them are kept within what can be."""
    return moving.clamp_(0.0, largest).round().to(torch.uint8)


def _step(packed: PackedTensor) -> Tensor:
    """(rows, groups): how far a level is from the next one; on the residual grid the mean of that."""
    scale = reference.scale_of(shared_tensor(packed.scales), shared_tensor(packed.row_scales).view(torch.bfloat16))
    if packed.layout.grid != "r2q":
        return scale
    a1, a2 = scale[:, 0::2], scale[:, 1::2]
    return (a1 + float(reference.largest_low(packed.layout.bits)) * a2) * (2.0 / _last(packed))


def _ordered(scales: Tensor, packed: PackedTensor) -> Tensor:
    """Stored scales whose levels are in order: on the residual grid s1^2 >= m s2^2."""
    if packed.layout.grid != "r2q":
        return scales
    pairs = scales.unflatten(1, (-1, 2))
    most = (pairs[..., 0].double().square() / reference.largest_low(packed.layout.bits)).sqrt().floor()
    return torch.stack([pairs[..., 0], torch.minimum(pairs[..., 1], most.to(torch.uint8))], dim=2).flatten(1)


def _sums(columns: Tensor, packed: PackedTensor) -> Tensor:
    """(rows, columns) -> (rows, groups): each group's sum."""
    layout = packed.layout
    whole = pad(columns, (0, layout.groups * layout.group - layout.columns))
    return whole.reshape(len(columns), -1, layout.group).sum(dim=2)


def _of_scales(felt: Tensor, packed: PackedTensor) -> Tensor:
    """d/ds of row_scale (s / 255)^2, times what that is felt: 2 row_scale s / 255^2."""
    rows = shared_tensor(packed.row_scales).view(torch.bfloat16).float()[:, None]
    return felt * rows * shared_tensor(packed.scales).float() * (2.0 / LARGEST**2)


def _affine(packed: PackedTensor, codes: Tensor, felt: Tensor) -> list[Tensor]:
    """W = scale (code - zero): d/dscale = sum g (code - zero), d/dzero = -scale sum g."""
    bits = packed.layout.bits
    scales, rows = shared_tensor(packed.scales), shared_tensor(packed.row_scales).view(torch.bfloat16)
    none = scales[:, :0]
    zeros = none if packed.zero_points is None else shared_tensor(packed.zero_points)
    total = _sums(felt, packed)
    of_scale = _sums(felt * codes, packed) - reference.zero_of(zeros, scales, bits) * total
    if packed.zero_points is None:
        return [_of_scales(of_scale, packed)]
    return [_of_scales(of_scale, packed), -reference.scale_of(scales, rows) * total * ((2**bits - 1) / LARGEST)]


def _residual(packed: PackedTensor, codes: Tensor, felt: Tensor) -> list[Tensor]:
    """W = mu + a1 t + a2 k, mu = (a1 + m a2) share: of a1 sum g t + share sum g, of a2 sum g k + m share sum g."""
    bits, m = packed.layout.bits, reference.largest_low(packed.layout.bits)
    total = _sums(felt, packed)
    top = torch.where(codes > m, felt, -felt)
    low = felt * (2.0 * (codes & m).float() - m)
    share = torch.zeros_like(total)
    if packed.zero_points is not None:
        share = (LARGEST - 2.0 * shared_tensor(packed.zero_points).float()) / LARGEST
    both = [_sums(top, packed) + share * total, _sums(low, packed) + m * share * total]
    of_scales = _of_scales(torch.stack(both, dim=2).flatten(1), packed)
    if packed.zero_points is None:
        return [of_scales]
    scales, rows = shared_tensor(packed.scales), shared_tensor(packed.row_scales).view(torch.bfloat16)
    grid = reference.residual_of(scales, scales[:, :0], rows, bits)
    return [of_scales, (grid.a1 + m * grid.a2) * total * (-2.0 / LARGEST)]

"""The affine grid as the column loop of GPTQ uses it, one group of some rows at a time; knows no H."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from arrow_quant_v2.kernels import ops, reference
from arrow_quant_v2.kernels.reference import Fit, Residual

if TYPE_CHECKING:
    from torch import Tensor

    from arrow_quant_v2.quantizers.gptq_core import Ask
    from arrow_quant_v2.quantizers.whitened import Whitened

MARGIN = 1.25  # updated weights may want larger steps than the weights that a row's scale is chosen by


@dataclass(frozen=True, kw_only=True, eq=False)
class AffineGrid:
    """The stored parameters of one group, (rows, 1) each, and what they mean; no zero points when symmetric."""

    scales: Tensor
    zero_points: Tensor
    scale: Tensor
    inverse: Tensor
    zero: Tensor

    @staticmethod
    def largest(weight: Tensor, group_size: int, importance: Tensor, ask: Ask) -> Tensor:
        """(rows,): the largest scale that a row's groups want before any update, and a margin."""
        return _fitted(weight, group_size, importance, ask).step.amax(dim=1) * MARGIN

    @classmethod
    def fitted(cls, block: Tensor, importance: Tensor, row_scales: Tensor, ask: Ask) -> AffineGrid:
        """The grid by clip search of one group, its squares weighted by importance (columns,)."""
        return cls._stored(_fitted(block, block.shape[1], importance, ask), row_scales, ask)

    def refitted(self, codes: Tensor, seen: Whitened, row_scales: Tensor, ask: Ask) -> AffineGrid:
        """Scale s and zero point z with the least ||y - s (c - z 1) R||^2 for codes c that stay.

        With <a, b> of what is seen, the free z is <c, 1>/<1, 1> - <y, 1>/(<1, 1> s'), s' the slope of y on c after both
        lost their share of 1. z is rounded as it is stored; s = <c - z 1, y> / <c - z 1, c - z 1> is best for it.
        """
        c = codes.to(torch.float32) @ seen.root
        cc, cy, c1 = seen.inner(c, c), seen.inner(c, seen.y), seen.inner(c, seen.one)
        y1, one = seen.one_y, seen.one_one
        if ask.symmetric:
            zero = torch.full_like(cc, float(2 ** (ask.bits - 1)))
        else:
            unit, most = 255 // (2**ask.bits - 1), float(2**ask.bits - 1)
            slope = (cy - c1 * y1 / one) / (cc - c1 * c1 / one)
            free = (c1 - y1 / slope) / one
            zero = (free.nan_to_num(nan=0.0).clamp(0.0, most) * unit).round() / unit
        step = ((cy - zero * y1) / (cc - 2.0 * zero * c1 + zero * zero * one)).to(torch.float32)
        fit = Fit(step=step, full=step, mean_q=zero.to(torch.float32), mean_w=torch.zeros_like(step))
        return self._stored(fit, row_scales, ask)

    def values(self, codes: Tensor, bits: int) -> Tensor:  # noqa: ARG002 - the other grid asks for the width
        """(rows, n) codes -> (code - zero) * scale, as dequantize has it."""
        return (codes.to(torch.float32) - self.zero) * self.scale

    def columns(self, block: Tensor, upper: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        """The column loop: codes (rows, n) uint8 and errors e (rows, n)."""
        scale, inverse, zero = (part[:, 0] for part in (self.scale, self.inverse, self.zero))
        codes, errors = ops.quantize_columns(block, upper, scale, inverse, zero, bits)
        return codes, errors

    def residual(self, bits: int) -> Residual:
        """The residual grid (rows, 1) with the same levels, but for rounding."""
        mu = self.scale * (0.5 * (2**bits - 1) - self.zero)
        return Residual(mu=mu, a1=self.scale * 2.0 ** (bits - 2), a2=0.5 * self.scale)

    def where(self, wins: Tensor, other: AffineGrid) -> AffineGrid:
        """For each row the other grid where that wins (rows, 1)."""
        names = ("scales", "zero_points", "scale", "inverse", "zero")
        return type(self)(**{name: chosen(wins, getattr(self, name), getattr(other, name)) for name in names})

    @classmethod
    def _stored(cls, fit: Fit, row_scales: Tensor, ask: Ask) -> AffineGrid:
        """What the format makes of a fit of one group: 8 bits each, under the row's scale."""
        scales, row_scales = cls._scales(fit.step, row_scales)
        scale = reference.scale_of(scales, row_scales)
        inverse = torch.where(scales > 0, 1.0 / torch.where(scales > 0, scale, 1.0), 0.0)
        zeros = scales[:, :0] if ask.symmetric else reference.zero_codes(fit, inverse, ask.bits, whole=False)
        zero = reference.zero_of(zeros, scales, ask.bits)
        return cls(scales=scales, zero_points=zeros, scale=scale, inverse=inverse, zero=zero)

    @classmethod
    def _scales(cls, step: Tensor, row_scales: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (rows, 1) of the scales of one group, and the scales (rows,) of the rows that they stand under."""
        return reference.scale_codes(step, row_scales, cover_all=False), row_scales


class RowGrid(AffineGrid):
    """The same where a row is one group: its scale is that of the row, a bfloat16 with nothing above it."""

    def refitted(self, codes: Tensor, seen: Whitened, row_scales: Tensor, ask: Ask) -> AffineGrid:  # noqa: ARG002
        """The same; where the nearest scale is the one that is there, the next one on the other side of the best."""
        return super().refitted(codes, seen, self.scale[:, 0].to(torch.bfloat16), ask)

    @classmethod
    def _scales(cls, step: Tensor, row_scales: Tensor) -> tuple[Tensor, Tensor]:
        """The scales (rows,) and their codes of 255; `row_scales` are those that were tried already, or none."""
        scales, nearest = reference.stored_scales(step, cover_all=False)
        if not len(row_scales):
            return scales, nearest
        return scales, torch.where(nearest == row_scales, _beside(nearest, step[:, 0]), nearest)


def _beside(scales: Tensor, step: Tensor) -> Tensor:
    """(rows,) bfloat16 above 0: the next one in the direction of the step, within what a row's scale may be."""
    bits = scales.view(torch.int16) + torch.where(step > scales.to(torch.float32), 1, -1).to(torch.int16)
    return bits.view(torch.bfloat16).clamp(reference.SMALLEST_STEP, reference.LARGEST_ROW_SCALE)


def chosen(wins: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """For each row the other one where that wins; nothing where there is nothing."""
    return torch.where(wins, other, one) if one.numel() else one


def _fitted(weight: Tensor, group_size: int, importance: Tensor, ask: Ask) -> Fit:
    """The grid of every group by clip search, its squares weighted by importance (columns,)."""
    step, full, mean_q, mean_w = ops.fit_grid(weight, ask.bits, group_size, ask.symmetric, ask.stretches, importance)
    return Fit(step=step, full=full, mean_q=mean_q, mean_w=mean_w)

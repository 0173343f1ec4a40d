"""The residual grid as the column loop of GPTQ uses it, one group of some rows at a time; knows no H."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from arrow_quant_v2.kernels import ops
from arrow_quant_v2.kernels.reference import Residual, inverse_of, largest_low, residual_level
from arrow_quant_v2.quantizers.gptq_affine import chosen
from arrow_quant_v2.quantizers.r2q_core import fit_r2q, stored_r2q

if TYPE_CHECKING:
    from torch import Tensor

    from arrow_quant_v2.quantizers.gptq_core import Ask
    from arrow_quant_v2.quantizers.whitened import Whitened

MARGIN = 1.5  # updated weights may want a larger a1 than half the weights' own affine range
SINGULAR = 1e-6  # of the product of two variances: the two stages say the same, or one says nothing
TINY = 1e-300


@dataclass(frozen=True, kw_only=True, eq=False)
class ResidualGrid:
    """The stored parameters of one group, scales (rows, 2) and zero_points (rows, 1), and what they mean, (rows, 1)."""

    scales: Tensor
    zero_points: Tensor
    grid: Residual

    @staticmethod
    def largest(weight: Tensor, group_size: int, importance: Tensor, ask: Ask) -> Tensor:
        """(rows,): the largest a1 that a row's groups want before any update, and a margin."""
        step = ops.fit_grid(weight, ask.bits, group_size, ask.symmetric, ask.stretches, importance)[0]
        return step.amax(dim=1) * (MARGIN * 2.0 ** (ask.bits - 2))

    @classmethod
    def fitted(cls, block: Tensor, importance: Tensor, row_scales: Tensor, ask: Ask) -> ResidualGrid:
        """The grid by alternation, its squares weighted by importance (columns,)."""
        return cls._stored(fit_r2q(block, importance, ask.bits, ask.symmetric), row_scales, ask)

    @classmethod
    def refitted(cls, codes: Tensor, seen: Whitened, row_scales: Tensor, ask: Ask) -> ResidualGrid:
        """Mu, a1, a2 with the least ||y - (mu 1 + a1 t + a2 k) R||^2 for codes that stay (BPDQ's whitened refit)."""
        m = largest_low(ask.bits)
        t = torch.where(codes > m, 1.0, -1.0) @ seen.root
        k = (2.0 * (codes & m).to(torch.float32) - float(m)) @ seen.root
        free = torch.zeros_like(seen.one_y) if ask.symmetric else 1.0 / seen.one_one.clamp(min=TINY)
        t1, k1 = seen.inner(t, seen.one), seen.inner(k, seen.one)
        tt, kk = seen.inner(t, t) - t1 * t1 * free, seen.inner(k, k) - k1 * k1 * free
        tk = seen.inner(t, k) - t1 * k1 * free
        ty, ky = seen.inner(t, seen.y) - t1 * seen.one_y * free, seen.inner(k, seen.y) - k1 * seen.one_y * free
        a1, a2 = _solved(tt, tk, kk, ty, ky)
        a2 = a2.clamp(min=0.0)
        a1 = torch.maximum(a1, float(m) * a2)
        mu = (seen.one_y - a1 * t1 - a2 * k1) * free
        return cls._stored(Residual(*(_finite(part) for part in (mu, a1, a2))), row_scales, ask)

    def values(self, codes: Tensor, bits: int) -> Tensor:
        """(rows, n) codes -> the levels that they stand for, as dequantize_r2q has them."""
        return residual_level(codes, self.grid, bits)

    def columns(self, block: Tensor, upper: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        """The column loop: codes (rows, n) uint8 and errors e (rows, n)."""
        mu, a1, a2, inverse = (part[:, 0].contiguous() for part in (*self.grid, inverse_of(self.grid.a2)))
        codes, errors = ops.quantize_columns_r2q(block, upper, mu, a1, a2, inverse, bits)
        return codes, errors

    def residual(self, bits: int) -> Residual:  # noqa: ARG002 - the other grid asks for the width
        """The grid itself, (rows, 1)."""
        return self.grid

    def where(self, wins: Tensor, other: ResidualGrid) -> ResidualGrid:
        """For each row the other grid where that wins (rows, 1)."""
        return ResidualGrid(
            scales=chosen(wins, self.scales, other.scales),
            zero_points=chosen(wins, self.zero_points, other.zero_points),
            grid=Residual(*(torch.where(wins, b, a) for a, b in zip(self.grid, other.grid, strict=True))),
        )

    @classmethod
    def _stored(cls, grid: Residual, row_scales: Tensor, ask: Ask) -> ResidualGrid:
        mu, a1, a2 = (part.reshape(-1, 1) for part in grid)
        stored = stored_r2q(mu, a1, a2, row_scales, ask.bits, ask.symmetric)
        return cls(scales=stored.scales, zero_points=stored.zero_points, grid=stored.grid)


def _solved(tt: Tensor, tk: Tensor, kk: Tensor, ty: Tensor, ky: Tensor) -> tuple[Tensor, Tensor]:
    """The two coefficients of least squares; the second is 0 where it cannot be told from the first."""
    determinant = tt * kk - tk * tk
    regular = determinant > SINGULAR * tt * kk
    divisor = torch.where(regular, determinant, 1.0)
    first = torch.where(regular, (kk * ty - tk * ky) / divisor, ty / tt.clamp(min=TINY))
    return first, torch.where(regular, (tt * ky - tk * ty) / divisor, 0.0)


def _finite(part: Tensor) -> Tensor:
    return part.to(torch.float32).nan_to_num(0.0, 0.0, 0.0)

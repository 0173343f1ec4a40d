"""The residual grid as the column loop of GPTQ uses it, one group of some rows at a time; knows no H."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from arrow_quant_v2.kernels import ops
from arrow_quant_v2.kernels.reference import Residual, largest_low, residual_level
from arrow_quant_v2.quantizers.gptq_affine import chosen
from arrow_quant_v2.quantizers.r2q_core import Sums, fit_r2q, inverse_of, pick, solved, stored_r2q

if TYPE_CHECKING:
    from torch import Tensor

    from arrow_quant_v2.quantizers.gptq_core import Ask, Whitened

MARGIN = 1.5  # updated weights may want a larger a1 than half the weights' own affine range


@dataclass(frozen=True, kw_only=True, eq=False)
class ResidualGrid:
    """The stored parameters of one group, scales (rows, 2) and zero_points (rows, 1), and what they mean."""

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
        return cls._stored(fit_r2q(block, importance, ask.bits, symmetric=ask.symmetric), row_scales, ask)

    @classmethod
    def refitted(cls, codes: Tensor, seen: Whitened, row_scales: Tensor, ask: Ask) -> ResidualGrid:
        """Mu, a1, a2 with the least ||y - (mu 1 + a1 b1 + a2 b2) R||^2 for codes that stay (BPDQ's whitened refit)."""
        m = largest_low(ask.bits)
        b1 = torch.where(codes > m, 1.0, -1.0) @ seen.root
        b2 = (2.0 * (codes & m).to(torch.float32) - float(m)) @ seen.root
        sums = Sums(
            one_one=seen.one_one.expand(len(codes), 1),
            one_b1=seen.inner(b1, seen.one),
            one_b2=seen.inner(b2, seen.one),
            b1_b1=seen.inner(b1, b1),
            b1_b2=seen.inner(b1, b2),
            b2_b2=seen.inner(b2, b2),
            one_w=seen.one_y,
            b1_w=seen.inner(b1, seen.y),
            b2_w=seen.inner(b2, seen.y),
        )
        return cls._stored(solved(sums, ask.bits, symmetric=ask.symmetric), row_scales, ask)

    def values(self, codes: Tensor, bits: int) -> Tensor:
        """(rows, n) codes -> the levels that they stand for, as dequantize_r2q has them."""
        return residual_level(codes, self.grid, bits)

    def columns(self, block: Tensor, upper: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        """The column loop: codes (rows, n) uint8 and errors e (rows, n)."""
        mu, a1, a2, inverse = (part[:, 0].contiguous() for part in (*self.grid, inverse_of(self.grid)))
        codes, errors = ops.quantize_columns_r2q(block, upper, mu, a1, a2, inverse, bits)
        return codes, errors

    def where(self, wins: Tensor, other: ResidualGrid) -> ResidualGrid:
        """For each row the other grid where that wins (rows, 1)."""
        return ResidualGrid(
            scales=chosen(wins, self.scales, other.scales),
            zero_points=chosen(wins, self.zero_points, other.zero_points),
            grid=pick(wins, other.grid, self.grid),
        )

    @classmethod
    def _stored(cls, grid: Residual, row_scales: Tensor, ask: Ask) -> ResidualGrid:
        scales, zero_points, meant = stored_r2q(grid, row_scales, ask.bits, symmetric=ask.symmetric)
        return cls(scales=scales, zero_points=zero_points, grid=meant)

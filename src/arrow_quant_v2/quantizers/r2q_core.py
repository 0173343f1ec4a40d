"""The residual grid of a group: its least-squares fit, and how it is stored; pure mathematics on tensors.

R2Q (Chen et al., 2025, arXiv 2511.21736) writes a weight as mu + a1 b1 + a2 b2 with b = +-1: each stage is the sign of
what the one before left. Here b1 is one binary stage and b2 an affine residual, b2 = -m, 2 - m, ..., m with
m = 2^(bits-1) - 1, which at 2 bits is the second binary stage. The affine grid is a1 = (m + 1) a2. With the codes
fixed, mu, a1, a2 of the least squares follow in closed form; with those fixed, the nearest codes do; the two alternate
(Xu et al., 2018, arXiv 1802.00150).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from arrow_quant_v2.kernels import ops, reference
from arrow_quant_v2.kernels.reference import Residual, largest_low
from arrow_quant_v2.quantizers.affine import STRETCHES

if TYPE_CHECKING:
    from torch import Tensor

ROUNDS = 6
SINGULAR = 1e-6  # of the product of two variances: the two stages say the same, or a stage says nothing


@dataclass(frozen=True, kw_only=True, eq=False)
class Sums:
    """Weighted inner products of 1, b1, b2 and the weights w with each other; each (rows, 1) float64."""

    one_one: Tensor
    one_b1: Tensor
    one_b2: Tensor
    b1_b1: Tensor
    b1_b2: Tensor
    b2_b2: Tensor
    one_w: Tensor
    b1_w: Tensor
    b2_w: Tensor

    def cost(self, grid: Residual) -> Tensor:
        """The squares that a grid leaves, less those of the weights themselves."""
        mu, a1, a2 = (part.to(torch.float64) for part in grid)
        squares = mu * mu * self.one_one + a1 * a1 * self.b1_b1 + a2 * a2 * self.b2_b2
        mixed = mu * a1 * self.one_b1 + mu * a2 * self.one_b2 + a1 * a2 * self.b1_b2
        return squares + 2.0 * (mixed - mu * self.one_w - a1 * self.b1_w - a2 * self.b2_w)


def fit_r2q(groups: Tensor, importance: Tensor, bits: int, *, symmetric: bool, rounds: int = ROUNDS) -> Residual:
    """The grid of each group, (rows, 1) float32 each, that leaves the least squares weighted with importance.

    groups (rows, n) float32, importance (n,) at least 0. It starts from the affine grid of the clip search, and keeps
    for each row the best that the alternation met, so it is never worse than that.
    """
    grid = affine_start(groups, importance, bits, symmetric=symmetric)
    best, least = grid, torch.full_like(grid.a1, torch.inf, dtype=torch.float64)
    for _ in range(rounds):
        sums = _sums(groups, importance, *stages(groups, grid, bits))
        best, least = _better(best, least, grid, sums.cost(grid))
        refitted = solved(sums, bits, symmetric=symmetric)
        best, least = _better(best, least, refitted, sums.cost(refitted))
        grid = refitted
    return best


def affine_start(groups: Tensor, importance: Tensor, bits: int, *, symmetric: bool) -> Residual:
    """The affine grid of the clip search, as a residual grid."""
    step, full, mean_q, mean_w = ops.fit_grid(
        groups, bits, groups.shape[1], symmetric, STRETCHES[bits], importance / importance.amax().clamp(min=1e-30)
    )
    middle = 0.5 * (2**bits - 1)
    zero = mean_q - mean_w * torch.where(step > 0.0, full / step, 0.0)
    mu = torch.zeros_like(step) if symmetric else step * (middle - zero)
    return Residual(mu=mu, a1=step * (2.0 ** (bits - 2)), a2=0.5 * step)


def stages(weight: Tensor, grid: Residual, bits: int) -> tuple[Tensor, Tensor]:
    """(rows, n) float32 each: b1 and b2 of the levels nearest to the weights."""
    m = float(largest_low(bits))
    away = weight - grid.mu
    b1 = torch.where(away >= 0.0, 1.0, -1.0)
    low = ((away - b1 * grid.a1) * inverse_of(grid) + 0.5 * m).clamp(0.0, m).round()
    return b1, 2.0 * low - m


def _sums(weight: Tensor, importance: Tensor, b1: Tensor, b2: Tensor) -> Sums:
    def inner(a: Tensor) -> Tensor:
        return (a @ importance)[:, None].to(torch.float64)

    mass = importance.sum(dtype=torch.float64).expand(len(weight), 1)
    return Sums(
        one_one=mass,
        one_b1=inner(b1),
        one_b2=inner(b2),
        b1_b1=mass,
        b1_b2=inner(b1 * b2),
        b2_b2=inner(b2 * b2),
        one_w=inner(weight),
        b1_w=inner(b1 * weight),
        b2_w=inner(b2 * weight),
    )


def solved(sums: Sums, bits: int, *, symmetric: bool) -> Residual:
    """Mu, a1, a2 of the least squares, put back where levels would change their order; NaN-free."""
    free = torch.zeros_like(sums.one_one) if symmetric else 1.0 / sums.one_one.clamp(min=1e-300)

    def apart(ab: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return ab - a * b * free  # what is left when both lost their share of 1

    v11, v22 = apart(sums.b1_b1, sums.one_b1, sums.one_b1), apart(sums.b2_b2, sums.one_b2, sums.one_b2)
    v12 = apart(sums.b1_b2, sums.one_b1, sums.one_b2)
    c1, c2 = apart(sums.b1_w, sums.one_b1, sums.one_w), apart(sums.b2_w, sums.one_b2, sums.one_w)
    determinant = v11 * v22 - v12 * v12
    regular = determinant > SINGULAR * v11 * v22
    divisor = torch.where(regular, determinant, 1.0)
    a1 = torch.where(regular, (v22 * c1 - v12 * c2) / divisor, c1 / v11.clamp(min=1e-300))
    a2 = torch.where(regular, (v11 * c2 - v12 * c1) / divisor, 0.0)
    a2 = a2.clamp(min=0.0)
    a1 = torch.maximum(a1, a2 * largest_low(bits)).clamp(min=0.0)
    mu = (sums.one_w - a1 * sums.one_b1 - a2 * sums.one_b2) * free
    return Residual(*(part.nan_to_num(0.0, 0.0, 0.0).to(torch.float32) for part in (mu, a1, a2)))


def _better(best: Residual, least: Tensor, other: Residual, cost: Tensor) -> tuple[Residual, Tensor]:
    wins = cost < least
    return pick(wins, other, best), torch.where(wins, cost, least)


def pick(wins: Tensor, one: Residual, other: Residual) -> Residual:
    """For each row the one grid where it wins, otherwise the other."""
    return Residual(*(torch.where(wins, a, b) for a, b in zip(one, other, strict=True)))


def stored_r2q(grid: Residual, row_scales: Tensor, bits: int, *, symmetric: bool) -> tuple[Tensor, Tensor, Residual]:
    """Codes of the scales (rows, 2 groups) and of the zero points (rows, groups), uint8, and the grid that they mean.

    The grid comes as (rows, groups) each, row_scales as (rows,) bfloat16.
    """
    m = largest_low(bits)
    first = _scale_codes(grid.a1, row_scales)
    second = torch.minimum(_scale_codes(grid.a2, row_scales), torch.floor(first * (max(m, 1) ** -0.5)))
    scales = torch.stack([first, second], dim=-1).flatten(1).to(torch.uint8)
    if symmetric:
        zeros = scales[:, :0]
        return scales, zeros, reference.residual_of(scales, zeros, row_scales, bits)
    level = reference.residual_of(scales, scales[:, :0], row_scales, bits)
    reach = level.a1 + float(m) * level.a2
    share = torch.where(reach > 0.0, grid.mu / torch.where(reach > 0.0, reach, 1.0), 0.0)
    zeros = (127.5 - 127.5 * share).nan_to_num(127.5).clamp(0.0, 255.0).round().to(torch.uint8)
    return scales, zeros, reference.residual_of(scales, zeros, row_scales, bits)


def _scale_codes(scale: Tensor, row_scales: Tensor) -> Tensor:
    squares = (scale / row_scales.to(torch.float32)[:, None]).clamp(0.0, 1.0)
    return (squares.to(torch.float64).sqrt().to(torch.float32) * 255.0).round()


def inverse_of(grid: Residual) -> Tensor:
    """1 / (2 a2), or 0 where a2 is."""
    return torch.where(grid.a2 > 0.0, 0.5 / torch.where(grid.a2 > 0.0, grid.a2, 1.0), 0.0)

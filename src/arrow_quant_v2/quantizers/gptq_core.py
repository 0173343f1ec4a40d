"""GPTQ for some rows of one weight, given the factor of H: pure mathematics; knows nothing of files or models.

Letters. W (rows, n) weights and Q their quantized values, columns in the factor's order; H = R R^T the damped second
moment of the inputs, R upper triangular; U = R^-1, so that H^-1 = U^T U as in the paper (Frantar et al., 2022, arXiv
2210.17323). What is made small is the output error

    tr((W - Q) H (W - Q)^T) = ||E||^2,   E = (W - Q) R.

Column by column it is made small by rounding w_t + (sum over s < t of (w_s - q_s) R_st) / R_tt, which is the paper's
update written with R instead of U. For a group g of columns and the columns p before it:

    Z = (W_p - Q_p) R_pg             what the errors so far cost here, (rows, n)
    B = W_g + Z U_gg                 the updated weights: E_g = (B - Q_g) R_gg
    the grid is fitted to B with the weights 1 / U_tt^2 = R_tt^2, stored in 8 bits, and the paper's loop over the
    columns of B with U_gg gives Q_g.

A refit keeps the codes c and moves scale s and zero point z to the minimum of ||(B - s (c - z)) R_gg||^2 (BPDQ's
whitened least squares), runs the loop again, and keeps for each row whichever has the smaller ||E_g||^2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from arrow_quant_v2.kernels import ops, reference
from arrow_quant_v2.kernels.reference import Fit
from arrow_quant_v2.quantizers.gptq_factor import blocks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from arrow_quant_v2.quantizers.gptq_factor import Factor, Group

SPAN = 1024  # columns whose errors are kept back and fed into all later columns at once
MARGIN = 1.25  # updated weights may want larger steps than the weights that a row's scale is chosen by


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What the grid may be, and how many refits each group gets. A stretch is 1 / clipping ratio."""

    bits: int
    symmetric: bool
    stretches: Sequence[float]
    refits: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Calibrated:
    """Codes (rows, columns) uint8 in the original order of the columns, and parameters as PackedTensor has them.

    values (rows, columns) float32 is Q in the order of work, and sums (rows, 3) float64 are w^2, q^2 and (w - q)^2.
    """

    codes: Tensor
    values: Tensor
    sums: Tensor
    scales: Tensor
    zero_points: Tensor
    row_scales: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Grid:
    """The stored parameters of one group, (rows, 1) each, and what they mean; no zero points when symmetric."""

    scales: Tensor
    zero_points: Tensor
    scale: Tensor
    inverse: Tensor
    zero: Tensor

    def values(self, codes: Tensor) -> Tensor:
        """(rows, n) codes -> (code - zero) * scale, as dequantize has it."""
        return (codes.to(torch.float32) - self.zero) * self.scale


@dataclass(frozen=True, kw_only=True, eq=False)
class Choice:
    """A grid, the codes on it, and what they cost: ||E||^2 of each row, (rows, 1)."""

    grid: Grid
    codes: Tensor
    cost: Tensor


def calibrated_rows(weight: Tensor, factor: Factor, ask: Ask) -> Calibrated:
    """Quantize rows (rows, columns) float32; each row by itself but for the rounding of matrix products."""
    alive = weight.masked_fill(factor.dead, 0.0) if factor.dead.any() else weight
    row_scales = row_scales_for(alive, factor, ask)
    work = Work(alive.index_select(1, factor.order), factor)
    for span in spans(factor.groups):
        for group in span:
            work.settle(group, _best(work.updated(group, span[0].start), group, factor, row_scales, ask))
        work.feed(span[0].start, span[-1].stop)
    return work.result(weight, row_scales, symmetric=ask.symmetric)


def row_scales_for(weight: Tensor, factor: Factor, ask: Ask) -> Tensor:
    """(rows,) bfloat16: the largest step that a row's groups want before any update, and a margin."""
    importance = torch.empty_like(factor.importance)
    importance[factor.order] = _relative(factor.importance)
    step = _fitted(weight, factor.group_size, importance, ask).step
    return reference.up_to_bfloat16((step.amax(dim=1) * MARGIN).clamp(min=reference.SMALLEST_ROW_SCALE))


def _fitted(weight: Tensor, group_size: int, importance: Tensor, ask: Ask) -> Fit:
    """The grid of every group by clip search, its squares weighted by importance (columns,)."""
    step, full, mean_q, mean_w = ops.fit_grid(weight, ask.bits, group_size, ask.symmetric, ask.stretches, importance)
    return Fit(step=step, full=full, mean_q=mean_q, mean_w=mean_w)


def spans(groups: Sequence[Group]) -> list[list[Group]]:
    """Groups that follow each other, together of at least SPAN columns (the last ones may have fewer)."""
    result: list[list[Group]] = []
    for group in groups:
        if not result or result[-1][-1].stop - result[-1][0].start >= SPAN:
            result.append([])
        result[-1].append(group)
    return result


class Work:
    """The rows on their way, columns in the order of work.

    left  (rows, columns)  W where a column is still to be settled, W - Q where it is
    cost  (rows, columns)  Z of all spans that are done
    """

    def __init__(self, weight: Tensor, factor: Factor) -> None:
        self.factor, self.left = factor, weight
        self.values, self.codes = torch.empty_like(weight), torch.empty_like(weight, dtype=torch.uint8)
        self.cost = torch.zeros_like(weight)
        shape = weight.shape[0], len(factor.groups)
        self.scales = torch.empty(shape, dtype=torch.uint8)
        self.zero_points = torch.empty(shape, dtype=torch.uint8)

    def updated(self, group: Group, since: int) -> Tensor:
        """B = W_g + Z U_gg; the span began at column `since`."""
        here, done = slice(group.start, group.stop), slice(since, group.start)
        cost = torch.addmm(self.cost[:, here], self.left[:, done], self.factor.root[done, here])
        return self.left[:, here] + self._divided(cost, here)

    def settle(self, group: Group, choice: Choice) -> None:
        """Keep what was chosen for a group."""
        here = slice(group.start, group.stop)
        values = choice.grid.values(choice.codes)
        self.codes[:, here], self.values[:, here] = choice.codes, values
        self.left[:, here] -= values
        self.scales[:, group.index] = choice.grid.scales[:, 0]
        if choice.grid.zero_points.numel():
            self.zero_points[:, group.index] = choice.grid.zero_points[:, 0]

    def feed(self, start: int, stop: int) -> None:
        """Z of all later columns += (W - Q) R of the columns [start, stop)."""
        self.cost[:, stop:].addmm_(self.left[:, start:stop], self.factor.root[start:stop, stop:])

    def result(self, weight: Tensor, row_scales: Tensor, *, symmetric: bool) -> Calibrated:
        """What became of the weight, whose dead columns were 0 so far."""
        positions = self.factor.dead[self.factor.order].nonzero()[:, 0]
        self.left[:, positions] += weight[:, self.factor.order[positions]]
        unit = row_scales.to(torch.float32)[:, None]  # in which float32 holds the squares
        norms = [torch.linalg.vector_norm(part / unit, dim=1) for part in (weight, self.values, self.left)]
        return Calibrated(
            codes=self.codes.index_select(1, self.factor.order.argsort()),
            values=self.values,
            sums=(torch.stack(norms, dim=1).to(torch.float64) * unit).square(),
            scales=self.scales,
            zero_points=self.zero_points[:, :0] if symmetric else self.zero_points,
            row_scales=row_scales,
        )

    def _divided(self, cost: Tensor, here: slice) -> Tensor:
        """Z U_gg; a group that is one block has its U."""
        upper = self.factor.upper[here.start]
        if len(upper) == cost.shape[1]:
            return cost @ upper
        result: Tensor = torch.linalg.solve_triangular(self.factor.root[here, here], cost, upper=True, left=False)
        return result


def _relative(importance: Tensor) -> Tensor:
    """A grid depends on the ratios alone: at most 1, so that sums of it stay finite."""
    return importance / importance.amax().clamp(min=torch.finfo(torch.float32).tiny)


def _best(block: Tensor, group: Group, factor: Factor, row_scales: Tensor, ask: Ask) -> Choice:
    """The codes of B, and the grid that they lie on."""
    here = slice(group.start, group.stop)
    fit = _fitted(block, block.shape[1], _relative(factor.importance[here]), ask)
    best = _chosen(block, group, factor, stored_grid(fit, row_scales, ask), ask.bits)
    if not ask.refits:
        return best
    seen = Seen(block, factor.root[here, here].triu())
    for _ in range(ask.refits):
        fit = refit(best.codes, seen, ask)
        best = _better(best, _chosen(block, group, factor, stored_grid(fit, row_scales, ask), ask.bits))
    return best


def stored_grid(fit: Fit, row_scales: Tensor, ask: Ask) -> Grid:
    """What the format makes of a fit of one group: 8 bits each, under the row's scale."""
    scales = reference.scale_codes(fit.step, row_scales, cover_all=False)
    scale = reference.scale_of(scales, row_scales)
    inverse = torch.where(scales > 0, 1.0 / torch.where(scales > 0, scale, 1.0), 0.0)
    zeros = scales[:, :0] if ask.symmetric else reference.zero_codes(fit, inverse, ask.bits, whole=False)
    zero = reference.zero_of(zeros, scales, ask.bits)
    return Grid(scales=scales, zero_points=zeros, scale=scale, inverse=inverse, zero=zero)


def _chosen(block: Tensor, group: Group, factor: Factor, grid: Grid, bits: int) -> Choice:
    """The column loop, in blocks: B of a later block takes the errors of the earlier ones as a group does."""
    codes, cost = torch.empty_like(block, dtype=torch.uint8), torch.zeros_like(grid.scale)
    scale, inverse, zero = (part[:, 0] for part in (grid.scale, grid.inverse, grid.zero))
    for b in blocks(group.start, group.stop):
        done, here = slice(0, b.start - group.start), slice(b.start - group.start, b.stop - group.start)
        updated = block[:, here]
        if done.stop:
            errors = block[:, done] - grid.values(codes[:, done])
            updated = updated + errors @ factor.root[group.start : b.start, b] @ factor.upper[b.start]
        upper = factor.upper[b.start]
        codes[:, here], e = ops.quantize_columns(updated, upper, scale, inverse, zero, bits)
        cost += e.square().sum(dim=1, keepdim=True)
    return Choice(grid=grid, codes=codes, cost=cost)


class Seen:
    """What a refit fits: y = B R, seen through R, where the codes are c R and a zero point is 1 R; sums are float64."""

    def __init__(self, block: Tensor, root: Tensor) -> None:
        self.root, self.y = root, block @ root
        self.one = root.sum(dim=0)
        self.one_one = self.one.to(torch.float64).square().sum()
        self.one_y = _inner(self.y, self.one)


def refit(codes: Tensor, seen: Seen, ask: Ask) -> Fit:
    """Scale s and zero point z with the least ||y - s (c - z 1) R||^2 for codes c that stay.

    With <a, b> of what is seen, the free z is <c, 1>/<1, 1> - <y, 1>/(<1, 1> s'), s' the slope of y on c after both
    lost their share of 1. z is rounded as it is stored, and s = <c - z 1, y> / <c - z 1, c - z 1> is the best for it.
    """
    c = codes.to(torch.float32) @ seen.root
    cc, cy, c1 = _inner(c, c), _inner(c, seen.y), _inner(c, seen.one)
    y1, one = seen.one_y, seen.one_one
    if ask.symmetric:
        zero = torch.full_like(cc, float(2 ** (ask.bits - 1)))
    else:
        unit, most = 255 // (2**ask.bits - 1), float(2**ask.bits - 1)
        slope = (cy - c1 * y1 / one) / (cc - c1 * c1 / one)
        free = (c1 - y1 / slope) / one
        zero = (free.nan_to_num(nan=0.0).clamp(0.0, most) * unit).round() / unit
    step = ((cy - zero * y1) / (cc - 2.0 * zero * c1 + zero * zero * one)).to(torch.float32)
    return Fit(step=step, full=step, mean_q=zero.to(torch.float32), mean_w=torch.zeros_like(step))


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """(rows, 1) float64: <a, b> of each row."""
    return (a * b).sum(dim=1, keepdim=True).to(torch.float64)


def _better(one: Choice, other: Choice) -> Choice:
    """For each row the choice that costs less."""
    wins = other.cost < one.cost

    def pick(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(wins, b, a) if a.numel() else a

    names = ("scales", "zero_points", "scale", "inverse", "zero")
    grid = Grid(**{name: pick(getattr(one.grid, name), getattr(other.grid, name)) for name in names})
    return Choice(grid=grid, codes=pick(one.codes, other.codes), cost=pick(one.cost, other.cost))

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

A refit keeps the codes and moves the grid's parameters to the minimum of ||(B - Q_g) R_gg||^2 (BPDQ's whitened least
squares), runs the loop again, and keeps for each row whichever has the smaller ||E_g||^2. When all groups are settled,
sweeps (gptq_descent) visit them again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from arrow_quant_v2.kernels import reference
from arrow_quant_v2.quantizers.gptq_affine import AffineGrid, RowGrid
from arrow_quant_v2.quantizers.gptq_descent import sweep
from arrow_quant_v2.quantizers.gptq_factor import blocks, spans
from arrow_quant_v2.quantizers.gptq_r2q import ResidualGrid
from arrow_quant_v2.quantizers.whitened import Whitened

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from arrow_quant_v2.packed import Grid
    from arrow_quant_v2.quantizers.gptq_factor import Factor, Group

SPAN = 1024  # columns whose errors are kept back and fed into all later columns at once
GRIDS: dict[Grid, Any] = {"affine": AffineGrid, "r2q": ResidualGrid, "row": RowGrid}


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What the grid may be, how many refits each group gets, and sweeps after all. A stretch is 1 / clipping ratio."""

    grid: Grid
    bits: int
    symmetric: bool
    stretches: Sequence[float]
    refits: int
    sweeps: int


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
class Choice:
    """A grid, the codes on it, E of the group's columns, and what they cost: ||E||^2 of each row, (rows, 1)."""

    grid: Any
    codes: Tensor
    errors: Tensor
    cost: Tensor


def calibrated_rows(weight: Tensor, factor: Factor, ask: Ask) -> Calibrated:
    """Quantize rows (rows, columns) float32; each row by itself but for the rounding of matrix products."""
    alive = weight.masked_fill(factor.dead, 0.0) if factor.dead.any() else weight
    work = Work(alive.index_select(1, factor.order), factor, ask, row_scales_for(alive, factor, ask))
    for span in spans(factor.groups, SPAN):
        for group in span:
            work.settle(group, _best(work.updated(group, span[0].start), group, factor, work.row_scales, ask))
        work.feed(span[0].start, span[-1].stop)
    for _ in range(ask.sweeps):
        sweep(work)
    return work.result(weight)


def row_scales_for(weight: Tensor, factor: Factor, ask: Ask) -> Tensor:
    """(rows,) bfloat16: the largest scale that a row's groups want before any update, and a margin.

    Nothing on the row grid, where it comes with the fit of the row's only group.
    """
    if ask.grid == "row":
        return weight.new_empty(0, dtype=torch.bfloat16)
    importance = torch.empty_like(factor.importance)
    importance[factor.order] = _relative(factor.importance)
    largest: Tensor = GRIDS[ask.grid].largest(weight, factor.group_size, importance, ask)
    return reference.up_to_bfloat16(largest.clamp(min=reference.SMALLEST_ROW_SCALE))


class Work:
    """The rows on their way, columns in the order of work.

    left    (rows, columns)  W where a column is still to be settled, W - Q where it is
    cost    (rows, columns)  Z of all spans that are done
    errors  (rows, columns)  E of what is settled; once all is, it is (W - Q) R
    grids   of each group, by its index
    """

    def __init__(self, weight: Tensor, factor: Factor, ask: Ask, row_scales: Tensor) -> None:
        self.factor, self.left, self.ask, self.row_scales = factor, weight, ask, row_scales
        self.values, self.codes = torch.zeros_like(weight), torch.empty_like(weight, dtype=torch.uint8)
        self.cost, self.errors = torch.zeros_like(weight), torch.empty_like(weight)
        self.grids: list[Any] = [None] * len(factor.groups)
        shape = weight.shape[0], len(factor.groups)
        per_group = 2 if ask.grid == "r2q" else 1
        self.scales = weight.new_empty((*shape, per_group), dtype=torch.uint8)
        self.zero_points = weight.new_empty(shape, dtype=torch.uint8)

    def updated(self, group: Group, since: int) -> Tensor:
        """B = W_g + Z U_gg; the span began at column `since`."""
        here, done = slice(group.start, group.stop), slice(since, group.start)
        cost = torch.addmm(self.cost[:, here], self.left[:, done], self.factor.root[done, here])
        return self.left[:, here] + self._divided(cost, here)

    def settle(self, group: Group, choice: Choice) -> None:
        """Keep what was chosen for a group."""
        here = slice(group.start, group.stop)
        self.errors[:, here] = choice.errors
        self.keep(group, choice.grid, choice.codes, here)

    def pull(self, here: slice) -> Tensor:
        """((W - Q) H) of some columns, (rows, n), once all are settled."""
        result: Tensor = self.errors[:, here.start :] @ self.factor.root[here, here.start :].mT
        return result

    def feed_again(self, here: slice, moved: Tensor) -> None:
        """E, of which some columns' W - Q has become so much more, (rows, n)."""
        self.errors[:, here.start :].addmm_(moved, self.factor.root[here, here.start :])

    def keep(self, group: Group, grid: Any, codes: Tensor, here: slice) -> Tensor:
        """Write down some columns of a group; by how much W - Q is more now, (rows, n)."""
        values = grid.values(codes, self.ask.bits)
        moved: Tensor = self.values[:, here] - values
        self.codes[:, here], self.values[:, here] = codes, values
        self.left[:, here] += moved
        self.grids[group.index] = grid
        self.scales[:, group.index] = grid.scales
        if grid.zero_points.numel():
            self.zero_points[:, group.index] = grid.zero_points[:, 0]
        if self.ask.grid == "row":
            self.row_scales = grid.scale[:, 0].to(torch.bfloat16)  # exactly
        return moved

    def feed(self, start: int, stop: int) -> None:
        """Z of all later columns += (W - Q) R of the columns [start, stop)."""
        self.cost[:, stop:].addmm_(self.left[:, start:stop], self.factor.root[start:stop, stop:])

    def result(self, weight: Tensor) -> Calibrated:
        """What became of the weight, whose dead columns were 0 so far."""
        positions = self.factor.dead[self.factor.order].nonzero()[:, 0]
        self.left[:, positions] += weight[:, self.factor.order[positions]]
        unit = self.row_scales.to(torch.float32)[:, None]  # in which float32 holds the squares
        norms = [torch.linalg.vector_norm(part / unit, dim=1) for part in (weight, self.values, self.left)]
        return Calibrated(
            codes=self.codes.index_select(1, self.factor.order.argsort()),
            values=self.values,
            sums=(torch.stack(norms, dim=1).to(torch.float64) * unit).square(),
            scales=self.scales.flatten(1),
            zero_points=self.zero_points[:, :0] if self.ask.symmetric else self.zero_points,
            row_scales=self.row_scales,
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
    here, grids = slice(group.start, group.stop), GRIDS[ask.grid]
    grid = grids.fitted(block, _relative(factor.importance[here]), row_scales, ask)
    best = _chosen(block, group, factor, grid, ask.bits)
    if not ask.refits:
        return best
    root = factor.root[here, here]
    seen = Whitened(block @ root, root)
    for _ in range(ask.refits):
        grid = best.grid.refitted(best.codes, seen, row_scales, ask)
        best = _better(best, _chosen(block, group, factor, grid, ask.bits))
    return best


def _chosen(block: Tensor, group: Group, factor: Factor, grid: Any, bits: int) -> Choice:
    """The column loop, in blocks: B of a later block takes the errors of the earlier ones as a group does."""
    codes, errors = torch.empty_like(block, dtype=torch.uint8), torch.empty_like(block)
    for b in blocks(group.start, group.stop):
        done, here = slice(0, b.start - group.start), slice(b.start - group.start, b.stop - group.start)
        updated = block[:, here]
        if done.stop:
            left = block[:, done] - grid.values(codes[:, done], bits)
            updated = updated + left @ factor.root[group.start : b.start, b] @ factor.upper[b.start]
        codes[:, here], errors[:, here] = grid.columns(updated, factor.upper[b.start], bits)
    return Choice(grid=grid, codes=codes, errors=errors, cost=errors.square().sum(dim=1, keepdim=True))


def _better(one: Choice, other: Choice) -> Choice:
    """For each row the choice that costs less."""
    wins = other.cost < one.cost
    return Choice(
        grid=one.grid.where(wins, other.grid),
        codes=torch.where(wins, other.codes, one.codes),
        errors=torch.where(wins, other.errors, one.errors),
        cost=torch.where(wins, other.cost, one.cost),
    )

"""Sweeps over what the column loop of GPTQ settled, in the letters of gptq_core: pure mathematics; knows no model.

The loop settles a column once, by what came before it, and counts on later ones to make up for its error as well as
real numbers could. A sweep visits every group again with all others as they are. With E = (W - Q) R and
H = R R^T, let P = E R_g^T = ((W - Q) H)_g, (rows, n), and G = H_gg = L L^T. By neither step does a row lose more:

    the grid is refitted to the codes that are there, by the least ||(B - Q_g) L||^2 with B = Q_g + P G^-1
    column by column, q_t becomes the level nearest to q_t + P_t / G_tt, which is best while all else stays; P follows,
    within a block of columns at once, and from block to block through E

This is coordinate descent on ||E||^2 as in QuantEase (Behdin et al., 2023, arXiv 2309.01885) and CDQuant (Nair et al.,
2024, arXiv 2406.17542), from GPTQ's codes on, with BPDQ's refits between.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from arrow_quant_v2.kernels import ops
from arrow_quant_v2.quantizers.gptq_factor import blocks
from arrow_quant_v2.quantizers.r2q_core import inverse_of
from arrow_quant_v2.quantizers.whitened import Whitened

if TYPE_CHECKING:
    from torch import Tensor

    from arrow_quant_v2.quantizers.gptq_core import Work
    from arrow_quant_v2.quantizers.gptq_factor import Corner, Group


def sweep(work: Work) -> None:
    """Visit all groups once, in the order of work."""
    for group, corner in zip(work.factor.groups, work.factor.corners, strict=True):
        visit = _visit if len(corner.blocks) == 1 else _visit_in_blocks
        visit(work, group, corner, slice(group.start, group.stop))


def _visit(work: Work, group: Group, corner: Corner, here: slice) -> None:
    """A group that is one block: P follows the grid by H_gg."""
    pull = work.pull(here)
    grid, change = _refitted(work, group, pull, corner)
    pull = pull + change @ corner.blocks[0]
    codes = _descended(grid, work.codes[:, here], pull, corner.blocks[0], work.ask.bits)
    work.settle_again(group, grid, codes, here)


def _visit_in_blocks(work: Work, group: Group, corner: Corner, here: slice) -> None:
    """A longer one, block by block: P follows through E."""
    grid, _ = _refitted(work, group, work.pull(here), corner)
    work.settle_again(group, grid, work.codes[:, here], here)
    for block, gram in zip(blocks(group.start, group.stop), corner.blocks, strict=True):
        codes = _descended(grid, work.codes[:, block], work.pull(block), gram, work.ask.bits)
        work.settle_again(group, grid, codes, block)


def _refitted(work: Work, group: Group, pull: Tensor, corner: Corner) -> tuple[Any, Tensor]:
    """The grid refitted to the codes where a row loses less by it, and what Q loses by that, (rows, n)."""
    here, bits = slice(group.start, group.stop), work.ask.bits
    grid, codes, values = work.grids[group.index], work.codes[:, here], work.values[:, here]
    if not work.ask.refits:
        return grid, torch.zeros_like(pull)
    beyond = work.errors[:, here] if group.stop == len(work.factor.root) else _beyond(pull, corner.root)
    seen = Whitened(values @ corner.root + beyond, corner.root)
    other = grid.refitted(codes, seen, work.row_scales, work.ask)
    change = values - other.values(codes, bits)
    lost = (change @ corner.root + beyond).square().sum(dim=1, keepdim=True)
    wins = lost < beyond.square().sum(dim=1, keepdim=True)
    return grid.where(wins, other), change.masked_fill(~wins, 0.0)


def _beyond(pull: Tensor, lower: Tensor) -> Tensor:
    """P L^-T: what a row loses by the group, seen through L; E_g where L is the last group's part of R."""
    result: Tensor = torch.linalg.solve_triangular(lower, pull.mT, upper=False).mT
    return result


def _descended(grid: Any, codes: Tensor, pull: Tensor, gram: Tensor, bits: int) -> Tensor:
    """Codes (rows, n) after one pass over the columns."""
    mu, a1, a2 = (part[:, 0].contiguous() for part in grid.residual(bits))
    return ops.descend_columns(codes, pull, gram, mu, a1, a2, inverse_of(a2), bits)

"""Sweeps over what the column loop of GPTQ settled, in the letters of gptq_core: pure mathematics; knows no model.

The loop settles a column once, by what came before it, and counts on later ones to make up for its error as well as
real numbers could. A sweep visits every group again with all others as they are. With E = (W - Q) R and
H = R R^T, let P = E R_g^T = ((W - Q) H)_g, (rows, n), and G = H_gg = L L^T. By neither step does a row lose more:

    the grid is refitted to the codes that are there, by the least ||(B - Q_g) L||^2 with B = Q_g + P G^-1
    column by column, q_t becomes the level nearest to q_t + P_t / G_tt, which is best while all else stays; P follows

This is coordinate descent on ||E||^2 as in QuantEase (Behdin et al., 2023, arXiv 2309.01885) and CDQuant (Nair et al.,
2024, arXiv 2406.17542), from GPTQ's codes on, with BPDQ's refits between.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from arrow_quant_v2.kernels import ops
from arrow_quant_v2.quantizers.r2q_core import inverse_of
from arrow_quant_v2.quantizers.whitened import Whitened

if TYPE_CHECKING:
    from torch import Tensor

    from arrow_quant_v2.quantizers.gptq_core import Work
    from arrow_quant_v2.quantizers.gptq_factor import Corner, Group


def sweep(work: Work) -> None:
    """Visit all groups once, in the order of work."""
    for group, corner in zip(work.factor.groups, work.factor.corners, strict=True):
        pull = work.pull(group)
        grid, codes = work.grids[group.index], work.codes[:, group.start : group.stop]
        if work.ask.refits:
            grid, pull = _refitted(work, group, pull, corner)
        work.settle_again(group, grid, _descended(grid, codes, pull, corner, work.ask.bits))


def _refitted(work: Work, group: Group, pull: Tensor, corner: Corner) -> tuple[Any, Tensor]:
    """The grid refitted to the codes where a row loses less by it, and P with it."""
    here, bits = slice(group.start, group.stop), work.ask.bits
    grid, codes, values = work.grids[group.index], work.codes[:, here], work.values[:, here]
    beyond = torch.linalg.solve_triangular(corner.lower, pull.mT, upper=False).mT  # P L^-T
    seen = Whitened(values @ corner.lower + beyond, corner.lower)
    other = grid.refitted(codes, seen, work.row_scales, work.ask)
    change = values - other.values(codes, bits)
    lost = (change @ corner.lower + beyond).square().sum(dim=1, keepdim=True)
    wins = lost < beyond.square().sum(dim=1, keepdim=True)
    return grid.where(wins, other), pull + change.masked_fill(~wins, 0.0) @ corner.gram


def _descended(grid: Any, codes: Tensor, pull: Tensor, corner: Corner, bits: int) -> Tensor:
    """Codes (rows, n) after one pass over the columns."""
    mu, a1, a2 = (part[:, 0].contiguous() for part in grid.residual(bits))
    return ops.descend_columns(codes, pull, corner.gram, mu, a1, a2, inverse_of(a2), bits)

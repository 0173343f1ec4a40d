"""Sweeps over what the column loop of GPTQ settled, in the letters of gptq_core: pure mathematics; knows no model.

The loop settles a column once, by what came before it, and counts on later ones to make up for its error as well as
real numbers could. A sweep visits every group again with all others as they are. With E = (W - Q) R and H = R R^T, let
P = E R_g^T = ((W - Q) H)_g, (rows, n), and H_gg = L L^T. By neither step does a row lose more:

    the grid is refitted to the codes that are there, by the least ||(B - Q_g) L||^2 with B = Q_g + P H_gg^-1
    column by column, q_t becomes the level nearest to q_t + P_t / H_tt, which is best while all else stays

P of some groups that follow each other is taken from E at once. Among them it follows what changes by H; E takes it all
in the end. This is coordinate descent on ||E||^2 as in QuantEase (Behdin et al., 2023, arXiv 2309.01885) and
CDQuant (Nair et al., 2024, arXiv 2406.17542), from GPTQ's codes on, with BPDQ's refits between.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from arrow_quant_v2.kernels import ops
from arrow_quant_v2.kernels.reference import inverse_of
from arrow_quant_v2.quantizers.gptq_factor import blocks
from arrow_quant_v2.quantizers.whitened import Whitened

if TYPE_CHECKING:
    from torch import Tensor

    from arrow_quant_v2.quantizers.gptq_core import Work
    from arrow_quant_v2.quantizers.gptq_factor import Group, Root, Span


def sweep(work: Work) -> None:
    """Visit all groups once, in the order of work."""
    for span in work.factor.spans:
        pull, before = work.pull(span.columns), work.values[:, span.columns].clone()
        for group, root in zip(span.groups, span.roots, strict=True):
            _visit(work, group, root, span, pull)
        work.feed_again(span.columns, before - work.values[:, span.columns])


def _visit(work: Work, group: Group, root: Root, span: Span, pull: Tensor) -> None:
    """Refit the grid of one group and move its codes; P of the span's later columns follows."""
    start = span.columns.start
    here, inside = slice(group.start, group.stop), slice(group.start - start, group.stop - start)
    grid, before = work.grids[group.index], work.values[:, here].clone()
    own, gram = pull[:, inside], span.gram[inside, inside]
    if work.ask.refits:
        grid = _refitted(work, group, root, own)
        work.keep(group, grid, work.codes[:, here], here)
        own = own + (before - work.values[:, here]) @ gram
    for block in blocks(0, group.stop - group.start):
        at = slice(group.start + block.start, group.start + block.stop)
        codes = _descended(grid, work.codes[:, at], own[:, block], gram[block, block], work.ask.bits)
        moved = work.keep(group, grid, codes, at)
        own[:, block.stop :] += moved @ gram[block, block.stop :]
    pull[:, inside.stop :] += (before - work.values[:, here]) @ span.gram[inside, inside.stop :]


def _refitted(work: Work, group: Group, root: Root, pull: Tensor) -> Any:
    """The grid, refitted to the codes where a row loses less by it."""
    here, bits = slice(group.start, group.stop), work.ask.bits
    grid, codes, values = work.grids[group.index], work.codes[:, here], work.values[:, here]
    beyond = root.solved(pull)
    other = grid.refitted(codes, Whitened(values @ root.matrix + beyond, root.matrix), work.row_scales, work.ask)
    lost = ((values - other.values(codes, bits)) @ root.matrix + beyond).square().sum(dim=1, keepdim=True)
    return grid.where(lost < beyond.square().sum(dim=1, keepdim=True), other)


def _descended(grid: Any, codes: Tensor, pull: Tensor, gram: Tensor, bits: int) -> Tensor:
    """Codes (rows, n) after one pass over the columns."""
    mu, a1, a2 = (part[:, 0].contiguous() for part in grid.residual(bits))
    return ops.descend_columns(codes, pull, gram, mu, a1, a2, inverse_of(a2), bits)

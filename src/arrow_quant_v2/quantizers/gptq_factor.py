"""H of one layer's inputs -> the order of its columns and the triangular factor that GPTQ works with.

GPTQ (Frantar et al., 2022, arXiv 2210.17323) takes U, the upper Cholesky factor of H^-1 = U^T U. With H = R R^T, R
upper triangular, U = R^-1, and so are their diagonal blocks: U_gg = (R_gg)^-1. All that GPTQ needs follows from R
(QuIP, Chee et al., 2023, arXiv 2307.13304, shows the two forms to be one), so H is never inverted, which is two thirds
of the usual work. Knows nothing of weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from arrow_quant_v2.engines.one_core import each_on_one_core, tiles
from arrow_quant_v2.errors import QuantizationError
from arrow_quant_v2.kernels.reference import split_groups

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

DAMPING = 0.01
FEW = 0.3  # the damping that suits as many tokens as columns
SWEPT = 512  # columns that a sweep visits together
BLOCK = 128  # columns of one loop; errors reach later blocks through a matrix product
MOST_DAMPING = 10.0  # more than this means that H is no sum of x x^T


@dataclass(frozen=True, kw_only=True)
class Group:
    """Group `index` of every row; in the order of work its columns lie at [start, stop)."""

    index: int
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Factor:
    """What GPTQ needs to know of H, whatever the weight: layers that share their inputs share it.

    order    int64 (columns,)              the column that is worked on at each position
    groups   one for each group            in the order of work
    root     float32 (columns, columns)    R of the ordered, damped H / mean(diag H); 0 below its diagonal
    upper    one for each block of a group U_bb = R_bb^-1 of the columns from that position on
    dead     bool (columns,)               columns whose input was always 0
    damping  what was added to the diagonal in the end, as a part of its mean
    """

    order: Tensor
    groups: tuple[Group, ...]
    root: Tensor
    upper: dict[int, Tensor]
    dead: Tensor
    damping: float
    group_size: int

    @cached_property
    def importance(self) -> Tensor:
        """1 / U_tt^2 = R_tt^2, (columns,) float32 in the order of work; 0 for dead columns.

        It is what an error of column t costs when all later columns have made up for it as well as they can.
        """
        return self.root.diagonal().square().masked_fill(self.dead[self.order], 0.0)

    @cached_property
    def spans(self) -> tuple[Span, ...]:
        """H between columns that sweeps visit together, in the order of work; asked for before rows are shared out."""
        found = spans(self.groups, SWEPT)
        return tuple(each_on_one_core(lambda span: _span(self.root, span), found))


@dataclass(frozen=True, kw_only=True, eq=False)
class Span:
    """Groups that follow each other: gram H between their columns (n, n), and a root of H_gg = L L^T for each."""

    groups: tuple[Group, ...]
    gram: Tensor
    roots: tuple[Root, ...]

    @property
    def columns(self) -> slice:
        """Theirs, in the order of work."""
        return slice(self.groups[0].start, self.groups[-1].stop)


@dataclass(frozen=True, kw_only=True, eq=False)
class Root:
    """L of H_gg = L L^T, (n, n): upper triangular, a part of R, for the group that comes last; else lower."""

    matrix: Tensor
    upper: bool

    def solved(self, pull: Tensor) -> Tensor:
        """P L^-T, (rows, n)."""
        result: Tensor = torch.linalg.solve_triangular(self.matrix, pull.mT, upper=self.upper).mT
        return result


def spans(groups: Sequence[Group], columns: int) -> list[list[Group]]:
    """Groups that follow each other, together of at least so many columns (the last ones may have fewer)."""
    result: list[list[Group]] = []
    for group in groups:
        if not result or result[-1][-1].stop - result[-1][0].start >= columns:
            result.append([])
        result[-1].append(group)
    return result


def _span(root: Tensor, groups: Sequence[Group]) -> Span:
    start = groups[0].start
    rows = root[start : groups[-1].stop, start:]
    gram = rows @ rows.mT
    parts = (slice(group.start - start, group.stop - start) for group in groups)
    roots = (
        Root(matrix=root[group.start :, group.start :], upper=True)
        if group.stop == len(root)
        else Root(matrix=_lower(gram[part, part]), upper=False)
        for group, part in zip(groups, parts, strict=True)
    )
    return Span(groups=tuple(groups), gram=gram, roots=tuple(roots))


def _lower(gram: Tensor) -> Tensor:
    """L L^T = H_gg, by way of float64."""
    result: Tensor = torch.linalg.cholesky(gram.to(torch.float64))
    return result.to(torch.float32)


def factorize(hessian: Tensor, group_size: int | None, damping: float = DAMPING) -> Factor:
    """R R^T = H / mean(diag H) + damping I, columns in group-aware order; damping grows tenfold until it exists.

    hessian (columns, columns) float32 or float64, the sum or mean of x x^T: its scale does not matter. A dead column
    (H_jj = 0) gets the mean of the others as its diagonal.

    Raises:
        QuantizationError: H is no square matrix, holds NaN or infinity, is zero, or is no sum of x x^T.
    """
    _check(hessian)
    curvature = hessian.diagonal().to(torch.float64)
    dead = curvature == 0.0
    mean = float(curvature.sum()) / int((~dead).sum())
    order, groups = group_aware_order(curvature, group_size or len(hessian))
    while damping <= MOST_DAMPING:
        root = _ordered(hessian, order, mean)
        root.diagonal().add_(damping).add_(dead[order].to(torch.float32))
        if to_upper_root(root):
            size = group_size or len(hessian)
            upper = _diagonal_inverses(root.triu_(), groups)
            return Factor(
                order=order, groups=groups, root=root, upper=upper, dead=dead, damping=damping, group_size=size
            )
        damping *= 10.0
    raise QuantizationError(
        f"H has no Cholesky factor even with {damping / 10.0:g} times its mean added to the diagonal: it is no sum of"
        " x x^T; collect it with GPTQCalibrator.observe"
    )


def suitable_damping(columns: int, tokens: int) -> float:
    """0.3 columns / tokens, but 0.01 to 1: with few tokens H fits what was seen, not what will be."""
    return min(1.0, max(DAMPING, FEW * columns / max(1, tokens)))


def blocks(start: int, stop: int) -> list[slice]:
    """The columns [start, stop) of one group in blocks of one column loop each."""
    return [slice(start + block.start, start + block.stop) for block in tiles(stop - start, BLOCK)]


def _diagonal_inverses(root: Tensor, groups: Sequence[Group]) -> dict[int, Tensor]:
    """U_bb of every block b, by its first column."""
    every = [block for group in groups for block in blocks(group.start, group.stop)]

    def inverse(b: slice) -> Tensor:
        one = torch.eye(b.stop - b.start, device=root.device)
        result: Tensor = torch.linalg.solve_triangular(root[b, b], one, upper=True)
        return result

    return {b.start: upper for b, upper in zip(every, each_on_one_core(inverse, every), strict=True)}


def _check(hessian: Tensor) -> None:
    if hessian.ndim != 2 or hessian.shape[0] != hessian.shape[1] or not hessian.numel():  # noqa: PLR2004 - a matrix
        raise QuantizationError(f"H is {list(hessian.shape)}; it needs as many rows as the layer has input columns")
    if hessian.dtype not in {torch.float32, torch.float64}:
        raise QuantizationError(f"H is {hessian.dtype}; allowed: float32, float64")
    if not all(math.isfinite(float(extreme)) for extreme in hessian.aminmax()):
        raise QuantizationError("H holds NaN or infinity; look for the inputs that do, and leave them out")
    least, most = float(hessian.diagonal().min()), float(hessian.diagonal().max())
    if least < 0.0 or most == 0.0:
        raise QuantizationError(
            f"the diagonal of H goes from {least:g} to {most:g}; a sum of squares is needed, and not all inputs 0"
        )


def group_aware_order(curvature: Tensor, group_size: int) -> tuple[Tensor, tuple[Group, ...]]:
    """Groups by the sum of their curvature, and columns inside a group by their own, largest first.

    What is quantized first is made up for by all that follows, so what matters most goes first. Groups stay together:
    the order leaves no trace in what is stored, and inference needs no index.
    """
    padded = split_groups(curvature[None], group_size)[0]  # (groups, group_size)
    ranked = padded.sum(dim=1).argsort(descending=True, stable=True).tolist()
    columns, groups, start = [], [], 0
    for index in ranked:
        inside = curvature[index * group_size : (index + 1) * group_size]
        columns.append(index * group_size + inside.argsort(descending=True, stable=True))
        groups.append(Group(index=index, start=start, stop=start + len(inside)))
        start += len(inside)
    return torch.cat(columns), tuple(groups)


def _ordered(hessian: Tensor, order: Tensor, mean: float) -> Tensor:
    """H / mean with rows and columns in this order, float32; its upper triangle and whole tiles on the diagonal."""
    result = torch.zeros(hessian.shape, dtype=torch.float32, device=hessian.device)

    def fill(rows: slice) -> None:
        right = order[rows.start :]
        torch.div(hessian[order[rows]].index_select(1, right), mean, out=result[rows, rows.start :])

    each_on_one_core(fill, tiles(len(order)))
    return result


def to_upper_root(a: Tensor) -> bool:
    """Turn the upper triangle of A into R, upper triangular, with A = R R^T; False where A is not positive definite.

    From the last tile k to the first:
      R_kk R_kk^T = A_kk,   R_ik = A_ik R_kk^-T for i < k,   A_ij = A_ij - R_ik R_jk^T for i <= j < k.
    """
    for k in reversed(tiles(len(a))):
        if not all(each_on_one_core(lambda k: _diagonal_root(a[k, k]), [k])):
            return False
        _eliminate(a, k)
    return True


def _diagonal_root(tile: Tensor) -> bool:
    """R of one tile, in place: with both axes reversed it is the usual lower factor."""
    lower, info = torch.linalg.cholesky_ex(tile.flip(0, 1).mT)  # reads the lower triangle
    tile.copy_(lower.flip(0, 1))
    return int(info) == 0


def _eliminate(a: Tensor, k: slice) -> None:
    def panel(i: slice) -> None:
        a[i, k] = torch.linalg.solve_triangular(a[k, k].mT, a[i, k], upper=False, left=False)

    def rest(j: slice) -> None:
        a[: j.stop, j].addmm_(a[: j.stop, k], a[j, k].mT, alpha=-1.0)

    before = tiles(k.start)
    each_on_one_core(panel, before)
    each_on_one_core(rest, before[::-1])  # the largest first

"""The residual grid fitted to groups of weights: pure mathematics; knows nothing of files or models.

With m = 2^(bits-1) - 1 a group of weights w is approximated by levels

    q = mu + a1 t + a2 k,   t in {-1, 1},  k in {-m, -m + 2 ... m},   a1 >= m a2 >= 0,  |mu| <= a1 + m a2

which at 2 bits are two residual signs (R2Q), and for a1 = (m + 1) a2 the affine grid. From the best affine grid on, two
steps alternate, neither of which can raise sum h (w - q)^2, where h is the importance:

    t = sign(w - mu),  k = the odd number nearest to (t (w - mu) - a1) / a2       the nearest level: a1 >= m a2
    (mu, a1, a2) += d,  A d = g,  A = sum h x x^T,  g = sum h (w - q) x,  x = (1, t, k)       least squares

A step that leaves the allowed grids is brought back to them, and is kept only where it helps. The alternation is
`ops.fit_residual`: every group gets the same bits whatever lies beside it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

from arrow_quant_v2.kernels import cpu, ops, reference
from arrow_quant_v2.kernels.reference import Residual, largest_low
from arrow_quant_v2.quantizers.affine import STRETCHES

if TYPE_CHECKING:
    from torch import Tensor

ROUNDS = 8


class StoredResidual(NamedTuple):
    """What the format makes of grids, and what that means.

    scales (rows, 2 groups) and zero_points (rows, groups), or (rows, 0) when symmetric, are uint8; mu, a1 and a2 are
    float32 and of the shape that was given.
    """

    scales: Tensor
    zero_points: Tensor
    mu: Tensor
    a1: Tensor
    a2: Tensor

    @property
    def grid(self) -> Residual:
        """What the codes lie on."""
        return Residual(mu=self.mu, a1=self.a1, a2=self.a2)

    @property
    def inverse(self) -> Tensor:
        """1 / (2 a2), or 0 where a2 is, as `ops.quantize_columns_r2q` takes it."""
        return reference.inverse_of(self.a2)


def fit_r2q(
    groups: Tensor,
    importance: Tensor | None,
    bits: int,
    symmetric: bool,  # noqa: FBT001 - as in every operator on codes
    rounds: int = ROUNDS,
) -> Residual:
    """The grid (mu, a1, a2) of every group, float32, with the least weighted error that `rounds` alternations find.

    groups is (rows, n) or (rows, groups, n) float32, the results (rows,) or (rows, groups); importance broadcasts with
    groups, is at least 0 and weighs the squared errors: None is 1 each. Symmetric grids have mu = 0.

    Never worse than the affine grid of the clip search, in this metric and before anything is stored; a symmetric one
    never worse than the affine grids around 0 (a1 = (m + 1) a2) that end at the same clipping ratios.
    """
    cpu.activate()
    three = groups if groups.ndim == 3 else groups[:, None]  # noqa: PLR2004 - (rows, groups, n)
    h = None if importance is None else _relative(importance.to(torch.float32), three, groups)
    unit, starts = _symmetric_starts(three, bits) if symmetric else _affine_start(three, h, bits)
    u = columns_first(three / unit[..., None])
    weights = None if h is None else columns_first(h.expand_as(three))
    mu, a1, a2 = (torch.stack([part.flatten() for part in parts]) for parts in zip(*starts, strict=True))
    fitted = ops.fit_residual(u, weights, mu, a1, a2, bits, symmetric, rounds)
    return Residual(*((part.reshape(unit.shape) * unit).reshape(groups.shape[:-1]) for part in fitted))


def row_scales_r2q(a1: Tensor, a2: Tensor, bits: int) -> Tensor:
    """(rows,) bfloat16: not below the largest a1 of a row (rows, groups), nor what its a2 needs to be stored."""
    largest = torch.maximum(a1, a2 * (255.0 / largest_s2(bits)) ** 2).amax(dim=1)
    return reference.up_to_bfloat16(largest.clamp(min=reference.SMALLEST_ROW_SCALE))


def largest_s2(bits: int) -> int:
    """The largest stored a2 that leaves room for an a1 of m times as much: s1^2 >= m s2^2."""
    return math.isqrt(255 * 255 // largest_low(bits))


def stored_r2q(  # noqa: PLR0917 - as in every operator on codes
    mu: Tensor,
    a1: Tensor,
    a2: Tensor,
    row_scales: Tensor,
    bits: int,
    symmetric: bool,  # noqa: FBT001
) -> StoredResidual:
    """Grids of (rows,) or (rows, groups) in 8 bits a number, under row_scales (rows,) bfloat16.

    s1^2 >= m s2^2 keeps the levels in order; where rounding breaks it, a1 grows. At 8 bits a2 has 22 codes alone:
    there it is rounded up, because too large a step costs less than what lies beyond the ends of halves too short.
    """
    shape, m = a1.shape, float(largest_low(bits))
    mu, a1, a2 = (part.reshape(len(row_scales), -1) for part in (mu, a1, a2))
    low = reference.scale_codes(a2, row_scales, cover_all=bits == 8).clamp(max=largest_s2(bits))  # noqa: PLR2004
    least = (low.to(torch.float64) * math.sqrt(m)).ceil().to(torch.uint8)
    scales = torch.stack([torch.maximum(reference.scale_codes(a1, row_scales, cover_all=False), least), low], dim=2)
    scales = scales.flatten(1)
    none = scales[:, :0]
    zeros = none
    if not symmetric:
        centred = reference.residual_of(scales, none, row_scales, bits)
        reach = centred.a1 + m * centred.a2
        share = torch.where(reach > 0.0, mu / torch.where(reach > 0.0, reach, 1.0), 1.0)
        zeros = (127.5 - 127.5 * share.nan_to_num(nan=1.0)).clamp(0.0, 255.0).round().to(torch.uint8)
    grid = reference.residual_of(scales, zeros, row_scales, bits)
    return StoredResidual(scales, zeros, *(part.reshape(shape) for part in grid))


def _relative(importance: Tensor, three: Tensor, groups: Tensor) -> Tensor:
    """Importance (rows or 1, groups or 1, n), at most 1 in every group: a grid depends on the ratios alone."""
    if groups.ndim != three.ndim and importance.ndim > 1:
        importance = importance[:, None]
    wide = importance.expand(*importance.shape[:-1], three.shape[-1])
    while wide.ndim < three.ndim:
        wide = wide[None]
    return wide / wide.amax(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)


def _affine_start(three: Tensor, h: Tensor | None, bits: int) -> tuple[Tensor, list[Residual]]:
    """The step of the best affine grid of every group, (rows, groups), and that grid in units of it."""
    rows, count, n = three.shape
    if (n % 8 == 0 or count == 1) and (h is None or h.shape[0] == 1):
        along = None if h is None else h.expand(1, count, n).flatten()
        step, full, mean_q, mean_w = ops.fit_grid(three.flatten(1), bits, n, False, STRETCHES[bits], along)  # noqa: FBT003
    else:
        cover = reference.cover(three, bits, symmetric=False)
        mask = (three.new_ones(1, 1, n) if h is None else h).expand(rows, count, n)
        fit = reference.clip_search(three, mask, cover, bits, symmetric=False, stretches=STRETCHES[bits])
        step, full, mean_q, mean_w = fit.step, fit.full, fit.mean_q, fit.mean_w
    used, m = step > 0.0, float(largest_low(bits))
    unit = torch.where(used, step, 1.0)
    half = torch.where(used, 0.5, 0.0)
    reach = (2.0 * m + 1.0) * half
    mu = reach - torch.where(used, mean_q - mean_w * (full / unit), 0.0)
    return unit, [Residual(mu=mu.clamp(-reach, reach), a1=(m + 1.0) * half, a2=half)]


def _symmetric_starts(three: Tensor, bits: int) -> tuple[Tensor, list[Residual]]:
    """The affine grids around 0 that end at the clipping ratios of the search, in units of the widest one's step."""
    m = float(largest_low(bits))
    step = three.abs().amax(dim=-1) / (m + 0.5)
    used = step > 0.0
    halves = [torch.where(used, 0.5 / stretch, 0.0) for stretch in STRETCHES[bits]]
    starts = [Residual(mu=torch.zeros_like(half), a1=(m + 1.0) * half, a2=half) for half in halves]
    return torch.where(used, step, 1.0), starts


def columns_first(three: Tensor) -> Tensor:
    """(rows, groups, n) -> (n, rows * groups), laid out so."""
    return three.flatten(0, 1).mT.contiguous()

"""The residual grid fitted to groups of weights: pure mathematics; knows nothing of files or models.

With m = 2^(bits-1) - 1 a group of weights w is approximated by levels

    q = mu + a1 t + a2 k,   t in {-1, 1},  k in {-m, -m + 2 ... m},   a1 >= m a2 >= 0,  |mu| <= a1 + m a2

which at 2 bits are two residual signs (R2Q), and for a1 = (m + 1) a2 the affine grid. From the best affine grid on, two
steps alternate, neither of which can raise sum h (w - q)^2, where h is the importance:

    t = sign(w - mu),  k = the odd number nearest to (t (w - mu) - a1) / a2       the nearest level: a1 >= m a2
    (mu, a1, a2) += d,  A d = g,  A = sum h x x^T,  g = sum h (w - q) x,  x = (1, t, k)       least squares

A step that leaves the allowed grids is brought back to them, and is kept only where it helps. Groups lie in the last
axis while this is done, one beside the other, and sums add halves: every group gets the same bits whatever lies beside
it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

from arrow_quant_v2.kernels import cpu, ops, reference
from arrow_quant_v2.kernels.reference import Residual, largest_low
from arrow_quant_v2.quantizers.affine import STRETCHES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

ROUNDS = 8
RIDGE = 1e-6  # of the mass, on the diagonal of A: where the weights do not say, the grid stays as it is


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
        return inverse_of(self.a2)


def inverse_of(a2: Tensor) -> Tensor:
    """1 / (2 a2), or 0 where a2 is."""
    return torch.where(a2 > 0.0, 0.5 / torch.where(a2 > 0.0, a2, 1.0), 0.0)


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
    seen = Seen(
        columns_first(three / unit[..., None]),
        None if h is None else columns_first(h.expand_as(three)),
        bits=bits,
        symmetric=symmetric,
    )
    flat = [Residual(*(part.flatten() for part in start)) for start in starts]
    fitted = _alternated(seen, flat, rounds)
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


def _alternated(seen: Seen, starts: Sequence[Residual], rounds: int) -> Residual:
    """The best grid on the way from the best start. A group that a round does not help is done: it would repeat."""
    best, sums = starts[0], seen.sums(starts[0])
    for other in starts[1:]:
        best, sums, _ = _better(best, sums, other, seen.sums(other))
    for _ in range(rounds):
        tried = seen.moved(best, sums)
        best, sums, any_better = _better(best, sums, tried, seen.sums(tried))
        if not any_better:
            break
    return best


def _better(best: Residual, sums: Tensor, tried: Residual, found: Tensor) -> tuple[Residual, Tensor, bool]:
    """Of each group the grid with the smaller error, its sums, and whether any changed."""
    wins = found[0] < sums[0]
    if not wins.any():
        return best, sums, False
    grid = Residual(*(torch.where(wins, new, old) for new, old in zip(tried, best, strict=True)))
    return grid, torch.where(wins, found, sums), True


class Seen:
    """What is fitted: u (n, groups) in units of each group's step, importance h (n, groups) or None; grids (groups,).

    Weights are looked at from the half that they lie in: e = t (w - q) and c = t k, so that e = t (w - mu) - a1 - a2 c.
    """

    def __init__(self, u: Tensor, h: Tensor | None, *, bits: int, symmetric: bool) -> None:
        self.u, self.h, self.m, self.symmetric = u, h, float(largest_low(bits)), symmetric
        mass = torch.ones_like(u) if h is None else h.clone()
        self.mass = folded_columns(mass[None])[0]
        self.one = u.new_ones(())
        # Touched once for all rounds: fresh memory costs more than what is written to it.
        self.room = u.new_empty(4 + (self.m > 1.0) + 3 * (not symmetric), *u.shape)

    def sums(self, grid: Residual) -> Tensor:
        """Float64 (k, groups): the sums of h times e^2, e c, e, c; if asymmetric e t, t, t c; above 2 bits c^2."""
        d = self.u - grid.mu
        t = None if self.symmetric else torch.copysign(self.one, d)
        y = d.abs_().sub_(grid.a1)
        c = self._nearest(y, grid.a2)
        e = y.sub_(c * grid.a2)
        he, hc = self._weighted(e, self.room[2]), self._weighted(c, self.room[3])
        torch.mul(he, e, out=self.room[0])
        torch.mul(he, c, out=self.room[1])
        if t is not None:
            torch.mul(he, t, out=self.room[4])
            torch.mul(self._weighted(t, self.room[5]), c, out=self.room[6])
        if self.m > 1.0:
            torch.mul(hc, c, out=self.room[-1])
        return folded_columns(self.room)

    def moved(self, grid: Residual, sums: Tensor) -> Residual:
        """One step of least squares from a grid, brought back to a1 >= m a2 >= 0 and |mu| <= a1 + m a2.

        A = h-weighted sums of x x^T, x = (1, t, k): mu is eliminated first, two unknowns are left.
        """
        _, g2, g1, a12 = sums[:4]
        ridge = self.mass * RIDGE
        a11, a22 = self.mass + ridge, (sums[-1] if self.m > 1.0 else self.mass) + ridge
        if self.symmetric:
            d1, d2 = _solved(a11, a12, a22, g1, g2)
            return self._allowed(grid.mu, grid.a1 + d1, grid.a2 + d2)
        g0, of_t, of_k = sums[4:7]
        by_t, by_k = of_t / a11, of_k / a11
        d1, d2 = _solved(a11 - of_t * by_t, a12 - of_k * by_t, a22 - of_k * by_k, g1 - g0 * by_t, g2 - g0 * by_k)
        return self._allowed(grid.mu + (g0 - of_t * d1 - of_k * d2) / a11, grid.a1 + d1, grid.a2 + d2)

    def _allowed(self, mu: Tensor, a1: Tensor, a2: Tensor) -> Residual:
        a2 = a2.to(torch.float32).clamp_(min=0.0)
        a1 = torch.maximum(a1.to(torch.float32), self.m * a2)
        reach = a1 + self.m * a2
        return Residual(mu=torch.minimum(torch.maximum(mu.to(torch.float32), -reach), reach), a1=a1, a2=a2)

    def _nearest(self, y: Tensor, a2: Tensor) -> Tensor:
        """The number of -m, -m + 2 ... m that times a2 comes nearest to y."""
        if self.m == 1.0:
            return torch.copysign(self.one, y)
        return (y * inverse_of(a2)).add_(0.5 * self.m).clamp_(0.0, self.m).round_().mul_(2.0).sub_(self.m)

    def _weighted(self, x: Tensor, out: Tensor) -> Tensor:
        """The product with h, in this room."""
        return out.copy_(x) if self.h is None else torch.mul(x, self.h, out=out)


def _solved(a11: Tensor, a12: Tensor, a22: Tensor, g1: Tensor, g2: Tensor) -> tuple[Tensor, Tensor]:
    """A d = g for a symmetric A of two rows."""
    determinant = a11 * a22 - a12 * a12
    return (a22 * g1 - a12 * g2) / determinant, (a11 * g2 - a12 * g1) / determinant


def folded_columns(terms: Tensor) -> Tensor:
    """(k, n, groups) float32 or float64 -> (k, groups) float64: halves are added to each other until one is left.

    The terms are overwritten.
    """
    n = terms.shape[1]
    while n > 1:
        half = n // 2
        if n % 2:
            terms[:, 0] += terms[:, n - 1]
        terms[:, :half] += terms[:, half : 2 * half]
        n = half
    return terms[:, 0].to(torch.float64)

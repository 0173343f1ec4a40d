"""The residual grid fitted to groups of weights by alternation: what ops.fit_residual means, in plain torch.

The nearest codes for a grid, and the grid of least squares for these codes, take turns. Groups lie in the last axis,
one beside the other, and sums add halves, so that a vector kernel can repeat them exactly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from arrow_quant_v2.kernels.reference import Residual, inverse_of, largest_low

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

RIDGE = 1e-6  # of the mass, on the diagonal of A: where the weights do not say, the grid stays as it is


def fit_residual(
    u: Tensor, importance: Tensor | None, grids: Residual, bits: int, rounds: int, *, symmetric: bool
) -> Residual:
    """The best grid (groups,) on the way from the best of the grids (starts, groups); see ops.fit_residual."""
    starts = [Residual(*parts) for parts in zip(*grids, strict=True)]
    return _alternated(Seen(u, importance, bits=bits, symmetric=symmetric), starts, rounds)


def _alternated(seen: Seen, starts: Sequence[Residual], rounds: int) -> Residual:
    """A group that a round does not help is done: it would repeat."""
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

"""What changes of some parts of a weight do, told by the gradient of that weight, which nobody keeps.

For weights whose rows have inputs of their own, or belong to inputs. Knows neither models nor how outputs are weighed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

INPUT, WEIGHT = object(), object()  # where they were among the arguments of a product


@dataclass(frozen=True, kw_only=True, eq=False)
class Piece:
    """Some rows and columns of a weight (rows, columns), and how they change.

    rows    (r,) int64, in ascending order; columns (c,) int64
    errors  (r, c) float32: dW
    apart   the axis whose entries are different outputs: 0, or 1 where rows belong to inputs
    stands  for how many times as many outputs these ones stand
    """

    rows: Tensor
    columns: Tensor
    errors: Tensor
    apart: int = 0
    stands: float = 1.0

    def sums(self, gradient: Tensor, first: int) -> Tensor | None:
        """What each output feels, dW . G in float64, by G of the rows from `first` on; None if it lacks these."""
        start, stop = int(self.rows[0]) - first, int(self.rows[-1]) - first
        if start < 0 or stop >= len(gradient):
            return None
        own = gradient[(self.rows - first).to(gradient.device)][:, self.columns.to(gradient.device)]
        return (own * self.errors.to(own.device)).sum(dim=1 - self.apart, dtype=torch.float64)


@dataclass(frozen=True, kw_only=True, eq=False)
class Pieces:
    """Ways in which a weight of so many columns may change, and the pieces by which each of them is told."""

    columns: int
    ways: tuple[tuple[Piece, ...], ...]


class SumsOfPieces:
    """Of one call of the model: dW . G of each output of each piece, whatever products the weight is in."""

    def __init__(self, pieces: Pieces) -> None:
        """Begin with no product."""
        self._pieces = pieces
        self._sums: dict[tuple[int, int], Tensor] = {}  # by way and piece

    def add(self, gradient: Tensor, first: int) -> None:
        """Add what one product says; `gradient` is of the rows from `first` on."""
        matrix = gradient.reshape(-1, self._pieces.columns)
        for way, pieces in enumerate(self._pieces.ways):
            for number, piece in enumerate(pieces):
                sums = piece.sums(matrix, first)
                if sums is not None:
                    before = self._sums.get((way, number))
                    self._sums[way, number] = sums if before is None else before + sums

    def costs(self) -> Tensor:
        """(ways,) float64: the squares of what all outputs feel."""
        found = torch.zeros(len(self._pieces.ways), dtype=torch.float64)
        for (way, number), sums in sorted(self._sums.items(), key=lambda pair: pair[0]):
            found[way] += self._pieces.ways[way][number].stands * float(sums.square().sum())
        return found


@dataclass(frozen=True, kw_only=True, eq=False)
class Again:
    """A product to be done again with an input and a weight, of which it holds neither."""

    func: Callable[..., Any]
    args: tuple[Any, ...]
    given: Mapping[str, Any]

    @classmethod
    def of(
        cls, func: Callable[..., Any], args: Sequence[Any], given: Mapping[str, Any], *, x: Tensor, weight: Tensor
    ) -> Again:
        """The product that this function does of x and weight, which are among what it is given."""

        def without(one: Any) -> Any:
            return INPUT if one is x else WEIGHT if one is weight else one

        named = {name: without(one) for name, one in given.items()}
        return cls(func=func, args=tuple(without(one) for one in args), given=named)

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """Do it."""

        def put(one: Any) -> Any:
            return x if one is INPUT else weight if one is WEIGHT else one

        result: Tensor = self.func(*map(put, self.args), **{name: put(one) for name, one in self.given.items()})
        return result


@dataclass(frozen=True, kw_only=True, eq=False)
class _Asked:
    """How a product is done again, and who is given the gradient of its weight."""

    again: Again
    add: Callable[[Tensor], None]


def with_gradient(again: Again, x: Tensor, weight: Tensor, result: Tensor, add: Callable[[Tensor], None]) -> Tensor:
    """The result of a product, behind which `add` is given the gradient of the weight, and x has its own."""
    anchor = torch.zeros((), device=x.device).requires_grad_()  # a gradient comes here where nothing before x has one
    asked = _Asked(again=again, add=add)
    behind: Tensor = _WeightGradient.apply(anchor, x, weight, result.detach(), asked)  # type: ignore[no-untyped-call]
    return behind


class _WeightGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, _: Tensor, x: Tensor, weight: Tensor, result: Tensor, asked: _Asked) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.asked = asked
        return result.clone()  # what is handed through could not be written into

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, weight = (one.detach().requires_grad_() for one in ctx.saved_tensors)
        with torch.enable_grad(), torch._C.DisableTorchFunction():  # noqa: SLF001 - the watch itself is not meant
            output = ctx.asked.again(x, weight)
            of_x, of_weight = torch.autograd.grad(output, (x, weight), gradients[0])
        ctx.asked.add(of_weight)
        return None, of_x if ctx.needs_input_grad[1] else None, None, None, None

"""H, the sum of x x^T over inputs x, added up in any number of pieces; knows neither models nor methods."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from arrow_quant_v2.engines.one_core import each_on_one_core, tiles
from arrow_quant_v2.errors import QuantizationError

if TYPE_CHECKING:
    from torch import Tensor


class SecondMoment:
    """float32 (columns, columns), of which the upper triangle is kept current, and the number of tokens in it.

    Each tile of it is added to by one thread, so that the sum does not depend on the number of threads.
    """

    def __init__(self, columns: int, device: torch.device | str = "cpu") -> None:
        """Start at zero."""
        self._sum = torch.zeros(columns, columns, device=device)
        self.count = 0

    @property
    def columns(self) -> int:
        """Length of each input."""
        return len(self._sum)

    def add(self, inputs: Tensor) -> None:
        """Add inputs (tokens, columns) float32.

        Raises:
            QuantizationError: they have other columns, or hold NaN or infinity.
        """
        self._demand(inputs.shape[1])
        if not math.isfinite(float(inputs.sum(dtype=torch.float64))):
            raise QuantizationError("the inputs hold NaN or infinity; leave that batch out")

        def add(columns: slice) -> None:
            self._sum[: columns.stop, columns].addmm_(inputs[:, : columns.stop].mT, inputs[:, columns])

        each_on_one_core(add, tiles(inputs.shape[1])[::-1])  # the largest first
        self.count += len(inputs)

    def merge(self, other: SecondMoment, weight: float = 1.0) -> None:
        """Add what another one has seen, `weight` times.

        Raises:
            QuantizationError: it has other columns.
        """
        self._demand(other.columns)
        self._sum.add_(other._sum, alpha=weight)
        self.count += other.count

    @property
    def matrix(self) -> Tensor:
        """H with both its triangles, (columns, columns) float32; not to be changed."""
        for rows in tiles(len(self._sum)):
            inside = self._sum[rows, rows]
            inside.copy_(inside.triu() + inside.triu(1).mT)
            self._sum[rows, : rows.start] = self._sum[: rows.start, rows].mT
        return self._sum

    @classmethod
    def of(cls, matrix: Tensor, count: int) -> SecondMoment:
        """The same again from its matrix and count."""
        result = cls(0)
        result._sum, result.count = matrix, count
        return result

    def _demand(self, columns: int) -> None:
        if columns != self.columns:
            raise QuantizationError(f"the inputs have {columns} columns; those seen before have {self.columns}")

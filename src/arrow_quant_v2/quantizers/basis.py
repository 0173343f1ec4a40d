"""The basis in which a weight is coded: input channels scaled, then turned, so that codes lose less of the outputs.

With x' = turn(x / s) and W' = turn(W s), W' x' = W x: nothing changes before the weight is quantized. Knows nothing of
how a basis is chosen, or of files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from arrow_quant_v2.engines.one_core import tiles
from arrow_quant_v2.kernels.rotation import turn
from arrow_quant_v2.packed import ROTATIONS

if TYPE_CHECKING:
    from torch import Tensor

LARGEST_BLOCK, SMALLEST_BLOCK = 128, 16


@dataclass(frozen=True, kw_only=True, eq=False)
class Basis:
    """Scale s of each input channel, float32 (channels,), and the block of channels that are turned; None: neither."""

    channels: int
    rotation: int | None = None
    equalization: Tensor | None = None

    def weight(self, weight: Tensor) -> Tensor:
        """W (rows, columns) float32 -> W'; columns are channels times places of a kernel."""
        return self._changed(weight, divide=False)

    def inputs(self, rows: Tensor) -> Tensor:
        """Rows x of inputs (tokens, columns) float32 -> x'."""
        return self._changed(rows, divide=True)

    def moment(self, hessian: Tensor) -> Tensor:
        """H (columns, columns) float32 of inputs x -> H of x'."""
        if self.rotation is None and self.equalization is None:
            return hessian
        half, whole = torch.empty_like(hessian), torch.empty_like(hessian)
        for rows in tiles(len(hessian)):
            half[:, rows] = self.inputs(hessian[rows]).mT
        for rows in tiles(len(hessian)):
            whole[rows] = self.inputs(half[rows])
        return whole

    def _changed(self, matrix: Tensor, *, divide: bool) -> Tensor:
        if self.rotation is None and self.equalization is None:
            return matrix
        along = matrix.reshape(len(matrix), self.channels, -1)
        if self.equalization is not None:
            scale = self.equalization[:, None]
            along = along / scale if divide else along * scale
        if self.rotation is not None:
            along = turn(along, self.rotation, axis=1)
        return along.flatten(1)

    def __str__(self) -> str:
        """Like "channels equalized, turned in blocks of 128"; nothing when nothing is changed."""
        words = ["channels equalized"] * (self.equalization is not None)
        words += [f"turned in blocks of {self.rotation}"] * (self.rotation is not None)
        return ", ".join(words)


def rotation_block(channels: int) -> int | None:
    """The largest block, up to 128, that divides the channels; None where only blocks that are too small do."""
    fitting = [block for block in ROTATIONS if SMALLEST_BLOCK <= block <= LARGEST_BLOCK and channels % block == 0]
    return max(fitting, default=None)

"""What a refit of a grid fits: weights seen through a root of H, for codes that stay; knows no grid."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


class Whitened:
    """y = B R, seen through R, where the codes are c R and a zero point is 1 R; sums are float64.

    y is (rows, n) and R (n, n), any root of H = R R^T between the columns of one group.
    """

    def __init__(self, y: Tensor, root: Tensor) -> None:
        self.root, self.y = root, y
        self.one = root.sum(dim=0)
        self.one_one = self.one.to(torch.float64).square().sum()
        self.one_y = self.inner(self.y, self.one)

    def inner(self, a: Tensor, b: Tensor) -> Tensor:
        """(rows, 1) float64: <a, b> of each row."""
        return (a * b).sum(dim=1, keepdim=True).to(torch.float64)

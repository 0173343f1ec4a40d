"""Inputs in 8 bits: what rounding them costs a layer's outputs, and their ranges once their channels are equalized.

Smoothing moves range from inputs to weights before inputs are rounded (SmoothQuant, Xiao et al., 2023, arXiv
2211.10438). Knows nothing of how a basis is chosen, or of files.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from arrow_quant_v2.quantizers.time_aware import LEVELS

if TYPE_CHECKING:
    from torch import Tensor

    from arrow_quant_v2.quantizers.basis import Basis

ENOUGH = 8  # times as many rows as channels


@dataclass(frozen=True, kw_only=True, eq=False)
class Ranges:
    """Where the inputs of a layer lie in each time group: absmax (groups, channels), low and high (groups,).

    A time group that saw nothing has zeros. `count` rows were seen.
    """

    absmax: Tensor
    low: Tensor
    high: Tensor
    count: int

    @property
    def tell_channels(self) -> bool:
        """Whether enough rows were seen to know how far each channel goes."""
        return self.count >= ENOUGH * self.absmax.shape[1]

    def in_basis(self, basis: Basis) -> Ranges:
        """Those of x / s, from what each channel can be at most; of x itself where nothing is equalized.

        Each of k channels was seen n times, all together n k times, and will be seen to go as far: normal numbers go
        sqrt(ln(n k) / ln n) times as far then. Channels that are turned are turned behind the rounding.
        """
        scale = basis.equalization
        if scale is None:
            return self
        more = math.sqrt(math.log(self.count * len(scale)) / math.log(self.count))
        ever = more * self.absmax.amax(dim=0)
        reach = [torch.minimum(ever, side.clamp(min=0.0)[:, None]) / scale for side in (-self.low, self.high)]
        least, most = (one.amax(dim=1) for one in reach)
        return Ranges(absmax=self.absmax / scale, low=-least, high=most, count=self.count)

    def noise(self) -> float:
        """The mean square of what rounding to 8 bits adds to an element: step^2 / 12, a mean over time groups."""
        width = self.high.clamp(min=0.0) - self.low.clamp(max=0.0)
        seen = width > 0.0
        step = width[seen].to(torch.float64) / LEVELS
        return float(step.square().mean()) / 12.0 if seen.any() else 0.0


def rounding_loss(weight: Tensor, ranges: Ranges, basis: Basis) -> float:
    """What rounding the rows that were seen costs the outputs of W (rows, columns): count |W s|^2 times their noise."""
    return ranges.count * float(basis.weight(weight).square().sum(dtype=torch.float64)) * ranges.in_basis(basis).noise()

"""Equalization of input channels: range moved between weights and inputs, with the unquantized function unchanged.

s_j = max|X_j|^alpha / max|W_:j|^(1 - alpha) multiplies a weight's column and divides its input, as in SmoothQuant (Xiao
et al., 2023, arXiv 2211.10438) and DiTAS (Dong & Zhang, 2025, arXiv 2409.07756), where alpha = 0.5. Knows no models.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from arrow_quant_v2.errors import ConfigurationError, QuantizationError
from arrow_quant_v2.quantizers.basis import Basis

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

ALPHAS = (0.25, 0.5, 0.75)
LARGEST_SCALE = 2.0**10  # a channel that is hardly used must not take the range of all others


class SpatialQuantizer:
    """Finds the scales of the input channels of weights that share an input.

    `absmax` (channels,) is the largest magnitude that each input channel was seen with.
    """

    def __init__(self, absmax: Tensor) -> None:
        """Take what was seen of the input.

        Raises:
            QuantizationError: `absmax` is no vector of finite numbers, 0 or more, or all of them are 0.
        """
        if absmax.ndim != 1 or not absmax.isfinite().all() or (absmax < 0).any() or not (absmax > 0).any():
            raise QuantizationError(
                "equalization needs the largest magnitude of each input channel: a vector of finite numbers that are 0"
                " or more, and not all 0"
            )
        self.absmax = absmax.to(torch.float32)

    def equalization(self, weights: Sequence[Tensor], alpha: float) -> Tensor:
        """The scale s of every channel, float32 (channels,), its geometric mean 1; unused channels keep 1.

        weights are (rows, channels, ...) each.

        Raises:
            ConfigurationError: alpha is not between 0 and 1.
            QuantizationError: a weight has other channels.
        """
        if not 0.0 <= alpha <= 1.0:
            raise ConfigurationError(f"alpha is {alpha}; allowed: a number from 0 to 1")
        largest = torch.stack([self._column_absmax(weight) for weight in weights]).amax(dim=0)
        used = (self.absmax > 0.0) & (largest > 0.0)
        logs = alpha * self.absmax.log2() - (1.0 - alpha) * largest.log2()
        logs = torch.where(used, logs - logs[used].mean(), 0.0) if used.any() else torch.zeros_like(logs)
        limit = math.log2(LARGEST_SCALE)
        return logs.clamp(-limit, limit).exp2()

    def basis(self, weights: Sequence[Tensor], alpha: float) -> Basis:
        """The same as a basis that weights are coded in.

        Raises:
            ConfigurationError: alpha is not between 0 and 1.
            QuantizationError: a weight has other channels.
        """
        return Basis(channels=len(self.absmax), equalization=self.equalization(weights, alpha))

    def _column_absmax(self, weight: Tensor) -> Tensor:
        if weight.ndim < 2 or weight.shape[1] != len(self.absmax):  # noqa: PLR2004 - a matrix
            raise QuantizationError(
                f"equalization: a weight is {list(weight.shape)}; its second axis must be the"
                f" {len(self.absmax)} input channels"
            )
        return weight.to(torch.float32).flatten(2).abs().amax(dim=(0, 2)) if weight.ndim > 2 else _matrix_absmax(weight)  # noqa: PLR2004


def _matrix_absmax(weight: Tensor) -> Tensor:
    return weight.to(torch.float32).abs().amax(dim=0)

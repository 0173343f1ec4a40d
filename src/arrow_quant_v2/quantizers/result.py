"""What every quantizer returns for some rows of one matrix; knows nothing of methods."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from arrow_quant_v2.errors import QuantizationError
from arrow_quant_v2.packed import PackedTensor, WeightError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from arrow_quant_v2.packed import Bytes, Floats, Halfwords, Layout


@dataclass(frozen=True, kw_only=True, eq=False)
class QuantizedRows:
    """Codes and parameters as in PackedTensor, and float64 (rows, 3) sums of w^2, q^2 and (w - q)^2."""

    codes: Bytes
    scales: Bytes
    zero_points: Bytes | None
    row_scales: Halfwords
    sums: NDArray[np.float64]

    @classmethod
    def of(cls, codes: Tensor, scales: Tensor, zero_points: Tensor, row_scales: Tensor, sums: Tensor) -> QuantizedRows:
        """The same from tensors as the operators give them, on any device; zero points are empty where symmetric."""
        return cls(
            codes=codes.cpu().numpy(),
            scales=scales.cpu().numpy(),
            zero_points=zero_points.cpu().numpy() if zero_points.numel() else None,
            row_scales=row_scales.cpu().view(torch.uint16).numpy(),
            sums=sums.cpu().numpy(),
        )

    def packed(
        self, name: str, dtype: str, layout: Layout, *, rotation: int | None = None, equalization: Floats | None = None
    ) -> PackedTensor:
        """All rows of a tensor, as they are stored.

        Raises:
            QuantizationError: they do not fit the layout.
        """
        return PackedTensor(
            name=name,
            dtype=dtype,
            layout=layout,
            codes=self.codes,
            scales=self.scales,
            zero_points=self.zero_points,
            row_scales=self.row_scales,
            rotation=rotation,
            equalization=equalization,
        )


def joined(parts: Sequence[QuantizedRows]) -> QuantizedRows:
    """The rows of all parts, in their order."""
    if len(parts) == 1:
        return parts[0]
    zero_points = [part.zero_points for part in parts if part.zero_points is not None]
    return QuantizedRows(
        codes=np.concatenate([part.codes for part in parts]),
        scales=np.concatenate([part.scales for part in parts]),
        zero_points=np.concatenate(zero_points) if zero_points else None,
        row_scales=np.concatenate([part.row_scales for part in parts]),
        sums=np.concatenate([part.sums for part in parts]),
    )


def not_finite(
    values: torch.Tensor, name: str, shape: tuple[int, ...], *, offset: int = 0, remedy: str = "repair it"
) -> QuantizationError:
    """The error for values that no grid fits: names the first NaN, infinity, or number too large for float32.

    `values` are the elements from `offset` on of a tensor of this shape.
    """
    flat = values.reshape(-1)
    wrong = (~torch.isfinite(flat.to(torch.float32))).nonzero()
    if not len(wrong):
        return QuantizationError(f"{name}: holds values whose squares are not finite in float32; {remedy}")
    at = int(wrong[0])
    position = [int(i) for i in np.unravel_index(offset + at, shape)] if shape else []
    return QuantizationError(
        f"{name}: the value at {position} is {float(flat[at].to(torch.float64))}; weights are finite float32 numbers:"
        f" {remedy}"
    )


def weight_error(sums: NDArray[np.float64], count: int) -> WeightError:
    """The error over all rows, correctly rounded, so that it does not depend on how the rows were cut."""
    original, quantized, difference = (math.fsum(column.tolist()) for column in sums.T)
    return WeightError(original=original, quantized=quantized, difference=difference, count=count)

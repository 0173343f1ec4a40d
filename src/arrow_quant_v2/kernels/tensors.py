"""PackedTensor to torch tensors and back to weights; knows nothing of files or methods."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from arrow_quant_v2.kernels import cpu, ops
from arrow_quant_v2.kernels.rotation import unturn

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from arrow_quant_v2.packed import PackedTensor


AT_ONCE = 4096  # rows that have copies at the same time


class _Shared:
    """Another array's memory without its read-only flag, which torch has no notion of; nothing here writes to it."""

    def __init__(self, array: NDArray[Any]) -> None:
        self.__array_interface__ = {**array.__array_interface__, "data": (array.ctypes.data, False)}
        self.owner = array


def shared_tensor(array: NDArray[Any]) -> torch.Tensor:
    """The same memory as a tensor, also where it is a read-only map of a file."""
    usable = array if array.flags.writeable or not array.size else np.asarray(_Shared(array))
    return torch.from_numpy(usable if array.size else array.copy())


def dequantized(packed: PackedTensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Codes -> (rows, columns) of the original weight, whatever was done to its channels before it was coded.

    Computed in float32 and rounded once to `dtype` (any floating dtype): unturn(stored) / equalization.
    """
    if packed.rotation is None and packed.equalization is None:
        return stored_weight(packed, dtype)
    weight = stored_weight(packed)
    for start in range(0, packed.rows, AT_ONCE):
        some = weight[start : start + AT_ONCE]
        some.copy_(_unchanged(some, packed))
    return weight.to(dtype)


def _unchanged(stored: torch.Tensor, packed: PackedTensor) -> torch.Tensor:
    """Some rows of the weight as it was before its channels were equalized and turned."""
    along = stored.reshape(len(stored), packed.layout.channels or 1, -1)  # (rows, channels, kernel)
    if packed.rotation is not None:
        along = unturn(along, packed.rotation, axis=1)
    if packed.equalization is not None:
        along = along / shared_tensor(packed.equalization)[:, None]
    return along.flatten(1)


def stored_weight(packed: PackedTensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Codes -> (rows, columns) as they were coded: equalized and turned, for a layer whose input is so too."""
    cpu.activate()
    layout = packed.layout
    zeros = np.empty((packed.rows, 0), np.uint8) if packed.zero_points is None else packed.zero_points
    dequantize = ops.dequantize_r2q if layout.grid == "r2q" else ops.dequantize
    weight: torch.Tensor = dequantize(
        shared_tensor(packed.codes),
        shared_tensor(packed.scales),
        shared_tensor(zeros),
        shared_tensor(packed.row_scales).view(torch.bfloat16),
        layout.bits,
        layout.columns,
        layout.group,
        dtype if dtype in ops.FLOATS else torch.float32,
    )
    return weight if weight.dtype == dtype else weight.to(dtype)

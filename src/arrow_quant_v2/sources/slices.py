"""What a caller of `Source.read` asked for, checked, and flat slices of tensors in memory. Knows no files."""

from __future__ import annotations

import difflib
import math
from typing import TYPE_CHECKING, TypeVar

import torch

from arrow_quant_v2.errors import SourceError
from arrow_quant_v2.packed import ITEM_BITS, TensorInfo

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

T = TypeVar("T")


def find(table: Mapping[str, T], name: str, location: str) -> T:
    """The entry called `name`.

    Raises:
        SourceError: there is none; the message names the nearest.
    """
    if name in table:
        return table[name]
    near = difflib.get_close_matches(name, table, n=3, cutoff=0.4)
    hint = f"; the nearest of its {len(table)} are {', '.join(near)}" if near else f"; it holds {len(table)}"
    raise SourceError(f"{location}: has no tensor {name!r}{hint}")


def bounds(info: TensorInfo, start: int, stop: int | None, location: str) -> tuple[int, int]:
    """The slice [start, stop) in elements, `stop` filled in.

    Raises:
        SourceError: it lies outside the tensor.
    """
    end = info.numel if stop is None else stop
    if not 0 <= start <= end <= info.numel:
        raise SourceError(
            f"{location}: {info.name}: elements {start} to {end} were asked for; it has {info.numel} {info.shape}"
        )
    return start, end


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a name in `packed.ITEM_BITS`."""
    found: torch.dtype = getattr(torch, name)
    return found


def describe(name: str, tensor: torch.Tensor, location: str) -> TensorInfo:
    """Name, shape and dtype of a tensor in memory.

    Raises:
        SourceError: its dtype or layout is none that weights are stored in.
    """
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in ITEM_BITS:
        raise unknown_dtype(name, dtype, location)
    if tensor.layout is not torch.strided or tensor.is_meta:
        found = "has no values (device meta)" if tensor.is_meta else f"is stored as {tensor.layout}"
        raise SourceError(f"{location}: {name}: {found}; an ordinary dense tensor is needed")
    return TensorInfo(name=name, shape=tuple(tensor.shape), dtype=dtype)


def unknown_dtype(name: str, dtype: str, location: str) -> SourceError:
    """The error for a dtype that we do not read."""
    return SourceError(
        f"{location}: {name}: has dtype {dtype}; allowed are {', '.join(ITEM_BITS)}: cast it and save the model again"
    )


def flat_slice(tensor: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """A fresh copy of elements [start, stop) of the flattened tensor, on the CPU.

    Of a tensor that is not contiguous only the rows that the slice touches are gathered.
    """
    if not tensor.is_contiguous():
        row = math.prod(tensor.shape[1:])
        first = start // row
        tensor = tensor[first : -(-stop // row)]
        start, stop = start - first * row, stop - first * row
    piece = tensor.detach().reshape(-1)[start:stop]
    return piece.clone() if piece.device.type == "cpu" else piece.cpu()


def reading_buffer(count: int, dtype: str) -> tuple[torch.Tensor, memoryview]:
    """A fresh 1-D tensor, and its bytes to be filled."""
    tensor = torch.empty(count, dtype=torch_dtype(dtype))
    values: NDArray[np.uint8] = tensor.view(torch.uint8).numpy()
    return tensor, values.data


def as_tensor(values: NDArray[np.uint8], dtype: str) -> torch.Tensor:
    """The bytes as a 1-D tensor; copied only where they do not lie at a multiple of an element's size."""
    wanted = torch_dtype(dtype)
    if len(values) and not values.ctypes.data % wanted.itemsize:
        return torch.from_numpy(values).view(wanted)
    tensor, view = reading_buffer(len(values) // wanted.itemsize, dtype)
    view[:] = values.data
    return tensor

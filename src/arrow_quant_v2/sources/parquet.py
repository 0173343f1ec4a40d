"""Our own quantized models as a source: every tensor in its original dtype, dequantized slice by slice.

Knows nothing of how the codes were chosen.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch

from arrow_quant_v2.kernels.tensors import dequantized, shared_tensor
from arrow_quant_v2.sources.slices import bounds, find, torch_dtype
from arrow_quant_v2.store.reader import StoredModel
from arrow_quant_v2.store.record import RawTensor

if TYPE_CHECKING:
    from pathlib import Path

    from arrow_quant_v2.packed import PackedTensor, TensorInfo
    from arrow_quant_v2.store.record import Payload

LAYERS_AT_HAND = 4  # slices of one layer come one after the other; its checksum is checked once


class ParquetSource:
    """The tensors of a folder of Parquet V2 Extended files."""

    def __init__(self, folder: Path) -> None:
        """Open the files; no codes are read.

        Raises:
            StoreError: a file is damaged, incomplete, or newer than this program.
        """
        self.stored = StoredModel(folder)
        self._infos = {one.layer_name: one.info for one in self.stored.entries if one.chunk == 0}
        self._chunks = lru_cache(maxsize=LAYERS_AT_HAND)(self.stored.read)

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """Every tensor, sorted by name."""
        return tuple(self._infos[name] for name in sorted(self._infos))

    @property
    def quantized(self) -> frozenset[str]:
        """Names of the tensors that are stored as codes."""
        return frozenset(one.layer_name for one in self.stored.entries if one.layout is not None)

    @property
    def location(self) -> str:
        """The folder."""
        return str(self.stored.path)

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """The Parquet files."""
        return self.stored.files

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Elements [start, stop) of the flattened, dequantized tensor, 1-D, fresh, in the original dtype.

        Raises:
            SourceError: the tensor is unknown, or the slice lies outside it.
            StoreError: its bytes cannot be found, or are not those that were written.
        """
        info = find(self._infos, name, self.location)
        start, stop = bounds(info, start, stop, self.location)
        parts = [part for chunk in self._chunks(name) if (part := _elements(chunk, start, stop)) is not None]
        if not parts:
            return torch.empty(0, dtype=torch_dtype(info.dtype))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def close(self) -> None:
        """Let go of the files."""
        self._chunks.cache_clear()
        self.stored.close()


def _elements(chunk: Payload, start: int, stop: int) -> torch.Tensor | None:
    """The elements of [start, stop) that lie in this chunk; None where there are none."""
    if isinstance(chunk, RawTensor):
        return _raw_elements(chunk, max(start, chunk.start), min(stop, chunk.stop))
    columns = chunk.layout.columns
    first, last = max(start // columns, chunk.first_row), min(-(-stop // columns), chunk.first_row + chunk.rows)
    if first >= last:
        return None
    weight = dequantized(_rows(chunk, first, last), torch_dtype(chunk.dtype)).reshape(-1)
    return weight[max(0, start - first * columns) : stop - first * columns]


def _raw_elements(chunk: RawTensor, start: int, stop: int) -> torch.Tensor | None:
    if start >= stop:
        return None
    size = chunk.item_bytes
    values = chunk.values[(start - chunk.start) * size : (stop - chunk.start) * size]
    return shared_tensor(values).clone().view(torch_dtype(chunk.dtype))


def _rows(chunk: PackedTensor, first: int, last: int) -> PackedTensor:
    part = np.s_[first - chunk.first_row : last - chunk.first_row]
    return replace(
        chunk,
        codes=chunk.codes[part],
        scales=chunk.scales[part],
        zero_points=None if chunk.zero_points is None else chunk.zero_points[part],
        row_scales=chunk.row_scales[part],
        first_row=first,
    )

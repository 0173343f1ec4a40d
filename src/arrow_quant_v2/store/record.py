"""What one row of the file holds: a layer's facts and its payload. Knows nothing of Parquet or of quantizers."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from arrow_quant_v2.errors import StoreError
from arrow_quant_v2.packed import ITEM_BITS, Bytes, PackedTensor, TensorInfo
from arrow_quant_v2.store.crc32 import crc32
from arrow_quant_v2.store.sizes import PayloadSizes, packed_sizes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

Structure: TypeAlias = "Mapping[str, Any]"

# data, scales, zero_points, row_scales as the file holds them: flat bytes, None where there is nothing
PayloadBytes: TypeAlias = "tuple[Bytes, Bytes | None, Bytes | None, Bytes | None]"


@dataclass(frozen=True, kw_only=True, eq=False)
class RawTensor:
    """The untouched values of a tensor, or the elements from `start` on of one that was too large for one row.

    `values` is uint8, one-dimensional, little-endian; it may lie unaligned in a memory map.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    values: Bytes
    start: int = 0

    def __post_init__(self) -> None:
        """Refuse bytes that are not whole elements of this tensor.

        Raises:
            StoreError: the dtype is unknown, or the bytes do not fit the shape.
        """
        if self.dtype not in ITEM_BITS:
            raise StoreError(f"{self.name}: dtype {self.dtype!r} cannot be stored; known are {', '.join(ITEM_BITS)}")
        if self.values.dtype != np.uint8 or self.values.ndim != 1:
            raise StoreError(
                f"{self.name}: values are {self.values.dtype} {self.values.shape}; hand over flat uint8 bytes"
            )
        if self.values.size % self.item_bytes or not 0 <= self.start <= self.stop <= self.info.numel:
            raise StoreError(
                f"{self.name}: {self.values.size} bytes from element {self.start} do not lie within"
                f" {self.info.numel} elements of {self.dtype}; hand over whole elements"
            )

    @property
    def info(self) -> TensorInfo:
        """Name, shape and dtype of the whole tensor."""
        return TensorInfo(name=self.name, shape=self.shape, dtype=self.dtype)

    @property
    def item_bytes(self) -> int:
        """Bytes of one element."""
        return ITEM_BITS[self.dtype] // 8

    @property
    def stop(self) -> int:
        """The element after the last one held here."""
        return self.start + self.values.size // self.item_bytes

    @property
    def nbytes(self) -> int:
        """Every stored byte."""
        return int(self.values.nbytes)


Payload: TypeAlias = PackedTensor | RawTensor


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerRecord:
    """One row: the payload of a layer, or of one chunk of it, and what is known of the whole layer.

    All but `payload` and `chunk` is the same in every chunk of a layer. `source_checksum` is the CRC-32 of
    the original tensor's bytes, `decision` the text of its Decision. The three structures follow
    `schema.SCHEMA`; None where the feature is off. Equalization scales are the payload's: written, they stand in
    `spatial_quant`.
    """

    payload: Payload
    chunk: int = 0
    bits_per_weight: float
    source_checksum: int
    decision: str
    method: str | None = None
    cosine_similarity: float | None = None
    mse: float | None = None
    output_error: list[float] | None = None
    modality: str | None = None
    is_diffusion_model: bool = True
    time_aware_quant: Structure | None = None
    spatial_quant: Structure | None = None
    activation_stats: Structure | None = None


def payload_bytes(payload: Payload) -> PayloadBytes:
    """The four payload columns of one row, in the order of the schema; copies nothing that is contiguous."""
    if isinstance(payload, RawTensor):
        return np.ascontiguousarray(payload.values), None, None, None
    scales = None if payload.layout.grid == "row" else _flat(payload.scales)
    zero_points = None if payload.zero_points is None else _flat(payload.zero_points)
    return _flat(payload.codes), scales, zero_points, _little_endian(payload)


def payload_sizes(payload: Payload) -> PayloadSizes:
    """Bytes of each payload column of one row."""
    if isinstance(payload, RawTensor):
        return payload.nbytes, None, None, None
    return packed_sizes(payload.layout, payload.rows, symmetric=payload.zero_points is None)


def checksum(columns: PayloadBytes) -> int:
    """CRC-32 (zlib's) over data, then scales, zero_points and row_scales; a null adds nothing."""
    crc = 0
    for column in columns:
        if column is not None:
            crc = crc32(column, crc)
    return crc


def split(payload: Payload, chunk_bytes: int) -> Iterator[Payload]:
    """The payload in pieces of at most `chunk_bytes`, at least one row or element each; views, no copies."""
    if isinstance(payload, RawTensor):
        yield from _split_raw(payload, chunk_bytes)
    else:
        yield from _split_packed(payload, chunk_bytes)


def ranges(count: int, item_bytes: int, chunk_bytes: int) -> Iterator[tuple[int, int]]:
    """`count` rows (or elements) of `item_bytes` each as [start, stop) ranges of at most `chunk_bytes`."""
    step = max(1, chunk_bytes // max(1, item_bytes))
    for start in range(0, max(1, count), step):
        yield start, min(count, start + step)


def _split_raw(tensor: RawTensor, chunk_bytes: int) -> Iterator[RawTensor]:
    size = tensor.item_bytes
    for start, stop in ranges(tensor.stop - tensor.start, size, chunk_bytes):
        yield RawTensor(
            name=tensor.name,
            shape=tensor.shape,
            dtype=tensor.dtype,
            values=tensor.values[start * size : stop * size],
            start=tensor.start + start,
        )


def _split_packed(tensor: PackedTensor, chunk_bytes: int) -> Iterator[PackedTensor]:
    of_rows = sum(size or 0 for size in payload_sizes(tensor))
    for start, stop in ranges(tensor.rows, math.ceil(of_rows / max(1, tensor.rows)), chunk_bytes):
        yield replace(
            tensor,
            codes=tensor.codes[start:stop],
            scales=tensor.scales[start:stop],
            zero_points=None if tensor.zero_points is None else tensor.zero_points[start:stop],
            row_scales=tensor.row_scales[start:stop],
            first_row=tensor.first_row + start,
        )


def _flat(array: Bytes) -> Bytes:
    return np.ascontiguousarray(array).reshape(-1)


def _little_endian(tensor: PackedTensor) -> Bytes:
    halfwords = np.ascontiguousarray(tensor.row_scales)
    if sys.byteorder == "big":
        halfwords = halfwords.byteswap()
    return halfwords.view(np.uint8)

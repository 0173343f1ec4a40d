"""A stored model: its layers listed without their bytes, and loaded one by one, checked. Knows no torch."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from arrow_quant_v2.errors import ChecksumError, StoreError
from arrow_quant_v2.packed import WHOLE, PackedTensor
from arrow_quant_v2.store.entries import by_layer, entry
from arrow_quant_v2.store.mapped import MappedFile, explained
from arrow_quant_v2.store.record import LayerRecord, RawTensor, checksum
from arrow_quant_v2.store.schema import AGREEING_KEYS, PAYLOAD

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from types import TracebackType

    from typing_extensions import Self

    from arrow_quant_v2.packed import Bytes, Halfwords
    from arrow_quant_v2.store.entries import LayerEntry
    from arrow_quant_v2.store.record import Payload, PayloadBytes


class StoredModel:
    """All layers of a folder of Parquet files, or of one file, memory-mapped.

    Every small column is read and checked on opening, no byte of any payload. Arrays handed out are
    read-only views on the map and keep it alive, also after `close`. All methods are safe from several
    threads at once.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open every `*.parquet` that lies directly in the folder, or the one file.

        Raises:
            StoreError: nothing to open, or a file is damaged, incomplete or of another model.
            SchemaVersionError: a file is newer than this program.
        """
        self.path = Path(path)
        self._files = {file: _StoredFile(file) for file in _parquet_files(self.path)}
        self._layers = by_layer(one for file in self._files.values() for one in file.entries)
        self.metadata: Mapping[str, str] = _agreed({path: file.metadata for path, file in self._files.items()})

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of this model, sorted."""
        return tuple(self._files)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all layers, sorted."""
        return tuple(self._layers)

    @property
    def entries(self) -> tuple[LayerEntry, ...]:
        """Every row: layers sorted by name, their chunks in order."""
        return tuple(one for chunks in self._layers.values() for one in chunks)

    def file_metadata(self, file: Path) -> Mapping[str, str]:
        """The key-value metadata of one of `files`."""
        return self._files[file].metadata

    def chunks(self, name: str) -> tuple[LayerEntry, ...]:
        """The rows of one layer, nearly always one.

        Raises:
            StoreError: no such layer.
        """
        if name not in self._layers:
            raise StoreError(f"{self.path} holds no layer {name!r}; it has {len(self._layers)}, see `names`")
        return self._layers[name]

    def read(self, name: str) -> tuple[Payload, ...]:
        """The payload of one layer, chunk by chunk; no other layer's bytes are touched.

        Raises:
            StoreError: no such layer, or its bytes cannot be found.
            ChecksumError: they are not the bytes that were written.
        """
        return tuple(self.read_chunk(one) for one in self.chunks(name))

    def read_chunk(self, one: LayerEntry) -> Payload:
        """The payload of one row.

        Raises:
            StoreError: its bytes cannot be found.
            ChecksumError: they are not the bytes that were written.
        """
        if one.file not in self._files:
            raise StoreError(f"{one.where} is not open in {self.path}: it was closed, or the entry is another model's")
        columns = self._files[one.file].payload(one)
        found = checksum(columns)
        if found != one.checksum:
            raise ChecksumError(
                f"{one.where}: checksum is {found:#010x}, expected {one.checksum:#010x}; the file is damaged:"
                " restore it or quantize again"
            )
        return _payload(one, columns)

    def read_all(self, threads: int | None = None) -> dict[str, tuple[Payload, ...]]:
        """Every layer, checked by several threads, by name.

        Raises:
            StoreError: as `read`.
            ChecksumError: as `read`.
        """
        largest_first = sorted(self.entries, key=lambda one: -one.stored_bytes)
        with ThreadPoolExecutor(threads or min(8, os.cpu_count() or 1)) as pool:
            read = dict(zip(largest_first, pool.map(self.read_chunk, largest_first), strict=True))
        return {name: tuple(read[one] for one in chunks) for name, chunks in self._layers.items()}

    def records(self) -> Iterator[LayerRecord]:
        """Every row as it was given to the writer, one at a time, in the order of `entries`."""
        for one in self.entries:
            yield self.record(one)

    def record(self, one: LayerEntry) -> LayerRecord:
        """One row as it was given to the writer.

        Raises:
            StoreError: as `read_chunk`.
            ChecksumError: as `read_chunk`.
        """
        return _record(one, self.read_chunk(one))

    def close(self) -> None:
        """Let go of the files; arrays handed out stay valid, reading is an error."""
        self._files = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _StoredFile:
    """One file: its entries, and the bytes behind them."""

    def __init__(self, path: Path) -> None:
        self._file = MappedFile(path)
        self.metadata: Mapping[str, str] = self._file.metadata
        self.entries = tuple(
            entry(facts, file=path, row=row, version=self._file.version) for row, facts in enumerate(self._file.facts)
        )

    def payload(self, one: LayerEntry) -> PayloadBytes:
        """The four payload columns of one row, of the sizes that its layout asks, their content unchecked."""
        data, scales, zero_points, row_scales = (
            self._value(one, column, size) for column, size in zip(PAYLOAD.names, one.sizes, strict=True)
        )
        if data is None:
            raise StoreError(f"{one.where}: data is null; every row has data")
        return data, scales, zero_points, row_scales

    def _value(self, one: LayerEntry, column: str, size: int | None) -> Bytes | None:
        if size is None:
            self._refuse_surplus(one, column)
            return None
        value = self._file.value(column, one.row, size)
        if value is None or value.size != size:
            found = "null" if value is None else f"{value.size} bytes"
            raise StoreError(f"{one.where}: {column} is {found}; its layout asks for {size} bytes")
        return value

    def _refuse_surplus(self, one: LayerEntry, column: str) -> None:
        """A parameter that the layout has no use for, so that nobody takes it for one that counts."""
        if one.layout is not None and self._file.has(column, one.row):
            raise StoreError(f"{one.where}: {column} is there; its layout asks for none")


def _parquet_files(path: Path) -> list[Path]:
    with explained(path):
        if not path.is_dir():
            return [path]
        files = sorted(path.glob("*.parquet"))
    if not files:
        raise StoreError(f"{path} holds no *.parquet file; give the folder that `arrow-quant quantize` wrote")
    return files


def _agreed(found: Mapping[Path, Mapping[str, str]]) -> Mapping[str, str]:
    """The metadata of the first file, once all files are known to belong to one model."""
    (first, metadata), *others = found.items()
    for other, its in others:
        for key in AGREEING_KEYS:
            if its.get(key) != metadata.get(key):
                raise StoreError(
                    f"{other}: its {key} differs from that of {first}; files of different models are mixed"
                )
    return metadata


def _payload(one: LayerEntry, columns: PayloadBytes) -> Payload:
    data, scales, zero_points, row_scales = columns
    layout = one.layout
    if layout is None or row_scales is None:
        return RawTensor(name=one.layer_name, shape=one.shape, dtype=one.dtype, values=data, start=one.row_start)
    rows = one.row_stop - one.row_start
    return PackedTensor(
        name=one.layer_name,
        dtype=one.dtype,
        layout=layout,
        codes=data.reshape(rows, layout.row_bytes),
        scales=np.full((rows, 1), WHOLE, np.uint8) if scales is None else scales.reshape(rows, layout.scales_per_row),
        zero_points=None if zero_points is None else zero_points.reshape(rows, layout.groups),
        row_scales=_halfwords(row_scales),
        first_row=one.row_start,
        rotation=one.rotation,
        equalization=one.equalization,
    )


def _halfwords(row_scales: Bytes) -> Halfwords:
    """A copy, because the map gives no alignment."""
    return np.frombuffer(row_scales.tobytes(), "<u2").astype(np.uint16)


def _record(one: LayerEntry, payload: Payload) -> LayerRecord:
    return LayerRecord(
        payload=payload,
        chunk=one.chunk,
        bits_per_weight=one.bits_per_weight,
        source_checksum=one.source_checksum,
        decision=one.decision,
        method=one.method,
        cosine_similarity=one.cosine_similarity,
        mse=one.mse,
        output_error=one.output_error,
        modality=one.modality,
        is_diffusion_model=one.is_diffusion_model,
        time_aware_quant=one.time_aware_quant,
        spatial_quant=one.spatial_quant,
        activation_stats=one.activation_stats,
    )

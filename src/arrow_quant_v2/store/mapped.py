"""One Parquet file in memory-mapped bytes: its metadata, its small columns, and any single value.

Knows Parquet, but not what the values mean. No footer that came from elsewhere is asked for its column chunks:
pyarrow 26 ends the whole process on some damaged ones (an unknown codec, a histogram of the wrong size).
"""

from __future__ import annotations

import contextlib
import mmap
import stat
from bisect import bisect_right
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from arrow_quant_v2.errors import StoreError
from arrow_quant_v2.store.schema import FACTS, PAYLOAD, check_columns, check_version, columns_of
from arrow_quant_v2.store.seal import sealed_offsets

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from arrow_quant_v2.packed import Bytes

ARROW_KEY = b"ARROW:schema"


class MappedFile:
    """A file of ours, opened, of a version that this program reads, with every column it needs."""

    def __init__(self, path: Path) -> None:
        """Map the file and parse its footer.

        Raises:
            StoreError: the file is missing, truncated, garbage, no model of ours, lacks a column or has one that
                cannot be decoded or is of another type than the schema's.
            SchemaVersionError: the file is newer than this program.
            ChecksumError: the footer is not the one that was written.
        """
        self.path = path
        with explained(path):
            self._map = _mapped(path)
            self._content: Bytes = np.frombuffer(self._map, np.uint8)
            self._offsets = sealed_offsets(path, self._content)
            parquet = self._open()
            self._footer = parquet.metadata
            found = self._footer.metadata or {}
            self.metadata = {key.decode(): text.decode() for key, text in found.items() if key != ARROW_KEY}
            names = set(parquet.schema_arrow.names)
        self.version = check_version(path, self.metadata)
        check_columns(path, names, self.version)
        self.facts = self._facts(parquet, names)
        """The small columns, row by row; the bytes of the payload are not touched."""

    def _facts(self, parquet: pq.ParquetFile, there: set[str]) -> list[dict[str, Any]]:
        names = [name for name in columns_of(self.version) if name in there and name in FACTS.names]
        with explained(self.path):
            table = parquet.read(columns=names, use_threads=False)
            columns = [_of_type(table.column(name), FACTS.field(name).type) for name in names]
            return pa.Table.from_arrays(columns, names=names).to_pylist()

    def value(self, column: str, row: int, size: int) -> Bytes | None:
        """One value, of `size` bytes if it is what it should be; None for a null.

        A sealed file is not copied: the value is a view on the map. Any other is decoded.

        Raises:
            StoreError: the column cannot be decoded.
        """
        start = self._sealed(column, row)
        if start:
            return self._content[start : start + size]
        with explained(self.path):
            return self._decoded(column, row)

    def has(self, column: str, row: int) -> bool:
        """Whether there is a value, and not a null; of a sealed file the seal's word is taken.

        Raises:
            StoreError: the column cannot be decoded.
        """
        start = self._sealed(column, row)
        if start is not None:
            return start > 0
        with explained(self.path):
            return self._decoded(column, row) is not None

    def _sealed(self, column: str, row: int) -> int | None:
        """Where the seal says that a value lies, 0 where it does not say; None without a seal."""
        if self._offsets is None or row >= len(self._offsets):
            return None
        return int(self._offsets[row, PAYLOAD.names.index(column)])

    def _decoded(self, column: str, row: int) -> Bytes | None:
        group = bisect_right(self._group_ends, row)
        first = self._group_ends[group - 1] if group else 0
        table = self._open().read_row_group(group, columns=[column], use_threads=False)
        value: Any = table.column(column).cast(pa.large_binary())[row - first]
        content = value.as_buffer()
        return None if content is None else np.frombuffer(content, np.uint8)

    @cached_property
    def _group_ends(self) -> list[int]:
        """The row after the last one of every row group, counted in the smallest column."""
        parquet = self._open()
        groups = range(parquet.num_row_groups)
        return list(accumulate(parquet.read_row_group(group, columns=["chunk"]).num_rows for group in groups))

    def _open(self) -> pq.ParquetFile:
        """A reader of its own for every call, because a ParquetFile is not for several threads."""
        return pq.ParquetFile(
            pa.BufferReader(pa.py_buffer(self._map)),
            metadata=getattr(self, "_footer", None),
            page_checksum_verification=True,
        )


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn whatever the disk or Arrow says about a damaged file into one StoreError that names it."""
    try:
        yield
    except (OSError, pa.ArrowException, ValueError, TypeError, LookupError, OverflowError, MemoryError) as problem:
        said = str(problem).rstrip(".")
        raise StoreError(
            f"{path} cannot be read: {said}; it is missing, truncated or damaged: restore it or quantize again"
        ) from problem


def _of_type(column: pa.ChunkedArray[Any], asked: pa.DataType) -> pa.ChunkedArray[Any]:
    """The column itself, where it is that already: a cast takes as long as reading it."""
    return column if column.type == asked else column.cast(asked)


def _mapped(path: Path) -> mmap.mmap:
    if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for ever
        raise StoreError(f"{path}: not a regular file; a model is read from files on a disk")
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

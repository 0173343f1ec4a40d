"""Records go into a Parquet file that appears whole or not at all. Knows nothing of what the codes mean."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from arrow_quant_v2.errors import StoreError
from arrow_quant_v2.store.places import value_offsets
from arrow_quant_v2.store.record import payload_sizes
from arrow_quant_v2.store.rows import record_batch
from arrow_quant_v2.store.schema import SCHEMA, file_metadata
from arrow_quant_v2.store.seal import seal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from types import TracebackType

    from typing_extensions import Self

    from arrow_quant_v2.store.record import LayerRecord
    from arrow_quant_v2.store.sizes import PayloadSizes

TEMPORARY_SUFFIX = ".tmp"

# Every value lies plainly in one page per column and row group, so that a reader finds it by arithmetic.
# Page checksums guard the small columns; the `checksum` column guards the payload.
_PLAIN: dict[str, Any] = {
    "version": "2.6",
    "data_page_version": "1.0",
    "compression": "none",
    "use_dictionary": False,
    "write_statistics": ["layer_name"],
    "data_page_size": 2**31 - 1,
    "write_page_checksum": True,
    "store_schema": True,
}


def write_part(path: str | os.PathLike[str], records: Iterable[LayerRecord], metadata: Mapping[str, str]) -> None:
    """Write one row group per record, in their order, and rename the file into place when all is written.

    One record is in memory at a time, and up to twice more of its payload inside Arrow. Nothing is fsynced;
    see `make_durable`. Errors of `records` itself pass through unchanged. Equal records and metadata give
    equal bytes.

    Raises:
        StoreError: nothing to write, a record cannot be stored, the disk is full, no permission ...
    """
    with _Part(Path(path), metadata) as part:
        for record in records:
            part.append([record])
        part.publish()


def write_group(path: str | os.PathLike[str], records: Sequence[LayerRecord], metadata: Mapping[str, str]) -> None:
    """Write all records as one row group, for many small layers; otherwise as `write_part`.

    Raises:
        StoreError: as `write_part`.
    """
    with _Part(Path(path), metadata) as part:
        part.append(records)
        part.publish()


def make_durable(path: str | os.PathLike[str]) -> None:
    """Return once the file and its name in the folder are on the disk.

    Raises:
        StoreError: the disk refuses.
    """
    with explained(path):
        fsync(Path(path))
        if os.name == "posix":  # elsewhere a folder cannot be opened
            fsync(Path(path).parent)


class _Part:
    """A file under its temporary name; gone unless it is published."""

    def __init__(self, path: Path, metadata: Mapping[str, str]) -> None:
        self._path = path
        self._temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
        self._metadata = file_metadata(metadata)
        self._seen: set[tuple[str, int]] = set()
        self._sizes: list[list[PayloadSizes]] = []

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as undo, explained(self._path):
            undo.callback(_unless_gone, self._temporary.unlink)
            self._sink = pa.OSFile(str(self._temporary), "wb")
            undo.callback(_unless_gone, self._sink.close)
            self._writer = pq.ParquetWriter(self._sink, SCHEMA.with_metadata(dict(self._metadata)), **_PLAIN)
            self._undo = undo.pop_all()
        return self

    def append(self, records: Sequence[LayerRecord]) -> None:
        """Write the records as one row group."""
        self._refuse_repetition(records)
        with explained(self._path):
            self._writer.write_batch(record_batch(records), row_group_size=max(1, len(records)))
        self._sizes.append([payload_sizes(record.payload) for record in records])

    def publish(self) -> None:
        """Write the footer and give the file its name."""
        if not self._seen:
            raise StoreError(f"{self._path}: no records; a file holds at least one layer")
        with explained(self._path):
            self._writer.close()
            self._sink.close()
            seal(self._temporary, value_offsets(self._temporary, self._sizes))
            self._temporary.replace(self._path)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.is_open = False  # or it would write a footer when it is collected
        self._undo.close()

    def _refuse_repetition(self, records: Sequence[LayerRecord]) -> None:
        for record in records:
            key = (record.payload.name, record.chunk)
            if key in self._seen:
                raise StoreError(f"{self._path}: {key[0]} chunk {key[1]} is written twice; a row is unique")
            self._seen.add(key)


def _unless_gone(undo: Callable[[], object]) -> None:
    with contextlib.suppress(OSError):
        undo()


def fsync(path: Path) -> None:
    """Return once a file's content, or a folder's names, are on the disk.

    Raises:
        OSError: the disk refuses.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def explained(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn whatever the disk or Arrow says into one StoreError that names the file."""
    try:
        yield
    except (OSError, pa.ArrowException, ValueError, TypeError, OverflowError) as problem:
        raise StoreError(
            f"{os.fspath(path)} cannot be written: {problem}; nothing of it was left behind:"
            " give it room and permission, and run again"
        ) from problem

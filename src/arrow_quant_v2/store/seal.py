"""The seal in the gap before a Parquet footer: where values lie, and a checksum. Knows nothing of what they mean.

A sealed file ends: ... pages | SEAL | footer | uint32 length of the footer | "PAR1". Parquet lets anything
stand between the pages and the footer, so every other reader skips the seal (all numbers little-endian):

    uint64 (rows, 4)  offset in the file of the first byte of data, scales, zero_points, row_scales of each
                      row, in the order of the file; 0: null, or only to be had by decoding the column
    8 bytes           MAGIC
    uint32            rows
    uint32            length of the footer
    uint32            zlib.crc32 of the offsets, then the footer

Parquet itself guards pages but not the footer, where one flipped bit can silently turn a value into a null.
A file that another tool rewrote has no seal; it is read without one, column by column.
"""

from __future__ import annotations

import os
import struct
import zlib
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from arrow_quant_v2.errors import ChecksumError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from arrow_quant_v2.packed import Bytes

Offsets: TypeAlias = "NDArray[np.uint64]"

MAGIC = b"ARROWQ2\0"
COLUMNS = 4
_TRAILER = struct.Struct("<8sIII")
_TAIL = struct.Struct("<I4s")


def seal_bytes(rows: int) -> int:
    """What a seal adds to a file."""
    return rows * COLUMNS * 8 + _TRAILER.size


def seal(path: Path, offsets: Offsets) -> None:
    """Put the seal before the footer of a finished file.

    Raises:
        OSError: the disk refuses.
    """
    table = offsets.astype("<u8").tobytes()
    with path.open("r+b") as file:
        end = file.seek(-_TAIL.size, os.SEEK_END)
        tail = file.read()
        length, _ = _TAIL.unpack(tail)
        file.seek(end - length)
        footer = file.read(length)
        file.seek(end - length)
        trailer = _TRAILER.pack(MAGIC, len(offsets), length, zlib.crc32(footer, zlib.crc32(table)))
        file.write(table + trailer + footer + tail)


def sealed_offsets(path: Path, content: Bytes) -> Offsets | None:
    """The offsets of a sealed file whose footer is as written; None where a file was never sealed.

    Raises:
        ChecksumError: the offsets or the footer are not what was written.
    """
    footer = _footer_start(content)
    if footer is None:
        return None
    magic, rows, length, expected = _TRAILER.unpack(content[footer - _TRAILER.size : footer].tobytes())
    start = footer - seal_bytes(rows)
    if magic != MAGIC:
        return None
    table = content[max(0, start) : footer - _TRAILER.size].tobytes()
    found = zlib.crc32(content[footer : content.size - _TAIL.size].data, zlib.crc32(table))
    if start < 0 or footer + length != content.size - _TAIL.size or found != expected:
        raise ChecksumError(
            f"{path}: checksum of the footer is {found:#010x}, expected {expected:#010x}; the file is damaged:"
            " restore it or quantize again"
        )
    return np.frombuffer(table, "<u8").astype(np.uint64).reshape(rows, COLUMNS)


def _footer_start(content: Bytes) -> int | None:
    """Where the footer starts, by the length behind it; None where no seal can stand before it."""
    if content.size < _TAIL.size:
        return None
    length, _ = _TAIL.unpack(content[-_TAIL.size :].tobytes())
    start = content.size - _TAIL.size - int(length)
    return start if start >= _TRAILER.size else None

"""Where the values of a plain Parquet file lie. For files just written: it trusts their footer."""

from __future__ import annotations

from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import pyarrow.parquet as pq

from arrow_quant_v2.store.schema import PAYLOAD

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from arrow_quant_v2.store.seal import Offsets
    from arrow_quant_v2.store.sizes import PayloadSizes

LENGTH_BYTES = 4  # Parquet writes a plain binary value as its uint32 length, then its bytes


def value_offsets(path: Path, groups: Sequence[Sequence[PayloadSizes]]) -> Offsets:
    """Offsets of the four payload values of every row, given their sizes, row group by row group.

    The values of a plain column chunk of one page lie at its very end, whatever stands before them:
    length, bytes, length, bytes ...; nulls take no room. So the sizes give every offset. An offset is 0
    where the value is null, or where its length does not stand before it (several pages, say).
    """
    footer = pq.read_metadata(path)
    leaves = {footer.schema.column(leaf).path: leaf for leaf in range(footer.num_columns)}
    offsets = np.zeros((sum(map(len, groups)), len(PAYLOAD)), np.uint64)
    row = 0
    with path.open("rb") as file:
        for index, sizes in enumerate(groups):
            for column, name in enumerate(PAYLOAD.names):
                chunk = footer.row_group(index).column(leaves[name])
                end = chunk.data_page_offset + chunk.total_compressed_size
                found = _column_offsets(file, end, [of_row[column] for of_row in sizes])
                offsets[row : row + len(sizes), column] = list(found)[::-1]
            row += len(sizes)
    return offsets


def _column_offsets(file: BinaryIO, end: int, sizes: Sequence[int | None]) -> Iterator[int]:
    """Offset of each value of one column chunk, last row first."""
    for size in reversed(sizes):
        if size is None:
            yield 0
            continue
        start = end - size
        end = start - LENGTH_BYTES
        yield start if _length_at(file, end) == size else 0


def _length_at(file: BinaryIO, offset: int) -> int:
    if offset < 0:
        return -1
    file.seek(offset)
    return int.from_bytes(file.read(LENGTH_BYTES), "little")

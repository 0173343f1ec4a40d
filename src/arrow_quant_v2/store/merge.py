"""Many small parts become one file with one row group. Knows nothing of where parts come from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from arrow_quant_v2.errors import StoreError
from arrow_quant_v2.store.reader import StoredModel
from arrow_quant_v2.store.writer import write_group

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from arrow_quant_v2.store.record import LayerRecord

MERGE_BYTES = 64 * 2**20  # all parts are in memory at once


def merge_parts(parts: Sequence[Path], target: str | os.PathLike[str], metadata: Mapping[str, str]) -> None:
    """Rewrite the layers of all parts, sorted by name and chunk, as one row group of `target`.

    The parts stay. The same layers give the same bytes, however they were spread over parts.

    Raises:
        StoreError: a part cannot be read, a layer lies in two of them, or all are too much to hold at once.
        ChecksumError: a part is damaged.
    """
    models = [StoredModel(part) for part in parts]
    size = sum(one.stored_bytes for model in models for one in model.entries)
    if size > MERGE_BYTES:
        raise StoreError(f"{target}: {size} bytes in {len(parts)} parts; merge at most {MERGE_BYTES} bytes at once")
    records = [record for model in models for record in model.records()]
    write_group(target, sorted(records, key=_place), metadata)


def _place(record: LayerRecord) -> tuple[str, int]:
    return record.payload.name, record.chunk

"""How many bytes a layer takes, and the limits on its shape. Does arithmetic only; opens nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from arrow_quant_v2.errors import StoreError
from arrow_quant_v2.packed import GRIDS, WIDTHS, Layout, TensorInfo

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

# bytes of data, scales, zero_points, row_scales; None where the column is null
PayloadSizes: TypeAlias = "tuple[int, int | None, int | None, int | None]"

CHUNK_BYTES = 2**30  # a larger payload is several rows
LARGEST_VALUE = 2**31 - 2**16  # a Parquet page counts its bytes in 31 bits, header included
LARGEST_RANK = 32
LARGEST_COUNT = 2**63 - 1
EQUALIZATION_BYTES = 4  # of one input channel

# measured on pyarrow 26, and held by a test
FILE_BYTES = 7830  # the schema, twice: Parquet's and Arrow's; and the store's own keys
GROUP_BYTES = 4412  # page headers and footer entries of 45 columns
ROW_BYTES = 168  # numbers, lengths of texts, four offsets
BOUNDS = 4  # smallest and largest layer_name, in the page and in the footer
KEY_BYTES = 40
SEEN_BYTES, RANGE_BYTES = 22, 26  # of one time group: activation_stats and output_error; time_aware_quant
METADATA_COPIES = 7 / 3  # once as it is, once in base64 within Arrow's schema


def packed_sizes(layout: Layout, rows: int, *, symmetric: bool) -> PayloadSizes:
    """Bytes of each payload column for `rows` rows of codes."""
    scales = None if layout.grid == "row" else rows * layout.scales_per_row
    zero_points = None if symmetric else rows * layout.groups
    return rows * layout.row_bytes, scales, zero_points, 2 * rows


def row_bytes(layout: Layout, *, symmetric: bool) -> int:
    """Stored bytes of one row of codes, parameters included."""
    return total(packed_sizes(layout, 1, symmetric=symmetric))


def equalization_bytes(channels: int | None) -> int:
    """What the equalization of so many input channels takes in a row of the file, beside its payload."""
    return EQUALIZATION_BYTES * (channels or 0)


def stored_bytes(layout: Layout, *, symmetric: bool, equalized: bool = False) -> int:
    """Stored bytes of the whole layer, parameters included."""
    equalization = equalization_bytes(layout.channels) if equalized else 0
    return layout.rows * row_bytes(layout, symmetric=symmetric) + equalization


def bits_per_weight(layout: Layout, *, symmetric: bool, equalized: bool = False) -> float:
    """What one weight of this layer costs, parameters included."""
    return 8 * stored_bytes(layout, symmetric=symmetric, equalized=equalized) / math.prod(layout.shape)


@dataclass(frozen=True, kw_only=True)
class RowSize:
    """What decides the size of one row; `text_bytes` counts dtype, quant_type, grid, modality, method and decision.

    `equalized` input channels have a scale each. Inputs were seen in `time_groups`, `ranges` of which are stored.
    """

    layer_name: str
    payload_bytes: int
    text_bytes: int = 100
    equalized: int = 0
    time_groups: int = 0
    ranges: int = 0

    @property
    def seen_bytes(self) -> int:
        """What is kept of the inputs that calibration saw."""
        return self.time_groups * SEEN_BYTES + self.ranges * RANGE_BYTES


def predicted_file_bytes(rows: Iterable[RowSize], *, metadata: Mapping[str, str], grouped: bool) -> int:
    """Size of a file before it is written, to about 5% of what it holds beside the payload.

    `metadata` is the caller's; the store's own keys are counted without being asked.

    `grouped` as `merge_parts` writes it: all rows in one row group; otherwise each has its own. What is not counted
    by a row is taken to be null.
    """
    names = [(len(row.layer_name.encode()), row) for row in rows]
    groups = [max(name for name, _ in names)] if grouped else [name for name, _ in names]
    texts = sum(len(key.encode()) + len(text.encode()) for key, text in metadata.items())
    return (
        FILE_BYTES
        + KEY_BYTES * len(metadata)
        + round(METADATA_COPIES * texts)
        + sum(GROUP_BYTES + BOUNDS * name for name in groups)
        + sum(ROW_BYTES + name + row.text_bytes + row.payload_bytes + row.seen_bytes for name, row in names)
        + sum(equalization_bytes(row.equalized) for _, row in names)
    )


def total(sizes: Iterable[int | None]) -> int:
    """All columns together; a null takes nothing."""
    return sum(size or 0 for size in sizes)


def check_shape(info: TensorInfo) -> None:
    """Refuse a shape that no file may hold.

    Raises:
        StoreError: a negative or absurd size, or too many axes.
    """
    if len(info.shape) > LARGEST_RANK:
        raise StoreError(f"{info.name}: {len(info.shape)} axes; a tensor may have {LARGEST_RANK}")
    if any(size < 0 for size in info.shape) or info.numel > LARGEST_COUNT:
        raise StoreError(f"{info.name}: shape {list(info.shape)} is not that of a tensor; sizes are 0 to 2^63 - 1")


def check_layout(name: str, layout: Layout) -> None:
    """Refuse a layout whose rows, columns, groups or grid mean nothing.

    Raises:
        StoreError: says which of bits, shape, quant_axis, group_size and grid is wrong, and what is allowed.
    """
    for problem in _problems(layout):
        raise StoreError(f"{name}: {problem}")


def _problems(layout: Layout) -> Iterator[str]:
    if layout.bits not in WIDTHS:
        yield f"{layout.bits} bits per code; allowed are {', '.join(map(str, WIDTHS))}"
    if math.prod(layout.shape) == 0:
        yield f"shape {list(layout.shape)} has no elements to quantize; store it unquantized"
    if layout.quant_axis is not None and not 0 <= layout.quant_axis < max(1, len(layout.shape)):
        yield f"quant_axis {layout.quant_axis} is not an axis of shape {list(layout.shape)}"
    if layout.group_size is not None and layout.group_size < 1:
        yield f"group_size {layout.group_size} holds no column; it is 1 or more, or null for one group per row"
    if layout.grid not in GRIDS:
        yield f"grid {layout.grid!r} is unknown; known are {', '.join(GRIDS)}"
    elif layout.grid == "row" and layout.groups != 1:
        yield f"grid 'row' is for rows of one group; group_size {layout.group_size} makes {layout.groups} of them"

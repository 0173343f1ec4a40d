"""What the small columns of a file say, row by row, believed only after checking. Opens no file."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from arrow_quant_v2.errors import StoreError
from arrow_quant_v2.packed import ITEM_BITS, WIDTHS, Bits, Grid, Layout, TensorInfo, basis_problems
from arrow_quant_v2.store.schema import FACTS, GRIDS_ADDED, SCHEMA_VERSION, version_text
from arrow_quant_v2.store.sizes import PayloadSizes, check_layout, check_shape, packed_sizes, total

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from arrow_quant_v2.packed import Floats
    from arrow_quant_v2.store.record import Structure

EQUALIZED_SINCE = (2, 1)
_WIDTHS: dict[str, Bits] = {f"int{bits}": bits for bits in WIDTHS}
_GRIDS: dict[str | None, Grid] = {None: "affine", "r2q": "r2q", "row": "row"}
_A = {"grid": "a grid", "rotation": "a rotation", "equalization": "equalization_scales"}


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerEntry:
    """Every small column of one row, and where the row lies; the columns are those of docs/format.md."""

    layer_name: str
    shape: tuple[int, ...]
    dtype: str
    num_params: int
    chunk: int
    quant_type: str
    bit_width: int
    bits_per_weight: float
    quant_axis: int | None
    group_size: int | None
    symmetric: bool | None
    grid: str | None
    rotation: int | None
    row_start: int
    row_stop: int
    data_bytes: int
    checksum: int
    source_checksum: int
    is_diffusion_model: bool
    modality: str | None
    method: str | None
    cosine_similarity: float | None
    mse: float | None
    output_error: list[float] | None
    decision: str
    time_aware_quant: Structure | None
    spatial_quant: Structure | None
    activation_stats: Structure | None

    equalization: Floats | None
    file: Path
    row: int

    @property
    def where(self) -> str:
        """Layer, chunk and file, for messages."""
        return f"{self.layer_name} (chunk {self.chunk} in {self.file})"

    @property
    def info(self) -> TensorInfo:
        """Name, shape and dtype of the original tensor."""
        return TensorInfo(name=self.layer_name, shape=self.shape, dtype=self.dtype)

    @property
    def layout(self) -> Layout | None:
        """How the codes lie; None where the layer is not quantized."""
        if self.symmetric is None:
            return None
        return Layout(
            shape=self.shape,
            bits=_WIDTHS[self.quant_type],
            quant_axis=self.quant_axis,
            group_size=self.group_size,
            grid=_GRIDS.get(self.grid, "affine"),
        )

    @property
    def is_smoothed(self) -> bool:
        """Whether activation parameters are those of inputs whose channels are equalized."""
        return self.equalization is not None and bool((self.spatial_quant or {}).get("activation_smoothing"))

    @property
    def rows(self) -> int:
        """Rows of the whole layer; elements where it is not quantized."""
        return self.num_params if self.layout is None else self.layout.rows

    @property
    def sizes(self) -> PayloadSizes:
        """Bytes of data, scales, zero_points and row_scales of this row; None for a null."""
        layout, rows = self.layout, self.row_stop - self.row_start
        if layout is None:
            return rows * ITEM_BITS[self.dtype] // 8, None, None, None
        return packed_sizes(layout, rows, symmetric=self.symmetric is True)

    @property
    def stored_bytes(self) -> int:
        """Payload bytes of this row, parameters and equalization included."""
        return total(self.sizes) + (0 if self.equalization is None else self.equalization.nbytes)


_SAME_IN_CHUNKS = (
    "shape", "dtype", "quant_type", "quant_axis", "group_size", "symmetric", "grid", "rotation", "source_checksum",
)  # fmt: skip
_FACT_NAMES = tuple(field.name for field in fields(LayerEntry) if field.name in FACTS.names)
_REQUIRED = tuple(field.name for field in FACTS if not field.nullable)


def entry(facts: Mapping[str, Any], *, file: Path, row: int, version: tuple[int, int] = SCHEMA_VERSION) -> LayerEntry:
    """The entry of one row of a file of this version; equalization scales mean something since 2.1, grid row since 2.2.

    Raises:
        StoreError: the columns contradict each other or are out of range; the message names layer and file.
    """
    given: dict[str, Any] = {name: facts.get(name) for name in _FACT_NAMES}
    shape = tuple(given.pop("shape") or ())
    equalization = None if version < EQUALIZED_SINCE else _equalization(given["spatial_quant"])
    found = LayerEntry(**given, shape=shape, equalization=equalization, file=file, row=row)
    _check(found, version)
    return found


def _equalization(spatial: Structure | None) -> Floats | None:
    """The scales that are switched on; a null among them, or instead of them, becomes NaN or none, which is refused."""
    if spatial is None or not (spatial["enabled"] and spatial["channel_equalization"]):
        return None
    return np.array(spatial["equalization_scales"] or [], np.float32)


def by_layer(entries: Iterable[LayerEntry]) -> dict[str, tuple[LayerEntry, ...]]:
    """The chunks of every layer in their order, layers sorted by name.

    Raises:
        StoreError: a chunk is missing, doubled, or does not go on where the one before it ended.
    """
    layers: dict[str, list[LayerEntry]] = defaultdict(list)
    for one in entries:
        layers[one.layer_name].append(one)
    return {name: _chunks(layers[name]) for name in sorted(layers)}


def _check(found: LayerEntry, version: tuple[int, int]) -> None:
    """Everything that `layout` and `sizes` rely on, and that the columns agree."""
    for name in _REQUIRED:
        if getattr(found, name) is None:
            raise StoreError(f"{found.where}: {name} is null; only columns that docs/format.md marks so may be")
    if None in found.shape:
        raise StoreError(f"{found.where}: shape {list(found.shape)} has a null; every size is a number")
    if found.dtype not in ITEM_BITS:
        raise StoreError(f"{found.where}: dtype {found.dtype!r} is unknown; known are {', '.join(ITEM_BITS)}")
    check_shape(found.info)
    widths = _WIDTHS if found.symmetric is not None else {found.dtype: ITEM_BITS[found.dtype]}
    if found.bit_width != widths.get(found.quant_type):
        raise StoreError(
            f"{found.where}: quant_type {found.quant_type!r} of {found.bit_width} bits; allowed are"
            f" {', '.join(f'{name!r} of {bits}' for name, bits in widths.items())}"
        )
    _check_grid(found, version)
    _check_counts(found)


def _check_grid(found: LayerEntry, version: tuple[int, int]) -> None:
    """What the codes mean, and in which basis."""
    if found.layout is None:
        for name in ("grid", "rotation", "equalization"):
            if getattr(found, name) is not None:
                raise StoreError(f"{found.where}: is not quantized, but has {_A[name]}; that is for codes alone")
        return
    known = [name for name, since in GRIDS_ADDED.items() if since <= version]
    if found.grid not in {None, *known}:
        names = " and ".join([*map(repr, known), "null"])
        raise StoreError(f"{found.where}: grid {found.grid!r} is unknown; schema {version_text(version)} knows {names}")
    check_layout(found.where, found.layout)
    for problem in basis_problems(found.layout, found.rotation, found.equalization):
        raise StoreError(f"{found.where}: {problem}")


def _check_counts(found: LayerEntry) -> None:
    if found.num_params != found.info.numel:
        raise StoreError(
            f"{found.where}: num_params is {found.num_params}; shape {list(found.shape)} has {found.info.numel}"
        )
    if not 0 <= found.row_start <= found.row_stop <= found.rows:
        raise StoreError(f"{found.where}: rows {found.row_start} to {found.row_stop} lie outside its {found.rows}")
    if found.data_bytes != found.sizes[0]:
        raise StoreError(f"{found.where}: data_bytes is {found.data_bytes}; its layout asks for {found.sizes[0]}")


def _chunks(entries: list[LayerEntry]) -> tuple[LayerEntry, ...]:
    """The chunks of one layer in order, known to be all of it."""
    ordered = tuple(sorted(entries, key=lambda one: one.chunk))
    first, last = ordered[0], ordered[-1]
    if first.chunk != 0 or first.row_start != 0:
        raise StoreError(f"{first.where}: the layer's first chunk is missing; it starts at row {first.row_start}")
    for before, after in pairwise(ordered):
        _check_follows(before, after)
    if last.row_stop != last.rows:
        raise StoreError(f"{last.where}: ends at row {last.row_stop} of {last.rows}; its next chunk is missing")
    return ordered


def _check_follows(before: LayerEntry, after: LayerEntry) -> None:
    if before.chunk == after.chunk:
        raise StoreError(f"{after.where}: the same chunk lies in {before.file}; remove one of them")
    if (after.chunk, after.row_start) != (before.chunk + 1, before.row_stop):
        raise StoreError(
            f"{after.where}: starts at row {after.row_start}, but chunk {before.chunk} in {before.file} ends at row"
            f" {before.row_stop}; a chunk is missing or from another model"
        )
    for name in _SAME_IN_CHUNKS:
        if getattr(before, name) != getattr(after, name):
            raise StoreError(
                f"{after.where}: {name} is {getattr(after, name)!r}, but {getattr(before, name)!r} in {before.file};"
                " chunks of different models are mixed"
            )
    if not _alike(before.equalization, after.equalization):
        raise StoreError(
            f"{after.where}: its equalization_scales are not those in {before.file};"
            " chunks of different models are mixed"
        )


def _alike(one: Floats | None, other: Floats | None) -> bool:
    return one is other or (one is not None and other is not None and np.array_equal(one, other))

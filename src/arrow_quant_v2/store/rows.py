"""A record becomes the rows of an Arrow batch, ready to be written. Knows nothing of files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from arrow_quant_v2.errors import StoreError
from arrow_quant_v2.packed import ITEM_BITS, TensorInfo
from arrow_quant_v2.store.record import RawTensor, checksum, payload_bytes
from arrow_quant_v2.store.schema import FACTS, SCHEMA
from arrow_quant_v2.store.sizes import LARGEST_VALUE, check_layout, check_shape

if TYPE_CHECKING:
    from collections.abc import Sequence

    from arrow_quant_v2.packed import Bytes, PackedTensor
    from arrow_quant_v2.store.record import LayerRecord, Payload, PayloadBytes, Structure


def record_batch(records: Sequence[LayerRecord]) -> pa.RecordBatch:
    """One row per record; the payload of a single record is not copied.

    Raises:
        StoreError: a record cannot be stored; the message names the layer.
    """
    payloads = [payload_bytes(record.payload) for record in records]
    facts = [_facts(record, columns) for record, columns in zip(records, payloads, strict=True)]
    small = pa.RecordBatch.from_pylist(facts, schema=FACTS)
    large = [_binary([columns[index] for columns in payloads]) for index in range(4)]
    return pa.RecordBatch.from_arrays([*small.columns, *large], schema=SCHEMA)


def _facts(record: LayerRecord, columns: PayloadBytes) -> dict[str, Any]:
    payload = record.payload
    _check(payload, columns)
    return {
        **(_raw_facts(payload) if isinstance(payload, RawTensor) else _packed_facts(payload)),
        "layer_name": payload.name,
        "dtype": payload.dtype,
        "chunk": record.chunk,
        "bits_per_weight": record.bits_per_weight,
        "data_bytes": columns[0].size,
        "checksum": checksum(columns),
        "source_checksum": record.source_checksum,
        "is_diffusion_model": record.is_diffusion_model,
        "modality": record.modality,
        "method": record.method,
        "cosine_similarity": record.cosine_similarity,
        "mse": record.mse,
        "output_error": record.output_error,
        "decision": record.decision,
        "time_aware_quant": record.time_aware_quant,
        "spatial_quant": _spatial(record),
        "activation_stats": record.activation_stats,
    }


def _raw_facts(tensor: RawTensor) -> dict[str, Any]:
    return {
        "shape": tensor.shape,
        "num_params": tensor.info.numel,
        "quant_type": tensor.dtype,
        "bit_width": ITEM_BITS[tensor.dtype],
        "row_start": tensor.start,
        "row_stop": tensor.stop,
    }


def _packed_facts(tensor: PackedTensor) -> dict[str, Any]:
    layout = tensor.layout
    return {
        "shape": layout.shape,
        "num_params": layout.rows * layout.columns,
        "quant_type": f"int{layout.bits}",
        "bit_width": layout.bits,
        "quant_axis": layout.quant_axis,
        "group_size": layout.group_size,
        "symmetric": tensor.zero_points is None,
        "grid": None if layout.grid == "affine" else layout.grid,
        "rotation": tensor.rotation,
        "row_start": tensor.first_row,
        "row_stop": tensor.first_row + tensor.rows,
    }


def _spatial(record: LayerRecord) -> Structure | None:
    """What is known of the channels; the equalization that readers undo is the payload's and nobody else's."""
    given = record.spatial_quant
    scales = None if isinstance(record.payload, RawTensor) else record.payload.equalization
    if scales is None:
        if given is not None and given.get("enabled") and given.get("channel_equalization"):
            raise StoreError(
                f"{record.payload.name}: spatial_quant says that its channels are equalized; give the scales to its"
                " PackedTensor as `equalization`, or set channel_equalization to False"
            )
        return given
    on = {"enabled": True, "channel_equalization": True, "equalization_scales": scales.tolist()}
    return {"activation_smoothing": False} | dict(given or {}) | on


def _check(payload: Payload, columns: PayloadBytes) -> None:
    if payload.dtype not in ITEM_BITS:
        raise StoreError(f"{payload.name}: dtype {payload.dtype!r} is unknown; known are {', '.join(ITEM_BITS)}")
    shape = payload.shape if isinstance(payload, RawTensor) else payload.layout.shape
    check_shape(TensorInfo(name=payload.name, shape=shape, dtype=payload.dtype))
    if not isinstance(payload, RawTensor):
        check_layout(payload.name, payload.layout)
    for column in columns:
        if column is not None and column.size > LARGEST_VALUE:
            raise StoreError(
                f"{payload.name}: {column.size} bytes in one value; Parquet holds {LARGEST_VALUE}: split the layer"
                " into chunks of rows, and give a tensor with a single row of codes a quant_axis"
            )


def _binary(values: Sequence[Bytes | None]) -> pa.Array[Any]:
    """A large_binary array over the values themselves where there is one, over a copy where there are several."""
    sizes = [0 if value is None else value.size for value in values]
    offsets = np.zeros(len(values) + 1, np.int64)
    np.cumsum(sizes, out=offsets[1:])
    given = [value for value in values if value is not None]
    content = given[0] if len(given) == 1 else np.concatenate([np.empty(0, np.uint8), *given])
    valid = np.packbits([value is not None for value in values], bitorder="little")
    buffers: list[pa.Buffer | None] = [pa.py_buffer(part.data) for part in (valid, offsets, content)]
    return pa.Array.from_buffers(pa.large_binary(), len(values), buffers)

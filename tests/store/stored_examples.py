"""Layers for the store's tests: any payload that the format allows, and small ones by hand."""

import dataclasses
import math
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from arrow_quant_v2.packed import GRIDS, ITEM_BITS, WHOLE, WIDTHS, Layout, PackedTensor
from arrow_quant_v2.store.record import LayerRecord, Payload, RawTensor, payload_bytes
from arrow_quant_v2.store.seal import MAGIC

METADATA = {"configuration": "{}", "program_version": "2.0.0", "source_hash": "c0ffee"}
TIME_AWARE = {
    "enabled": True,
    "num_time_groups": 2,
    "time_group_params": [
        {
            "time_range": {"start": 0.0, "end": 0.5},
            "scale": 0.25,
            "zero_point": 3.0,
            "group_size": 64,
            "bias_correction": [1.0, -1.0],
        },
        {
            "time_range": {"start": 0.5, "end": 1.0},
            "scale": 0.5,
            "zero_point": 0.0,
            "group_size": None,
            "bias_correction": None,
        },
    ],
}
SPATIAL = {
    "enabled": True,
    "channel_equalization": True,
    "activation_smoothing": False,
    "equalization_scales": [0.5, 2.0],
}
SMOOTHED = SPATIAL | {"channel_equalization": False, "equalization_scales": None, "activation_smoothing": True}
STATS = {"mean": [0.0, 0.5], "std": [1.0, 2.0], "min": [-1.0, -2.0], "max": [1.0, 2.0]}


def packed(
    name="layer.weight",
    shape=(4, 6),
    bits=4,
    axis=1,
    *,
    group_size=4,
    symmetric=False,
    seed=0,
    dtype="bfloat16",
    grid="affine",
    rotation=None,
    equalized=False,
) -> PackedTensor:
    layout = Layout(shape=tuple(shape), bits=bits, quant_axis=axis, group_size=group_size, grid=grid)
    rng = np.random.default_rng(seed)

    def codes(*grid):
        return rng.integers(0, 256, grid, dtype=np.uint8)

    return PackedTensor(
        name=name,
        dtype=dtype,
        layout=layout,
        codes=codes(layout.rows, layout.row_bytes),
        scales=codes(layout.rows, layout.scales_per_row)
        if grid != "row"
        else np.full((layout.rows, 1), WHOLE, np.uint8),
        zero_points=None if symmetric else codes(layout.rows, layout.groups),
        row_scales=rng.integers(0x3C00, 0x3F80, layout.rows, dtype=np.uint16),
        rotation=rotation,
        equalization=rng.uniform(0.1, 10, layout.channels).astype(np.float32) if equalized else None,
    )


def raw(name="layer.bias", shape=(5,), dtype="float32", seed=0) -> RawTensor:
    count = math.prod(shape) * ITEM_BITS[dtype] // 8
    values = np.random.default_rng(seed).integers(0, 256, count, dtype=np.uint8)
    return RawTensor(name=name, shape=tuple(shape), dtype=dtype, values=values)


def record(payload: Payload, **facts) -> LayerRecord:
    given = {"bits_per_weight": 4.5, "source_checksum": 7, "decision": "int4: as asked", "method": "rtn"}
    return LayerRecord(payload=payload, **(given | facts))


def chunked(payload: Payload, rows: int, **facts) -> list[LayerRecord]:
    """The payload as records of `rows` rows (elements) each."""
    if isinstance(payload, RawTensor):
        size = payload.item_bytes
        pieces = [
            dataclasses.replace(payload, values=payload.values[start * size : (start + rows) * size], start=start)
            for start in range(0, payload.stop, rows)
        ]
    else:
        pieces = [
            dataclasses.replace(
                payload,
                codes=payload.codes[start : start + rows],
                scales=payload.scales[start : start + rows],
                zero_points=None if payload.zero_points is None else payload.zero_points[start : start + rows],
                row_scales=payload.row_scales[start : start + rows],
                first_row=start,
            )
            for start in range(0, payload.rows, rows)
        ]
    return [record(piece, chunk=chunk, **facts) for chunk, piece in enumerate(pieces)]


def contents(payload: Payload) -> tuple[object, ...]:
    """Everything in a payload, comparable."""
    columns = tuple(None if column is None else column.tobytes() for column in payload_bytes(payload))
    if isinstance(payload, RawTensor):
        return payload.name, payload.shape, payload.dtype, payload.start, columns
    equalization = None if payload.equalization is None else payload.equalization.tobytes()
    return payload.name, payload.layout, payload.dtype, payload.first_row, payload.rotation, equalization, columns


def everything(one: LayerRecord) -> tuple[object, ...]:
    """Everything in a record, comparable; where its payload has an equalization, `spatial_quant` repeats it."""
    spatial = None if getattr(one.payload, "equalization", None) is not None else one.spatial_quant
    others = [field.name for field in dataclasses.fields(one) if field.name not in {"payload", "spatial_quant"}]
    return contents(one.payload), spatial, *(getattr(one, name) for name in others)


def unsealed(path: Path, target: Path) -> Path:
    """The same file as another tool could have written it: without a seal."""
    content = path.read_bytes()
    assert content.count(MAGIC) == 1
    target.write_bytes(content.replace(MAGIC, bytes(len(MAGIC))))
    return target


def edited(path: Path, target: Path, **columns) -> Path:
    """The same rows with whole columns replaced (None: dropped), written anew with the same metadata."""
    table = pq.read_table(path)
    metadata = pq.read_schema(path).metadata
    for name, values in columns.items():
        index = table.schema.get_field_index(name)
        if values is None:
            table = table.remove_column(index)
        else:
            column = values if isinstance(values, pa.Array) else pa.array(values, table.schema.field(name).type)
            table = table.set_column(index, pa.field(name, column.type), column)
    pq.write_table(table.replace_schema_metadata(metadata), target)
    return target


def copied(path: Path, target: Path) -> Path:
    shutil.copyfile(path, target)
    return target


names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20)
sizes = st.integers(1, 9)


@st.composite
def packed_tensors(draw, name=names) -> PackedTensor:
    shape = draw(st.lists(sizes, min_size=1, max_size=4))
    axis = draw(st.none() | st.integers(0, len(shape) - 1))
    rotation = None if axis is None else draw(st.sampled_from([None, None, 8, 16]))
    if rotation:
        shape[axis] = 16
    grid = draw(st.sampled_from(GRIDS))
    return packed(
        name=draw(name),
        shape=shape,
        bits=draw(st.sampled_from(WIDTHS)),
        axis=axis,
        grid=grid,
        rotation=rotation,
        equalized=axis is not None and draw(st.booleans()),
        group_size=draw(st.none() | (st.just(10**6) if grid == "row" else st.integers(1, 12))),
        symmetric=draw(st.booleans()),
        seed=draw(st.integers(0, 99)),
        dtype=draw(st.sampled_from(["float32", "bfloat16", "float16", "float64", "float8_e4m3fn"])),
    )


@st.composite
def raw_tensors(draw, name=names) -> RawTensor:
    shape = draw(st.lists(st.integers(0, 5), max_size=4))
    return raw(draw(name), shape, draw(st.sampled_from(sorted(ITEM_BITS))), draw(st.integers(0, 99)))


facts = st.fixed_dictionaries(
    {
        "bits_per_weight": st.floats(0, 64),
        "source_checksum": st.integers(0, 2**32 - 1),
        "decision": st.text(st.characters(codec="utf-8"), max_size=30),
        "method": st.none() | st.sampled_from(["rtn", "gptq"]),
        "cosine_similarity": st.none() | st.floats(-1, 1),
        "mse": st.none() | st.floats(0, 1),
        "output_error": st.none() | st.lists(st.floats(0, 1, width=32), max_size=3),
        "modality": st.none() | st.sampled_from(["text", "image"]),
        "is_diffusion_model": st.booleans(),
        "time_aware_quant": st.none() | st.just(TIME_AWARE),
        "spatial_quant": st.none() | st.just(SMOOTHED),
        "activation_stats": st.none() | st.just(STATS),
    }
)


@st.composite
def models(draw) -> list[LayerRecord]:
    """Records of a few layers, some in chunks, sorted as a reader lists them."""
    payloads = draw(
        st.lists(packed_tensors() | raw_tensors(), min_size=1, max_size=4, unique_by=lambda payload: payload.name)
    )
    records = []
    for payload in sorted(payloads, key=lambda payload: payload.name):
        rows = draw(st.integers(1, 9))
        empty = isinstance(payload, RawTensor) and payload.stop == 0
        given = draw(facts)
        records += [record(payload, **given)] if empty else chunked(payload, rows, **given)
    return records

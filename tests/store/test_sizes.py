import dataclasses

import pytest
from stored_examples import METADATA, packed, raw, record

from arrow_quant_v2.errors import StoreError
from arrow_quant_v2.packed import Layout, TensorInfo
from arrow_quant_v2.store.merge import merge_parts
from arrow_quant_v2.store.record import payload_sizes
from arrow_quant_v2.store.sizes import (
    RowSize,
    bits_per_weight,
    check_layout,
    check_shape,
    packed_sizes,
    predicted_file_bytes,
    stored_bytes,
    total,
)
from arrow_quant_v2.store.writer import write_part

LAYOUT = Layout(shape=(256, 130), bits=2, quant_axis=1, group_size=64)


def test_sizes_count_every_column() -> None:
    assert packed_sizes(LAYOUT, 10, symmetric=False) == (330, 30, 30, 20)  # 33 bytes and 3 groups a row
    assert packed_sizes(LAYOUT, 10, symmetric=True) == (330, 30, None, 20)
    assert stored_bytes(LAYOUT, symmetric=False) == 256 * 41
    assert bits_per_weight(LAYOUT, symmetric=True) == 8 * 38 / 130
    assert total((1, None, 2)) == 3


def test_the_residual_grid_has_two_scales_in_a_group_and_equalization_four_bytes_a_channel() -> None:
    r2q = dataclasses.replace(LAYOUT, grid="r2q")
    assert packed_sizes(r2q, 10, symmetric=False) == (330, 60, 30, 20)
    assert packed_sizes(r2q, 10, symmetric=True) == (330, 60, None, 20)
    assert stored_bytes(r2q, symmetric=False) == 256 * 44
    assert stored_bytes(r2q, symmetric=False, equalized=True) == 256 * 44 + 4 * 130
    assert bits_per_weight(r2q, symmetric=True, equalized=True) == 8 * (41 + 4 * 130 / 256) / 130


def test_a_row_of_one_group_has_no_scale_but_its_own() -> None:
    row = dataclasses.replace(LAYOUT, group_size=None, grid="row")
    assert packed_sizes(row, 10, symmetric=False) == (330, None, 10, 20)
    assert packed_sizes(row, 10, symmetric=True) == (330, None, None, 20)
    assert bits_per_weight(row, symmetric=True) == 8 * 35 / 130
    for size in (130, 1000):
        wide = dataclasses.replace(row, group_size=size)
        assert stored_bytes(wide, symmetric=False) == 256 * 36
        check_layout("w", wide)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"bits": 3}, "3 bits per code; allowed are 2, 4, 8"),
        ({"shape": (4, 0)}, r"shape \[4, 0\] has no elements"),
        ({"quant_axis": 2}, r"quant_axis 2 is not an axis of shape \[256, 130\]"),
        ({"quant_axis": -1}, "quant_axis -1"),
        ({"group_size": 0}, "group_size 0 holds no column"),
        ({"grid": "r3q"}, "grid 'r3q' is unknown; known are affine, r2q, row"),
        ({"grid": "row"}, "grid 'row' is for rows of one group; group_size 64 makes 3 of them"),
    ],
)
def test_a_layout_that_means_nothing_is_refused(wrong, message) -> None:
    with pytest.raises(StoreError, match=f"^w: {message}"):
        check_layout("w", dataclasses.replace(LAYOUT, **wrong))


@pytest.mark.parametrize(
    ("shape", "message"),
    [((2, -1), "shape"), ((2**32, 2**32), "is not that of a tensor"), ((1,) * 33, "33 axes; a tensor may have 32")],
)
def test_an_absurd_shape_is_refused(shape, message) -> None:
    with pytest.raises(StoreError, match=f"^w: .*{message}"):
        check_shape(TensorInfo(name="w", shape=shape, dtype="int8"))


def text_bytes(one) -> int:
    payload = one.payload
    kind = payload.dtype if payload.name.endswith("bias") else f"int{payload.layout.bits}r2q"
    return sum(len(text or "") for text in (payload.dtype, kind, one.modality, one.method, one.decision))


def layer(name: str, *, equalized: bool):
    return packed(name, (32, 640), grid="r2q", rotation=64, equalized=equalized)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("count", [1, 7, 60])
def test_a_file_is_as_large_as_predicted(tmp_path, count, grouped) -> None:
    """Within 5% of what is not payload, so far within 1% of any real file."""
    records = [
        record(raw(f"blocks.{i}.bias", (64,)), modality="text")
        if i % 3 == 0
        else record(
            layer(f"blocks.{i}.attention.weight", equalized=i % 3 == 1),
            modality="text",
            cosine_similarity=0.9,
            mse=1e-3,
        )
        for i in range(count)
    ]
    rows = [
        RowSize(
            layer_name=one.payload.name,
            payload_bytes=total(payload_sizes(one.payload)),
            text_bytes=text_bytes(one),
            equalized=0 if getattr(one.payload, "equalization", None) is None else 640,
        )
        for one in records
    ]
    path, metadata = tmp_path / "a.parquet", METADATA | {"configuration": "bits: 4\n" * 200}
    write_part(path, records, metadata)
    if grouped:
        merge_parts([path], path, metadata)
    payload = sum(row.payload_bytes for row in rows)
    predicted = predicted_file_bytes(rows, metadata=metadata, grouped=grouped)
    assert predicted - payload == pytest.approx(path.stat().st_size - payload, rel=0.05)


def test_a_hundred_small_layers_cost_little(tmp_path) -> None:
    path = tmp_path / "a.parquet"
    write_part(path, [record(raw(f"encoder.layers.{i}.output.norm.bias", (8,))) for i in range(100)], METADATA)
    merge_parts([path], path, METADATA)
    assert path.stat().st_size < 50_000

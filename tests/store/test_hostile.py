"""Every way in which a file can be wrong is one StoreError: no crash, no other exception, no huge allocation."""

import dataclasses
import os
import struct
import zlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from stored_examples import METADATA, TIME_AWARE, chunked, edited, everything, packed, raw, record

from arrow_quant_v2.errors import ArrowQuantError, ChecksumError, SchemaVersionError, StoreError
from arrow_quant_v2.store import StoredModel, merge_parts, write_part
from arrow_quant_v2.store.seal import MAGIC


def records():
    return [
        record(packed("a"), time_aware_quant=TIME_AWARE),
        *chunked(raw("b", (6,)), 4),
        record(packed("c", symmetric=True)),
        record(packed("d", (4, 8), grid="r2q", rotation=8, equalized=True)),
        record(packed("e", grid="row", group_size=None)),
    ]


@pytest.fixture(scope="module")
def contents(tmp_path_factory) -> list[bytes]:
    """The same model in a row group per layer, and in one."""
    folder = tmp_path_factory.mktemp("hostile")
    write_part(folder / "parts", records(), METADATA)
    merge_parts([folder / "parts"], folder / "merged", METADATA)
    return [(folder / name).read_bytes() for name in ("parts", "merged")]


@pytest.fixture
def path(tmp_path):
    write_part(tmp_path / "a.parquet", [record(packed("a"))], METADATA)
    return tmp_path / "a.parquet"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty file"),
        (b"PAR1", "cannot be read"),
        (b"PAR1" + bytes(100) + b"PAR1", "cannot be read"),
        (b"PAR1" + b"\xff" * 100 + b"PAR1", "cannot be read"),
        (b"garbage" * 100, r"cannot be read: .*[^.]; it is missing"),
    ],
)
def test_garbage(tmp_path, content, message) -> None:
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(StoreError, match=rf"a\.parquet.*{message}"):
        StoredModel(tmp_path)


def test_nothing_there(tmp_path) -> None:
    with pytest.raises(StoreError, match=r"a\.parquet cannot be read: .*No such file"):
        StoredModel(tmp_path / "a.parquet")


def test_an_empty_folder(tmp_path) -> None:
    with pytest.raises(StoreError, match=r"holds no \*\.parquet file; give the folder"):
        StoredModel(tmp_path)


def test_a_path_that_no_system_takes() -> None:
    with pytest.raises(StoreError, match="cannot be read"):
        StoredModel("a\0b")


def test_a_pipe_is_not_waited_for(tmp_path) -> None:
    os.mkfifo(tmp_path / "a.parquet")
    with pytest.raises(StoreError, match=r"a\.parquet: not a regular file"):
        StoredModel(tmp_path)


def test_a_folder_with_a_parquet_name(tmp_path) -> None:
    (tmp_path / "a.parquet").mkdir()
    with pytest.raises(StoreError, match=r"a\.parquet: not a regular file"):
        StoredModel(tmp_path)


def test_someone_elses_parquet(tmp_path) -> None:
    pq.write_table(pa.table({"x": [1]}), tmp_path / "a.parquet")
    with pytest.raises(StoreError, match=r"a\.parquet: not a quantized model"):
        StoredModel(tmp_path)


def test_metadata_that_is_no_text(path, tmp_path) -> None:
    table = pq.read_table(path).replace_schema_metadata({b"\xff": b"\xff"})
    pq.write_table(table, tmp_path / "b.parquet")
    with pytest.raises(StoreError, match=r"b\.parquet cannot be read"):
        StoredModel(tmp_path / "b.parquet")


@pytest.mark.parametrize("version", [b"2.3", b"3.0"])
def test_a_newer_version(path, tmp_path, version) -> None:
    table = pq.read_table(path)
    metadata = table.schema.metadata | {b"schema_version": version}
    pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "b.parquet")
    with pytest.raises(SchemaVersionError, match=rf"b\.parquet: written in schema {version.decode()}; this program"):
        StoredModel(tmp_path / "b.parquet")


def test_a_newer_version_is_told_before_its_columns(path, tmp_path) -> None:
    metadata = pq.read_schema(path).metadata | {b"schema_version": b"3.0"}
    pq.write_table(pa.table({"x": [1]}).replace_schema_metadata(metadata), tmp_path / "b.parquet")
    with pytest.raises(SchemaVersionError):
        StoredModel(tmp_path / "b.parquet")


@pytest.mark.parametrize("column", ["layer_name", "data", "row_scales", "checksum", "data_bytes", "grid", "rotation"])
def test_a_missing_column(path, tmp_path, column) -> None:
    other = edited(path, tmp_path / "b.parquet", **{column: None})
    with pytest.raises(StoreError, match=rf"b\.parquet: column '{column}' is missing"):
        StoredModel(other)


SHAPE = pa.list_(pa.int64())

CONTRADICTIONS = {
    "shape": [
        ([[4, 7]], "num_params is 24; shape .* has 28"),
        ([[-4, -6]], "is not that of a tensor"),
        ([[2**62, 2**62]], "is not that of a tensor"),
        ([[1] * 40], "40 axes"),
        ([[]], "quant_axis 1 is not an axis of shape"),
        ([[4, None]], "shape"),
        ([None], "shape"),
    ],
    "num_params": [([-24], "num_params is -24"), ([2**62], "num_params")],
    "dtype": [(["complex64"], "dtype 'complex64' is unknown")],
    "quant_type": [
        (["int2"], "quant_type 'int2' of 4 bits; allowed are 'int2' of 2"),
        (["int3"], "quant_type 'int3'"),
        (["bfloat16"], "quant_type 'bfloat16'"),
    ],
    "bit_width": [([8], "quant_type 'int4' of 8 bits"), ([0], "of 0 bits"), ([-4], "of -4 bits")],
    "symmetric": [
        ([None], "quant_type 'int4' of 4 bits; allowed are 'bfloat16' of 16"),
        ([True], "zero_points is there; its layout asks for none"),
    ],
    "quant_axis": [([2], "quant_axis 2"), ([-1], "quant_axis -1"), ([0], "rows 0 to 4"), ([None], "rows 0 to 4")],
    "group_size": [
        ([0], "group_size 0"),
        ([-4], "group_size -4"),
        ([1], "scales is 8 bytes; its layout asks for 24 bytes|checksum is"),
        ([None], "checksum is|scales is 8 bytes; its layout asks for 4"),
    ],
    "row_start": [([1], "first chunk is missing|data_bytes"), ([-1], "rows -1 to 4"), ([5], "rows 5 to 4")],
    "row_stop": [([3], "data_bytes is 12; its layout asks for 9"), ([5], "rows 0 to 5"), ([2**62], "rows 0 to")],
    "data_bytes": [([11], "data_bytes is 11"), ([-1], "data_bytes is -1"), ([2**62], "data_bytes is")],
    "chunk": [([1], "first chunk is missing"), ([-1], "first chunk is missing")],
    "checksum": [([0], "checksum is 0x[0-9a-f]{8}, expected 0x00000000")],
    "layer_name": [([None], "layer_name is null")],
    "decision": [([None], "decision is null")],
    "data": [
        ([b""], "data is 0 bytes; its layout asks for 12"),
        ([b"x" * 13], "data is 13 bytes"),
        ([b"x" * 12], "checksum is"),
        ([None], "data is null"),
    ],
    "scales": [
        ([None], "scales is null"),
        ([b"x"], "scales is 1 bytes; its layout asks for 8"),
        ([b"x" * 8], "checksum"),
    ],
    "zero_points": [([None], "zero_points is null"), ([b"x" * 9], "zero_points is 9 bytes")],
    "row_scales": [([None], "row_scales is null"), ([b"x" * 4], "row_scales is 4 bytes"), ([b"x" * 8], "checksum is")],
}


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [(column, values, message) for column, cases in CONTRADICTIONS.items() for values, message in cases],
)
def test_columns_that_contradict_each_other(path, tmp_path, column, values, message) -> None:
    replaced = pa.array(values, SHAPE) if column == "shape" else values
    if values == [None] and not isinstance(replaced, pa.Array):
        replaced = pa.array(values, pq.read_schema(path).field(column).type)
    other = edited(path, tmp_path / "b.parquet", **{column: replaced})
    with pytest.raises(StoreError, match=message):
        StoredModel(other).read_all()


def spatial(scales, **facts):
    on = {"enabled": True, "channel_equalization": True, "activation_smoothing": False}
    return [on | {"equalization_scales": scales} | facts]


TURNED = {
    "grid": [
        (["affine"], "grid 'affine' is unknown; schema 2.2 knows 'r2q' and 'row' and null"),
        (["R2Q"], "grid 'R2Q' is unknown"),
        ([None], "scales is 16 bytes; its layout asks for 8|checksum is"),
    ],
    "rotation": [
        ([-8], "rotation -8; allowed are 8, 16, 32, 64, 128, 256, 512, 1024, or none"),
        ([0], "rotation 0; allowed"),
        ([4], "rotation 4; allowed"),
        ([12], "rotation 12; allowed"),
        ([2048], "rotation 2048; allowed"),
        ([16], "rotation 16 does not divide its input channels, 8"),
    ],
    "scales": [([b"x" * 8], "scales is 8 bytes; its layout asks for 16")],
    "spatial_quant": [
        (spatial([1.0] * 7), r"equalization is float32 \(7,\); its input channels ask for float32 \(8,\)"),
        (spatial([]), r"equalization is float32 \(0,\)"),
        (spatial(None), r"equalization is float32 \(0,\)"),
        (spatial([1.0] * 7 + [0.0]), "equalization goes from 0.0 to 1.0; allowed: finite, above 0"),
        (spatial([1.0] * 7 + [-1.0]), "equalization goes from -1.0 to 1.0"),
        (spatial([1.0] * 7 + [float("inf")]), "equalization goes from 1.0 to inf"),
        (spatial([1.0] * 7 + [float("nan")]), "equalization goes from nan to nan"),
        (spatial([1.0] * 7 + [None]), "equalization goes from nan to nan"),
    ],
    "quant_axis": [([None], "rotation 8 does not divide its input channels, None|rows 0 to 4")],
}


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [(column, values, message) for column, cases in TURNED.items() for values, message in cases],
)
def test_a_basis_that_contradicts_the_layout(tmp_path, column, values, message) -> None:
    tensor = packed("a", (4, 8), grid="r2q", rotation=8, equalized=True)
    write_part(tmp_path / "a.parquet", [record(tensor)], METADATA)
    kind = pq.read_schema(tmp_path / "a.parquet").field(column).type
    other = edited(tmp_path / "a.parquet", tmp_path / "b.parquet", **{column: pa.array(values, kind)})
    with pytest.raises(StoreError, match=rf"^a \(chunk 0 in .*b\.parquet\): .*({message})"):
        StoredModel(other).read_all()


ROWS = {
    "grid": [
        ([None], "scales is null; its layout asks for 4 bytes"),
        (["r2q"], "scales is null; its layout asks for 8"),
    ],
    "group_size": [
        ([4], "grid 'row' is for rows of one group; group_size 4 makes 2 of them"),
        ([0], "group_size 0 holds no column"),
    ],
    "scales": [([b"\xff" * 4], "scales is there; its layout asks for none"), ([b""], "scales is there")],
    "zero_points": [([None], "zero_points is null")],
}


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [(column, values, message) for column, cases in ROWS.items() for values, message in cases],
)
def test_rows_of_one_group_that_contradict_themselves(tmp_path, column, values, message) -> None:
    write_part(tmp_path / "a.parquet", [record(packed("a", grid="row", group_size=None))], METADATA)
    other = edited(tmp_path / "a.parquet", tmp_path / "b.parquet", **{column: values})
    with pytest.raises(StoreError, match=rf"^a \(chunk 0 in .*b\.parquet\): .*{message}"):
        StoredModel(other).read_all()


def test_a_sealed_file_with_scales_that_its_grid_has_no_use_for(tmp_path) -> None:
    path = tmp_path / "a.parquet"
    write_part(path, [record(packed("a", group_size=None))], METADATA)
    one = StoredModel(path).chunks("a")[0]
    row = dataclasses.replace(one, grid="row")
    with pytest.raises(StoreError, match=r"^a .*: scales is there; its layout asks for none"):
        StoredModel(path).read_chunk(row)


def test_a_file_of_2_1_cannot_hold_what_came_later(tmp_path) -> None:
    write_part(tmp_path / "a.parquet", [record(packed("a", grid="row", group_size=None))], METADATA)
    table = pq.read_table(tmp_path / "a.parquet")
    older = table.replace_schema_metadata(table.schema.metadata | {b"schema_version": b"2.1"})
    pq.write_table(older, tmp_path / "b.parquet")
    with pytest.raises(StoreError, match=r"b\.parquet\): grid 'row' is unknown; schema 2\.1 knows 'r2q' and null"):
        StoredModel(tmp_path / "b.parquet")


def test_equalization_that_is_switched_off_means_nothing(tmp_path) -> None:
    write_part(tmp_path / "a.parquet", [record(packed("a"))], METADATA)
    for switched in ({"enabled": False}, {"channel_equalization": False}, {"enabled": None}):
        off = spatial([1.0], **switched)
        other = edited(tmp_path / "a.parquet", tmp_path / "b.parquet", spatial_quant=off)
        assert StoredModel(other).read("a")[0].equalization is None


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("grid", ["r2q"], "has a grid"),
        ("rotation", [8], "has a rotation"),
        ("spatial_quant", spatial([1.0]), "has equalization_scales"),
    ],
)
def test_only_codes_have_a_grid_and_a_basis(tmp_path, column, values, message) -> None:
    write_part(tmp_path / "a.parquet", [record(raw("a"))], METADATA)
    other = edited(tmp_path / "a.parquet", tmp_path / "b.parquet", **{column: values})
    with pytest.raises(StoreError, match=rf"is not quantized, but {message}; that is for codes alone"):
        StoredModel(other)


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("grid", ["r2q", None], "grid is None, but 'r2q' in|data_bytes|layout asks"),
        ("rotation", [8, None], "rotation is None, but 8 in"),
        ("spatial_quant", spatial([1.0] * 8) + spatial([2.0] * 8), "its equalization_scales are not those in"),
    ],
)
def test_chunks_in_different_bases_are_of_different_models(tmp_path, column, values, message) -> None:
    tensor = packed("a", (4, 8), grid="r2q", rotation=8, equalized=True)
    write_part(tmp_path / "a.parquet", chunked(tensor, 2), METADATA)
    other = edited(tmp_path / "a.parquet", tmp_path / "b.parquet", **{column: values})
    with pytest.raises(StoreError, match=message):
        StoredModel(other)


@pytest.mark.parametrize("column", ["layer_name", "shape", "checksum", "data", "scales", "spatial_quant"])
def test_a_column_of_another_type(path, tmp_path, column) -> None:
    other = edited(path, tmp_path / "b.parquet", **{column: pa.array([[{"x": "1.5"}]])})
    with pytest.raises(StoreError, match=r"b\.parquet cannot be read"):
        StoredModel(other).read_all()


def test_numbers_that_do_not_fit_their_type(path, tmp_path) -> None:
    other = edited(path, tmp_path / "b.parquet", checksum=pa.array([2**40]))
    with pytest.raises(StoreError, match=r"b\.parquet cannot be read"):
        StoredModel(other)


def test_a_flipped_bit_in_a_payload_names_the_layer(path) -> None:
    codes = packed("a").codes.tobytes()
    content = path.read_bytes()
    at = content.index(codes)
    path.write_bytes(content[:at] + bytes([codes[0] ^ 1]) + content[at + 1 :])
    with pytest.raises(ChecksumError, match=r"^a \(chunk 0 in .*a\.parquet\): checksum is 0x"):
        StoredModel(path).read("a")


def test_a_flipped_bit_in_a_small_column_is_found(path) -> None:
    content = path.read_bytes()
    path.write_bytes(content.replace(b"int4: as asked", b"int4: as asket"))
    with pytest.raises(StoreError, match=r"a\.parquet cannot be read: .*CRC"):
        StoredModel(path)


def damaged(content: bytes, flips, cut: int | None) -> bytes:
    changed = bytearray(content[:cut])
    for place, value in flips:
        if changed:
            changed[place % len(changed)] ^= value
    return bytes(changed)


def resealed(content: bytes) -> bytes:
    """As an attacker would: with the seal of the damaged footer."""
    at = content.rfind(MAGIC)
    if at < 0 or at + 20 > len(content):
        return content
    rows, length, _ = struct.unpack("<III", content[at + 8 : at + 20])
    table = content[max(0, at - 32 * rows) : at]
    crc = zlib.crc32(content[at + 20 : at + 20 + length], zlib.crc32(table))
    return content[: at + 16] + struct.pack("<I", crc) + content[at + 20 :]


# Places are counted from the end too, because the footer is where a reader is most easily led astray.
flips = st.lists(st.tuples(st.integers(-12_000, 30_000), st.integers(1, 255)), max_size=4)


@given(which=st.integers(0, 1), flips=flips, cut=st.none() | st.integers(0, 40_000))
@settings(max_examples=250, deadline=None)
def test_damage_is_an_error_or_does_not_matter(contents, tmp_path_factory, which, flips, cut) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.parquet"
    path.write_bytes(damaged(contents[which], flips, cut))
    allocated = pa.default_memory_pool().max_memory()
    try:
        found = [everything(one) for one in StoredModel(path).records()]
    except StoreError as error:
        assert str(path) in str(error)  # noqa: PT017
    else:
        assert found == [everything(one) for one in records()]
    assert pa.default_memory_pool().max_memory() <= max(allocated, 2**26)


@given(which=st.integers(0, 1), flips=flips, strip=st.booleans())
@example(which=0, flips=[(-1, 0)], strip=False)
@settings(max_examples=250, deadline=None)
def test_malice_is_an_error_or_another_model(contents, tmp_path_factory, which, flips, strip) -> None:
    """With a seal that fits, or none, whatever is read is at least a model: never a crash or another exception."""
    path = tmp_path_factory.getbasetemp() / "hostile.parquet"
    changed = damaged(contents[which], flips, None)
    path.write_bytes(changed.replace(MAGIC, bytes(8)) if strip else resealed(changed))
    try:
        for one in StoredModel(path).records():
            assert one.payload.nbytes <= len(changed)
    except ArrowQuantError as error:
        assert isinstance(error, StoreError)  # noqa: PT017

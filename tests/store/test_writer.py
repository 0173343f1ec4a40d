import errno
import os
import resource
import signal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from stored_examples import METADATA, SMOOTHED, SPATIAL, everything, packed, raw, record

from arrow_quant_v2.errors import QuantizationError, StoreError
from arrow_quant_v2.store import StoredModel, make_durable, write_part, writer
from arrow_quant_v2.store.schema import SCHEMA


@pytest.fixture
def target(tmp_path) -> Path:
    return tmp_path / "part.parquet"


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_row_group_holds_one_record(target) -> None:
    write_part(target, [record(packed("a")), record(packed("b")), record(raw("c"))], METADATA)
    footer = pq.read_metadata(target)
    assert footer.num_row_groups == footer.num_rows == 3
    assert left(target.parent) == ["part.parquet"]


def test_columns_are_plain_and_the_payload_has_no_statistics(target) -> None:
    write_part(target, [record(packed())], METADATA)
    group = pq.read_metadata(target).row_group(0)
    for column in map(group.column, range(group.num_columns)):
        assert (column.compression, set(column.encodings)) == ("UNCOMPRESSED", {"PLAIN", "RLE"})
        assert column.is_stats_set == (column.path_in_schema == "layer_name")


def test_equalization_scales_are_the_payloads(target) -> None:
    equalized = packed("a", equalized=True)
    write_part(target, [record(equalized, spatial_quant=SMOOTHED)], METADATA)
    (one,) = StoredModel(target).records()
    assert one.payload.equalization.tobytes() == equalized.equalization.tobytes()
    scales = {"channel_equalization": True, "equalization_scales": equalized.equalization.tolist()}
    assert one.spatial_quant == SMOOTHED | scales
    assert everything(one) == everything(record(equalized))


@pytest.mark.parametrize("payload", [packed("a"), raw("a")])
def test_scales_that_the_payload_does_not_have_are_refused(target, payload) -> None:
    with pytest.raises(StoreError, match=r"^a: spatial_quant says that its channels are equalized; give the scales"):
        write_part(target, [record(payload, spatial_quant=SPATIAL)], METADATA)


def test_the_file_says_what_it_is(target) -> None:
    write_part(target, [record(packed())], METADATA)
    assert pq.read_schema(target).equals(SCHEMA)  # the metadata aside
    metadata = pq.read_schema(target).metadata
    assert metadata.items() <= pq.read_metadata(target).metadata.items()
    assert metadata[b"schema_version"] == b"2.2"
    assert metadata[b"source_hash"] == b"c0ffee"


def test_literal_bytes_lie_in_the_file(target) -> None:
    """A length in four bytes, then the value: what a reader without Parquet could rely on."""
    tensor = packed(shape=(2, 4), group_size=4)
    write_part(target, [record(tensor)], METADATA)
    content = target.read_bytes()
    assert b"\x04\0\0\0" + tensor.codes.tobytes() in content
    assert b"\x02\0\0\0" + tensor.scales.tobytes() in content
    assert b"\x04\0\0\0" + tensor.row_scales.astype("<u2").tobytes() in content


def test_equal_records_give_equal_bytes(target, tmp_path) -> None:
    other = tmp_path / "elsewhere" / "other.parquet"
    other.parent.mkdir()
    for path in (target, other):
        write_part(path, [record(packed("a")), record(raw("b"))], dict(reversed(METADATA.items())))
    assert target.read_bytes() == other.read_bytes()
    write_part(target, [record(packed("a")), record(raw("b"))], METADATA)
    assert target.read_bytes() == other.read_bytes()


def test_records_are_taken_one_by_one(target) -> None:
    """The second is only asked for when the first is written, so that one is in memory at a time."""
    alive = []

    def produced():
        for name in "abc":
            one = record(packed(name, shape=(256, 1024)))
            alive.append(target.with_name("part.parquet.tmp").stat().st_size)
            yield one

    write_part(target, produced(), METADATA)
    assert alive[1] > 256 * 512
    assert alive[2] > 2 * 256 * 512


def test_a_producer_that_fails_leaves_nothing_and_keeps_its_error(target) -> None:
    def produced():
        yield record(packed())
        raise QuantizationError("layer 2 is NaN")

    with pytest.raises(QuantizationError, match="layer 2 is NaN"):
        write_part(target, produced(), METADATA)
    assert left(target.parent) == []


def test_an_interrupted_write_leaves_nothing(target) -> None:
    def produced():
        yield record(packed())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_part(target, produced(), METADATA)
    assert left(target.parent) == []


def test_a_failed_write_keeps_the_file_that_was_there(target) -> None:
    write_part(target, [record(packed())], METADATA)
    before = target.read_bytes()
    with pytest.raises(StoreError, match="is written twice"):
        write_part(target, [record(raw()), record(raw())], METADATA)
    assert target.read_bytes() == before
    assert left(target.parent) == ["part.parquet"]


def test_a_temporary_file_of_a_killed_run_is_overwritten(target) -> None:
    target.with_name("part.parquet.tmp").write_bytes(b"half a model")
    write_part(target, [record(packed())], METADATA)
    assert left(target.parent) == ["part.parquet"]
    assert StoredModel(target).names == ("layer.weight",)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("columns", [8, 4096])
def test_a_full_disk_is_one_clear_error(target, columns) -> None:
    target.with_name("part.parquet.tmp").symlink_to("/dev/full")
    with pytest.raises(
        StoreError, match=r"part\.parquet cannot be written: .*No space left on device.*nothing of it was left"
    ):
        write_part(target, [record(packed(shape=(64, columns)))], METADATA)
    assert left(target.parent) == []


def test_a_disk_that_fills_midway_is_one_clear_error(target) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        with pytest.raises(StoreError, match=r"part\.parquet cannot be written: .*File too large"):
            write_part(target, [record(packed(name, shape=(64, 1024))) for name in "abcd"], METADATA)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert left(target.parent) == []


def test_no_permission_is_one_clear_error(target, monkeypatch) -> None:
    def refused(*_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(writer.pa, "OSFile", refused)
    with pytest.raises(StoreError, match=r"part\.parquet cannot be written: .*Permission denied"):
        write_part(target, [record(packed())], METADATA)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_one_clear_error(target) -> None:
    target.parent.chmod(0o500)
    with pytest.raises(StoreError, match=r"part\.parquet cannot be written: .*Permission denied"):
        write_part(target, [record(packed())], METADATA)


@pytest.mark.parametrize("place", ["missing/part.parquet", "file/part.parquet"])
def test_a_folder_that_is_none_is_one_clear_error(tmp_path, place) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match=r"part\.parquet cannot be written"):
        write_part(tmp_path / place, [record(packed())], METADATA)


def test_a_target_that_is_a_folder_is_one_clear_error(target) -> None:
    target.mkdir()
    with pytest.raises(StoreError, match=r"part\.parquet cannot be written"):
        write_part(target, [record(packed())], METADATA)
    assert left(target.parent) == ["part.parquet"]


def test_nothing_to_write_is_an_error(target) -> None:
    with pytest.raises(StoreError, match="no records"):
        write_part(target, [], METADATA)
    assert left(target.parent) == []


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"decision": None}, "non-nullable"),
        ({"decision": "\ud800"}, "surrogates not allowed"),
        ({"source_checksum": -1}, "cannot be written"),
        ({"source_checksum": 2**32}, "cannot be written"),
        ({"bits_per_weight": "many"}, "cannot be written"),
        ({"time_aware_quant": "on"}, "cannot be written"),
    ],
)
def test_a_record_that_does_not_fit_the_schema_is_refused(target, facts, message) -> None:
    with pytest.raises(StoreError, match=message):
        write_part(target, [record(packed(), **facts)], METADATA)
    assert left(target.parent) == []


def test_a_layout_that_no_reader_would_take_is_not_written(target) -> None:
    tensor = packed(shape=(2, 3), group_size=8)
    object.__setattr__(tensor.layout, "group_size", -1)
    with pytest.raises(StoreError, match=r"^layer\.weight: group_size -1"):
        write_part(target, [record(tensor)], METADATA)


def test_a_dtype_that_no_reader_would_take_is_not_written(target) -> None:
    with pytest.raises(StoreError, match=r"^layer\.weight: dtype 'complex64' is unknown"):
        write_part(target, [record(packed(dtype="complex64"))], METADATA)


def test_a_value_larger_than_parquet_holds_says_how_to_split_it(target, monkeypatch) -> None:
    monkeypatch.setattr("arrow_quant_v2.store.rows.LARGEST_VALUE", 11)
    with pytest.raises(StoreError, match=r"^layer\.weight: 12 bytes in one value; Parquet holds 11: split the layer"):
        write_part(target, [record(packed())], METADATA)


def test_a_large_layer_is_not_copied_into_the_batch() -> None:
    tensor = packed(shape=(64, 1024))
    batch = writer.record_batch([record(tensor)])
    column = batch.column("data").buffers()[2]
    assert column.address == tensor.codes.__array_interface__["data"][0]


def test_durable_files_are_synced_with_their_folder(target, monkeypatch) -> None:
    write_part(target, [record(packed())], METADATA)
    synced = []
    monkeypatch.setattr(writer.os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    make_durable(target)
    assert synced == [target.stat().st_ino, target.parent.stat().st_ino]


def test_what_cannot_be_synced_is_one_clear_error(tmp_path) -> None:
    with pytest.raises(StoreError, match=r"missing\.parquet cannot be written: .*No such file"):
        make_durable(tmp_path / "missing.parquet")


def test_nulls_and_values_share_a_row_group(target) -> None:
    writer.write_group(target, [record(raw("a")), record(packed("b")), record(packed("c", symmetric=True))], METADATA)
    table = pq.read_table(target, columns=["scales", "zero_points"])
    assert [value is None for value in table.column("scales").to_pylist()] == [True, False, False]
    assert [value is None for value in table.column("zero_points").to_pylist()] == [True, False, True]
    assert pq.read_metadata(target).num_row_groups == 1


def test_an_empty_tensor_is_stored(target) -> None:
    write_part(target, [record(raw(shape=(0, 3)))], METADATA)
    (found,) = StoredModel(target).read("layer.bias")
    assert (found.shape, found.values.size) == ((0, 3), 0)
    assert isinstance(pq.read_table(target).column("data")[0], pa.LargeBinaryScalar)
    assert found.values.dtype == np.uint8

import os
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from stored_examples import (
    METADATA,
    chunked,
    contents,
    copied,
    edited,
    everything,
    models,
    packed,
    raw,
    record,
    unsealed,
)

from arrow_quant_v2.errors import ChecksumError, StoreError
from arrow_quant_v2.store import StoredModel, write_part
from arrow_quant_v2.store.mapped import MappedFile


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three layers in two files."""
    folder = tmp_path / "model"
    folder.mkdir()
    write_part(folder / "1.parquet", [record(packed("b", shape=(64, 128), group_size=32)), record(raw("a"))], METADATA)
    write_part(folder / "2.parquet", chunked(packed("c", (5, 8), symmetric=True), 2), METADATA)
    (folder / "config.json").write_text("{}")
    return folder


@given(models())
@settings(max_examples=40, deadline=None)
def test_what_goes_in_comes_out(tmp_path_factory, records) -> None:
    path = tmp_path_factory.mktemp("reader") / "a.parquet"
    write_part(path, records, METADATA)
    other = unsealed(path, path.with_name("b.parquet"))
    expected = [everything(one) for one in records]
    assert [everything(one) for one in StoredModel(path).records()] == expected
    assert [everything(one) for one in StoredModel(other).records()] == expected


def test_a_folder_is_one_model(folder) -> None:
    model = StoredModel(folder)
    assert model.names == ("a", "b", "c")
    assert [path.name for path in model.files] == ["1.parquet", "2.parquet"]
    assert [(one.layer_name, one.chunk, one.file.name) for one in model.entries] == [
        ("a", 0, "1.parquet"),
        ("b", 0, "1.parquet"),
        ("c", 0, "2.parquet"),
        ("c", 1, "2.parquet"),
        ("c", 2, "2.parquet"),
    ]
    assert model.metadata["source_hash"] == "c0ffee"
    assert model.file_metadata(folder / "2.parquet")["schema_version"] == "2.2"


def test_an_entry_has_every_small_column(folder) -> None:
    one = StoredModel(folder).chunks("b")[0]
    assert (one.shape, one.dtype, one.num_params, one.quant_type) == ((64, 128), "bfloat16", 8192, "int4")
    assert (one.bit_width, one.quant_axis, one.group_size, one.symmetric) == (4, 1, 32, False)
    assert (one.row_start, one.row_stop, one.data_bytes, one.decision) == (0, 64, 4096, "int4: as asked")
    assert one.stored_bytes == 4096 + 256 + 256 + 128
    assert one.layout == packed("b", (64, 128), group_size=32).layout
    assert one.sizes == (4096, 256, 256, 128)


def test_a_layer_comes_chunk_by_chunk(folder) -> None:
    pieces = StoredModel(folder).read("c")
    assert [piece.first_row for piece in pieces] == [0, 2, 4]
    whole = packed("c", (5, 8), symmetric=True)
    assert np.array_equal(np.concatenate([piece.codes for piece in pieces]), whole.codes)


def test_reading_copies_nothing(folder) -> None:
    """Views, read-only, on one map of the file, which they keep alive."""
    with StoredModel(folder) as model:
        (tensor,) = model.read("b")
        (bias,) = model.read("a")
    for array in (tensor.codes, tensor.scales, tensor.zero_points, bias.values):
        assert not array.flags.owndata
        assert not array.flags.writeable
    assert contents(tensor) == contents(packed("b", (64, 128), group_size=32))
    distance = tensor.scales.ctypes.data - tensor.codes.ctypes.data
    assert 4096 < distance < 4096 + 100


def test_after_closing_reading_is_an_error(folder) -> None:
    model = StoredModel(folder)
    model.close()
    with pytest.raises(StoreError, match="is not open in"):
        model.read("a")


def test_a_layer_loads_whatever_became_of_the_others(folder) -> None:
    """Neither listing nor reading one layer looks at another layer's bytes."""
    path = folder / "1.parquet"
    codes = packed("b", (64, 128), group_size=32).codes.tobytes()
    path.write_bytes(path.read_bytes().replace(codes, bytes(len(codes))))
    model = StoredModel(folder)
    assert model.names == ("a", "b", "c")
    assert contents(model.read("a")[0]) == contents(raw("a"))
    with pytest.raises(ChecksumError, match=r"^b \(chunk 0 in .*1\.parquet\): checksum is 0x[0-9a-f]{8}, expected 0x"):
        model.read("b")


def test_listing_a_large_file_touches_little_of_it(tmp_path) -> None:
    path = tmp_path / "large.parquet"
    write_part(path, [record(raw(name, shape=(2**22,), dtype="uint8")) for name in "abcd"], METADATA)
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    model = StoredModel(path)
    assert resident(path) < 2**20
    model.read("b")
    assert 2**22 <= resident(path) < 2**22 + 2**21


def resident(path: Path) -> int:
    """Bytes of the file that this process has touched through a map."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    total = 0
    for line in lines:
        if line.endswith(str(path)):
            total += next(int(of_map.split()[1]) for of_map in lines if of_map.startswith("Rss:"))
    return total * 1024


def test_threads_read_side_by_side(folder) -> None:
    for path in (folder, unsealed(folder / "1.parquet", folder / "1.other")):
        model, failures = StoredModel(path), []

        def work(model=model, failures=failures) -> None:
            for _ in range(10):
                if contents(model.read("b")[0]) != contents(packed("b", (64, 128), group_size=32)):
                    failures.append("b")

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []


@pytest.mark.parametrize("threads", [None, 1, 3])
def test_everything_at_once_is_the_same_as_one_by_one(folder, threads) -> None:
    model = StoredModel(folder)
    together = model.read_all(threads)
    assert list(together) == ["a", "b", "c"]
    for name, pieces in together.items():
        assert [contents(piece) for piece in pieces] == [contents(piece) for piece in model.read(name)]


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("dictionary", [False, True])
def test_any_form_of_parquet_is_read(folder, tmp_path, compression, version, dictionary) -> None:
    """Several small pages, one row group, compressed or not: what other tools make of a file."""
    table = pq.read_table(folder / "1.parquet")
    path = tmp_path / "rewritten.parquet"
    pq.write_table(
        table,
        path,
        compression=compression,
        data_page_version=version,
        use_dictionary=dictionary,
        data_page_size=100,
        write_batch_size=1,
    )
    for name in "ab":
        assert contents(StoredModel(path).read(name)[0]) == contents(StoredModel(folder).read(name)[0])


def test_a_payload_in_small_binary_is_read(folder, tmp_path) -> None:
    columns = pq.read_table(folder / "1.parquet", columns=["data", "scales", "zero_points", "row_scales"])
    small = {name: columns.column(name).cast(pa.binary()).combine_chunks() for name in columns.column_names}
    path = edited(folder / "1.parquet", tmp_path / "small.parquet", **small)
    assert contents(StoredModel(path).read("b")[0]) == contents(StoredModel(folder).read("b")[0])


def test_columns_of_strangers_are_ignored(folder, tmp_path) -> None:
    table = pq.read_table(folder / "1.parquet")
    pq.write_table(table.append_column("stranger", [["x", "y"]]), tmp_path / "more.parquet")
    assert StoredModel(tmp_path / "more.parquet").names == ("a", "b")


def test_structs_may_be_missing(folder, tmp_path) -> None:
    path = edited(folder / "1.parquet", tmp_path / "less.parquet", time_aware_quant=None, spatial_quant=None)
    assert StoredModel(path).entries[0].spatial_quant is None


def test_an_unknown_layer_is_named(folder) -> None:
    with pytest.raises(StoreError, match=r"model holds no layer 'd'; it has 3"):
        StoredModel(folder).read("d")


def test_an_entry_of_another_model_is_refused(folder, tmp_path) -> None:
    other = StoredModel(copied(folder / "1.parquet", tmp_path / "other.parquet"))
    with pytest.raises(StoreError, match="is not open in"):
        StoredModel(folder).read_chunk(other.entries[0])


@pytest.mark.parametrize("key", ["configuration", "source_hash"])
def test_files_of_two_models_do_not_mix(folder, key) -> None:
    write_part(folder / "3.parquet", [record(raw("z"))], METADATA | {key: "other"})
    with pytest.raises(StoreError, match=rf"3\.parquet: its {key} differs from that of .*1\.parquet"):
        StoredModel(folder)


def test_a_layer_in_two_files_is_refused(folder) -> None:
    copied(folder / "1.parquet", folder / "3.parquet")
    with pytest.raises(StoreError, match=r"^a \(chunk 0 in .*3\.parquet\): the same chunk lies in .*1\.parquet"):
        StoredModel(folder)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ([1, 2], "the layer's first chunk is missing; it starts at row 2"),
        ([0, 2], "starts at row 4, but chunk 0 .* ends at row 2; a chunk is missing"),
        ([0, 1], "ends at row 4 of 5; its next chunk is missing"),
    ],
)
def test_a_missing_chunk_is_named(tmp_path, kept, message) -> None:
    """Half a model is no model."""
    records = chunked(packed("c", (5, 8)), 2)
    write_part(tmp_path / "a.parquet", [records[index] for index in kept], METADATA)
    with pytest.raises(StoreError, match=rf"^c \(chunk \d in .*a\.parquet\): {message}"):
        StoredModel(tmp_path)


def test_chunks_of_different_tensors_do_not_mix(tmp_path) -> None:
    one, two = chunked(packed("c", (4, 8)), 2), chunked(packed("c", (4, 8), dtype="float32"), 2)
    write_part(tmp_path / "a.parquet", [one[0], two[1]], METADATA)
    with pytest.raises(StoreError, match=r"dtype is 'float32', but 'bfloat16' in .*; chunks of different models"):
        StoredModel(tmp_path)


def test_a_file_that_becomes_larger_keeps_old_views_valid(folder) -> None:
    """Files are replaced, never overwritten, so that what is mapped stays what it was."""
    (before,) = StoredModel(folder).read("b")
    write_part(folder / "1.parquet", [record(packed("b", seed=5))], METADATA)
    assert contents(before) == contents(packed("b", (64, 128), group_size=32))


def test_only_parquet_files_directly_in_the_folder_count(folder) -> None:
    (folder / "deeper").mkdir()
    copied(folder / "1.parquet", folder / "deeper" / "1.parquet")
    copied(folder / "1.parquet", folder / "9.parquet.tmp")
    assert len(StoredModel(folder).files) == 2


def test_value_in_a_row_that_does_not_exist_is_an_error(folder) -> None:
    with pytest.raises(StoreError, match=r"1\.parquet cannot be read"):
        MappedFile(folder / "1.parquet").value("data", 17, 4)

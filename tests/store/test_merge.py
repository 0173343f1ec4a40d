from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stored_examples import METADATA, chunked, contents, everything, models, packed, raw, record

from arrow_quant_v2.errors import ChecksumError, StoreError
from arrow_quant_v2.store import StoredModel, merge, merge_parts, write_part


@given(models(), st.randoms())
@settings(max_examples=20, deadline=None)
def test_merging_changes_nothing_and_forgets_the_parts(tmp_path_factory, records, random) -> None:
    folder = tmp_path_factory.mktemp("merge")
    layers = {one.payload.name: [] for one in records}
    for one in records:
        layers[one.payload.name].append(one)
    parts = []
    for number, of_layer in enumerate(random.sample(list(layers.values()), len(layers))):
        parts.append(folder / f"{number}.part")
        write_part(parts[-1], of_layer, METADATA)
    merge_parts(parts, folder / "merged.parquet", METADATA)
    write_part(folder / "one.part", records, METADATA)
    merge_parts([folder / "one.part"], folder / "again.parquet", METADATA)

    assert (folder / "merged.parquet").read_bytes() == (folder / "again.parquet").read_bytes()
    assert pq.read_metadata(folder / "merged.parquet").num_row_groups == 1
    merged = StoredModel(folder / "merged.parquet")
    assert [everything(one) for one in merged.records()] == [everything(one) for one in records]


def test_rows_of_one_group_of_an_older_file_are_rewritten_with_the_scales_that_they_have(tmp_path) -> None:
    older = StoredModel(Path(__file__).parent / "golden" / "v2_0.parquet")
    records = [older.record(one) for one in older.chunks("embedding.weight")]
    write_part(tmp_path / "a", records, METADATA)
    merge_parts([tmp_path / "a"], tmp_path / "b", METADATA)
    with StoredModel(tmp_path / "b") as newer:
        assert newer.metadata["schema_version"] == "2.2"
        assert {one.group_size for one in newer.entries} == {None}
        assert [contents(one.payload) for one in newer.records()] == [contents(one.payload) for one in records]
        assert any((one.payload.scales != 255).any() for one in newer.records())


def test_one_layer_of_a_merged_file_is_a_view(tmp_path) -> None:
    write_part(tmp_path / "a", [record(raw("a")), record(packed("b")), record(packed("c", symmetric=True))], METADATA)
    merge_parts([tmp_path / "a"], tmp_path / "b", METADATA)
    (tensor,) = StoredModel(tmp_path / "b").read("b")
    assert not any(array.flags.owndata for array in (tensor.codes, tensor.scales, tensor.zero_points))


def test_a_layer_in_two_parts_is_refused(tmp_path) -> None:
    for name in "ab":
        write_part(tmp_path / name, [record(raw())], METADATA)
    with pytest.raises(StoreError, match=r"layer\.bias chunk 0 is written twice"):
        merge_parts([tmp_path / "a", tmp_path / "b"], tmp_path / "c", METADATA)
    assert not (tmp_path / "c").exists()


def test_a_damaged_part_is_not_merged(tmp_path) -> None:
    tensor = packed(shape=(8, 64))
    write_part(tmp_path / "a", [record(tensor)], METADATA)
    content = (tmp_path / "a").read_bytes()
    (tmp_path / "a").write_bytes(content.replace(tensor.codes.tobytes(), bytes(tensor.codes.nbytes)))
    with pytest.raises(ChecksumError):
        merge_parts([tmp_path / "a"], tmp_path / "c", METADATA)
    assert not (tmp_path / "c").exists()


def test_too_much_to_merge_is_refused(tmp_path, monkeypatch) -> None:
    write_part(tmp_path / "a", chunked(raw(shape=(100,)), 50), METADATA)
    monkeypatch.setattr(merge, "MERGE_BYTES", 399)
    with pytest.raises(StoreError, match="c: 400 bytes in 1 parts; merge at most 399"):
        merge_parts([tmp_path / "a"], tmp_path / "c", METADATA)

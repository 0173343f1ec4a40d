"""What other programs read, and what they write back, is the same model."""

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from stored_examples import METADATA, chunked, everything, packed, raw, record

from arrow_quant_v2.store import StoredModel, write_part

QUESTION = "SELECT layer_name, bit_width, cosine_similarity FROM '{}/**/*.parquet' ORDER BY 3"


EQUALIZED = packed("a", equalized=True)
SPATIAL = {
    "enabled": True,
    "channel_equalization": True,
    "activation_smoothing": False,
    "equalization_scales": EQUALIZED.equalization.tolist(),
}


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "out"
    (folder / "transformer").mkdir(parents=True)
    first = [record(EQUALIZED, cosine_similarity=0.75), record(raw("b"))]
    write_part(folder / "transformer" / "1.parquet", first, METADATA)
    second = chunked(packed("c", (4, 8), bits=2, symmetric=True, grid="r2q", rotation=8), 2, cosine_similarity=0.25)
    write_part(folder / "transformer" / "2.parquet", second, METADATA)
    return folder


ANSWER = [("c", 2, 0.25), ("c", 2, 0.25), ("a", 4, 0.75), ("b", 32, None)]


def test_duckdb_answers_the_first_question(out) -> None:
    assert duckdb.sql(QUESTION.format(out)).fetchall() == ANSWER


def test_duckdb_reads_every_column(out) -> None:
    rows = duckdb.sql(f"SELECT * FROM '{out}/**/*.parquet' ORDER BY layer_name, chunk")
    found = dict(zip(rows.columns, rows.fetchall()[0], strict=True))
    assert found["data"] == packed("a").codes.tobytes()
    assert found["row_scales"] == packed("a").row_scales.tobytes()
    assert (found["grid"], found["rotation"]) == (None, None)
    assert found["spatial_quant"] == SPATIAL


def test_duckdb_finds_a_layer_by_name(out) -> None:
    query = f"SELECT octet_length(data) FROM '{out}/**/*.parquet' WHERE layer_name = 'b'"
    assert duckdb.sql(query).fetchall() == [(20,)]


def test_polars_answers_the_first_question(out) -> None:
    frame = pl.scan_parquet(f"{out}/**/*.parquet").select("layer_name", "bit_width", "cosine_similarity")
    assert frame.sort("cosine_similarity", nulls_last=True).collect().rows() == ANSWER


def test_polars_reads_every_column(out) -> None:
    frame = pl.read_parquet(out / "transformer" / "1.parquet")
    assert frame["data"][0] == packed("a").codes.tobytes()
    assert frame["shape"].to_list() == [[4, 6], [5]]
    assert frame["spatial_quant"][0] == SPATIAL


def test_pandas_reads_every_column(out) -> None:
    frame = pd.read_parquet(out / "transformer" / "1.parquet").set_index("layer_name")
    assert frame.loc["a", "data"] == packed("a").codes.tobytes()
    assert np.array_equal(frame.loc["a", "shape"], [4, 6])
    assert frame.loc["b", "scales"] is None


def test_pyarrow_reads_a_folder(out) -> None:
    table = ds.dataset(out, format="parquet").to_table(columns=["layer_name", "bit_width", "cosine_similarity"])
    assert table.sort_by([("cosine_similarity", "ascending")]).to_pylist() == [
        dict(zip(table.column_names, row, strict=True)) for row in ANSWER
    ]


def by_duckdb(source, target) -> None:
    pairs = ", ".join(f"{key}: '{text}'" for key, text in StoredModel(source).metadata.items())
    duckdb.sql(f"COPY (FROM '{source}') TO '{target}' (FORMAT parquet, KV_METADATA {{ {pairs} }})")


def by_polars(source, target) -> None:
    pl.read_parquet(source).write_parquet(target, metadata=dict(StoredModel(source).metadata))


def by_pyarrow(source, target) -> None:
    pq.write_table(pq.read_table(source), target)


def by_pandas(source, target) -> None:
    pd.read_parquet(source).to_parquet(target)
    table = pq.read_table(target)
    pq.write_table(table.replace_schema_metadata(dict(StoredModel(source).metadata)), target)


@pytest.mark.parametrize("rewrite", [by_duckdb, by_polars, by_pyarrow, by_pandas])
@pytest.mark.parametrize("name", ["1.parquet", "2.parquet"])
def test_a_file_that_another_tool_rewrote_is_the_same_model(out, tmp_path, rewrite, name) -> None:
    rewrite(out / "transformer" / name, tmp_path / "rewritten.parquet")
    expected, found = (StoredModel(path) for path in (out / "transformer" / name, tmp_path / "rewritten.parquet"))
    assert [everything(one) for one in found.records()] == [everything(one) for one in expected.records()]

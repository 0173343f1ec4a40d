"""docs/format.md is the contract: what it shows must run, and its numbers must be true."""

import re
from pathlib import Path

import duckdb
import numpy as np
import pytest
from stored_examples import METADATA, chunked, packed, raw, record

from arrow_quant_v2.kernels.tensors import dequantized
from arrow_quant_v2.packed import ROTATIONS
from arrow_quant_v2.store import StoredModel, write_part
from arrow_quant_v2.store.schema import ENCODINGS, SCHEMA, SCHEMA_NAME, SCHEMA_VERSION, version_text
from arrow_quant_v2.store.sizes import LARGEST_RANK, LARGEST_VALUE

TEXT = (Path(__file__).parents[2] / "docs" / "format.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
SQL = [code for language, code in BLOCKS if language == "sql"]
POLARS, DEQUANTIZE = (code for language, code in BLOCKS if language == "python")


@pytest.fixture
def out(tmp_path, monkeypatch):
    """Where the examples look for out/."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "model.parquet"


def shown(tensor, out) -> np.ndarray:
    write_part(out, [record(raw("bias")), *chunked(tensor, 2)], METADATA)
    weight: np.ndarray = run(DEQUANTIZE)["weight"]
    assert (weight.shape, weight.dtype) == (tensor.layout.shape, np.float32)
    return weight


def run(code: str) -> dict[str, object]:
    found: dict[str, object] = {}
    exec(compile(code, "docs/format.md", "exec"), found)
    return found


def test_the_questions_are_answered(out) -> None:
    records = [
        record(packed("a"), cosine_similarity=0.9),
        record(packed("b"), cosine_similarity=0.5),
        *chunked(raw("c", (6,)), 4, bits_per_weight=32.0),
    ]
    write_part(out, records, METADATA)
    first, second = (duckdb.sql(code).fetchall() for code in SQL)
    assert first[:2] == [("b", 4, 0.5), ("a", 4, 0.9)]
    assert sorted(second) == [("float32", 1, 6, 24e-6), ("int4", 2, 48, 27e-6)]
    assert run(POLARS)["kept"].rows() == [("c", "int4: as asked")] * 2


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("axis", "group_size"), [(1, 4), (1, None), (None, 5), (2, 3)])
def test_the_example_dequantizes_one_layer(out, bits, symmetric, axis, group_size) -> None:
    tensor = packed("attention.weight", (3, 4, 7), bits, axis, group_size=group_size, symmetric=symmetric)
    weight = shown(tensor, out)
    layout = tensor.layout
    row, column = layout.rows - 1, layout.columns - 1
    place = column * bits
    code = int(tensor.codes[row, place // 8]) >> place % 8 & 2**bits - 1
    s, z = (None if part is None else int(part[row, -1]) for part in (tensor.scales, tensor.zero_points))
    zero = 2 ** (bits - 1) if z is None else z / {2: 85, 4: 17, 8: 1}[bits]
    row_scale = np.array([int(tensor.row_scales[row]) << 16], np.uint32).view(np.float32)[0]
    assert weight.reshape(-1)[-1] == pytest.approx(row_scale * (s / 255) ** 2 * (code - zero), rel=1e-5)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("axis", "group_size"), [(1, 4), (1, None), (None, 5), (2, 3)])
def test_the_example_knows_the_residual_grid(out, bits, symmetric, axis, group_size) -> None:
    tensor = packed("attention.weight", (3, 4, 7), bits, axis, group_size=group_size, symmetric=symmetric, grid="r2q")
    assert np.array_equal(shown(tensor, out).reshape(tensor.rows, -1), dequantized(tensor).numpy())


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("axis", "group_size"), [(1, 100), (1, None), (None, None)])
def test_the_example_knows_rows_of_one_group(out, bits, symmetric, axis, group_size) -> None:
    tensor = packed("attention.weight", (3, 4, 7), bits, axis, group_size=group_size, symmetric=symmetric, grid="row")
    assert np.array_equal(shown(tensor, out).reshape(tensor.rows, -1), dequantized(tensor).numpy())


@pytest.mark.parametrize("grid", ["affine", "r2q"])
@pytest.mark.parametrize("basis", [{"rotation": 8}, {"equalized": True}, {"rotation": 16, "equalized": True}])
@pytest.mark.parametrize(("shape", "axis"), [((5, 32), 1), ((3, 16, 3, 3), 1), ((2, 3, 64), 2)])
def test_the_example_undoes_rotation_and_equalization(out, shape, axis, basis, grid) -> None:
    tensor = packed("attention.weight", shape, 4, axis, grid=grid, **basis)
    expected = dequantized(tensor).numpy()
    found = shown(tensor, out).reshape(tensor.rows, -1)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("codes", "bits", "expected"),
    re.findall(r"^\| ((?:\d+ )+\d+) \| (\d) \| `([0-9a-f ]+)` \|$", TEXT, re.MULTILINE),
)
def test_the_bits_on_paper_are_those_of_the_formula(codes, bits, expected) -> None:
    packed_bits = sum(int(code) << place * int(bits) for place, code in enumerate(codes.split()))
    assert packed_bits.to_bytes(len(expected.split()), "little") == bytes.fromhex(expected)


def test_every_column_is_described() -> None:
    table = TEXT.split("## Columns")[1].split("## Encodings")[0]
    described = [name for names in re.findall(r"^\| ([a-z_, ]+) \|", table, re.MULTILINE) for name in names.split(", ")]
    assert described[1:] == SCHEMA.names  # after the head of the table
    nulls = {
        name: bool(null.strip())
        for names, null in re.findall(r"^\| ([a-z_, ]+) \|[^|]*\|([^|]*)\|", table, re.MULTILINE)
        for name in names.split(", ")
    }
    assert {name: nulls[name] for name in SCHEMA.names} == {field.name: field.nullable for field in SCHEMA}


def test_the_constants_are_those_of_the_program(out) -> None:
    assert f"`{SCHEMA_NAME}`" in TEXT
    assert f"schema {version_text(SCHEMA_VERSION)}" in TEXT
    assert LARGEST_VALUE == 2**31 - 2**16
    assert f"| axes of a tensor | {LARGEST_RANK} |" in TEXT
    write_part(out, [record(raw())], METADATA)
    for key in StoredModel(out).metadata:
        assert f"| {key} |" in TEXT
    assert f"a power of two from {min(ROTATIONS)} to {max(ROTATIONS)} that divides" in TEXT
    assert f"| schema_version | `{version_text(SCHEMA_VERSION)}` |" in TEXT
    assert set(ENCODINGS) >= {"data", "weight", "scales", "zero_points", "row_scales", "checksum", "rotation"}

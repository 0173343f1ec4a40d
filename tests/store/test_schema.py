import pyarrow as pa
import pytest

from arrow_quant_v2.errors import SchemaVersionError, StoreError
from arrow_quant_v2.store import schema

PROMISED = {
    "layer_name": "string",
    "shape": "list<element: int64 not null>",
    "dtype": "string",
    "data": "large_binary",
    "num_params": "int64",
    "chunk": "int32",
    "quant_type": "string",
    "scales": "large_binary",
    "zero_points": "large_binary",
    "row_scales": "large_binary",
    "quant_axis": "int32",
    "group_size": "int32",
    "symmetric": "bool",
    "grid": "string",
    "rotation": "int32",
    "is_diffusion_model": "bool",
    "modality": "string",
    "method": "string",
    "bit_width": "int32",
    "bits_per_weight": "double",
    "cosine_similarity": "double",
    "mse": "double",
    "output_error": "list<item: float>",
    "decision": "string",
    "checksum": "uint32",
    "source_checksum": "uint32",
    "data_bytes": "int64",
    "row_start": "int64",
    "row_stop": "int64",
}
NULLABLE = {
    "scales", "zero_points", "row_scales", "quant_axis", "group_size", "symmetric", "grid", "rotation", "modality",
    "method", "cosine_similarity", "mse", "output_error", "time_aware_quant", "spatial_quant", "activation_stats",
}  # fmt: skip
NEW = {"grid", "rotation", "output_error"}


def test_the_columns_since_schema_2_1_are_frozen() -> None:
    structs = {"time_aware_quant", "spatial_quant", "activation_stats"}
    assert {field.name: str(field.type) for field in schema.SCHEMA if field.name not in structs} == PROMISED
    assert {field.name for field in schema.SCHEMA if field.nullable} == NULLABLE
    assert set(schema.SCHEMA.names) == {*PROMISED, *structs}


def test_the_structs_hold_what_the_design_promises() -> None:
    time_aware = schema.SCHEMA.field("time_aware_quant").type
    assert [field.name for field in time_aware] == ["enabled", "num_time_groups", "time_group_params"]
    group = time_aware.field("time_group_params").type.value_type
    assert [field.name for field in group][:4] == ["time_range", "scale", "zero_point", "group_size"]
    assert [field.name for field in group.field("time_range").type] == ["start", "end"]
    spatial = schema.SCHEMA.field("spatial_quant").type
    assert [field.name for field in spatial] == [
        "enabled",
        "channel_equalization",
        "activation_smoothing",
        "equalization_scales",
    ]
    stats = schema.SCHEMA.field("activation_stats").type
    assert {field.name: field.type for field in stats} == dict.fromkeys(
        ["mean", "std", "min", "max"], pa.list_(pa.float32())
    )


def test_metadata_holds_ours_and_the_callers() -> None:
    found = schema.file_metadata({"b": "2", "a": "1"})
    assert found["schema_name"] == "parquet_v2_extended"
    assert found["schema_version"] == "2.2"
    assert "65025" in found["encodings"]
    assert list(found)[-2:] == ["a", "b"]


@pytest.mark.parametrize("key", ["schema_name", "schema_version", "encodings"])
def test_our_keys_are_not_the_callers(key) -> None:
    with pytest.raises(StoreError, match=f"'{key}' belongs to the store"):
        schema.file_metadata({key: "x"})


def metadata(version: str) -> dict[str, str]:
    return {"schema_name": "parquet_v2_extended", "schema_version": version}


@pytest.mark.parametrize("version", ["2.3", "3.0", "10.0", "1.0"])
def test_another_version_is_refused_by_name(version) -> None:
    with pytest.raises(SchemaVersionError, match=rf"^x: written in schema {version}; this program reads 2\.0 to 2\.2"):
        schema.check_version("x", metadata(version))


@pytest.mark.parametrize("version", ["", "2", "2.", "a.b", "-2.0", "2.0.0", "\u00b2.0", "9" * 5000 + ".0"])
def test_a_version_that_is_none_is_refused(version) -> None:
    with pytest.raises(StoreError, match=r"is not a version like '2\.2'"):
        schema.check_version("x", metadata(version))


@pytest.mark.parametrize("version", [(2, 0), (2, 1), (2, 2)])
def test_our_versions_pass(version) -> None:
    assert schema.check_version("x", metadata(schema.version_text(version))) == version


def test_the_columns_of_schema_2_0_are_those_of_2_1_but_three() -> None:
    assert set(schema.columns_of((2, 1))) - set(schema.columns_of((2, 0))) == NEW
    assert schema.columns_of((2, 1)) == schema.columns_of((2, 2)) == tuple(schema.SCHEMA.names)


def test_another_kind_of_file_is_refused() -> None:
    with pytest.raises(StoreError, match="x: not a quantized model: its metadata has schema_name None"):
        schema.check_version("x", {})


def test_a_missing_column_is_named() -> None:
    for column in PROMISED:
        with pytest.raises(StoreError, match=f"x: column '{column}' is missing"):
            schema.check_columns("x", [name for name in schema.SCHEMA.names if name != column], (2, 1))


def test_a_column_that_came_later_may_be_absent_from_an_older_file() -> None:
    schema.check_columns("x", [name for name in schema.SCHEMA.names if name not in NEW], (2, 0))


def test_structs_may_be_absent_and_strangers_present() -> None:
    schema.check_columns("x", [*PROMISED, "stranger"], (2, 1))

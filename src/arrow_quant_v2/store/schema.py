"""The columns, versions and metadata of Parquet V2 Extended; knows neither files nor values."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pyarrow as pa

from arrow_quant_v2.errors import SchemaVersionError, StoreError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

SCHEMA_NAME = "parquet_v2_extended"
SCHEMA_VERSION = (2, 2)
ADDED = {"grid": (2, 1), "rotation": (2, 1), "output_error": (2, 1)}  # columns that the first version did not have
GRIDS_ADDED = {"r2q": (2, 1), "row": (2, 2)}  # what stands in the column `grid`, and since when

NAME_KEY = "schema_name"
VERSION_KEY = "schema_version"
ENCODINGS_KEY = "encodings"
CONFIGURATION_KEY = "configuration"
SOURCE_KEY = "source_hash"
RESERVED_KEYS = (NAME_KEY, VERSION_KEY, ENCODINGS_KEY)
AGREEING_KEYS = (CONFIGURATION_KEY, SOURCE_KEY)  # the same in every file of a model

ENCODINGS = {
    "data": "codes: bits lowest first, every row starts on a byte; unquantized: little-endian values",
    "weight": "scale * (code - zero_point)",
    "weight_r2q": "m = 2^(bit_width - 1) - 1; (mu + (a1 if code > m else -a1)) + a2 * (2 * (code & m) - m), in float32",
    "scales": "uint8 s per group, scale = row_scale * (s * s / 65025), in float32; grid r2q: two per group, a1 and a2;"
    " grid row: null, scale = row_scale",
    "zero_points": "uint8 z per group, zero_point = z / (255 / (2^bit_width - 1)); null: 2^(bit_width - 1)",
    "zero_points_r2q": "uint8 z per group, mu = (a1 + m * a2) * ((255 - 2 * z) / 255); null: 0",
    "rotation": "each block of that many input channels is (w * sign) @ Hadamard / sqrt(block), see docs/format.md",
    "equalization_scales": "float32 s per input channel, the weight was multiplied with s before it was turned",
    "row_scales": "bfloat16 per row, little-endian",
    "checksum": "zlib.crc32 over data, scales, zero_points, row_scales in this order",
}

_FLOATS = pa.list_(pa.float32())
_TIME_GROUP = pa.struct(
    [
        ("time_range", pa.struct([("start", pa.float64()), ("end", pa.float64())])),
        ("scale", pa.float32()),
        ("zero_point", pa.float32()),
        ("group_size", pa.int32()),
        ("bias_correction", _FLOATS),
    ]
)
_TIME_AWARE = pa.struct(
    [("enabled", pa.bool_()), ("num_time_groups", pa.int32()), ("time_group_params", pa.list_(_TIME_GROUP))]
)
_SPATIAL = pa.struct(
    [
        ("enabled", pa.bool_()),
        ("channel_equalization", pa.bool_()),
        ("activation_smoothing", pa.bool_()),
        ("equalization_scales", _FLOATS),
    ]
)
_STATS = pa.struct([("mean", _FLOATS), ("std", _FLOATS), ("min", _FLOATS), ("max", _FLOATS)])

FACTS = pa.schema(
    [
        pa.field("layer_name", pa.string(), nullable=False),
        pa.field("shape", pa.list_(pa.field("element", pa.int64(), nullable=False)), nullable=False),
        pa.field("dtype", pa.string(), nullable=False),
        pa.field("num_params", pa.int64(), nullable=False),
        pa.field("chunk", pa.int32(), nullable=False),
        pa.field("quant_type", pa.string(), nullable=False),
        pa.field("bit_width", pa.int32(), nullable=False),
        pa.field("bits_per_weight", pa.float64(), nullable=False),
        pa.field("quant_axis", pa.int32()),
        pa.field("group_size", pa.int32()),
        pa.field("symmetric", pa.bool_()),
        pa.field("grid", pa.string()),
        pa.field("rotation", pa.int32()),
        pa.field("row_start", pa.int64(), nullable=False),
        pa.field("row_stop", pa.int64(), nullable=False),
        pa.field("data_bytes", pa.int64(), nullable=False),
        pa.field("checksum", pa.uint32(), nullable=False),
        pa.field("source_checksum", pa.uint32(), nullable=False),
        pa.field("is_diffusion_model", pa.bool_(), nullable=False),
        pa.field("modality", pa.string()),
        pa.field("method", pa.string()),
        pa.field("cosine_similarity", pa.float64()),
        pa.field("mse", pa.float64()),
        pa.field("output_error", _FLOATS),
        pa.field("decision", pa.string(), nullable=False),
        pa.field("time_aware_quant", _TIME_AWARE),
        pa.field("spatial_quant", _SPATIAL),
        pa.field("activation_stats", _STATS),
    ]
)
PAYLOAD = pa.schema(
    [
        pa.field("data", pa.large_binary(), nullable=False),
        pa.field("scales", pa.large_binary()),
        pa.field("zero_points", pa.large_binary()),
        pa.field("row_scales", pa.large_binary()),
    ]
)
SCHEMA = pa.schema([*FACTS, *PAYLOAD])
OPTIONAL_COLUMNS = ("time_aware_quant", "spatial_quant", "activation_stats")


def file_metadata(given: Mapping[str, str]) -> dict[str, str]:
    """The key-value metadata of a file: the store's own keys, then the caller's, sorted.

    Raises:
        StoreError: the caller uses a key that belongs to the store.
    """
    taken = sorted(set(given) & set(RESERVED_KEYS))
    if taken:
        raise StoreError(f"metadata key {taken[0]!r} belongs to the store; choose another name")
    own = {
        NAME_KEY: SCHEMA_NAME,
        VERSION_KEY: version_text(SCHEMA_VERSION),
        ENCODINGS_KEY: json.dumps(ENCODINGS, sort_keys=True),
    }
    return own | dict(sorted(given.items()))


def version_text(version: tuple[int, int]) -> str:
    """A version as it stands in the file: "2.2"."""
    return f"{version[0]}.{version[1]}"


def check_version(where: object, metadata: Mapping[str, str]) -> tuple[int, int]:
    """The version of a file; one of another kind, or that this program cannot read, is refused.

    Raises:
        StoreError: the file is no Parquet V2 Extended, or its version is not a version.
        SchemaVersionError: the file is newer than this program, or of another generation.
    """
    name, text = metadata.get(NAME_KEY), metadata.get(VERSION_KEY, "")
    if name != SCHEMA_NAME:
        raise StoreError(
            f"{where}: not a quantized model: its metadata has {NAME_KEY} {name!r}, not {SCHEMA_NAME!r};"
            " if another tool rewrote it, let that tool keep the key-value metadata"
        )
    found = _version(where, text)
    if found[0] != SCHEMA_VERSION[0] or found > SCHEMA_VERSION:
        raise SchemaVersionError(
            f"{where}: written in schema {version_text(found)}; this program reads"
            f" {SCHEMA_VERSION[0]}.0 to {version_text(SCHEMA_VERSION)}; install a matching arrow-quant-v2"
        )
    return found


def columns_of(version: tuple[int, int]) -> tuple[str, ...]:
    """The columns that a version knows; others of such a file mean nothing."""
    return tuple(name for name in SCHEMA.names if ADDED.get(name, version) <= version)


def check_columns(where: object, found: Iterable[str], version: tuple[int, int]) -> None:
    """Refuse a file that lacks a column of its version; columns that are not ours are nobody's business.

    Raises:
        StoreError: names the missing column.
    """
    present = set(found)
    for column in columns_of(version):
        if column not in present and column not in OPTIONAL_COLUMNS:
            raise StoreError(f"{where}: column {column!r} is missing; every column but the structs is required")


def _version(where: object, text: str) -> tuple[int, int]:
    major, _, minor = text.partition(".")
    if not (_is_number(major) and _is_number(minor)):
        raise StoreError(f"{where}: {VERSION_KEY} {text!r} is not a version like {version_text(SCHEMA_VERSION)!r}")
    return int(major), int(minor)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 10  # noqa: PLR2004  (no number of a million digits)

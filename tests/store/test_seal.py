import struct
import zlib

import numpy as np
import pyarrow.parquet as pq
import pytest
from stored_examples import METADATA, packed, raw, record, unsealed

from arrow_quant_v2.errors import ChecksumError, StoreError
from arrow_quant_v2.store import StoredModel, write_part
from arrow_quant_v2.store.seal import seal_bytes, sealed_offsets


@pytest.fixture
def path(tmp_path):
    write_part(tmp_path / "a.parquet", [record(packed("a")), record(raw("b"))], METADATA)
    return tmp_path / "a.parquet"


def test_the_seal_is_literal_bytes_before_the_footer(path) -> None:
    content = path.read_bytes()
    (length,) = struct.unpack("<I", content[-8:-4])
    footer = len(content) - 8 - length
    magic, rows, sealed_length, crc = struct.unpack("<8sIII", content[footer - 20 : footer])
    assert (magic, rows, sealed_length) == (b"ARROWQ2\0", 2, length)
    table = content[footer - 20 - 64 : footer - 20]
    assert crc == zlib.crc32(table + content[footer : footer + length])
    data, scales, zero_points, row_scales, *second = struct.unpack("<8Q", table)
    tensor = packed("a")
    assert content[data:].startswith(tensor.codes.tobytes())
    assert content[scales:].startswith(tensor.scales.tobytes())
    assert content[zero_points:].startswith(tensor.zero_points.tobytes())
    assert content[row_scales:].startswith(tensor.row_scales.astype("<u2").tobytes())
    assert content[second[0] :].startswith(raw("b").values.tobytes())
    assert second[1:] == [0, 0, 0]
    assert seal_bytes(2) == 84


def test_any_flipped_bit_of_the_footer_is_found(path) -> None:
    content = bytearray(path.read_bytes())
    (length,) = struct.unpack("<I", content[-8:-4])
    for position in range(len(content) - 8 - length - 20 - 64, len(content) - 8):
        content[position] ^= 1
        with pytest.raises(ChecksumError, match="checksum of the footer is") if not_magic(content) else unharmed():
            sealed_offsets(path, np.frombuffer(bytes(content), np.uint8))
        content[position] ^= 1


def not_magic(content: bytearray) -> bool:
    return b"ARROWQ2\0" in content


class unharmed:  # noqa: N801
    """A file whose magic is gone counts as never sealed."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False


def test_what_is_no_parquet_has_no_seal(path) -> None:
    for content in (b"", b"PAR1", b"\xff" * 40, bytes(100)):
        assert sealed_offsets(path, np.frombuffer(content, np.uint8)) is None


def test_a_sealed_file_and_one_without_hold_the_same(path, tmp_path) -> None:
    other = unsealed(path, tmp_path / "b.parquet")
    for name in "ab":
        (one,), (two,) = StoredModel(path).read(name), StoredModel(other).read(name)
        assert one.nbytes == two.nbytes


def test_offsets_outside_the_file_are_an_error(path) -> None:
    content = path.read_bytes()
    (length,) = struct.unpack("<I", content[-8:-4])
    footer = len(content) - 8 - length
    table = struct.pack("<8Q", *[2**63] * 8)
    crc = struct.pack("<I", zlib.crc32(content[footer:-8], zlib.crc32(table)))
    path.write_bytes(content[: footer - 84] + table + content[footer - 20 : footer - 4] + crc + content[footer:])
    with pytest.raises(StoreError, match="data is 0 bytes; its layout asks for 12 bytes"):
        StoredModel(path).read("a")


def test_every_reader_skips_the_seal(path) -> None:
    assert pq.read_table(path).column("layer_name").to_pylist() == ["a", "b"]

import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stored_examples import contents, packed, packed_tensors, raw, raw_tensors

from arrow_quant_v2.errors import StoreError
from arrow_quant_v2.kernels.tensors import dequantized
from arrow_quant_v2.packed import Layout, PackedTensor
from arrow_quant_v2.store.record import RawTensor, checksum, payload_bytes, payload_sizes, ranges, split
from arrow_quant_v2.store.sizes import total


def test_payload_columns_are_literal_bytes() -> None:
    tensor = PackedTensor(
        name="w",
        dtype="float32",
        layout=Layout(shape=(2, 3), bits=4, quant_axis=1, group_size=2),
        codes=np.array([[0x21, 0x03], [0x54, 0x06]], np.uint8),
        scales=np.array([[1, 2], [3, 4]], np.uint8),
        zero_points=np.array([[5, 6], [7, 8]], np.uint8),
        row_scales=np.array([0x3F80, 0x4000], np.uint16),
    )
    data, scales, zero_points, row_scales = payload_bytes(tensor)
    assert data.tobytes() == b"\x21\x03\x54\x06"
    assert scales.tobytes() == b"\x01\x02\x03\x04"
    assert zero_points.tobytes() == b"\x05\x06\x07\x08"
    assert row_scales.tobytes() == b"\x80\x3f\x00\x40"
    assert checksum((data, scales, zero_points, row_scales)) == 0x1D365A1B


def test_a_row_of_one_group_has_no_bytes_for_its_scale() -> None:
    tensor = PackedTensor(
        name="w",
        dtype="float32",
        layout=Layout(shape=(2, 3), bits=4, quant_axis=1, group_size=None, grid="row"),
        codes=np.array([[0x21, 0x03], [0x54, 0x06]], np.uint8),
        scales=np.array([[255], [255]], np.uint8),
        zero_points=np.array([[5], [7]], np.uint8),
        row_scales=np.array([0x3F80, 0x4000], np.uint16),
    )
    data, scales, zero_points, row_scales = payload_bytes(tensor)
    assert scales is None
    assert (data.tobytes(), zero_points.tobytes()) == (b"\x21\x03\x54\x06", b"\x05\x07")
    assert row_scales.tobytes() == b"\x80\x3f\x00\x40"
    assert checksum((data, scales, zero_points, row_scales)) == zlib.crc32(b"\x21\x03\x54\x06\x05\x07\x80\x3f\x00\x40")
    assert tensor.nbytes == 10
    np.testing.assert_allclose(
        dequantized(tensor),
        np.float32([[1 - 5 / 17, 2 - 5 / 17, 3 - 5 / 17], [2 * (4 - 7 / 17), 2 * (5 - 7 / 17), 2 * (6 - 7 / 17)]]),
    )


def test_checksum_is_crc32_over_the_columns_in_their_order() -> None:
    def column(text: bytes):
        return np.frombuffer(text, np.uint8)

    assert checksum((column(b"1234"), column(b"56"), None, column(b"789"))) == 0xCBF43926  # the CRC-32 of "123456789"


def test_payload_columns_are_not_copied() -> None:
    tensor = packed()
    data, scales, zero_points, row_scales = payload_bytes(tensor)
    assert np.shares_memory(data, tensor.codes)
    assert np.shares_memory(scales, tensor.scales)
    assert np.shares_memory(zero_points, tensor.zero_points)
    assert np.shares_memory(row_scales, tensor.row_scales)


def test_arrays_that_are_not_contiguous_are_stored_by_value() -> None:
    values = np.arange(16, dtype=np.uint8)[::2]
    assert payload_bytes(RawTensor(name="b", shape=(8,), dtype="uint8", values=values))[0].tobytes() == bytes(
        range(0, 16, 2)
    )


@given(st.one_of(packed_tensors(), raw_tensors()))
def test_sizes_are_those_of_the_columns(payload) -> None:
    assert payload_sizes(payload) == tuple(None if column is None else column.size for column in payload_bytes(payload))


@given(packed_tensors())
def test_a_tensor_counts_the_bytes_that_are_stored(tensor) -> None:
    equalization = 0 if tensor.equalization is None else tensor.equalization.nbytes
    assert tensor.nbytes == total(payload_sizes(tensor)) + equalization


@given(st.one_of(packed_tensors(), raw_tensors()), st.integers(1, 200))
def test_split_loses_nothing_and_keeps_the_limit(payload, limit) -> None:
    pieces = list(split(payload, limit))
    whole, parts = payload_bytes(payload), [payload_bytes(piece) for piece in pieces]
    for index, column in enumerate(whole):
        if column is not None:
            assert b"".join(part[index].tobytes() for part in parts) == column.tobytes()
    single = 8 if isinstance(payload, RawTensor) else total(payload_sizes(payload)) // payload.rows
    assert all(total(payload_sizes(piece)) <= max(limit, single) for piece in pieces)


def test_a_piece_knows_its_place() -> None:
    assert [piece.first_row for piece in split(packed(shape=(5, 8), group_size=8), 16)] == [0, 2, 4]
    assert [(piece.start, piece.stop) for piece in split(raw(shape=(5,)), 8)] == [(0, 2), (2, 4), (4, 5)]
    assert contents(next(split(packed(), 10**9))) == contents(packed())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [((10, 1, 4), [(0, 4), (4, 8), (8, 10)]), ((3, 100, 50), [(0, 1), (1, 2), (2, 3)]), ((0, 4, 8), [(0, 0)])],
)
def test_ranges_cover_everything(arguments, expected) -> None:
    assert list(ranges(*arguments)) == expected


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"dtype": "complex64"}, "dtype 'complex64' cannot be stored; known are float64"),
        ({"values": np.zeros(7, np.uint8)}, "7 bytes from element 0 do not lie within 2 elements of float32"),
        ({"values": np.zeros(12, np.uint8)}, "12 bytes from element 0"),
        ({"start": 1}, "8 bytes from element 1"),
        ({"start": -1}, "8 bytes from element -1"),
        ({"values": np.zeros(2, np.float32)}, r"values are float32 \(2,\); hand over flat uint8"),
        ({"values": np.zeros((2, 4), np.uint8)}, r"values are uint8 \(2, 4\)"),
    ],
)
def test_raw_bytes_that_do_not_fit_are_refused(wrong, message) -> None:
    given = {"name": "b", "shape": (2,), "dtype": "float32", "values": np.zeros(8, np.uint8)}
    with pytest.raises(StoreError, match=f"^b: .*{message}"):
        RawTensor(**(given | wrong))

"""The layout of packed codes, byte for byte: it lies in files and never changes."""

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import widths
from torch import Tensor

from arrow_quant_v2.kernels import ops, reference

LITERAL = [
    (2, [[1, 2, 3, 0]], b"\x39"),
    (2, [[3, 0, 0, 0, 1, 2, 2]], b"\x03\x29"),
    (2, [[1], [2], [3]], b"\x01\x02\x03"),
    (4, [[1, 2, 3, 15]], b"\x21\xf3"),
    (4, [[7, 8, 9], [10, 11, 12]], b"\x87\x09\xba\x0c"),
    (8, [[0, 127, 255]], b"\x00\x7f\xff"),
]


def codes_of(values: list[list[int]]) -> Tensor:
    return torch.tensor(values, dtype=torch.uint8)


@pytest.mark.parametrize(("bits", "codes", "expected"), LITERAL)
def test_code_0_lies_in_the_lowest_bits_of_byte_0_and_every_row_starts_on_a_byte(
    isa: str, bits: int, codes: list[list[int]], expected: bytes
) -> None:
    packed = ops.pack(codes_of(codes), bits)
    assert packed.numpy().tobytes() == reference.pack(codes_of(codes), bits).numpy().tobytes() == expected
    assert ops.unpack(packed, bits, len(codes[0])).tolist() == codes


@pytest.mark.usefixtures("library")
@settings(deadline=None)
@given(bits=widths, count=st.integers(0, 4), columns=st.integers(0, 40), seed=st.integers(0, 99))
def test_unpack_is_the_inverse_of_pack_and_pad_bits_are_zero(bits: int, count: int, columns: int, seed: int) -> None:
    codes = torch.randint(2**bits, (count, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = ops.pack(codes, bits)
    assert packed.shape == (count, -(-columns * bits // 8))
    assert torch.equal(ops.unpack(packed, bits, columns), codes)
    everything = ops.unpack(packed, bits, packed.shape[1] * 8 // bits)
    assert not everything[:, columns:].any()


def test_a_scale_is_the_row_scale_times_the_square_of_its_code() -> None:
    scales, row_scales = codes_of([[0, 51, 255]]), torch.tensor([2.0], dtype=torch.bfloat16)
    assert reference.scale_of(scales, row_scales).tolist() == [pytest.approx([0.0, 0.08, 2.0])]


@pytest.mark.parametrize(("bits", "code", "zero"), [(2, 85, 1.0), (2, 128, 128 / 85), (4, 17, 1.0), (8, 3, 3.0)])
def test_a_zero_point_is_its_code_over_255_as_a_part_of_the_largest_code(bits: int, code: int, zero: float) -> None:
    assert reference.zero_of(codes_of([[code]]), codes_of([[9]]), bits).item() == pytest.approx(zero)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_symmetric_zero_point_is_the_middle_code(bits: int) -> None:
    none = torch.empty(1, 0, dtype=torch.uint8)
    assert reference.zero_of(none, codes_of([[9]]), bits).item() == 2 ** (bits - 1)


def test_a_quantized_row_on_paper(library: ctypes.CDLL) -> None:
    row = torch.tensor([[0.0, 1.0, 2.0, 3.0, -1.5, 0.0, 1.5, 3.0]])  # from -1.5 to 3: step 4.5 / 3, zero point 1
    codes, scales, zero_points, row_scales, sums = ops.quantize(row, 2, 8, False, ())
    assert codes.numpy().tobytes() == b"\xe9\xe4"  # codes 1, 1.67 -> 2, 2.33 -> 2, 3; then 0, 1, 2, 3
    assert (scales.tolist(), zero_points.tolist(), row_scales.tolist()) == ([[255]], [[85]], [1.5])
    assert sums[0].tolist() == pytest.approx([27.5, 27.0, 0.5])


@pytest.mark.parametrize(("stretches", "row_scale"), [((), 2.015625), ((1.0,), 2.0)])
def test_the_scale_of_a_row_of_one_group_on_paper(
    library: ctypes.CDLL, stretches: tuple[float, ...], row_scale: float
) -> None:
    """A step of 2.001 lies between two bfloat16: 2, which is nearest, and 2.015625, which covers."""
    row = torch.tensor([[-2.001, 0.0, 2.001, 2.001, 0.0, 0.0, 0.0, 0.0]])
    codes, scales, zero_points, row_scales, _ = ops.quantize(row, 2, 8, True, stretches)
    assert codes.numpy().tobytes() == b"\xf9\xaa"  # codes 1, 2, 3, 3; then 2, 2, 2, 2
    assert (scales.tolist(), zero_points.numel(), row_scales.tolist()) == ([[255]], 0, [row_scale])


def test_levels_of_the_residual_grid_on_paper(isa: str) -> None:
    """Row scale 2, s = 255 and 51: a1 = 2, a2 = 0.08. z = 51: mu = (a1 + m a2) * 0.6."""
    row_scales, scales = torch.tensor([2.0], dtype=torch.bfloat16), codes_of([[255, 51]])
    for bits, reach in ((2, 2.08), (4, 2.56)):
        m = 2 ** (bits - 1) - 1
        codes = torch.arange(2**bits, dtype=torch.uint8)[None]
        stored = (ops.pack(codes, bits), scales)
        asked = (row_scales, bits, 2**bits, 2**bits, torch.float32)
        above = [2.0 + 0.08 * (2 * low - m) for low in range(m + 1)]
        below = [level - 4.0 for level in above]
        assert ops.dequantize_r2q(*stored, scales[:, :0], *asked)[0].tolist() == pytest.approx(below + above)
        shifted = [0.6 * reach + level for level in below + above]
        assert ops.dequantize_r2q(*stored, codes_of([[51]]), *asked)[0].tolist() == pytest.approx(shifted)


def test_two_groups_have_two_scales_each(isa: str) -> None:
    """a1, a2 of group 0, then a1, a2 of group 1."""
    packed, scales = codes_of([[0b11100100, 0b11100100]]), codes_of([[255, 0, 0, 255]])
    row_scales = torch.tensor([1.0], dtype=torch.bfloat16)
    found = ops.dequantize_r2q(packed, scales, scales[:, :0], row_scales, 2, 8, 4, torch.float32)
    assert found.tolist() == [[-1.0, -1.0, 1.0, 1.0, -1.0, 1.0, -1.0, 1.0]]

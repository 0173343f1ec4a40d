"""Turning channels: signs that never change, and a turn that is undone exactly where it should be."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import gaussian

from arrow_quant_v2.errors import QuantizationError
from arrow_quant_v2.kernels import ops
from arrow_quant_v2.kernels.rotation import signs, turn, unturn
from arrow_quant_v2.packed import ROTATIONS

pytestmark = pytest.mark.usefixtures("library")

blocks = st.sampled_from(ROTATIONS)


def sylvester(block: int) -> torch.Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < block:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    return matrix / block**0.5


def lowbias32(x: int) -> int:
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    return x ^ x >> 16


def test_the_signs_lie_in_files_and_never_change() -> None:
    assert signs(5000).tolist() == [-1.0 if lowbias32(j) & 1 else 1.0 for j in range(5000)]
    assert "".join("-+"[int(sign > 0)] for sign in signs(32).tolist()) == "++---+-++---+-+---+-++-----+----"
    assert abs(float(signs(4096).mean())) < 0.05


@settings(deadline=None)
@given(block=blocks, rows=st.integers(1, 3), count=st.integers(1, 3), seed=st.integers(0, 99))
def test_a_block_is_multiplied_with_sylvesters_matrix(block: int, rows: int, count: int, seed: int) -> None:
    x = gaussian(rows, count * block, seed)
    expected = (x.double() * signs(count * block)).reshape(rows, count, block) @ sylvester(block)
    assert torch.allclose(turn(x, block).double().reshape(rows, count, block), expected, atol=1e-5)


@settings(deadline=None)
@given(block=blocks, seed=st.integers(0, 99))
def test_a_turn_is_undone_and_keeps_every_product(block: int, seed: int) -> None:
    weight, x = gaussian(5, 2 * block, seed), gaussian(3, 2 * block, seed + 1)
    assert torch.allclose(unturn(turn(weight, block), block), weight, atol=1e-5)
    assert torch.allclose(turn(x, block) @ turn(weight, block).mT, x @ weight.mT, atol=2e-4)


def test_whole_numbers_survive_blocks_whose_root_is_a_power_of_two() -> None:
    x = torch.arange(-128.0, 128.0).reshape(2, 128)
    for block in (16, 64):
        assert torch.equal(unturn(turn(x, block), block), x)


def test_another_axis_is_turned_as_if_it_were_the_last() -> None:
    weight = gaussian(6, 32 * 9).reshape(6, 32, 3, 3)
    found = turn(weight, 16, axis=1)
    assert torch.equal(found, turn(weight.movedim(1, -1).contiguous(), 16).movedim(-1, 1))
    assert torch.allclose(unturn(found, 16, axis=1), weight, atol=1e-5)


def test_one_channel_spreads_over_its_block_alone() -> None:
    x = torch.zeros(1, 64)
    x[0, 20] = 4.0
    assert turn(x, 16).abs().tolist() == [[0.0] * 16 + [1.0] * 16 + [0.0] * 32]


def test_channels_that_do_not_split_are_refused() -> None:
    with pytest.raises(QuantizationError, match=r"hadamard: x is torch.float32 \(4, 20\); .*blocks of 8"):
        turn(torch.ones(4, 20), 8)
    with pytest.raises(QuantizationError, match="hadamard: block is 20"):
        unturn(torch.ones(4, 20), 20)
    assert ops.hadamard(torch.ones(4, 8), 8)[:, 1:].any().item() is False

"""Golden figures: how close each method keeps a gaussian matrix, to three decimals."""

import pytest
from kernel_cases import STRETCHES, gaussian, quantized

pytestmark = pytest.mark.usefixtures("library")

WEIGHT = gaussian(256, 1024, seed=2)


@pytest.mark.parametrize(
    ("stretches", "symmetric", "cosine"),
    [((), False, 0.909), (STRETCHES, False, 0.945), ((), True, 0.780), (STRETCHES, True, 0.923)],
    ids=["nearest", "clip", "nearest symmetric", "clip symmetric"],
)
def test_weight_cosine_at_2_bits_in_groups_of_64(stretches: tuple[float, ...], symmetric: bool, cosine: float) -> None:
    error = quantized(WEIGHT, 2, symmetric=symmetric, stretches=stretches).error
    assert error.cosine == pytest.approx(cosine, abs=0.0005)


@pytest.mark.parametrize(("bits", "nearest", "clip"), [(4, 0.9959, 0.9962), (8, 0.99999, 0.99999)])
def test_weight_cosine_at_more_bits(bits: int, nearest: float, clip: float) -> None:
    assert quantized(WEIGHT, bits).error.cosine == pytest.approx(nearest, abs=0.00005)
    assert quantized(WEIGHT, bits, stretches=STRETCHES).error.cosine == pytest.approx(clip, abs=0.00005)


@pytest.mark.parametrize("group_size", [32, 64, 128, 1024])
@pytest.mark.parametrize("symmetric", [False, True])
def test_8_bits_keep_four_nines(group_size: int, symmetric: bool) -> None:
    assert quantized(WEIGHT, 8, group_size, symmetric=symmetric).error.cosine > 0.9999

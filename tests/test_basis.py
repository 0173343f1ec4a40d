"""Changes of basis that change no output, ranges of activations by time group, and biases that help."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import normal

from arrow_quant_v2.calibration.collect import Product, Watch, seen
from arrow_quant_v2.errors import ConfigurationError, QuantizationError
from arrow_quant_v2.quantizers.basis import Basis, rotation_block
from arrow_quant_v2.quantizers.spatial import LARGEST_SCALE, SpatialQuantizer
from arrow_quant_v2.quantizers.time_aware import SMALLEST_SCALE, TimeAwareQuantizer
from arrow_quant_v2.time_groups import TimeGroups

if TYPE_CHECKING:
    from torch import Tensor

GROUPS = TimeGroups(edges=(0.0, 10.0, 20.0, 30.0))


def scales(channels: int, seed: int = 5) -> Tensor:
    return normal(channels, seed=1000 + seed).mul(15.0).exp()


# The basis


@settings(deadline=None, max_examples=50)
@given(
    channels=st.sampled_from([16, 32, 48, 64, 128, 256, 384]),
    places=st.sampled_from([1, 3, 9]),
    turned=st.booleans(),
    equalized=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_basis_changes_no_output(channels: int, places: int, turned: bool, equalized: bool, seed: int) -> None:
    """W' x' = W x, for a linear layer and for the unfolded inputs of a convolution; and H of x' is H in that basis."""
    basis = Basis(
        channels=channels,
        rotation=rotation_block(channels) if turned else None,
        equalization=scales(channels, seed) if equalized else None,
    )
    weight, x = normal(12, channels * places, seed=seed), normal(40, channels * places, seed=seed + 1)
    outputs = x @ weight.T
    changed = basis.inputs(x) @ basis.weight(weight).T
    assert float((changed - outputs).norm() / outputs.norm()) < 1e-5
    hessian = basis.moment(x.T @ x)
    expected = basis.inputs(x).T @ basis.inputs(x)
    assert float((hessian - expected).norm() / expected.norm()) < 1e-5
    assert (basis.weight(weight) is weight) == (not turned and not equalized)


def test_a_convolution_is_turned_along_its_channels_alone() -> None:
    """Each place of the kernel by itself: the layer's own input is turned, not its unfolded one."""
    layer, x = torch.nn.Conv2d(32, 8, 3, padding=1, bias=False), normal(2, 32, 6, 6)
    weight = normal(8, 32, 3, 3)
    basis = Basis(channels=32, rotation=32, equalization=scales(32))
    along = basis.inputs(x.movedim(1, -1).reshape(-1, 32)).reshape(2, 6, 6, 32).movedim(-1, 1)
    changed = basis.weight(weight.flatten(1)).reshape(weight.shape)
    with torch.no_grad(), Watch({"weight": layer.weight}) as watch:
        layer(x)
    unfolded = basis.inputs(seen(watch.products[0], seed=0).rows)
    outputs = torch.nn.functional.conv2d(x, weight, padding=1)
    torch.testing.assert_close(torch.nn.functional.conv2d(along, changed, padding=1), outputs, rtol=1e-4, atol=1e-5)
    own = seen(Product(inputs=along, place=watch.products[0].place), seed=0).rows
    torch.testing.assert_close(unfolded, own, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("channels", "block"), [(1, None), (8, None), (15, None), (16, 16), (48, 16), (320, 64), (384, 128), (1024, 128)]
)
def test_blocks_are_as_large_as_divides_the_channels(channels: int, block: int | None) -> None:
    assert rotation_block(channels) == block


@pytest.mark.parametrize(
    ("rotation", "equalization", "words"),
    [
        (None, None, ""),
        (64, None, "turned in blocks of 64"),
        (None, torch.ones(64), "channels equalized"),
        (64, torch.ones(64), "channels equalized, turned in blocks of 64"),
    ],
)
def test_a_basis_says_what_it_is(rotation: int | None, equalization: Tensor | None, words: str) -> None:
    assert str(Basis(channels=64, rotation=rotation, equalization=equalization)) == words


# Equalization


def test_equalization_of_numbers_on_paper() -> None:
    """Inputs reach 16, 1 and 4, columns 1, 4 and 1: s is 4, 1/2 and 2, over their geometric mean 4^(1/3)."""
    spatial = SpatialQuantizer(torch.tensor([16.0, 1.0, 4.0]))
    weights = [torch.tensor([[1.0, -4.0, 0.25], [-0.5, 2.0, 0.0]]), torch.tensor([[0.0, 0.0, -1.0]])]
    mean = 4.0 ** (1 / 3)
    assert spatial.equalization(weights, 0.5).tolist() == pytest.approx([4.0 / mean, 0.5 / mean, 2.0 / mean])
    assert spatial.equalization(weights, 1.0).tolist() == pytest.approx([16.0 / 4.0, 1.0 / 4.0, 4.0 / 4.0])
    assert spatial.equalization(weights, 0.0).tolist() == pytest.approx([mean, mean / 4.0, mean])
    quarter = [16.0**0.25, 4.0**-0.75, 4.0**0.25]
    by = (quarter[0] * quarter[1] * quarter[2]) ** (1 / 3)
    assert spatial.equalization(weights, 0.25).tolist() == pytest.approx([one / by for one in quarter])


@settings(deadline=None, max_examples=40)
@given(alpha=st.floats(0.0, 1.0), seed=st.integers(0, 99), kernel=st.sampled_from([(), (3,), (2, 2)]))
def test_equalization_is_the_formula_and_its_geometric_mean_is_1(alpha: float, seed: int, kernel: Any) -> None:
    weights = [normal(5, 12, *kernel, seed=seed), normal(3, 12, *kernel, seed=seed + 1)]
    absmax = scales(12, seed)
    found = SpatialQuantizer(absmax).equalization(weights, alpha)
    columns = torch.cat([weight.flatten(2).movedim(1, -1).reshape(-1, 12) for weight in weights if kernel] or weights)
    formula = absmax**alpha / columns.abs().amax(dim=0) ** (1 - alpha)
    torch.testing.assert_close(found, formula / formula.log().mean().exp(), rtol=1e-4, atol=0.0)
    assert float(found.log().mean()) == pytest.approx(0.0, abs=1e-5)
    assert torch.equal(SpatialQuantizer(absmax).basis(weights, alpha).equalization, found)


def test_unused_channels_keep_1_and_hardly_used_ones_are_held_back() -> None:
    absmax, weight = torch.tensor([0.0, 2.0, 8.0, 5.0]), torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    found = SpatialQuantizer(absmax).equalization([weight], 0.5)
    assert found.tolist() == pytest.approx([1.0, 2**-0.5, 2**0.5, 1.0])
    extreme = SpatialQuantizer(torch.tensor([1e-30, 1.0, 1e30])).equalization([torch.ones(1, 3)], 1.0)
    assert extreme.tolist() == [1.0 / LARGEST_SCALE, 1.0, LARGEST_SCALE]
    assert SpatialQuantizer(absmax).equalization([torch.zeros(2, 4)], 0.5).tolist() == [1.0] * 4


@pytest.mark.parametrize("alpha", [-0.01, 1.01, float("nan"), float("inf")])
def test_alpha_lies_between_0_and_1(alpha: float) -> None:
    with pytest.raises(ConfigurationError, match=f"alpha is {alpha}; allowed: a number from 0 to 1"):
        SpatialQuantizer(torch.ones(3)).equalization([torch.ones(2, 3)], alpha)


@pytest.mark.parametrize(
    "absmax",
    [
        torch.ones(2, 2),
        torch.tensor([1.0, torch.nan]),
        torch.tensor([torch.inf, 1.0]),
        torch.tensor([-1.0, 1.0]),
        torch.zeros(3),
        torch.ones(0),
    ],
)
def test_magnitudes_that_cannot_be_are_refused(absmax: Tensor) -> None:
    with pytest.raises(QuantizationError, match="equalization needs the largest magnitude of each input channel"):
        SpatialQuantizer(absmax)


@pytest.mark.parametrize("weight", [torch.ones(2, 4), torch.ones(3), torch.ones(3, 2, 3)])
def test_weights_of_other_channels_are_refused(weight: Tensor) -> None:
    with pytest.raises(QuantizationError, match=r"a weight is \[.*\]; its second axis must be the 3 input channels"):
        SpatialQuantizer(torch.ones(3)).equalization([torch.ones(2, 3), weight], 0.5)


# Time groups


@settings(deadline=None, max_examples=100)
@given(ranges=st.lists(st.tuples(*[st.floats(-1e30, 1e30)] * 2).map(sorted), min_size=3, max_size=3))
def test_zero_always_lies_on_a_code_and_the_range_is_covered(ranges: list[list[float]]) -> None:
    low, high = [one for one, _ in ranges], [one for _, one in ranges]
    found = TimeAwareQuantizer(GROUPS).parameters(low, high)
    assert [(one.start, one.end) for one in found] == [(0.0, 10.0), (10.0, 20.0), (20.0, 30.0)]
    for one, least, most in zip(found, low, high, strict=True):
        assert one.zero_point in range(256)
        reach = one.scale * (0 - one.zero_point), one.scale * (255 - one.zero_point)
        assert reach[0] <= max(0.0, least)
        assert reach[0] - least <= 0.5001 * one.scale
        assert most - reach[1] <= 0.5001 * one.scale
        assert one.scale == max((max(most, 0.0) - min(least, 0.0)) / 255, SMALLEST_SCALE)


def test_ranges_on_paper() -> None:
    found = TimeAwareQuantizer(GROUPS).parameters([-1.0, 2.0, 0.0], [1.55, 25.5, 0.0])
    assert [(one.scale, one.zero_point) for one in found] == [
        (pytest.approx(0.01), 100.0),
        (pytest.approx(0.1), 0.0),
        (SMALLEST_SCALE, 0.0),
    ]


@pytest.mark.parametrize(
    ("low", "high", "message"),
    [
        ([0.0, 0.0], [1.0, 1.0, 1.0], "2 ranges were seen; there are 3 time groups"),
        ([0.0] * 4, [1.0] * 4, "4 ranges were seen; there are 3 time groups"),
        ([0.0, float("nan"), 0.0], [1.0] * 3, "activations go from nan to 1.0; finite ranges are needed: calibrate"),
        ([0.0] * 3, [1.0, 1.0, float("nan")], "activations go from 0.0 to nan"),
        ([0.0, 0.0, float("-inf")], [1.0] * 3, "activations go from -inf to 1.0"),
        ([0.0] * 3, [float("inf"), 1.0, 1.0], "activations go from 0.0 to inf"),
    ],
)
def test_ranges_that_cannot_be_are_refused(low: list[float], high: list[float], message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        TimeAwareQuantizer(GROUPS).parameters(low, high)

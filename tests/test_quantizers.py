"""The table of methods, and that a matrix may be cut into rows anywhere."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import normal

from arrow_quant_v2.config import METHODS, LayerSpec
from arrow_quant_v2.errors import ConfigurationError
from arrow_quant_v2.quantizers import QUANTIZERS, quantizer
from arrow_quant_v2.quantizers.result import QuantizedRows, joined, not_finite, weight_error

WIDTHS = (2, 4, 8)


def quantized(weight: torch.Tensor, method: str, bits: int, *, symmetric: bool = False) -> QuantizedRows:
    return quantizer(method)(weight, LayerSpec(bits=bits, group_size=16, method=method, symmetric=symmetric))


def same(one: QuantizedRows, other: QuantizedRows) -> bool:
    fields = ("codes", "scales", "zero_points", "row_scales", "sums")
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in fields)


def test_every_method_that_may_be_asked_for_is_in_the_table_but_the_one_that_needs_inputs() -> None:
    assert set(QUANTIZERS) == set(METHODS) - {"gptq"}


def test_an_unknown_method_lists_the_known_ones() -> None:
    with pytest.raises(ConfigurationError, match="method is 'magic'; allowed: rtn, clip, r2q"):
        quantizer("magic")


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("method", QUANTIZERS)
def test_rows_do_not_depend_on_their_neighbours(method: str, bits: int, symmetric: bool) -> None:
    weight = normal(24, 50)
    whole = quantized(weight, method, bits, symmetric=symmetric)
    parts = [quantized(weight[a:b], method, bits, symmetric=symmetric) for a, b in ((0, 1), (1, 9), (9, 24))]
    assert same(whole, joined(parts))


@settings(max_examples=40, deadline=None)
@given(
    cuts=st.sets(st.integers(1, 19), max_size=6),
    bits=st.sampled_from(WIDTHS),
    seed=st.integers(0, 1000),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
)
def test_the_error_does_not_depend_on_the_cuts(cuts: set[int], bits: int, seed: int, scale: float) -> None:
    weight = normal(20, 24, seed=seed) * scale
    edges = [0, *sorted(cuts), 20]
    parts = [quantized(weight[a:b], "rtn", bits) for a, b in pairwise(edges)]
    whole = quantized(weight, "rtn", bits)
    assert weight_error(joined(parts).sums, 480) == weight_error(whole.sums, 480)


@pytest.mark.parametrize("bits", WIDTHS)
def test_clip_search_is_no_worse_than_rounding(bits: int) -> None:
    weight = normal(64, 128)
    rounded, clipped = (weight_error(quantized(weight, m, bits).sums, weight.numel()) for m in ("rtn", "clip"))
    assert clipped.mse <= rounded.mse * (1.0 if bits == 8 else 0.8)  # at 8 bits there is nothing to clip
    assert clipped.cosine > 0.9


@pytest.mark.parametrize("symmetric", [False, True])
def test_at_8_bits_clip_search_leaves_the_largest_weights_of_groups_within_half_a_step(symmetric: bool) -> None:
    weight = normal(64, 128)
    covering = quantized(weight, "rtn", 8, symmetric=symmetric)  # tests/kernels holds that law of it
    assert same(quantized(weight, "clip", 8, symmetric=symmetric), covering)
    assert not same(quantized(weight, "clip", 4, symmetric=symmetric), quantized(weight, "rtn", 4, symmetric=symmetric))
    rows = [LayerSpec(bits=8, group_size=None, method=method, symmetric=symmetric) for method in ("clip", "rtn")]
    assert not same(*(quantizer(spec.method)(weight, spec) for spec in rows))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e300])
def test_the_first_bad_value_is_named_with_its_position(value: float) -> None:
    values = torch.zeros(12, dtype=torch.float64)
    values[[7, 9]] = value
    error = str(not_finite(values, "w", (4, 2, 3, 4), offset=24, remedy="mend it"))
    assert error == f"w: the value at [1, 0, 1, 3] is {value}; weights are finite float32 numbers: mend it" or (
        np.isnan(value) and "the value at [1, 0, 1, 3] is nan" in error
    )


def test_squares_that_overflow_are_explained_too() -> None:
    assert "squares are not finite" in str(not_finite(torch.full((4,), 1e30), "w", (2, 2)))

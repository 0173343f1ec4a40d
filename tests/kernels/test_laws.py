"""What holds for the quantization of any weight, whatever its size, spread or kind."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernel_cases import (
    STRETCHES,
    Quantized,
    columns_case,
    descent_case,
    gaussian,
    group_sizes,
    quantized,
    residual_columns_case,
    residual_fit_case,
    weights,
    widths,
)
from torch import Tensor

from arrow_quant_v2.kernels import ops, reference
from arrow_quant_v2.packed import WHOLE

pytestmark = pytest.mark.usefixtures("library")

any_weight = settings(deadline=None, max_examples=100)
methods = st.sampled_from([(), STRETCHES])


def squares(rows: Tensor) -> Tensor:
    return rows.double().square().sum(dim=1)


# Round to nearest


@any_weight
@given(weight=weights(), bits=widths, group_size=group_sizes, symmetric=st.booleans())
def test_the_error_is_at_most_half_a_step(weight: Tensor, bits: int, group_size: int, symmetric: bool) -> None:
    result = quantized(weight, bits, group_size, symmetric=symmetric)
    error = (weight.double() - result.weight.double()).abs()
    # w / scale reaches 2^bits steps and is off by a few units in its last place: 2^-24 of that each.
    assert (error <= result.step * (0.5 + 2**bits * 2**-21)).all()


@any_weight
@given(weight=weights(), bits=widths, group_size=group_sizes, symmetric=st.booleans(), seed=st.integers(0, 99))
def test_zero_comes_back_as_zero(weight: Tensor, bits: int, group_size: int, symmetric: bool, seed: int) -> None:
    zeros = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) < 0.3
    result = quantized(weight.masked_fill(zeros, 0.0), bits, group_size, symmetric=symmetric)
    assert not result.weight[zeros].any()


@any_weight
@given(weight=weights(), bits=widths, group_size=group_sizes)
def test_what_was_quantized_once_stays_within_a_step_when_quantized_again(
    weight: Tensor, bits: int, group_size: int
) -> None:
    once = quantized(weight, bits, group_size)
    again = quantized(once.weight, bits, group_size)
    assert ((once.weight.double() - again.weight.double()).abs() <= 0.51 * again.step).all()


@given(bits=widths, symmetric=st.booleans(), method=methods, group_size=group_sizes)
@settings(deadline=None)
def test_zeros_cost_nothing(bits: int, symmetric: bool, method: tuple[float, ...], group_size: int) -> None:
    result = quantized(torch.zeros(2, 77), bits, group_size, symmetric=symmetric, stretches=method)
    assert not result.weight.any()
    assert not result.sums.any()


# Sums


@any_weight
@given(weight=weights(), bits=widths, group_size=group_sizes, symmetric=st.booleans(), method=methods)
def test_the_sums_are_those_of_the_stored_weights(
    weight: Tensor, bits: int, group_size: int, symmetric: bool, method: tuple[float, ...]
) -> None:
    result = quantized(weight, bits, group_size, symmetric=symmetric, stretches=method)
    restored = result.weight.double()
    exact = torch.stack([squares(weight), squares(restored), squares(weight.double() - restored)], dim=1)
    norms, expected = result.sums.sqrt(), exact.sqrt()
    # Sixteen lanes of float32 add up to 512 columns; each difference is off by 2^-22 of its weight.
    assert ((norms - expected).abs() <= 2**-18 * (expected + expected[:, :1])).all()


@any_weight
@given(weight=weights(), bits=widths, group_size=group_sizes)
def test_the_cosine_is_that_of_the_stored_weights(weight: Tensor, bits: int, group_size: int) -> None:
    result = quantized(weight, bits, group_size)
    largest = max(float(weight.abs().max()), 1e-300)
    original, restored = weight.double().flatten() / largest, result.weight.double().flatten() / largest
    norm = float(original.norm() * restored.norm())
    expected = float(original @ restored) / norm if norm else float(not original.any() and not restored.any())
    assert result.error.cosine == pytest.approx(expected, abs=1e-4)


# What is not finite


@settings(deadline=None)
@given(
    bad=st.sampled_from([math.nan, math.inf, -math.inf]),
    at=st.tuples(st.integers(0, 2), st.integers(0, 99)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    bits=widths,
    symmetric=st.booleans(),
    method=methods,
)
def test_a_row_that_is_not_finite_says_so_and_leaves_the_others_alone(
    *, bad: float, at: tuple[int, int], dtype: torch.dtype, bits: int, symmetric: bool, method: tuple[float, ...]
) -> None:
    weight = gaussian(3, 100).to(dtype)
    sound = quantized(weight, bits, symmetric=symmetric, stretches=method)
    weight[at] = bad
    result = quantized(weight, bits, symmetric=symmetric, stretches=method)
    others = [row for row in range(3) if row != at[0]]
    assert not result.sums[at[0], [0, 2]].isfinite().any()
    assert torch.equal(result.sums[others], sound.sums[others])
    assert torch.equal(result.weight[others], sound.weight[others])
    plain = reference.quantize(weight, bits, 64, symmetric, method, None)
    assert not plain[4][at[0], [0, 2]].isfinite().any()


# Clip search


def clip_and_nearest(weight: Tensor, bits: int, group_size: int, symmetric: bool) -> tuple[Quantized, Quantized]:
    # At 8 bits zero points are whole codes: with few codes left after clipping, half a one is a large error.
    stretches = STRETCHES if bits < 8 else (1.0,)
    clipped = quantized(weight, bits, group_size, symmetric=symmetric, stretches=stretches)
    return clipped, quantized(weight, bits, group_size, symmetric=symmetric)


@any_weight
@given(weight=weights(), bits=widths, group_size=group_sizes, symmetric=st.booleans())
def test_the_clip_search_errs_by_half_a_step_on_average_but_for_the_rounding_of_its_parameters(
    weight: Tensor, bits: int, group_size: int, symmetric: bool
) -> None:
    clipped, nearest = clip_and_nearest(weight, bits, group_size, symmetric)
    half = (0.55 if bits < 8 else 1.0) * nearest.step.square().sum(dim=1).sqrt()
    # Scales are squares of 1 to 255: a row's largest group may lose 0.4% of its range, and tiny rows far more.
    slack = 0.006 * clipped.sums[:, 0].sqrt() + 2.0**-92 * weight.shape[1] ** 0.5
    assert (clipped.sums[:, 2].sqrt() <= half + slack).all()


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32), bits=widths, symmetric=st.booleans(), group_size=st.sampled_from([32, 64, 128]))
def test_on_gaussian_rows_the_clip_search_is_at_most_a_hair_worse(
    seed: int, bits: int, symmetric: bool, group_size: int
) -> None:
    clipped, nearest = clip_and_nearest(gaussian(64, 256, seed), bits, group_size, symmetric)
    hair = {2: 0.65, 4: 1.0, 8: 1.08}[bits]  # a scale that is rounded down cuts half a step of 255 off
    assert clipped.error.mse <= hair * nearest.error.mse


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32), symmetric=st.booleans(), group_size=st.sampled_from([32, 64, 128]))
def test_at_2_bits_the_clip_search_takes_away_at_least_30_percent_of_the_error(
    seed: int, symmetric: bool, group_size: int
) -> None:
    clipped, nearest = clip_and_nearest(gaussian(64, 256, seed), 2, group_size, symmetric)
    assert clipped.error.mse <= 0.7 * nearest.error.mse


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("offset", [5.0, -5.0, 1.0])
@pytest.mark.parametrize("spread", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_groups_far_from_zero_keep_a_zero_point_that_can_be_stored(
    bits: int, offset: float, spread: float, weighted: bool
) -> None:
    weight = offset + spread * torch.rand(16, 256, generator=torch.Generator().manual_seed(1))
    importance = torch.rand(256, generator=torch.Generator().manual_seed(2)) if weighted else None
    clipped = quantized(weight, bits, stretches=STRETCHES, importance=importance)
    nearest = quantized(weight, bits)
    assert clipped.error.difference <= 1.01 * nearest.error.difference + (0.004 * offset) ** 2 * weight.numel()


# Importance


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32), bits=st.sampled_from([2, 4]), symmetric=st.booleans(), column=st.integers(0, 127))
def test_what_matters_more_is_kept_better(seed: int, bits: int, symmetric: bool, column: int) -> None:
    weight = gaussian(256, 128, seed)
    importance = torch.ones(128)
    error = []
    for importance[column] in (0.1, 1.0, 100.0):
        result = quantized(weight, bits, symmetric=symmetric, stretches=STRETCHES, importance=importance)
        error.append(float((weight - result.weight)[:, column].square().sum()))
    assert error[0] > error[1] > error[2]


@any_weight
@given(weight=weights(), bits=widths, group_size=group_sizes, symmetric=st.booleans(), exponent=st.integers(-20, 20))
def test_columns_that_matter_alike_are_as_if_nothing_was_said(
    weight: Tensor, bits: int, group_size: int, symmetric: bool, exponent: int
) -> None:
    importance = torch.full((weight.shape[1],), 2.0**exponent)
    alike = quantized(weight, bits, group_size, symmetric=symmetric, stretches=STRETCHES, importance=importance)
    plain = quantized(weight, bits, group_size, symmetric=symmetric, stretches=STRETCHES)
    assert torch.equal(alike.codes, plain.codes)
    assert torch.equal(alike.sums, plain.sums)


@settings(deadline=None)
@given(seed=st.integers(0, 99), bits=widths, symmetric=st.booleans())
def test_a_group_that_does_not_matter_is_rounded(seed: int, bits: int, symmetric: bool) -> None:
    weight = gaussian(4, 64, seed)
    result = quantized(weight, bits, symmetric=symmetric, stretches=STRETCHES, importance=torch.zeros(64))
    assert result.error.mse <= 1.5 * quantized(weight, bits, symmetric=symmetric).error.mse


# The halves that calibration uses


@any_weight
@given(weight=weights(), bits=widths, group_size=group_sizes, symmetric=st.booleans(), method=methods)
def test_quantize_stores_what_fit_grid_finds(
    weight: Tensor, bits: int, group_size: int, symmetric: bool, method: tuple[float, ...]
) -> None:
    step = ops.fit_grid(weight, bits, group_size, symmetric, method)[0]
    found = quantized(weight, bits, group_size, symmetric=symmetric, stretches=method)
    scales, row_scales = reference.stored_scales(step, cover_all=not method)
    assert torch.equal(found.row_scales, row_scales)
    assert torch.equal(found.scales, scales)


@any_weight
@given(weight=weights(), bits=widths, symmetric=st.booleans(), method=methods)
def test_the_scale_of_a_row_of_one_group_is_the_bfloat16_nearest_to_its_step_or_not_below_where_it_covers(
    weight: Tensor, bits: int, symmetric: bool, method: tuple[float, ...]
) -> None:
    step = ops.fit_grid(weight, bits, weight.shape[1], symmetric, method)[0].clamp(min=reference.SMALLEST_STEP)
    found = quantized(weight, bits, weight.shape[1], symmetric=symmetric, stretches=method)
    assert (found.scales == WHOLE).all()
    scale = found.row_scales.float()[:, None]
    assert bool((scale >= step).all()) or method
    assert bool((scale - step <= step * 2.0**-8 * (1 if method else 2)).all())
    assert bool((step - scale <= step * 2.0**-8).all())


def test_a_row_of_zeros_that_is_one_group_stays_zero() -> None:
    for symmetric in (False, True):
        for method in ((), (1.2, 1.4)):
            found = quantized(torch.zeros(2, 24), 2, 24, symmetric=symmetric, stretches=method)
            assert not found.weight.any()
            assert not found.sums.any()


@settings(deadline=None)
@given(weight=weights(), bits=widths)
def test_columns_that_do_not_know_of_each_other_are_rounded(weight: Tensor, bits: int) -> None:
    scale, inverse, zero = columns_case(weight.shape[0], 1)[2:]
    codes, errors = ops.quantize_columns(weight, torch.eye(weight.shape[1]), scale, inverse, zero, bits)
    nearest = reference.rounded(weight * inverse[:, None] + zero[:, None], 2.0**bits - 1)
    assert torch.equal(codes, nearest.to(torch.uint8))
    assert torch.equal(errors, weight - (nearest - zero[:, None]) * scale[:, None])


@settings(deadline=None)
@given(rows=st.integers(1, 20), columns=st.integers(1, 40), bits=widths, seed=st.integers(0, 99))
def test_the_errors_of_the_columns_are_the_whole_error_seen_through_the_factor(
    rows: int, columns: int, bits: int, seed: int
) -> None:
    block, upper, scale, inverse, zero = columns_case(rows, columns, seed)
    codes, errors = ops.quantize_columns(block, upper, scale, inverse, zero, bits)
    restored = (codes.double() - zero[:, None]) * scale[:, None]
    difference = errors.double() @ upper.double()  # E U = W - Q, so that ||E||^2 = tr((W - Q) H (W - Q)^T)
    size = errors.double().abs() @ upper.double().abs()
    assert ((difference - (block - restored)).abs() <= 2**-20 * (size + block.abs())).all()


# The residual grid


@settings(deadline=None)
@given(bits=widths, seed=st.integers(0, 99), centre=st.booleans())
def test_the_affine_grid_is_a_residual_one(bits: int, seed: int, centre: bool) -> None:
    """a1 = (m + 1) a2: half a step and 2^(bits-2) of them, mu halfway between the first and the last level."""
    random = torch.Generator().manual_seed(seed)
    step, zero = torch.rand(2, 5, 1, generator=random).unbind()
    zero = torch.full_like(zero, 2.0 ** (bits - 1)) if centre else zero * (2**bits - 1)
    codes = torch.arange(2**bits, dtype=torch.uint8).repeat(5, 1)
    mu = step * ((2**bits - 1) / 2 - zero)
    grid = reference.Residual(mu=mu, a1=step * 2.0 ** (bits - 2), a2=step / 2)
    expected = step * (codes - zero)
    assert torch.allclose(reference.residual_level(codes, grid, bits), expected, rtol=1e-4, atol=2.0**bits * 1e-6)


@settings(deadline=None)
@given(weight=weights(most_rows=8, most_columns=40), bits=widths, seed=st.integers(0, 99))
def test_no_level_is_nearer_than_the_chosen_one(weight: Tensor, bits: int, seed: int) -> None:
    mu, a1, a2, inverse = (part[:, None] for part in residual_columns_case(weight.shape[0], 1, bits, seed)[2:])
    grid = reference.Residual(mu=mu, a1=a1, a2=a2)
    codes = reference.residual_codes(weight, grid, inverse, bits)
    every = torch.arange(2**bits, dtype=torch.uint8).expand(weight.shape[0], -1)
    levels = reference.residual_level(every, grid, bits).double()
    assert (levels.diff(dim=1) >= -1e-6).all()  # in order
    nearest = (weight[..., None].double() - levels[:, None]).abs().amin(dim=-1)
    found = (weight.double() - reference.residual_level(codes, grid, bits).double()).abs()
    assert (found <= nearest + 1e-5 * (1.0 + mu.abs() + a1) + 2.0**-23 * weight.abs()).all()


@settings(deadline=None)
@given(rows=st.integers(1, 20), columns=st.integers(1, 40), bits=widths, seed=st.integers(0, 99))
def test_the_errors_of_the_columns_are_the_whole_error_on_the_residual_grid_too(
    rows: int, columns: int, bits: int, seed: int
) -> None:
    block, upper, mu, a1, a2, inverse = residual_columns_case(rows, columns, bits, seed)
    codes, errors = ops.quantize_columns_r2q(block, upper, mu, a1, a2, inverse, bits)
    grid = reference.Residual(mu=mu[:, None], a1=a1[:, None], a2=a2[:, None])
    restored = reference.residual_level(codes, grid, bits).double()
    difference, size = errors.double() @ upper.double(), errors.double().abs() @ upper.double().abs()
    assert ((difference - (block - restored)).abs() <= 2**-20 * (size + block.abs() + 1.0)).all()


# Descent


def lost(case: tuple[Tensor, ...], codes: Tensor, bits: int) -> Tensor:
    """How much more (W - Q) G (W - Q)^T is for these codes than for those of the case, (rows,) float64."""
    before, pull, gram, *grid = (tensor.double() if tensor.is_floating_point() else tensor for tensor in case[:6])
    on = reference.Residual(*(part[:, None] for part in grid))
    change = reference.residual_level(before, on, bits) - reference.residual_level(codes, on, bits)
    return ((2.0 * pull + change @ gram) * change).sum(dim=1)


@settings(deadline=None)
@given(rows=st.integers(1, 20), columns=st.integers(1, 40), bits=widths, seed=st.integers(0, 99))
def test_a_descent_never_loses_more_and_one_code_alone_cannot_gain_behind_it(
    rows: int, columns: int, bits: int, seed: int
) -> None:
    case = descent_case(rows, columns, bits, seed)
    _, pull, gram = case[:3]
    found = ops.descend_columns(*case, bits)
    size = pull.double().square().sum(dim=1) / gram.diagonal().min()
    assert (lost(case, found, bits) <= 1e-6 * size).all()
    for code in range(2**bits) if bits < 8 else ():  # the last column met all that the others became
        other = found.clone()
        other[:, -1] = code
        assert (lost(case, other, bits) >= lost(case, found, bits) - 1e-5 * size).all()


@settings(deadline=None)
@given(columns=st.integers(1, 40), bits=widths, seed=st.integers(0, 99))
def test_codes_that_nothing_pulls_at_stay(columns: int, bits: int, seed: int) -> None:
    codes, pull, gram, mu, a1, a2, _ = descent_case(5, columns, bits, seed)
    apart = 0.01  # no two levels are the same
    grid = mu, a1 + apart * (reference.largest_low(bits) + 1), a2 + apart, 0.5 / (a2 + apart)
    assert torch.equal(ops.descend_columns(codes, torch.zeros_like(pull), gram, *grid, bits), codes)


def weighted_error(case: tuple[Tensor, ...], grid: reference.Residual, bits: int) -> Tensor:
    """sum h (w - q)^2 of each group, q the level nearest to w, (groups,) float64."""
    weights, importance = case[:2]
    inverse = reference.inverse_of(grid.a2)
    q = reference.residual_level(reference.residual_codes(weights, grid, inverse, bits), grid, bits)
    return (importance.double() * (weights - q).double().square()).sum(dim=0)


@settings(deadline=None)
@given(n=st.integers(1, 40), bits=widths, seed=st.integers(0, 99), symmetric=st.booleans())
def test_more_rounds_never_lose_more_and_grids_stay_allowed(n: int, bits: int, seed: int, symmetric: bool) -> None:
    case, m = residual_fit_case(n, 9, bits, 2, seed, symmetric=symmetric), float(reference.largest_low(bits))
    starts = [reference.Residual(*parts) for parts in zip(*case[2:], strict=True)]
    last = torch.stack([weighted_error(case, start, bits) for start in starts]).amin(dim=0)
    for rounds in (0, 1, 8):
        grid = reference.Residual(*ops.fit_residual(*case, bits, symmetric, rounds))
        found = weighted_error(case, grid, bits)
        assert (found <= last * (1.0 + 1e-4) + 1e-6).all()
        assert (grid.a2 >= 0.0).all()
        assert (grid.a1 >= m * grid.a2 * (1.0 - 1e-6)).all()
        assert not symmetric or not grid.mu.any()
        last = found


@settings(deadline=None)
@given(bits=widths, seed=st.integers(0, 99))
def test_weights_on_a_grid_near_the_start_are_met(bits: int, seed: int) -> None:
    _, importance, mu, a1, a2 = residual_fit_case(64, 9, bits, seed=seed)
    grid = reference.Residual(mu=mu[0], a1=a1[0] + 2.0 ** (bits - 1), a2=a2[0] + 1.0)
    codes = torch.randint(2**bits, (64, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    levels, nearby = reference.residual_level(codes, grid, bits), [1.001 * part[None] for part in grid]
    found = reference.Residual(*ops.fit_residual(levels, importance, *nearby, bits, False, 8))
    error = weighted_error((levels, importance), found, bits)
    assert (error <= 1e-4 * (importance.double() * levels.double().square()).sum(dim=0) + 1e-9).all()


# The reference's own arithmetic


finite = st.floats(width=32, min_value=-(2.0**60), max_value=2.0**60)


def gap(exact: Fraction, found: Tensor) -> Fraction:
    return abs(exact - Fraction(found.item()))


@settings(deadline=None, max_examples=300)
@given(a=finite, b=finite, c=finite)
@example(a=1.0 + 2.0**-23, b=1.0 - 2.0**-23, c=2.0**-24)  # just below the middle of two float32
@example(a=1.0 + 2.0**-12, b=1.0 + 2.0**-12, c=2.0**-80)  # and just above: float64 would call both the middle
@example(a=1.0 + 2.0**-12, b=1.0 + 2.0**-12, c=-(2.0**-80))
def test_a_multiply_add_rounds_once(a: float, b: float, c: float) -> None:
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    found = reference.multiply_add(torch.tensor(a), torch.tensor(b), torch.tensor(c))
    for way in (-torch.inf, torch.inf):
        beside = torch.nextafter(found, torch.tensor(way))
        assert gap(exact, found) <= gap(exact, beside)
        assert gap(exact, found) < gap(exact, beside) or found.view(torch.int32) % 2 == 0

"""R2Q: never worse than the affine grid it starts from, finds a grid that is there, and its bytes on paper."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_models import layers, normal, save_model

from arrow_quant_v2 import ArrowQuantizer, ArrowQuantV2, DiffusionQuantConfig
from arrow_quant_v2.config import LayerSpec
from arrow_quant_v2.errors import QuantizationError
from arrow_quant_v2.kernels import cpu, ops, reference
from arrow_quant_v2.kernels.reference import Residual, inverse_of, largest_low
from arrow_quant_v2.kernels.residual_fit import folded_columns
from arrow_quant_v2.packed import WIDTHS
from arrow_quant_v2.quantizers.affine import STRETCHES, clip_search
from arrow_quant_v2.quantizers.r2q import residual_refinement
from arrow_quant_v2.quantizers.r2q_core import (
    fit_r2q,
    largest_s2,
    row_scales_r2q,
    stored_r2q,
)
from arrow_quant_v2.store import StoredModel

sys.path.append(str(Path(__file__).parent / "kernels"))

from kernel_cases import weights

if TYPE_CHECKING:
    from torch import Tensor

    from arrow_quant_v2.quantizers.result import QuantizedRows

cpu.activate()
widths = st.sampled_from(WIDTHS)
any_weight = settings(deadline=None, max_examples=60)


def spec(bits: int, group_size: int | None = 64, *, symmetric: bool = False, method: str = "r2q") -> LayerSpec:
    return LayerSpec(bits=bits, group_size=group_size, method=method, symmetric=symmetric)  # type: ignore[arg-type]


def wide(grid: Residual) -> Residual:
    return Residual(*(part[..., None] for part in grid))


def nearest(groups: Tensor, grid: Residual, bits: int) -> Tensor:
    """The level of the grid that each weight lies nearest to; groups (..., n), the grid (...)."""
    codes = reference.residual_codes(groups, wide(grid), inverse_of(grid.a2)[..., None], bits)
    return reference.residual_level(codes, wide(grid), bits)


def affine_start(groups: Tensor, importance: Tensor | None, bits: int) -> Residual:
    """The best affine grid of the clip search, (rows, n) -> (rows,)."""
    step, full, mean_q, mean_w = (
        part[:, 0] for part in ops.fit_grid(groups, bits, groups.shape[1], False, STRETCHES[bits], importance)
    )
    zero = torch.where(step > 0.0, mean_q - mean_w * full / step, 0.0).clamp(0.0, 2.0**bits - 1.0)
    m = largest_low(bits)
    return Residual(mu=step * ((2**bits - 1) / 2 - zero), a1=step * (m + 1) / 2, a2=step / 2)


def weighted(difference: Tensor, importance: Tensor | None) -> Tensor:
    """The root of sum h d^2 of each group, in float64; no square overflows."""
    d = difference.double()
    return (d.square() * (1.0 if importance is None else importance)).sum(dim=-1).sqrt()


def importances(n: int, seed: int) -> Tensor | None:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed)) ** 3 if seed % 2 else None


def restored(rows: QuantizedRows, columns: int, asked: LayerSpec) -> Tensor:
    scales = torch.from_numpy(rows.scales)
    zeros = scales[:, :0] if rows.zero_points is None else torch.from_numpy(rows.zero_points)
    row_scales = torch.from_numpy(rows.row_scales).view(torch.bfloat16)
    stored = (torch.from_numpy(rows.codes), scales, zeros, row_scales)
    result: Tensor = ops.dequantize_r2q(*stored, asked.bits, columns, asked.group_size or columns, torch.float32)
    return result


# The fit


@any_weight
@given(weight=weights(), bits=widths, seed=st.integers(0, 9))
def test_the_fit_is_never_worse_than_the_affine_grid(weight: Tensor, bits: int, seed: int) -> None:
    h = importances(weight.shape[1], seed)
    found = fit_r2q(weight, h, bits, False)
    ours = weighted(weight - nearest(weight, found, bits), h)
    theirs = weighted(weight - nearest(weight, affine_start(weight, h, bits), bits), h)
    assert (ours <= theirs * (1.0 + 1e-5) + 2.0**-20 * weight.abs().amax(dim=1) * math.sqrt(weight.shape[1])).all()


@any_weight
@given(weight=weights(), bits=widths, symmetric=st.booleans(), seed=st.integers(0, 9))
def test_the_levels_of_a_fit_are_in_order_and_reach_zero(weight: Tensor, bits: int, symmetric: bool, seed: int) -> None:
    mu, a1, a2 = fit_r2q(weight, importances(weight.shape[1], seed), bits, symmetric)
    m = largest_low(bits)
    assert (a2 >= 0.0).all()
    assert (a1 * (1.0 + 1e-6) + 2.0**-120 >= m * a2).all()  # far below, float32 has few digits
    assert (mu.abs() <= (a1 + m * a2) * (1.0 + 1e-6) + 2.0**-120).all()
    assert not (symmetric and mu.any())


@any_weight
@given(
    bits=widths,
    seed=st.integers(0, 999),
    ratio=st.floats(1.0, 3.0),
    magnitude=st.integers(-20, 20),
    symmetric=st.booleans(),
)
def test_a_grid_that_is_there_is_found(bits: int, seed: int, ratio: float, magnitude: int, symmetric: bool) -> None:
    """Weights that start from an affine fit of theirs end on their own levels, for ratios near the affine one."""
    random = torch.Generator().manual_seed(seed)
    m = largest_low(bits)
    a2 = torch.full((8,), 2.0**magnitude)
    a1 = a2 * (m + 1) * (1.0 + (ratio - 2.0) / (4 * 2**bits))
    mu = torch.zeros(8) if symmetric else a1 * (torch.rand(8, generator=random) - 0.5)
    codes = torch.arange(256).remainder(2**bits).to(torch.uint8).expand(8, -1)
    weight = reference.residual_level(codes, wide(Residual(mu=mu, a1=a1, a2=a2)), bits)
    found = fit_r2q(weight, None, bits, symmetric, rounds=30)
    error = weighted(weight - nearest(weight, found, bits), None)
    assert (error <= 1e-3 * weighted(weight, None)).all()


def test_the_fit_of_gaussian_groups_is_nearly_that_of_four_free_levels() -> None:
    """4096 weights in a group: Lloyd-Max is 0.1175, the best uniform grid 0.1188 of the variance."""
    group = normal(1, 4096, seed=1)
    found = fit_r2q(group, None, 2, False, rounds=50)
    error = float(weighted(group - nearest(group, found, 2), None)) ** 2 / float(group.square().sum())
    assert 0.112 < error < 0.119


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_importance_may_be_said_in_any_shape(bits: int, symmetric: bool) -> None:
    groups, h = normal(6, 3 * 32).reshape(6, 3, 32), torch.rand(3, 32)
    found = fit_r2q(groups, h, bits, symmetric)
    for same in (h[None], h.expand(6, 3, 32)):
        other = fit_r2q(groups, same, bits, symmetric)
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(found, other, strict=True))
    one = fit_r2q(groups[:, 1], h[1], bits, symmetric)
    assert all(torch.equal(a[:, 1], b) for a, b in zip(found, one, strict=True))
    rows = fit_r2q(groups[:, 1], h[1].expand(6, 32), bits, symmetric)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(one, rows, strict=True))
    tenfold = fit_r2q(groups, 2.0**20 * h, bits, symmetric)
    assert all(torch.equal(a, b) for a, b in zip(found, tenfold, strict=True))


def test_a_group_that_does_not_matter_keeps_the_grid_that_covers_it() -> None:
    group = normal(4, 64)
    found = fit_r2q(group, torch.zeros(64), 4, False)
    assert float((group - nearest(group, found, 4)).abs().max()) <= 0.51 * float(2.0 * found.a2.max())


@any_weight
@given(weight=weights(most_rows=6), bits=widths, symmetric=st.booleans(), seed=st.integers(0, 9))
def test_a_group_is_fitted_as_if_it_were_alone(weight: Tensor, bits: int, symmetric: bool, seed: int) -> None:
    h = importances(weight.shape[1], seed)
    together = fit_r2q(weight, h, bits, symmetric)
    for row in range(len(weight)):
        alone = fit_r2q(weight[row : row + 1], h, bits, symmetric)
        assert all(torch.equal(a[row : row + 1], b) for a, b in zip(together, alone, strict=True))


@given(n=st.integers(1, 70), seed=st.integers(0, 99))
@settings(deadline=None)
def test_folded_columns_are_their_sum(n: int, seed: int) -> None:
    terms = normal(2 * n, 5, seed=seed).reshape(2, n, 5)
    assert torch.allclose(folded_columns(terms.clone()), terms.double().sum(dim=1), atol=1e-5)


# Storing


@any_weight
@example(weight=torch.tensor([[1e-3, -1.321e-34]]), bits=4, symmetric=True)
@given(weight=weights(), bits=widths, symmetric=st.booleans())
def test_stored_levels_stay_in_order_and_close(weight: Tensor, bits: int, symmetric: bool) -> None:
    found = fit_r2q(weight[:, None], None, bits, symmetric)
    row_scales = row_scales_r2q(found.a1, found.a2, bits)
    stored = stored_r2q(*found, row_scales, bits, symmetric)
    m, s1, s2 = largest_low(bits), stored.scales[:, 0].long(), stored.scales[:, 1].long()
    assert (s1 * s1 >= m * s2 * s2).all()
    assert (stored.a1 >= m * stored.a2).all()
    assert stored.zero_points.shape == (len(weight), 0 if symmetric else 1)
    used = found.a1 > 2.0**-80
    # Half a code of 255 twice, and of 96; a whole one of 22. A larger a2 takes sqrt(m) codes of a1 with it.
    near_a1, near_a2 = {2: (0.006, 0.006), 4: (0.02, 0.012), 8: (0.11, 0.12)}[bits]
    assert ((stored.a1 - found.a1).abs() <= near_a1 * found.a1)[used].all()
    assert ((stored.a2 - found.a2).abs() <= near_a2 * found.a1 / m)[used & (found.a2 > 0.1 * found.a1 / m)].all()
    again = reference.residual_of(stored.scales, stored.zero_points, row_scales, bits)
    assert all(torch.equal(a, b) for a, b in zip(stored.grid, again, strict=True))


def test_stored_bytes_on_paper() -> None:
    """m = 7 at 4 bits: 96^2 * 7 < 255^2 < 97^2 * 7. A row scale of 2 is that of a1 = 2."""
    two = torch.tensor([2.0], dtype=torch.bfloat16)
    mu, a1, a2 = torch.tensor([[0.0, -1.0]]), torch.tensor([[2.0, 0.5]]), torch.tensor([[0.25, 0.0625]])
    stored = stored_r2q(mu, a1, a2, two, 4, False)
    assert stored.scales.numpy().tobytes() == bytes([255, 90, 128, 45])  # 255 sqrt(a / 2)
    assert stored.zero_points.numpy().tobytes() == bytes([128, 255])  # 127.5 (1 - mu / reach), half to even; the end
    assert [largest_s2(bits) for bits in WIDTHS] == [255, 96, 22]
    one = stored_r2q(mu[:, 1], a1[:, 1], a2[:, 1], two, 4, True)
    assert (one.scales.tolist(), one.zero_points.shape, one.mu.tolist()) == ([[128, 45]], (1, 0), [0.0])
    crowded = stored_r2q(mu[:, 1], a1[:, 1], a1[:, 1] / 7, two, 4, True)  # s1 = 127.5 would do; s2 = 48.2 asks for 127
    assert crowded.scales.tolist() == [[128, 48]]
    raised = stored_r2q(
        mu[:, 1], a1[:, 1] * 0.9, a1[:, 1] * 0.9 / 7, two, 4, True
    )  # 121 and 45.7, so 46 sqrt(7) = 121.7
    assert raised.scales.tolist() == [[122, 46]]


def test_a_quantized_row_on_paper() -> None:
    """Levels -3, -1, 1, 3: a1 = 2, a2 = 1, row scale 2. sqrt(1 / 2) * 255 = 180."""
    row = torch.tensor([[-3.0, -1.0, 1.0, 3.0, 3.0, 1.0, -1.0, -3.0]])
    rows = residual_refinement(row, spec(2, 8, symmetric=True))
    assert rows.codes.tobytes() == b"\xe4\x1b"
    assert (rows.scales.tobytes(), rows.row_scales.tolist()) == (bytes([255, 180]), [0x4000])
    assert rows.zero_points is None
    assert rows.sums[0].tolist() == pytest.approx([40.0, 40.0, 0.0], abs=0.1)


# The method


@any_weight
@given(weight=weights(), bits=widths, symmetric=st.booleans(), group=st.sampled_from([8, 24, 64, None]))
def test_storing_costs_no_more_than_it_moves_the_levels(
    weight: Tensor, bits: int, symmetric: bool, group: int | None
) -> None:
    """sqrt(sum e^2) grows by at most sqrt(n) times the farthest that a level was moved."""
    asked, columns = spec(bits, group, symmetric=symmetric), weight.shape[1]
    found = restored(residual_refinement(weight, asked), columns, asked)
    size = columns if group is None else min(group, columns)
    groups, present = reference.split_groups(weight, size), reference.split_groups(torch.ones(1, columns), size)[0]
    mask = None if columns % size == 0 else present
    grid = fit_r2q(groups, mask, bits, symmetric)
    stored = stored_r2q(*grid, row_scales_r2q(grid.a1, grid.a2, bits), bits, symmetric).grid
    m = largest_low(bits)
    moved = sum((a - b).abs() * k for a, b, k in zip(grid, stored, (1, 1, m), strict=True))
    fitted = weighted(groups - nearest(groups, grid, bits), present)
    error = weighted(reference.split_groups(weight - found, size), present)
    slack = 2.0**-19 * groups.abs().amax(dim=-1) + 2.0**-100
    assert (error <= fitted * (1 + 1e-5) + (moved + slack) * math.sqrt(size)).all()


@any_weight
@given(weight=weights(), bits=widths, symmetric=st.booleans())
def test_the_sums_are_those_of_the_stored_weights(weight: Tensor, bits: int, symmetric: bool) -> None:
    asked = spec(bits, 24, symmetric=symmetric)
    rows = residual_refinement(weight, asked)
    q, w = restored(rows, weight.shape[1], asked).double(), weight.double()
    exact = torch.stack([part.square().sum(dim=1) for part in (w, q, w - q)], dim=1).sqrt()
    found = torch.from_numpy(rows.sums).sqrt()
    assert ((found - exact).abs() <= 2**-18 * (exact + exact[:, :1])).all()


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**32), bits=st.sampled_from([2, 4]), group=st.sampled_from([32, 64, 128]))
def test_on_gaussian_rows_it_beats_the_clip_search(seed: int, bits: int, group: int) -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(seed))
    ours, theirs = (method(weight, spec(bits, group)).sums[:, 2].sum() for method in (residual_refinement, clip_search))
    assert ours < 0.99 * theirs


@pytest.mark.parametrize(
    ("bits", "symmetric", "relative"),
    [(2, False, 0.1015), (2, True, 0.1103), (4, False, 0.00675), (4, True, 0.00836), (8, False, 3.14e-5)],
)
def test_error_in_groups_of_64(bits: int, symmetric: bool, relative: float) -> None:
    sums = residual_refinement(normal(256, 1024, seed=2), spec(bits, symmetric=symmetric)).sums.sum(axis=0)
    assert sums[2] / sums[0] == pytest.approx(relative, rel=0.03)


def test_what_matters_more_is_kept_better() -> None:
    weight, importance = normal(256, 128), torch.ones(128)
    error = []
    for importance[5] in (0.01, 1.0, 100.0):
        rows = residual_refinement(weight, spec(2), importance)
        error.append(float((weight - restored(rows, 128, spec(2)))[:, 5].square().sum()))
    assert error[0] > error[1] > error[2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_are_read_as_they_are(dtype: torch.dtype) -> None:
    weight = normal(9, 72).to(dtype)
    one, other = residual_refinement(weight, spec(4)), residual_refinement(weight.float(), spec(4))
    assert one.codes.tobytes() == other.codes.tobytes()
    assert np.array_equal(one.sums, other.sums)


def test_bytes_do_not_depend_on_the_number_of_threads() -> None:
    weight, before = normal(96, 4096), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            rows = residual_refinement(weight, spec(2))
            found.append((rows.codes.tobytes(), rows.scales.tobytes(), rows.sums.tobytes()))
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("bits", WIDTHS)
def test_a_row_that_is_not_finite_says_so_and_leaves_the_others_alone(bits: int, value: float) -> None:
    weight = normal(3, 100)
    sound = residual_refinement(weight, spec(bits))
    weight[1, 70] = value
    found = residual_refinement(weight, spec(bits))
    assert not np.isfinite(found.sums[1]).all()
    for row in (0, 2):
        assert np.array_equal(found.codes[row], sound.codes[row])
        assert np.array_equal(found.sums[row], sound.sums[row])


@pytest.mark.parametrize(
    ("weight", "importance", "message"),
    [
        (torch.ones(4, 4, dtype=torch.float64), None, "r2q: weight is torch.float64"),
        (torch.ones(4), None, "r2q: weight is torch.float32 with 1 dimensions"),
        (torch.ones(0, 4), None, "r2q: the weight is 0 x 4"),
        (torch.ones(4, 8), torch.ones(4), r"r2q: importance is torch.float32 \(4,\)"),
        (torch.ones(4, 8), -torch.ones(8), "r2q: importance goes from -1.0"),
    ],
)
def test_what_is_no_weight_is_refused(weight: Tensor, importance: Tensor | None, message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        residual_refinement(weight, spec(4), importance)


# From end to end


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
def test_one_tensor_in_memory(granularity: Any) -> None:
    tensor = normal(64, 128)
    one = ArrowQuantizer(4, method="r2q", granularity=granularity)
    packed = one.quantize(tensor)
    assert packed.layout.grid == "r2q"
    assert torch.allclose(one.dequantize(packed), tensor, atol=0.6)


def test_a_model_is_quantized_measured_and_predicted(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", layers(3) | {"odd.weight": normal(40, 72)})
    api, config = ArrowQuantV2(), DiffusionQuantConfig(bit_width=2, group_size=32, method="r2q", min_accuracy=0.5)
    result = api.quantize_diffusion_model(model, tmp_path / "out", config)
    with StoredModel(tmp_path / "out") as stored:
        entries = [one for one in stored.entries if one.layout is not None]
        assert {(one.grid, one.method, one.quant_type) for one in entries} == {("r2q", "r2q", "int2")}
        for one in entries:
            assert one.bits_per_weight == 8 * one.stored_bytes / one.num_params
    report = api.validate_quality(model, tmp_path / "out")
    assert report["cosine_similarity"] == pytest.approx(result["cosine_similarity"], abs=1e-3)
    assert api.doctor(model, config)["predicted_size_mb"] == pytest.approx(result["model_size_mb"], rel=0.02)
    api.convert(tmp_path / "out", tmp_path / "converted")

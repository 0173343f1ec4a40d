"""GPTQ of one layer: the algebra it rests on, what it refuses, and that outputs come closer than without it."""

from __future__ import annotations

import importlib
import os
import threading
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import normal

from arrow_quant_v2 import GPTQCalibrator, PackedTensor
from arrow_quant_v2.config import LayerSpec
from arrow_quant_v2.engines.one_core import each_on_one_core
from arrow_quant_v2.errors import ConfigurationError, QuantizationError
from arrow_quant_v2.kernels import cpu, ops
from arrow_quant_v2.one_tensor import dequantize_tensor, quantize_tensor
from arrow_quant_v2.packed import sparing
from arrow_quant_v2.quantizers.affine import STRETCHES
from arrow_quant_v2.quantizers.gptq import gptq
from arrow_quant_v2.quantizers.gptq_affine import AffineGrid, RowGrid
from arrow_quant_v2.quantizers.gptq_core import Ask, calibrated_rows
from arrow_quant_v2.quantizers.gptq_factor import Factor, factorize, group_aware_order, to_upper_root
from arrow_quant_v2.quantizers.result import joined
from arrow_quant_v2.quantizers.whitened import Whitened

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

COLUMNS, TOKENS = 512, 2048


def inputs(tokens: int, columns: int = COLUMNS, seed: int = 0, outliers: int = 8) -> Tensor:
    """Correlated activations; some channels are 15 times as large as the others."""
    layer, random = torch.Generator().manual_seed(99), torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=layer) / columns**0.5
    channels = torch.ones(columns)
    channels[torch.randperm(columns, generator=layer)[:outliers]] = 15.0
    noise = torch.randn(2, tokens, columns, generator=random)
    return (noise[0] @ mixing + 0.3 * noise[1]) * channels


def spec(bits: Any = 2, group_size: int | None = 64, *, symmetric: bool = False, method: str = "clip") -> LayerSpec:
    return LayerSpec(bits=bits, group_size=group_size, method=method, symmetric=symmetric)


def plain(weight: Tensor, asked: LayerSpec) -> Tensor:
    """Quantized without calibration, and back."""
    return dequantize_tensor(quantize_tensor(weight, "w", asked, "group"))


def observed(x: Tensor, bits: Any = 2, **settings: Any) -> GPTQCalibrator:
    calibrator = GPTQCalibrator(bits, **settings)
    calibrator.observe(x)
    return calibrator


def calibrated(weight: Tensor, x: Tensor, bits: Any = 2, **settings: Any) -> Tensor:
    return dequantize_tensor(observed(x, bits, **settings).calibrate(weight))


def output_error(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    """tr(dW H dW^T) / tr(W H W^T)."""
    w, d, h = weight.double(), (weight - quantized).double(), hessian.double()
    return float(((d @ h) * d).sum() / ((w @ h) * w).sum())


def same(one: PackedTensor, other: PackedTensor) -> bool:
    names = ("codes", "scales", "zero_points", "row_scales")
    pairs = [(getattr(one, name), getattr(other, name)) for name in names]
    return all((a is None and b is None) or a.tobytes() == b.tobytes() for a, b in pairs)


@pytest.fixture(scope="module")
def held_out() -> Tensor:
    x = inputs(TOKENS, seed=1)
    return x.T @ x


@pytest.fixture(scope="module")
def seen() -> Tensor:
    return inputs(TOKENS)


WEIGHT = normal(160, COLUMNS, seed=3)


# What it is worth


@pytest.mark.parametrize(
    ("bits", "symmetric", "nearest", "clip", "ours"),
    [
        (2, False, 0.21, 0.11, 0.0182),
        (4, False, 0.0083, 0.0072, 0.00117),
        (2, True, 0.52, 0.155, 0.0468),
        (4, True, 0.012, 0.0096, 0.00228),
    ],
)
def test_output_error_on_inputs_that_were_not_seen(
    *, seen: Tensor, held_out: Tensor, bits: int, symmetric: bool, nearest: float, clip: float, ours: float
) -> None:
    found = [
        output_error(WEIGHT, quantized, held_out)
        for quantized in (
            plain(WEIGHT, spec(bits, symmetric=symmetric, method="rtn")),
            plain(WEIGHT, spec(bits, symmetric=symmetric)),
            calibrated(WEIGHT, seen, bits, symmetric=symmetric),
        )
    ]
    assert found == pytest.approx([nearest, clip, ours], rel=0.03)


def test_each_part_is_worth_something(seen: Tensor, held_out: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    def error(**settings: Any) -> float:
        return output_error(WEIGHT, calibrated(WEIGHT, seen, **settings), held_out)

    whole, unrefined = error(), error(refits=0)
    assert whole < unrefined
    flat = property(lambda factor: torch.ones(len(factor.order)))
    monkeypatch.setattr(Factor, "importance", flat)
    assert unrefined < 0.8 * error(refits=0)  # grids fitted without 1 / U_tt^2


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_where_all_columns_matter_alike_it_is_no_worse_than_the_clip_search(bits: int, symmetric: bool) -> None:
    eye = torch.eye(COLUMNS)
    found = gptq(WEIGHT, spec(bits, symmetric=symmetric), eye)
    plainly = plain(WEIGHT, spec(bits, symmetric=symmetric))
    assert found.sums[:, 2].sum() <= (1.005 if bits < 8 else 1.05) * float((WEIGHT - plainly).double().square().sum())


@pytest.mark.parametrize("bits", [2, 4])
def test_more_refits_never_cost_more_on_the_inputs_seen(seen: Tensor, bits: int) -> None:
    hessian = seen.T @ seen
    errors = [output_error(WEIGHT, calibrated(WEIGHT, seen, bits, refits=n), hessian) for n in (0, 1, 3)]
    assert errors[2] < errors[0]
    assert errors[1] < errors[0]


# The algebra


def damped(hessian: Tensor, factor: Factor) -> Tensor:
    """What the factor should be the factor of, float64."""
    h = hessian.double() / hessian.diagonal().double().mean()
    return h[factor.order][:, factor.order] + factor.damping * torch.eye(len(h), dtype=torch.float64)


@pytest.mark.parametrize("columns", [1, 8, 100, 511, 512, 513, 1200])
def test_the_factor_is_that_of_h_and_its_inverse_is_the_papers(columns: int) -> None:
    x = inputs(2 * columns, columns)
    hessian = x.T @ x
    factor = factorize(hessian, 64)
    root, expected = factor.root.double(), damped(hessian, factor)
    assert torch.allclose(root @ root.T, expected, atol=1e-5 * float(expected.abs().max()))
    paper = torch.linalg.cholesky(torch.linalg.inv(expected), upper=True)  # H^-1 = U^T U
    ours = torch.linalg.solve_triangular(root, torch.eye(columns, dtype=torch.float64), upper=True)
    assert torch.allclose(ours, paper, rtol=1e-2, atol=1e-3 * float(paper.abs().max()))


def paper_loop(weight: Tensor, upper: Tensor, scale: Tensor, zero: Tensor, most: int) -> Tensor:
    """Algorithm 1 of the paper without its blocks, float64, on a grid that is given: Q."""
    w, quantized = weight.double().clone(), torch.empty_like(weight, dtype=torch.float64)
    for t in range(weight.shape[1]):
        quantized[:, t] = ((w[:, t] / scale + zero).round().clamp(0, most) - zero) * scale
        error = (w[:, t] - quantized[:, t]) / upper[t, t]
        w[:, t:] -= error[:, None] * upper[t, t:]
    return quantized


@pytest.mark.parametrize("group_size", [8, 64, 300, None])
def test_it_is_the_loop_of_the_paper(seen: Tensor, group_size: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """One grid for a whole row makes both comparable, whatever the groups, spans and blocks in between."""
    cpu.activate()
    hessian = seen[:, :300].T @ seen[:, :300]
    weight, factor = normal(24, 300), factorize(hessian, group_size)
    scale, zero = torch.full((24, 1), 0.012), torch.full((24, 1), 8.0)
    grid = AffineGrid(
        scales=torch.ones(24, 1, dtype=torch.uint8),
        zero_points=torch.ones(24, 1, dtype=torch.uint8),
        scale=scale,
        inverse=1.0 / scale,
        zero=zero,
    )
    monkeypatch.setattr(AffineGrid, "fitted", lambda *_: grid)
    ask = Ask(grid="affine", bits=4, symmetric=False, stretches=(1.0,), refits=0, sweeps=0)
    ours = calibrated_rows(weight, factor, ask).values[:, factor.order.argsort()]
    upper = torch.linalg.cholesky(torch.linalg.inv(damped(hessian, factor)), upper=True)
    paper = paper_loop(weight[:, factor.order], upper, scale[:, 0].double(), zero[:, 0].double(), 15)
    back = factor.order.argsort()
    assert (ours.double() - paper[:, back]).abs().gt(
        1e-6
    ).float().mean() < 0.02  # ties rounded otherwise, and followers
    assert output_error(weight, ours, hessian) == pytest.approx(
        output_error(weight, paper[:, back].float(), hessian), rel=0.02
    )


@pytest.mark.parametrize("size", [1, 63, 512, 700])
def test_a_matrix_that_is_not_positive_definite_has_no_root(size: int) -> None:
    a = torch.eye(size)
    a[size // 2, size // 2] = -1.0
    assert not to_upper_root(a)


@settings(deadline=None, max_examples=30)
@given(columns=st.integers(1, 40), group_size=st.sampled_from([8, 16, 40]), seed=st.integers(0, 99))
def test_the_order_keeps_groups_together_and_puts_what_matters_first(columns: int, group_size: int, seed: int) -> None:
    curvature = torch.rand(columns, generator=torch.Generator().manual_seed(seed))
    order, groups = group_aware_order(curvature, group_size)
    assert sorted(order.tolist()) == list(range(columns))
    sums = []
    for group in groups:
        inside = order[group.start : group.stop]
        assert (inside // group_size == group.index).all()
        assert (curvature[inside].diff() <= 0).all()
        sums.append(float(curvature[inside].sum()))
    assert all(a >= b - 1e-6 for a, b in pairwise(sums))


# What is stored


@pytest.mark.parametrize("rows", [1, 5, 530])
@pytest.mark.parametrize("group_size", [8, 40, 64, None])
@pytest.mark.parametrize(("bits", "symmetric"), [(2, False), (4, True), (8, False)])
def test_what_is_stored_means_what_was_chosen(rows: int, group_size: int | None, bits: Any, symmetric: bool) -> None:
    """Ragged tails (150 columns), one row, one group per row: dequantize gives Q, in the columns' own order."""
    weight, x = normal(rows, 150), inputs(400, 150)
    calibrator = observed(x, bits, group_size=group_size, symmetric=symmetric)
    packed = calibrator.calibrate(weight)
    grid = sparing("affine", len(calibrator.factor.groups))
    own = {"refits": calibrator.refits, "sweeps": calibrator.sweeps}
    ask = Ask(grid=grid, bits=bits, symmetric=symmetric, stretches=STRETCHES[bits], **own)
    chosen = calibrated_rows(weight, calibrator.factor, ask).values
    assert torch.equal(dequantize_tensor(packed)[:, calibrator.factor.order], chosen)
    assert output_error(weight, dequantize_tensor(packed), calibrator.hessian) < {2: 0.2, 4: 0.02, 8: 1e-3}[bits]
    scale, zero = calibrator.quantization_parameters(weight)
    groups = packed.layout.groups
    assert (scale.shape, zero.shape) == ((rows, groups), (rows, groups))
    codes = ops.unpack(torch.from_numpy(packed.codes), bits, 150).float()
    size = packed.layout.group
    spread = [part.repeat_interleave(size, dim=1)[:, :150] for part in (scale, zero)]
    assert torch.equal((codes - spread[1]) * spread[0], dequantize_tensor(packed))


@pytest.mark.parametrize("group_size", [None, 256])
@pytest.mark.parametrize(("bits", "symmetric"), [(2, True), (4, False), (8, True)])
def test_a_row_of_one_group_has_one_scale_and_loses_nothing_by_it(
    group_size: int | None, bits: Any, symmetric: bool
) -> None:
    weight, x = normal(96, 150), inputs(400, 150)
    calibrator = observed(x, bits, group_size=group_size, symmetric=symmetric)
    packed = calibrator.calibrate(weight)
    assert packed.layout.grid == "row"
    assert packed.nbytes == 96 * (packed.layout.row_bytes + (2 if symmetric else 3))
    own = {"refits": calibrator.refits, "sweeps": calibrator.sweeps}
    two = Ask(grid="affine", bits=bits, symmetric=symmetric, stretches=STRETCHES[bits], **own)
    stored_in_two = calibrated_rows(weight, calibrator.factor, two).values[:, calibrator.factor.order.argsort()]
    lost = [
        output_error(weight, quantized, calibrator.hessian) for quantized in (dequantize_tensor(packed), stored_in_two)
    ]
    assert lost[0] < 1.03 * lost[1]


@pytest.mark.parametrize(("bits", "symmetric"), [(2, True), (4, False), (8, True)])
def test_a_refit_of_a_row_of_one_group_tries_another_scale_each_time_and_keeps_what_loses_less(
    bits: Any, symmetric: bool
) -> None:
    weight, factor = normal(64, 150), observed(inputs(400, 150), bits, group_size=None).factor
    block, none = weight[:, factor.order], torch.empty(0, dtype=torch.bfloat16)
    ask = Ask(grid="row", bits=bits, symmetric=symmetric, stretches=STRETCHES[bits], refits=2, sweeps=0)
    grid = RowGrid.fitted(block, torch.ones(150), none, ask)
    codes, _ = grid.columns(block, torch.eye(150), bits)
    again = grid.refitted(codes, Whitened(block @ factor.root, factor.root), none, ask)
    assert isinstance(again, RowGrid)
    assert (again.scale != grid.scale).all()
    for one in (grid, again):
        assert torch.equal(one.scale.bfloat16().float(), one.scale)
        assert (one.scales == 255).all()
    lost = [
        output_error(weight, dequantize_tensor(other.calibrate(weight)), other.hessian)
        for other in (
            observed(inputs(400, 150), bits, group_size=None, symmetric=symmetric, refits=refits) for refits in (0, 4)
        )
    ]
    assert lost[1] < lost[0]


def test_rows_of_zeros_and_of_the_smallest_numbers_that_are_one_group_are_kept() -> None:
    weight = torch.zeros(3, 150)
    weight[1] = normal(1, 150)[0] * 1e-36
    for bits, symmetric in ((2, True), (8, False)):
        lost = []
        for sweeps in (0, 3):
            calibrator = observed(inputs(400, 150), bits, group_size=None, symmetric=symmetric, sweeps=sweeps)
            found = dequantize_tensor(calibrator.calibrate(weight))
            assert not found[[0, 2]].any()
            assert sweeps or torch.cosine_similarity(found[1] * 1e36, weight[1] * 1e36, dim=0) > 0.8
            lost.append(output_error(weight * 1e36, found * 1e36, calibrator.hessian))
        assert lost[1] < lost[0]


def test_the_sums_are_the_error_of_the_weights(seen: Tensor) -> None:
    calibrator, weight = observed(seen, 4), WEIGHT.bfloat16()
    rows = gptq(weight, spec(4), calibrator.factor)
    w = weight.float()
    q = dequantize_tensor(replace(calibrator.calibrate(weight), dtype="float32"))
    exact = torch.stack([part.double().square().sum(dim=1) for part in (w, q, w.double() - q)], dim=1)
    assert torch.allclose(torch.from_numpy(rows.sums), exact, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_of_the_weight_comes_back(seen: Tensor, dtype: torch.dtype) -> None:
    restored = calibrated(WEIGHT.to(dtype), seen, 8)
    assert restored.dtype == dtype
    assert torch.allclose(restored.float(), WEIGHT, atol=0.02)


def test_a_convolution_is_calibrated_on_its_unfolded_inputs() -> None:
    images = inputs(6 * 12 * 12, 8, outliers=1).reshape(6, 12, 12, 8).permute(0, 3, 1, 2)
    weight = normal(16, 8, 3, 3)
    calibrator = GPTQCalibrator(4, group_size=24)
    calibrator.observe(torch.nn.functional.unfold(images, 3, padding=1).transpose(1, 2))
    assert calibrator.count == 6 * 12 * 12
    ours, plainly = dequantize_tensor(calibrator.calibrate(weight, "conv")), plain(weight, spec(4, 24))

    def error(quantized: Tensor) -> float:
        return float(torch.nn.functional.conv2d(images, weight - quantized, padding=1).square().sum())

    assert ours.shape == weight.shape
    assert error(ours) < 0.7 * error(plainly)


# Inputs that leave something open


def test_dead_columns_are_zero_and_change_nothing_else(seen: Tensor) -> None:
    x, weight = seen.clone(), WEIGHT.clone()
    x[:, 64:128] = 0.0  # a whole group
    x[:, 5:300:7] = 0.0
    dead = ~x.any(dim=0)
    calibrator = observed(x)
    assert torch.equal(calibrator.factor.dead, dead)
    packed = calibrator.calibrate(weight)
    weight[:, dead] = 1e6
    assert same(calibrator.calibrate(weight), packed)
    restored = dequantize_tensor(packed)
    assert not restored[:, 64:128].any()
    assert output_error(WEIGHT, restored, calibrator.hessian) < 0.05


@pytest.mark.parametrize("tokens", [1, 3, 100])
def test_fewer_tokens_than_columns_are_enough(tokens: int) -> None:
    x = inputs(tokens)
    restored = calibrated(WEIGHT, x)
    assert output_error(WEIGHT, restored, x.T @ x) < 0.3 * output_error(WEIGHT, plain(WEIGHT, spec()), x.T @ x)


def test_damping_grows_until_there_is_a_factor() -> None:
    x = torch.ones(4, COLUMNS)  # rank one
    x[:, ::2] = -1.0
    calibrator = observed(x, damping=1e-12)
    assert 1e-12 < calibrator.factor.damping <= 1e-3
    assert calibrator.calibrate(WEIGHT).rows == 160
    assert observed(x, damping=0.02).factor.damping == 0.02


@pytest.mark.parametrize(("tokens", "damping"), [(10, 1.0), (256, 0.6), (512, 0.3), (2048, 0.075), (20000, 0.01)])
def test_the_less_was_seen_the_less_it_is_trusted(held_out: Tensor, tokens: int, damping: float) -> None:
    x = inputs(tokens)
    calibrator = observed(x)
    assert calibrator.factor.damping == pytest.approx(damping)
    error = output_error(WEIGHT, dequantize_tensor(calibrator.calibrate(WEIGHT)), held_out)
    assert error < 1.01 * output_error(WEIGHT, calibrated(WEIGHT, x, damping=0.01), held_out)


@settings(deadline=None, max_examples=25)
@given(
    rows=st.integers(1, 20),
    columns=st.integers(1, 90),
    group_size=st.sampled_from([8, 24, 64, None]),
    bits=st.sampled_from([2, 4, 8]),
    symmetric=st.booleans(),
    magnitude=st.integers(-20, 15),
    tokens=st.integers(1, 60),
)
def test_any_layer_is_quantized_to_finite_weights(
    *, rows: int, columns: int, group_size: int | None, bits: Any, symmetric: bool, magnitude: int, tokens: int
) -> None:
    weight, x = normal(rows, columns) * 10.0**magnitude, inputs(tokens, columns, outliers=1)
    restored = calibrated(weight, x, bits, group_size=group_size, symmetric=symmetric)
    assert restored.isfinite().all()
    assert float((restored - weight).abs().max()) <= 20 * float(weight.abs().max())


def test_the_scale_of_h_does_not_matter(seen: Tensor) -> None:
    hessian = seen.T @ seen
    plainly = gptq(WEIGHT, spec(), hessian)
    for factor in (2.0**-40, 2.0**30):
        assert gptq(WEIGHT, spec(), hessian * factor).codes.tobytes() == plainly.codes.tobytes()
    double = gptq(WEIGHT, spec(), hessian.double())
    assert (double.codes == plainly.codes).mean() > 0.9


# The same bytes


@pytest.fixture
def torch_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("torch_threads")
def test_results_do_not_depend_on_the_number_of_threads() -> None:
    x, weight = inputs(1500, 1100), normal(700, 1100)
    found = []
    for threads in (1, 2, 5, 1):
        torch.set_num_threads(threads)
        found.append(observed(x).calibrate(weight))
        assert torch.get_num_threads() == threads
    assert all(same(found[0], other) for other in found[1:])


@pytest.mark.usefixtures("torch_threads")
def test_torch_keeps_the_number_of_threads_that_its_user_chose() -> None:
    torch.set_num_threads(3)
    assert each_on_one_core(lambda _: torch.get_num_threads(), range(4)) == [1, 1, 1, 1]
    later: list[int] = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert (torch.get_num_threads(), later) == (3, [3])
    with pytest.raises(ZeroDivisionError):
        each_on_one_core(lambda i: 1 // i, [1, 0])
    assert torch.get_num_threads() == 3


def test_calibrators_that_are_merged_saw_what_one_would_have_seen(seen: Tensor) -> None:
    whole = observed(seen)
    parts = [observed(part) for part in seen.split(700)]
    merged = GPTQCalibrator(2)
    for part in parts:
        merged.merge(part)
    merged.merge(GPTQCalibrator(2))  # saw nothing
    assert merged.count == whole.count == TOKENS
    assert torch.allclose(merged.hessian, whole.hessian, rtol=1e-4, atol=1e-5 * float(whole.hessian.max()))
    errors = [output_error(WEIGHT, dequantize_tensor(c.calibrate(WEIGHT)), whole.hessian) for c in (merged, whole)]
    assert errors[0] == pytest.approx(errors[1], rel=0.02)


def test_what_is_seen_later_counts_too(seen: Tensor) -> None:
    calibrator = observed(seen[:100])
    before, alone = calibrator.calibrate(WEIGHT), calibrator.hessian.clone()
    calibrator.observe(seen[100:].reshape(4, -1, COLUMNS))  # a batch of sequences
    assert calibrator.count == TOKENS
    assert not same(calibrator.calibrate(WEIGHT), before)
    rest = seen[100:].T @ seen[100:]
    assert torch.allclose(calibrator.hessian, alone + rest, rtol=1e-4, atol=1e-5 * float(rest.max()))
    assert torch.equal(calibrator.hessian, calibrator.hessian.T)


def test_rows_are_quantized_by_themselves(seen: Tensor) -> None:
    hessian = seen.T @ seen
    whole = gptq(WEIGHT, spec(4), hessian)
    factor = factorize(hessian, 64)
    parts = joined([gptq(rows, spec(4), factor) for rows in WEIGHT.split(64)])
    assert (whole.codes == parts.codes).mean() > 0.98  # matrix products of other shapes round otherwise
    assert whole.row_scales.tobytes() == parts.row_scales.tobytes()


# What is refused


@pytest.mark.parametrize(
    ("hessian", "message"),
    [
        (torch.eye(4, 5), r"H is \[4, 5\]; it needs as many rows as"),
        (torch.ones(4), r"H is \[4\]; it needs"),
        (torch.eye(0), r"H is \[0, 0\]; it needs"),
        (torch.eye(4).half(), "H is torch.float16; allowed: float32, float64"),
        (torch.eye(4) * torch.nan, "H holds NaN or infinity; look for the inputs"),
        (torch.eye(4) / 0.0, "H holds NaN or infinity"),
        (-torch.eye(4), "the diagonal of H goes from -1 to -1; a sum of squares"),
        (torch.zeros(4, 4), "the diagonal of H goes from 0 to 0"),
        (torch.eye(4) - 100.0 * (1 - torch.eye(4)), "H has no Cholesky factor even with 10 times its mean"),
        (torch.eye(8), r"gptq: H is for 8 columns in groups of 4; the weight has 4 in groups of 4"),
    ],
)
def test_a_wrong_h_is_refused(hessian: Tensor, message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        gptq(torch.ones(2, 4), spec(), hessian)


def test_a_factor_of_other_groups_is_refused() -> None:
    with pytest.raises(
        QuantizationError, match="H is for 64 columns in groups of 32; the weight has 64 in groups of 8"
    ):
        gptq(normal(2, 64), spec(2, 8), factorize(torch.eye(64), 32))


@pytest.mark.parametrize("weight", [torch.ones(4), torch.ones(2, 4).double(), torch.ones(0, 4), torch.ones(2, 2, 2)])
def test_gptq_takes_a_matrix_of_floats(weight: Tensor) -> None:
    with pytest.raises(
        QuantizationError, match=r"gptq: the weight is torch.float.*; allowed: a matrix of torch.float32"
    ):
        gptq(weight, spec(), torch.eye(4))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"bits": 3}, "bits is 3; allowed: 2, 4 or 8"),
        ({"group_size": 7}, "group_size is 7; allowed: a multiple of 8"),
        ({"symmetric": 1}, "symmetric is 1; allowed: True or False"),
        ({"damping": 0.0}, "damping is 0.0; allowed: above 0, at most 1, or None"),
        ({"damping": float("nan")}, "damping is nan; allowed"),
        ({"refits": -1}, "refits is -1; allowed: 0 to 100"),
        ({"refits": 1.5}, "refits is 1.5; allowed: 0 to 100"),
        ({"sweeps": True}, "sweeps is True; allowed: 0 to 100"),
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        GPTQCalibrator(**wrong)


def test_a_calibrator_that_saw_nothing_says_so() -> None:
    empty = GPTQCalibrator(2)
    for ask in (lambda: empty.hessian, lambda: empty.factor, lambda: empty.calibrate(WEIGHT)):
        with pytest.raises(
            QuantizationError, match=r"nothing was observed yet; show the layer's inputs to observe\(\)"
        ):
            ask()
    empty.observe(torch.ones(0, COLUMNS))
    with pytest.raises(QuantizationError, match="nothing was observed yet"):
        empty.calibrate(WEIGHT)
    with pytest.raises(QuantizationError, match=r"the diagonal of H goes from 0 to 0; .* not all inputs 0"):
        observed(torch.zeros(3, COLUMNS)).calibrate(WEIGHT)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(4, 9), "the inputs have 9 columns; those seen before have 8"),
        (
            torch.ones(4, 8, dtype=torch.int64),
            r"observe: the inputs are torch.int64 \[4, 8\]; \(tokens, columns\) of fl",
        ),
        (torch.ones(4, 0), r"observe: the inputs are torch.float32 \[4, 0\]"),
        (torch.full((4, 8), torch.nan), "the inputs hold NaN or infinity; leave that batch out"),
        (torch.full((4, 8), torch.inf), "the inputs hold NaN or infinity"),
    ],
)
def test_wrong_inputs_are_refused_and_not_counted(x: Tensor, message: str) -> None:
    calibrator = observed(torch.eye(8))
    with pytest.raises(QuantizationError, match=message):
        calibrator.observe(x)
    assert calibrator.count == 8
    assert torch.equal(calibrator.hessian, torch.eye(8))


def test_calibrators_of_other_layers_do_not_merge() -> None:
    with pytest.raises(QuantizationError, match="the inputs have 9 columns; those seen before have 8"):
        observed(torch.eye(8)).merge(observed(torch.eye(9)))


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(4, 9), "layer.w: has 9 columns a row; the inputs that were observed have 8"),
        (torch.ones(8), r"layer.w: is float32 \[8\]; \(out, in\) or more axes"),
        (torch.ones(4, 8, dtype=torch.int8), r"layer.w: is int8 \[4, 8\]"),
        (torch.ones(4, 8).index_fill(1, torch.tensor([3]), torch.nan), r"layer.w: the value at \[0, 3\] is nan"),
        (torch.ones(4, 8).index_fill(0, torch.tensor([2]), torch.inf), r"layer.w: the value at \[2, 0\] is inf"),
    ],
)
def test_a_weight_that_does_not_fit_is_named(weight: Tensor, message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        observed(torch.eye(8)).calibrate(weight, "layer.w")


# A real model


SENTENCES = """The committee postponed its decision until the auditors had finished their report.
Her grandmother kept a jar of buttons on the highest shelf of the pantry.
Tidal forces slow the rotation of a moon until one face always points at its planet.
Mix the flour with cold butter, add an egg, and let the dough rest for an hour.
The goalkeeper slipped, and the ball rolled slowly over the line.
Interest rates rose for the third time this year, and house prices fell.
A binary search halves the interval in each step.
The novel begins with a letter that was never meant to be read.
Rain had washed the chalk from the pavement by noon.
Antibodies bind to the spike protein and keep the virus from entering the cell.
The old ferry crosses the fjord twice a day except on Sundays.
He tuned the violin by ear and played the first bars of the sonata.
Please restart the server after the certificates have been renewed.
Wolves returned to the valley after an absence of ninety years.
The court ruled that the contract had been void from the beginning.
Solar panels lose about half a percent of their output every year.
My neighbour paints tiny landscapes on the backs of postage stamps.
The train to Vienna leaves from platform seven at a quarter past nine.
Children learn the grammar of their language without being taught its rules.
A sudden drop in pressure made the cabin windows fog.
Copper conducts heat far better than steel does.
The museum lent its only Vermeer to a gallery in Tokyo.
Farmers in the region switched from wheat to lavender.
She solved the crossword before the kettle had boiled.
The treaty was signed in a railway carriage in the forest.
Glaciers carry boulders over hundreds of kilometres.
Which of these two phones takes better pictures at night?
The patient was given a low dose of aspirin and sent home.
An octopus can change the colour and the texture of its skin.
Do not open the valve before the gauge reads zero.
The orchestra rehearsed the slow movement four times.
Archaeologists found a bronze mirror beneath the temple floor.
Shares of the airline fell by eight percent after the announcement.
The function returns the index of the first element that is larger.
He had forgotten where he parked the car.
Bees dance to tell each other where the flowers are.
The recipe asks for saffron, but turmeric will do.
Voters rejected the proposal by a narrow margin.
The bridge swayed in the wind and was closed to lorries.
A good dictionary gives the origin of every word.
The library stays open until midnight during the exams.
Volcanic ash made the sunsets unusually red that winter.
They adopted a greyhound that was afraid of stairs.
Each packet carries a checksum, so that errors are noticed.
The actress thanked her first teacher and left the stage.
Cheap imports ruined the town's last spinning mill.
What time does the pharmacy close on Saturdays?
The river changed its course after the flood.""".splitlines()
HELD_OUT = 8


@pytest.fixture(scope="module")
def minilm_layers(minilm: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Weight and inputs (sentences as tokens) of the first block's linear layers, by name."""
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    from transformers import AutoModel, AutoTokenizer  # noqa: PLC0415 - takes seconds

    model, tokenizer = AutoModel.from_pretrained(minilm), AutoTokenizer.from_pretrained(minilm)
    block = model.encoder.layer[0]
    layers = {
        "query": block.attention.self.query,
        "attention out": block.attention.output.dense,
        "up": block.intermediate.dense,
        "down": block.output.dense,
    }
    found: dict[str, list[Tensor]] = {name: [] for name in layers}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda _, x, name=name: found[name].append(x[0][0]))
    with torch.no_grad():
        for sentence in SENTENCES:
            model(**tokenizer(sentence, return_tensors="pt"))
    return {name: (layer.weight.detach(), found[name]) for name, layer in layers.items()}


def output_cosine(weight: Tensor, quantized: Tensor, x: Tensor) -> float:
    return float(torch.cosine_similarity(x @ weight.T, x @ quantized.T, dim=1).mean())


@pytest.mark.parametrize("name", ["query", "attention out", "up", "down"])
def test_two_bits_of_a_real_layer_on_texts_that_were_not_seen(minilm_layers: dict[str, Any], name: str) -> None:
    weight, texts = minilm_layers[name]
    seen, held_out = torch.cat(texts[:-HELD_OUT]), torch.cat(texts[-HELD_OUT:])
    ours = output_cosine(weight, calibrated(weight, seen), held_out)
    clip = output_cosine(weight, plain(weight, spec()), held_out)
    assert 1.0 - ours < 0.8 * (1.0 - clip)


def test_the_bench_finds_where_the_time_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "bench"))
    bench = importlib.import_module("gptq")
    weight, hessian = bench.layer(128, 256)
    parts = bench.where_it_goes(weight, hessian, LayerSpec(bits=2, group_size=64, method="clip", symmetric=False))
    assert parts.keys() == {"factor of H", "the rest", *bench.PARTS}
    assert all(parts[name] > 0.0 for name in ("grid fits", "column loops", "least-squares refits"))

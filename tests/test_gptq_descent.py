"""Sweeps after the column loop: codes and grids that no row loses by, on every grid, and what is kept of them."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from arrow_quant_v2.one_tensor import dequantize_tensor
from arrow_quant_v2.packed import Grid
from arrow_quant_v2.quantizers.affine import STRETCHES
from arrow_quant_v2.quantizers.gptq import GPTQCalibrator
from arrow_quant_v2.quantizers.gptq_core import SPAN, Ask, Work, calibrated_rows, row_scales_for
from arrow_quant_v2.quantizers.gptq_core import _best as best_of
from arrow_quant_v2.quantizers.gptq_descent import sweep
from arrow_quant_v2.quantizers.gptq_factor import Factor, factorize, spans

ROWS = 24
grids = st.sampled_from(["affine", "r2q", "row"])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moment(columns: int, seed: int = 1) -> Tensor:
    """H of inputs that go together."""
    x = normal(4 * columns, columns, seed=seed) @ normal(columns, columns, seed=seed + 1)
    return x.T @ x


def asked(grid: Grid, bits: Any, *, symmetric: bool = False, refits: int = 2, sweeps: int = 0) -> Ask:
    return Ask(grid=grid, bits=bits, symmetric=symmetric, stretches=STRETCHES[bits], refits=refits, sweeps=sweeps)


def settled(weight: Tensor, factor: Factor, ask: Ask) -> Work:
    """The rows as the column loop leaves them."""
    ordered = weight.index_select(1, factor.order)
    work = Work(ordered, factor, ask, row_scales_for(weight, factor, ask))
    for span in spans(factor.groups, SPAN):
        for group in span:
            block = work.updated(group, span[0].start)
            work.settle(group, best_of(block, group, factor, work.row_scales, ask))
        work.feed(span[0].start, span[-1].stop)
    return work


def lost(work: Work, weight: Tensor) -> Tensor:
    """||(W - Q) R||^2 of each row, float64."""
    left = weight[:, work.factor.order].double() - work.values.double()
    return (left @ work.factor.root.double()).square().sum(dim=1)


@settings(deadline=None, max_examples=40)
@given(
    grid=grids,
    bits=st.sampled_from([2, 4, 8]),
    symmetric=st.booleans(),
    columns=st.integers(8, 150),
    refits=st.integers(0, 1),
    seed=st.integers(0, 99),
)
def test_no_row_loses_more_by_a_sweep(
    *, grid: Grid, bits: Any, symmetric: bool, columns: int, refits: int, seed: int
) -> None:
    weight, group = normal(ROWS, columns, seed=seed), None if grid == "row" else 40
    factor = factorize(moment(columns, seed), group)
    work = settled(weight, factor, asked(grid, bits, symmetric=symmetric, refits=refits))
    for _ in range(3):
        before = lost(work, weight)
        sweep(work)
        assert (lost(work, weight) <= before * (1.0 + 1e-5) + 1e-9).all()


@pytest.mark.parametrize("grid", ["affine", "r2q", "row"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_what_a_sweep_keeps_of_the_rows_stays_true(grid: Grid, bits: Any) -> None:
    """E is (W - Q) R, left is W - Q, and values are what the codes mean on the grids."""
    weight, factor = normal(ROWS, 150), factorize(moment(150), None if grid == "row" else 64)
    ordered = weight[:, factor.order]
    work = settled(weight, factor, asked(grid, bits))
    for _ in range(2):
        sweep(work)
        assert torch.allclose(work.left, ordered - work.values, atol=1e-5)
        errors = (ordered - work.values).double() @ factor.root.double()
        assert torch.allclose(work.errors.double(), errors, atol=1e-4 * float(ordered.norm()))
        for group in factor.groups:
            here = slice(group.start, group.stop)
            assert torch.equal(work.grids[group.index].values(work.codes[:, here], bits), work.values[:, here])


def test_without_refits_a_sweep_is_plain_coordinate_descent() -> None:
    """In float64, column by column, with nothing but H and the levels of each group."""
    weight, factor = normal(ROWS, 96), factorize(moment(96), 32)
    work = settled(weight, factor, asked("affine", 2, refits=0))
    ordered, hessian = weight[:, factor.order].double(), (factor.root.double() @ factor.root.double().T)
    expected = work.values.double().clone()
    for group in factor.groups:
        codes = torch.arange(4, dtype=torch.uint8).repeat(ROWS, 1)
        levels = work.grids[group.index].values(codes, 2).double()  # (rows, 4)
        for t in range(group.start, group.stop):
            pull = ((ordered - expected) * hessian[t]).sum(dim=1)
            aim = expected[:, t] + pull / hessian[t, t]
            nearest = (aim[:, None] - levels).abs().argmin(dim=1, keepdim=True)
            expected[:, t] = levels.gather(1, nearest)[:, 0]
    before = work.values.double()
    sweep(work)
    moved = expected != before
    assert 0.01 < moved.float().mean() < 0.3
    assert (work.values.double() != expected).float().mean() < 0.005  # ties rounded otherwise, and followers


@pytest.mark.parametrize(("grid", "bits", "most"), [("affine", 2, 0.9), ("r2q", 2, 0.9), ("affine", 4, 0.95)])
def test_sweeps_are_worth_it_on_inputs_that_were_not_seen(grid: Grid, bits: Any, most: float) -> None:
    weight, mixing = normal(64, 256), normal(256, 256, seed=2)
    seen, held_out = normal(4096, 256, seed=3) @ mixing, normal(4096, 256, seed=4) @ mixing
    factor = factorize(seen.T @ seen, 64)

    def error(sweeps: int) -> float:
        values = calibrated_rows(weight, factor, asked(grid, bits, sweeps=sweeps)).values
        left = weight - values[:, factor.order.argsort()]
        return float((held_out @ left.T).square().sum() / (held_out @ weight.T).square().sum())

    errors = [error(sweeps) for sweeps in (0, 1, 3)]
    assert errors[2] < errors[1] < errors[0]
    assert errors[2] < most * errors[0]


def test_a_column_that_no_input_reaches_stays_as_near_to_zero_as_its_grid_allows() -> None:
    x = normal(400, 64)
    x[:, 5] = 0.0
    calibrator = GPTQCalibrator(bits=4, group_size=32, sweeps=3)
    calibrator.observe(x)
    assert bool(calibrator.factor.dead[5])
    weight = normal(8, 64)
    scale = calibrator.quantization_parameters(weight).scale[:, 0]
    assert (dequantize_tensor(calibrator.calibrate(weight))[:, 5].abs() <= 0.51 * scale).all()


def test_a_weight_of_zeros_stays_one() -> None:
    weight, factor = torch.zeros(3, 64), factorize(moment(64), 32)
    for grid in ("affine", "r2q"):
        found = calibrated_rows(weight, factor, replace(asked("affine", 2), grid=grid, sweeps=2))
        assert not found.values.any()

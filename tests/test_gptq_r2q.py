"""GPTQ on the residual grid: what it is worth, what is stored, and the same bytes from any number of threads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import normal

from arrow_quant_v2.config import LayerSpec
from arrow_quant_v2.engines.one_core import each_on_one_core
from arrow_quant_v2.kernels import cpu, ops
from arrow_quant_v2.kernels.cpu import threads_per_call
from arrow_quant_v2.kernels.reference import Residual, residual_level
from arrow_quant_v2.kernels.tensors import dequantized
from arrow_quant_v2.one_tensor import quantize_tensor
from arrow_quant_v2.packed import Layout, PackedTensor
from arrow_quant_v2.quantizers.affine import STRETCHES
from arrow_quant_v2.quantizers.gptq import SWEEPS, gptq
from arrow_quant_v2.quantizers.gptq_core import Ask, Choice, _better, calibrated_rows
from arrow_quant_v2.quantizers.gptq_factor import factorize
from arrow_quant_v2.quantizers.gptq_r2q import ResidualGrid
from arrow_quant_v2.quantizers.whitened import Whitened

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from arrow_quant_v2.quantizers.result import QuantizedRows

cpu.activate()
COLUMNS = 256
WEIGHT = normal(96, COLUMNS, seed=3)


def inputs(tokens: int, columns: int = COLUMNS, seed: int = 0) -> Tensor:
    """Correlated, and some channels are 15 times as large as the others."""
    layer, random = torch.Generator().manual_seed(99), torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=layer) / columns**0.5
    channels = torch.ones(columns)
    channels[torch.randperm(columns, generator=layer)[: columns // 64 + 1]] = 15.0
    noise = torch.randn(2, tokens, columns, generator=random)
    return (noise[0] @ mixing + 0.3 * noise[1]) * channels


def moment(tokens: int = 1024, columns: int = COLUMNS, seed: int = 0) -> Tensor:
    x = inputs(tokens, columns, seed)
    return x.T @ x


def spec(bits: Any = 2, group_size: int | None = 64, *, symmetric: bool = False, method: Any = "r2q") -> LayerSpec:
    return LayerSpec(bits=bits, group_size=group_size, method=method, symmetric=symmetric)


def packed(rows: QuantizedRows, asked: LayerSpec, columns: int) -> PackedTensor:
    shape = (len(rows.codes), columns)
    layout = Layout(shape=shape, bits=asked.bits, quant_axis=1, group_size=asked.group_size, grid=asked.grid)
    return PackedTensor(
        name="w",
        dtype="float32",
        layout=layout,
        codes=rows.codes,
        scales=rows.scales,
        zero_points=rows.zero_points,
        row_scales=rows.row_scales,
    )


def fitted(weight: Tensor, asked: LayerSpec, hessian: Tensor, **settings: Any) -> Tensor:
    return dequantized(packed(gptq(weight, asked, hessian, **settings), asked, weight.shape[1]))


def alone(weight: Tensor, asked: LayerSpec) -> Tensor:
    return dequantized(quantize_tensor(weight, "w", asked, "group"))


def output_error(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    """tr(dW H dW^T) / tr(W H W^T)."""
    w, d, h = weight.double(), (weight - quantized).double(), hessian.double()
    return float(((d @ h) * d).sum() / ((w @ h) * w).sum())


# What it is worth


@pytest.mark.parametrize(
    ("bits", "symmetric", "nearest", "alone_", "affine", "ours"),
    [
        (2, False, 0.227, 0.109, 0.017, 0.01614),
        (2, True, 0.544, 0.120, 0.0541, 0.0203),
        (4, False, 8.24e-3, 7.17e-3, 1.135e-3, 1.058e-3),
        (4, True, 12.0e-3, 9.13e-3, 2.14e-3, 1.39e-3),
        (8, False, 3.22e-5, 3.20e-5, 1.254e-5, 1.448e-5),  # a2 has 22 codes alone: the affine grid is finer
        (8, True, 4.04e-5, 3.75e-5, 1.35e-5, 1.92e-5),
    ],
)
def test_output_error_on_inputs_that_were_not_seen(
    *, bits: int, symmetric: bool, nearest: float, alone_: float, affine: float, ours: float
) -> None:
    held_out = moment(seed=1)
    found = [
        output_error(WEIGHT, quantized, held_out)
        for quantized in (
            alone(WEIGHT, spec(bits, symmetric=symmetric, method="rtn")),
            alone(WEIGHT, spec(bits, symmetric=symmetric)),
            fitted(WEIGHT, spec(bits, symmetric=symmetric, method="clip"), moment()),
            fitted(WEIGHT, spec(bits, symmetric=symmetric), moment()),
        )
    ]
    assert found == pytest.approx([nearest, alone_, affine, ours], rel=0.03)
    assert ours < min(alone_, nearest)


def test_where_all_columns_matter_alike_it_is_hardly_worse_than_r2q_alone() -> None:
    for bits in (2, 4):
        ours, plain = fitted(WEIGHT, spec(bits), torch.eye(COLUMNS)), alone(WEIGHT, spec(bits))
        assert float((WEIGHT - ours).square().sum()) <= 1.02 * float((WEIGHT - plain).square().sum())


# Refits


@settings(deadline=None, max_examples=15)
@given(
    bits=st.sampled_from([2, 4, 8]),
    symmetric=st.booleans(),
    columns=st.integers(2, 80),
    refits=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_refits_never_cost_a_row_more(bits: int, symmetric: bool, columns: int, refits: int, seed: int) -> None:
    """With one group a row, what a refit compares is the whole damped error of that row."""
    weight, factor = normal(9, columns, seed=seed), factorize(moment(columns + 5, columns, seed), None)
    root = factor.root.double()

    def cost(refits: int) -> Tensor:
        ask = Ask(grid="r2q", bits=bits, symmetric=symmetric, stretches=STRETCHES[bits], refits=refits, sweeps=0)
        values = calibrated_rows(weight, factor, ask).values
        left = (weight[:, factor.order].masked_fill(factor.dead[factor.order], 0.0) - values).double()
        return (left @ root).square().sum(dim=1)

    assert (cost(refits) <= cost(0) * (1.0 + 1e-4) + 1e-12).all()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4])
def test_a_refit_of_given_codes_is_the_least_squares_solution(bits: int, symmetric: bool) -> None:
    """Against float64 least squares in the whitened space, for codes on a grid that is there and some noise."""
    m = 2 ** (bits - 1) - 1
    codes = torch.randint(0, 2**bits, (6, 40), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    root = torch.linalg.cholesky(moment(90, 40).double() / 1000).mT.contiguous().float()
    there = Residual(*(torch.full((6, 1), value) for value in (0.0 if symmetric else 0.02, 0.11 * (m + 1), 0.1)))
    block = residual_level(codes, there, bits) + 0.02 * normal(6, 40)
    ask = Ask(grid="r2q", bits=bits, symmetric=symmetric, stretches=STRETCHES[bits], refits=1, sweeps=0)
    row_scales = torch.full((6,), 0.2 * (m + 1), dtype=torch.bfloat16)
    found = ResidualGrid.refitted(codes, Whitened(block @ root, root), row_scales, ask).grid
    low = (codes & m).double()
    for row in range(6):
        parts = [torch.ones(40).double(), torch.where(codes[row] > m, 1.0, -1.0).double(), 2.0 * low[row] - m]
        design = torch.stack(parts[symmetric:], dim=1)
        best = torch.linalg.lstsq(root.double().T @ design, root.double().T @ block[row].double()).solution
        ours = torch.stack([part[row, 0] for part in found]).double()[symmetric:]
        steps = torch.tensor([0.02, 0.03, 0.03])[symmetric:] * (m + 1)  # what 8 bits can tell apart, and more
        assert ((ours - best).abs() < steps * 0.2).all(), (ours, best)


def test_more_refits_help() -> None:
    errors = [output_error(WEIGHT, fitted(WEIGHT, spec(), moment(), refits=n), moment()) for n in (0, 1, 3)]
    assert errors[1] < 0.99 * errors[0]
    assert errors[2] < errors[0]


def test_the_cheaper_choice_is_taken_row_by_row() -> None:
    def choice(value: int, costs: list[float]) -> Choice:
        scales = torch.full((3, 2), value, dtype=torch.uint8)
        own = torch.full((3, 1), float(value))
        grid = ResidualGrid(scales=scales, zero_points=scales[:, :1], grid=Residual(own, own, own))
        return Choice(grid=grid, codes=scales, errors=scales.float(), cost=torch.tensor(costs)[:, None])

    found = _better(choice(1, [1.0, 2.0, torch.nan]), choice(2, [1.0, 1.0, 1.0]))
    assert found.codes[:, 0].tolist() == found.grid.scales[:, 0].tolist() == [1, 2, 1]
    assert found.grid.grid.a2[:, 0].tolist() == found.grid.zero_points[:, 0].tolist() == [1, 2, 1]
    assert found.cost[:2, 0].tolist() == [1.0, 1.0]


# What is stored


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("group_size", [8, 40, 64, None])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_what_is_stored_means_what_was_chosen(rows: int, group_size: int | None, symmetric: bool, bits: Any) -> None:
    """Ragged tails (150 columns), one row, one group a row: dequantize gives Q, in the columns' own order."""
    weight, factor = normal(rows, 150), factorize(moment(400, 150), group_size or 150)
    asked = spec(bits, group_size, symmetric=symmetric)
    result = gptq(weight, asked, factor)
    ask = Ask(grid="r2q", bits=bits, symmetric=symmetric, stretches=STRETCHES[bits], refits=2, sweeps=SWEEPS)
    chosen = calibrated_rows(weight, factor, ask).values
    stored = packed(result, asked, 150)
    assert torch.equal(dequantized(stored)[:, factor.order], chosen)
    assert result.scales.shape == (rows, 2 * stored.layout.groups)
    assert (result.zero_points is None) == symmetric
    quantized = dequantized(stored)
    exact = torch.stack([part.double().square().sum(dim=1) for part in (weight, quantized, weight - quantized)], dim=1)
    torch.testing.assert_close(torch.from_numpy(result.sums), exact, rtol=1e-5, atol=1e-12)


def test_codes_stand_for_levels_in_ascending_order() -> None:
    result = gptq(WEIGHT, spec(4), moment())
    codes = ops.unpack(torch.from_numpy(result.codes), 4, COLUMNS)[:, :64]
    values = dequantized(packed(result, spec(4), COLUMNS))[:, :64]
    for row in range(len(WEIGHT)):
        order = codes[row].argsort(stable=True)
        assert (values[row, order].diff() >= 0).all()
    assert len(codes.unique()) == 16


# Inputs and weights that leave something open


def test_dead_columns_change_nothing_else() -> None:
    x, weight = inputs(900), WEIGHT.clone()
    x[:, 64:128] = 0.0  # a whole group
    x[:, 5:60:7] = 0.0
    hessian, dead = x.T @ x, ~x.any(dim=0)
    before = gptq(weight, spec(), hessian)
    weight[:, dead] = 1e6
    after = gptq(weight, spec(), hessian)
    assert before.codes.tobytes() == after.codes.tobytes()
    assert before.scales.tobytes() == after.scales.tobytes()
    restored = dequantized(packed(before, spec(), COLUMNS))
    assert not restored[:, 64:128].any()
    assert output_error(WEIGHT, restored, hessian) < 0.05
    assert float(after.sums[:, 2].min()) > 1e12  # the error of the weights says what was lost


@settings(deadline=None, max_examples=25)
@given(
    rows=st.integers(1, 12),
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
    weight = normal(rows, columns) * 10.0**magnitude
    asked = spec(bits, group_size, symmetric=symmetric)
    restored = fitted(weight, asked, moment(tokens, columns))
    assert restored.isfinite().all()
    assert float((restored - weight).abs().max()) <= 20 * float(weight.abs().max())


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("value", [0.0, 0.25, -3.0])
def test_constant_rows_are_hit(bits: int, value: float) -> None:
    weight = torch.full((3, 128), value)
    restored = fitted(weight, spec(bits), moment(columns=128))
    assert float((restored - weight).abs().max()) <= 0.02 * abs(value)


def test_weights_that_are_not_finite_show_in_the_sums() -> None:
    weight = WEIGHT.clone()
    weight[3, 7] = torch.nan
    weight[90, 0] = torch.inf
    sums = gptq(weight, spec(), moment()).sums
    assert (~torch.from_numpy(sums).isfinite().all(dim=1)).nonzero()[:, 0].tolist() == [3, 90]


# The same bytes


@pytest.fixture
def _threads() -> Iterator[None]:
    before = threads_per_call.get()
    yield
    threads_per_call.set(before)


@pytest.mark.usefixtures("_threads")
def test_any_number_of_threads_gives_the_same_bytes() -> None:
    """More rows than one core takes at once, and more columns than one tile of H or one span has."""
    weight, hessian = normal(1100, 200), moment(500, 200)
    wide, broad = normal(40, 1100), moment(300, 1100)
    found = []
    for threads in (1, 2, 5):
        threads_per_call.set(threads)
        both = gptq(weight, spec(), hessian), gptq(wide, spec(4, 128), broad)
        found.append([(one.codes.tobytes(), one.scales.tobytes(), one.row_scales.tobytes()) for one in both])
    assert found[0] == found[1] == found[2]


@pytest.mark.usefixtures("_threads")
def test_weights_fitted_at_the_same_time_do_not_mix() -> None:
    threads_per_call.set(2)
    factor, weights = factorize(moment(), 64), [normal(40, COLUMNS, seed=seed) for seed in range(6)]
    together = each_on_one_core(lambda weight: gptq(weight, spec(), factor), weights)
    threads_per_call.set(1)
    for one, weight in zip(together, weights, strict=True):
        assert one.codes.tobytes() == gptq(weight, spec(), factor).codes.tobytes()

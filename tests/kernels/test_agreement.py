"""Every kernel gives the bits of the reference: on any instruction set, with any number of threads, for any input."""

import ctypes
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import (
    STRETCHES,
    columns_case,
    descent_case,
    gaussian,
    group_sizes,
    residual_columns_case,
    residual_fit_case,
    weights,
    widths,
)
from torch import Tensor

from arrow_quant_v2.kernels import cpu, ops, reference
from arrow_quant_v2.kernels.residual_fit import fit_residual
from arrow_quant_v2.packed import ROTATIONS, WIDTHS

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [  # (rows, columns, group size): lanes of 16, blocks of 512, ragged tails, one group
    (1, 1, 8),
    (3, 7, 64),
    (5, 64, 64),
    (4, 100, 24),
    (3, 136, 8),
    (2, 200, 64),
    (2, 1030, 1030),
    (2, 1200, 520),
    (33, 2048, 128),
]
ALL_HALVES = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
HALVES = (torch.bfloat16, torch.float16)

each_isa = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def same(found: Any, expected: Any) -> bool:
    """Equal dtypes, shapes and values of all tensors; NaN is equal to NaN."""
    pairs = list(zip(found, expected, strict=True))
    return all(f.dtype == e.dtype and torch.equal(f.isnan(), e.isnan()) for f, e in pairs) and all(
        torch.equal(f.nan_to_num(), e.nan_to_num()) for f, e in pairs
    )


def importances(columns: int) -> tuple[Tensor | None, Tensor]:
    spread = torch.rand(columns, generator=torch.Generator().manual_seed(7)) ** 4
    spread[::5] = 0.0
    return None, spread


def quantize_cases(columns: int) -> Iterator[tuple[bool, tuple[float, ...], Tensor | None]]:
    for symmetric in (False, True):
        yield symmetric, (), None
        for importance in importances(columns):
            yield symmetric, STRETCHES, importance


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("isa")
def test_quantize_and_dequantize_are_the_references(shape: tuple[int, int, int], bits: int) -> None:
    rows, columns, group_size = shape
    for dtype, (symmetric, stretches, importance) in product(FLOATS, quantize_cases(columns)):
        weight = gaussian(rows, columns, seed=bits).to(dtype)
        found = ops.quantize(weight, bits, group_size, symmetric, stretches, importance)
        expected = reference.quantize(weight, bits, group_size, symmetric, stretches, importance)
        assert same(found, expected), (dtype, symmetric, stretches, importance is not None)
        stored = (*found[:4], bits, columns, group_size, dtype)
        assert same([ops.dequantize(*stored)], [reference.dequantize(*stored)]), (dtype, symmetric)


@pytest.mark.usefixtures("isa")
@each_isa
@given(
    weight=weights(),
    bits=widths,
    group_size=group_sizes,
    symmetric=st.booleans(),
    stretches=st.sampled_from([(), (1.0,), STRETCHES]),
    dtype=st.sampled_from(FLOATS),
    weighted=st.booleans(),
)
def test_quantize_is_the_references_for_any_weight(
    *,
    weight: Tensor,
    bits: int,
    group_size: int,
    symmetric: bool,
    stretches: tuple[float, ...],
    dtype: torch.dtype,
    weighted: bool,
) -> None:
    narrow = weight.to(dtype).nan_to_num()
    importance = importances(weight.shape[1])[weighted]
    found = ops.quantize(narrow, bits, group_size, symmetric, stretches, importance)
    assert same(found, reference.quantize(narrow, bits, group_size, symmetric, stretches, importance))


def parts(fit: reference.Fit) -> tuple[Tensor, ...]:
    return fit.step, fit.full, fit.mean_q, fit.mean_w


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("isa")
def test_fit_grid_is_the_references(shape: tuple[int, int, int], bits: int) -> None:
    rows, columns, group_size = shape
    for dtype, (symmetric, stretches, importance) in product(FLOATS, quantize_cases(columns)):
        asked = (gaussian(rows, columns, seed=bits).to(dtype), bits, group_size, symmetric, stretches, importance)
        assert same(ops.fit_grid(*asked), parts(reference.fit_grid(*asked))), (dtype, symmetric, stretches)


@pytest.mark.usefixtures("isa")
@each_isa
@given(
    weight=weights(),
    bits=widths,
    group_size=group_sizes,
    symmetric=st.booleans(),
    stretches=st.sampled_from([(), (1.0,), STRETCHES]),
    weighted=st.booleans(),
)
def test_fit_grid_is_the_references_for_any_weight(
    *, weight: Tensor, bits: int, group_size: int, symmetric: bool, stretches: tuple[float, ...], weighted: bool
) -> None:
    importance = importances(weight.shape[1])[weighted]
    asked = (weight, bits, group_size, symmetric, stretches, importance)
    assert same(ops.fit_grid(*asked), parts(reference.fit_grid(*asked)))


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", [(0, 9), (1, 1), (1, 64), (15, 24), (16, 8), (33, 100), (700, 129)], ids=str)
@pytest.mark.usefixtures("isa")
def test_quantize_columns_is_the_references(shape: tuple[int, int], bits: int) -> None:
    case = columns_case(*shape, seed=bits)
    assert same(ops.quantize_columns(*case, bits), reference.quantize_columns(*case, bits))


@pytest.mark.usefixtures("isa")
@each_isa
@given(weight=weights(most_rows=20, most_columns=40), bits=widths, seed=st.integers(0, 99))
def test_quantize_columns_is_the_references_for_any_weight(weight: Tensor, bits: int, seed: int) -> None:
    case = (weight, *columns_case(*weight.shape, seed=seed)[1:])  # errors that grow past float32 become NaN in both
    assert same(ops.quantize_columns(*case, bits), reference.quantize_columns(*case, bits))


@pytest.mark.usefixtures("isa")
@each_isa
@given(
    bits=widths,
    rows=st.integers(0, 5),
    columns=st.integers(1, 90),
    group_size=group_sizes,
    symmetric=st.booleans(),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 99),
)
def test_dequantize_is_the_references_for_any_parameters(
    *, bits: int, rows: int, columns: int, group_size: int, symmetric: bool, dtype: torch.dtype, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    groups = -(-columns // group_size)

    def some_bytes(width: int) -> Tensor:
        return torch.randint(256, (rows, width), dtype=torch.uint8, generator=random)

    codes, scales = some_bytes(reference.row_bytes(columns, bits)), some_bytes(groups)
    row_scales = torch.randn(rows, generator=random).bfloat16()
    stored = (codes, scales, some_bytes(0 if symmetric else groups), row_scales, bits, columns, group_size, dtype)
    assert same([ops.dequantize(*stored)], [reference.dequantize(*stored)])


# The residual grid and the turn


@pytest.mark.usefixtures("isa")
@each_isa
@given(
    bits=widths,
    rows=st.integers(0, 5),
    columns=st.integers(1, 90),
    group_size=group_sizes,
    symmetric=st.booleans(),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 99),
)
def test_dequantize_r2q_is_the_references_for_any_parameters(
    *, bits: int, rows: int, columns: int, group_size: int, symmetric: bool, dtype: torch.dtype, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    groups = -(-columns // group_size)

    def some_bytes(width: int) -> Tensor:
        return torch.randint(256, (rows, width), dtype=torch.uint8, generator=random)

    codes, scales = some_bytes(reference.row_bytes(columns, bits)), some_bytes(2 * groups)
    row_scales = torch.randn(rows, generator=random).bfloat16()
    stored = (codes, scales, some_bytes(0 if symmetric else groups), row_scales, bits, columns, group_size, dtype)
    assert same([ops.dequantize_r2q(*stored)], [reference.dequantize_r2q(*stored)])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.usefixtures("isa")
def test_every_row_scale_and_every_zero_point_is_read_on_the_residual_grid(dtype: torch.dtype) -> None:
    row_scales = ALL_HALVES.view(torch.bfloat16)  # NaN and infinity too
    rows = row_scales.numel()
    codes = torch.arange(256, dtype=torch.uint8).reshape(1, -1).repeat(rows, 1)[:, ::5]
    scales = torch.tensor([[255, 22]], dtype=torch.uint8).repeat(rows, 1)
    zero_points = torch.arange(rows).remainder(256).to(torch.uint8)[:, None]
    stored = (codes, scales, zero_points, row_scales, 8, codes.shape[1], 64, dtype)
    assert same([ops.dequantize_r2q(*stored)], [reference.dequantize_r2q(*stored)])


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", [(0, 9), (1, 1), (1, 64), (15, 24), (16, 8), (33, 100), (700, 129)], ids=str)
@pytest.mark.usefixtures("isa")
def test_quantize_columns_r2q_is_the_references(shape: tuple[int, int], bits: int) -> None:
    case = residual_columns_case(*shape, bits, seed=bits)
    assert same(ops.quantize_columns_r2q(*case, bits), reference.quantize_columns_r2q(*case, bits))


@pytest.mark.usefixtures("isa")
@each_isa
@given(weight=weights(most_rows=20, most_columns=40), bits=widths, seed=st.integers(0, 99))
def test_quantize_columns_r2q_is_the_references_for_any_weight(weight: Tensor, bits: int, seed: int) -> None:
    case = (weight, *residual_columns_case(*weight.shape, bits, seed=seed)[1:])
    assert same(ops.quantize_columns_r2q(*case, bits), reference.quantize_columns_r2q(*case, bits))


def descended_by_the_reference(case: tuple[Tensor, ...], bits: int) -> Tensor:
    codes, pull, gram, mu, a1, a2, inverse = case
    return reference.descend_columns(codes, pull, gram, reference.Residual(mu=mu, a1=a1, a2=a2), inverse, bits)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", [(0, 9), (1, 1), (1, 64), (15, 24), (16, 8), (33, 100), (700, 129)], ids=str)
@pytest.mark.usefixtures("isa")
def test_descend_columns_is_the_references(shape: tuple[int, int], bits: int) -> None:
    case = descent_case(*shape, bits, seed=bits)
    assert same([ops.descend_columns(*case, bits)], [descended_by_the_reference(case, bits)])


@pytest.mark.usefixtures("isa")
@each_isa
@given(pull=weights(most_rows=20, most_columns=40), bits=widths, seed=st.integers(0, 99))
def test_descend_columns_is_the_references_for_any_pull(pull: Tensor, bits: int, seed: int) -> None:
    codes, _, *others = descent_case(*pull.shape, bits, seed=seed)
    case = (codes, pull, *others)
    assert same([ops.descend_columns(*case, bits)], [descended_by_the_reference(case, bits)])


def fitted_by_the_reference(case: tuple[Tensor, ...], bits: int, rounds: int, *, symmetric: bool) -> list[Tensor]:
    weights, importance, *grids = case
    found = fit_residual(weights, importance, reference.Residual(*grids), bits, rounds, symmetric=symmetric)
    return list(found)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (2, 16), (3, 17), (64, 33), (129, 15), (513, 4)], ids=str)
@pytest.mark.usefixtures("isa")
def test_fit_residual_is_the_references(shape: tuple[int, int], symmetric: bool, bits: int) -> None:
    for starts, weighed in product((1, 3), (True, False)):
        weights, importance, *grids = residual_fit_case(*shape, bits, starts, seed=bits, symmetric=symmetric)
        grids[2][:, 1:2] = 2e-39  # of which float32 has no inverse
        grids[2][:, 2:3], grids[1][:, 2:3] = 1e36, 2e38
        case = (weights, importance if weighed else None, *grids)
        expected = fitted_by_the_reference(case, bits, 8, symmetric=symmetric)
        assert same(ops.fit_residual(*case, bits, symmetric, 8), expected)


@pytest.mark.usefixtures("isa")
@each_isa
@given(weight=weights(most_rows=20, most_columns=40), bits=widths, seed=st.integers(0, 99), symmetric=st.booleans())
def test_fit_residual_is_the_references_for_any_weight(weight: Tensor, bits: int, seed: int, symmetric: bool) -> None:
    case = (weight, *residual_fit_case(*weight.shape, bits, 2, seed, symmetric=symmetric)[1:])
    expected = fitted_by_the_reference(case, bits, 4, symmetric=symmetric)
    assert same(ops.fit_residual(*case, bits, symmetric, 4), expected)


@pytest.mark.parametrize("block", ROTATIONS)
@pytest.mark.parametrize("shape", [(0, 1), (1,), (3, 2), (2, 5, 3), (700, 1)], ids=str)
@pytest.mark.usefixtures("isa")
def test_hadamard_is_the_references(shape: tuple[int, ...], block: int) -> None:
    x = torch.randn(*shape[:-1], shape[-1] * block, generator=torch.Generator().manual_seed(block))
    assert same([ops.hadamard(x, block)], [reference.hadamard(x, block)])


@pytest.mark.usefixtures("isa")
@each_isa
@given(block=st.sampled_from(ROTATIONS), weight=weights(most_columns=300))
def test_hadamard_is_the_references_for_any_numbers(block: int, weight: Tensor) -> None:
    x = torch.nn.functional.pad(weight, (0, -weight.shape[1] % block))
    assert same([ops.hadamard(x, block)], [reference.hadamard(x, block)])


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", [(0, 9), (1, 1), (3, 13), (2, 64), (700, 129)], ids=str)
@pytest.mark.usefixtures("isa")
def test_pack_and_unpack_are_the_references(shape: tuple[int, int], bits: int) -> None:
    codes = torch.randint(2**bits, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    packed = ops.pack(codes, bits)
    assert same([packed], [reference.pack(codes, bits)])
    assert same([ops.unpack(packed, bits, shape[1])], [codes])


# Sixteen bits


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.usefixtures("isa")
def test_every_finite_half_is_read_as_torch_reads_it(dtype: torch.dtype, bits: int) -> None:
    weight = ALL_HALVES.view(dtype).reshape(-1, 64).nan_to_num()
    weight = torch.where(weight.float().abs() > 1e38, 0.0, weight)
    for shuffled in (weight, weight.t().reshape(-1, 64)):  # alike magnitudes in a row, and all of them
        found = ops.quantize(shuffled, bits, 32, False, ())
        assert same(found, ops.quantize(shuffled.float(), bits, 32, False, ()))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.usefixtures("isa")
def test_every_row_scale_is_read_and_every_half_is_written_as_torch_does(dtype: torch.dtype) -> None:
    row_scales = ALL_HALVES.view(torch.bfloat16)  # NaN and infinity too
    rows = row_scales.numel()
    codes = torch.tensor([0, 1, 127, 128, 129, 137, 200, 255, 151], dtype=torch.uint8).repeat(rows, 1)
    scales = torch.tensor([[255, 173]], dtype=torch.uint8).repeat(rows, 1)
    stored = (codes, scales, torch.empty(rows, 0, dtype=torch.uint8), row_scales, 8, 9, 8, dtype)
    found = ops.dequantize(*stored)
    assert same([found], [reference.dequantize(*stored)])
    assert same([found[:, 4].bfloat16()], [row_scales]) or dtype == torch.float16


@pytest.mark.usefixtures("isa")
def test_every_float16_can_be_written() -> None:
    """A row scale of 8 bits times a code and a scale of 8 bits each reach all 11 bits of a float16."""
    exponents = torch.arange(-26, 17)
    row_scales = (2.0 ** exponents[:, None] * (1 + torch.arange(128) / 128)).flatten().bfloat16()
    codes = torch.arange(256, dtype=torch.uint8).repeat(row_scales.numel(), 2)
    scales = torch.tensor([[255, 211]], dtype=torch.uint8).repeat(row_scales.numel(), 1)
    stored = (codes, scales, torch.empty(row_scales.numel(), 0, dtype=torch.uint8), row_scales, 8, 512, 256)
    found = ops.dequantize(*stored, torch.float16)
    assert same([found], [ops.dequantize(*stored, torch.float32).to(torch.float16)])
    assert found.view(torch.int16).unique().numel() == 2 * (0x7C00 + 1)  # zeros, finite ones, infinities


# Threads and strides


@pytest.mark.usefixtures("library", "torch_threads")
@pytest.mark.parametrize("stretches", [(), STRETCHES])
def test_results_do_not_depend_on_the_number_of_threads(stretches: tuple[float, ...]) -> None:
    weight = gaussian(101, 4096)
    torch.set_num_threads(1)
    alone = ops.quantize(weight, 2, 64, False, stretches)
    restored = ops.dequantize(*alone[:4], 2, 4096, 64, torch.bfloat16)
    for threads in (2, 5, 64):
        torch.set_num_threads(threads)
        found = ops.quantize(weight, 2, 64, False, stretches)
        assert same(found, alone)
        assert same([ops.dequantize(*found[:4], 2, 4096, 64, torch.bfloat16)], [restored])


@pytest.mark.usefixtures("library", "torch_threads")
def test_columns_do_not_depend_on_the_number_of_threads() -> None:
    case, weight = columns_case(2000, 72), gaussian(2000, 72)
    torch.set_num_threads(1)
    alone = (*ops.quantize_columns(*case, 2), *ops.fit_grid(weight, 2, 72, False, STRETCHES))
    for threads in (2, 5, 64):
        torch.set_num_threads(threads)
        assert same((*ops.quantize_columns(*case, 2), *ops.fit_grid(weight, 2, 72, False, STRETCHES)), alone)


@pytest.mark.usefixtures("library", "torch_threads")
def test_the_residual_grid_and_the_turn_do_not_depend_on_the_number_of_threads() -> None:
    case, weight = residual_columns_case(2000, 72, 4), gaussian(101, 4096)
    packed, scales = torch.randint(256, (2, 1024, 512), dtype=torch.uint8).unbind()
    stored = (packed, scales[:, :64], scales[:, :32], gaussian(1024, 1)[:, 0].bfloat16(), 2, 2048, 64, torch.bfloat16)
    torch.set_num_threads(1)
    descent, groups = descent_case(2000, 72, 4), residual_fit_case(72, 2000, 4)

    def found() -> tuple[Tensor, ...]:
        columns, moved = ops.quantize_columns_r2q(*case, 4), ops.descend_columns(*descent, 4)
        fitted = ops.fit_residual(*groups, 4, False, 8)
        return (*columns, moved, *fitted, ops.hadamard(weight, 128), ops.dequantize_r2q(*stored))

    alone = found()
    for threads in (2, 5, 64):
        torch.set_num_threads(threads)
        assert same(found(), alone)


@pytest.mark.usefixtures("library")
def test_a_worker_that_shares_the_cores_says_how_many_threads_it_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert cpu._threads() == 7
    token = cpu.threads_per_call.set(1)
    try:
        assert cpu._threads() == 1
        alone = ops.quantize(gaussian(101, 4096), 4, 128, True, ())
    finally:
        cpu.threads_per_call.reset(token)
    assert same(ops.quantize(gaussian(101, 4096), 4, 128, True, ()), alone)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("bits", WIDTHS)
def test_strides_do_not_matter(bits: int) -> None:
    weight, spread = gaussian(96, 60).t(), torch.rand(192)[::2]
    found = ops.quantize(weight, bits, 32, False, STRETCHES, spread)
    expected = ops.quantize(weight.contiguous(), bits, 32, False, STRETCHES, spread.contiguous())
    assert same(found, expected)
    columnwise = [tensor.t().contiguous().t() for tensor in found[:3]]
    alternate = torch.stack([found[3], found[3]], dim=1)[:, 0]
    plain = ops.dequantize(*found[:4], bits, 96, 32, torch.float32)
    assert same([ops.dequantize(*columnwise, alternate, bits, 96, 32, torch.float32)], [plain])
    assert same([ops.unpack(columnwise[0], bits, 96)], [ops.unpack(found[0], bits, 96)])
    columns = columns_case(9, 24)
    assert same(
        ops.quantize_columns(*(tensor.t().contiguous().t() for tensor in columns), bits),
        ops.quantize_columns(*columns, bits),
    )
    residual = residual_columns_case(9, 24, bits)
    assert same(
        ops.quantize_columns_r2q(*(tensor.t().contiguous().t() for tensor in residual), bits),
        ops.quantize_columns_r2q(*residual, bits),
    )
    descent = descent_case(9, 24, bits)
    assert same(
        [ops.descend_columns(*(tensor.t().contiguous().t() for tensor in descent), bits)],
        [ops.descend_columns(*descent, bits)],
    )
    groups = residual_fit_case(24, 9, bits, 2)
    assert same(
        ops.fit_residual(*(tensor.t().contiguous().t() for tensor in groups), bits, False, 8),
        ops.fit_residual(*groups, bits, False, 8),
    )
    pairs = found[1].repeat_interleave(2, dim=1)
    plain = ops.dequantize_r2q(found[0], pairs, *found[2:4], bits, 96, 32, torch.float32)
    spread = (columnwise[0], pairs.t().contiguous().t(), columnwise[2], alternate)
    assert same([ops.dequantize_r2q(*spread, bits, 96, 32, torch.float32)], [plain])
    assert same([ops.hadamard(weight, 32)], [ops.hadamard(weight.contiguous(), 32)])
    codes = ops.unpack(found[0], bits, 96)
    assert same([ops.pack(codes.t().contiguous().t(), bits)], [found[0]])


# The dispatcher


def operator_calls() -> list[Any]:
    weight, codes = gaussian(3, 40), torch.randint(4, (3, 40), dtype=torch.uint8)
    stored = ops.quantize(weight, 2, 16, False, ())[:4]
    return [
        pytest.param(ops.pack, (codes, 2), id="pack"),
        pytest.param(ops.unpack, (stored[0], 2, 40), id="unpack"),
        pytest.param(ops.quantize, (weight, 2, 16, False, [1.0, 1.5], torch.ones(40)), id="quantize"),
        pytest.param(ops.quantize, (weight.bfloat16(), 4, 64, True, []), id="quantize symmetric"),
        pytest.param(ops.dequantize, (*stored, 2, 40, 16, torch.bfloat16), id="dequantize"),
        pytest.param(ops.fit_grid, (weight, 2, 16, False, [1.0, 1.5], torch.ones(40)), id="fit_grid"),
        pytest.param(ops.fit_grid, (weight.bfloat16(), 4, 64, True, []), id="fit_grid symmetric"),
        pytest.param(ops.quantize_columns, (*columns_case(3, 40), 2), id="quantize_columns"),
        pytest.param(
            ops.dequantize_r2q, (stored[0], codes[:, :6], codes[:, :3], stored[3], 2, 40, 16, torch.float16), id="r2q"
        ),
        pytest.param(ops.quantize_columns_r2q, (*residual_columns_case(3, 40, 2), 2), id="quantize_columns_r2q"),
        pytest.param(ops.descend_columns, (*descent_case(3, 40, 2), 2), id="descend_columns"),
        pytest.param(ops.fit_residual, (*residual_fit_case(8, 5, 4, 2), 4, False, 8), id="fit_residual"),
        pytest.param(ops.hadamard, (weight.reshape(3, 5, 8), 8), id="hadamard"),
    ]


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(("operator", "arguments"), operator_calls())
def test_an_operator_keeps_torchs_rules(operator: Any, arguments: tuple[Any, ...]) -> None:
    assert set(torch.library.opcheck(operator, arguments).values()) == {"SUCCESS"}


def test_the_best_instruction_set_is_chosen_and_asking_changes_nothing(library: ctypes.CDLL) -> None:
    before = library.aq_isa()
    offered = cpu.isas(library)
    assert library.aq_isa() == before
    assert offered[-1] in {"portable", "neon"}  # what every processor of the platform has

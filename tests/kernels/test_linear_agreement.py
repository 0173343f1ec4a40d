"""Kernels of products agree with their meaning to float32 rounding: on any instruction set, for any shape and width."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import gaussian, group_sizes, widths
from torch import Tensor
from torch.nn import functional

from arrow_quant_v2.kernels import linear as products
from arrow_quant_v2.kernels import ops
from arrow_quant_v2.packed import WIDTHS

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
OPS: dict[str, tuple[Any, ...]] = {"linear": (), "linear_dynamic": (), "linear_static": (0.03, 120)}
PIECES = 3 * 2.0**-16  # what two bfloat16 pieces leave of x, of W, and the product of the two lo ones
HALF_A_STEP = (
    0.5 / 127
)  # of the greatest that a run of W can mean, which kernels may round to 8 bits as they do x of 16
ROUNDING = {  # of the sum of |x| |w|, which the order of additions can move
    torch.float32: PIECES,
    torch.float16: PIECES,
    torch.bfloat16: 2.0**-8,  # W, and x once it is rounded to 8 bits, may become bfloat16
}
SHAPES = [  # (rows, columns, group size): whole blocks of 16 bytes, parts of them, ragged tails, one group, odd columns
    (5, 64, 64),
    (33, 100, 32),
    (17, 1030, 24),
    (7, 9, 64),
    (12, 2048, 128),
    (9, 136, 8),
    (10, 1000, 1000),
    (6, 512, 32),
    (70, 300, 104),
    (40, 600, 128),
    (20, 255, 64),  # a row of codes that fills its last bytes, as a row of 256 would
    (20, 127, 64),
    (1, 1, 8),
]
COUNTS = (1, 2, 3, 4, 5, 9, 33, 70, 81)

each_isa = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@dataclass(frozen=True, kw_only=True)
class Case:
    """A weight in codes, with what else an op is told of it."""

    stored: tuple[Tensor, Tensor, Tensor, Tensor]
    bias: Tensor | None
    bits: int
    group_size: int
    grid: str

    @property
    def arguments(self) -> tuple[Any, ...]:
        return (*self.stored, self.bias, self.bits, self.group_size, self.grid)

    def product(self, columns: int) -> products.Weight:
        return products.Weight(columns, *self.stored, None, self.bits, self.group_size, self.grid)

    def weight(self, columns: int) -> Tensor:
        return self.product(columns).values().double()

    def greatest(self, columns: int) -> Tensor:
        """Of each run of each row, the greatest that a code of it could mean, at every column (rows, columns)."""
        weight = self.product(columns)
        ends = [weight._replace(codes=torch.full_like(weight.codes, code)).values().abs() for code in (0, 255)]
        runs = functional.pad(torch.maximum(*ends), (0, -columns % weight.run)).unflatten(1, (-1, weight.run))
        return runs.amax(dim=2).repeat_interleave(weight.run, dim=1)[:, :columns].double()


def case(
    rows: int,
    columns: int,
    group_size: int,
    bits: int,
    grid: str = "affine",
    *,
    symmetric: bool = False,
    bias: bool = False,
    seed: int = 0,
) -> Case:
    weight = gaussian(rows, columns, seed=seed) * 0.02
    codes, scales, zeros, row_scales, _ = ops.quantize(weight, bits, group_size, symmetric, ())
    if grid == "r2q":
        scales = torch.stack([scales, (scales * 0.6).to(torch.uint8)], dim=-1).flatten(1)
    added = gaussian(1, rows, seed=seed + 1)[0] if bias else None
    return Case(stored=(codes, scales, zeros, row_scales), bias=added, bits=bits, group_size=group_size, grid=grid)


def rounded(name: str, x: Tensor, run: int) -> Tensor:
    """What the op makes of its inputs before they are multiplied."""
    if name == "linear_dynamic":
        return products.rounded_by_run(x, run)
    return products.rounded_by_scale(x, *OPS[name]) if name == "linear_static" else x.float()


def error(name: str, x: Tensor, given: Case) -> float:
    """The largest error of an op, as a part of sum |x| |w| and of one unit of its result's dtype."""
    found: Tensor = getattr(products, name)(x, *given.arguments, *OPS[name])
    assert found.dtype == x.dtype
    columns = x.shape[-1]
    inputs, weight = rounded(name, x, given.product(columns).run).double(), given.weight(columns)
    expected = inputs @ weight.T + (0.0 if given.bias is None else given.bias.double())
    unit = torch.finfo(x.dtype).eps if x.dtype != torch.float32 else 0.0
    added = inputs.abs() + (OPS[name][0] * OPS[name][1] if name == "linear_static" else 0.0)  # and taken away: its zero
    allowed = ROUNDING[x.dtype] * (added @ weight.abs().T) + unit * expected.abs() + 1e-6
    if name != "linear" and x.dtype != torch.float32:
        allowed += 1.02 * HALF_A_STEP * (inputs.abs() @ given.greatest(columns).T)
    return float(((found.double() - expected).abs() / allowed).max())


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("grid", ["affine", "r2q"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", OPS)
@pytest.mark.usefixtures("isa")
def test_a_product_is_what_it_means(name: str, shape: tuple[int, int, int], grid: str, bits: int) -> None:
    for number, count in enumerate(COUNTS):
        some = case(*shape, bits, grid, symmetric=number % 2 == 0, bias=number % 3 == 0)
        x = gaussian(count, shape[1], seed=count).to(FLOATS[number % 3])
        assert error(name, x, some) <= 1.0, (count, x.dtype)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("grid", ["affine", "r2q"])
@pytest.mark.parametrize("group_size", [16, 32, 64, 128, 192, 1000])
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("name", ["linear_dynamic", "linear_static"])
def test_rounded_inputs_meet_every_weight_as_it_is_or_rounded_to_nearest_by_runs(
    name: str, bits: int, group_size: int, grid: str
) -> None:
    some, one = case(48, 1000, group_size, bits, grid), torch.eye(1000).half()  # shows every weight by itself
    found = getattr(products, name)(one, *some.arguments, *OPS[name]).double().T
    expected = some.weight(1000) * rounded(name, one, some.product(1000).run)[0, 0]
    allowed = 1.02 * HALF_A_STEP * some.greatest(1000) + 2.0**-11 * expected.abs() + 1e-7
    assert ((found - expected).abs() <= allowed).all()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("bits", WIDTHS)
def test_beside_a_great_input_small_ones_keep_their_part(bits: int) -> None:
    some, x = case(8, 256, 64, bits), gaussian(1, 256)
    x[0, 70] = 2.0**14
    weight = some.weight(256)
    expected, great = x.double() @ weight.T, (2.0**14 * weight[:, 70]).abs()
    left_out = 2.0**-10 * weight[:, 64:128].abs().sum(1)
    found = products.linear(x, *some.arguments).double()
    assert ((found - expected).abs() <= left_out + 2.0**-22 * great + 1e-5).all()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("count", [1, 3, 9, 20])
@pytest.mark.parametrize("bits", WIDTHS)
def test_in_a_long_group_too_a_great_input_leaves_small_ones_their_part(bits: int, count: int) -> None:
    weight, x = gaussian(8, 1024) * 0.02, gaussian(count, 1024)
    weight[:, 70], x[:, 70] = 0.0, 2.0**14  # only the others are seen in the result
    codes, scales, zeros, row_scales, _ = ops.quantize(weight, bits, 1024, True, ())
    stored = (codes, scales, zeros, row_scales)
    some = Case(stored=stored, bias=None, bits=bits, group_size=1024, grid="affine")
    expected = x.bfloat16().double() @ some.weight(1024).T
    added = gaussian(count, 1024).abs().double() @ some.weight(1024).abs().T
    found = products.linear(x.bfloat16(), *some.arguments).double()
    assert ((found - expected).abs() <= 2.0**-7 * added).all()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(("count", "dtype"), [(300, FLOATS[0]), (1100, FLOATS[1]), (2100, FLOATS[2])])
@pytest.mark.parametrize("grid", ["affine", "r2q"])
@pytest.mark.parametrize("name", OPS)
def test_many_rows_of_inputs_meet_every_column(name: str, grid: str, count: int, dtype: torch.dtype) -> None:
    some = case(13, 1030, 64, 4, grid, bias=True)
    assert error(name, gaussian(count, 1030).to(dtype), some) <= 1.0


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("scale", [float("inf"), float("nan")])
@pytest.mark.parametrize("grid", ["affine", "r2q"])
@pytest.mark.parametrize("name", OPS)
def test_a_row_of_the_weight_without_a_finite_scale_spoils_itself_alone(name: str, grid: str, scale: float) -> None:
    some = case(20, 192, 64, 4, grid)
    for count, dtype in ((1, FLOATS[1]), (3, FLOATS[0]), (9, FLOATS[1]), (40, FLOATS[2]), (70, FLOATS[1])):
        x = gaussian(count, 192).to(dtype)
        sound = getattr(products, name)(x, *some.arguments, *OPS[name])
        row_scales = some.stored[3].clone()
        row_scales[17] = scale
        found = getattr(products, name)(x, *some.stored[:3], row_scales, *some.arguments[4:], *OPS[name])
        assert not found[:, 17].isfinite().any()
        found[:, 17] = sound[:, 17]
        assert torch.equal(found, sound)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("name", OPS)
def test_groups_may_start_within_a_byte(name: str) -> None:
    zeros = torch.randint(256, (3, 7), dtype=torch.uint8)
    codes, scales = torch.randint(256, (3, 18), dtype=torch.uint8), torch.randint(256, (3, 7), dtype=torch.uint8)
    stored = (codes, scales, zeros, torch.ones(3).bfloat16())
    some = Case(stored=stored, bias=None, bits=2, group_size=10, grid="affine")
    assert all(error(name, gaussian(count, 70), some) <= 1.0 for count in (1, 40))


@st.composite
def asked(draw: st.DrawFn) -> tuple[Case, Tensor]:
    rows, columns = draw(st.integers(1, 20)), draw(st.integers(1, 300))
    count = draw(st.integers(1, 20) | st.integers(65, 80))
    grid, bits = draw(st.sampled_from(["affine", "r2q"])), draw(widths)
    seed, symmetric, bias = draw(st.integers(0, 99)), draw(st.booleans()), draw(st.booleans())
    some = case(rows, columns, draw(group_sizes), bits, grid, symmetric=symmetric, bias=bias, seed=seed)
    x = gaussian(count, columns, seed=seed) * 10.0 ** draw(st.integers(-3, 3))
    return some, x.to(draw(st.sampled_from(FLOATS[:2])))


@pytest.mark.usefixtures("isa")
@each_isa
@given(asked=asked(), name=st.sampled_from(list(OPS)))
def test_a_product_is_what_it_means_for_any_shape(asked: tuple[Case, Tensor], name: str) -> None:
    some, x = asked
    assert error(name, x, some) <= 1.0


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(("count", "dtype"), [(1, FLOATS[0]), (3, FLOATS[0]), (40, FLOATS[0]), (70, FLOATS[1])])
@pytest.mark.usefixtures("isa")
def test_what_is_no_number_stays_in_its_row(count: int, dtype: torch.dtype, bits: int, name: str) -> None:
    some, x = case(8, 256, 64, bits), gaussian(count, 256).to(dtype)
    x[-1, 70] = float("nan")
    found = getattr(products, name)(x, *some.arguments, *OPS[name])
    assert found[-1].isnan().all()
    assert found[:-1].isfinite().all()
    x[-1, 70] = float("inf")
    found = getattr(products, name)(x, *some.arguments, *OPS[name])
    assert name == "linear_static" or not found[-1].isfinite().any()
    assert found[:-1].isfinite().all()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("name", OPS)
def test_shapes_without_values_give_nothing_or_the_bias(name: str) -> None:
    some = case(6, 32, 16, 4, bias=True)
    assert some.bias is not None
    product = getattr(products, name)
    assert product(torch.empty(0, 32), *some.arguments, *OPS[name]).shape == (0, 6)
    assert product(torch.empty(2, 0, 32), *some.arguments, *OPS[name]).shape == (2, 0, 6)
    rowless = tuple(part[:0] for part in some.stored)
    assert product(torch.ones(3, 32), *rowless, None, 4, 16, "affine", *OPS[name]).shape == (3, 0)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("count", [2, 20])
def test_strides_do_not_matter_to_products(count: int, name: str) -> None:
    some, x = case(20, 96, 32, 2, bias=True), gaussian(96, count).T
    spread = tuple(part.repeat_interleave(2, dim=0)[::2] for part in some.stored)
    found = getattr(products, name)(x, *spread, *some.arguments[4:], *OPS[name])
    torch.testing.assert_close(found, getattr(products, name)(x.contiguous(), *some.arguments, *OPS[name]))


@pytest.mark.usefixtures("library", "torch_threads")
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("name", OPS)
def test_products_do_not_depend_on_the_number_of_threads(name: str, bits: int) -> None:
    some = case(1500, 2048, 64, bits)
    for count, dtype in ((1, FLOATS[0]), (3, FLOATS[0]), (7, FLOATS[0]), (20, FLOATS[0]), (90, FLOATS[1])):
        x = gaussian(count, 2048).to(dtype)
        torch.set_num_threads(1)
        alone = getattr(products, name)(x, *some.arguments, *OPS[name])
        for threads in (2, 5, 64):
            torch.set_num_threads(threads)
            assert torch.equal(getattr(products, name)(x, *some.arguments, *OPS[name]), alone)

"""Convolutions with packed weights: what they mean, on any instruction set; their gradients, what they refuse."""

from math import prod
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from kernel_cases import gaussian, widths
from torch import Tensor
from torch.nn import functional

from arrow_quant_v2.errors import QuantizationError
from arrow_quant_v2.kernels import convolution_cpu, linear, ops
from arrow_quant_v2.kernels.convolution import How, convolution

PIECES = 3 * 2.0**-16  # what two bfloat16 pieces leave of x, of W, and the product of the two lo ones
ROUNDING = {torch.float32: PIECES, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-8}  # of the sum of |x| |w|
ALIKE = How((3, 3), (1, 1), (1, 1), (1, 1), 1)
CASES = [  # batch, channels, sizes of x; rows; how
    (1, 32, (8, 8), 32, ALIKE),
    (2, 40, (7, 9), 70, How((3, 3), (2, 2), (1, 1), (1, 1), 1)),
    (1, 64, (8, 8), 130, How((1, 1), (1, 1), (0, 0), (1, 1), 1)),
    (3, 64, (5, 6), 33, How((1, 1), (1, 1), (0, 0), (1, 1), 1)),
    (1, 256, (4, 8), 64, How((3, 2), (1, 1), (1, 0), (1, 1), 1)),  # several blocks of columns
    (1, 16, (40,), 20, How((9,), (4,), (4,), (1,), 1)),
    (3, 5, (11,), 17, How((5,), (3,), (2,), (2,), 1)),
    (2, 8, (4, 6, 5), 130, How((3, 1, 3), (1, 2, 1), (1, 0, 2), (2, 1, 1), 1)),
    (1, 1, (3, 3), 1, How((3, 3), (1, 1), (0, 0), (1, 1), 1)),
    (2, 32, (6, 6), 48, How((3, 3), (1, 1), (1, 1), (1, 1), 4)),
    (1, 33, (200,), 9, How((3,), (1,), (1,), (1,), 1)),
]
BY_AXES = (functional.conv1d, functional.conv2d, functional.conv3d)

each_isa = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def stored(rows: int, columns: int, bits: int, group_size: int, grid: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    codes, scales, zeros, row_scales, _ = ops.quantize(gaussian(rows, columns), bits, group_size, False, ())
    if grid == "r2q":
        scales = torch.stack([scales, (scales * 0.6).to(torch.uint8)], dim=-1).flatten(1)
    return codes, scales, zeros, row_scales


def error(x: Tensor, given: tuple[Any, ...], how: How, equalization: Tensor | None = None) -> float:
    """The largest error, as a part of what rounding may move and of one unit of the result's dtype."""
    found = convolution(x, *given, *how, equalization)
    assert found.dtype == x.dtype
    *parts, bias, bits, group_size, grid = given
    columns = x.shape[1] // how.groups * prod(how.kernel)
    values = linear.Weight(columns, *parts, None, bits, group_size, grid).values().double()
    weight = values.reshape(len(values), -1, *how.kernel)
    inputs, convolve = x.double(), BY_AXES[len(how.kernel) - 1]
    if equalization is not None:
        inputs = inputs / equalization.reshape(-1, *(1,) * len(how.kernel))
    expected = convolve(inputs, weight, None if bias is None else bias.double(), *how[1:])
    added = convolve(inputs.abs(), weight.abs(), None, *how[1:])
    unit = torch.finfo(x.dtype).eps if x.dtype != torch.float32 else 0.0
    twice = 2.0 if equalization is not None else 1.0  # a bfloat16 that was divided is rounded once more
    allowed = twice * ROUNDING[x.dtype] * added + unit * expected.abs() + 1e-6
    assert found.shape == expected.shape
    return float(((found.double() - expected).abs() / allowed).max())


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("grid", ["affine", "r2q"])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.usefixtures("isa")
def test_a_convolution_is_what_it_means(case: tuple[Any, ...], grid: str, bits: int) -> None:
    batch, channels, sizes, rows, how = case
    columns = channels // how.groups * prod(how.kernel)
    for group_size, dtype in ((64, torch.float32), (16, torch.bfloat16), (columns, torch.float16)):
        x = gaussian(1, batch * channels * prod(sizes)).reshape(batch, channels, *sizes).to(dtype)
        bias = None if dtype == torch.float16 else gaussian(1, rows)[0]
        given = (*stored(rows, columns, bits, group_size, grid), bias, bits, group_size, grid)
        assert error(x, given, how) <= 1.0, dtype


@pytest.mark.usefixtures("torch_threads", "isa")
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_convolutions_do_not_depend_on_the_number_of_threads(dtype: torch.dtype) -> None:
    x = gaussian(1, 2 * 64 * 100).reshape(2, 64, 10, 10).to(dtype)
    given = (*stored(200, 576, 4, 64, "affine"), gaussian(1, 200)[0], 4, 64, "affine")
    torch.set_num_threads(1)
    alone = convolution(x, *given, *ALIKE)
    for threads in (2, 5, 64):
        torch.set_num_threads(threads)
        assert error(x, given, ALIKE) <= 1.0
        assert torch.equal(convolution(x, *given, *ALIKE), alone)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_channels_are_divided_by_the_equalization(dtype: torch.dtype) -> None:
    x = gaussian(1, 2 * 32 * 81).reshape(2, 32, 9, 9).to(dtype)
    equalization = torch.linspace(0.2, 5.0, 32)
    given = (*stored(20, 288, 4, 64, "affine"), None, 4, 64, "affine")
    assert error(x, given, ALIKE, equalization) <= 1.0
    one = How((1, 1), (1, 1), (0, 0), (1, 1), 1)
    assert error(x, (*stored(20, 32, 4, 64, "affine"), None, 4, 64, "affine"), one, equalization) <= 1.0


@st.composite
def asked(draw: st.DrawFn) -> tuple[Tensor, tuple[Any, ...], How]:
    axes = draw(st.integers(1, 3))
    each = [st.integers(1, high) for high in (12, 4, 3, 3)]  # sizes, kernel, stride, dilation
    sizes, kernel, stride, dilation = (tuple(draw(number) for _ in range(axes)) for number in each)
    padding = tuple(draw(st.integers(0, 3)) for _ in range(axes))
    how = How(kernel, stride, padding, dilation, 1)
    each_axis = (sizes, padding, dilation, kernel)
    assume(all(size + 2 * pad > step * (wide - 1) for size, pad, step, wide in zip(*each_axis, strict=True)))
    batch, channels, rows = draw(st.integers(1, 3)), draw(st.integers(1, 40)), draw(st.integers(1, 80))
    bits, group_size, grid = draw(widths), 8 * draw(st.integers(1, 17)), draw(st.sampled_from(["affine", "r2q"]))
    parts = stored(rows, channels * prod(kernel), bits, group_size, grid)
    x = gaussian(1, batch * channels * prod(sizes)).reshape(batch, channels, *sizes)
    return x, (*parts, None, bits, group_size, grid), how


@pytest.mark.usefixtures("isa")
@each_isa
@given(asked(), st.sampled_from(list(ROUNDING)))
def test_any_kernel_moves_as_torch_moves_it(case: tuple[Tensor, tuple[Any, ...], How], dtype: torch.dtype) -> None:
    x, given, how = case
    assert error(x.to(dtype), given, how) <= 1.0


def small() -> tuple[Tensor, tuple[Any, ...]]:
    x = gaussian(2, 4 * 30).reshape(2, 4, 5, 6)
    return x, (*stored(6, 36, 4, 16, "affine"), torch.zeros(6), 4, 16, "affine")


@pytest.mark.usefixtures("isa")
def test_one_item_does_not_see_another_and_no_value_beyond_an_edge() -> None:
    x, given = small()
    alone = convolution(x[1:], *given, *ALIKE)
    spoiled = torch.cat([torch.full_like(x[:1], torch.nan), x[1:]])
    torch.testing.assert_close(convolution(spoiled, *given, *ALIKE)[1:], alone)
    assert convolution(spoiled, *given, *ALIKE)[0].isnan().all()


@pytest.mark.parametrize("equalization", [None, torch.linspace(0.5, 2.0, 4)])
def test_the_gradient_is_that_of_the_dequantized_weight(equalization: Tensor | None) -> None:
    x, given = small()
    values = linear.Weight(36, *given[:4], None, *given[5:]).values().reshape(6, 4, 3, 3)
    found, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
    biases = [torch.zeros(6, requires_grad=True) for _ in range(2)]
    convolution(found, *given[:4], biases[0], *given[5:], *ALIKE, equalization).square().sum().backward()
    divided = expected if equalization is None else expected / equalization[:, None, None]
    functional.conv2d(divided, values, biases[1], padding=1).square().sum().backward()
    torch.testing.assert_close(found.grad, expected.grad, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(biases[0].grad, biases[1].grad, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("how", [ALIKE, ALIKE._replace(stride=(2, 1), groups=2)])
def test_torch_finds_nothing_wrong_with_the_op(how: How) -> None:
    x, (*_, bias, bits, group_size, grid) = small()
    parts = stored(6, 36 // how.groups, bits, group_size, grid)
    torch.library.opcheck(convolution, (x.requires_grad_(), *parts, bias, bits, group_size, grid, *how))


def test_sizes_of_earlier_calls_are_not_those_of_later_ones() -> None:
    _, given = small()
    shapes = [(1, 4, 5, 6), (1, 4, 6, 5), (2, 4, 5, 6), (1, 4, 5, 6)]
    for shape in shapes:
        assert error(gaussian(1, prod(shape)).reshape(shape), given, ALIKE) <= 1.0
    assert convolution_cpu.sizes_of(torch.Size(shapes[0]), ALIKE).out == (5, 6)


def test_what_does_not_fit_is_refused_by_name() -> None:
    x, given = small()
    with pytest.raises(QuantizationError, match=r"x is torch\.float32 \(2, 4, 30\), the kernel \(3, 3\)"):
        convolution(x.flatten(2), *given, *ALIKE)
    with pytest.raises(QuantizationError, match=r"convolution: x is torch\.int64"):
        convolution(x.long(), *given, *ALIKE)
    with pytest.raises(QuantizationError, match=r"x has 4 channels in 3 groups, the weight 6 rows of 9"):
        convolution(x, *stored(6, 9, 4, 16, "affine"), *given[4:], *ALIKE._replace(groups=3))
    with pytest.raises(QuantizationError, match=r"bias is torch\.float32 \(3,\); there are 6 rows"):
        convolution(x, *given[:4], torch.zeros(3), *given[5:], *ALIKE)
    with pytest.raises(QuantizationError, match=r"equalization is torch\.float32 \(9,\); float32, one for each of 4"):
        convolution(x, *given, *ALIKE, torch.ones(9))
    with pytest.raises(QuantizationError, match="convolution: the numbers of padding are 1; the kernel has 2 axes"):
        convolution(x, *given, *ALIKE._replace(padding=(1,)))
    with pytest.raises(QuantizationError, match=r"convolution: of \(5, 6\) nothing is left for a kernel of \(9, 3\)"):
        convolution(x, *stored(6, 108, 4, 16, "affine"), *given[4:], *ALIKE._replace(kernel=(9, 3)))

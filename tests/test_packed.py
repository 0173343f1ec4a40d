"""Laws of the packed tensor: its layout covers every element once, and wrong arrays are refused."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arrow_quant_v2.errors import QuantizationError
from arrow_quant_v2.packed import ITEM_BITS, NO_ERROR, WIDTHS, Layout, PackedTensor, TensorInfo, WeightError


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)))
    axis = draw(st.none() | st.integers(1, len(shape)))
    size = draw(st.none() | st.integers(1, 4).map(lambda n: 8 * n))
    return Layout(shape=shape, bits=draw(st.sampled_from(WIDTHS)), quant_axis=axis, group_size=size)


def packed(layout: Layout, *, rows: int | None = None, symmetric: bool = False, **changes: Any) -> PackedTensor:
    count = layout.rows if rows is None else rows
    arrays: dict[str, Any] = {
        "codes": np.zeros((count, layout.row_bytes), np.uint8),
        "scales": np.zeros((count, layout.scales_per_row), np.uint8),
        "zero_points": None if symmetric else np.zeros((count, layout.groups), np.uint8),
        "row_scales": np.zeros(count, np.uint16),
    }
    return PackedTensor(name="up.weight", dtype="float32", layout=layout, **(arrays | changes))


LINEAR = Layout(shape=(6, 20), bits=2, quant_axis=1, group_size=8)


# Layout


@settings(deadline=None)
@given(layout=layouts())
def test_rows_times_columns_is_every_element(layout: Layout) -> None:
    assert layout.rows * layout.columns == math.prod(layout.shape)


@settings(deadline=None)
@given(layout=layouts())
def test_groups_cover_a_row_and_only_the_last_is_shorter(layout: Layout) -> None:
    tail = layout.columns - (layout.groups - 1) * layout.group
    assert 1 <= tail <= layout.group <= layout.columns


@settings(deadline=None)
@given(layout=layouts())
def test_row_bytes_hold_a_row_and_less_than_a_byte_more(layout: Layout) -> None:
    assert 0 <= 8 * layout.row_bytes - layout.columns * layout.bits < 8


@pytest.mark.parametrize(
    ("shape", "axis", "rows", "columns"),
    [
        ((384, 1536), 1, 384, 1536),
        ((64, 32, 3, 3), 1, 64, 288),
        ((8, 16, 24), 2, 128, 24),
        ((16, 24), None, 1, 384),
        ((5,), 1, 5, 1),
    ],
)
def test_the_axis_splits_a_shape_into_rows_and_columns(
    shape: tuple[int, ...], axis: int | None, rows: int, columns: int
) -> None:
    layout = Layout(shape=shape, bits=4, quant_axis=axis, group_size=None)
    assert (layout.rows, layout.columns, layout.groups) == (rows, columns, 1)


def test_a_ragged_tail_is_a_group_of_its_own() -> None:
    layout = Layout(shape=(6, 20), bits=2, quant_axis=1, group_size=8)
    assert (layout.group, layout.groups, layout.row_bytes) == (8, 3, 5)
    wide = Layout(shape=(6, 20), bits=2, quant_axis=1, group_size=64)
    assert (wide.group, wide.groups) == (20, 1)


# Arrays that do not fit


@settings(deadline=None)
@given(layout=layouts(), symmetric=st.booleans())
def test_arrays_that_fit_are_taken_and_every_byte_is_counted(layout: Layout, *, symmetric: bool) -> None:
    tensor = packed(layout, symmetric=symmetric)
    assert tensor.rows == layout.rows
    parameters = layout.groups * (1 if symmetric else 2) + 2
    assert tensor.nbytes == layout.rows * (layout.row_bytes + parameters)


@pytest.mark.parametrize(
    ("what", "array"),
    [
        ("codes", np.zeros((6, 6), np.uint8)),
        ("codes", np.zeros((6, 5), np.int8)),
        ("codes", np.zeros(30, np.uint8)),
        ("scales", np.zeros((6, 2), np.uint8)),
        ("scales", np.zeros((6, 3), np.float32)),
        ("zero_points", np.zeros((6, 1), np.uint8)),
        ("zero_points", np.zeros((5, 3), np.uint8)),
        ("row_scales", np.zeros(6, np.float16)),
        ("row_scales", np.zeros((6, 1), np.uint16)),
    ],
)
def test_an_array_that_does_not_fit_is_refused_by_name(what: str, array: np.ndarray[Any, Any]) -> None:
    changes: dict[str, Any] = {what: array}
    with pytest.raises(QuantizationError, match=rf"up\.weight: {what} are {array.dtype} .*; the layout asks for"):
        packed(LINEAR, **changes)


@pytest.mark.parametrize(("first", "rows"), [(-1, 2), (5, 2), (7, 0), (0, 7)])
def test_rows_outside_the_tensor_are_refused(first: int, rows: int) -> None:
    with pytest.raises(QuantizationError, match=r"up\.weight: rows .* lie outside its 6"):
        packed(LINEAR, rows=rows, first_row=first)


@pytest.mark.parametrize(("first", "rows"), [(0, 6), (0, 2), (4, 2), (6, 0)])
def test_a_chunk_of_the_rows_is_taken(first: int, rows: int) -> None:
    assert packed(LINEAR, rows=rows, first_row=first).rows == rows


# Rows of one group

ROW = Layout(shape=(6, 20), bits=2, quant_axis=1, group_size=None, grid="row")
OF_ROWS = np.full((6, 1), 255, np.uint8)


@pytest.mark.parametrize("size", [None, 20, 64])
def test_an_only_group_on_the_affine_grid_needs_no_scale_but_its_rows(size: int | None) -> None:
    layout = Layout(shape=(6, 20), bits=2, quant_axis=1, group_size=size)
    assert layout.on("affine") == Layout(shape=(6, 20), bits=2, quant_axis=1, group_size=size, grid="row")
    assert layout.on("r2q").grid == "r2q"
    assert LINEAR.on("affine") == LINEAR


def test_the_scales_of_rows_of_one_group_are_known_and_take_no_bytes() -> None:
    assert packed(ROW, scales=OF_ROWS).nbytes == 6 * (5 + 1 + 2)
    assert packed(ROW, scales=OF_ROWS, symmetric=True).nbytes == 6 * (5 + 2)


def test_rows_of_one_group_with_other_scales_are_refused() -> None:
    with pytest.raises(
        QuantizationError, match=r"up\.weight: 1 groups in a row, with scales from 254; the row grid is"
    ):
        packed(ROW, scales=OF_ROWS - np.array([[0], [1], [0], [0], [0], [0]], np.uint8))
    several = Layout(shape=(6, 20), bits=2, quant_axis=1, group_size=8, grid="row")
    with pytest.raises(
        QuantizationError, match=r"up\.weight: 3 groups in a row, with scales from 255; the row grid is"
    ):
        packed(several, scales=np.full((6, 3), 255, np.uint8))


# The residual grid, turned and equalized channels

R2Q = Layout(shape=(6, 24), bits=2, quant_axis=1, group_size=8, grid="r2q")


def test_the_residual_grid_has_two_scales_in_every_group() -> None:
    assert (R2Q.groups, R2Q.scales_per_row, LINEAR.scales_per_row) == (3, 6, 3)
    assert packed(R2Q).nbytes == 6 * (6 + 6 + 3 + 2)
    assert packed(R2Q, symmetric=True).nbytes == 6 * (6 + 6 + 2)
    for wrong in ("scales", "zero_points"):
        changes: dict[str, Any] = {wrong: np.zeros((6, 4), np.uint8)}
        with pytest.raises(QuantizationError, match=rf"{wrong} are uint8 \(6, 4\); the layout asks for"):
            packed(R2Q, **changes)


@pytest.mark.parametrize(
    ("shape", "axis", "channels"),
    [
        ((6, 24), 1, 24),
        ((6, 24, 3, 3), 1, 24),
        ((4, 6, 24), 2, 24),
        ((6, 24), None, None),
        ((6,), 0, 6),
        ((6,), 1, None),
    ],
)
def test_channels_lie_along_the_first_axis_of_the_columns(
    shape: tuple[int, ...], axis: int | None, channels: int | None
) -> None:
    assert Layout(shape=shape, bits=4, quant_axis=axis, group_size=None).channels == channels


def test_a_turned_and_equalized_tensor_counts_four_bytes_a_channel() -> None:
    equalized = packed(R2Q, rotation=8, equalization=np.ones(24, np.float32))
    assert equalized.nbytes == packed(R2Q).nbytes + 4 * 24


@pytest.mark.parametrize("rotation", [-8, 0, 1, 4, 12, 24, 2048])
def test_a_turn_that_is_no_power_of_two_is_refused(rotation: int) -> None:
    with pytest.raises(QuantizationError, match=rf"up.weight: rotation {rotation}; allowed are 8, .* 1024, or none"):
        packed(R2Q, rotation=rotation)


@pytest.mark.parametrize(
    ("layout", "channels"), [(R2Q, 24), (Layout(shape=(6, 32), bits=4, quant_axis=None, group_size=8), None)]
)
def test_a_turn_that_does_not_divide_the_channels_is_refused(layout: Layout, channels: int | None) -> None:
    with pytest.raises(QuantizationError, match=rf"rotation 16 does not divide its input channels, {channels}"):
        packed(layout, rotation=16)


@pytest.mark.parametrize(
    ("equalization", "message"),
    [
        (np.ones(23, np.float32), r"equalization is float32 \(23,\); its input channels ask for float32 \(24,\)"),
        (np.ones(24, np.float64), "equalization is float64"),
        (np.zeros(24, np.float32), "equalization goes from 0.0 to 0.0; allowed: finite, above 0"),
        (np.full(24, -1, np.float32), "equalization goes from -1.0 to -1.0"),
        (np.full(24, np.inf, np.float32), "equalization goes from inf to inf"),
        (np.full(24, np.nan, np.float32), "equalization goes from nan to nan"),
    ],
)
def test_equalization_that_does_not_fit_is_refused(equalization: "np.ndarray[Any, Any]", message: str) -> None:
    with pytest.raises(QuantizationError, match=f"up.weight: {message}"):
        packed(R2Q, equalization=equalization)


# Tensors that lie elsewhere


@pytest.mark.parametrize("dtype", sorted(ITEM_BITS))
def test_bytes_of_a_tensor_are_elements_times_item_size(dtype: str) -> None:
    info = TensorInfo(name="x", shape=(3, 5), dtype=dtype)
    assert (info.numel, info.nbytes) == (15, 15 * ITEM_BITS[dtype] // 8)
    if not dtype.startswith(("bfloat", "float8")):
        assert np.dtype(dtype).itemsize * 8 == ITEM_BITS[dtype]


def test_a_scalar_has_one_element() -> None:
    assert TensorInfo(name="x", shape=(), dtype="float32").nbytes == 4


# Error


def weight_error(weight: "np.ndarray[Any, Any]", quantized: "np.ndarray[Any, Any]") -> WeightError:
    return WeightError(
        original=float((weight**2).sum()),
        quantized=float((quantized**2).sum()),
        difference=float(((weight - quantized) ** 2).sum()),
        count=weight.size,
    )


pairs = st.integers(1, 40).flatmap(
    lambda n: st.tuples(*[st.lists(st.integers(-1000, 1000).map(lambda v: v / 16), min_size=n, max_size=n)] * 2)
)


@settings(deadline=None)
@given(pair=pairs)
def test_cosine_and_mse_equal_numpys(pair: tuple[list[float], list[float]]) -> None:
    weight, quantized = np.array(pair[0]), np.array(pair[1])
    error = weight_error(weight, quantized)
    norm = float(np.linalg.norm(weight) * np.linalg.norm(quantized))
    if norm > 0:
        assert error.cosine == pytest.approx(float(weight @ quantized) / norm, abs=1e-9)
    assert error.mse == pytest.approx(float(np.mean((weight - quantized) ** 2)))
    assert -1.0 <= error.cosine <= 1.0


@settings(deadline=None)
@given(pair=pairs, cut=st.integers(0, 40))
def test_errors_of_two_parts_add_up_to_the_whole(pair: tuple[list[float], list[float]], cut: int) -> None:
    weight, quantized = np.array(pair[0]), np.array(pair[1])
    parts = weight_error(weight[:cut], quantized[:cut]) + weight_error(weight[cut:], quantized[cut:])
    assert parts == weight_error(weight, quantized)  # multiples of 1/256: sums are exact
    assert parts + NO_ERROR == parts


def test_zeros_are_like_zeros_and_unlike_anything_else() -> None:
    assert NO_ERROR.cosine == 1.0
    assert NO_ERROR.mse == 0.0
    assert WeightError(original=4.0, quantized=0.0, difference=4.0, count=2).cosine == 0.0

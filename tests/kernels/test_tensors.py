"""What a packed tensor means to a user: the weight in its original basis, whatever was done to its channels."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import widths

from arrow_quant_v2.kernels.rotation import turn
from arrow_quant_v2.kernels.tensors import dequantized, stored_weight
from arrow_quant_v2.packed import Grid, Layout, PackedTensor

pytestmark = pytest.mark.usefixtures("library")

SHAPES = [((5, 32), 1), ((3, 16, 3, 3), 1), ((2, 3, 64), 2), ((32,), 0)]


def packed(shape: tuple[int, ...], axis: int, bits: Any, grid: Grid, seed: int, **basis: Any) -> PackedTensor:
    layout = Layout(shape=shape, bits=bits, quant_axis=axis, group_size=16, grid=grid)
    random = np.random.default_rng(seed)

    def some_bytes(columns: int) -> "np.ndarray[Any, np.dtype[np.uint8]]":
        return random.integers(0, 256, (layout.rows, columns), np.uint8)

    return PackedTensor(
        name="w",
        dtype="bfloat16",
        layout=layout,
        codes=some_bytes(layout.row_bytes),
        scales=some_bytes(layout.scales_per_row),
        zero_points=some_bytes(layout.groups) if seed % 2 else None,
        row_scales=random.integers(0x3C00, 0x3F80, layout.rows, np.uint16),
        **basis,
    )


@settings(deadline=None)
@given(
    place=st.sampled_from(SHAPES),
    bits=widths,
    grid=st.sampled_from(["affine", "r2q"]),
    seed=st.integers(0, 99),
    rotation=st.sampled_from([None, 8, 16]),
    equalized=st.booleans(),
)
def test_the_stored_weight_is_the_original_one_equalized_and_turned(
    *, place: Any, bits: Any, grid: Grid, seed: int, rotation: int | None, equalized: bool
) -> None:
    tensor = packed(*place, bits, grid, seed, rotation=rotation)
    if equalized:
        spread = np.exp2(np.linspace(-3, 3, tensor.layout.channels, dtype=np.float32))
        tensor = replace(tensor, equalization=spread)
    original, stored = dequantized(tensor), stored_weight(tensor)
    again = original.reshape(tensor.rows, tensor.layout.channels, -1)
    if equalized:
        again = again * torch.from_numpy(spread)[:, None]
    if rotation:
        again = turn(again, rotation, axis=1)
    assert original.shape == stored.shape == (tensor.layout.rows, tensor.layout.columns)
    assert torch.allclose(again.flatten(1), stored, atol=1e-5 * float(stored.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("rotation", [None, 8])
def test_the_original_weight_is_rounded_once(dtype: torch.dtype, rotation: int | None) -> None:
    tensor = packed((5, 32), 1, 4, "r2q", 1, rotation=rotation)
    found = dequantized(tensor, dtype)
    assert found.dtype == dtype
    assert torch.equal(found.to(torch.float64), dequantized(tensor).to(dtype).to(torch.float64))


@pytest.mark.parametrize("rotation", [None, 8])
def test_some_rows_are_those_rows_of_the_whole(rotation: int | None) -> None:
    tensor = packed((5, 32), 1, 4, "r2q", 1, rotation=rotation, equalization=np.full(32, 0.5, np.float32))
    part = {name: getattr(tensor, name)[2:4] for name in ("codes", "scales", "zero_points", "row_scales")}
    assert torch.equal(dequantized(replace(tensor, **part, first_row=2)), dequantized(tensor)[2:4])

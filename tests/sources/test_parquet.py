"""Our own files as a source: whatever was done to a weight's channels, slices are those of the original weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from arrow_quant_v2.kernels.tensors import dequantized
from arrow_quant_v2.one_tensor import dequantize_tensor
from arrow_quant_v2.packed import GRIDS, WHOLE, Grid, Layout, PackedTensor
from arrow_quant_v2.sources.parquet import ParquetSource
from arrow_quant_v2.store import LayerRecord, write_part
from arrow_quant_v2.store.record import split

if TYPE_CHECKING:
    from pathlib import Path

SHAPES = [((6, 32), 1), ((3, 16, 3, 3), 1), ((2, 4, 16), 2)]
METADATA = {"configuration": "{}", "program_version": "2.0.0", "source_hash": "c0ffee"}


def packed(shape: tuple[int, ...], axis: int, grid: Grid, rotation: int | None) -> PackedTensor:
    layout = Layout(shape=shape, bits=4, quant_axis=axis, group_size=None if grid == "row" else 8, grid=grid)
    random = np.random.default_rng(0)
    scales = random.integers(0, 256, (layout.rows, layout.scales_per_row), np.uint8)
    return PackedTensor(
        name="w",
        dtype="bfloat16",
        layout=layout,
        codes=random.integers(0, 256, (layout.rows, layout.row_bytes), np.uint8),
        scales=np.full_like(scales, WHOLE) if grid == "row" else scales,
        zero_points=random.integers(0, 256, (layout.rows, layout.groups), np.uint8),
        row_scales=random.integers(0x3C00, 0x3F80, layout.rows, np.uint16),
        rotation=rotation,
        equalization=None if rotation is None else np.exp2(random.uniform(-2, 2, layout.channels)).astype(np.float32),
    )


@pytest.mark.parametrize("rotation", [None, 8])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_slices_are_those_of_the_original_weight(
    tmp_path: Path, shape: tuple[int, ...], axis: int, grid: Grid, rotation: int | None
) -> None:
    tensor = packed(shape, axis, grid, rotation)
    whole = dequantize_tensor(tensor)
    assert (whole.shape, whole.dtype) == (shape, torch.bfloat16)
    assert torch.equal(whole.flatten(), dequantized(tensor, torch.bfloat16).flatten())
    records = [
        LayerRecord(payload=part, chunk=chunk, bits_per_weight=5.0, source_checksum=0, decision="r2q")
        for chunk, part in enumerate(split(tensor, tensor.nbytes // 3))
    ]
    assert len(records) > 1
    write_part(tmp_path / "a.parquet", records, METADATA)
    source = ParquetSource(tmp_path)
    count = tensor.layout.rows * tensor.layout.columns
    for start, stop in ((0, None), (0, 1), (5, 60), (count - 40, count), (7, 7)):
        assert torch.equal(source.read("w", start, stop), whole.flatten()[start:stop])

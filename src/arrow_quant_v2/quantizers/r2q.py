"""The residual grid chosen from the weights alone; knows nothing of calibration or files."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from arrow_quant_v2.engines.one_core import each_on_one_core, tiles
from arrow_quant_v2.kernels import cpu, ops, reference
from arrow_quant_v2.kernels.reference import Residual
from arrow_quant_v2.kernels.residual_fit import folded_columns
from arrow_quant_v2.quantizers.affine import STRETCHES
from arrow_quant_v2.quantizers.r2q_core import columns_first, fit_r2q, row_scales_r2q, stored_r2q
from arrow_quant_v2.quantizers.result import QuantizedRows, joined

if TYPE_CHECKING:
    from torch import Tensor

    from arrow_quant_v2.config import LayerSpec

TILE_WEIGHTS = 2**17  # fewer cost more calls, more leave the cache and take memory that no budget knows of


def residual_refinement(weight: Tensor, spec: LayerSpec, importance: Tensor | None = None) -> QuantizedRows:
    """R2Q: two residual binary expansions around a mean at 2 bits, their generalization at more (see r2q_core).

    weight is (rows, columns) float32, bfloat16 or float16; importance (columns,) float32 weighs the squared errors,
    for example with the diagonal of H = E[x x^T]. Each row is worked on by itself, whatever the number of threads.

    Raises:
        QuantizationError: the weight or the importance is of another kind.
    """
    cpu.activate()
    columns = weight.shape[-1] if weight.ndim else 0
    group = columns if spec.group_size is None else min(spec.group_size, columns)
    ops.check_quantize("r2q", weight, spec.bits, group, STRETCHES[spec.bits], importance)
    mask = None
    if importance is not None or columns % group:
        every = torch.ones(columns, device=weight.device) if importance is None else importance
        mask = reference.split_groups(every[None], group)[0]  # (groups, group), 0 where there is no column
    pieces = tiles(len(weight), max(1, TILE_WEIGHTS // columns))
    return joined(each_on_one_core(lambda rows: _quantized(weight[rows].to(torch.float32), group, mask, spec), pieces))


def _quantized(weight: Tensor, group: int, mask: Tensor | None, spec: LayerSpec) -> QuantizedRows:
    groups = reference.split_groups(weight, group)
    fit = fit_r2q(groups, mask, spec.bits, spec.symmetric)
    row_scales = row_scales_r2q(fit.a1, fit.a2, spec.bits)
    stored = stored_r2q(*fit, row_scales, spec.bits, spec.symmetric)
    w, flat = columns_first(groups), Residual(*(part.flatten() for part in stored.grid))
    codes = reference.residual_codes(w, flat, stored.inverse.flatten(), spec.bits)  # (group, rows * groups)
    q = reference.residual_level(codes, flat, spec.bits)
    packed = ops.pack(codes.mT.reshape(len(weight), -1)[:, : weight.shape[1]], spec.bits)
    sums = _sums(w, q, weight.shape, row_scales)
    return QuantizedRows.of(packed, stored.scales, stored.zero_points, row_scales, sums)


def _sums(w: Tensor, q: Tensor, shape: torch.Size, row_scales: Tensor) -> Tensor:
    """(rows, 3) float64 of w^2, q^2, (w - q)^2, added in units of the row's scale, where float32 holds the squares."""
    rows, columns = shape
    unit = row_scales.to(torch.float32)
    of_group = unit.repeat_interleave(w.shape[1] // rows)
    w, q = w / of_group, q / of_group
    beyond = w.numel() // rows - columns
    if beyond:  # the tail of the last group is no weight
        q.reshape(len(q), rows, -1)[len(q) - beyond :, :, -1] = 0.0
    squares = folded_columns(torch.stack([w, q, w - q]).square_()).reshape(3, rows, -1)
    return (folded_columns(squares.mT.contiguous()) * unit.to(torch.float64).square()).mT

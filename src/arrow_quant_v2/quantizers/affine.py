"""Uniform grids per group: round to nearest, and clip search with refit; knows nothing of calibration or files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from arrow_quant_v2.kernels import cpu, ops
from arrow_quant_v2.quantizers.result import QuantizedRows

if TYPE_CHECKING:
    from torch import Tensor

    from arrow_quant_v2.config import LayerSpec

# 1 / clipping ratio of each candidate; the refit moves each of them to its own least-squares optimum, so a few do.
STRETCHES = {2: (1.2, 1.4, 1.6, 1.8, 2.1), 4: (1.0, 1.1, 1.2, 1.3), 8: (1.0,)}
COVERED = 8  # bits at which a grid that covers its group loses less of outputs, where a row has several groups


def round_to_nearest(weight: Tensor, spec: LayerSpec, importance: Tensor | None = None) -> QuantizedRows:  # noqa: ARG001
    """The smallest grid that covers each group and 0.0; every weight is at most half a step off.

    weight is (rows, columns) float32, bfloat16 or float16; importance changes nothing here.

    Raises:
        QuantizationError: the weight is of another kind.
    """
    return _quantize(weight, spec, (), None)


def clip_search(weight: Tensor, spec: LayerSpec, importance: Tensor | None = None) -> QuantizedRows:
    """Per group the clipping ratio whose least-squares refit of scale and offset explains most of the weights.

    weight is (rows, columns) float32, bfloat16 or float16; importance (columns,) float32 weighs the squared errors,
    for example with the diagonal of H = E[x x^T]. At 8 bits and several groups a row the grid covers all weights, as
    round_to_nearest has it.

    Raises:
        QuantizationError: the weight or the importance is of another kind.
    """
    covers = spec.bits == COVERED and spec.group_size is not None and spec.group_size < weight.shape[1]
    return _quantize(weight, spec, () if covers else STRETCHES[spec.bits], importance)


def _quantize(
    weight: Tensor, spec: LayerSpec, stretches: tuple[float, ...], importance: Tensor | None
) -> QuantizedRows:
    cpu.activate()
    group = weight.shape[1] if spec.group_size is None else min(spec.group_size, weight.shape[1])
    return QuantizedRows.of(*ops.quantize(weight, spec.bits, group, spec.symmetric, stretches, importance))

"""GPTQ for a weight whose rows belong to inputs, as those of Conv1D and of transposed convolutions do.

W (in, columns) meets inputs as x W. Row by row, what matters most first, b_t = w_t + sum over s < t of
R_st (w_s - q_s) / R_tt is quantized (the letters are those of gptq_core). All of a row's elements are settled at once
and cost alike, so its grids are those that a method of weights alone fits to b_t. Knows nothing of models or files.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from arrow_quant_v2.errors import QuantizationError
from arrow_quant_v2.kernels.tensors import stored_weight
from arrow_quant_v2.packed import Layout
from arrow_quant_v2.quantizers import quantizer
from arrow_quant_v2.quantizers.gptq_factor import blocks, factorize, suitable_damping
from arrow_quant_v2.quantizers.result import joined

if TYPE_CHECKING:
    from torch import Tensor

    from arrow_quant_v2.config import LayerSpec
    from arrow_quant_v2.quantizers.result import QuantizedRows


def gptq_rows(weight: Tensor, spec: LayerSpec, hessian: Tensor, count: int) -> QuantizedRows:
    """Quantize rows (in, columns) float32 on the grid of `spec`; H (in, in) is the sum of x x^T over `count` inputs.

    The sums that come with the rows are those of what was quantized, not of W.

    Raises:
        QuantizationError: H is no sum of x x^T, or the weight is not finite.
    """
    if len(hessian) != len(weight):
        raise QuantizationError(f"H is for {len(hessian)} inputs; the weight has {len(weight)} rows, one for each")
    factor = factorize(hessian, None, suitable_damping(len(hessian), count))
    root, left = factor.root, weight.index_select(0, factor.order)
    done: list[QuantizedRows] = []
    for block in blocks(0, len(left)):
        before = root[: block.start, block].mT @ left[: block.start]
        for t in range(block.start, block.stop):
            inside = slice(block.start, t)
            cost = before[t - block.start] + root[inside, t] @ left[inside]
            rows = weights_alone(left[t, None] + cost / root[t, t], spec)
            left[t] -= values_of(rows, spec, left.shape[1])[0]
            done.append(rows)
    return joined([done[place] for place in factor.order.argsort().tolist()])


def weights_alone(weight: Tensor, spec: LayerSpec) -> QuantizedRows:
    """Rows (rows, columns) float32 on the grid of `spec`, whatever they are multiplied with."""
    method = "r2q" if spec.method == "r2q" else "clip"
    return quantizer(method)(weight, replace(spec, method=method))


def values_of(rows: QuantizedRows, spec: LayerSpec, columns: int) -> Tensor:
    """Q (rows, columns) float32."""
    shape = len(rows.codes), columns
    layout = Layout(shape=shape, bits=spec.bits, quant_axis=1, group_size=spec.group_size)
    return stored_weight(rows.packed("rows", "float32", layout.on(spec.grid)))

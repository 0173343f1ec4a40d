"""Rounding of one weight by optimum-quanto's MaxOptimizer. Knows nothing of files or clocks."""

from optimum.quanto import MaxOptimizer, WeightQBitsTensor, qint2, qint4, quantize_weight
from torch import Tensor

QTYPES = {2: qint2, 4: qint4}


def quantize(weight: Tensor, bits: int, group_size: int) -> WeightQBitsTensor:
    """Round to nearest, packed, with float shifts: what quanto's own layers do when frozen."""
    scale, shift = MaxOptimizer()(weight, QTYPES[bits], 0, group_size)
    return quantize_weight(weight, QTYPES[bits], 0, scale, shift, group_size)


def stored(quantized: WeightQBitsTensor) -> list[Tensor]:
    return [quantized._data._data, quantized._scale, quantized._shift]  # noqa: SLF001 quanto has no public names


def restore(quantized: WeightQBitsTensor) -> Tensor:
    return quantized.dequantize()

"""Rounding of one weight by optimum-quanto's MaxOptimizer. Knows nothing of files or clocks."""

from optimum.quanto import (
    AbsmaxOptimizer,
    MaxOptimizer,
    WeightQBitsTensor,
    WeightQBytesTensor,
    qint2,
    qint4,
    qint8,
    quantize_weight,
)
from torch import Tensor

QTYPES = {2: qint2, 4: qint4}


def quantize(weight: Tensor, bits: int, group_size: int) -> WeightQBitsTensor:
    """Round to nearest, packed, with float shifts: what quanto's own layers do when frozen."""
    scale, shift = MaxOptimizer()(weight, QTYPES[bits], 0, group_size)
    return quantize_weight(weight, QTYPES[bits], 0, scale, shift, group_size)


def quantize_rows(weight: Tensor, bits: int) -> WeightQBytesTensor:  # noqa: ARG001 - 8
    """8 bits with one scale a row, likewise."""
    return quantize_weight(weight, qint8, 0, AbsmaxOptimizer()(weight, qint8, 0))


def stored(quantized: WeightQBitsTensor | WeightQBytesTensor) -> list[Tensor]:
    if isinstance(quantized, WeightQBytesTensor):
        return [quantized._data, quantized._scale]  # noqa: SLF001 quanto has no public names
    return [quantized._data._data, quantized._scale, quantized._shift]  # noqa: SLF001


def restore(quantized: WeightQBitsTensor | WeightQBytesTensor) -> Tensor:
    return quantized.dequantize()

"""Rounding of one weight by torchao's IntxWeightOnlyConfig tensor. Knows nothing of files or clocks."""

import torch
from torch import Tensor
from torchao.quantization import MappingType
from torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor import IntxUnpackedToInt8Tensor


def quantize(weight: Tensor, bits: int, group_size: int) -> IntxUnpackedToInt8Tensor:
    """Round to nearest with integer zero points; every code takes a whole byte.

    Its only affine 2-bit tensor on a CPU. The packed 4-bit one
    (Int4OpaqueTensor) is slower and cannot be dequantized.
    """
    return IntxUnpackedToInt8Tensor.from_hp(
        weight,
        (1, group_size),
        getattr(torch, f"int{bits}"),
        mapping_type=MappingType.ASYMMETRIC,
    )


def stored(quantized: IntxUnpackedToInt8Tensor) -> list[Tensor]:
    return [quantized.qdata, quantized.scale, quantized.zero_point]


def restore(quantized: IntxUnpackedToInt8Tensor) -> Tensor:
    return quantized.dequantize()

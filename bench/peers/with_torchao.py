"""Rounding of one weight by torchao's tensors. Knows nothing of files or clocks."""

import torch
from torch import Tensor, nn
from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, MappingType, quantize_
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


def quantize_layer(weight: Tensor, bits: int) -> Tensor:
    """What quantize_ makes of a layer's weight by Int8WeightOnlyConfig, or Int4WeightOnlyConfig, as they come."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight if bits == 8 else weight.bfloat16())
    quantize_(layer, Int8WeightOnlyConfig() if bits == 8 else Int4WeightOnlyConfig())
    if type(layer.weight) is nn.Parameter:
        raise ValueError(f"quantize_ left {tuple(weight.shape)} as it was, without a word")
    return layer.weight


def stored(quantized: Tensor) -> list[Tensor]:
    tensors = (quantized.qdata, quantized.scale, quantized.zero_point)
    return [tensor for tensor in tensors if tensor is not None]


def restore(quantized: Tensor) -> Tensor:
    return quantized.dequantize()

"""Rounding of one weight by SDNQ, by default without SVD or codebook. Knows nothing of files or clocks."""

from sdnq.dequantizer import SDNQDequantizer
from sdnq.quantizer import sdnq_quantize_layer_weight
from torch import Tensor

Quantized = tuple[SDNQDequantizer, dict[str, Tensor | None]]


def quantize(weight: Tensor, bits: int, group_size: int, **options: bool) -> Quantized:
    """Round to nearest, packed, with float zero points; the function beneath sdnq_quantize_layer. 0: its own groups."""
    return sdnq_quantize_layer_weight(weight, "Linear", f"uint{bits}", group_size=group_size, **options)


def stored(quantized: Quantized) -> list[Tensor]:
    return [tensor for tensor in quantized[1].values() if tensor is not None]


def restore(quantized: Quantized) -> Tensor:
    dequantizer, tensors = quantized
    return dequantizer(**tensors, skip_compile=True)

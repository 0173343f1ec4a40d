"""Rounding of one weight by HQQ's Quantizer. Knows nothing of files or clocks."""

from typing import Any

import torch
from hqq.core.quantize import Quantizer
from torch import Tensor

Quantized = tuple[Tensor, dict[str, Any]]


def quantize(weight: Tensor, bits: int, group_size: int) -> Quantized:
    """Round to nearest, packed, groups along the inputs (axis 1 is also HQQ's faster axis)."""
    return Quantizer.quantize(weight, nbits=bits, group_size=group_size, axis=1, optimize=False, device="cpu")


def quantize_optimized(weight: Tensor, bits: int, group_size: int) -> Quantized:
    """The same after HQQ's own search for zero points, which is what HQQ does by default."""
    return Quantizer.quantize(weight, nbits=bits, group_size=group_size, axis=1, optimize=True, device="cpu")


def quantize_as_stored(weight: Tensor, bits: int, group_size: int) -> Quantized:
    """The same as HQQLinear keeps it by default: scales and zero points in half."""
    codes, grid = quantize_optimized(weight, bits, group_size)
    return codes, grid | {name: grid[name].half() for name in ("scale", "zero")}


def stored(quantized: Quantized) -> list[Tensor]:
    codes, grid = quantized
    return [codes, grid["scale"], grid["zero"]]


def restore(quantized: Quantized) -> Tensor:
    codes, grid = quantized
    return Quantizer.dequantize(codes, grid | {"compute_dtype": torch.float32})

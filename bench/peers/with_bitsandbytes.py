"""Rounding of one weight by bitsandbytes. Knows nothing of files or clocks."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from bitsandbytes import functional
from torch import Tensor


@dataclass(frozen=True)
class Quantized:
    """What is stored, and how it is restored."""

    tensors: list[Tensor]
    restore: Callable[[], Tensor]


def quantize(weight: Tensor, bits: int, kind: str, *, double: bool = False) -> Quantized:
    """NF4 and FP4 in blocks of 64, absmax in float32 or, doubled, in 8 bits again; or int8 by rows, as Linear8bitLt."""
    if kind == "int8":
        codes, scales, _ = functional.int8_vectorwise_quant(weight.half())
        return Quantized([codes, scales], lambda: functional.int8_vectorwise_dequant(codes, scales))
    codes, state = functional.quantize_4bit(weight, quant_type=f"{kind}{bits}", compress_statistics=double)
    more = [state.offset, state.state2.absmax, state.state2.code] if double else []
    return Quantized([codes, state.absmax, state.code, *more], lambda: functional.dequantize_4bit(codes, state))


def stored(quantized: Quantized) -> list[Tensor]:
    return quantized.tensors


def restore(quantized: Quantized) -> Tensor:
    return quantized.restore().to(torch.float32)

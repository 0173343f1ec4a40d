"""What GPTQ's file format stores of a weight that was restored already: tensors of those sizes, without values."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Quantized:
    """Weights as they are restored, and tensors of the sizes that the file format stores."""

    restored: Tensor
    tensors: list[Tensor]


def stored(quantized: Quantized) -> list[Tensor]:
    return quantized.tensors


def restore(quantized: Quantized) -> Tensor:
    return quantized.restored


def bits_of_weight(bits: int, group_size: int) -> float:
    """A code, and its share of a scale in half and of a zero."""
    return bits + (16 + bits) / group_size


def as_stored(weight: Tensor, bits: int, groups: int) -> list[Tensor]:
    """Codes and zeros packed, scales in half."""
    codes, zeros = (
        torch.empty(number * bits // 8, dtype=torch.uint8, device="meta") for number in (weight.numel(), groups)
    )
    return [codes, zeros, torch.empty(groups, dtype=torch.float16, device="meta")]

"""What GPTQ's file format stores of a weight that was restored already: tensors of those sizes, without values."""

import torch
from torch import Tensor


def as_stored(weight: Tensor, bits: int, groups: int) -> list[Tensor]:
    """Codes and zeros packed, scales in half."""
    codes, zeros = (
        torch.empty(number * bits // 8, dtype=torch.uint8, device="meta") for number in (weight.numel(), groups)
    )
    return [codes, zeros, torch.empty(groups, dtype=torch.float16, device="meta")]

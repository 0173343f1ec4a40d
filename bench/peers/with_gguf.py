"""Rounding of one weight by the `gguf` package alone. Knows nothing of files or clocks."""

from dataclasses import dataclass

import numpy as np
import torch
from gguf import GGMLQuantizationType, quants
from torch import Tensor


@dataclass(frozen=True)
class Quantized:
    """Blocks as the file stores them."""

    blocks: Tensor
    kind: GGMLQuantizationType


def quantize(weight: Tensor, bits: int, kind: str) -> Quantized:  # noqa: ARG001 - the kind tells
    """NotImplementedError where the package can only read that kind."""
    found = GGMLQuantizationType[kind]
    try:
        blocks = quants.quantize(np.ascontiguousarray(weight.numpy()), found)
    except NotImplementedError as error:
        raise NotImplementedError(f"gguf.quants.quantize cannot make {kind}, only read it") from error
    except quants.QuantError as error:
        raise ValueError(f"QuantError: {error}") from error
    return Quantized(torch.from_numpy(blocks), found)


def stored(quantized: Quantized) -> list[Tensor]:
    return [quantized.blocks]


def restore(quantized: Quantized) -> Tensor:
    return torch.from_numpy(quants.dequantize(quantized.blocks.numpy(), quantized.kind))

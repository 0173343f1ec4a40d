"""Input channels turned in blocks: signs by a hash of the channel, then Hadamard; knows nothing of codes or files.

turn(v) = (v * sign) @ Hadamard(block) / sqrt(block) for every block of consecutive channels. It is orthogonal: a layer
whose weight and input are both turned gives what it gave before, and outliers are spread over the block.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch

from arrow_quant_v2.kernels import ops

if TYPE_CHECKING:
    from torch import Tensor


@lru_cache(maxsize=32)
def signs(channels: int) -> Tensor:
    """(channels,) float32, not to be changed: -1 where the lowest bit of lowbias32(channel) is set, otherwise 1.

    lowbias32 (Chris Wellons, 2018) mixes 32 bits: x ^= x >> 16; x *= 0x7feb352d; x ^= x >> 15; x *= 0x846ca68b;
    x ^= x >> 16.
    """
    x = np.arange(channels, dtype=np.uint32)
    x ^= x >> np.uint32(16)
    x *= np.uint32(0x7FEB352D)
    x ^= x >> np.uint32(15)
    x *= np.uint32(0x846CA68B)
    x ^= x >> np.uint32(16)
    return torch.from_numpy(1.0 - 2.0 * (x & np.uint32(1)).astype(np.float32))


def turn(x: Tensor, block: int, axis: int = -1) -> Tensor:
    """Float32 x with the channels along `axis` turned in blocks.

    Raises:
        QuantizationError: x is not float32, or the block is no power of two from 8 to 1024 that divides the channels.
    """
    last = x.movedim(axis, -1)
    turned: Tensor = ops.hadamard(last * signs(last.shape[-1]).to(x.device), block)
    return turned.movedim(-1, axis)


def unturn(x: Tensor, block: int, axis: int = -1) -> Tensor:
    """The inverse of `turn`, but for rounding.

    Raises:
        QuantizationError: as `turn`.
    """
    last = x.movedim(axis, -1)
    turned: Tensor = ops.hadamard(last, block)
    return (turned * signs(last.shape[-1]).to(x.device)).movedim(-1, axis)

"""Convolutions with packed weights on the CPU: by our C++ kernel, those of groups of channels by torch's."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from arrow_quant_v2.kernels import convolution as meaning
from arrow_quant_v2.kernels import linear_cpu, ops
from arrow_quant_v2.kernels.convolution import How
from arrow_quant_v2.kernels.linear_cpu import DTYPES, NUMBER, POINTER, SIZE, Operand

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

TAKEN = (
    *(POINTER,) * 4, SIZE, SIZE, NUMBER, SIZE, NUMBER,  # as of linear_cpu.OPERANDS
    POINTER, NUMBER, *(POINTER,) * 4, NUMBER,  # inputs and their dtype; sizes, equalization, bias, result; threads
)  # fmt: skip


def register(library: ctypes.CDLL, threads: Callable[[], int]) -> None:
    """Let the dispatcher use the kernel for CPU tensors; `threads` tells how many a call may use."""
    library.aq_convolve.argtypes = TAKEN
    library.aq_convolve.restype = None
    kernel = Kernel(library, threads)

    def convolution_cpp(x: Tensor, *given: Any) -> Tensor:
        of_weight, how, optional = given[:8], How.of(*given[8:13]), given[13:]
        divisors = optional[0] if optional else None
        weight = meaning.asked(x, *of_weight, how, divisors)
        return kernel(x, Operand.of(weight), weight.bias, how, divisors)

    ops.register_kernel("convolution", "CPU", convolution_cpp)
    STRAIGHT[meaning.convolution] = kernel


STRAIGHT: dict[object, Kernel] = {}
"""The kernel, once it is registered, for operands that were checked before."""


def straight(x: Tensor, operand: Operand, bias: Tensor | None, how: How, equalization: Tensor | None) -> Tensor:
    """What the op gives of a checked weight, by its kernel itself; see `linear_cpu.straight`.

    Raises:
        QuantizationError: x, the bias or the equalization does not fit the weight.
    """
    _check_sizes(x.dtype, x.shape, operand.weight.rows, operand.weight.columns, how)
    meaning.check_added(x, operand.weight, bias, equalization)
    return STRAIGHT[meaning.convolution](x, operand, bias, how, equalization)


_check_sizes = lru_cache(maxsize=1024)(meaning.check_sizes)  # what passed once passes again


@dataclass(frozen=True)
class Kernel:
    """The C++ library, and how many threads a call of it may use."""

    library: ctypes.CDLL
    threads: Callable[[], int]

    def __call__(
        self, x: Tensor, operand: Operand, bias: Tensor | None, how: How, equalization: Tensor | None
    ) -> Tensor:
        """(batch, channels, *in) to (batch, rows, *out)."""
        weight = operand.weight
        sizes = sizes_of(x.shape, how)
        fits = linear_cpu.groups_start_on_bytes(weight) or not self.library.aq_multiplies_blocks()
        if how.groups > 1 or not fits or not x.numel() or not weight.rows:
            return self._by_torch(x, operand, bias, how, equalization)
        y = torch.empty((x.shape[0], weight.rows, *sizes.out), dtype=x.dtype)
        inputs, added = x.contiguous(), None if bias is None else bias.float().contiguous()
        scales = None if equalization is None else equalization.contiguous()
        optional = [None if tensor is None else tensor.data_ptr() for tensor in (scales, added)]
        given = (inputs.data_ptr(), DTYPES[x.dtype], sizes.numbers, *optional, y.data_ptr())
        self.library.aq_convolve(*operand.told, *given, self.threads())
        return y

    def _by_torch(
        self, x: Tensor, operand: Operand, bias: Tensor | None, how: How, equalization: Tensor | None
    ) -> Tensor:
        """In float32 where no matrix unit multiplies bfloat16: there torch takes a hundred times as long in 16 bits."""
        dtype = x.dtype if self.library.aq_multiplies_blocks() else torch.float32
        values = linear_cpu.values(_dequantize(operand.weight.grid), operand, dtype)
        return meaning.with_values(meaning.equalized(x, equalization).to(dtype), values, bias, how).to(x.dtype)


def _dequantize(grid: str) -> Callable[..., Tensor]:
    return ops.dequantize_r2q if grid == "r2q" else ops.dequantize


class Sizes(NamedTuple):
    """What the library is told of the sizes of a call, and those of its result."""

    numbers: ctypes.Array[ctypes.c_int64]
    out: tuple[int, ...]


@lru_cache(maxsize=1024)
def sizes_of(shape: torch.Size, how: How) -> Sizes:
    """Of x of that shape; axes that are missing have size 1."""
    out = how.out(shape[2:])
    inside = tuple(shape[2:])
    if set(how.kernel + how.stride) == {1} and set(how.padding) == {0}:  # positions know no axes
        inside, how = (prod(inside),), How((1,), (1,), (0,), (1,), how.groups)
    rest = meaning.MOST_AXES - len(how.kernel)

    def three(numbers: Sequence[int], missing: int) -> list[int]:
        return [missing] * rest + list(numbers)

    moved = (*three(how.stride, 1), *three(how.padding, 0), *three(how.dilation, 1))
    numbers = (*shape[:2], *three(inside, 1), *three(how.kernel, 1), *moved)
    return Sizes((ctypes.c_int64 * len(numbers))(*numbers), out)

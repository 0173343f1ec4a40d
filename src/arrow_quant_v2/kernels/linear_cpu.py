"""Products with packed weights on the CPU: which C++ kernel, or torch product of tiles, takes which shape."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from arrow_quant_v2.kernels import linear as meaning
from arrow_quant_v2.kernels import ops

if TYPE_CHECKING:
    from collections.abc import Callable

    from arrow_quant_v2.kernels.linear import Weight

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""What the library calls them."""
MOST_DIRECT = 4
"""Rows of x up to which codes are multiplied as they are read; more are worth decoded rows."""
MOST_IN_PIECES = 2
"""The same where inputs go as they are to whole numbers, three for each, and there is a matrix unit."""
MOST_IN_PANELS = 256
"""Rows of x up to which our product of dequantized rows is faster than torch's of tiles."""
MOST_IN_GROUP = 1 << 16
"""Columns of a group whose whole numbers still fit in 32 bits."""
AS_IT_IS, BY_GROUP, BY_SCALE = 0, 1, 2
"""What the library calls the roundings of x."""
TILE_VALUES = 1 << 21
"""Weights of one dequantized tile: 8 MB of float32, which stays in the cache."""


def groups_start_on_bytes(weight: Weight) -> bool:
    """Whether a kernel can read the groups of a row one by one."""
    return weight.group == weight.columns or weight.group * weight.bits % 8 == 0


def by_tiles(x: Tensor, weight: Weight) -> Tensor:
    """Give x W^T + bias of float32 x (count, columns), by torch's product with a tile of W at a time."""
    y = x.new_empty((len(x), weight.rows))
    step = max(1, TILE_VALUES // max(1, weight.columns))
    for start in range(0, weight.rows, step):
        stop = min(start + step, weight.rows)
        torch.mm(x, weight.values(start, stop).T, out=y[:, start:stop])
    return y if weight.bias is None else y.add_(weight.bias.float())


POINTER, SIZE, NUMBER = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
OPERANDS = (
    *(POINTER,) * 4, SIZE, SIZE, NUMBER, SIZE, NUMBER,  # codes to row scales; rows, columns, bits, group, grid
    POINTER, NUMBER, SIZE, POINTER, POINTER,  # inputs, their dtype and count; bias; result
)  # fmt: skip
"""What every kernel of the library takes."""
STEP = (ctypes.c_float, NUMBER)
FURTHER = {
    "aq_linear": (NUMBER,),
    "aq_linear_tiled": (NUMBER,),
    "aq_linear_rounded": (*STEP, NUMBER),
    "aq_linear_rounded_tiled": (*STEP, NUMBER),
    "aq_linear_blocks": (NUMBER, *STEP, NUMBER),
}
"""What some take besides: how inputs are rounded, their step and its zero point; all take the number of threads."""


def declare(library: ctypes.CDLL) -> None:
    """Tell ctypes what the kernels take, which makes a call of them half as long."""
    for name, further in FURTHER.items():
        getattr(library, name).argtypes = (*OPERANDS, *further)
        getattr(library, name).restype = None


def register(library: ctypes.CDLL, threads: Callable[[], int]) -> None:
    """Let the dispatcher use these kernels for CPU tensors; `threads` tells how many a call may use."""
    declare(library)
    kernels = Kernels(library=library, threads=threads)

    def linear_cpp(x: Tensor, *given: Any) -> Tensor:
        return _product(x, meaning.asked("linear", x, *given), kernels.exact)

    def linear_dynamic_cpp(x: Tensor, *given: Any) -> Tensor:
        return _product(x, meaning.asked("linear_dynamic", x, *given), kernels.dynamic)

    def linear_static_cpp(x: Tensor, *given: Any) -> Tensor:
        *of_weight, scale, zero_point = given
        weight = meaning.asked("linear_static", x, *of_weight)
        meaning.check_static(scale, zero_point)
        return _product(x, weight, partial(kernels.static, scale=scale, zero_point=zero_point))

    for kernel in (linear_cpp, linear_dynamic_cpp, linear_static_cpp):
        ops.register_kernel(kernel.__name__.removesuffix("_cpp"), "CPU", kernel)


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """The C++ library, and how many threads a call of it may use; x is (count, columns)."""

    library: ctypes.CDLL
    threads: Callable[[], int]

    def exact(self, x: Tensor, weight: Weight) -> Tensor:
        """Multiply x as it is."""
        if len(x) > MOST_IN_PIECES and self._have_blocks(weight):
            return self._blocks(x, weight, AS_IT_IS)
        if len(x) > MOST_IN_PANELS or not groups_start_on_bytes(weight) or weight.group > MOST_IN_GROUP:
            return by_tiles(x.float(), weight)
        kernel = self.library.aq_linear if len(x) <= MOST_DIRECT else self.library.aq_linear_tiled
        return _call(kernel, x, weight, self.threads())

    def dynamic(self, x: Tensor, weight: Weight) -> Tensor:
        """Multiply x rounded by group."""
        if len(x) > MOST_DIRECT and self._have_blocks(weight):
            return self._blocks(x, weight, BY_GROUP)
        kernel = self._of_whole_numbers(len(x), weight)
        if kernel is None:
            return self.exact(meaning.rounded_by_group(x, weight.group), weight)
        return _call(kernel, x, weight, 0.0, 0, self.threads())

    def static(self, x: Tensor, weight: Weight, scale: float, zero_point: int) -> Tensor:
        """Multiply x rounded with one scale."""
        if len(x) > MOST_DIRECT and self._have_blocks(weight) and ctypes.c_float(scale).value > 0.0:
            return self._blocks(x, weight, BY_SCALE, scale, zero_point)
        kernel = self._of_whole_numbers(len(x), weight)
        if kernel is None or ctypes.c_float(scale).value == 0.0:
            return self.exact(meaning.rounded_by_scale(x, scale, zero_point), weight)
        return _call(kernel, x, weight, scale, zero_point, self.threads())

    def _have_blocks(self, weight: Weight) -> bool:
        """Whether a matrix unit takes this: in bfloat16, as groups are too short for its whole numbers."""
        return bool(groups_start_on_bytes(weight) and self.library.aq_multiplies_blocks())

    def _blocks(self, x: Tensor, weight: Weight, rounded: int, scale: float = 0.0, zero_point: int = 0) -> Tensor:
        how = (rounded, scale, zero_point, self.threads())
        return _call(self.library.aq_linear_blocks, x, weight, *how, dtype=x.dtype)

    def _of_whole_numbers(self, count: int, weight: Weight) -> Callable[..., None] | None:
        """The kernel for so many rows of x in 8 bits; None where floats are as fast."""
        if not groups_start_on_bytes(weight) or weight.group > MOST_IN_GROUP:
            return None
        if count <= MOST_DIRECT:
            return self.library.aq_linear_rounded
        fast = weight.grid == "affine" and (weight.group % 4 == 0 or weight.group == weight.columns)
        return (
            self.library.aq_linear_rounded_tiled if fast and self.library.aq_tiles_whole_numbers(weight.bits) else None
        )


def _product(x: Tensor, weight: Weight, kernel: Callable[[Tensor, Weight], Tensor]) -> Tensor:
    """(..., columns) to (..., rows) of the same dtype."""
    if not x.numel() or not weight.rows:
        return _empty_product(x, weight)
    y = kernel(x.reshape(-1, weight.columns), weight)
    return y.to(x.dtype).reshape(*x.shape[:-1], weight.rows)


def _empty_product(x: Tensor, weight: Weight) -> Tensor:
    """The result where x or W has no values: nothing, or the bias alone."""
    nothing = x.new_zeros((weight.rows, weight.columns))
    return functional.linear(x, nothing, None if weight.bias is None else weight.bias.to(x.dtype))


def _call(
    kernel: Callable[..., None], x: Tensor, weight: Weight, *further: Any, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Call a kernel that takes any number of rows of x, and gives a result of that dtype."""
    y, inputs = torch.empty((len(x), weight.rows), dtype=dtype), x.contiguous()
    kept = [part.contiguous() for part in weight.stored]
    bias = None if weight.bias is None else weight.bias.float().contiguous()
    kernel(
        *[part.data_ptr() for part in kept],  # 0, no address, where there are no values
        weight.rows,
        weight.columns,
        weight.bits,
        weight.group,
        weight.grid == "r2q",
        inputs.data_ptr(),
        DTYPES[x.dtype],
        len(x),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        *further,
    )
    return y


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    """Where its values lie; the tensor has to outlive the call."""
    return ctypes.c_void_p(tensor.data_ptr())

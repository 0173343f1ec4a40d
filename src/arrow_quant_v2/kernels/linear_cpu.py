"""Values and products of packed weights on the CPU: which C++ kernel, or torch product of tiles, takes which shape."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

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
"""Rows of x up to which our product of dequantized rows is faster than torch's of tiles; that of bytes always is."""
MOST_IN_GROUP = 1 << 16
"""Columns of a group whose whole numbers still fit in 32 bits."""
AS_IT_IS = (0, 0.0, 0)
"""What the library calls x that is not rounded."""
TILE_VALUES = 1 << 21
"""Weights of one dequantized tile: 8 MB of float32, which stays in the cache."""


def groups_start_on_bytes(weight: Weight) -> bool:
    """Whether a kernel can read the groups of a row one by one."""
    return weight.group_size * weight.bits % 8 == 0 or weight.group_size >= weight.columns


def by_tiles(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """Give x W^T + bias of x (count, columns), in its dtype by torch's product of float32 by tiles of W."""
    y = x.new_empty((len(x), weight.rows))
    inputs, step = x.float(), max(1, TILE_VALUES // max(1, weight.columns))
    for start in range(0, weight.rows, step):
        stop = min(start + step, weight.rows)
        sums = inputs @ weight.values(start, stop).T
        y[:, start:stop] = sums if bias is None else sums.add_(bias[start:stop])
    return y


POINTER, SIZE, NUMBER = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
OPERANDS = (
    *(POINTER,) * 4, SIZE, SIZE, NUMBER, SIZE, NUMBER,  # codes to row scales; rows, columns, bits, group, grid
    POINTER, NUMBER, SIZE, POINTER, POINTER,  # inputs, their dtype and count; bias; result
)  # fmt: skip
"""What every kernel of the library takes."""
MEETS_BYTES = (SIZE, NUMBER, SIZE, NUMBER, NUMBER, SIZE)
"""What the question takes whether x meets tiles of bytes: columns, bits, group, grid; dtype and count of x."""
ROUNDING = (SIZE, ctypes.c_float, NUMBER)
FURTHER = {
    "aq_linear": (NUMBER,),
    "aq_linear_tiled": (NUMBER,),
    "aq_linear_rounded": (*ROUNDING, NUMBER),
    "aq_linear_rounded_tiled": (*ROUNDING, NUMBER),
    "aq_linear_blocks": (*ROUNDING, NUMBER),
}
"""What some take besides: how inputs are rounded (run, step or 0, zero point); all take the number of threads."""


VALUES = (*(POINTER,) * 5, NUMBER, SIZE, SIZE, NUMBER, SIZE, NUMBER)
"""What those take that dequantize: codes to row scales, result; its dtype, rows, columns, bits, group, threads."""


def declare(library: ctypes.CDLL) -> None:
    """Tell ctypes what the kernels take, which makes a call of them half as long."""
    taken = {name: (*OPERANDS, *further) for name, further in FURTHER.items()}
    for name, types in (taken | {"aq_dequantize": VALUES, "aq_dequantize_r2q": VALUES}).items():
        getattr(library, name).argtypes = types
        getattr(library, name).restype = None
    library.aq_tiles_bytes.argtypes = MEETS_BYTES


def register(library: ctypes.CDLL, threads: Callable[[], int]) -> None:
    """Let the dispatcher use these kernels for CPU tensors; `threads` tells how many a call may use."""
    declare(library)
    kernels = Kernels(library=library, threads=threads)

    def linear_cpp(x: Tensor, *given: Any) -> Tensor:
        weight = meaning.asked("linear", x, *given)
        return _product(kernels.exact, x, Operand.of(weight), weight.bias)

    def linear_dynamic_cpp(x: Tensor, *given: Any) -> Tensor:
        weight = meaning.asked("linear_dynamic", x, *given)
        return _product(kernels.dynamic, x, Operand.of(weight), weight.bias)

    def linear_static_cpp(x: Tensor, *given: Any) -> Tensor:
        *of_weight, scale, zero_point = given
        weight = meaning.asked("linear_static", x, *of_weight)
        meaning.check_static(scale, zero_point)
        return _product(kernels.static, x, Operand.of(weight), weight.bias, scale, zero_point)

    def dequantize_cpp(*given: Any) -> Tensor:
        return kernels.values(*_dequantized("dequantize", "affine", *given))

    def dequantize_r2q_cpp(*given: Any) -> Tensor:
        return kernels.values(*_dequantized("dequantize_r2q", "r2q", *given))

    for kernel in (linear_cpp, linear_dynamic_cpp, linear_static_cpp, dequantize_cpp, dequantize_r2q_cpp):
        ops.register_kernel(kernel.__name__.removesuffix("_cpp"), "CPU", kernel)
    STRAIGHT.update({meaning.linear: kernels.exact, meaning.linear_dynamic: kernels.dynamic})
    STRAIGHT.update(dict.fromkeys((ops.dequantize, ops.dequantize_r2q), kernels.values))


STRAIGHT: dict[object, Callable[..., Tensor]] = {}
"""The kernels of ops whose operands were checked before, once they are registered."""


@dataclass(frozen=True, eq=False)
class Operand:
    """A weight that was checked: where its parts lie, and what else every kernel is told of it."""

    weight: Weight
    parts: tuple[Tensor, Tensor, Tensor, Tensor]
    told: tuple[int, ...]

    @classmethod
    def of(cls, weight: Weight) -> Operand:
        """Of a weight that `asked` has let pass."""
        parts = cast("tuple[Tensor, Tensor, Tensor, Tensor]", tuple(part.contiguous() for part in weight.stored))
        addresses = [part.data_ptr() for part in parts]  # 0, no address, where there are no values
        sizes = (weight.rows, weight.columns, weight.bits, max(1, weight.group), weight.grid == "r2q")
        return cls(weight, parts, (*addresses, *sizes))

    def is_that_of(self, codes: Tensor, scales: Tensor, zero_points: Tensor, row_scales: Tensor) -> bool:
        """Whether these are its tensors still, where they were."""
        mine, told = self.parts, self.told
        return (
            codes is mine[0]
            and scales is mine[1]
            and zero_points is mine[2]
            and row_scales is mine[3]
            and codes.data_ptr() == told[0]
            and scales.data_ptr() == told[1]
            and zero_points.data_ptr() == told[2]
            and row_scales.data_ptr() == told[3]
        )


def straight(op: object, x: Tensor, weight: Operand, bias: Tensor | None) -> Tensor:
    """What an op gives of a checked weight, by its kernel itself.

    The dispatcher, and checks of a weight, take as long as a product of a few hundred columns.

    Raises:
        QuantizationError: x or the bias does not fit the weight.
    """
    meaning.check_inputs("linear", x, weight.weight, bias)
    return _product(STRAIGHT[op], x, weight, bias)


def values(op: object, weight: Operand, dtype: torch.dtype) -> Tensor:
    """A checked weight (rows, columns) as `op`, which dequantizes, gives it, by its kernel itself."""
    return STRAIGHT[op](weight, dtype)


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """The C++ library, and how many threads a call of it may use; x has `count` rows (..., columns)."""

    library: ctypes.CDLL
    threads: Callable[[], int]

    def exact(self, x: Tensor, count: int, operand: Operand, bias: Tensor | None) -> Tensor:
        """Multiply x as it is."""
        weight = operand.weight
        direct = groups_start_on_bytes(weight)
        if count > MOST_IN_PIECES and direct and self.library.aq_multiplies_blocks():
            return self._blocks(x, count, operand, bias, *AS_IT_IS)
        if not direct or weight.group > MOST_IN_GROUP or not self._faster_than_torch(x, count, weight):
            return by_tiles(x.reshape(count, -1), weight, bias).reshape(*x.shape[:-1], -1)
        kernel = self.library.aq_linear if count <= MOST_DIRECT else self.library.aq_linear_tiled
        return _call(kernel, x, count, operand, bias, self.threads())

    def dynamic(self, x: Tensor, count: int, operand: Operand, bias: Tensor | None) -> Tensor:
        """Multiply x rounded by run."""
        run = operand.weight.run
        if self._have_blocks(count, operand.weight):
            return self._blocks(x, count, operand, bias, run, 0.0, 0)
        kernel = self._of_rounded(count, operand.weight)
        if kernel is None:
            return self.exact(meaning.rounded_by_run(x, run), count, operand, bias).to(x.dtype)
        return _call(kernel, x, count, operand, bias, run, 0.0, 0, self.threads())

    def static(
        self, x: Tensor, count: int, operand: Operand, bias: Tensor | None, scale: float, zero_point: int
    ) -> Tensor:
        """Multiply x rounded with one scale."""
        run, vanishes = operand.weight.run, ctypes.c_float(scale).value == 0.0
        if not vanishes and self._have_blocks(count, operand.weight):
            return self._blocks(x, count, operand, bias, run, scale, zero_point)
        kernel = self._of_rounded(count, operand.weight)
        if kernel is None or vanishes:
            return self.exact(meaning.rounded_by_scale(x, scale, zero_point), count, operand, bias).to(x.dtype)
        return _call(kernel, x, count, operand, bias, run, scale, zero_point, self.threads())

    def values(self, operand: Operand, dtype: torch.dtype) -> Tensor:
        """Dequantize."""
        weight, (*addresses, rows, columns, bits, group, _) = operand.weight, operand.told
        made = torch.empty((rows, columns), dtype=dtype)
        kernel = self.library.aq_dequantize_r2q if weight.grid == "r2q" else self.library.aq_dequantize
        kernel(*addresses, made.data_ptr(), DTYPES[dtype], rows, columns, bits, group, self.threads())
        return made

    def _faster_than_torch(self, x: Tensor, count: int, weight: Weight) -> bool:
        """Whether so many rows of x as they are meet decoded rows here, and not torch's product of tiles."""
        if count <= MOST_IN_PANELS:
            return True
        how = (weight.bits, weight.group, weight.grid == "r2q", DTYPES[x.dtype])
        return bool(self.library.aq_tiles_bytes(weight.columns, *how, count))

    def _have_blocks(self, count: int, weight: Weight) -> bool:
        """Whether a matrix unit takes rounded inputs: in whole numbers or in bfloat16."""
        return bool(count > MOST_DIRECT and groups_start_on_bytes(weight) and self.library.aq_multiplies_blocks())

    def _blocks(
        self, x: Tensor, count: int, operand: Operand, bias: Tensor | None, run: int, scale: float, zero_point: int
    ) -> Tensor:
        how = (run, scale, zero_point, self.threads())
        return _call(self.library.aq_linear_blocks, x, count, operand, bias, *how)

    def _of_rounded(self, count: int, weight: Weight) -> Callable[..., None] | None:
        """The kernel for so many rows of x in 8 bits; None where x is rounded before."""
        if not groups_start_on_bytes(weight) or weight.group > MOST_IN_GROUP:
            return None
        return self.library.aq_linear_rounded if count <= MOST_DIRECT else self.library.aq_linear_rounded_tiled


def _dequantized(op: str, grid: str, *given: Any) -> tuple[Operand, torch.dtype]:
    """What `values` needs, of what follows in the schema of `dequantize`."""
    codes, scales, zero_points, row_scales, bits, columns, group_size, dtype = given
    stored = (codes, scales, zero_points, row_scales)
    ops.check_dequantize(op, *stored, bits, columns, group_size, dtype)
    return Operand.of(meaning.Weight(columns, *stored, None, bits, group_size, grid)), dtype


def _product(kernel: Callable[..., Tensor], x: Tensor, operand: Operand, bias: Tensor | None, *further: Any) -> Tensor:
    """(..., columns) to (..., rows) of the same dtype."""
    weight = operand.weight
    count = x.numel() // max(1, weight.columns)
    if not count or not weight.rows:
        return _empty_product(x, weight, bias)
    return kernel(x, count, operand, bias, *further)


def _empty_product(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """The result where x or W has no values: nothing, or the bias alone."""
    nothing = x.new_zeros((weight.rows, weight.columns))
    return functional.linear(x, nothing, None if bias is None else bias.to(x.dtype))


def _call(
    kernel: Callable[..., None], x: Tensor, count: int, operand: Operand, bias: Tensor | None, *further: Any
) -> Tensor:
    """Call a kernel that takes any number of rows of x."""
    y, inputs = torch.empty((*x.shape[:-1], operand.weight.rows), dtype=x.dtype), x.contiguous()
    added = None if bias is None else bias.float().contiguous()
    kernel(
        *operand.told,
        inputs.data_ptr(),
        DTYPES[x.dtype],
        count,
        None if added is None else added.data_ptr(),
        y.data_ptr(),
        *further,
    )
    return y


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    """Where its values lie; the tensor has to outlive the call."""
    return ctypes.c_void_p(tensor.data_ptr())

"""A weight that stays packed while torch code uses it as a tensor: codes as buffers, values made when asked for.

Knows how codes become values and products; knows neither files nor which layers there are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, get_autocast_dtype, is_autocast_enabled, nn
from torch.nn import functional
from torch.utils._pytree import tree_map_only

from arrow_quant_v2.errors import QuantizationError
from arrow_quant_v2.kernels import convolution, convolution_cpu, cpu, linear, linear_cpu, ops
from arrow_quant_v2.kernels.interception import nothing_between
from arrow_quant_v2.kernels.rotation import signs
from arrow_quant_v2.kernels.tensors import shared_tensor
from arrow_quant_v2.packed import GRIDS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from typing_extensions import Self

    from arrow_quant_v2.packed import PackedTensor

FLOATS = (*ops.FLOATS, torch.float64)
EXPERT_AXES = 3
CHECKED = "_checked"
"""Where a weight remembers what CPU kernels take of it."""


def _under_autocast(x: Tensor) -> Tensor:
    kind = x.device.type
    return x.to(get_autocast_dtype(kind)) if is_autocast_enabled(kind) else x


class PackedWeight(nn.Module):
    """Stands in a module where a parameter stood, and gives torch functions its values when they ask for them.

    codes         uint8 (rows, row_bytes)         scales        uint8 (rows, scales_per_row)
    zero_points   uint8 (rows, groups or 0)       row_scales    bfloat16 (rows,)
    equalization  float32 (channels,) or None     meaning       int64: what the codes mean, so that no other state fits

    They are those of PackedTensor, may lie in a read-only map of a file, and keep their dtypes whatever the model is
    cast to; the values have the dtype that the model was cast to. Two modules that hold the same PackedWeight are tied,
    also after a move or a copy. To torch it is a tensor of `shape`: `functional.linear` and `functional.embedding` use
    the codes, every other function is given `dequantized()`, an index into the first axis of three gives that
    expert alone, packed, and what would write into it is refused. Values have no gradient.
    """

    codes: Tensor
    scales: Tensor
    zero_points: Tensor
    row_scales: Tensor
    equalization: Tensor | None
    signs: Tensor | None
    meaning: Tensor
    like: Tensor
    _is_hf_initialized = True  # transformers shall not draw new values for it

    def __init__(self, *chunks: PackedTensor, dtype: torch.dtype | None = None) -> None:
        """All rows of one tensor, in order; values are of `dtype`, by default that of the original.

        Raises:
            QuantizationError: they are not all rows of one tensor, or `dtype` is no floating dtype.
        """
        super().__init__()
        cpu.activate()
        first, layout = chunks[0], chunks[0].layout
        if sum(chunk.rows for chunk in chunks) != layout.rows:
            found = sum(chunk.rows for chunk in chunks)
            raise QuantizationError(f"{first.name}: {found} rows were given of {layout.rows}; give all chunks of it")
        self.name, self.shape, self.rotation = first.name, torch.Size(layout.shape), first.rotation
        self.bits, self.grid, self.group_size = int(layout.bits), str(layout.grid), layout.group
        self.columns, self.channels = layout.columns, layout.channels or 1
        for name, buffer in _buffers(chunks).items():
            self.register_buffer(name, buffer)
        meaning = (self.bits, self.group_size, GRIDS.index(layout.grid), self.rotation or 0, *layout.shape)
        self.register_buffer("meaning", torch.tensor(meaning))
        turned = None if self.rotation is None else signs(self.channels).clone()
        self.register_buffer("signs", turned, persistent=False)
        self.register_buffer("like", torch.empty(0, dtype=_values_dtype(first, dtype)), persistent=False)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != CHECKED}  # which holds addresses

    def __setstate__(self, state: dict[str, Any]) -> None:
        cpu.activate()  # in the process that it was sent to
        super().__setstate__(state)  # type: ignore[no-untyped-call]

    # What a tensor can be asked

    @property
    def dtype(self) -> torch.dtype:
        """Of the values."""
        return self.like.dtype

    @property
    def device(self) -> torch.device:
        """Where the codes lie."""
        return self.codes.device

    @property
    def data(self) -> Tensor:
        """The values, fresh."""
        return self.dequantized()

    @data.setter
    def data(self, _: object) -> None:
        raise self.refusal("data is set")

    @property
    def requires_grad(self) -> bool:
        """Never: codes have no gradient."""
        return False

    def size(self, axis: int | None = None) -> Any:
        """The shape, or one axis of it."""
        return self.shape if axis is None else self.shape[axis]

    @property
    def has_basis(self) -> bool:
        """Whether the codes are those of turned or equalized input channels."""
        return self.rotation is not None or self._buffers["equalization"] is not None

    def numel(self) -> int:
        """How many values there are."""
        return self.shape.numel()

    def to(self, *arguments: Any, **keywords: Any) -> Any:
        """The values elsewhere or otherwise, as of a tensor; a model that is moved takes its packed weights with it."""
        return self.dequantized().to(*arguments, **keywords)

    def float(self) -> Any:
        """The values in float32."""
        return self.dequantized(torch.float32)

    def __getitem__(self, index: Any) -> Any:
        """Of three axes one expert (out, in), which shares the codes; otherwise what the values have there."""
        one = isinstance(index, int) or (isinstance(index, Tensor) and index.ndim == 0 and index.dtype != torch.bool)
        if len(self.shape) != EXPERT_AXES or not one:
            return self.dequantized()[index]
        if not -self.shape[0] <= int(index) < self.shape[0]:
            raise IndexError(f"{self.name}: expert {int(index)} of {self.shape[0]}")
        return self._expert(int(index) % self.shape[0])

    def _expert(self, number: int) -> PackedWeight:
        """A view on the rows of one expert."""
        count = self.codes.shape[0] // self.shape[0]
        rows = slice(number * count, (number + 1) * count)
        view = PackedWeight.__new__(PackedWeight)
        parts = ("codes", "scales", "zero_points", "row_scales")
        buffers = self._buffers | {name: getattr(self, name)[rows] for name in parts}
        view.__dict__ = self.__dict__ | {"shape": self.shape[1:], "_buffers": buffers}
        return view

    def __getattr__(self, name: str) -> Any:
        """Everything else that a tensor has, of the values."""
        if name.startswith("__") or not hasattr(Tensor, name) or "like" not in self.__dict__["_buffers"]:
            return super().__getattr__(name)
        if name.endswith("_"):
            raise self.refusal(f"{name} is called")
        return getattr(self.dequantized(), name)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Hand the values to a function of torch, or the codes to those that have an operator of their own."""
        given = dict(kwargs or {})
        weight = args[1] if len(args) > 1 and isinstance(args[1], cls) and isinstance(args[0], Tensor) else None
        if weight is not None and func is functional.embedding and given.get("max_norm") is None:
            return weight.looked_up(args[0])
        if weight is not None and func is functional.linear:
            return weight.product(args[0], *args[2:], **given)
        name = getattr(func, "__name__", "")
        written = args[0] if args else given.get("tensor")  # torch.nn.init names it
        if isinstance(written, cls) and name.endswith("_") and not name.endswith("__"):
            raise written.refusal(f"{name} is called")
        plain, named = tree_map_only(cls, lambda packed: packed.dequantized(), (tuple(args), given))
        return func(*plain, **named)

    def refusal(self, what: str) -> QuantizationError:
        """The error for what would write into the values."""
        return QuantizationError(
            f"{self.name}: {what}, but its values are {self.bits}-bit codes and cannot be written to; keep adapters"
            " beside it instead of merging them, or `convert` the model and change that"
        )

    # What it computes

    def dequantized(self, dtype: torch.dtype | None = None) -> Tensor:
        """The whole weight (*shape) as it was before it was coded, but for rounding; fresh."""
        return self.rows(None, dtype).reshape(self.shape)

    def rows(self, ids: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
        """Rows (n, columns) of the code matrix in the original basis: those of ids (n,), or all."""
        wanted = dtype or self.dtype
        if not self.has_basis:
            return self._coded(ids, wanted)
        return self._unchanged(self._coded(ids, torch.float32)).to(wanted)

    def _coded(self, ids: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Rows as the codes have them."""
        held = self._buffers
        parts: Any = held["codes"], held["scales"], held["zero_points"], held["row_scales"]
        dequantize: Any = ops.dequantize_r2q if self.grid == "r2q" else ops.dequantize
        made = dtype if dtype in ops.FLOATS else torch.float32
        if ids is not None:
            parts = [part.index_select(0, ids) for part in parts]
        elif dequantize in linear_cpu.STRAIGHT and parts[0].is_cpu and nothing_between(parts[0]):
            return linear_cpu.values(dequantize, self._operand(parts), made).to(dtype)
        coded: Tensor = dequantize(*parts, self.bits, self.columns, self.group_size, made)
        return coded.to(dtype)

    def _unchanged(self, coded: Tensor) -> Tensor:
        along = coded.unflatten(1, (self.channels, -1)).movedim(1, -1)  # (rows, kernel, channels)
        if self.rotation is not None and self.signs is not None:
            along = ops.hadamard(along, self.rotation) * self.signs
        if self.equalization is not None:
            along = along / self.equalization
        original: Tensor = along.movedim(-1, 1).flatten(1)
        return original

    def changed(self, x: Tensor) -> Tensor:
        """Inputs x (..., channels) as the codes of a matrix want them: divided by the equalization, then turned."""
        if not self.has_basis:
            return x
        changed = x.to(torch.float32)
        if self.equalization is not None:
            changed = changed / self.equalization
        if self.rotation is not None and self.signs is not None:
            changed = ops.hadamard(changed * self.signs, self.rotation)
        return changed

    def product(
        self, x: Tensor, bias: Tensor | None = None, op: Callable[..., Tensor] = linear.linear, *further: Any
    ) -> Tensor:
        """Give x W^T + bias (..., rows) of x (..., columns), by `op` of kernels/linear.py.

        In the dtype of x, or, under torch's autocast, in its dtype, as torch's own layers do.
        """
        x = _under_autocast(x)
        inputs = self.changed(x)
        if x.dtype == torch.bfloat16:  # which holds what float32 does; float16 might not
            inputs = inputs.to(x.dtype)
        held = self._buffers  # a look here costs a tenth of one through nn.Module
        parts: Any = held["codes"], held["scales"], held["zero_points"], held["row_scales"]
        if op in linear_cpu.STRAIGHT and parts[0].is_cpu and nothing_between(inputs):
            return linear_cpu.straight(op, inputs, self._operand(parts), bias).to(x.dtype)
        return op(inputs, *parts, bias, self.bits, self.group_size, self.grid, *further).to(x.dtype)

    def convolved(self, x: Tensor, bias: Tensor | None, how: convolution.How) -> Tensor:
        """Give x (batch, channels, *in) * W + bias (batch, rows, *out), of the dtype that `product` gives."""
        x = _under_autocast(x)
        inputs, equalization = x, self._buffers["equalization"]
        if self.has_basis and (how.groups != 1 or (self.rotation is not None and x.numel() >= self.numel())):
            return convolution.with_values(x, self.rows(None, x.dtype), bias, how)  # the smaller of both is turned
        if self.rotation is not None:
            inputs, equalization = self.changed(x.movedim(1, -1)).movedim(-1, 1).to(x.dtype), None
        held = self._buffers
        parts: Any = held["codes"], held["scales"], held["zero_points"], held["row_scales"]
        if convolution.convolution in convolution_cpu.STRAIGHT and parts[0].is_cpu and nothing_between(inputs):
            return convolution_cpu.straight(inputs, self._operand(parts), bias, how, equalization)
        given: Any = (*parts, bias, self.bits, self.group_size, self.grid, *how, equalization)
        return convolution.convolution(inputs, *given)

    def _operand(self, parts: tuple[Tensor, Tensor, Tensor, Tensor]) -> linear_cpu.Operand:
        """These parts as CPU kernels take them, checked when they are new."""
        operand: linear_cpu.Operand | None = self.__dict__.get(CHECKED)
        if operand is None or not operand.is_that_of(*parts):
            weight = linear.Weight(self.columns, *parts, None, self.bits, self.group_size, self.grid)
            linear.check_weight("linear", weight)
            operand = self.__dict__[CHECKED] = linear_cpu.Operand.of(weight)
        return operand

    def looked_up(self, ids: Tensor) -> Tensor:
        """The rows of these ids (...), (..., columns); no others are dequantized."""
        return self.rows(ids.reshape(-1)).reshape(*ids.shape, self.columns)

    # How it is moved and loaded

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:  # noqa: FBT001, FBT002 - torch's
        """Move every buffer, and cast none but `like`."""
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None and name != "like"}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self

    def _load_from_state_dict(  # noqa: PLR0917 - torch's
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: Any,
        missing: Any,
        unexpected: Any,
        errors: list[str],
    ) -> None:
        """Load buffers, into memory of their own: a map of a file cannot be written to."""
        given = state_dict.get(f"{prefix}meaning")
        if given is not None and not torch.equal(given.cpu(), self.meaning.cpu()):
            errors.append(
                f"{prefix}meaning is {given.tolist()}, that of the module {self.meaning.tolist()}: bits, group size,"
                " grid, rotation and shape have to be the same"
            )
            return
        for name, buffer in self._buffers.items():
            if buffer is not None and f"{prefix}{name}" in state_dict:
                self._buffers[name] = buffer.clone()
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)

    def extra_repr(self) -> str:
        """Like "(384, 1536) as 4-bit codes in groups of 64, r2q"."""
        basis = ["equalized"] * (self.equalization is not None) + [f"turned by {self.rotation}"] * bool(self.rotation)
        return ", ".join(
            [f"{tuple(self.shape)} as {self.bits}-bit codes in groups of {self.group_size}", self.grid, *basis]
        )


def _buffers(chunks: Sequence[PackedTensor]) -> dict[str, Tensor | None]:
    first = chunks[0]
    zeros = [
        np.empty((chunk.rows, 0), np.uint8) if chunk.zero_points is None else chunk.zero_points for chunk in chunks
    ]
    return {
        "codes": _joined([chunk.codes for chunk in chunks]),
        "scales": _joined([chunk.scales for chunk in chunks]),
        "zero_points": _joined(zeros),
        "row_scales": _joined([chunk.row_scales for chunk in chunks]).view(torch.bfloat16),
        "equalization": None if first.equalization is None else shared_tensor(first.equalization).clone(),
    }


def _joined(parts: Sequence[Any]) -> Tensor:
    """One array as it lies there; several copied into one."""
    return shared_tensor(parts[0] if len(parts) == 1 else np.concatenate(parts))


def _values_dtype(packed: PackedTensor, asked: torch.dtype | None) -> torch.dtype:
    original: torch.dtype = getattr(torch, packed.dtype)
    if asked is None:
        return original if original in FLOATS else torch.float32
    if asked not in FLOATS:
        raise QuantizationError(f"{packed.name}: dtype is {asked}; allowed: {', '.join(map(str, FLOATS))}")
    return asked

"""Which operations of torch multiply inputs with a weight, and how each of them does it: one entry for each kind.

Knows nothing of whose weights they are, or of what becomes of the inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import linear

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor

CONVOLUTIONS = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}
TRANSPOSED_CONVOLUTIONS = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)


@dataclass(frozen=True, kw_only=True)
class Place:
    """How a convolution moves over its input, and the zeros before and after each axis of it."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Operands:
    """One weight, or some rows of one, and what it is multiplied with.

    given       the tensor that the operation was given, by which layers that share an input are known
    inputs      what of it meets this weight: (..., in), or (batch, in, *places) where there is a `place`
    weight      (out, in) or (out, in, *kernel), or (in, out) and (in, out, *kernel) where it is `transposed`
    place       how a convolution moves over its input; None: a linear layer
    transposed  its rows belong to inputs, not to outputs
    """

    given: Tensor
    inputs: Tensor
    weight: Tensor
    place: Place | None = None
    transposed: bool = False


def operands(func: Callable[..., Any], args: Sequence[Any], given: Mapping[str, Any]) -> Iterator[Operands]:
    """What is multiplied in one call of an operation; nothing where it is no product of inputs and a weight."""
    kind = KINDS.get(func)
    return iter(()) if kind is None else kind(*args, **given)


def _linear(input: Tensor, weight: Tensor, *_: Any, **__: Any) -> Iterator[Operands]:  # noqa: A002 - torch's name
    yield Operands(given=input, inputs=input, weight=weight)


def _convolution(axes: int, input: Tensor, weight: Tensor, *rest: Any, **named: Any) -> Iterator[Operands]:  # noqa: A002
    """Each group of a grouped convolution has channels and output rows of its own."""
    given = dict(zip(("bias", "stride", "padding", "dilation", "groups"), rest, strict=False)) | named
    place, groups = _place(weight, axes, given), int(given.get("groups", 1))
    if groups == 1:
        yield Operands(given=input, inputs=input, weight=weight, place=place)
        return
    for inputs, rows in zip(input.chunk(groups, dim=-1 - axes), weight.chunk(groups), strict=True):
        yield Operands(given=input, inputs=inputs, weight=rows, place=place)


def _transposed_convolution(axes: int, input: Tensor, weight: Tensor, *rest: Any, **named: Any) -> Iterator[Operands]:  # noqa: A002
    """Each place of the input gives a patch of outputs, x W with W (in, out * kernel): a linear layer turned around."""
    names = ("bias", "stride", "padding", "output_padding", "groups", "dilation")
    groups = int((dict(zip(names, rest, strict=False)) | named).get("groups", 1))
    channels = input.movedim(-1 - axes, -1)
    for inputs, rows in zip(channels.chunk(groups, dim=-1), weight.chunk(groups), strict=True):
        yield Operands(given=input, inputs=inputs, weight=rows, transposed=True)


def _added_product(*args: Any, **named: Any) -> Iterator[Operands]:
    """Conv1D of transformers: the bias and x W, W (in, out)."""
    _, x, weight = (*args, named.get("mat1"), named.get("mat2"))[:3]
    if weight is not None and weight.is_contiguous():
        yield Operands(given=x, inputs=x, weight=weight, transposed=True)


def _grouped_product(x: Tensor, weight: Tensor, *rest: Any, **named: Any) -> Iterator[Operands]:
    """Experts of transformers: each has some of the rows of inputs, which are sorted by expert, and may have none."""
    ends = rest[0] if rest else named.get("offs")
    if ends is None or weight.ndim != 3:  # noqa: PLR2004 - (expert, in, out)
        return
    turned, start = weight.mT.is_contiguous(), 0
    for matrix, stop in zip(weight.mT if turned else weight, ends.tolist(), strict=True):
        yield Operands(given=x, inputs=x[start:stop], weight=matrix, transposed=not turned)
        start = stop


KINDS: dict[Callable[..., Any], Callable[..., Iterator[Operands]]] = {
    linear: _linear,
    torch.addmm: _added_product,
    torch._grouped_mm: _grouped_product,  # noqa: SLF001 - as transformers calls it, by either name
    **{func: partial(_convolution, axes) for func, axes in CONVOLUTIONS.items()},
    **{func: partial(_transposed_convolution, axes) for axes, func in enumerate(TRANSPOSED_CONVOLUTIONS, start=1)},
}


def _place(weight: Tensor, axes: int, given: Mapping[str, Any]) -> Place:
    kernel, dilation = tuple(weight.shape[2:]), _each(given.get("dilation", 1), axes)
    return Place(
        kernel=kernel,
        stride=_each(given.get("stride", 1), axes),
        padding=_padding(given.get("padding", 0), kernel, dilation),
        dilation=dilation,
    )


def _padding(
    padding: str | int | Sequence[int], kernel: Sequence[int], dilation: Sequence[int]
) -> tuple[tuple[int, int], ...]:
    """(before, after) of each axis: where "same" asks for an odd number, torch puts one more after."""
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    sizes = 0 if isinstance(padding, str) else padding
    return tuple((size, size) for size in _each(sizes, len(kernel)))


def _each(value: int | Sequence[int], axes: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * axes if len(values) == 1 else values

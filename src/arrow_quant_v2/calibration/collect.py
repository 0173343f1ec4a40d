"""Which weights a model multiplies its inputs with, and what those inputs are, seen while it runs.

Knows nothing of what becomes of them. The watch sees each product as torch does it, so that it does not matter which
module asks for it; layers that are given the same tensor are one input.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import FunctionType
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch.nn.functional import multi_head_attention_forward, pad
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import TensorWeakRef

from arrow_quant_v2.calibration.products import operands
from arrow_quant_v2.calibration.stats import Seen, moments_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from arrow_quant_v2.calibration.products import Operands, Place

    Rows: TypeAlias = tuple[int, int]

MOST_ROWS = 2048  # of one input in one call: the others are much like them, and products with them cost as much


def _opened(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function without its detour through modes, which hides the products inside it from them."""
    if not isinstance(function, FunctionType):
        return function
    names = {**function.__globals__, "has_torch_function": lambda *_: False}
    opened = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    opened.__kwdefaults__ = function.__kwdefaults__
    return opened


ATTENTION = _opened(multi_head_attention_forward)


class EnoughSeen(BaseException):
    """Ends a call of the model early: what follows is of no interest."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Product:
    """One input of one or more weights, and how a convolution moves over it; None: a linear layer.

    part        first and last row, the latter not included, of those that it is multiplied with; None: with all of them
    transposed  rows of the weight belong to inputs, not to outputs
    """

    inputs: Tensor
    place: Place | None
    part: Rows | None = None
    transposed: bool = False


class Watch(TorchFunctionMode):
    """Sees every product with the parameters named; `stop` ends the call once that many products were seen.

    products  each input, as it was when it was first used; none of them where `keep` is False
    log       each use of a weight, and the number of its input
    parted    the weights of which some rows were multiplied without the others, and which ones
    turned    those whose rows belong to inputs
    """

    def __init__(self, parameters: Mapping[str, Tensor], stop: int | None = None, *, keep: bool = True) -> None:
        """Watch for these parameters, by the names that the products shall have."""
        super().__init__()
        self._parameters = parameters  # asked at every product: those that lie on disk come and go
        self._stop, self._keep = stop, keep
        self.products: list[Product] = []
        self.log: list[tuple[str, int]] = []
        self.parted: dict[str, set[Rows]] = {}
        self.turned: set[str] = set()
        self._inputs: list[TensorWeakRef] = []
        self._of: dict[tuple[object, ...], int] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Do what was asked, and note it when it is a product with one of the parameters."""
        given = kwargs or {}
        for pair in operands(func, args, given):
            self._note(pair)
        if func is multi_head_attention_forward:
            with self:
                return ATTENTION(*args, **given)
        result = func(*args, **given)
        if self._stop is not None and len(self.log) >= self._stop:
            raise EnoughSeen
        return result

    def _name_of(self, weight: Tensor) -> str | None:
        """The parameter that lies where this weight does; a slice of one has another shape."""
        place = weight.data_ptr(), weight.shape
        found = [name for name, p in self._parameters.items() if (p.data_ptr(), p.shape) == place]
        return found[-1] if found else None

    def _note(self, pair: Operands) -> None:
        name, part = self._name_of(pair.weight), None
        if name is None:
            name, part = self._part_of(pair.weight)
        if name is None:
            return
        if part is not None:
            self.parted.setdefault(name, set()).add(part)
        if pair.transposed:
            self.turned.add(name)
        self.log.append((name, self._number(pair, name, part)))

    def _part_of(self, weight: Tensor) -> tuple[str, Rows] | tuple[None, None]:
        """The parameter that has these rows, and which ones they are."""
        for name, parameter in self._parameters.items():
            part = rows_in(parameter, weight)
            if part is not None:
                return name, part
        return None, None

    def _number(self, pair: Operands, name: str, part: Rows | None) -> int:
        """Of this input: what is written into is another one, and what is gone may have left its id to another.

        Rows that have inputs of their own share them with no other weight.
        """
        given = pair.given
        version = 0 if given.is_inference() else given._version  # noqa: SLF001 - torch's name
        key = id(given), version, pair.place, pair.transposed, None if part is None else (name, part)
        number = self._of.get(key)
        if number is None or self._inputs[number]() is not given:
            number = self._of[key] = len(self._inputs)
            self._inputs.append(TensorWeakRef(given))
            if self._keep:
                own = pair.inputs.detach().clone()
                self.products.append(Product(inputs=own, place=pair.place, part=part, transposed=pair.transposed))
        return number


def rows_in(parameter: Tensor, weight: Tensor) -> Rows | None:
    """Which rows of a parameter lie where this weight does; None: it is no part of it."""
    one = weight.shape[1:]
    if parameter.is_meta or not (weight.is_contiguous() and parameter.is_contiguous() and weight.numel()):
        return None
    if weight.ndim < 2 or parameter.dtype != weight.dtype or parameter.shape[1 - weight.ndim :] != one:  # noqa: PLR2004 - a matrix
        return None
    width, ahead = one.numel() * weight.itemsize, weight.data_ptr() - parameter.data_ptr()
    if ahead < 0 or ahead % width or ahead + weight.nbytes > parameter.nbytes:
        return None
    return ahead // width, ahead // width + len(weight)


class Uses(TorchFunctionMode):
    """Sees in which block the outputs of each block are looked at."""

    def __init__(self) -> None:
        """Begin outside of all blocks."""
        super().__init__()
        self._inside: str | None = None
        self._users: dict[str, set[str | None]] = {}  # of each block; None: what lies between blocks
        self._outputs: dict[int, tuple[str, Tensor]] = {}  # kept, so that no other tensor gets their ids

    def enter(self, block: str) -> None:
        """A block begins."""
        self._inside = block

    def leave(self, block: str, outputs: Any) -> None:
        """A block ends."""
        self._inside = None
        self._users.setdefault(block, set())
        for value in tree_leaves(outputs):
            if isinstance(value, torch.Tensor):
                self._used(value)  # what is handed through has two owners from now on
                self._outputs[id(value)] = block, value

    def users(self, block: str) -> frozenset[str] | None:
        """The blocks that look at a block's outputs; None: something between blocks does."""
        inside = {user for user in self._users.get(block, ()) if user is not None}
        return frozenset(inside) if len(inside) == len(self._users.get(block, ())) else None

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Do what was asked, and note whose outputs it takes."""
        given = kwargs or {}
        for value in tree_leaves((args, given)):
            self._used(value)
        return func(*args, **given)

    def _used(self, value: Any) -> None:
        if id(value) in self._outputs:
            self._users[self._outputs[id(value)][0]].add(self._inside)


def seen(product: Product, seed: int) -> Seen:
    """What the stats need of one product's input: some of its rows, its moments, and the absmax of each channel.

    A linear layer's input is (..., in); a convolution's (batch, in, *places) is unfolded to one row for each place that
    the kernel visits, columns in the order of weight.flatten(1). `seed` chooses the rows where there are many.
    """
    x = product.inputs.detach().to(torch.float32)
    if product.place is None:
        rows = x.reshape(-1, x.shape[-1])
        channels = rows
        chosen = kept_rows(len(rows), seed)
        rows = rows if chosen is None else rows[chosen.to(rows.device)]
    else:
        batched = x if x.ndim == len(product.place.kernel) + 2 else x[None]
        channels = batched.transpose(0, 1).flatten(1).mT
        rows = _unfolded(batched, product.place, seed)
    return Seen(
        rows=rows.contiguous(),
        moments=moments_of(x),
        absmax=channels.abs().amax(dim=0),
        part=product.part,
        transposed=product.transposed,
    )


def kept_rows(count: int, seed: int) -> Tensor | None:
    """Which of `count` rows the stats see: MOST_ROWS of them, in ascending order; None: all."""
    if count <= MOST_ROWS:
        return None
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(count, generator=generator)[:MOST_ROWS].sort().values


def _unfolded(x: Tensor, place: Place, seed: int) -> Tensor:
    """(batch, in, *places) -> (some places, in * product of the kernel)."""
    axes = len(place.kernel)
    x = pad(x, [size for padding in reversed(place.padding) for size in padding])
    for axis, (kernel, stride, dilation) in enumerate(
        zip(place.kernel, place.stride, place.dilation, strict=True), start=2
    ):
        x = x.unfold(axis, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    shape = (x.shape[0], *x.shape[2 : 2 + axes])  # batch and places
    patches = x.permute(0, *range(2, 2 + axes), 1, *range(2 + axes, 2 + 2 * axes))
    total = torch.Size(shape).numel()
    chosen = kept_rows(total, seed)
    chosen = torch.arange(total) if chosen is None else chosen
    return patches[torch.unravel_index(chosen.to(x.device), shape)].flatten(1)

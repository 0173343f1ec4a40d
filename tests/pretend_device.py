"""A device that is not there: tensors of it refuse to meet the CPU's, as a GPU's do, and are computed by the CPU.

Importing it gives this process an accelerator called "pretend", for good: run it in a process of its own. Our own
operators have no kernel for it, so it gets what CUDA gets: their meaning in plain torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Self

NAME = "pretend"
BRINGING = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}
INDEXING = {  # whose indices CUDA takes from the CPU
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put_.default,
    torch.ops.aten.index_put.default,
}
MEANINGS: dict[str, Callable[..., Any]] = {}  # of our own operators, as they are declared for devices without a kernel
done: set[str] = set()  # our own operators that ran on it


class Pretended(torch.Tensor):
    """A tensor of that device; `values` are what the CPU knows of it."""

    values: torch.Tensor

    def __new__(cls, values: torch.Tensor) -> Self:
        tensor: Self = torch.Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=torch.device(NAME, 0),
        )
        tensor.values = values
        return tensor

    def data_ptr(self) -> int:
        """Where it lies, by which a watch knows a weight again."""
        return self.values.data_ptr()

    def tolist(self) -> Any:
        """Its numbers; torch itself gives none of a subclass."""
        return self.values.tolist()

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return computed(func, tuple(args), dict(kwargs or {}))


def computed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What an operator gives: ours by their meaning, those of torch by the CPU."""
    if func.namespace == "arrow_quant":
        done.add(func.name())
        return MEANINGS[func._opname](*args, **kwargs)
    if func not in BRINGING:
        refuse_mixture(func, (args[:1] if func in INDEXING else args, kwargs))
    wanted = kwargs.get("device")
    if wanted is not None and torch.device(wanted).type == NAME:
        kwargs["device"] = torch.device("cpu")
    result = func(*pytree.tree_map(bare, args), **pytree.tree_map(bare, kwargs))
    if func._schema.is_mutable:
        return kwargs.get("out", args[0])
    away = torch.device(wanted).type in {"cpu", "meta"} if wanted is not None else False
    return result if away else pytree.tree_map(wrapped, result)


def refuse_mixture(func: Any, given: Any) -> None:
    """Tensors of two devices meet; a single number of the CPU is let through, as CUDA does."""
    for leaf in pytree.tree_leaves(given):
        if isinstance(leaf, torch.Tensor) and not isinstance(leaf, Pretended) and leaf.ndim:
            raise RuntimeError(f"{func} is given tensors of {NAME} and of {leaf.device}")


def bare(leaf: Any) -> Any:
    return leaf.values if isinstance(leaf, Pretended) else leaf


def wrapped(leaf: Any) -> Any:
    return Pretended(leaf) if isinstance(leaf, torch.Tensor) else leaf


def _made(func: Callable[..., torch.Tensor]) -> Callable[..., Pretended]:
    def make(*args: Any, **kwargs: Any) -> Pretended:
        kwargs = {name: value for name, value in kwargs.items() if name not in {"device", "pin_memory"}}
        return Pretended(func(*args, **kwargs, device="cpu"))

    return make


def _noting(register: Callable[..., None]) -> Callable[..., None]:
    def impl(library: Any, name: Any, kernel: Callable[..., Any], key: str = "", **rest: Any) -> None:
        if library.ns == "arrow_quant" and key == "CompositeExplicitAutograd":
            MEANINGS[name] = kernel
        register(library, name, kernel, key, **rest)

    return impl


with mock.patch.object(torch.library.Library, "impl", _noting(torch.library.Library.impl)):
    importlib.import_module("arrow_quant_v2.kernels.ops")

_setup_privateuseone_for_python_backend(NAME)
getattr(torch, NAME).get_amp_supported_dtype = lambda: [torch.bfloat16]  # which checkpoints ask for
_LIBRARY = torch.library.Library("aten", "IMPL")
for name in ("empty.memory_format", "empty_strided"):
    overload = getattr(getattr(torch.ops.aten, name.partition(".")[0]), name.partition(".")[2] or "default")
    _LIBRARY.impl(name, _made(overload), "PrivateUse1")


def _copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """What torch.tensor(..., device=...) asks for."""
    bare(target).copy_(bare(source), non_blocking)
    return target


_LIBRARY.impl("_copy_from", _copy_from, "PrivateUse1")

"""A stored model with the names and shapes that transformers gives its tensors when it loads them; opens no file.

Checkpoints hold one matrix for each expert, and since transformers 5 its classes one stack of all: `experts.3.up_proj`
becomes a part of `experts.gate_up_proj` (expert, out, in). The library's own table says which belong together. Rows of
codes are stacked as rows of values are, so that experts stay packed; other conversions than stacks and new names are
left alone, and what needs them does not fit.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

from arrow_quant_v2.calibration.transformers_model import names_in
from arrow_quant_v2.errors import SourceError
from arrow_quant_v2.packed import PackedTensor

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path
    from typing import TypeAlias

    from arrow_quant_v2.store.entries import LayerEntry
    from arrow_quant_v2.store.reader import StoredModel
    from arrow_quant_v2.store.record import Payload

    Stored: TypeAlias = "StoredModel | Stacked"

EXPERTS = (["MergeModulelist"], ["MergeModulelist", "Concatenate"])  # of each part a list, then of the parts one
NUMBER = re.compile(r"\d+")


@dataclass(frozen=True, kw_only=True)
class Stack:
    """What becomes one tensor: names in the file, in the order of rows, and its shape."""

    parts: tuple[str, ...]
    shape: tuple[int, ...]


class Stacked:
    """What `fill` asks of a stored model, with stacks instead of their parts."""

    def __init__(self, stored: StoredModel, stacks: Mapping[str, Stack]) -> None:
        """Show these stacks; the others of its tensors as they are."""
        self._stored, self._stacks = stored, stacks
        hidden = {part for stack in stacks.values() for part in stack.parts}
        self.names: tuple[str, ...] = tuple(sorted({*stored.names, *stacks} - hidden))

    @property
    def path(self) -> Path:
        """Where it lies."""
        return self._stored.path

    @property
    def metadata(self) -> Mapping[str, str]:
        """Of the file."""
        return self._stored.metadata

    @property
    def entries(self) -> tuple[LayerEntry, ...]:
        """Every row of the file, as it is."""
        return self._stored.entries

    def chunks(self, name: str) -> tuple[LayerEntry, ...]:
        """The rows of one layer; of a stack the first, as if it were all.

        Raises:
            StoreError: no such layer.
        """
        stack = self._stacks.get(name)
        if stack is None:
            return self._stored.chunks(name)
        return (replace(self._stored.chunks(stack.parts[0])[0], layer_name=name, shape=stack.shape),)

    def read_all(self) -> dict[str, tuple[Payload, ...]]:
        """Every layer, checked, by name.

        Raises:
            SourceError: the parts of a stack are not stored alike.
            StoreError: as `StoredModel.read`.
        """
        read = self._stored.read_all()
        for name, stack in self._stacks.items():
            read[name] = _merged(name, stack, [read.pop(part) for part in stack.parts])
        return read


def as_loaded(module: Any, stored: StoredModel) -> Stored:
    """The stored model as transformers' class has it: itself, where nothing is stacked or called otherwise.

    Raises:
        SourceError: experts are missing.
    """
    known = names_in(module, stored.names)
    found = _stacks(module, [name for name in stored.names if name not in known])
    return Stacked(stored, found) if found else stored


def _stacks(module: Any, names: Iterable[str]) -> dict[str, Stack]:
    """Name in the module -> what it is made of."""
    try:
        loading = import_module("transformers.core_model_loading")
        mapping = import_module("transformers.conversion_mapping").get_model_conversion_mapping(module)
    except (ImportError, AttributeError):  # before transformers 5
        return {}
    renamings = [one for one in mapping if isinstance(one, loading.WeightRenaming)]
    merging = [one for one in mapping if isinstance(one, loading.WeightConverter) and _merges(one)]
    state: dict[str, Any] = module.state_dict()
    groups: dict[str, dict[str | None, list[str]]] = {}
    for name in names:
        place, pattern = loading.rename_source_key(name, renamings, merging, module.base_model_prefix, state)
        if place in state:
            groups.setdefault(place, {}).setdefault(pattern, []).append(name)
    order = [pattern for one in merging for pattern in one.source_patterns]
    return {place: _stack(place, group, order, state[place].shape) for place, group in groups.items()}


def _merges(converter: Any) -> bool:
    return [type(one).__name__ for one in converter.operations] in EXPERTS


def _stack(place: str, group: Mapping[str | None, list[str]], order: Sequence[str], shape: Any) -> Stack:
    """All parts of the first expert, then of the second."""
    if None in group:
        return Stack(parts=tuple(group[None]), shape=tuple(shape))
    parts = [sorted(group[pattern], key=_numbers) for pattern in order if pattern in group]
    if any(len(part) != shape[0] for part in parts):
        found = ", ".join(str(len(part)) for part in parts)
        raise SourceError(f"{place}: is a stack of {shape[0]} experts, of which the file holds {found}")
    return Stack(parts=tuple(part[expert] for expert in range(shape[0]) for part in parts), shape=tuple(shape))


def _numbers(name: str) -> list[int]:
    return [int(number) for number in NUMBER.findall(name)]


def _merged(name: str, stack: Stack, parts: Sequence[tuple[Payload, ...]]) -> tuple[Payload, ...]:
    chunks = [chunk for part in parts for chunk in part]
    if len({_kind(chunk) for chunk in chunks}) != 1:
        raise SourceError(
            f"{name}: its experts are stored in several ways, {_kinds(stack, parts)}, and stacked by transformers;"
            " quantize all of them alike, or `arrow-quant convert` the model and load that"
        )
    if len(stack.parts) == 1:
        return tuple(replace(chunk, name=name) for chunk in chunks)
    found: list[Payload] = []
    row = 0
    for chunk in chunks:
        if isinstance(chunk, PackedTensor):
            layout = replace(chunk.layout, shape=stack.shape, quant_axis=len(stack.shape) - 1)
            found.append(replace(chunk, name=name, layout=layout, first_row=row))
            row += chunk.rows
        else:
            found.append(replace(chunk, name=name, shape=stack.shape, start=0))
    return tuple(found)


def _kind(chunk: Payload) -> tuple[object, ...]:
    """What must be alike in one tensor; an equalization is one expert's own."""
    if not isinstance(chunk, PackedTensor):
        return ("kept", chunk.dtype)
    own = None if chunk.equalization is None else chunk.name
    layout = chunk.layout
    return (f"int{layout.bits}", layout.group, layout.grid, chunk.rotation, chunk.zero_points is None, own)


def _kinds(stack: Stack, parts: Sequence[tuple[Payload, ...]]) -> str:
    named = {str(_kind(part[0])[0]): name for name, part in zip(stack.parts, parts, strict=True)}
    return ", ".join(f"{kind} as in {name}" for kind, name in sorted(named.items()))

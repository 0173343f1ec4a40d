"""Tensors of a live `nn.Module`, on whatever device they are. Knows nothing of files."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from arrow_quant_v2.errors import SourceError
from arrow_quant_v2.sources.slices import bounds, describe, find, flat_slice

if TYPE_CHECKING:
    from pathlib import Path

    from arrow_quant_v2.packed import TensorInfo


class ModuleSource:
    """Parameters and persistent buffers by their names in `state_dict()`; tied weights appear under each name."""

    def __init__(self, module: torch.nn.Module) -> None:
        """Remember the module's tensors; nothing is copied, so later changes of the module show.

        Raises:
            SourceError: the module has none, or one without values (device meta) or of a dtype we do not know.
        """
        self._location = f"module {type(module).__name__}"
        entries = module.state_dict().items()
        self._tensors = {name: value for name, value in sorted(entries) if isinstance(value, torch.Tensor)}
        if not self._tensors:
            raise SourceError(f"{self._location}: has no parameters or persistent buffers; give a model with weights")
        self._infos = {name: describe(name, tensor, self._location) for name, tensor in self._tensors.items()}

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """Every tensor, sorted by name."""
        return tuple(self._infos.values())

    @property
    def location(self) -> str:
        """The module's class."""
        return self._location

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """None: the weights lie in memory."""
        return ()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Elements [start, stop) of the flattened tensor, 1-D, a fresh copy on the CPU, in its own dtype.

        Raises:
            SourceError: the tensor is unknown, the slice lies outside it, or the source was closed.
        """
        start, stop = bounds(find(self._infos, name, self._location), start, stop, self._location)
        if name not in self._tensors:
            raise SourceError(f"{self._location}: was closed; make a new source of the module")
        return flat_slice(self._tensors[name], start, stop)

    def close(self) -> None:
        """Let the module's tensors go; reading afterwards is an error."""
        self._tensors.clear()

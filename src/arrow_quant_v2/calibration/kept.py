"""What finished blocks gave, kept in memory up to a limit and beyond it in files. Knows no models, never unpickles."""

from __future__ import annotations

import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from arrow_quant_v2.errors import StoreError

if TYPE_CHECKING:
    from torch import Tensor

IN_MEMORY = 2**30  # bytes of all outputs together; what comes later lies in files
WORTH_A_FILE = 2**12  # bytes


@dataclass(frozen=True, kw_only=True, eq=False)
class Filed:
    """A tensor that lies in a file, byte by byte as it lay in memory."""

    path: Path
    dtype: torch.dtype
    shape: torch.Size
    strides: tuple[int, ...]

    def tensor(self) -> Tensor:
        """The tensor, of which only what is looked at is read; whoever writes into it changes a copy."""
        raw = torch.from_numpy(np.memmap(self.path, dtype=np.uint8, mode="c"))
        return raw.view(self.dtype).as_strided(self.shape, self.strides)


@dataclass(frozen=True, kw_only=True, eq=False)
class Elsewhere:
    """A tensor of another device, whose memory is left to the block that runs: what it was lies with the CPU."""

    values: Any
    device: torch.device


class Kept:
    """Outputs of any structure by a key; threads may keep and take different ones at the same time."""

    def __init__(self, folder: Path | None = None) -> None:
        """Files, where there are any, go into a folder inside this one; None: where the system keeps such things."""
        self._outputs: dict[tuple[int, ...], tuple[Any, int]] = {}  # and the bytes that count as memory
        self._inside = folder
        self._lock = threading.Lock()
        self._files: tempfile.TemporaryDirectory[str] | None = None
        self._in_memory = 0

    def put(self, key: tuple[int, ...], outputs: Any) -> None:
        """Keep a copy of the outputs, in place of what was kept under this key.

        Raises:
            StoreError: a file cannot be written.
        """
        copied = pytree.tree_map(_brought, outputs)
        size = _bytes_of(copied)
        with self._lock:
            self._in_memory -= _forgotten(*self._outputs.pop(key, (None, 0)))
            folder = self._folder() if self._in_memory + size > IN_MEMORY else None
            counted = size if folder is None else 0
            self._in_memory += counted
        if folder is not None:
            copied = pytree.tree_map(lambda leaf: _filed(leaf, folder), copied)
        self._outputs[key] = copied, counted

    def take(self, key: tuple[int, ...]) -> Any:
        """The outputs with tensors of their own: models may write into what a block gave.

        Raises:
            KeyError: nothing was kept.
        """
        return pytree.tree_map(_copied, self._outputs[key][0])

    def empty(self, first: int) -> None:
        """Let go of the values of all outputs whose keys begin so; their shapes stay."""
        with self._lock:
            for key, (outputs, counted) in self._outputs.items():
                if key[0] == first:
                    emptied = pytree.tree_map(_emptied, outputs)
                    self._in_memory -= _forgotten(outputs, counted)
                    self._outputs[key] = emptied, 0

    def close(self) -> None:
        """Forget everything, and remove the files."""
        self._outputs.clear()
        if self._files is not None:
            self._files.cleanup()

    def _folder(self) -> str:
        if self._files is None:
            if self._inside is not None:
                self._inside.mkdir(parents=True, exist_ok=True)
            self._files = tempfile.TemporaryDirectory(prefix="arrow-quant-", dir=self._inside)
        return self._files.name


def _forgotten(outputs: Any, counted: int) -> int:
    """The memory that is free once their files are removed."""
    for leaf in map(_inside, pytree.tree_leaves(outputs)):
        if isinstance(leaf, Filed):
            leaf.path.unlink()
    return counted


def _inside(leaf: Any) -> Any:
    return leaf.values if isinstance(leaf, Elsewhere) else leaf


def _brought(leaf: Any) -> Any:
    """A copy in the CPU's memory."""
    if isinstance(leaf, torch.Tensor) and leaf.device.type not in {"cpu", "meta"}:
        return Elsewhere(values=leaf.detach().cpu(), device=leaf.device)
    return _copied(leaf)


def _copied(leaf: Any) -> Any:
    if isinstance(leaf, Elsewhere):
        return _copied(leaf.values).to(leaf.device)
    if isinstance(leaf, Filed):
        return leaf.tensor()
    return leaf.clone() if isinstance(leaf, torch.Tensor) else leaf


def _emptied(leaf: Any) -> Any:
    leaf = _inside(leaf)
    if isinstance(leaf, Filed):
        return torch.empty_strided(leaf.shape, leaf.strides, dtype=leaf.dtype, device="meta")
    return leaf.to("meta") if isinstance(leaf, torch.Tensor) else leaf


def _bytes_of(outputs: Any) -> int:
    return sum(leaf.nbytes for leaf in map(_inside, pytree.tree_leaves(outputs)) if _is_plain(leaf))


def _is_plain(leaf: Any) -> bool:
    """Whether it can lie in a file."""
    strided = isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided
    return strided and leaf.device.type == "cpu" and not leaf.requires_grad


def _filed(leaf: Any, folder: str) -> Any:
    """A clone's memory has no gaps, whatever its strides; what is no such tensor stays where it is."""
    if isinstance(leaf, Elsewhere):
        return Elsewhere(values=_filed(leaf.values, folder), device=leaf.device)
    if not _is_plain(leaf) or leaf.nbytes < WORTH_A_FILE:
        return leaf
    try:
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            file.write(leaf.as_strided((leaf.numel(),), (1,)).view(torch.uint8).numpy())
    except OSError as error:
        raise StoreError(
            f"{folder}: cannot hold what the blocks of the model give: {error.strerror};"
            " make room there, or calibrate on fewer samples"
        ) from error
    return Filed(path=Path(file.name), dtype=leaf.dtype, shape=leaf.shape, strides=leaf.stride())

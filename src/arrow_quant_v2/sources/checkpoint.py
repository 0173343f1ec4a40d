"""Tensors of PyTorch checkpoints (.bin, .pt, .pth), unpickled without running code. Knows nothing of folders or models.

torch maps the file, and that tells where each tensor lies; the values are then read from there. Read through the
map, every page would stay in the peak memory that we promise, and a file cut short would kill the process.
"""

from __future__ import annotations

import pickle
import re
import struct
import sys
import zipfile
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from arrow_quant_v2.errors import SourceError
from arrow_quant_v2.packed import ITEM_BITS
from arrow_quant_v2.sources.files import ByteFile, damaged
from arrow_quant_v2.sources.index import read_index, refuse_lost_tensors, shards_of
from arrow_quant_v2.sources.mapped import file_offset, mapped_ranges
from arrow_quant_v2.sources.slices import as_tensor, bounds, describe, find, flat_slice

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from arrow_quant_v2.packed import TensorInfo

ZIP = b"PK\x03\x04"
NESTS = ("state_dict", "model_state_dict", "model", "module")
# How torch says that the pickle asks for a function or a class that is no part of a tensor.
REFUSED = re.compile(r"GLOBAL [\w.]+|Can only (?:create|build)[^.]*|Trying to call reduce[^.]*")
# What torch and pickle raise on bytes that no checkpoint has; found by fuzzing.
BROKEN = (
    RuntimeError, OSError, EOFError, LookupError, AttributeError, TypeError, ValueError, ArithmeticError,
    AssertionError, MemoryError, struct.error,
)  # fmt: skip


class CheckpointSource:
    """The tensors of one PyTorch checkpoint, or of several that are the shards of one model."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Unpickle the files' structure with `weights_only=True`; values stay on the disk.

        Raises:
            SourceError: a file is missing, damaged, or not plain tensors (then it could run code); or two files
                hold the same tensor.
        """
        self._files = tuple(ByteFile(path) for path in paths)
        self._infos: dict[str, TensorInfo] = {}
        self._tensors: dict[str, torch.Tensor] = {}
        self._homes: dict[str, ByteFile] = {}
        self._offsets: dict[str, int | None] = {}
        for file in self._files:
            self._add(_state_dict(_load(file), file.path), file)

    @classmethod
    def from_index(cls, index: Path) -> CheckpointSource:
        """The shards that a `*.bin.index.json` names.

        Raises:
            SourceError: as for the constructor; or the index and the shards contradict each other.
        """
        places = read_index(index)
        source = cls(shards_of(places, index))
        refuse_lost_tensors(places, ((name, file.path) for name, file in source._homes.items()), index)
        return source

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """Every tensor, sorted by name."""
        return tuple(self._infos[name] for name in sorted(self._infos))

    @property
    def location(self) -> str:
        """The file, or the folder and number of the shards."""
        first = self._files[0].path
        return str(first) if len(self._files) == 1 else f"{first.parent} ({len(self._files)} checkpoint shards)"

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """The files."""
        return tuple(file.path for file in self._files)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Elements [start, stop) of the flattened tensor, 1-D, fresh, in its own dtype.

        Raises:
            SourceError: the tensor is unknown, the slice lies outside it, the bytes cannot be read, or the source
                was closed.
        """
        info = find(self._infos, name, self.location)
        start, stop = bounds(info, start, stop, self.location)
        if name not in self._tensors:
            raise SourceError(f"{self.location}: was closed; open the model again to read from it")
        offset = self._offsets[name]
        if offset is None:
            return flat_slice(self._tensors[name], start, stop)
        item = ITEM_BITS[info.dtype] // 8
        values = self._homes[name].read_array((stop - start) * item, offset + start * item)
        return as_tensor(values, info.dtype)

    def close(self) -> None:
        """Give maps and file handles back; reading afterwards is an error."""
        self._tensors.clear()
        for file in self._files:
            file.close()

    def _add(self, tensors: dict[str, torch.Tensor], file: ByteFile) -> None:
        ranges = [] if _is_swapped(file) else mapped_ranges(file.path)
        for name, tensor in tensors.items():
            if name in self._tensors:
                raise SourceError(
                    f"{file.path}: tensor {name!r} lies in {self._homes[name].path.name} too;"
                    " which of them counts is unknown: remove the file that does not belong to the model"
                )
            self._infos[name] = describe(name, tensor, str(file.path))
            self._tensors[name] = tensor
            self._homes[name] = file
            self._offsets[name] = file_offset(tensor, ranges)


def _load(file: ByteFile) -> object:
    path = file.path
    zipped = file.size >= len(ZIP) and file.read(len(ZIP)) == ZIP
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        refused = REFUSED.search(str(error))
        if refused is None:
            raise damaged(path, f"cannot be unpickled: {_last_line(error)}") from error
        raise SourceError(
            f"{path}: holds more than tensors ({refused[0]}), and loading it could run code, so it was not loaded;"
            " if you trust where it is from, convert it on a machine apart:"
            " safetensors.torch.save_file(torch.load(path, weights_only=False), 'model.safetensors')"
        ) from error
    except BROKEN as error:
        raise damaged(
            path, f"not a PyTorch checkpoint of tensors ({type(error).__name__}: {_last_line(error)})"
        ) from error


def _is_swapped(file: ByteFile) -> bool:
    """Whether torch had to swap the bytes of the values, so that they are right in memory and not in the file."""
    try:
        with zipfile.ZipFile(file.path) as archive:
            orders = [archive.read(name) for name in archive.namelist() if name.endswith("/byteorder")]
    except (*BROKEN, zipfile.BadZipFile, zlib.error):  # not a zip, or one that only torch can read
        return True
    return any(order.decode() != sys.byteorder for order in orders)


def _last_line(error: Exception) -> str:
    """The reason: torch puts advice before it, and a link behind it."""
    lines = [line for line in str(error).splitlines() if line.strip() and "pytorch.org" not in line]
    return (lines or [type(error).__name__])[-1].strip()[:300]


def _state_dict(loaded: object, path: Path) -> dict[str, torch.Tensor]:
    """The tensors by name, from a state dict or one nested under a usual key; plain values beside them are left."""
    if not isinstance(loaded, Mapping):
        raise SourceError(
            f"{path}: holds a {type(loaded).__name__}; a dict of tensors by name (a state dict) is needed"
        )
    entries = next((loaded[key] for key in NESTS if isinstance(loaded.get(key), Mapping)), loaded)
    found = {}
    for name, value in entries.items():
        if isinstance(value, torch.Tensor) and isinstance(name, str):
            found[name] = value
        elif _hides_tensors(value) or isinstance(value, torch.Tensor):
            raise SourceError(
                f"{path}: entry {name!r} is a {type(value).__name__} with tensors; only tensors by name are read,"
                f" at the top or under {', '.join(NESTS)}: save the state dict alone"
            )
    if not found:
        raise SourceError(f"{path}: holds no tensors; save the model's state_dict()")
    return found


def _hides_tensors(value: object) -> bool:
    """Whether a container holds a tensor anywhere; without recursion, for a pickle may nest deeply or in a circle."""
    waiting, seen = [value], set()
    while waiting:
        item = waiting.pop()
        if isinstance(item, torch.Tensor):
            return True
        if isinstance(item, (Mapping, list, tuple, set)) and id(item) not in seen:
            seen.add(id(item))
            waiting.extend(item.values() if isinstance(item, Mapping) else item)
    return False

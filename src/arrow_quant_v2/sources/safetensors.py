"""Tensors of safetensors files, single or sharded, read with positioned reads. Knows nothing of folders or models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from arrow_quant_v2.errors import SourceError
from arrow_quant_v2.packed import ITEM_BITS, TensorInfo
from arrow_quant_v2.sources.files import ByteFile, damaged, parse_object
from arrow_quant_v2.sources.index import read_index, refuse_lost_tensors, shards_of
from arrow_quant_v2.sources.slices import as_tensor, bounds, find, unknown_dtype

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import torch

DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Place:
    """One tensor: its description, its file, and where in it the first byte lies."""

    info: TensorInfo
    file: ByteFile
    offset: int


class SafetensorsSource:
    """The tensors of one safetensors file, or of several that are the shards of one model."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Open the files and read their headers.

        Raises:
            SourceError: a file is missing, damaged or hostile, holds a dtype that we do not know, or a tensor
                that another file holds too.
        """
        self._files = tuple(ByteFile(path) for path in paths)
        self._places: dict[str, _Place] = {}
        for file in self._files:
            for place in _places(file):
                self._add(place)
        self._infos = tuple(self._places[name].info for name in sorted(self._places))

    @classmethod
    def from_index(cls, index: Path) -> SafetensorsSource:
        """The shards that a `*.safetensors.index.json` names.

        Raises:
            SourceError: as for the constructor; or the index and the shards contradict each other.
        """
        places = read_index(index)
        source = cls(shards_of(places, index))
        refuse_lost_tensors(places, ((n, p.file.path) for n, p in source._places.items()), index)
        return source

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """Every tensor, sorted by name."""
        return self._infos

    @property
    def location(self) -> str:
        """The file, or the folder and number of the shards."""
        first = self._files[0].path
        return str(first) if len(self._files) == 1 else f"{first.parent} ({len(self._files)} safetensors shards)"

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """The files."""
        return tuple(file.path for file in self._files)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Elements [start, stop) of the flattened tensor, 1-D, fresh, in its own dtype.

        Raises:
            SourceError: the tensor is unknown, the slice lies outside it, or the bytes cannot be read.
        """
        place = find(self._places, name, self.location)
        start, stop = bounds(place.info, start, stop, self.location)
        item = ITEM_BITS[place.info.dtype] // 8
        values = place.file.read_array((stop - start) * item, place.offset + start * item)
        return as_tensor(values, place.info.dtype)

    def close(self) -> None:
        """Give the file handles back; reading afterwards is an error."""
        for file in self._files:
            file.close()

    def _add(self, place: _Place) -> None:
        name = place.info.name
        if name in self._places:
            raise SourceError(
                f"{place.file.path}: tensor {name!r} lies in {self._places[name].file.path.name} too;"
                " which of them counts is unknown: remove the file that does not belong to the model"
            )
        self._places[name] = place


def _places(file: ByteFile) -> Iterator[_Place]:
    """Every tensor of one file. The safetensors library has the say on what a valid file is."""
    try:
        with safe_open(file.path, framework="np"):
            pass
    except (SafetensorError, OSError, ValueError) as error:
        raise damaged(file.path, f"not a valid safetensors file: {error}") from error
    header_bytes = int.from_bytes(file.read(8), "little")
    header = parse_object(file.read(header_bytes, 8), f"{file.path}: header")
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise unknown_dtype(name, entry["dtype"], str(file.path))
        info = TensorInfo(name=name, shape=tuple(entry["shape"]), dtype=DTYPES[entry["dtype"]])
        yield _Place(info=info, file=file, offset=8 + header_bytes + entry["data_offsets"][0])

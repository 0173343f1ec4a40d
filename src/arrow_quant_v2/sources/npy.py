r"""Tensors of an `.npy` file or a folder of them, read with positioned reads. Never unpickles, knows no models.

A file is: `\x93NUMPY`, two bytes of version, the header's length (2 bytes in version 1, 4 in version 2, little
endian), the header - a Python literal of one line - and the values. We match that line instead of evaluating it.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from arrow_quant_v2.errors import SourceError
from arrow_quant_v2.packed import ITEM_BITS, TensorInfo
from arrow_quant_v2.sources.files import ByteFile, cannot_open, damaged
from arrow_quant_v2.sources.slices import as_tensor, bounds, find, reading_buffer

if TYPE_CHECKING:
    from pathlib import Path

    import torch

HEADER_LIMIT = 1 << 16
DTYPES = {
    "<f8": "float64", "<f4": "float32", "<f2": "float16", "<i8": "int64", "<i4": "int32", "<i2": "int16",
    "|i1": "int8", "|u1": "uint8", "|b1": "bool",
}  # fmt: skip
LENGTH_BYTES = {1: 2, 2: 4}
ITEM = re.compile(
    r"""\s*['"](?:descr['"]\s*:\s*(?P<descr>'[^']*'|"[^"]*"|\[.*\])
    |fortran_order['"]\s*:\s*(?P<fortran>True|False)
    |shape['"]\s*:\s*\((?P<shape>(?:\s*\d{1,18}L?\s*,)*(?:\s*\d{1,18}L?)?)\s*\))\s*(?:,|(?=\}))""",
    re.VERBOSE,
)


@dataclass(frozen=True, kw_only=True)
class _Array:
    """One file: what it holds, where the values start, and whether the first axis runs fastest."""

    info: TensorInfo
    path: Path
    offset: int
    fortran: bool


class NpySource:
    """The arrays of a folder, or of one file; `a.b.weight.npy` holds the tensor `a.b.weight`."""

    def __init__(self, folder: Path) -> None:
        """Read the header of the file, or of every `.npy` file that lies in the folder.

        Raises:
            SourceError: there is none; or one is damaged, holds Python objects, or has a dtype or byte order
                that we do not read.
        """
        self._folder = folder
        try:
            paths = [folder] if folder.is_file() else sorted(p for p in folder.iterdir() if p.suffix == ".npy")
        except OSError as error:
            raise cannot_open(folder, error) from error
        if not paths:
            raise SourceError(f"{folder}: holds no .npy files; give the folder with one file per tensor")
        self._arrays = {path.stem: _array(path) for path in paths}
        self._open = True

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """Every tensor, sorted by name."""
        return tuple(self._arrays[name].info for name in sorted(self._arrays))

    @property
    def location(self) -> str:
        """The folder, or the file."""
        return str(self._folder)

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """The `.npy` files."""
        return tuple(array.path for array in self._arrays.values())

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Elements [start, stop) of the flattened tensor, 1-D, fresh, in its own dtype.

        Raises:
            SourceError: the tensor is unknown, the slice lies outside it, or the bytes cannot be read.
        """
        array = find(self._arrays, name, self.location)
        start, stop = bounds(array.info, start, stop, self.location)
        if not self._open:
            raise SourceError(f"{self.location}: was closed; open the model again to read from it")
        file = ByteFile(array.path)  # per read, because a model may have more tensors than a process may open files
        try:
            return _read_fortran(file, array, start, stop) if array.fortran else _read(file, array, start, stop)
        finally:
            file.close()

    def close(self) -> None:
        """Refuse reading from now on; no file is held open between reads."""
        self._open = False


def _array(path: Path) -> _Array:
    file = ByteFile(path)
    try:
        header, offset = _header(file)
        array = _parse(header, path, offset)
        if file.size < offset + array.info.nbytes:
            raise damaged(
                path, f"{array.info.shape} {array.info.dtype} need {array.info.nbytes:,} bytes after {offset}"
            )
    finally:
        file.close()
    return array


def _header(file: ByteFile) -> tuple[str, int]:
    """The header's line, and where the values start."""
    start = file.read(8)
    magic, major = start[:6], start[6]
    if magic != b"\x93NUMPY":
        raise damaged(file.path, f"starts with {magic!r}, not with the mark of a .npy file")
    if major not in LENGTH_BYTES:
        raise SourceError(f"{file.path}: is .npy version {major}; 1 and 2 are read: save the plain array with np.save")
    width = LENGTH_BYTES[major]
    length = int.from_bytes(file.read(width, 8), "little")
    if length > HEADER_LIMIT:
        raise damaged(file.path, f"claims a header of {length:,} bytes; at most {HEADER_LIMIT:,} are read")
    return file.read(length, 8 + width).decode("latin-1"), 8 + width + length


def _parse(header: str, path: Path, offset: int) -> _Array:
    descr, fortran, shape = _fields(header, path)
    info = TensorInfo(name=path.stem, shape=shape, dtype=_dtype(descr, path))
    return _Array(info=info, path=path, offset=offset, fortran=fortran)


def _fields(header: str, path: Path) -> tuple[str, bool, tuple[int, ...]]:
    text = header.strip()
    found: dict[str, str] = {}
    at = 1
    while text.startswith("{") and (hit := ITEM.match(text, at)):
        found.update({key: value for key, value in hit.groupdict().items() if value is not None})
        at = hit.end()
    if text[at:].strip() != "}" or set(found) != {"descr", "fortran", "shape"}:
        raise damaged(path, f"has the header {text[:80]!r}, not one of descr, fortran_order and shape")
    shape = tuple(int(size.strip(" L")) for size in found["shape"].split(",") if size.strip())
    return found["descr"].strip("'\""), found["fortran"] == "True", shape


def _dtype(descr: str, path: Path) -> str:
    if descr in DTYPES:
        return DTYPES[descr]
    if descr.startswith(">") and "<" + descr[1:] in DTYPES:
        raise SourceError(
            f"{path}: is big-endian ({descr}); save it in little-endian:"
            f" a = np.load(path); np.save(path, a.astype('<{descr[1:]}'))"
        )
    if "O" in descr:
        raise SourceError(f"{path}: holds Python objects ({descr}), which can run code; save a plain array of numbers")
    raise SourceError(
        f"{path}: has dtype {descr}; allowed are {', '.join(DTYPES)}: save it as one of them, or as safetensors"
    )


def _read(file: ByteFile, array: _Array, start: int, stop: int) -> torch.Tensor:
    item = ITEM_BITS[array.info.dtype] // 8
    return as_tensor(file.read_array((stop - start) * item, array.offset + start * item), array.info.dtype)


def _read_fortran(file: ByteFile, array: _Array, start: int, stop: int) -> torch.Tensor:
    """The slice of a file in which the first axis runs fastest: gather the rows that it touches, then transpose.

    The rows [first, last) are one run of bytes in each column of the file, so memory stays near the slice.
    """
    rows, columns = array.info.shape[0], math.prod(array.info.shape[1:])
    if start == stop:
        return reading_buffer(0, array.info.dtype)[0]
    first, last = start // columns, -(-stop // columns)
    tensor, view = reading_buffer(columns * (last - first), array.info.dtype)
    if last - first == rows:
        file.read_into(view, array.offset)
    else:
        run = (last - first) * tensor.itemsize
        for column in range(columns):
            at = array.offset + (column * rows + first) * tensor.itemsize
            file.read_into(view[column * run : (column + 1) * run], at)
    block = tensor.reshape(*reversed(array.info.shape[1:]), last - first)
    flat = block.permute(*reversed(range(block.ndim))).reshape(-1)
    return flat[start - first * columns : stop - first * columns].clone()

"""Exact byte ranges and small JSON files, read within limits. Knows nothing of tensors or of model formats."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import weakref
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

import numpy as np

from arrow_quant_v2.errors import SourceError
from arrow_quant_v2.sources.direct import is_cached, open_direct, read_direct

if TYPE_CHECKING:
    from numpy.typing import NDArray

JSON_LIMIT = 64 << 20
WORTH_ITS_WAY = 1 << 20  # a smaller range is read through the page cache
LFS_POINTER = b"version https://git-lfs"


class ByteFile:
    """A regular file whose byte ranges are read in any order, by any thread; never memory-mapped.

    A map would count in the peak memory that we promise, and would kill the process (SIGBUS) where the
    file is cut short while it is read.
    """

    def __init__(self, path: Path) -> None:
        """Open the file.

        Raises:
            SourceError: it is missing, not a regular file, or may not be read.
        """
        self.path = path
        try:
            if not path.is_file():  # before os.open, which would wait for ever on a named pipe
                raise SourceError(f"{path}: {_what_lies_at(path)}; a regular file is needed here")
            self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise cannot_open(path, error) from error
        self._direct = open_direct(path)
        self._lock = threading.Lock()
        self._closing = weakref.finalize(self, _close, [self._fd, self._direct])
        self.size = os.fstat(self._fd).st_size

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill `view`, bytes, with the file's bytes from `offset` on.

        Raises:
            SourceError: the file is closed, ends too early, or the disk fails.
        """
        self._refuse_closed()
        wanted = len(view)
        try:
            while view and (count := self._pread(view, offset)):
                view, offset = view[count:], offset + count
        except OSError as error:
            raise SourceError(f"{self.path}: reading at byte {offset:,} failed: {error.strerror or error}") from error
        if view:
            found = wanted - len(view)
            raise damaged(self.path, f"ends at byte {offset:,}: {found:,} of {wanted:,} bytes asked for are there")

    def read_array(self, count: int, offset: int) -> NDArray[np.uint8]:
        """`count` bytes from `offset` on in fresh memory; a large range comes past the page cache unless it lies there.

        Raises:
            SourceError: as for `read_into`.
        """
        self._refuse_closed()
        if self._direct is not None and count >= WORTH_ITS_WAY and not is_cached(self._fd, offset, count):
            with contextlib.suppress(OSError):  # what is wrong, the ordinary way says, or it works
                found = read_direct(self._direct, count, offset)
                if len(found) == count:
                    return found
        values = np.empty(count, dtype=np.uint8)
        self.read_into(values.data, offset)
        return values

    def read(self, count: int, offset: int = 0) -> bytes:
        """`count` bytes from `offset` on.

        Raises:
            SourceError: as for `read_into`.
        """
        buffer = bytearray(count)
        self.read_into(memoryview(buffer), offset)
        return bytes(buffer)

    def close(self) -> None:
        """Give the file handle back."""
        self._closing()

    def _refuse_closed(self) -> None:
        if not self._closing.alive:
            raise SourceError(f"{self.path}: was closed; open the model again to read from it")

    def _pread(self, view: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._fd, [view], offset)
        with self._lock:  # Windows has no positioned read
            os.lseek(self._fd, offset, os.SEEK_SET)
            chunk = os.read(self._fd, min(len(view), 1 << 24))
        view[: len(chunk)] = chunk
        return len(chunk)


def _close(descriptors: list[int | None]) -> None:
    for descriptor in descriptors:
        if descriptor is not None:
            os.close(descriptor)


def _what_lies_at(path: Path) -> str:
    if path.is_dir():
        return "is a folder"
    if path.is_symlink() and not path.exists():
        return f"is a link to {path.readlink()}, which does not exist (an unfinished download?)"
    return "is not a regular file" if path.exists() else "does not exist"


def cannot_open(path: Path, error: OSError) -> SourceError:
    """The error for a path that the operating system does not let us open."""
    remedies = (
        (FileNotFoundError, "check the path"),
        (PermissionError, f"make it readable (chmod -R u+rX '{path}') or run as its owner"),
        (OSError, "check the disk and the path"),
    )
    remedy = next(text for kind, text in remedies if isinstance(error, kind))
    return SourceError(f"{path}: cannot be opened: {error.strerror or error}; {remedy}")


def damaged(path: Path, found: str) -> SourceError:
    """The error for a weight file that does not hold what its format promises."""
    try:
        with path.open("rb") as file:
            pointer = file.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError:
        pointer = False
    if pointer:
        return SourceError(f"{path}: is a Git LFS pointer, not the weights; run `git lfs pull` in its folder")
    return SourceError(f"{path}: {found}; the file is truncated or damaged: download or save it again")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of at most 64 MB.

    Raises:
        SourceError: it cannot be read, is larger, or is not one JSON object; names file and position.
    """
    file = ByteFile(path)
    try:
        if file.size > JSON_LIMIT:
            raise SourceError(f"{path}: has {file.size:,} bytes; a JSON file of a model has at most {JSON_LIMIT:,}")
        text = file.read(file.size)
    finally:
        file.close()
    return parse_object(text, str(path))


def parse_object(text: bytes, where: str) -> dict[str, Any]:
    """The JSON object in UTF-8 `text`; `where` names it in the error.

    Raises:
        SourceError: it is no JSON, or no object.
    """
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise SourceError(
            f"{where}: not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}; repair or replace it"
        ) from error
    except (ValueError, RecursionError) as error:  # not UTF-8, a number of 5,000 digits, a million brackets
        raise SourceError(f"{where}: not valid JSON: {error}; repair or replace it") from error
    if not isinstance(found, dict):
        raise SourceError(f"{where}: holds a JSON {type(found).__name__}; an object in braces is needed")
    return found


def refuse_traversal(name: str, where: str) -> str:
    """The relative path `name` that a model's own JSON gives, checked by its letters alone.

    Links on the disk are the user's own and are followed; a name in a downloaded file is not.

    Raises:
        SourceError: it is empty, absolute, or climbs out of its folder, on this system or another.
    """
    for flavour in (PurePosixPath(name), PureWindowsPath(name)):
        if not flavour.parts or flavour.anchor or ".." in flavour.parts or "\0" in name:
            raise SourceError(
                f"{where}: points at {name!r}, outside its own folder; only files below the folder are allowed:"
                " do not use this model unless you trust it and have repaired the entry"
            )
    return name

"""Ranges of a file read from the disk straight into fresh memory, past the page cache. Knows nothing of tensors.

A model is read once. To copy it through the page cache takes as much processor time as quantizing it, and drives out
of memory what other programs keep there.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

BLOCK = 4096  # direct reads start, end and lie in memory at multiples of it; logical blocks of disks are no larger


def open_direct(path: Path) -> int | None:
    """A descriptor of the file whose reads go past the page cache; None where the file system has no such reads."""
    if not hasattr(os, "O_DIRECT") or not hasattr(os, "preadv"):
        return None
    with contextlib.suppress(OSError):
        return os.open(path, os.O_RDONLY | os.O_DIRECT)
    return None


def is_cached(descriptor: int, offset: int, count: int) -> bool:
    """Whether the range seems to lie in the page cache, told by its two ends; reads nothing from the disk itself.

    The system may start to fetch what follows a byte that was asked for and not there: so the first alone says nothing.
    """
    return _there(descriptor, offset) and _there(descriptor, offset + count - 1)


def _there(descriptor: int, offset: int) -> bool:
    try:
        return bool(os.preadv(descriptor, [bytearray(1)], offset, getattr(os, "RWF_NOWAIT", 0)))
    except OSError:  # it would have to wait for the disk, or cannot tell
        return False


def read_direct(descriptor: int, count: int, offset: int) -> NDArray[np.uint8]:
    """`count` bytes from `offset` on, fewer where the file ends.

    Raises:
        OSError: the disk fails, or the file system does not take such reads after all.
    """
    first = offset - offset % BLOCK
    span = -(-(offset + count - first) // BLOCK) * BLOCK
    room = np.empty(span + BLOCK, dtype=np.uint8)
    room = room[-room.ctypes.data % BLOCK :][:span]
    done = 0
    while done < span and (got := os.preadv(descriptor, [room[done:].data], first + done)):
        done += got
        if got % BLOCK:  # the end of the file
            break
    return room[offset - first : min(done, offset - first + count)]

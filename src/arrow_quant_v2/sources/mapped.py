"""Where in its file the bytes of a memory-mapped tensor lie. Knows nothing of checkpoints."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

MAPS = Path("/proc/self/maps")  # Linux; elsewhere nothing is found, and tensors are read through the map


def mapped_ranges(path: Path) -> list[tuple[int, int, int]]:
    """The parts of a file that this process has mapped: first address, address behind the last, offset in the file."""
    if not MAPS.exists():
        return []
    real = os.path.realpath(path)
    lines = MAPS.read_text(errors="replace").splitlines()  # addresses, permissions, offset, device, inode, path
    mine = (line.split(maxsplit=5) for line in lines if line.endswith(f" {real}"))
    return [(*_addresses(fields[0]), int(fields[2], 16)) for fields in mine if fields[5] == real]


def _addresses(text: str) -> tuple[int, int]:
    first, last = text.split("-")
    return int(first, 16), int(last, 16)


def file_offset(tensor: torch.Tensor, ranges: Sequence[tuple[int, int, int]]) -> int | None:
    """Offset in the file of a contiguous tensor's first byte; None where it is not mapped, or not contiguous."""
    at, length = tensor.data_ptr(), tensor.numel() * tensor.itemsize
    if not length or not tensor.is_contiguous():
        return None
    return next((at - first + offset for first, last, offset in ranges if first <= at and at + length <= last), None)

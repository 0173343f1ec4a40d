"""Tensors and words about them in one safetensors file: there whole or not at all. Knows nothing of what they mean."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from arrow_quant_v2.errors import StoreError
from arrow_quant_v2.store.crc32 import crc32
from arrow_quant_v2.store.writer import fsync

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

CHECKSUM = "crc32"


def keep(path: Path, tensors: Mapping[str, Tensor], words: Mapping[str, str]) -> None:
    """Write them, dense and on the CPU, with a checksum of all that is written.

    Raises:
        StoreError: the disk refuses.
    """
    fresh = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(dict(tensors), fresh, dict(words) | {CHECKSUM: str(_checksum(tensors, words))})
        fsync(fresh)
        fresh.rename(path)
    except (OSError, SafetensorError) as problem:
        with suppress(OSError):
            fresh.unlink(missing_ok=True)
        raise StoreError(f"{path}: calibration cannot be kept: {problem}; give it room and permission") from problem


def kept(path: Path) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """What was kept there; None where nothing whole is."""
    try:
        with safe_open(path, framework="pt") as file:
            words = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - no mapping
        return (tensors, words) if int(words.pop(CHECKSUM)) == _checksum(tensors, words) else None
    except (OSError, SafetensorError, KeyError, ValueError):
        return None


def _checksum(tensors: Mapping[str, Tensor], words: Mapping[str, str]) -> int:
    shapes = [(name, str(tensors[name].dtype), list(tensors[name].shape)) for name in sorted(tensors)]
    told = json.dumps([sorted(words.items()), shapes]).encode()
    total = crc32(np.frombuffer(told, np.uint8))
    for name in sorted(tensors):
        total = crc32(tensors[name].reshape(-1).view(torch.uint8).numpy(), total)
    return total

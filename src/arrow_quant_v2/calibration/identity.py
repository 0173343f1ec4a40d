"""Hashes of what decided a set of samples: settings, or the values themselves. Knows not where they come from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from arrow_quant_v2.calibration.sample import Sample


def of_settings(*settings: object) -> str:
    """A SHA-256 over plain values, in hexadecimal; the order counts."""
    return hashlib.sha256(repr(settings).encode()).hexdigest()


def of_calls(calls: Iterable[Sample]) -> str:
    """A SHA-256 over every argument's name, dtype, shape and values, and every timestep."""
    digest = hashlib.sha256()
    for call in calls:
        for part in _bytes((call.arguments, call.keywords, call.timestep)):
            digest.update(part)
    return digest.hexdigest()


def _bytes(entry: object) -> Iterator[bytes]:
    """What tells this entry from another, wherever tensors are in it."""
    if isinstance(entry, torch.Tensor):
        yield f"{entry.dtype} {tuple(entry.shape)} ".encode()
        yield entry.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(entry, np.ndarray):
        yield f"array {entry.dtype} {entry.shape} ".encode()
        yield np.ascontiguousarray(entry).tobytes()
    elif isinstance(entry, Mapping):
        yield f"mapping of {len(entry)} ".encode()
        for key in sorted(entry, key=str):
            yield f"{key!r} ".encode()
            yield from _bytes(entry[key])
    elif isinstance(entry, (tuple, list)):
        yield f"{type(entry).__name__} of {len(entry)} ".encode()
        for part in entry:
            yield from _bytes(part)
    else:
        yield f"{entry!r} ".encode()

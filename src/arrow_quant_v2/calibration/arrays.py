"""Inputs of a model as arrays, one sample along the first axis: `.safetensors` and `.npy`. Never unpickles.

Of more samples than are needed, as many are read as are, evenly spread over the file; the others are not.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from arrow_quant_v2.errors import ConfigurationError
from arrow_quant_v2.sources.npy import NpySource
from arrow_quant_v2.sources.safetensors import SafetensorsSource

if TYPE_CHECKING:
    from pathlib import Path

    from arrow_quant_v2.packed import TensorInfo
    from arrow_quant_v2.sources.base import Source

SUFFIXES = (".safetensors", ".npy")
NAMED = 3  # tensors in a refusal


def read_arrays(path: Path, count: int, first_argument: str) -> dict[int, dict[str, torch.Tensor]]:
    """At most `count` samples by their place on the first axis: arguments by name, each (1, ...).

    Numbers become float32 or int64; bool stays.

    An `.npy` file has no names and holds the argument `first_argument`.

    Raises:
        SourceError: the file is missing, damaged, or holds Python objects.
        ConfigurationError: the arrays differ in their first axis, or have none; or a number is not finite.
    """
    source: Source = NpySource(path) if path.suffix == ".npy" else SafetensorsSource([path])
    try:
        total = _samples(path, source.tensors)
        names = {i.name: first_argument if path.suffix == ".npy" else i.name for i in source.tensors}
        picked = [i * total // count for i in range(count)] if total > count else range(total)
        return {at: {names[i.name]: _read(path, source, i, at) for i in source.tensors} for at in picked}
    finally:
        source.close()


def _samples(path: Path, infos: tuple[TensorInfo, ...]) -> int:
    counts = {info.name: info.shape[0] if info.shape else 0 for info in infos}
    if len(set(counts.values())) != 1 or 0 in counts.values():
        more = f" and {len(infos) - NAMED} more" if len(infos) > NAMED else ""
        found = ", ".join(f"{info.name} {info.shape}" for info in infos[:NAMED]) + more or "nothing"
        raise ConfigurationError(f"{path}: holds {found}; the first axis counts the samples and is the same in all")
    return next(iter(counts.values()))


def _read(path: Path, source: Source, info: TensorInfo, at: int) -> torch.Tensor:
    size = math.prod(info.shape[1:])
    tensor = source.read(info.name, at * size, (at + 1) * size).reshape(1, *info.shape[1:])
    if not tensor.is_floating_point():
        return tensor if tensor.dtype is torch.bool else tensor.to(torch.int64)
    tensor = tensor.to(torch.float32)
    if not tensor.isfinite().all():
        raise ConfigurationError(f"{path}: sample {at} of {info.name} is not finite; remove or repair it")
    return tensor

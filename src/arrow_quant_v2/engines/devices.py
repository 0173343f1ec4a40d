"""Which devices this machine has for tensors, and what one of them can hold. Knows no models."""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from arrow_quant_v2.errors import ConfigurationError, QuantizationError

if TYPE_CHECKING:
    from collections.abc import Iterator

CPU = "cpu"
SINGLE_PRECISION = {"mps"}  # sums of squares are float64


def devices() -> list[str]:
    """The names of all devices that can be asked for, "cpu" first."""
    kind, count = _accelerators()
    if not count or kind in SINGLE_PRECISION:
        return [CPU]
    return [CPU, kind, *(f"{kind}:{number}" for number in range(count))]


def _accelerators() -> tuple[str, int]:
    """Their kind, and how many there are; torch before 2.6 knows of CUDA's alone."""
    if not hasattr(torch, "accelerator"):
        return "cuda", torch.cuda.device_count()
    found = torch.accelerator.current_accelerator()
    return ("", 0) if found is None else (found.type, torch.accelerator.device_count())


def refuse_missing(device: str) -> None:
    """Find out before any work that there is no such device.

    Raises:
        ConfigurationError: this machine has none, or torch was built without it.
    """
    there = devices()
    if device not in there:
        raise ConfigurationError(
            f"device is {device!r}; torch {torch.__version__} can work here on {', '.join(there)}: choose one of them"
        )


def reachable(device: torch.device | str) -> torch.device:
    """The device of this name, on which a tensor can lie.

    Raises:
        ConfigurationError: there is none, or torch was built without it.
    """
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (AssertionError, RuntimeError, TypeError) as error:  # torch asserts that it was built for it
        raise ConfigurationError(
            f"device is {str(device)!r}; torch {torch.__version__} can run a model here on {', '.join(devices())}:"
            " choose one of them"
        ) from error
    return found


def free_bytes(device: str) -> float:
    """Memory that is free on a device; infinity for the CPU, whose memory has limits of its own, or if not known."""
    return torch.cuda.mem_get_info(device)[0] if device.startswith("cuda") else math.inf


def name_of(device: str) -> str:
    """What a device is called by who made it; "" where nobody tells."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else ""


@contextmanager
def telling_what_is_full(device: str) -> Iterator[None]:
    """Inside, a device that runs out of memory is an error that names the way out.

    Raises:
        QuantizationError: it did.
    """
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise QuantizationError(
            f"{device}: its memory is full: {str(error).partition('.')[0]}; free it of other programs, work with one"
            " thread (threads=1), let weights be read block by block (max_memory), or use device='cpu'"
        ) from error

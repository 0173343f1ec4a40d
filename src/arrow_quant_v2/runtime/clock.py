"""Which timestep a running model is at: told by its caller, or found in what it is called with. Knows no layers."""

from __future__ import annotations

import inspect
import math
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch

from arrow_quant_v2.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor, nn

    from arrow_quant_v2.time_groups import TimeGroups

ARGUMENTS = ("timestep", "timesteps", "timestep_ratio", "sigma", "t")  # how models call their time

_told: ContextVar[float | None] = ContextVar("arrow_quant_timestep", default=None)


@contextmanager
def timestep(t: float | Tensor) -> Iterator[None]:
    """Every model called inside is at this timestep: its own time argument, or the masked fraction of a text.

    It outweighs what a model is called with, and is needed only where that says nothing of time. It holds for the
    current thread or task alone.

    Raises:
        ConfigurationError: it is not one finite number.
    """
    token = _told.set(_one_number(t))
    try:
        yield
    finally:
        _told.reset(token)


def _one_number(t: Any) -> float:
    try:
        value = float(t)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigurationError(f"timestep: {t!r} is not one number; give the time of one step") from error
    if not math.isfinite(value):
        raise ConfigurationError(f"timestep: {value} is not finite; give the model's own time argument")
    return value


class Clock:
    """The time group that a model is in while it runs, shared by its layers; `group` None: it is not known.

    One clock serves one model in one thread at a time.
    """

    def __init__(self, groups: TimeGroups, mask_token: int | None = None) -> None:
        """Take the groups, and the token whose share of `input_ids` is the time of a masked text model."""
        self.groups, self.mask_token = groups, mask_token
        self.group: int | None = None

    def now(self) -> int | None:
        """The group at this moment; that of `timestep` where a layer is called outside of its model."""
        if self.group is not None or torch.compiler.is_compiling():
            return self.group
        told = _told.get()
        return None if told is None else self.groups.group_of(told)

    def starts(self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """Note the time of a call of the model; a hook before its forward."""
        told = _told.get()
        found = told if told is not None else self._time_in(named(module, arguments, keywords))
        self.group = None if found is None else self.groups.group_of(found)

    def ends(self, *_: Any) -> None:
        """Forget it; a hook after the model's forward."""
        self.group = None

    def _time_in(self, given: Mapping[str, Any]) -> float | None:
        for name in ARGUMENTS:
            if (time := mean_time(given.get(name))) is not None:
                return time
        ids = given.get("input_ids")
        if self.mask_token is None or not isinstance(ids, torch.Tensor) or not ids.numel():
            return None
        return float((ids == self.mask_token).float().mean())


def named(module: nn.Module, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> dict[str, Any]:
    """What a module is called with, by the names of its forward's parameters."""
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return dict(zip(names, arguments, strict=False)) | dict(keywords)


def mean_time(value: Any) -> float | None:
    """One finite number of a time argument, the mean over a batch; None where it is none."""
    if isinstance(value, torch.Tensor) and value.numel() and not value.is_complex():
        value = float(value.detach().float().mean())
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None

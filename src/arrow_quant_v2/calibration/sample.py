"""One call of a model, and all the calls that calibration makes; does not know where they come from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """What the model's forward is given, and the timestep that it is given it at.

    Tensors lie on the CPU and have a batch axis; nothing in a batch is padding, unless a mask among the inputs says so.
    `timestep` is the model's own time argument; for masked text the masked fraction of the sequence.
    """

    arguments: tuple[object, ...] = ()
    keywords: Mapping[str, object] = field(default_factory=dict)
    timestep: float

    @property
    def count(self) -> int:
        """How many samples are shown in this one call: the length of the batch axis."""
        given = (*self.arguments, *self.keywords.values())
        return next((len(value) for value in given if isinstance(value, torch.Tensor) and value.ndim), 1)


@dataclass(frozen=True, kw_only=True, eq=False)
class Samples:
    """All the calls, in the order in which they are made; the same choices always give the same ones.

    origin     where they come from, in words for the report: "the model's own trajectory", "texts.jsonl"
    identity   a hash of everything that decided them: data, settings and seed
    synthetic  whether they were made up because nothing else could run
    notes      what a person should know: rows that were left out, and why
    """

    calls: tuple[Sample, ...]
    origin: str
    identity: str
    synthetic: bool = False
    notes: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """How many samples all calls show together."""
        return sum(call.count for call in self.calls)

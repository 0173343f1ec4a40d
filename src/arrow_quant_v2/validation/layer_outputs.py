"""What each layer gives for the inputs that it sees in the original model, with its own weight and with another one.

So a layer's error is its own: nothing comes from the layers before it. Knows nothing of the whole model's outputs.
"""

from __future__ import annotations

import copy
import functools
import math
import operator
import threading
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from arrow_quant_v2.engines.one_core import each_on_one_core
from arrow_quant_v2.validation.metrics import ratio
from arrow_quant_v2.validation.outputs import call

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from arrow_quant_v2.calibration.runnable import Runnable
    from arrow_quant_v2.calibration.sample import Sample
    from arrow_quant_v2.time_groups import TimeGroups

KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
CALLS = 1  # of each time group


@dataclass(frozen=True, kw_only=True)
class LayerOutputs:
    """How close Q x is to W x, biases left out.

    cosine  over all inputs x together
    error   |W x - Q x|^2 / |W x|^2 in each time group; NaN where no sample hit it
    """

    cosine: float
    error: tuple[float, ...]


class _Sums(NamedTuple):
    """|W x - Q x|^2, |W x|^2, W x . Q x and |Q x|^2 over inputs x."""

    difference: float = 0.0
    original: float = 0.0
    product: float = 0.0
    other: float = 0.0


def _added(one: _Sums, more: _Sums) -> _Sums:
    return _Sums(*map(operator.add, one, more))


def _found(groups: Sequence[_Sums]) -> LayerOutputs:
    whole = functools.reduce(_added, groups)
    length = math.sqrt(whole.original * whole.other)
    cosine = whole.product / length if length else float(not whole.difference)
    errors = tuple(ratio(sums.difference, sums.original) if any(sums) else math.nan for sums in groups)
    return LayerOutputs(cosine=min(1.0, cosine) if math.isfinite(cosine) else 0.0, error=errors)


class _Seen(threading.local):
    """What the call that this thread makes has shown of each layer."""

    def __init__(self) -> None:
        self.sums: dict[str, _Sums] = {}


def layer_outputs(
    runnable: Runnable,
    values: Mapping[str, torch.Tensor],
    samples: Sequence[Sample],
    groups: TimeGroups,
    done: Callable[[Sample], object] | None = None,
) -> dict[str, LayerOutputs]:
    """By the name in the files, every linear or convolution layer of `values` that the samples reach.

    `values` are the other model's, by their names in the module (`other_values`).

    Raises:
        ValidationError: the model cannot be called.
    """
    seen = _Seen()

    def one(sample: Sample) -> dict[str, _Sums]:
        seen.sums = {}
        call(runnable, sample)
        if done is not None:
            done(sample)
        return seen.sums

    with _watching(runnable, values, seen):
        every = each_on_one_core(one, samples)
    found: dict[str, list[_Sums]] = {}
    for sample, sums in zip(samples, every, strict=True):
        group = groups.group_of(sample.timestep)
        for name, more in sums.items():
            mine = found.setdefault(name, [_Sums()] * groups.count)
            mine[group] = _added(mine[group], more)
    return {name: _found(mine) for name, mine in found.items() if any(sums.original for sums in mine)}


def chosen(samples: Sequence[Sample], groups: TimeGroups) -> list[Sample]:
    """Up to CALLS samples of each time group, evenly spread."""
    found: list[Sample] = []
    for group in range(groups.count):
        mine = [sample for sample in samples if groups.group_of(sample.timestep) == group]
        count = min(CALLS, len(mine))
        found += [mine[(2 * at + 1) * len(mine) // (2 * count)] for at in range(count)]
    return found


@contextmanager
def _watching(runnable: Runnable, values: Mapping[str, torch.Tensor], seen: _Seen) -> Iterator[None]:
    """A hook on every layer whose weight is among the values."""
    with ExitStack() as stack:
        for name, place in runnable.names.items():
            path, _, leaf = place.rpartition(".")
            owner = runnable.module.get_submodule(path)
            if leaf == "weight" and place in values and isinstance(owner, KINDS):
                hook = owner.register_forward_hook(_counting(name, owner, values[place], seen))
                stack.callback(hook.remove)
        yield


def _counting(name: str, owner: nn.Module, other: torch.Tensor, seen: _Seen) -> Callable[..., None]:
    own, changed = _without_bias(owner, owner.weight), _without_bias(owner, other)  # type: ignore[arg-type]

    def hook(_: nn.Module, inputs: tuple[Any, ...], __: object) -> None:
        a, b = own.forward(*inputs), changed.forward(*inputs)
        more = _Sums(_product(a - b, a - b), _product(a, a), _product(a, b), _product(b, b))
        seen.sums[name] = _added(seen.sums.get(name, _Sums()), more)

    return hook


def _without_bias(owner: nn.Module, weight: torch.Tensor) -> Any:
    """The same layer with this weight alone; the module that runs is not touched."""
    layer = copy.copy(owner)
    layer._parameters = {"weight": nn.Parameter(weight.detach(), requires_grad=False), "bias": None}  # noqa: SLF001
    layer._forward_hooks = type(owner._forward_hooks)()  # noqa: SLF001
    return layer


def _product(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a * b).sum(dtype=torch.float64))

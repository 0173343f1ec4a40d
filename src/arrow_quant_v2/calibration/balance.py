"""Time groups with an equal share of the change in what layers are given along the trajectory. Keeps no stats."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from arrow_quant_v2.engines.one_core import each_on_one_core
from arrow_quant_v2.time_groups import balanced_groups

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from arrow_quant_v2.calibration.sample import Sample
    from arrow_quant_v2.time_groups import TimeGroups

SMALLEST = 1e-12
PRODUCTS = {nn.functional.linear, torch.conv1d, torch.conv2d, torch.conv3d}


def balanced(module: nn.Module, samples: Sequence[Sample], count: int) -> TimeGroups:
    """At most `count` groups; a step changes as much as the inputs of linear and convolution layers do.

    The change between two neighbouring timesteps is the mean over layers of |log(rms / rms)| of their inputs, so that
    every layer has the same say, whatever its range.
    """
    logs = torch.stack(each_on_one_core(lambda sample: _log_rms(module, sample), samples))  # (samples, layers)
    steps = sorted({sample.timestep for sample in samples})
    own = torch.tensor([steps.index(sample.timestep) for sample in samples])
    means = torch.stack([logs[own == step].nanmean(dim=0) for step in range(len(steps))])  # (steps, layers)
    changes = (means[1:] - means[:-1]).abs().nanmean(dim=1).nan_to_num(nan=0.0).tolist()
    return balanced_groups(steps, [*changes, 0.0], count)


def _log_rms(module: nn.Module, sample: Sample) -> Tensor:
    """(layers,): log of the root mean square of what each layer is given in one call; NaN where it is not called."""
    layers = [part for part in module.modules() if isinstance(part, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)]
    watch = _Ranges(layers)
    with torch.no_grad(), watch:
        module(*sample.arguments, **sample.keywords)
    return torch.tensor([watch.found.get(number, torch.nan) for number in range(len(layers))])


class _Ranges(torch.overrides.TorchFunctionMode):
    """Sees the inputs of products, in this thread alone."""

    def __init__(self, layers: Sequence[Any]) -> None:
        super().__init__()
        self.layers, self.found = layers, dict[int, float]()

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN204
        if func in PRODUCTS:
            self._note(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _note(self, input: Tensor, weight: Tensor, *_: object, **__: object) -> None:  # noqa: A002 - torch's name
        place = weight.data_ptr()  # compared now: a weight may be in memory only while its layer runs
        numbers = [number for number, layer in enumerate(self.layers) if layer.weight.data_ptr() == place]
        if numbers and input.numel():
            squares = input.to(torch.float32).square()
            self.found[numbers[-1]] = float(squares.mean().clamp(min=SMALLEST).log() / 2.0)

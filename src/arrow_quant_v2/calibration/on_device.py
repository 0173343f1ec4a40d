"""A model on a device: its weights lie there, and whoever calls it gives and gets tensors on the CPU.

So samples, random numbers and schedulers are the same wherever the model runs. Knows nothing of blocks or stats.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    from arrow_quant_v2.calibration.runnable import Runnable

CPU = torch.device("cpu")


def move_to(device: str, runnable: Runnable) -> None:
    """Let the model of a runnable run there; weights that lie on disk are brought there when they are read."""
    there = torch.empty(0, device=device).device  # "cuda" is another GPU in a thread that chose none
    if runnable.on_demand is not None:
        runnable.on_demand.move_to(there)
    _move(runnable.module, there)

    def bring(_: nn.Module, arguments: Any, keywords: Any) -> Any:
        return _each_to(there, (arguments, keywords))

    def fetch(_module: nn.Module, _arguments: Any, outputs: Any) -> Any:
        return _each_to(CPU, outputs)

    runnable.module.register_forward_pre_hook(bring, with_kwargs=True)
    runnable.module.register_forward_hook(fetch)


def _each_to(device: torch.device, values: Any) -> Any:
    return pytree.tree_map(lambda one: one.to(device) if isinstance(one, torch.Tensor) else one, values)


def _move(module: nn.Module, device: torch.device) -> None:
    """Not nn.Module.to: it knows no weights that are still to be read, and may part those that are tied."""
    moved: dict[torch.Tensor, torch.Tensor] = {}
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):  # noqa: SLF001 - torch's names
            for name, value in tensors.items():
                if value is not None and not value.is_meta:
                    if value not in moved:
                        moved[value] = _there(value, device)
                    tensors[name] = moved[value]  # type: ignore[assignment]


def _there(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    if value.device == device:
        return value
    there = value.detach().to(device)
    return nn.Parameter(there, requires_grad=value.requires_grad) if isinstance(value, nn.Parameter) else there

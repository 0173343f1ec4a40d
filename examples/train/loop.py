"""The training loop that all four models share: AdamW, a cosine schedule, averaged weights; knows no data."""

from __future__ import annotations

import copy
import math
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

WARMUP = 60  # steps until the learning rate is whole
SAVE_SECONDS = 180.0  # between two savings of the averaged weights
SHOWN = 50  # steps between two lines of the log
AVERAGED = 0.998  # how much of the averaged weights stays at a step, late in training


@dataclass(frozen=True, kw_only=True)
class Course:
    """How long and how fast a model learns."""

    steps: int
    rate: float
    decay: float = 0.05
    seed: int = 0
    bfloat16: bool = False  # products in bfloat16, which processors with AMX or AVX-512 do faster


@dataclass(kw_only=True)
class Learnt:
    """The averaged weights, the mean loss of the last steps, and the processor seconds that it took."""

    model: nn.Module
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def loss(self) -> float:
        """Mean of the last tenth of the steps."""
        last = self.losses[-max(1, len(self.losses) // 10) :]
        return sum(last) / len(last)


def learn(
    model: nn.Module,
    course: Course,
    loss_of: Callable[[nn.Module, int, torch.Generator], torch.Tensor],
    save: Callable[[Learnt], object] | None = None,
) -> Learnt:
    """Train; `loss_of(model, step, generator)` draws a batch. `save` is given the averaged model every few minutes."""
    draw = torch.Generator().manual_seed(course.seed)
    optimizer = torch.optim.AdamW(_groups(model, course.decay), lr=course.rate, betas=(0.9, 0.98), fused=True)
    learnt = Learnt(model=copy.deepcopy(model).eval().requires_grad_(requires_grad=False))
    began, saved = time.process_time(), time.monotonic()
    for step in range(course.steps):
        learnt.losses.append(_step(model.train(), optimizer, course, step, lambda: loss_of(model, step, draw)))  # noqa: B023
        _average(learnt.model, model, min(AVERAGED, (1 + step) / (10 + step)))
        learnt.seconds = time.process_time() - began
        _tell(learnt, step, course.steps)
        if save is not None and time.monotonic() - saved > SAVE_SECONDS:
            save(learnt)
            saved = time.monotonic()
    return learnt


def _groups(model: nn.Module, decay: float) -> list[dict[str, object]]:
    """Matrices decay; biases, norms and everything else of one axis do not."""
    found = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in found if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in found if p.ndim <= 1], "weight_decay": 0.0},
    ]


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    course: Course,
    step: int,
    loss_now: Callable[[], torch.Tensor],
) -> float:
    warm = min(1.0, (step + 1) / WARMUP)
    rate = course.rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / course.steps)))
    for group in optimizer.param_groups:
        group["lr"] = rate
    with torch.autocast("cpu", torch.bfloat16, enabled=course.bfloat16):
        loss = loss_now()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return float(loss.detach())


@torch.no_grad()
def _average(averaged: nn.Module, model: nn.Module, keep: float) -> None:
    for mean, now in zip(averaged.parameters(), model.parameters(), strict=True):
        mean.lerp_(now, 1.0 - keep)
    for mean, now in zip(averaged.buffers(), model.buffers(), strict=True):
        mean.copy_(now)


def _tell(learnt: Learnt, step: int, steps: int) -> None:
    if (step + 1) % SHOWN == 0 or step + 1 == steps:
        last = learnt.losses[-SHOWN:]
        sys.stderr.write(f"step {step + 1}/{steps}: loss {sum(last) / len(last):.4f}, {learnt.seconds:.0f} s\n")

"""Codes and grids of a quantized model tuned by what the whole model says beside the original.

The loss is the one that counts in the end: of masked text the divergence (KL, in nats) at hidden tokens, of all others
|a - b|^2 / |a|^2 of outputs. Some samples are held out, and what serves those best is kept.
Knows nothing of how codes were first chosen, or of where they lie.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from arrow_quant_v2.engines.one_core import each_on_one_core
from arrow_quant_v2.errors import QuantizationError
from arrow_quant_v2.validation.outputs import ROOM, call, evenly, hidden_logits_of, meaning_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor

    from arrow_quant_v2.calibration.runnable import Runnable
    from arrow_quant_v2.calibration.sample import Sample
    from arrow_quant_v2.packed import PackedTensor
    from arrow_quant_v2.quantizers.tunable import Tunable

HELD_OUT = 8  # every 8th call is held out
FEWEST = 2  # calls: one to tune by, and one that is held out
SAMPLES = 8  # in one step
LOOKS = 10  # at the samples that are held out
WARM = 10  # steps until the largest
USUAL = 100  # steps


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """How tuning went: the loss on the held-out calls before and after, and the layers on the grids that are kept.

    layers  name of a parameter of the module -> its rows, one after the other; empty where nothing helped
    """

    steps: int
    held_out: int
    before: float
    after: float
    layers: Mapping[str, Sequence[PackedTensor]]


class Tuner:
    """What the original says to each call, and how far the module is from it with other weights."""

    def __init__(self, runnable: Runnable, calls: Sequence[Sample]) -> None:
        """Ask the original, whose weights the runnable has now.

        Raises:
            QuantizationError: there are fewer than two calls, of which one could be held out.
            ValidationError: the model cannot be called, or says nothing that could be compared.
        """
        if len(calls) < FEWEST:
            raise QuantizationError("one call of the model is too few to tune by; give more calibration samples")
        self._runnable, self._calls = runnable, calls
        self._divergence = hidden_logits_of(runnable, calls[0], call(runnable, calls[0])) is not None
        self._said = each_on_one_core(lambda sample: self._rows(sample, call(runnable, sample)).detach(), calls)
        self._held_out = range(0, len(calls), HELD_OUT)
        self._seen = [number for number in range(len(calls)) if number % HELD_OUT]
        self._places = dict(runnable.module.named_parameters(remove_duplicate=False))

    def tunable(self, names: Sequence[str]) -> dict[str, str]:
        """Name in the files -> the module's parameter, of those that are a whole parameter of their own."""
        places = {name: self._runnable.names.get(name, "") for name in names}
        found = {name: place for name, place in places.items() if place in self._places}
        same = [id(self._places[place]) for place in found.values()]
        return {name: place for name, place in found.items() if same.count(id(self._places[place])) == 1}

    def tune(
        self,
        layers: Mapping[str, Sequence[Tunable]],
        steps: int,
        seed: int,
        *,
        after_step: Callable[[int, float], object],
    ) -> Tuned:
        """Make that many steps; `layers` are by the module's own names, `after_step` hears the best loss so far.

        The module is left with weights of some step.

        Raises:
            QuantizationError: the model has no gradients.
        """
        before = least = self._with(layers)
        best: dict[str, Sequence[PackedTensor]] = {}
        for step, numbers in enumerate(self._batches(steps, seed), start=1):
            self._step(layers, numbers, _share(step, steps))
            if step % max(1, steps // LOOKS) == 0 or step == steps:
                now = self._with(layers)
                if now < least:
                    least, best = now, {name: [one.packed for one in parts] for name, parts in layers.items()}
            after_step(step, least)
        return Tuned(steps=steps, held_out=len(self._held_out), before=before, after=least, layers=best)

    def _with(self, layers: Mapping[str, Sequence[Tunable]]) -> float:
        """The mean loss on held-out calls with these weights; infinite where outputs are not finite."""
        self._put(layers)

        def one(number: int) -> float:
            sample = self._calls[number]
            return float(self._loss(number, self._rows(sample, call(self._runnable, sample))))

        losses = each_on_one_core(one, self._held_out)
        return math.fsum(losses) / len(losses) if all(map(math.isfinite, losses)) else math.inf

    def _batches(self, steps: int, seed: int) -> Iterator[list[int]]:
        """Which calls each step sees: about as many samples in each, all calls equally often."""
        draw = torch.Generator().manual_seed(seed)
        size = min(len(self._seen), max(1, SAMPLES // self._calls[0].count))
        waiting: list[int] = []
        for _ in range(steps):
            while len(waiting) < size:
                waiting += [self._seen[i] for i in torch.randperm(len(self._seen), generator=draw).tolist()]
            yield waiting[:size]
            waiting = waiting[size:]

    def _step(self, layers: Mapping[str, Sequence[Tunable]], numbers: Sequence[int], share: float) -> None:
        self._put(layers)
        with self._with_gradients(layers):
            every = each_on_one_core(lambda number: self._felt(layers, number), numbers)
        for name, parts in layers.items():
            for at, one in enumerate(parts):
                one.move([sum(felt) / len(numbers) for felt in zip(*(f[name][at] for f in every), strict=True)], share)

    def _felt(self, layers: Mapping[str, Sequence[Tunable]], number: int) -> dict[str, list[list[Tensor]]]:
        """The gradient of one call's loss for each part of each layer."""
        sample, places = self._calls[number], [self._places[name] for name in layers]
        with torch.enable_grad():
            said = self._rows(sample, self._runnable.module(*sample.arguments, **sample.keywords))
            gradients = torch.autograd.grad(self._loss(number, said), places, allow_unused=True)
        return {
            name: _of_parts(parts, torch.zeros_like(place) if gradient is None else gradient)
            for (name, parts), place, gradient in zip(layers.items(), places, gradients, strict=True)
        }

    def _put(self, layers: Mapping[str, Sequence[Tunable]]) -> None:
        with torch.no_grad():
            for name, parts in layers.items():
                weight = torch.cat([one.weight() for one in parts])
                self._places[name].copy_(weight.reshape(self._places[name].shape))

    @contextmanager
    def _with_gradients(self, names: Mapping[str, object]) -> Iterator[None]:
        before = [(self._places[name], self._places[name].requires_grad) for name in names]
        try:
            for place, _ in before:
                place.requires_grad_()
            yield
        finally:
            for place, had in before:
                place.requires_grad_(had)

    def _rows(self, sample: Sample, output: object) -> Tensor:
        """What is compared: logarithms of probabilities of masked text, otherwise the outputs that matter."""
        logits = hidden_logits_of(self._runnable, sample, output) if self._divergence else None
        rows = meaning_of(self._runnable, sample, output) if logits is None else logits
        rows = evenly(rows, ROOM // len(self._calls)).float()
        return rows if logits is None else rows.log_softmax(dim=-1)

    def _loss(self, number: int, said: Tensor) -> Tensor:
        own = self._said[number]
        if self._divergence:
            return (own.exp() * (own - said)).sum(dim=-1).mean()
        return (own - said).square().sum() / own.square().sum().clamp(min=torch.finfo(torch.float32).tiny)


def _share(step: int, steps: int) -> float:
    """How large a step is: a rise, then half a cosine; where there are few, each has to go farther.

    A number that is stored changes only when the one behind it has gone half way to the next.
    """
    return math.sqrt(USUAL / steps) * min(1.0, step / WARM) * 0.5 * (1.0 + math.cos(math.pi * (step - 1) / steps))


def _of_parts(parts: Sequence[Tunable], gradient: Tensor) -> list[list[Tensor]]:
    """The gradient of a whole parameter, cut into the rows of its parts, as their grids feel it."""
    rows = [one.packed.rows for one in parts]
    matrix = gradient.to("cpu", torch.float32).reshape(sum(rows), -1)
    return [one.felt(some) for one, some in zip(parts, matrix.split(rows), strict=True)]

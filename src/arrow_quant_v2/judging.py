"""Whether a quantized model says what the original says to inputs that calibration did not see, and which layers hurt.

Knows nothing of how layers are quantized, nor of what follows from the judgement.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from arrow_quant_v2.calibration import chance
from arrow_quant_v2.calibration.samples import Asked
from arrow_quant_v2.errors import ConfigurationError, QuantizationError, SourceError
from arrow_quant_v2.sources.parquet import ParquetSource
from arrow_quant_v2.validation.metrics import kl_divergence
from arrow_quant_v2.validation.outputs import call, compare_outputs, hidden_logits_of, model_outputs, replaced

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from arrow_quant_v2.calibration.runnable import Runnable
    from arrow_quant_v2.calibration.sample import Sample
    from arrow_quant_v2.config import DiffusionQuantConfig
    from arrow_quant_v2.packed import TensorInfo
    from arrow_quant_v2.preparation import Prepared, Provider
    from arrow_quant_v2.sources.base import Source

MOST_CALLS = 16  # of the model, to judge all of it
CALLS_PER_LAYER = 4  # to see how much one layer hurts
SEEN = "samples that calibration saw too, for there are no others"


@dataclass(frozen=True, kw_only=True, eq=False)
class HeldOut:
    """Calls that calibration did not see, where there are such, and in words where they come from."""

    calls: tuple[Sample, ...]
    origin: str


def hold_out(
    prepared: Prepared, config: DiffusionQuantConfig, provider: Provider | None, purpose: int = chance.JUDGING
) -> HeldOut:
    """Other samples of the same kind: the rows behind those that were used, or the model's own with another seed.

    They are others for each purpose.
    """
    own = prepared.samples
    count = min(MOST_CALLS, len(own.calls))
    data = None if config.calibration_data is None else Path(config.calibration_data)
    prompts = data is not None and f"prompts of {data.name}" in own.origin  # each of them makes any number of calls
    given = provider is not None or (data is not None and not prompts)
    used = len(own.calls) + count * (purpose - chance.JUDGING) if given else 0
    seed = chance.held_out(config.seed, purpose)
    asked = Asked(count=used + count, seed=seed, data=data, callable=provider)
    try:
        calls = prepared.memory.gather(prepared.runnable, asked).calls[used : used + count]
    except (ConfigurationError, QuantizationError, SourceError):  # a function that can be called only once
        calls = ()
    if not calls:
        return HeldOut(calls=own.calls[-count:], origin=SEEN)
    return HeldOut(calls=calls, origin=f"{len(calls)} held-out samples of {own.origin}")


class Judge:
    """Runs the original once, and then ever again with what became of its weights."""

    def __init__(self, runnable: Runnable, source: Source, held_out: HeldOut) -> None:
        """Ask the original, whose weights the runnable has now.

        Raises:
            ValidationError: it cannot be called, or gives nothing that could be compared.
        """
        self.held_out = held_out
        self._runnable, self._source = runnable, source
        self._reference = model_outputs(runnable, held_out.calls)
        compare_outputs(self._reference, self._reference, held_out.calls)
        self._places = dict(runnable.module.named_parameters(remove_duplicate=False))
        first = held_out.calls[0]
        self._divergence = hidden_logits_of(runnable, first, call(runnable, first)) is not None

    @property
    def loss(self) -> str:
        """What `lost` is."""
        name = "divergence (KL, nats) at hidden tokens" if self._divergence else "error |a - b|^2 / |a|^2 of outputs"
        return f"{name} on {self.held_out.origin}"

    @property
    def metric(self) -> str:
        """What `accuracy` is."""
        return f"output cosine on {self.held_out.origin}"

    def accuracy(self, parts: Source) -> float:
        """The mean cosine between outputs of the original and of these weights; -1.0 where they are not finite.

        Raises:
            StoreError: a part is damaged.
        """
        self._put(parts, self._runnable.names)
        return self._cosine(range(len(self.held_out.calls)))

    def lost(self, parts: Source) -> float:
        """What these weights lose of the original's outputs, as tuning counts it; infinite where that is not finite.

        Of masked text the divergence sum p log(p / q) of the probabilities of hidden tokens, mean over tokens, in nats;
        of all others |a - b|^2 / |a|^2.

        Raises:
            StoreError: a part is damaged.
        """
        self._put(parts, self._runnable.names)
        calls = self.held_out.calls
        theirs = model_outputs(self._runnable, calls)
        if self._divergence:
            found = kl_divergence(_logarithms(self._reference), _logarithms(theirs))
        else:
            found = compare_outputs(self._reference, theirs, calls).error
        return found if math.isfinite(found) else math.inf

    def gains(self, parts: Source, layers: Iterable[str]) -> dict[str, float]:
        """By how much that cosine rises when one layer alone has its own weight again, on some of the samples.

        Raises:
            StoreError: a part is damaged.
        """
        calls = range(0, len(self.held_out.calls), max(1, len(self.held_out.calls) // CALLS_PER_LAYER))
        self._put(parts, self._runnable.names)
        before = self._cosine(calls)
        return {layer: self._cosine_with(layer, calls) - before for layer in layers}

    def knows(self, layer: str) -> bool:
        """Whether the layer is a part of the model that is run."""
        return self._runnable.names.get(layer) in self._places

    def restore(self, layers: Iterable[str]) -> None:
        """Give the model its own weights back."""
        self._put(self._source, layers)

    def _put(self, source: Source, layers: Iterable[str]) -> None:
        """In place: a second model in memory could be too much."""
        with torch.no_grad():
            for layer in layers:
                if self.knows(layer):
                    place = self._places[self._runnable.names[layer]]
                    place.copy_(source.read(layer).reshape(place.shape))

    def _cosine_with(self, layer: str, calls: Sequence[int]) -> float:
        name = self._runnable.names[layer]
        place = self._places[name]
        own = self._source.read(layer).reshape(place.shape).to(place)
        with replaced(self._runnable, {name: own}):
            return self._cosine(calls)

    def _cosine(self, numbers: Sequence[int]) -> float:
        calls = [self.held_out.calls[number] for number in numbers]
        found = compare_outputs([self._reference[n] for n in numbers], model_outputs(self._runnable, calls), calls)
        return found.cosine if math.isfinite(found.cosine) else -1.0


def _logarithms(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Of probabilities; those that float32 cannot tell from 0 are the smallest that it can."""
    return torch.cat(tuple(rows)).clamp(min=torch.finfo(torch.float32).tiny).log()


class Parts:
    """The finished layers of a run as a source, whatever is not finished as it was."""

    def __init__(self, source: Source, part_of: Mapping[str, Path]) -> None:
        """`part_of` names the file of each finished layer."""
        self._source, self._part_of = source, part_of

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """Every tensor of the model."""
        return self._source.tensors

    @property
    def location(self) -> str:
        """The model that they were made of."""
        return self._source.location

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """The parts."""
        return tuple(self._part_of.values())

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Elements [start, stop) of the flattened, dequantized tensor."""
        part = self._part_of.get(name)
        if part is None:
            return self._source.read(name, start, stop)
        source = ParquetSource(part)
        try:
            return source.read(name, start, stop)
        finally:
            source.close()

    def close(self) -> None:
        """Nothing is held open."""


def most_worth(gains: Mapping[str, float], added: Mapping[str, int], needed: float) -> list[str]:
    """The layers that bring back `needed` of the cosine for the fewest added bytes; at least one of them.

    What several layers bring adds up roughly, so those that gain most for a byte come first. All of them where no layer
    alone gains anything.
    """
    chosen: list[str] = []
    total = 0.0
    for name in sorted(gains, key=lambda name: (-gains[name] / max(1, added[name]), name)):
        if chosen and (total >= needed or gains[name] <= 0.0):
            break
        chosen.append(name)
        total += max(0.0, gains[name])
    return chosen if total > 0.0 else sorted(gains)

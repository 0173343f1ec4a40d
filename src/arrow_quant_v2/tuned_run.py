"""The layers of a finished pass once more, on grids that were tuned together; the others stay beside them.

Knows nothing of how layers were quantized. A run that is stopped meanwhile tunes from the beginning.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from arrow_quant_v2.calibrated_run import weight_of
from arrow_quant_v2.errors import InterruptedRunError, QuantizationError
from arrow_quant_v2.fallback import warn_of_fallback
from arrow_quant_v2.kernels.tensors import dequantized
from arrow_quant_v2.packed import PackedTensor
from arrow_quant_v2.progress import Progress
from arrow_quant_v2.quantizers.calibrated import error_of
from arrow_quant_v2.quantizers.tunable import Tunable
from arrow_quant_v2.store.reader import StoredModel
from arrow_quant_v2.store.writer import write_part
from arrow_quant_v2.workfolder import explained

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from arrow_quant_v2.config import DiffusionQuantConfig
    from arrow_quant_v2.decisions import Decision
    from arrow_quant_v2.plan import LayerPlan
    from arrow_quant_v2.publish import Description
    from arrow_quant_v2.sources.base import Source
    from arrow_quant_v2.store.record import LayerRecord
    from arrow_quant_v2.tuning import Tuned, Tuner
    from arrow_quant_v2.workfolder import WorkFolder

TOLD = "told.txt"  # beside the tuned layers: how tuning went, in words


@dataclass(frozen=True, kw_only=True, eq=False)
class TunedRun:
    """What tuning is given by the whole run."""

    source: Source
    config: DiffusionQuantConfig
    description: Description
    folder: WorkFolder
    tell: Callable[[str], object]
    should_stop: Callable[[], bool]


def tuned_plans(run: TunedRun, tuner: Tuner, plans: Sequence[LayerPlan]) -> tuple[tuple[LayerPlan, ...], str]:
    """The plans as they were followed in the end, and how tuning went; an earlier run may have done it.

    A model that has no gradients stays as it is, with a warning.

    Raises:
        QuantizationError: it has none, and `fail_fast` is asked.
        StoreError: a part is damaged, or cannot be written.
        InterruptedRunError: the run was asked to stop; layers are kept as they were before.
    """
    if not run.folder.tuned.exists():
        try:
            _write(run, plans, _tune(run, tuner, plans), tuner)
        except torch.cuda.OutOfMemoryError:  # a RuntimeError too, but it says nothing of gradients
            raise
        except (RuntimeError, NotImplementedError) as error:
            _give_up(run, error)
    with explained(run.folder.tuned):
        told = (run.folder.tuned / TOLD).read_text(encoding="utf-8")
    return tuple(_as_it_ended(run, index, plan, told) for index, plan in enumerate(plans)), told


def _tune(run: TunedRun, tuner: Tuner, plans: Sequence[LayerPlan]) -> Tuned:
    quantized = {plan.tensor.name: index for index, plan in enumerate(plans) if plan.layout is not None}
    places = tuner.tunable(list(quantized))
    layers = {place: _tunable(run.folder.part(quantized[name]), name) for name, place in places.items()}
    progress = Progress(lambda message, _: run.tell(message), run.config.tuning_steps)

    def after_step(step: int, least: float) -> None:
        progress.advance(1, f"tuning, step {step} of {run.config.tuning_steps}, held-out loss {least:.3g}")
        if run.should_stop():
            raise InterruptedRunError(
                f"stopped after {step} of {run.config.tuning_steps} steps of tuning, which begin anew;"
                f" layers that were finished before are kept in {run.folder.folder}"
            )

    progress.tell(f"tuning the grids of {len(layers)} layers")
    return tuner.tune(layers, run.config.tuning_steps, run.config.seed, after_step=after_step)


def _give_up(run: TunedRun, error: Exception) -> None:
    told = f"not tuned, for the model has no gradients ({error})"
    if run.config.fail_fast:
        raise QuantizationError(f"{run.source.location}: {told}; use tuning_steps=0") from error
    warn_of_fallback(run.source.location, told)
    run.folder.keep_tuned(_fresh(run, told))


def _fresh(run: TunedRun, told: str) -> Path:
    """A folder for tuned layers, in which so far stands how it went."""
    fresh = run.folder.scratch / "tuned.new"
    with explained(fresh):
        fresh.mkdir(parents=True)
        (fresh / TOLD).write_text(told, encoding="utf-8")
    return fresh


def _tunable(part: Path, name: str) -> list[Tunable]:
    with StoredModel(part) as stored:
        return [Tunable(one) for one in stored.read(name) if isinstance(one, PackedTensor)]


def _write(run: TunedRun, plans: Sequence[LayerPlan], tuned: Tuned, tuner: Tuner) -> None:
    """Every tuned layer into a folder, which is taken over when all of them are there."""
    places = tuner.tunable([plan.tensor.name for plan in plans])
    told = _told(tuned)
    fresh = _fresh(run, told)
    for index, plan in enumerate(plans):
        packed = tuned.layers.get(places.get(plan.tensor.name, ""))
        if packed is not None:
            part = run.folder.part(index)
            decision = _decided(plan, told)
            write_part(fresh / part.name, _records(run, plan, part, packed, decision), run.description.file_metadata())
    run.folder.keep_tuned(fresh)


def _records(
    run: TunedRun, plan: LayerPlan, part: Path, packed: Sequence[PackedTensor], decision: Decision
) -> Iterator[LayerRecord]:
    """What was known of a layer before, with what its codes mean now."""
    error = error_of(weight_of(run.source, plan), torch.cat([dequantized(one) for one in packed]))
    with StoredModel(part) as stored:
        for record, payload in zip(stored.records(), packed, strict=True):
            yield replace(
                record, payload=payload, decision=str(decision), cosine_similarity=error.cosine, mse=error.mse
            )


def _told(tuned: Tuned) -> str:
    measured = f"{tuned.steps} steps of tuning, loss of outputs on {tuned.held_out} held-out calls {tuned.before:.3g}"
    return f"{measured} to {tuned.after:.3g}" if tuned.layers else f"{measured}, never less: grids stay as they were"


def _decided(plan: LayerPlan, told: str) -> Decision:
    return replace(plan.decision, because=f"{plan.decision.because}; {told}")


def _as_it_ended(run: TunedRun, index: int, plan: LayerPlan, told: str) -> LayerPlan:
    tuned = run.folder.last(index) != run.folder.part(index)
    return replace(plan, decision=_decided(plan, told)) if tuned else plan

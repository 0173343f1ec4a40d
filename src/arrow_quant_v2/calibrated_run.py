"""The calibrated half of a run: walk the model, fit its layers, keep each one as a finished part.

Knows nothing of how samples are found or of what becomes of the layers that are not calibrated.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from arrow_quant_v2.calibration.blocks import walking
from arrow_quant_v2.errors import InterruptedRunError, StoreError
from arrow_quant_v2.fallback import Bar, warn_of_fallback
from arrow_quant_v2.forecast import seconds_to_fit, seconds_to_judge, seconds_to_tune
from arrow_quant_v2.kernels.tensors import dequantized
from arrow_quant_v2.layers import calibrated_records, stored_plan
from arrow_quant_v2.packed import PackedTensor
from arrow_quant_v2.plan import NO_WIDTHS, Calibrated, asked_bits, plan_model, wider_plan
from arrow_quant_v2.progress import duration
from arrow_quant_v2.quantizers.calibrated import Freedom
from arrow_quant_v2.sequential import Fitting, fit_in_sequence
from arrow_quant_v2.store.crc32 import crc32
from arrow_quant_v2.store.reader import StoredModel
from arrow_quant_v2.store.writer import write_part

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from arrow_quant_v2.calibration.blocks import Walk
    from arrow_quant_v2.calibration.runnable import Runnable
    from arrow_quant_v2.config import DiffusionQuantConfig, Method, Modality
    from arrow_quant_v2.layer_widths import LayerWidth
    from arrow_quant_v2.plan import LayerPlan
    from arrow_quant_v2.preparation import Prepared
    from arrow_quant_v2.progress import Progress
    from arrow_quant_v2.publish import Description
    from arrow_quant_v2.sequential import CalibratedLayer
    from arrow_quant_v2.sources.base import Source
    from arrow_quant_v2.workfolder import WorkFolder

EFFORT = 100  # times as long as quantizing a layer from its weights alone, about
GIVEN_UP = "the calibrated fit failed"
NOT_CALIBRATED = ", not calibrated: "
NOT_REACHED = "no inputs of it were seen, or only zeros"


@dataclass(frozen=True, kw_only=True, eq=False)
class FittedRun:
    """What fitting layers to their inputs is given by the whole run, wherever their stats come from."""

    source: Source
    config: DiffusionQuantConfig
    modality: Modality
    method: Method
    description: Description
    folder: WorkFolder
    progress: Progress
    should_stop: Callable[[], bool]
    widths: Mapping[str, LayerWidth] = field(default_factory=dict)  # of layers that shall have others than bit_width

    def asked(self, plan: LayerPlan) -> int:
        """The width that a layer was asked for at first."""
        return asked_bits(plan.tensor.name, self.config, self.widths)

    def at(self, plan: LayerPlan, bits: int) -> LayerPlan | None:
        """The plan of a fitted layer at the width behind `bits`; None where it may have none."""
        calibrated = Calibrated(names=frozenset({plan.tensor.name}), method=self.method)
        return wider_plan(plan, bits, self.config, calibrated)

    @property
    def freedom(self) -> Freedom:
        """What the fit may try."""
        return Freedom(
            rotate=self.config.enable_rotation,
            equalize=self.config.equalizes(self.modality),
            smooth=self.config.activation_smoothing,
            refits=self.config.grid_refits,
            sweeps=self.config.code_sweeps,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class CalibratedRun(FittedRun):
    """What the calibrated half is given by the whole run: a model that can be called, and samples."""

    prepared: Prepared


@dataclass(frozen=True, kw_only=True)
class CalibratedPlans:
    """All plans with what was decided in the end, and the names of the layers that were fitted.

    order   those that share an input, in the order in which inputs were looked at; each may depend on all before it
    """

    plans: tuple[LayerPlan, ...]
    names: frozenset[str]
    order: tuple[tuple[str, ...], ...] = ()


def run_calibrated(run: CalibratedRun) -> CalibratedPlans:
    """Fit every layer that the samples reach.

    Layers that are not reached keep the plan to be quantized from their weights alone.

    Raises:
        QuantizationError: a weight or an input is not finite, or the model cannot be called.
        StoreError: a part cannot be written.
        InterruptedRunError: the run was asked to stop; finished layers are kept.
    """
    runnable = run.prepared.runnable
    module_names = _watched(run)
    watched = runnable.parameters(module_names)
    read_before = runnable.reading
    calls, scratch = run.prepared.samples.calls, run.folder.scratch
    with walking(runnable.module, calls, watched, scratch, runnable.clock) as walk:
        reading = runnable.reading - read_before
        reached = {layer for block in walk.blocks for layers in block.inputs for layer in layers}
        names = frozenset(module_names[layer] for layer in reached)
        plans = plan_model(run.source.tensors, run.config, Calibrated(names=names, method=run.method), run.widths)
        keeper = Keeper(run, plans, names)
        fitting = _fitting(run, plans, module_names, keeper)
        device = torch.device(run.config.device)
        beside, sweeps = fitting.strength > 0.0, run.config.code_sweeps
        seconds = seconds_to_fit(walk, fitting.plans, reading, beside=beside, sweeps=sweeps, device=device)
        run.progress.begin(sum(effort(plan, names) for plan in plans))
        run.progress.tell(f"{_announcement(walk, run, len(names))}, about {_told_time(walk, run, seconds)}")
        fit_in_sequence(walk, fitting)
        inputs = [layers for block in walk.blocks for layers in block.inputs]
    order = tuple(tuple(module_names[layer] for layer in layers) for layers in inputs)
    return replace(keeper.result(NOT_REACHED), order=order)


def effort(plan: LayerPlan, calibrated: frozenset[str]) -> int:
    """What a layer adds to the whole work: its bytes, and many times as much where it is fitted to its inputs."""
    return plan.tensor.nbytes * (EFFORT if plan.tensor.name in calibrated else 1)


def _announcement(walk: Walk, run: CalibratedRun, layers: int) -> str:
    samples = run.prepared.samples
    told = f"calibrating {layers} layers in {len(walk.blocks)} blocks on {samples.count} samples: {samples.origin}"
    return told if run.prepared.runnable.on_demand is None else f"{told}, weights read block by block"


def _told_time(walk: Walk, run: CalibratedRun, fitting: float) -> str:
    """How long it will take: every whole plan that is still to be made and judged, and what comes behind them."""
    times, config = run.progress.times, run.config
    judging = seconds_to_judge(walk) * (times if times > 1 else bool(config.min_accuracy))
    told = duration(times * fitting + judging + seconds_to_tune(walk, config.tuning_steps))
    with_tuning = f", {config.tuning_steps} steps of tuning counted" if config.tuning_steps else ""
    return f"{told} for {times} plans{with_tuning}" if times > 1 else told + with_tuning


def _watched(run: CalibratedRun) -> dict[str, str]:
    """Module name -> file name of the weights that could be fitted: all that lie as torch has them."""
    everything = Calibrated(names=frozenset(info.name for info in run.source.tensors), method=run.method)
    plans = plan_model(run.source.tensors, run.config, everything, run.widths)
    return placed(run.source, run.prepared.runnable, {plan.tensor.name for plan in plans if plan.spec is not None})


def placed(source: Source, runnable: Runnable, wanted: Collection[str]) -> dict[str, str]:
    """Module name -> file name of those wanted that lie as torch has them."""
    infos = {info.name: info for info in source.tensors}
    parameters = dict(runnable.module.named_parameters(remove_duplicate=False))
    return {
        place: name
        for name, place in runnable.names.items()
        if name in wanted and place in parameters and tuple(parameters[place].shape) == infos[name].shape
    }


def _fitting(
    run: CalibratedRun, plans: Sequence[LayerPlan], module_names: Mapping[str, str], keeper: Keeper
) -> Fitting:
    by_name = {plan.tensor.name: plan for plan in plans}
    origin = run.prepared.samples.origin
    return Fitting(
        plans={module: by_name[name] for module, name in module_names.items()},
        groups=run.prepared.groups,
        freedom=run.freedom,
        time_aware=run.config.enable_time_aware,
        shown=f"{run.prepared.samples.count} samples of {origin}",
        values=lambda plan: weight_of(run.source, plan),
        finished=keeper.finished,
        keep=keeper.keep,
        holding=run.prepared.runnable.holding,
        importance=run.prepared.importance,
        strength=run.config.error_correction,
        bar=Bar.of(run.config),
        asked=run.asked,
        at=run.at,
        give_up=keeper.give_up,
    )


def weight_of(source: Source, plan: LayerPlan) -> torch.Tensor:
    """A plan's weight, (rows, columns) float32."""
    columns = plan.layout.columns if plan.layout else 1
    return source.read(plan.tensor.name).reshape(-1, columns).to(torch.float32)


class Keeper:
    """Writes each layer as a part, and finds those of an earlier run."""

    def __init__(self, run: FittedRun, plans: Sequence[LayerPlan], names: frozenset[str]) -> None:
        """Take the run, the plans of all layers in the order of their parts, and the names of those to be fitted."""
        self.run, self.plans, self.names = run, plans, names
        self.numbers = {plan.tensor.name: number for number, plan in enumerate(plans)}
        self.decided: dict[str, LayerPlan] = {}
        self.given_up: dict[str, str] = {}

    def finished(self, plan: LayerPlan) -> torch.Tensor | None:
        """The weight (rows, columns) that an earlier run made of a layer; None where it made none, or it is damaged."""
        part = self.run.folder.part(self.numbers[plan.tensor.name])
        if not part.exists():
            return None
        try:
            with StoredModel(part) as stored:
                chunks = [one for one in stored.read(plan.tensor.name) if isinstance(one, PackedTensor)]
                weights = [dequantized(chunk) for chunk in chunks]
                entry = stored.entries[0]
        except StoreError:
            return None
        if not weights:
            return None  # it was kept in the end
        self.decided[plan.tensor.name] = stored_plan(plan, entry)
        self.run.progress.skip(effort(plan, self.names))
        return weights[0] if len(weights) == 1 else torch.cat(weights)

    def give_up(self, plan: LayerPlan, because: str) -> None:
        """No way of fitting could be gone with this layer."""
        self.given_up[plan.tensor.name] = because
        warn_of_fallback(plan.tensor.name, f"{GIVEN_UP} ({because}), so from its weights alone")

    def keep(self, layer: CalibratedLayer) -> None:
        """Write one layer, tell how far the run is, and stop when that was asked."""
        run, plan = self.run, replace(layer.plan, decision=layer.decision)
        checksum = crc32(run.source.read(plan.tensor.name).view(torch.uint8).numpy())
        records = calibrated_records(layer, checksum, run.modality)
        write_part(run.folder.part(self.numbers[plan.tensor.name]), records, run.description.file_metadata())
        if plan.tensor.name not in self.decided:  # else it was found finished, but not all that share its inputs
            run.progress.advance(effort(plan, self.names), plan.tensor.name)
        self.decided[plan.tensor.name] = plan
        run.progress.tell(f"{len(self.decided)}/{len(self.names)} calibrated, {plan.tensor.name}")
        if run.should_stop():
            raise InterruptedRunError(
                f"stopped after {len(self.decided)} of {len(self.names)} calibrated layers;"
                f" they are kept in {run.folder.folder}"
            )

    def result(self, reason: str) -> CalibratedPlans:
        """All plans with what was decided; layers that were not fitted, for this reason, go by their weights alone."""
        run = self.run
        plans = (self.decided.get(p.tensor.name) or left_out(p, run.config, reason, run.widths) for p in self.plans)
        told = (self._told(plan) for plan in plans)
        return CalibratedPlans(plans=tuple(told), names=frozenset(self.decided))

    def _told(self, plan: LayerPlan) -> LayerPlan:
        """The same plan; where fitting failed, it says so."""
        error = self.given_up.get(plan.tensor.name)
        if error is None or plan.tensor.name in self.decided:
            return plan
        because = f"{plan.decision.because.partition(NOT_CALIBRATED)[0]}; {GIVEN_UP} ({error})"
        return replace(plan, decision=replace(plan.decision, kind="fallback", because=because))


def left_out(
    plan: LayerPlan, config: DiffusionQuantConfig, reason: str, widths: Mapping[str, LayerWidth] = NO_WIDTHS
) -> LayerPlan:
    """A layer whose inputs are not known is quantized from its weights alone, and says so."""
    if plan.spec is None:
        return plan
    (alone,) = plan_model([plan.tensor], config, widths=widths)
    because = f"{alone.decision.because}{NOT_CALIBRATED}{reason}"
    return replace(alone, decision=replace(alone.decision, because=because))

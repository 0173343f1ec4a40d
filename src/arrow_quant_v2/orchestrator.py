"""A model in, a quantized model out: read, plan, quantize, store. Knows no command line and no mathematics."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import TYPE_CHECKING

from arrow_quant_v2 import __version__
from arrow_quant_v2.budget import give_back_memory, plan_budget
from arrow_quant_v2.calibrated_run import (
    NOT_CALIBRATED,
    CalibratedPlans,
    FittedRun,
    left_out,
    run_calibrated,
)
from arrow_quant_v2.calibration.remembered import Memory
from arrow_quant_v2.engines.devices import refuse_missing, telling_what_is_full
from arrow_quant_v2.engines.local import in_background, ordered_map
from arrow_quant_v2.engines.one_core import cores_at_most
from arrow_quant_v2.errors import (
    ConfigurationError,
    InterruptedRunError,
    QuantizationError,
    SourceError,
    StoreError,
    ValidationError,
)
from arrow_quant_v2.fallback import Bar
from arrow_quant_v2.judging import Judge, hold_out
from arrow_quant_v2.layers import checksum_only, slices, source_checksum, stored_plan, work
from arrow_quant_v2.plan import (
    asked_bits,
    calibrated_method,
    plan_model,
    refuse_unused_names,
    wider_plan,
)
from arrow_quant_v2.preparation import data_identity, prepare, with_importance
from arrow_quant_v2.progress import Progress
from arrow_quant_v2.publish import CONFIG, Description, assemble, has_own_file, source_hash
from arrow_quant_v2.report.card import base_model_of
from arrow_quant_v2.report.facts import run_facts
from arrow_quant_v2.report.stored import stored_findings
from arrow_quant_v2.report.write import write_report
from arrow_quant_v2.rounds import Pass, Rounds
from arrow_quant_v2.sizing import Sizing, refuse_sizes_out_of_reach, refuse_too_large, widest, with_model
from arrow_quant_v2.sources.files import read_json
from arrow_quant_v2.stats_reuse import model_hash, open_stats, run_on_stats, stats_summary
from arrow_quant_v2.store.reader import StoredModel
from arrow_quant_v2.store.writer import make_durable, write_part
from arrow_quant_v2.tuned_run import TunedRun, tuned_plans
from arrow_quant_v2.tuning import Tuner
from arrow_quant_v2.weights_alone import Alone, settled
from arrow_quant_v2.workfolder import WorkFolder, refuse_overlap

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import nn

    from arrow_quant_v2.budget import Budget
    from arrow_quant_v2.calibration.stored_stats import KeptStats
    from arrow_quant_v2.config import DiffusionQuantConfig, Method, Modality
    from arrow_quant_v2.fallback import Verdict
    from arrow_quant_v2.layer_widths import LayerWidth
    from arrow_quant_v2.layers import Piece, Slice
    from arrow_quant_v2.plan import LayerPlan
    from arrow_quant_v2.preparation import Prepared, Provider
    from arrow_quant_v2.report.write import Written
    from arrow_quant_v2.sources.base import Source
    from arrow_quant_v2.sources.folder import Model


BY_WEIGHTS = "weight cosine of each layer"
BY_OUTPUTS = "output cosine of each layer on its calibration inputs, weight cosine where they are not known"
WORTH_GIVING_BACK = 32 * 2**20  # memory given back after smaller layers would only have to be fetched again


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one run is asked: a model, its modality, a configuration and where the result goes."""

    source: Source
    model: Model | None  # None: a live module, with no files beside its weights
    modality: Modality
    module: nn.Module | None = None
    provider: Provider | None = None  # a function of the user's own that gives calibration samples
    config: DiffusionQuantConfig
    out: Path
    overwrite: bool = False
    should_stop: Callable[[], bool] = bool  # asked after some samples, and every layer; bool() is False

    @property
    def component(self) -> str:
        """The subfolder that holds the weights, in the source and in the result."""
        return self.model.component if self.model else ""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run went: seconds, what was done with every tensor, and what the model was shown (None: nothing)."""

    seconds: float
    plans: Sequence[LayerPlan]
    calibration: Mapping[str, object] | None
    notes: tuple[str, ...]
    verdict: Verdict


def quantize_model(job: Job, report: Callable[[str, float], object] | None = None) -> Outcome:
    """Quantize every tensor of the source into `job.out`, which appears whole or not at all.

    Layers whose inputs are seen are fitted to them; where the model cannot be run, a warning and every layer's decision
    say so, and the weights alone decide.

    An interrupted run goes on where it stopped, and ends with the same bytes as one that was not.

    Raises:
        ConfigurationError: the output exists, lies inside the source, or the settings cannot be met.
        QuantizationError: a tensor cannot be quantized, or misses the bar with `fail_fast`.
        SourceError: the source cannot be read.
        StoreError: the output cannot be written.
        InterruptedRunError: `should_stop` said so; finished layers are kept.
    """
    started = time.monotonic()
    _refuse_unusable(job)
    refuse_unused_names(job.source.tensors, job.config)
    plans = plan_model(job.source.tensors, job.config, widths=widest(job.source.tensors, job.config))
    if not plans:
        raise QuantizationError(f"{job.source.location}: holds no tensors; give a folder with a model's weights")
    refuse_sizes_out_of_reach(job.source, job.model, job.modality, job.config)
    budget = plan_budget(plans, job.config)
    description = Description(
        config=job.config, modality=job.modality, component=job.component, source_hash=source_hash(job.source.tensors)
    )
    kept = None if job.config.stats is None else open_stats(job.config.stats, job.source)
    identity = _identity(description) | {"calibration data": data_identity(job.config)}
    if kept is not None:
        identity["stats"] = kept.identity
    with WorkFolder(job.out, identity, overwrite=job.overwrite) as folder, telling_what_is_full(job.config.device):
        progress = Progress(report, sum(plan.tensor.nbytes for plan in plans))
        run = _Run(plans=plans, budget=budget, description=description, folder=folder, progress=progress)
        with cores_at_most(budget.workers):
            shown = _with_widths(job, run, _shown(job, run, kept))
            done, verdict = _rounds(job, run, shown).until_met(partial(_one_pass, job, run, shown))
        assemble(folder, done.plans, description, job.model)
        refuse_too_large(folder.model, job.config, job.out)
        seconds = time.monotonic() - started
        shown = replace(shown, notes=(*shown.notes, *done.notes))
        written = _report(job, folder.model, seconds, shown, verdict)
        folder.publish()
    return Outcome(
        seconds=seconds,
        plans=done.plans,
        calibration=shown.summary,
        notes=(*shown.notes, *written.notes),
        verdict=verdict,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Shown:
    """What layers are fitted to: a model that can be called, or stats; and what people should know of it.

    tuner   tunes grids by them; None: that is not asked, or cannot be
    judge   compares the model's outputs; None: the model cannot be run, or not with other weights, or nothing is asked
    reason  why nothing is known, where something was to be
    widths  of each layer, where a size was asked for
    """

    prepared: Prepared | None = None
    kept: KeptStats | None = None
    judge: Judge | None = None
    tuner: Tuner | None = None
    reason: str = ""
    method: Method | None = None
    summary: Mapping[str, object] | None = None
    notes: tuple[str, ...] = ()
    widths: Mapping[str, LayerWidth] = field(default_factory=dict)


def _rounds(job: Job, run: _Run, shown: _Shown) -> Rounds:
    return Rounds(
        source=job.source,
        config=job.config,
        bar=Bar.of(job.config),
        folder=run.folder,
        judge=shown.judge,
        method=shown.method,
        tell=run.progress.tell,
    )


def _report(job: Job, folder: Path, seconds: float, shown: _Shown, verdict: Verdict) -> Written:
    """Show what became of the model, in the folder that is about to be published."""
    facts = run_facts(_name_of(job), job.out, job.config, seconds, shown.summary)
    findings = stored_findings(folder, facts, judged=verdict.accuracy is not None)
    findings = replace(findings, notes=(*findings.notes, *shown.notes), passed=not verdict.missed)
    if verdict.accuracy is not None:
        findings = replace(findings, accuracy=verdict.accuracy, metric=verdict.judged_by)
    return write_report(folder, findings, job.out.name)


def _name_of(job: Job) -> str:
    """What the original is called: no path, which is nobody's business."""
    if job.model is None:
        return type(job.module).__name__
    return base_model_of(job.model.root.absolute())


def _one_pass(job: Job, run: _Run, shown: _Shown, widths: Mapping[str, LayerWidth]) -> Pass:
    """Every layer once, at these widths: fitted where its inputs are known, and then the others."""
    fitted = _fitted(job, run, shown, {**shown.widths, **widths})
    plans = _work_on_layers(job, replace(run, plans=fitted.plans), fitted.names, shown.judge)
    judged_by = BY_OUTPUTS if fitted.names else BY_WEIGHTS
    plans, notes = _tuned(job, run, shown, plans)
    return Pass(plans=plans, names=fitted.names, order=fitted.order, judged_by=judged_by, notes=notes)


def _tuned(
    job: Job, run: _Run, shown: _Shown, plans: tuple[LayerPlan, ...]
) -> tuple[tuple[LayerPlan, ...], tuple[str, ...]]:
    """The same plans on grids that were tuned, where that was asked, and how it went."""
    if shown.tuner is None:
        return plans, ()
    tuning = TunedRun(
        source=job.source,
        config=job.config,
        description=run.description,
        folder=run.folder,
        tell=run.progress.tell,
        should_stop=job.should_stop,
    )
    plans, told = tuned_plans(tuning, shown.tuner, plans)
    return plans, (told,)


def _shown(job: Job, run: _Run, kept: KeptStats | None) -> _Shown:
    """Gather what layers are fitted to; where there is nothing, say why."""
    method = calibrated_method(job.config, job.modality)
    if kept is not None:
        return _stats_shown(job, kept, method)
    if not job.config.enable_calibration or method is None:
        return _Shown()
    run.progress.tell("gathering calibration samples")
    model = cache(partial(model_hash, job.source, job.model, job.module))
    try:
        prepared = prepare(
            job.model,
            job.module,
            job.modality,
            job.config,
            job.provider,
            tell=run.progress.tell,
            memory=Memory(folder=run.folder.samples, model=model),
        )
    except (ConfigurationError, SourceError, QuantizationError) as error:
        if job.config.calibration_data or job.provider or job.config.mask_token is not None:
            raise  # what a person asked for is not left out silently
        note = f"not calibrated, quantized from the weights alone: {error}"
        warnings.warn(note, stacklevel=3)
        return _Shown(reason=str(error), notes=(note,))
    prepared, beside = with_importance(prepared, job.config, tell=run.progress.tell, should_stop=job.should_stop)
    judge, notes = _judge(job, prepared)
    tuner, remarks = _tuner(job, prepared)
    samples = prepared.samples
    summary = {
        "samples": samples.count,
        "origin": samples.origin,
        "synthetic": samples.synthetic,
        "time_groups": [list(edges) for edges in prepared.groups.ranges()],
        "method": method,
    }
    notes = (*prepared.notes, *samples.notes, *beside, *notes, *remarks)
    return _Shown(prepared=prepared, judge=judge, tuner=tuner, method=method, summary=summary, notes=notes)


def _judge(job: Job, prepared: Prepared) -> tuple[Judge | None, tuple[str, ...]]:
    """Who compares the model's outputs; or nobody, and why."""
    if not job.config.min_accuracy:
        return None, ()
    if prepared.runnable.on_demand is not None:
        return None, ("larger than memory: the bar is held against each layer's outputs, not against the model's",)
    try:
        return Judge(prepared.runnable, job.source, hold_out(prepared, job.config, job.provider)), ()
    except ValidationError as error:
        return None, (f"the bar is held against each layer's outputs, not against the model's: {error}",)


def _tuner(job: Job, prepared: Prepared) -> tuple[Tuner | None, tuple[str, ...]]:
    """Who tunes grids; or nobody, and why."""
    if not job.config.tuning_steps:
        return None, ()
    if prepared.runnable.on_demand is not None:
        return None, ("not tuned: the model is larger than memory",)
    try:
        return Tuner(prepared.runnable, prepared.samples.calls), ()
    except (QuantizationError, ValidationError) as error:
        if job.config.fail_fast:
            raise
        return None, (f"not tuned: {error}",)


def _stats_shown(job: Job, kept: KeptStats, method: Method | None) -> _Shown:
    """Stats that were kept; the model is not run."""
    if method is None or job.provider is not None:
        raise ConfigurationError("stats and a calibration function were given; leave one of them out")
    summary = stats_summary(kept, method)
    if summary["synthetic"]:
        warnings.warn(f"{kept.folder}: stats of random inputs, which the model will not see in use", stacklevel=3)
    return _Shown(kept=kept, method=method, summary=summary)


def _fitted(job: Job, run: _Run, shown: _Shown, widths: Mapping[str, LayerWidth]) -> CalibratedPlans:
    """Fit the layers whose inputs are known; the others' plans are to be followed from their weights alone."""
    if shown.method is None:
        plans = plan_model(job.source.tensors, job.config, widths=widths)
        if shown.reason:
            plans = tuple(left_out(plan, job.config, shown.reason, widths) for plan in plans)
        return CalibratedPlans(plans=plans, names=frozenset())
    fitted = _fitted_run(job, run, shown.method, widths)
    if shown.kept is not None:
        return run_on_stats(fitted, shown.kept)
    return run_calibrated(with_model(fitted, shown.prepared))


def _fitted_run(job: Job, run: _Run, method: Method, widths: Mapping[str, LayerWidth]) -> FittedRun:
    return FittedRun(
        source=job.source,
        config=job.config,
        modality=job.modality,
        method=method,
        description=run.description,
        folder=run.folder,
        progress=run.progress,
        should_stop=job.should_stop,
        widths=widths,
    )


def _with_widths(job: Job, run: _Run, shown: _Shown) -> _Shown:
    """The same with the width of each layer, where a size is asked for."""
    if not job.config.has_target:
        return shown

    def make(folder: WorkFolder, widths: Mapping[str, LayerWidth]) -> Sequence[LayerPlan]:
        """As the run itself will do it; grids are tuned in the end."""
        return _one_pass(job, replace(run, folder=folder), replace(shown, tuner=None), widths).plans

    sizing = Sizing(
        source=job.source,
        config=job.config,
        modality=job.modality,
        component=job.component,
        folder=run.folder,
        progress=run.progress,
        make=make,
        provider=job.provider,
        fitted=None if shown.method is None else _fitted_run(job, run, shown.method, {}),
        prepared=shown.prepared,
        kept=shown.kept,
    )
    spent = sizing.spent()
    return replace(shown, widths=spent.plans[spent.best].widths, notes=(*shown.notes, *spent.notes))


def _identity(description: Description) -> dict[str, object]:
    """What must be the same for a run to go on: words that a person finds in a refusal."""
    return {
        "program version": __version__,
        "configuration": description.config.identity(),
        "modality": description.modality,
        "component": description.component,
        "model": description.source_hash,
    }


def _refuse_unusable(job: Job) -> None:
    """Find out before any work what would go wrong after all of it."""
    refuse_missing(job.config.device)
    if job.model is None:
        return
    beside = [job.model.root / path for path in job.model.side_files]
    refuse_overlap(job.out, job.model.root, [*job.source.weight_files, *beside])
    for path in beside:
        _refuse_unreadable(path)
    config = job.model.folder / CONFIG
    if config.exists():
        read_json(config)


def _refuse_unreadable(path: Path) -> None:
    try:
        path.open("rb").close()
    except OSError as error:
        raise SourceError(
            f"{path}: cannot be read: {error.strerror}; make it readable, or remove it from the model"
        ) from error


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What follows from a job before the first layer."""

    plans: Sequence[LayerPlan]
    budget: Budget
    description: Description
    folder: WorkFolder
    progress: Progress


def _work_on_layers(job: Job, run: _Run, calibrated: frozenset[str], judge: Judge | None) -> tuple[LayerPlan, ...]:
    """Make the part of every layer that has none, and make sure that those of an earlier run still fit.

    Those that were just calibrated are in the progress already. The plans come back as they were followed.
    """
    budget, folder, progress = run.budget, run.folder, run.progress
    found = [_finished(folder.part(index), plan) for index, plan in enumerate(run.plans)]
    plans = [plan if done is None else done for plan, done in zip(run.plans, found, strict=True)]
    done = {index for index, plan in enumerate(found) if plan is not None}
    alone = _alone(job, run, None if judge else Bar.of(job.config))

    def one(item: tuple[int, Slice]) -> Piece:
        index, piece = item
        return checksum_only(job.source, piece) if index in done else work(job.source, piece)

    items = ((i, piece) for i, plan in enumerate(plans) for piece in slices(plan, budget.slice_bytes))
    with (
        in_background() as later,
        ordered_map(
            one,
            items,
            workers=budget.workers,
            in_flight=budget.in_flight,
            room=budget.ahead_bytes,
            size=lambda item: item[1].result_bytes,
        ) as results,
    ):
        for index, pieces in enumerate(_by_layer(results, progress, calibrated)):
            if index in done:
                _refuse_changed(folder.part(index), plans[index], pieces)
            else:
                plans[index] = _write_layer(run, index, pieces, alone)
                if has_own_file(plans[index]):
                    later(make_durable, folder.part(index))
            if plans[index].stored_bytes >= WORTH_GIVING_BACK:
                give_back_memory()
            progress.tell(f"{index + 1}/{len(plans)} {plans[index].tensor.name}")
            if job.should_stop() and index + 1 < len(plans):
                raise InterruptedRunError(
                    f"stopped after {index + 1} of {len(plans)} layers; they are kept in {folder.folder}"
                )
    return tuple(plans)


def _write_layer(run: _Run, index: int, pieces: list[Piece], alone: Alone) -> LayerPlan:
    """A function of its own, so that a layer is not in memory while the next one is read."""
    plan, layer = settled(run.plans[index], pieces, alone)
    write_part(run.folder.part(index), layer, run.description.file_metadata())
    return plan


def _alone(job: Job, run: _Run, bar: Bar | None) -> Alone:
    """What is asked of layers that no inputs are known of."""

    def wider(plan: LayerPlan, bits: int) -> LayerPlan | None:
        wide = wider_plan(plan, bits, job.config)
        _, why, reason = plan.decision.because.partition(NOT_CALIBRATED)
        return wide and replace(wide, decision=replace(wide.decision, because=wide.decision.because + why + reason))

    return Alone(
        source=job.source,
        modality=job.modality,
        slice_bytes=run.budget.slice_bytes,
        bar=bar,
        fail_fast=job.config.fail_fast,
        asked=lambda plan: asked_bits(plan.tensor.name, job.config),
        wider=wider,
    )


def _by_layer(results: Iterator[Piece], progress: Progress, counted: frozenset[str]) -> Iterator[list[Piece]]:
    """The pieces of one layer after the other."""
    pieces: list[Piece] = []
    for piece in results:
        pieces.append(piece)
        name = piece.slice.plan.tensor.name
        if piece.result is not None:
            progress.advance(piece.source_bytes, name)
        elif name not in counted:
            progress.skip(piece.source_bytes)
        if piece.slice.last:
            yield pieces
            pieces = []


def _finished(part: Path, plan: LayerPlan) -> LayerPlan | None:
    """The plan by which an earlier run finished this layer; None: it did not, or a damaged part is to be made again."""
    if not part.exists():
        return None
    try:
        with StoredModel(part) as stored:
            stored.read(plan.tensor.name)
            return stored_plan(plan, stored.entries[0]) if stored.names == (plan.tensor.name,) else None
    except StoreError:
        return None


def _refuse_changed(part: Path, plan: LayerPlan, pieces: Sequence[Piece]) -> None:
    with StoredModel(part) as stored:
        before = stored.entries[0].source_checksum
    if before != source_checksum(pieces):
        raise ConfigurationError(
            f"{plan.tensor.name}: has other values than when this run was interrupted: the model was changed;"
            f" restore it, or remove {part.parent.parent} to start anew"
        )

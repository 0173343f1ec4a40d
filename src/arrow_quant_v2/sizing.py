"""Widths that follow from a size: what is possible, what single layers lose, whole plans made, judged, the best kept.

Knows nothing of how a plan is made, or of what becomes of the widths.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from arrow_quant_v2.allocation import Scope, refuse_unreachable
from arrow_quant_v2.calibrated_run import CalibratedRun
from arrow_quant_v2.calibration import chance
from arrow_quant_v2.errors import ConfigurationError, QuantizationError, SourceError, ValidationError
from arrow_quant_v2.judging import Judge, hold_out
from arrow_quant_v2.layer_widths import LayerWidth
from arrow_quant_v2.losses import losses_of_weights, losses_on_stats, measured_losses
from arrow_quant_v2.plan import Calibrated, likely_calibrated
from arrow_quant_v2.preparation import tied_tensors
from arrow_quant_v2.stats_reuse import calibrated_by_stats
from arrow_quant_v2.trials import Trials
from arrow_quant_v2.whole_plans import Spent, kept_plans, measured_plan, whole_plans

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from arrow_quant_v2.calibrated_run import FittedRun
    from arrow_quant_v2.calibration.stored_stats import KeptStats
    from arrow_quant_v2.config import DiffusionQuantConfig, Modality
    from arrow_quant_v2.losses import Losses
    from arrow_quant_v2.packed import TensorInfo
    from arrow_quant_v2.preparation import Prepared, Provider
    from arrow_quant_v2.progress import Progress
    from arrow_quant_v2.sources.base import Source
    from arrow_quant_v2.sources.folder import Model
    from arrow_quant_v2.trials import Make
    from arrow_quant_v2.workfolder import WorkFolder

SINGLE = "widths follow from what single layers lose, no whole plans were judged"


@dataclass(frozen=True, kw_only=True, eq=False)
class Sizing:
    """What choosing widths within a size is given by the whole run.

    fitted    how layers are fitted to their inputs; None: all go by their weights alone
    prepared  the model as it is called; None: it is not
    kept      stats in its stead
    make      leaves the parts of a whole plan in a folder
    """

    source: Source
    config: DiffusionQuantConfig
    modality: Modality
    component: str
    folder: WorkFolder
    progress: Progress
    make: Make
    provider: Provider | None = None
    fitted: FittedRun | None = None
    prepared: Prepared | None = None
    kept: KeptStats | None = None

    def spent(self) -> Spent:
        """Whole plans within the size: as an earlier run chose them, or by measuring; judged where outputs compare.

        Raises:
            ConfigurationError: no choice of widths meets the size.
            QuantizationError: a layer cannot be measured; or a plan cannot be made, with `fail_fast`.
            StoreError: the disk refuses.
            InterruptedRunError: the run was asked to stop.
        """
        judge, notes = self._judge()
        spent = kept_plans(self.folder.allocation, lambda: self._chosen(compared=judge is not None))
        if judge is not None and len(spent.plans) > 1:
            spent = self._trials(judge).best(spent)
        return replace(spent, notes=(*spent.notes, *notes))

    def _chosen(self, *, compared: bool) -> Spent:
        """By measuring; several plans where their outputs can be compared."""
        losses = self._losses()
        method = "gptq" if self.fitted is None else self.fitted.method
        calibrated = Calibrated(names=losses.seen, method=method)
        scope = Scope(
            tensors=self.source.tensors,
            config=self.config,
            modality=self.modality,
            component=self.component,
            calibrated=calibrated,
        )
        if not compared:
            return Spent(plans=(measured_plan(scope, losses.layers),), notes=losses.notes)
        return Spent(plans=whole_plans(scope, losses.layers, losses.own), notes=losses.notes)

    def _losses(self) -> Losses:
        if self.fitted is None:
            return losses_of_weights(self.source, self.config)
        if self.kept is not None:
            return losses_on_stats(self.fitted, self.kept)
        return measured_losses(with_model(self.fitted, self.prepared))

    def _judge(self) -> tuple[Judge | None, tuple[str, ...]]:
        """Who compares outputs of whole plans; or nobody, and why."""
        if self.prepared is None or self.config.whole_plans == 1:
            return None, ()
        if self.prepared.runnable.on_demand is not None:
            return None, (f"larger than memory: {SINGLE}",)
        try:
            held_out = hold_out(self.prepared, self.config, self.provider, chance.CHOOSING)
            return Judge(self.prepared.runnable, self.source, held_out), ()
        except ValidationError as error:
            return None, (f"{SINGLE}: {error}",)

    def _trials(self, judge: Judge) -> Trials:
        return Trials(
            source=self.source,
            folder=self.folder,
            judge=judge,
            progress=self.progress,
            make=self.make,
            fail_fast=self.config.fail_fast,
        )


def with_model(fitted: FittedRun, prepared: Prepared | None) -> CalibratedRun:
    """The same for a model that can be called."""
    if prepared is None:
        raise QuantizationError("nothing is known of the layers' inputs; this is a bug, please report it")
    return CalibratedRun(**vars(fitted), prepared=prepared)


def widest(tensors: Sequence[TensorInfo], config: DiffusionQuantConfig) -> Mapping[str, LayerWidth]:
    """What takes most memory, before widths are chosen."""
    if not config.has_target:
        return {}
    return {info.name: LayerWidth(bits=8, because="") for info in tensors}


def refuse_sizes_out_of_reach(
    source: Source, model: Model | None, modality: Modality, config: DiffusionQuantConfig
) -> None:
    """Refuse a size that no choice of widths meets, before any work.

    What calibration will reach is told before the model is opened; one that cannot be is told later.

    Raises:
        ConfigurationError: says what is possible; or stats are of another model.
        StoreError: stats are damaged.
    """
    if not config.has_target:
        return
    calibrated = _foreseen(source, model, modality, config)
    component = model.component if model else ""
    refuse_unreachable(
        Scope(tensors=source.tensors, config=config, modality=modality, component=component, calibrated=calibrated)
    )


def _foreseen(source: Source, model: Model | None, modality: Modality, config: DiffusionQuantConfig) -> Calibrated:
    """What will be fitted: as stats tell, or as names and shapes do."""
    if config.stats is not None:
        return calibrated_by_stats(config.stats, source, config, modality)
    try:
        tied = tied_tensors(model, config)
    except (ConfigurationError, SourceError):
        tied = {}
    return likely_calibrated(source.tensors, config, modality, tied)


def refuse_too_large(folder: Path, config: DiffusionQuantConfig, out: Path) -> None:
    """Keep the promise of a size: files are counted before they get their name.

    Raises:
        QuantizationError: they take more.
    """
    target = config.target_size
    size = sum(path.stat().st_size for path in folder.rglob("*.parquet"))
    if target is not None and size > target:
        raise QuantizationError(
            f"{out}: the weight files take {size} bytes, more than target_size, {target}; ask for {2 * target - size}"
        )

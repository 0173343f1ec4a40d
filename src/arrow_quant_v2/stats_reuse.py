"""Layers fitted to stats that were kept: no model is run. Knows nothing of how the stats were made."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from arrow_quant_v2.calibrated_run import Keeper, effort, weight_of
from arrow_quant_v2.calibration.identity import of_settings
from arrow_quant_v2.calibration.stored_stats import KeptStats
from arrow_quant_v2.engines.local import ordered_map
from arrow_quant_v2.errors import ConfigurationError, SourceError, StoreError
from arrow_quant_v2.fallback import Bar
from arrow_quant_v2.plan import NOTHING_CALIBRATED, Calibrated, calibrated_method, plan_model, quant_axis
from arrow_quant_v2.publish import content_hash, source_hash
from arrow_quant_v2.sequential import Fitting, fit_input
from arrow_quant_v2.store.crc32 import crc32

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from arrow_quant_v2.calibrated_run import CalibratedPlans, FittedRun
    from arrow_quant_v2.calibration.stored_stats import KeptInput
    from arrow_quant_v2.config import DiffusionQuantConfig, Modality
    from arrow_quant_v2.packed import TensorInfo
    from arrow_quant_v2.plan import LayerPlan
    from arrow_quant_v2.sources.base import Source
    from arrow_quant_v2.sources.folder import Model

SLICE = 2**22  # elements of a tensor that are read at once
WORKERS = 2
OF_PIPELINES = ("model_index.json", "scheduler/scheduler_config.json")
UNKNOWN = "the stats hold no inputs of it, or only zeros"


def values_hash(source: Source) -> str:
    """SHA-256 of a model's tensors, their values included; all of them are read.

    Raises:
        SourceError: one cannot be read.
    """
    with ordered_map(lambda info: _checksum(source, info), source.tensors, workers=WORKERS, in_flight=WORKERS) as sums:
        entries = zip(source.tensors, sums, strict=True)
        return content_hash((info.name, info.dtype, info.shape, checksum) for info, checksum in entries)


def model_hash(source: Source, model: Model | None, module: nn.Module | None) -> str:
    """SHA-256 of what decides what a model says: its tensors, and how it is built as its files or a live module tell.

    Raises:
        SourceError: a tensor or a file cannot be read.
    """
    places = () if model is None else (model.folder / "config.json", *(model.root / name for name in OF_PIPELINES))
    try:
        built = [(path.name, path.read_bytes()) for path in places if path.is_file()]
    except OSError as error:
        raise SourceError(f"{error.filename}: cannot be read: {error.strerror}") from error
    return of_settings(values_hash(source), repr(module), built)


def _checksum(source: Source, info: TensorInfo) -> int:
    total = 0
    for start in range(0, info.numel, SLICE):
        values = source.read(info.name, start, min(start + SLICE, info.numel))
        total = crc32(values.view(torch.uint8).numpy(), total)
    return total


def stats_of(path: str, source: Source) -> KeptStats:
    """The stats in a folder, which must be of a model with these tensors; their values are not read.

    Raises:
        ConfigurationError: they are of another model.
        StoreError: they are damaged.
    """
    kept = KeptStats(Path(path))
    if kept.summary.model != source_hash(source.tensors):
        raise ConfigurationError(
            f"{path}: are stats of another model than {source.location}, with other tensors; calibrate this model"
        )
    return kept


def open_stats(path: str, source: Source) -> KeptStats:
    """The stats in a folder, which must be of this very model.

    Raises:
        ConfigurationError: they are of another model, or of one with other values.
        StoreError: they are damaged.
    """
    kept = stats_of(path, source)
    if kept.summary.model_content != values_hash(source):
        raise ConfigurationError(
            f"{path}: are stats of a model with the tensors of {source.location} but other values; calibrate this model"
        )
    return kept


def calibrated_by_stats(path: str, source: Source, config: DiffusionQuantConfig, modality: Modality) -> Calibrated:
    """Which layers will be fitted to the stats in a folder, and how; reads no values.

    Raises:
        ConfigurationError: they are of another model.
        StoreError: they are damaged.
    """
    method = calibrated_method(config, modality)
    if method is None:
        return NOTHING_CALIBRATED
    return Calibrated(names=frozenset(stats_of(path, source).summary.layers), method=method)


def run_on_stats(run: FittedRun, kept: KeptStats) -> CalibratedPlans:
    """Fit every layer that the stats know, one input at a time.

    Raises:
        QuantizationError: a weight is not finite, or an H cannot be used.
        StoreError: the stats are damaged or do not fit, or a part cannot be written.
        InterruptedRunError: the run was asked to stop; finished layers are kept.
    """
    calibrated = Calibrated(names=frozenset(kept.summary.layers), method=run.method)
    plans = plan_model(run.source.tensors, run.config, calibrated, run.widths)
    by_name = {plan.tensor.name: plan for plan in plans}
    for entry in kept.summary.inputs:
        _refuse_unfit(kept, entry, by_name)
    names = frozenset(layer for layer in kept.summary.layers if by_name[layer].spec is not None)
    keeper = Keeper(run, plans, names)
    run.progress.begin(sum(effort(plan, names) for plan in plans))
    run.progress.tell(f"fitting {len(names)} layers to {_shown(kept)}")
    fitting = Fitting(
        plans=by_name,
        groups=kept.groups,
        freedom=run.freedom,
        time_aware=run.config.enable_time_aware,
        shown=_shown(kept),
        values=lambda plan: weight_of(run.source, plan),
        finished=keeper.finished,
        keep=keeper.keep,
        bar=Bar.of(run.config),
        asked=run.asked,
        at=run.at,
        give_up=keeper.give_up,
    )
    for number, entry in enumerate(kept.summary.inputs):
        planned = [layer for layer in entry.layers if layer in names]
        if any(keeper.finished(by_name[layer]) is None for layer in planned):  # they share a basis: all or none
            stats = kept.read(number)
            stats.move_to(run.config.device)
            if stats.second.matrix.diagonal().any():
                fit_input(stats, planned, fitting)
    return keeper.result(UNKNOWN)


def _shown(kept: KeptStats) -> str:
    return f"stats {kept.folder.resolve().name} ({kept.summary.origin})"


def stats_summary(kept: KeptStats, method: str) -> dict[str, object]:
    """What the result says of a calibration from stats."""
    summary = kept.summary
    return {
        "samples": summary.count,
        "origin": _shown(kept),
        "synthetic": any(one.synthetic for one in summary.samples),
        "time_groups": [list(edges) for edges in kept.groups.ranges()],
        "method": method,
        "stats": str(kept.folder),
    }


def _refuse_unfit(kept: KeptStats, entry: KeptInput, plans: Mapping[str, LayerPlan]) -> None:
    for layer in entry.layers:
        shape = plans[layer].tensor.shape if layer in plans else ()
        if not _fits(entry, shape):
            raise StoreError(
                f"{kept.folder}: {layer} is {shape or 'no tensor'} in the model; its input has"
                f" {entry.channels} channels and {entry.columns} columns in the stats; calibrate again"
            )


def _fits(entry: KeptInput, shape: tuple[int, ...]) -> bool:
    """Whether such an input can meet a weight of this shape, and its parts the weight's rows."""
    if len(shape) < 2:  # noqa: PLR2004 - a matrix
        return False
    axis = quant_axis(shape)
    rows, columns = torch.Size(shape[:axis]).numel(), torch.Size(shape[axis:]).numel()
    if any(not first < stop <= rows for first, stop in entry.parts):
        return False
    if entry.transposed:
        sizes = {stop - first for first, stop in entry.parts} or {rows}
        return sizes == {entry.columns} == {entry.channels}
    return (entry.channels, entry.columns) == (shape[axis], columns)

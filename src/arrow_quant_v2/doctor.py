"""What a run would do and need, told before any work: sizes, memory, disk, skips. Reads headers, no values."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from arrow_quant_v2.allocation import Scope, forethought, reach, refuse_unreachable
from arrow_quant_v2.budget import available_bytes, calibration_bytes, plan_budget, running_bytes
from arrow_quant_v2.engines.devices import CPU, devices, free_bytes, name_of, refuse_missing
from arrow_quant_v2.errors import ConfigurationError, SourceError
from arrow_quant_v2.judging_memory import judging_bytes
from arrow_quant_v2.plan import (
    NOTHING_CALIBRATED,
    calibrated_method,
    likely_calibrated,
    refuse_unused_names,
)
from arrow_quant_v2.prediction import predicted_weight_bytes
from arrow_quant_v2.preparation import tied_tensors
from arrow_quant_v2.publish import file_groups
from arrow_quant_v2.stats_reuse import calibrated_by_stats

if TYPE_CHECKING:
    from pathlib import Path

    from arrow_quant_v2.allocation import Reach
    from arrow_quant_v2.config import DiffusionQuantConfig, Modality
    from arrow_quant_v2.plan import Calibrated, LayerPlan
    from arrow_quant_v2.sources.base import Source
    from arrow_quant_v2.sources.folder import Model

Verdict = Literal["fits", "tight", "will not fit"]
COMFORTABLE = 0.7  # of what is available; above this other programs may have to make way
DeviceVerdict = Literal["fits", "block by block"]


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """The device beside the CPU on which the model shall run, and whether it holds all of the model; sizes in bytes.

    free  None: nobody tells
    """

    device: str
    name: str
    needed: int
    free: int | None

    @property
    def verdict(self) -> DeviceVerdict:
        """A model that it cannot hold is read from the disk, block by block, which takes longer."""
        return "fits" if self.free is None or self.needed <= self.free else "block by block"


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """The answer to "what would happen?"; all sizes in bytes.

    Where widths follow from a size, `plans` are only about right: which layer gets which is measured by the run.
    """

    plans: tuple[LayerPlan, ...]
    modality: Modality
    calibration: str
    calibrated: frozenset[str]
    source_bytes: int
    predicted_bytes: int
    predicted_peak_memory: int
    available_memory: int
    free_disk: int
    needed_disk: int
    memory_verdict: Verdict
    disk_verdict: Verdict
    devices: tuple[str, ...] = (CPU,)
    accelerator: Accelerator | None = None
    reach: Reach | None = None

    @property
    def verdict(self) -> Verdict:
        """The worse of memory and disk."""
        both = (self.memory_verdict, self.disk_verdict)
        order: tuple[Verdict, ...] = ("will not fit", "tight", "fits")
        return next(verdict for verdict in order if verdict in both)


def diagnose(
    source: Source, model: Model | None, modality: Modality, config: DiffusionQuantConfig, out_disk: Path
) -> Diagnosis:
    """Plan the run and weigh it against this machine; `out_disk` is a folder on the disk that the output goes to.

    Raises:
        ConfigurationError: `max_memory` is less than the model needs, this machine has not the device, or stats are of
            another model.
        StoreError: stats are damaged.
    """
    refuse_missing(config.device)
    refuse_unused_names(source.tensors, config)
    component = model.component if model else ""
    reason, calibrated = _calibrated(source, model, modality, config)
    scope = Scope(tensors=source.tensors, config=config, modality=modality, component=component, calibrated=calibrated)
    possible = _reach(scope)
    plans = scope.plans(forethought(scope) if possible else {})
    budget = plan_budget(plans, config)
    fitting = calibration_bytes(
        plans,
        calibrated.names,
        equalized=config.equalizes(modality),
        regrouped=config.has_target,
    )
    judging = judging_bytes(plans, calibrated, config, budget.workers) if config.stats is None else 0
    peak = max(budget.peak_bytes, fitting + judging)
    predicted = predicted_weight_bytes(plans, modality, config, component, calibrated.names)
    beside = sum((model.root / path).stat().st_size for path in model.side_files) if model else 0
    needed_disk = predicted + _merged_bytes(plans) + beside  # parts that are merged lie there twice for a moment
    memory, disk = available_bytes(), _free_bytes(out_disk)
    return Diagnosis(
        plans=plans,
        modality=modality,
        calibration=reason or _what_is_shown(config, calibrated, modality),
        calibrated=frozenset(p.tensor.name for p in plans if p.spec is not None) & calibrated.names,
        source_bytes=sum(info.nbytes for info in source.tensors),
        predicted_bytes=predicted,
        predicted_peak_memory=peak,
        available_memory=memory,
        free_disk=disk,
        needed_disk=needed_disk,
        memory_verdict=_verdict(peak, memory),
        disk_verdict=_verdict(needed_disk, disk),
        devices=tuple(devices()),
        accelerator=_accelerator(source, config.device),
        reach=possible,
    )


def _reach(scope: Scope) -> Reach | None:
    """What sizes are possible, where one is asked for.

    Raises:
        ConfigurationError: the one that is asked for is not.
    """
    if not scope.config.has_target:
        return None
    refuse_unreachable(scope)
    return reach(scope)


def _accelerator(source: Source, device: str) -> Accelerator | None:
    """What is known of the device; None where it is the CPU, whose memory is weighed anyway."""
    if device == CPU:
        return None
    free = free_bytes(device)
    return Accelerator(
        device=device,
        name=name_of(device),
        needed=running_bytes(source.tensors),
        free=None if math.isinf(free) else int(free),
    )


def _calibrated(
    source: Source, model: Model | None, modality: Modality, config: DiffusionQuantConfig
) -> tuple[str | None, Calibrated]:
    """Why nothing will be calibrated, or None; and what will be.

    Raises:
        ConfigurationError, SourceError: the model cannot be opened as one that runs, and calibration data were given;
            or stats are of another model.
        StoreError: stats are damaged.
    """
    reason = _why_from_the_weights_alone(model, modality, config)
    if reason is not None:
        return reason, NOTHING_CALIBRATED
    if config.stats is not None:
        return None, calibrated_by_stats(config.stats, source, config, modality)
    try:
        tied = tied_tensors(model, config)
    except (ConfigurationError, SourceError) as error:
        if config.calibration_data or config.mask_token is not None:
            raise
        return f"from the weights alone: {error}", NOTHING_CALIBRATED
    return None, likely_calibrated(source.tensors, config, modality, tied)


def _why_from_the_weights_alone(model: Model | None, modality: Modality, config: DiffusionQuantConfig) -> str | None:
    """Why nothing will be calibrated, as far as that is known without opening the model; None where it will."""
    if not config.enable_calibration:
        return "from the weights alone: calibration is switched off"
    if calibrated_method(config, modality) is None:
        return f"from the weights alone: method {config.method} looks at nothing else"
    if config.stats is not None:
        return None
    if model is None:
        return None if config.calibration_data else "from the weights alone, unless calibration= gives inputs"
    told = (model.root / "model_index.json", model.folder / "config.json")
    return (
        None if any(path.is_file() for path in told) else "from the weights alone: no config.json tells how to run it"
    )


def _what_is_shown(config: DiffusionQuantConfig, calibrated: Calibrated, modality: Modality) -> str:
    """What layers are fitted to; short texts are more samples than are asked for."""
    if config.stats is not None:
        return f"{calibrated.method}, calibrated on stats {config.stats}"
    origin = config.calibration_data or "the model's own trajectory, or of random inputs where it has none"
    text = modality in {"text", "code"} and config.calibration_tokens
    more = f" or more, {config.calibration_tokens:,} tokens," if text else ""
    return f"{calibrated.method}, calibrated on {config.calibration_samples} samples{more} of {origin}"


def _merged_bytes(plans: tuple[LayerPlan, ...]) -> int:
    return sum(plans[i].stored_bytes for group in file_groups(plans) if len(group) > 1 for i in group)


def _free_bytes(folder: Path) -> int:
    """Room on the disk that a folder lies on, or will lie on."""
    path = folder.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _verdict(needed: int, available: int) -> Verdict:
    if needed > available:
        return "will not fit"
    return "tight" if needed > COMFORTABLE * available else "fits"

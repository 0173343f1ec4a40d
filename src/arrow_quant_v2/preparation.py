"""What calibration needs before the first layer: a model that can be called, samples, time groups; or why it cannot be.

Knows nothing of how layers are fitted.
"""

from __future__ import annotations

import copy
import hashlib
import math
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from arrow_quant_v2.budget import available_bytes, running_bytes
from arrow_quant_v2.calibration.balance import balanced
from arrow_quant_v2.calibration.importance import ALIKE, importance
from arrow_quant_v2.calibration.on_device import move_to
from arrow_quant_v2.calibration.pipelines import open_pipeline
from arrow_quant_v2.calibration.remembered import NO_MEMORY, Memory
from arrow_quant_v2.calibration.runnable import Runnable
from arrow_quant_v2.calibration.samples import Asked
from arrow_quant_v2.calibration.transformers_model import open_transformers, tied_names
from arrow_quant_v2.engines.devices import CPU, free_bytes
from arrow_quant_v2.errors import ConfigurationError, InterruptedRunError, QuantizationError, SourceError
from arrow_quant_v2.plan import WEIGHTS_ALONE
from arrow_quant_v2.progress import duration
from arrow_quant_v2.sources.files import read_json
from arrow_quant_v2.time_groups import uniform_groups

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import nn

    from arrow_quant_v2.calibration.importance import Importance
    from arrow_quant_v2.calibration.sample import Samples
    from arrow_quant_v2.config import DiffusionQuantConfig, Modality
    from arrow_quant_v2.sources.base import Source
    from arrow_quant_v2.sources.folder import Model
    from arrow_quant_v2.time_groups import TimeGroups

    Provider = Callable[[nn.Module], Iterable[tuple[Any, float]]]

EXPERTS_SEEN = {None, "eager", "grouped_mm"}  # ways of transformers to compute experts, in which a watch sees them
BLOCK_BY_BLOCK = "larger than memory: weights are read from disk block by block"


@dataclass(frozen=True, kw_only=True, eq=False)
class Prepared:
    """A model ready to be walked through, what it will be shown, and where such samples are kept.

    importance  how much each row of each layer's inputs counts
    """

    runnable: Runnable
    samples: Samples
    groups: TimeGroups
    memory: Memory = NO_MEMORY
    importance: Importance = ALIKE

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should know of how the model runs."""
        return () if self.runnable.on_demand is None else (BLOCK_BY_BLOCK,)


def prepare(
    model: Model | None,
    module: nn.Module | None,
    modality: Modality,
    config: DiffusionQuantConfig,
    provider: Provider | None,
    *,
    tell: Callable[[str], object],
    memory: Memory = NO_MEMORY,
) -> Prepared:
    """Open the model and gather its samples; `provider` is a function of the user's own, module -> (inputs, timestep).

    Samples that the model makes of itself are kept in `memory`, or taken from there.
    A model that memory cannot hold has its weights read from the disk by every call; `tell` is told so.

    Raises:
        ConfigurationError: what is needed is not installed, or what was given cannot be used.
        SourceError: the model cannot be opened as one that runs, or a calibration file is damaged.
        QuantizationError: the model cannot be called.
    """
    runnable = open_runnable(model, module, modality, config)
    if config.device != CPU:
        move_to(config.device, runnable)
    if runnable.on_demand is not None:
        tell(f"gathering calibration samples, {BLOCK_BY_BLOCK}")
    data = None if config.calibration_data is None else Path(config.calibration_data)
    asked = Asked(
        count=config.calibration_samples,
        tokens=config.calibration_tokens,
        seed=config.seed,
        data=data,
        callable=provider,
    )
    samples = memory.gather(runnable, asked)
    if not samples.calls:
        raise ConfigurationError(f"calibration on {samples.origin} gave no samples; give some that fit the model")
    if samples.synthetic:
        _refuse_uncallable(runnable, samples)
    _warn(samples)
    groups = _groups(runnable, samples, config)
    return Prepared(runnable=runnable, samples=samples, groups=groups, memory=memory)


def with_importance(
    prepared: Prepared,
    config: DiffusionQuantConfig,
    *,
    tell: Callable[[str], object],
    should_stop: Callable[[], bool] = bool,
) -> tuple[Prepared, tuple[str, ...]]:
    """The same once it is known how much rows of inputs count, where that is asked for; or why it cannot be told.

    Raises:
        InterruptedRunError: `should_stop`, asked after some samples, said so; what is known of them is kept.
        StoreError: it cannot be kept.
    """
    if not config.enable_importance:
        return prepared, ()
    calls = prepared.samples.calls
    tell(f"{len(calls)} samples will be looked at for what outputs feel")
    kept, began = prepared.memory.felt(calls, config.seed), time.monotonic()

    def looked_at(done: int, known: int) -> None:
        timed, now = done - known, time.monotonic() - began
        left = f", about {duration(now / timed * (len(calls) - done))} more" if timed else ""
        tell(f"{done}/{len(calls)} samples looked at for what outputs feel{left}")
        if timed and done < len(calls) and should_stop():
            raise InterruptedRunError(f"stopped after {done} of {len(calls)} samples were looked at; they are kept")

    try:
        found = importance(prepared.runnable, calls, seed=config.seed, kept=kept, tell=looked_at)
    except torch.cuda.OutOfMemoryError:  # a RuntimeError too, but the model has gradients
        raise
    except (RuntimeError, NotImplementedError) as error:
        note = f"all tokens count alike, because gradients tell nothing: {error}"
        warnings.warn(note, stacklevel=3)
        return prepared, (note,)
    return replace(prepared, importance=found), ()


def _warn(samples: Samples) -> None:
    """Say what a person should know of the samples before a long run."""
    for note in samples.notes:
        warnings.warn(note, stacklevel=3)
    if samples.synthetic:
        warnings.warn(
            "calibrated on random inputs, because nothing tells what the model is used for: give --calibration FILE",
            stacklevel=3,
        )


def _refuse_uncallable(runnable: Runnable, samples: Samples) -> None:
    """Nobody knows whether a model takes inputs that were made up: find out while something else can be done."""
    first = samples.calls[0]
    try:
        with torch.no_grad():
            runnable.module(*first.arguments, **first.keywords)
    except torch.cuda.OutOfMemoryError:  # a RuntimeError too, but other inputs are no way out
        raise
    except (RuntimeError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise QuantizationError(
            f"{type(runnable.module).__name__} cannot be called with {samples.origin} ({error}); give calibration data"
        ) from error


def _groups(runnable: Runnable, samples: Samples, config: DiffusionQuantConfig) -> TimeGroups:
    if config.time_groups == "balanced":
        return balanced(runnable.module, samples.calls, config.num_time_groups)
    return uniform_groups([call.timestep for call in samples.calls], config.num_time_groups)


def open_runnable(
    model: Model | None, module: nn.Module | None, modality: Modality, config: DiffusionQuantConfig
) -> Runnable:
    """The model as one that can be called; of a live module a copy.

    Raises:
        ConfigurationError: what is needed is not installed.
        SourceError: it cannot be opened as one that runs.
        QuantizationError: diffusers is not installed.
    """
    runnable = _opened(model, module, modality, config)
    _let_experts_be_seen(runnable.module)
    return runnable


def _let_experts_be_seen(module: nn.Module) -> None:
    """Transformers has ways of computing experts that gather copies of their weights; the usual one gives the same."""
    for part in module.modules():
        described: Any = getattr(part, "config", None)
        if getattr(described, "_experts_implementation", None) not in EXPERTS_SEEN:
            described._experts_implementation = "grouped_mm"  # noqa: SLF001 - transformers' name


def _opened(
    model: Model | None, module: nn.Module | None, modality: Modality, config: DiffusionQuantConfig
) -> Runnable:
    if module is not None:
        return _live(module, modality, config)
    if model is None:
        raise SourceError("no model was given that could be called")
    if (model.root / "model_index.json").is_file():
        return open_pipeline(model.root, model.component, modality)
    described = model.folder / "config.json"
    if not described.is_file():
        raise SourceError(f"{model.folder}: has no config.json that tells how to run the model")
    if "_class_name" in read_json(described):
        return open_pipeline(model.folder, None, modality)
    return open_transformers(model, modality, config.mask_token, on_demand=_larger_than_memory(model.source, config))


def tied_tensors(model: Model | None, config: DiffusionQuantConfig) -> dict[str, list[str]]:
    """The other names by which a transformers model uses tensors of its files, told without any values.

    Nobody asks where nothing will be calibrated.

    Raises:
        ConfigurationError: transformers is not installed.
        SourceError: transformers does not know the model.
    """
    if model is None or not config.enable_calibration or config.method in WEIGHTS_ALONE:
        return {}
    described = model.folder / "config.json"
    pipeline = (model.root / "model_index.json").is_file()
    if pipeline or not described.is_file() or "_class_name" in read_json(described):
        return {}
    return tied_names(model)


def _larger_than_memory(source: Source, config: DiffusionQuantConfig) -> bool:
    """Whether the model in float32, and what is made of its widest H or its largest tensor, do not fit into memory."""
    needed = running_bytes(source.tensors)
    return needed > min(available_bytes(), config.max_memory or math.inf, free_bytes(config.device))


def _live(module: nn.Module, modality: Modality, config: DiffusionQuantConfig) -> Runnable:
    """A copy of the user's own module: its weights will be changed as they are quantized."""
    own = copy.deepcopy(module).to("cpu", torch.float32).eval().requires_grad_(requires_grad=False)
    return Runnable(
        module=own, modality=modality, names={name: name for name in own.state_dict()}, mask_token=config.mask_token
    )


def data_identity(config: DiffusionQuantConfig) -> str | None:
    """SHA-256 of the calibration file, so that work that was interrupted goes on with the same data only.

    Raises:
        ConfigurationError: the file cannot be read.
    """
    if config.calibration_data is None or not config.enable_calibration:
        return None
    try:
        with Path(config.calibration_data).open("rb") as file:
            total = hashlib.sha256()
            while part := file.read(2**20):
                total.update(part)
            return total.hexdigest()
    except OSError as error:
        raise ConfigurationError(
            f"{config.calibration_data}: cannot be read: {error.strerror}; give a file of calibration data"
        ) from error

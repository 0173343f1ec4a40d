"""A model in, its stats out: samples, one pass through the blocks as they are, a folder that appears whole or not.

Knows no methods and quantizes nothing.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from arrow_quant_v2 import __version__
from arrow_quant_v2.budget import cores
from arrow_quant_v2.calibrated_run import placed
from arrow_quant_v2.calibration.blocks import walking
from arrow_quant_v2.calibration.merging import merge_into, refuse_unlike
from arrow_quant_v2.calibration.observe import observe_block, strata
from arrow_quant_v2.calibration.remembered import NO_MEMORY, Memory
from arrow_quant_v2.calibration.stored_stats import (
    NAME,
    VERSION,
    KeptInput,
    KeptSamples,
    KeptStats,
    Summary,
    is_stats,
    write_input,
    write_summary,
)
from arrow_quant_v2.engines.devices import refuse_missing, telling_what_is_full
from arrow_quant_v2.engines.one_core import cores_at_most
from arrow_quant_v2.errors import ConfigurationError
from arrow_quant_v2.plan import quant_axis, reason_not_to_quantize
from arrow_quant_v2.preparation import data_identity, prepare
from arrow_quant_v2.progress import Progress
from arrow_quant_v2.publish import source_hash
from arrow_quant_v2.stats_reuse import values_hash
from arrow_quant_v2.workfolder import WorkFolder, difference, refuse_overlap

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from torch import nn

    from arrow_quant_v2.calibration.blocks import Walk
    from arrow_quant_v2.calibration.observe import Strata
    from arrow_quant_v2.calibration.sample import Samples
    from arrow_quant_v2.calibration.stats import InputStats
    from arrow_quant_v2.calibration.stored_stats import KeptFile
    from arrow_quant_v2.config import DiffusionQuantConfig, Modality
    from arrow_quant_v2.preparation import Prepared, Provider
    from arrow_quant_v2.sources.base import Source
    from arrow_quant_v2.sources.folder import Model
    from arrow_quant_v2.time_groups import TimeGroups


@dataclass(frozen=True, kw_only=True)
class StatsJob:
    """What one calibration is asked.

    compact  sum the time groups of each input up at once: as many times smaller, but seldom to be merged
    like     stats whose time groups are to be used, so that both can be merged
    """

    source: Source
    model: Model | None  # None: a live module
    modality: Modality
    module: nn.Module | None = None
    provider: Provider | None = None
    config: DiffusionQuantConfig
    out: Path
    overwrite: bool = False
    compact: bool = False
    like: Path | None = None


@dataclass(frozen=True, kw_only=True)
class StatsOutcome:
    """The stats that lie there now; `reused`: they were there before, made from the very same."""

    kept: KeptStats
    seconds: float
    reused: bool = False
    notes: tuple[str, ...] = ()


class StatsFolder(WorkFolder):
    """The unfinished stats: as an unfinished model, but nothing of them is kept."""

    def _refuse_existing(self) -> None:
        if not self.out.exists() or (self.out.is_dir() and not any(self.out.iterdir())):
            return
        if not is_stats(self.out):
            raise ConfigurationError(f"{self.out}: exists and holds no stats; choose another output folder")
        if not self._overwrite:
            raise ConfigurationError(f"{self.out}: holds stats already; choose another name, or --overwrite them")


def make_stats(job: StatsJob, report: Callable[[str, float], object] | None = None) -> StatsOutcome:
    """Observe what goes into the layers of the unquantized model, and keep it in `job.out`.

    Raises:
        ConfigurationError: the output holds something else, or what was given cannot be used.
        SourceError: the model cannot be read or run.
        QuantizationError: it cannot be called, or its inputs are not finite.
        StoreError: the disk refuses.
    """
    started = time.monotonic()
    _refuse_unusable(job)
    progress = Progress(report, 1)
    progress.tell("reading the model")
    like = None if job.like is None else KeptStats(job.like)
    prepared = None if job.provider is None else _prepared(job, progress)  # what a function gives, only it can tell
    asked = _asked(job, like, prepared)
    before = _made_before(job.out, asked, overwrite=job.overwrite)
    if before is not None:
        return StatsOutcome(kept=before, seconds=time.monotonic() - started, reused=True)
    with (
        cores_at_most(job.config.threads or cores()),
        StatsFolder(job.out, asked, overwrite=job.overwrite) as folder,
        telling_what_is_full(job.config.device),
    ):
        memory = Memory(folder=folder.samples, model=lambda: json.dumps(asked["model"]))
        prepared = prepared or _prepared(job, progress, memory)
        groups = prepared.groups if like is None else like.groups
        run = _Run(
            job=job,
            prepared=prepared,
            groups=groups,
            target=folder.fresh_model(),
            scratch=folder.scratch,
            report=report,
        )
        write_summary(run.target, _observed(run, asked))
        folder.publish()
    notes = (*prepared.notes, *prepared.samples.notes)
    return StatsOutcome(kept=KeptStats(job.out), seconds=time.monotonic() - started, notes=notes)


def merge_stats(folders: Sequence[Path], out: Path, *, overwrite: bool = False) -> StatsOutcome:
    """Add stats of the same model and settings up into `out`: what one calibration on all their samples would give.

    Raises:
        ConfigurationError: they do not belong together, or the output holds something else.
        StoreError: one of them is damaged, or the disk refuses.
    """
    started = time.monotonic()
    stats = [KeptStats(folder) for folder in folders]
    refuse_unlike(stats)
    asked: dict[str, Any] = {"merged stats": [one.identity for one in stats]}
    before = _made_before(out, asked, overwrite=overwrite)
    if before is not None:
        return StatsOutcome(kept=before, seconds=time.monotonic() - started, reused=True)
    for one in stats:
        refuse_overlap(out, one.folder, [one.folder / NAME])
    with StatsFolder(out, asked, overwrite=overwrite) as folder:
        target = folder.fresh_model()
        write_summary(target, merge_into(target, stats, asked))
        folder.publish()
    return StatsOutcome(kept=KeptStats(out), seconds=time.monotonic() - started)


# What is asked, and whether it was done before


def _refuse_unusable(job: StatsJob) -> None:
    refuse_missing(job.config.device)
    if job.config.stats is not None:
        raise ConfigurationError("stats are what calibrate makes; leave the setting `stats` out")
    if job.model is not None:
        beside = [job.model.root / path for path in job.model.side_files]
        refuse_overlap(job.out, job.model.root, [*job.source.weight_files, *beside])


def _asked(job: StatsJob, like: KeptStats | None, prepared: Prepared | None) -> dict[str, Any]:
    """What decides the bytes of the stats, in words that a person finds in a refusal."""
    config = job.config
    groups: object = [config.time_groups, config.num_time_groups] if like is None else like.summary.time_groups
    data = data_identity(config.replace(enable_calibration=True)) if prepared is None else prepared.samples.identity
    asked = {
        "stats version": VERSION,
        "program version": __version__,
        "model": [source_hash(job.source.tensors), values_hash(job.source)],
        "component": job.model.component if job.model else "",
        "modality": job.modality,
        "mask token": config.mask_token,
        "number of samples": [config.calibration_samples, config.calibration_tokens],
        "seed": config.seed,
        "device": config.device,
        "calibration data": data,
        "time groups": groups,
        "way of keeping time groups": "together" if job.compact else "apart",
    }
    found: dict[str, Any] = json.loads(json.dumps(asked))
    return found


def _made_before(out: Path, asked: Mapping[str, Any], *, overwrite: bool) -> KeptStats | None:
    """The stats that lie there, where they are the answer to what is asked."""
    if overwrite or not is_stats(out):
        return None
    kept = KeptStats(out)
    if kept.summary.asked == asked:
        return kept
    apart = difference(json.dumps(kept.summary.asked).encode(), json.dumps(asked).encode())
    raise ConfigurationError(f"{out}: holds stats made with {apart}; choose another folder, or --overwrite them")


def _prepared(job: StatsJob, progress: Progress, memory: Memory = NO_MEMORY) -> Prepared:
    progress.tell("gathering calibration samples")
    return prepare(job.model, job.module, job.modality, job.config, job.provider, tell=progress.tell, memory=memory)


# The pass through the model


@dataclass(frozen=True, kw_only=True, eq=False)
class _Run:
    """What follows from a job before the first block."""

    job: StatsJob
    prepared: Prepared
    groups: TimeGroups
    target: Path
    scratch: Path
    report: Callable[[str, float], object] | None

    @property
    def apart(self) -> bool:
        return not self.job.compact


def _observed(run: _Run, asked: dict[str, Any]) -> Summary:
    """Write every input's files, block by block; what they are."""
    job, runnable, samples = run.job, run.prepared.runnable, run.prepared.samples
    wanted = {one.name for one in job.source.tensors if reason_not_to_quantize(one) is None}
    module_names = placed(job.source, runnable, wanted)
    parts = strata(samples.calls, run.groups)
    watched = runnable.parameters(module_names)
    with walking(runnable.module, samples.calls, watched, run.scratch) as walk:
        _refuse_too_large(run, walk, parts)
        whole = len(samples.calls) * sum(_weight(walk, block) for block in range(len(walk.blocks)))
        progress = Progress(run.report, whole)
        layers = sum(len(block.uses) for block in walk.blocks)
        told = f"observing {layers} layers in {len(walk.blocks)} blocks on {samples.count} samples"
        progress.tell(f"{told}: {samples.origin}")
        inputs: list[KeptInput] = []
        for block in range(len(walk.blocks)):
            with runnable.holding(walk.blocks[block].module):
                inputs += _block(run, walk, block, parts, len(inputs), progress=progress)
            walk.forget(block)
            progress.tell(f"{block + 1}/{len(walk.blocks)} {walk.blocks[block].name or 'the whole model'}")
    return Summary(
        program_version=__version__,
        asked=asked,
        model=asked["model"][0],
        model_content=asked["model"][1],
        component=asked["component"],
        modality=job.modality,
        mask_token=runnable.mask_token,
        apart=run.apart,
        time_groups=run.groups.edges,
        samples=(_shown(samples, parts),),
        inputs=tuple(_named(entry, module_names) for entry in inputs),
    )


def _shown(samples: Samples, parts: Strata) -> KeptSamples:
    return KeptSamples(
        origin=samples.origin,
        identity=samples.identity,
        synthetic=samples.synthetic,
        count=samples.count,
        sizes=parts.sizes,
    )


def _named(entry: KeptInput, module_names: Mapping[str, str]) -> KeptInput:
    return entry.model_copy(update={"layers": tuple(module_names[layer] for layer in entry.layers)})


def _block(run: _Run, walk: Walk, block: int, parts: Strata, first: int, *, progress: Progress) -> list[KeptInput]:
    """Observe one block, and write what was seen as soon as it is whole; `first` is the number of its first input."""
    name, weight = walk.blocks[block].name, _weight(walk, block)
    if run.apart:
        own: list[tuple[int | None, list[int], Strata]] = [
            (group, [n for n, other in enumerate(parts.groups) if other == group], parts.alone())
            for group in range(parts.count)
        ]
    else:
        own = [(None, list(range(len(parts.groups))), parts)]
    files: dict[tuple[str, ...], list[KeptFile | None]] = {layers: [] for layers in walk.blocks[block].inputs}
    sizes: dict[tuple[str, ...], tuple[int, int]] = {}
    rows: dict[tuple[str, ...], set[tuple[int, int]]] = {layers: set() for layers in files}
    for group, members, strata_of in own:
        seen = observe_block(walk, block, members, strata_of)
        for number, (layers, stats) in enumerate(seen.items()):
            files[layers].append(None if stats is None else write_input(run.target, first + number, group, stats))
            if stats is not None:
                sizes[layers] = _size(stats)
                rows[layers].update(stats.parts)
        progress.advance(weight * len(members), name)
    return [
        KeptInput(
            layers=layers,
            columns=sizes[layers][0],
            channels=sizes[layers][1],
            transposed=not walk.turned.isdisjoint(layers),
            parts=tuple(sorted(rows[layers])),
            files=tuple(found),
        )
        for layers, found in files.items()
        if layers in sizes
    ]


def _size(stats: InputStats) -> tuple[int, int]:
    return stats.second.columns, stats.absmax.shape[1]


def _weight(walk: Walk, block: int) -> int:
    """How much of the work one block is, about."""
    return sum(walk.parameters[name].numel() * count for name, count in walk.blocks[block].uses.items())


def _floats(walk: Walk, layer: str) -> int:
    """Of H of its input, and of H of each part of its rows that has one."""
    shape, turned, parted = walk.parameters[layer].shape, layer in walk.turned, walk.parted.get(layer, 0)
    if quant_axis(shape) > 1:  # not every expert has tokens of the first sample
        columns, parts = shape[1] if turned else shape[2], shape[0]
    else:
        columns, parts = shape[0] // max(1, parted) if turned else shape[1:].numel(), parted
    return (1 + parts) * columns * columns


def _refuse_too_large(run: _Run, walk: Walk, parts: Strata) -> None:
    """Find out before the pass whether the disk has room for every H."""
    floats = sum(_floats(walk, layers[0]) for block in walk.blocks for layers in block.inputs)
    times = sum(size > 0 for size in parts.sizes) if run.apart else 1
    needed, free = 4 * times * floats, shutil.disk_usage(run.target).free
    if needed > free:
        remedy = f"--compact needs {needed / times / 1e6:,.0f} MB" if times > 1 else "make room"
        raise ConfigurationError(
            f"{run.job.out}: the stats take {needed / 1e6:,.0f} MB, and the disk has {free / 1e6:,.0f} MB free;"
            f" {remedy}"
        )

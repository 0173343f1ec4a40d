"""What a run would do and need, told before any work: sizes, memory, disk, skips. Reads headers, no values."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from arrow_quant_v2.budget import available_bytes, plan_budget
from arrow_quant_v2.layers import chunk_bytes
from arrow_quant_v2.plan import plan_model
from arrow_quant_v2.publish import Description, file_groups, source_hash
from arrow_quant_v2.store.record import ranges
from arrow_quant_v2.store.sizes import RowSize, predicted_file_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from arrow_quant_v2.config import DiffusionQuantConfig, Modality
    from arrow_quant_v2.plan import LayerPlan
    from arrow_quant_v2.sources.base import Source
    from arrow_quant_v2.sources.folder import Model

Verdict = Literal["fits", "tight", "will not fit"]
COMFORTABLE = 0.7  # of what is available; above this other programs may have to make way


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """The answer to "what would happen?"; all sizes in bytes."""

    plans: tuple[LayerPlan, ...]
    modality: Modality
    source_bytes: int
    predicted_bytes: int
    predicted_peak_memory: int
    available_memory: int
    free_disk: int
    needed_disk: int
    memory_verdict: Verdict
    disk_verdict: Verdict

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
        ConfigurationError: `max_memory` is less than the model needs.
    """
    plans = plan_model(source.tensors, config)
    budget = plan_budget(plans, config)
    predicted = predicted_weight_bytes(plans, modality, config, model.component if model else "")
    beside = sum((model.root / path).stat().st_size for path in model.side_files) if model else 0
    needed_disk = predicted + _merged_bytes(plans) + beside  # parts that are merged lie there twice for a moment
    memory, disk = available_bytes(), _free_bytes(out_disk)
    return Diagnosis(
        plans=plans,
        modality=modality,
        source_bytes=sum(info.nbytes for info in source.tensors),
        predicted_bytes=predicted,
        predicted_peak_memory=budget.peak_bytes,
        available_memory=memory,
        free_disk=disk,
        needed_disk=needed_disk,
        memory_verdict=_verdict(budget.peak_bytes, memory),
        disk_verdict=_verdict(needed_disk, disk),
    )


def predicted_weight_bytes(
    plans: tuple[LayerPlan, ...], modality: Modality, config: DiffusionQuantConfig, component: str
) -> int:
    """Bytes of all Parquet files that a run will write, pages and footers included."""
    description = Description(
        config=config, modality=modality, component=component, source_hash=source_hash(p.tensor for p in plans)
    )
    metadata = description.file_metadata()
    return sum(
        predicted_file_bytes(
            [row for index in group for row in _rows(plans[index], modality)], metadata=metadata, grouped=len(group) > 1
        )
        for group in file_groups(plans)
    )


def _rows(plan: LayerPlan, modality: Modality) -> Iterator[RowSize]:
    """The rows of the store that a layer will be, one per chunk."""
    grid = plan.layout.grid if plan.layout is not None and plan.layout.grid != "affine" else ""
    texts = (grid, plan.tensor.dtype, plan.decision.got, modality, plan.decision.method or "", str(plan.decision))
    rows, row_bytes = plan.rows_and_bytes
    for start, stop in ranges(rows, row_bytes, chunk_bytes(plan)):
        yield RowSize(
            layer_name=plan.tensor.name,
            payload_bytes=(stop - start) * row_bytes,
            text_bytes=sum(len(text.encode()) for text in texts),
        )


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

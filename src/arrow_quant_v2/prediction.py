"""How many bytes the files of a planned model will take, before they are written; reads no values."""

from __future__ import annotations

from typing import TYPE_CHECKING

from arrow_quant_v2.layers import chunk_bytes
from arrow_quant_v2.publish import Description, file_groups, source_hash
from arrow_quant_v2.store.record import ranges
from arrow_quant_v2.store.sizes import RowSize, predicted_file_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from arrow_quant_v2.config import DiffusionQuantConfig, Modality
    from arrow_quant_v2.plan import LayerPlan

TOLD = 90  # bytes that the decision of a calibrated layer says more


def predicted_weight_bytes(
    plans: tuple[LayerPlan, ...],
    modality: Modality,
    config: DiffusionQuantConfig,
    component: str,
    calibrated: frozenset[str] = frozenset(),
) -> int:
    """Bytes of all Parquet files that a run will write, pages and footers included."""
    description = Description(
        config=config, modality=modality, component=component, source_hash=source_hash(p.tensor for p in plans)
    )
    metadata = description.file_metadata()
    return sum(
        predicted_file_bytes(
            [row for index in group for row in _rows(plans[index], modality, *_seen(plans[index], config, calibrated))],
            metadata=metadata,
            grouped=len(group) > 1,
        )
        for group in file_groups(plans)
    )


def _seen(plan: LayerPlan, config: DiffusionQuantConfig, calibrated: frozenset[str]) -> tuple[int, int]:
    """Time groups in which a layer's inputs are seen, and how many of their ranges are kept; samples may fill fewer."""
    if plan.spec is None or plan.tensor.name not in calibrated:
        return 0, 0
    return config.num_time_groups, config.num_time_groups * config.enable_time_aware


def _rows(plan: LayerPlan, modality: Modality, time_groups: int, kept: int) -> Iterator[RowSize]:
    """The rows of the store that a layer will be, one per chunk."""
    grid = plan.layout.grid if plan.layout is not None and plan.layout.grid != "affine" else ""
    texts = (grid, plan.tensor.dtype, plan.decision.got, modality, plan.decision.method or "", str(plan.decision))
    rows, row_bytes = plan.rows_and_bytes
    for start, stop in ranges(rows, row_bytes, chunk_bytes(plan)):
        yield RowSize(
            layer_name=plan.tensor.name,
            payload_bytes=(stop - start) * row_bytes,
            text_bytes=sum(len(text.encode()) for text in texts) + TOLD * (time_groups > 0),
            time_groups=time_groups,
            ranges=kept,
        )

"""One planned layer, cut into slices, worked on slice by slice, and put together as rows of the store.

Knows nothing of files, of other layers or of the order in which slices are done.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch

from arrow_quant_v2.decisions import decision_of
from arrow_quant_v2.errors import QuantizationError
from arrow_quant_v2.kernels.cpu import threads_per_call
from arrow_quant_v2.plan import LayerPlan
from arrow_quant_v2.quantizers import quantizer
from arrow_quant_v2.quantizers.result import QuantizedRows, joined, not_finite, weight_error
from arrow_quant_v2.store.crc32 import combine, crc32
from arrow_quant_v2.store.record import LayerRecord, RawTensor, split

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from arrow_quant_v2.config import Modality
    from arrow_quant_v2.packed import Bytes, PackedTensor, WeightError
    from arrow_quant_v2.sequential import CalibratedLayer
    from arrow_quant_v2.sources.base import Source
    from arrow_quant_v2.store.entries import LayerEntry
    from arrow_quant_v2.store.record import Structure

CHUNK_BYTES = 256 * 2**20  # a layer that packs to more becomes several rows of the file
KEPT_CHUNK_BYTES = 32 * 2**20  # the same for a tensor that stays as large as it is: Arrow copies a chunk twice
NATIVE = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Elements [start, stop) of one tensor: whole rows where it is quantized. `last` ends the layer."""

    plan: LayerPlan
    start: int
    stop: int
    last: bool

    @property
    def result_bytes(self) -> int:
        """About what its result takes."""
        tensor = self.plan.tensor
        return (self.stop - self.start) * self.plan.stored_bytes // max(1, tensor.numel)


@dataclass(frozen=True, kw_only=True, eq=False)
class Piece:
    """What became of one slice: rows of codes, the untouched bytes, or nothing where only the CRC was asked.

    Where a method failed on good values, its error: the whole layer is to be done otherwise.
    """

    slice: Slice
    crc: int
    source_bytes: int
    result: QuantizedRows | Bytes | QuantizationError | None


def slices(plan: LayerPlan, slice_bytes: int) -> Iterator[Slice]:
    """The whole tensor in slices of about `slice_bytes`; at least one, and at least a row each."""
    unit = 1 if plan.layout is None else plan.layout.columns
    item = max(1, plan.tensor.nbytes // max(1, plan.tensor.numel))
    step = max(1, slice_bytes // (unit * item)) * unit
    starts = [*range(0, max(1, plan.tensor.numel), step), plan.tensor.numel]
    for start, stop in pairwise(starts):
        yield Slice(plan=plan, start=start, stop=stop, last=stop == plan.tensor.numel)


def work(source: Source, piece: Slice) -> Piece:
    """Read one slice and quantize it, or keep its bytes.

    Raises:
        SourceError: it cannot be read.
        QuantizationError: a value is NaN or infinite; the message names tensor, position and value.
    """
    values = source.read(piece.plan.tensor.name, piece.start, piece.stop)
    raw = _bytes_of(values)
    result = raw if piece.plan.layout is None else _quantized_or_why_not(values, piece)
    return Piece(slice=piece, crc=crc32(raw), source_bytes=raw.nbytes, result=result)


def checksum_only(source: Source, piece: Slice) -> Piece:
    """Read one slice of a layer that is already done, to know whether it is still the same tensor.

    Raises:
        SourceError: it cannot be read.
    """
    raw = _bytes_of(source.read(piece.plan.tensor.name, piece.start, piece.stop))
    return Piece(slice=piece, crc=crc32(raw), source_bytes=raw.nbytes, result=None)


def source_checksum(pieces: Sequence[Piece]) -> int:
    """CRC-32 of the whole tensor's bytes."""
    total = 0
    for piece in pieces:
        total = combine(total, piece.crc, piece.source_bytes)
    return total


def records(plan: LayerPlan, pieces: list[Piece], modality: Modality) -> Iterator[LayerRecord]:
    """The rows of the store that hold this layer: one, or several where it takes more than `chunk_bytes`.

    The list of pieces is emptied, so that the layer is not held twice while it is written.
    """
    checksum = source_checksum(pieces)
    payload, error = _payload(plan, pieces)
    pieces.clear()
    for chunk, part in enumerate(split(payload, chunk_bytes(plan))):
        yield LayerRecord(
            payload=part,
            chunk=chunk,
            bits_per_weight=plan.bits_per_weight,
            source_checksum=checksum,
            decision=str(plan.decision),
            method=plan.decision.method,
            cosine_similarity=None if error is None else error.cosine,
            mse=None if error is None else error.mse,
            modality=modality,
        )


def calibrated_records(layer: CalibratedLayer, checksum: int, modality: Modality) -> Iterator[LayerRecord]:
    """The rows of the store that hold a layer that was fitted to its inputs."""
    plan, packed = layer.plan, layer.packed
    for chunk, part in enumerate(split(packed, chunk_bytes(plan))):
        yield LayerRecord(
            payload=part,
            chunk=chunk,
            bits_per_weight=8 * packed.nbytes / plan.tensor.numel,
            source_checksum=checksum,
            decision=str(layer.decision),
            method=layer.decision.method,
            cosine_similarity=layer.error.cosine,
            mse=layer.error.mse,
            output_error=list(layer.output_error),
            modality=modality,
            time_aware_quant=_time_aware(layer),
            spatial_quant={"activation_smoothing": True} if layer.smoothed else None,
            activation_stats={name: list(values) for name, values in layer.spread.items()},
        )


def _time_aware(layer: CalibratedLayer) -> Structure | None:
    if layer.activations is None:
        return None
    groups = [
        {
            "time_range": {"start": one.start, "end": one.end},
            "scale": one.scale,
            "zero_point": one.zero_point,
            "group_size": None,
            "bias_correction": None,
        }
        for one in layer.activations
    ]
    return {"enabled": True, "num_time_groups": len(groups), "time_group_params": groups}


def _payload(plan: LayerPlan, pieces: Sequence[Piece]) -> tuple[PackedTensor | RawTensor, WeightError | None]:
    """All pieces in one, and how far the codes are from the weights."""
    results = [piece.result for piece in pieces]
    rows = [result for result in results if isinstance(result, QuantizedRows)]
    if rows:
        whole = joined(rows)
        return _packed(plan, whole), weight_error(whole.sums, plan.tensor.numel)
    return _kept(plan, [result for result in results if isinstance(result, np.ndarray)]), None


def stored_plan(plan: LayerPlan, entry: LayerEntry) -> LayerPlan:
    """The plan of a layer that an earlier run finished, as it was followed in the end: it may have fallen back."""
    decision = replace(decision_of(plan.tensor.name, entry.decision, entry.method), asked=plan.decision.asked)
    layout = entry.layout
    if layout is None or plan.spec is None:
        return LayerPlan(tensor=plan.tensor, decision=decision)
    spec = replace(plan.spec, bits=layout.bits, group_size=layout.group_size, method=entry.method or plan.spec.method)
    return LayerPlan(tensor=plan.tensor, decision=decision, spec=spec, layout=layout)


def chunk_bytes(plan: LayerPlan) -> int:
    """How many bytes of the layer one row of the file holds at most."""
    return KEPT_CHUNK_BYTES if plan.layout is None else CHUNK_BYTES


def _bytes_of(values: torch.Tensor) -> Bytes:
    raw: Bytes = values.view(torch.uint8).numpy()
    return raw


def _packed(plan: LayerPlan, whole: QuantizedRows) -> PackedTensor:
    if plan.layout is None:
        raise QuantizationError(f"{plan.tensor.name}: was quantized without a layout; this is a bug, please report it")
    return whole.packed(plan.tensor.name, plan.tensor.dtype, plan.layout)


def _kept(plan: LayerPlan, parts: Sequence[Bytes]) -> RawTensor:
    values = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return RawTensor(name=plan.tensor.name, shape=plan.tensor.shape, dtype=plan.tensor.dtype, values=values)


def _quantized_or_why_not(values: torch.Tensor, piece: Slice) -> QuantizedRows | QuantizationError:
    try:
        return _quantized(values, piece)
    except QuantizationError as error:
        if not values.to(torch.float32).isfinite().all():  # no method mends that
            raise
        return error


def _quantized(values: torch.Tensor, piece: Slice) -> QuantizedRows:
    """Quantize whole rows on one thread: the other cores have slices of their own."""
    plan = piece.plan
    if plan.spec is None or plan.layout is None:
        raise QuantizationError(f"{plan.tensor.name}: has no spec to be quantized by; this is a bug, please report it")
    rows = values.reshape(-1, plan.layout.columns)  # (rows, columns)
    threads_per_call.set(1)
    result = quantizer(plan.spec.method)(rows if rows.dtype in NATIVE else rows.to(torch.float32), plan.spec)
    if not np.isfinite(result.sums).all():
        tensor = plan.tensor
        remedy = f"repair the model, or keep this tensor as it is: --keep '{tensor.name}'"
        raise not_finite(values, tensor.name, tensor.shape, offset=piece.start, remedy=remedy)
    return result

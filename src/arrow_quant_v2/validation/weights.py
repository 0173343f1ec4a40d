"""Two models compared tensor by tensor on their weights alone, streaming; runs neither, knows no outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from arrow_quant_v2.errors import ValidationError
from arrow_quant_v2.packed import ITEM_BITS, NO_ERROR, WeightError
from arrow_quant_v2.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Callable

    from arrow_quant_v2.packed import TensorInfo
    from arrow_quant_v2.sources.base import Source

SLICE_ELEMENTS = 2**21


@dataclass(frozen=True, kw_only=True)
class LayerAccuracy:
    """How close one tensor of the second model is to that of the first."""

    name: str
    cosine: float
    mse: float


def compare_weights(
    original: Source, other: Source, report: Callable[[str, float], object] | None = None
) -> tuple[LayerAccuracy, ...]:
    """Cosine and mean squared error of every floating-point tensor, in the order of their names.

    cosine = sum(w q) / (|w| |q|), in float64 over all elements; 1.0 where both are zero.

    Raises:
        ValidationError: a tensor is missing from one of them, has another shape, or NaN or infinity in one only.
        SourceError: one of them cannot be read.
    """
    _refuse_difference(original, other)
    floats = [info for info in original.tensors if info.dtype.startswith(("float", "bfloat"))]
    progress = Progress(report, sum(info.nbytes for info in floats))
    found = []
    for count, info in enumerate(floats, start=1):
        error = _error(original, other, info, progress)
        found.append(LayerAccuracy(name=info.name, cosine=error.cosine, mse=error.mse))
        progress.tell(f"{count}/{len(floats)} {info.name}")
    return tuple(found)


def _refuse_difference(original: Source, other: Source) -> None:
    ours, theirs = ({info.name: info.shape for info in source.tensors} for source in (original, other))
    for name in sorted({*ours, *theirs}):
        if name not in ours or name not in theirs:
            lacking = original if name not in ours else other
            raise ValidationError(f"{name}: is missing from {lacking.location}; compare a model with its own copy")
        if ours[name] != theirs[name]:
            raise ValidationError(
                f"{name}: is {list(ours[name])} in {original.location} and {list(theirs[name])} in {other.location};"
                " compare a model with its own copy"
            )


def _error(original: Source, other: Source, info: TensorInfo, progress: Progress) -> WeightError:
    total = NO_ERROR
    for start in range(0, info.numel, SLICE_ELEMENTS):
        stop = min(info.numel, start + SLICE_ELEMENTS)
        w = original.read(info.name, start, stop).to(torch.float64)
        q = other.read(info.name, start, stop).to(torch.float64)
        if not bool(torch.isfinite(w).all() & torch.isfinite(q).all()):
            w, q = _without_equal_infinities(w, q, info.name)
        total += WeightError(original=_square(w), quantized=_square(q), difference=_square(w - q), count=stop - start)
        progress.advance((stop - start) * ITEM_BITS[info.dtype] // 8, info.name)
    return total


def _without_equal_infinities(w: torch.Tensor, q: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Zeros where both hold the same infinity or both NaN, as in an attention mask that was kept."""
    wild = ~(torch.isfinite(w) & torch.isfinite(q))
    if not torch.equal(torch.nan_to_num(w[wild], nan=0.5), torch.nan_to_num(q[wild], nan=0.5)):
        raise ValidationError(f"{name}: holds NaN or infinity in one model and not in the other; they are no copies")
    return w.masked_fill(wild, 0.0), q.masked_fill(wild, 0.0)


def _square(values: torch.Tensor) -> float:
    return float(values.dot(values))

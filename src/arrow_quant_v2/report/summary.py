"""Findings in the few words and figures that a person reads first; knows neither pages nor files."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from arrow_quant_v2.report.stored import is_fallback, is_quantized

if TYPE_CHECKING:
    from collections.abc import Sequence

    from arrow_quant_v2.validation.findings import Findings, LayerFinding

NONE = "\u2013"


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one width or dtype has of all parameters: a part from 0 to 1, and in words."""

    quant_type: str
    part: float
    told: str


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The verdict and why, sizes as text and as parts of the original, and what became of the layers."""

    passed: bool
    verdict: str
    reason: str
    size: str
    original_size: str
    size_part: float
    ratio: str
    bits: str
    widths: str
    counts: str
    quantized: int
    kept: int
    fallbacks: int
    shares: tuple[Share, ...]


def summarize(findings: Findings) -> Summary:
    """The figures of a model's head."""
    quantized = [one for one in findings.layers if is_quantized(one)]
    fallbacks = sum(is_fallback(one.decision) for one in findings.layers)
    kept = len(findings.layers) - len(quantized)
    larger = max(findings.original_bytes, findings.size_bytes, 1)
    return Summary(
        passed=findings.passed,
        verdict="Bar met" if findings.passed else "Bar missed",
        reason=_reason(findings),
        size=megabytes(findings.size_bytes),
        original_size=megabytes(findings.original_bytes),
        size_part=findings.size_bytes / larger,
        ratio=f"{findings.original_bytes / max(1, findings.size_bytes):.2f}",
        bits=figure(bits_per_weight(quantized)),
        widths=" + ".join(sorted({one.quant_type.upper() for one in quantized})) or "unquantized",
        counts=f"{len(quantized)} layers quantized, {kept} kept, {fallbacks} fallbacks",
        quantized=len(quantized),
        kept=kept,
        fallbacks=fallbacks,
        shares=tuple(_shares(findings.layers)),
    )


def bits_per_weight(layers: Sequence[LayerFinding]) -> float | None:
    """Stored bits per weight of these layers together; None where they hold no weight."""
    weights = sum(math.prod(one.shape) for one in layers)
    return sum(one.bits_per_weight * math.prod(one.shape) for one in layers) / weights if weights else None


def kept_reasons(findings: Findings) -> dict[str, int]:
    """How many layers were kept for each reason, the most frequent first."""
    kept = Counter(reason(one) for one in findings.layers if not is_quantized(one) and not is_fallback(one.decision))
    return dict(kept.most_common())


def reason(layer: LayerFinding) -> str:
    """Why, of a decision as it stands in the file: what comes behind its first colon."""
    return layer.decision.partition(": ")[2] or layer.decision


def kind(layer: LayerFinding) -> str:
    """What became of a layer: "fallback", "quantized" or "kept"."""
    if is_fallback(layer.decision):
        return "fallback"
    return "quantized" if is_quantized(layer) else "kept"


def figure(value: float | None) -> str:
    """A number as a person reads it; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return NONE
    return f"{value:.5g}" if abs(value) >= 1e-3 or value == 0.0 else f"{value:.2e}"  # noqa: PLR2004


def megabytes(size: int) -> str:
    """Like "17.6 MB", of 10^6 bytes; smaller and larger ones in kB and GB."""
    for unit, bytes_each in (("GB", 10**9), ("MB", 10**6)):
        if size >= bytes_each:
            return f"{size / bytes_each:.3g} {unit}"
    return f"{size / 1e3:.3g} kB"


def _reason(findings: Findings) -> str:
    if findings.accuracy is None:
        return f"{findings.metric}: nothing was quantized, so nothing could be lost"
    return f"{findings.metric} is {figure(findings.accuracy)}, the bar is {findings.min_accuracy:g}"


def _shares(layers: Sequence[LayerFinding]) -> list[Share]:
    """Of all parameters, by width, the largest first."""
    counts: Counter[str] = Counter()
    for one in layers:
        counts[one.quant_type] += math.prod(one.shape)
    total = max(1, counts.total())
    return [
        Share(quant_type=name, part=count / total, told=f"{name}: {count:,} parameters, {100 * count / total:.1f} %")
        for name, count in counts.most_common()
    ]

"""Findings as JSON with stable keys, and back again; shows nothing and measures nothing.

NaN and infinity are null. Pictures and sounds are base64, so that a report can be made again from its JSON alone.
"""

from __future__ import annotations

import base64
import binascii
import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from arrow_quant_v2.errors import StoreError
from arrow_quant_v2.validation.findings import Findings, LayerFinding, Metric, SamplePair, StepFinding, finite

if TYPE_CHECKING:
    from collections.abc import Mapping

FORMAT, VERSION = "arrow_quant_report", 1


def to_json(findings: Findings) -> dict[str, Any]:
    """The content of report.json: every field of the records, and the size as a ratio."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "passed": findings.passed,
        "accuracy": finite(findings.accuracy),
        "metric": findings.metric,
        "min_accuracy": findings.min_accuracy,
        "size_bytes": findings.size_bytes,
        "original_bytes": findings.original_bytes,
        "compression_ratio": findings.original_bytes / max(1, findings.size_bytes),
        "metrics": [_plain(asdict(one)) for one in findings.metrics],
        "time_groups": [list(edges) for edges in findings.time_groups],
        "layers": [_plain(asdict(one)) for one in findings.layers],
        "steps": [_plain(asdict(one)) for one in findings.steps],
        "samples": [_sample(one) for one in findings.samples],
        "fallbacks_per_method": dict(findings.fallbacks_per_method),
        "notes": list(findings.notes),
        "facts": dict(findings.facts),
    }


def from_json(content: Mapping[str, Any], where: str) -> Findings:
    """The findings that `to_json` wrote.

    Raises:
        StoreError: they are of another version, or something is missing or of another kind.
    """
    if content.get("format") != FORMAT or content.get("version") != VERSION:
        raise StoreError(f"{where}: is no report of version {VERSION}; remove it, and make it again")
    try:
        return _findings(content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        found = f"{type(error).__name__}: {error}"
        raise StoreError(f"{where}: is damaged ({found}); remove it, and make it again") from error


def _findings(content: Mapping[str, Any]) -> Findings:
    return Findings(
        accuracy=_maybe(content["accuracy"]),
        metric=str(content["metric"]),
        min_accuracy=float(content["min_accuracy"]),
        passed=content["passed"] is True,
        metrics=tuple(_metric(one) for one in content["metrics"]),
        layers=tuple(_layer(one) for one in content["layers"]),
        steps=tuple(_step(one) for one in content["steps"]),
        samples=tuple(_pair(one) for one in content["samples"]),
        time_groups=tuple((float(start), float(end)) for start, end in content["time_groups"]),
        size_bytes=int(content["size_bytes"]),
        original_bytes=int(content["original_bytes"]),
        fallbacks_per_method={str(method): int(count) for method, count in content["fallbacks_per_method"].items()},
        notes=tuple(map(str, content["notes"])),
        facts={str(name): str(value) for name, value in content["facts"].items()},
    )


def _metric(one: Mapping[str, Any]) -> Metric:
    return Metric(
        name=str(one["name"]),
        value=_maybe(one["value"]),
        original=_maybe(one["original"]),
        unit=str(one["unit"]),
        better="lower" if one["better"] == "lower" else "higher",
        note=str(one["note"]),
    )


def _layer(one: Mapping[str, Any]) -> LayerFinding:
    errors = one["output_error"]
    return LayerFinding(
        name=str(one["name"]),
        shape=tuple(map(int, one["shape"])),
        quant_type=str(one["quant_type"]),
        bits_per_weight=float(one["bits_per_weight"]),
        method=None if one["method"] is None else str(one["method"]),
        decision=str(one["decision"]),
        weight_cosine=_maybe(one["weight_cosine"]),
        weight_mse=_maybe(one["weight_mse"]),
        output_cosine=_maybe(one["output_cosine"]),
        output_error=None if errors is None else tuple(math.nan if x is None else float(x) for x in errors),
    )


def _step(one: Mapping[str, Any]) -> StepFinding:
    error, cosine = (math.nan if one[name] is None else float(one[name]) for name in ("error", "cosine"))
    return StepFinding(timestep=float(one["timestep"]), error=error, cosine=cosine, samples=int(one["samples"]))


def _sample(pair: SamplePair) -> dict[str, Any]:
    """Text as it is, bytes as base64."""
    sides = {"original": pair.original, "quantized": pair.quantized}
    told = {side: it if isinstance(it, str) else base64.b64encode(it).decode() for side, it in sides.items()}
    return {"kind": pair.kind, "title": pair.title, "seed": pair.seed} | told


def _pair(one: Mapping[str, Any]) -> SamplePair:
    kind = one["kind"]
    if kind not in {"text", "image", "audio"}:
        raise ValueError(f"a sample of kind {kind!r}")
    original, quantized = (
        str(one[side]) if kind == "text" else _bytes(one[side]) for side in ("original", "quantized")
    )
    return SamplePair(kind=kind, title=str(one["title"]), seed=int(one["seed"]), original=original, quantized=quantized)


def _bytes(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(f"a sample is no base64: {error}") from error


def _maybe(value: Any) -> float | None:
    return None if value is None else float(value)


def _plain(value: Any) -> Any:
    """The same with null for every number that JSON does not know."""
    if isinstance(value, float):
        return finite(value)
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value

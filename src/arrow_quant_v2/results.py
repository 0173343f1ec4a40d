"""What people get back: plain dictionaries with stable keys, made from finished work; measures nothing itself."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from arrow_quant_v2.decisions import fallback_rates, fallbacks_per_method
from arrow_quant_v2.publish import PAGE, REPORT
from arrow_quant_v2.report.as_json import to_json
from arrow_quant_v2.store.reader import StoredModel
from arrow_quant_v2.validation.findings import WEIGHT_METRIC, finite

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from arrow_quant_v2.allocation import Reach
    from arrow_quant_v2.doctor import Accelerator, Diagnosis
    from arrow_quant_v2.orchestrator import Job, Outcome
    from arrow_quant_v2.report.write import Written
    from arrow_quant_v2.runtime.generate import Generation
    from arrow_quant_v2.stats_run import StatsOutcome
    from arrow_quant_v2.store.entries import LayerEntry
    from arrow_quant_v2.validation.findings import Findings, LayerFinding


def quantization_result(job: Job, outcome: Outcome) -> dict[str, Any]:
    """The seven promised keys, and ours: how well, how large, what was kept and whether the bar was met."""
    with StoredModel(job.out / job.component) as stored:
        first = [one for one in stored.entries if one.chunk == 0]
        size = sum(path.stat().st_size for path in stored.files)
    cosines = {one.layer_name: one.cosine_similarity for one in first if one.cosine_similarity is not None}
    source_bytes = sum(plan.tensor.nbytes for plan in outcome.plans)
    decisions = [plan.decision for plan in outcome.plans]
    worst = min(cosines, key=cosines.__getitem__, default=None)
    return {
        "quantized_path": str(job.out),
        "compression_ratio": source_bytes / size,
        "cosine_similarity": _mean(list(cosines.values())),
        "model_size_mb": size / 1e6,
        "modality": job.modality,
        "bit_width": job.config.bit_width,
        "bit_widths": dict(sorted(Counter(one.layout.bits for one in first if one.layout is not None).items())),
        "quantization_time_s": outcome.seconds,
        "metric": WEIGHT_METRIC,
        "judged_by": outcome.verdict.judged_by,
        "accuracy": outcome.verdict.accuracy,
        "passed": not outcome.verdict.missed,
        "min_accuracy": job.config.min_accuracy,
        "worst_layer": worst,
        "worst_cosine_similarity": None if worst is None else cosines[worst],
        "bits_per_weight": quantized_bits_per_weight(first),
        "layers": len(first),
        "quantized_layers": len(cosines),
        "kept_layers": len(first) - len(cosines),
        "fallbacks_per_method": fallbacks_per_method(decisions),
        "fallback_rate_per_method": fallback_rates(decisions),
        "calibration": outcome.calibration,
        "report": str(_report_of(job.out)),
        "notes": list(outcome.notes),
        "decisions": decisions,
    }


def report_result(findings: Findings, written: Written) -> dict[str, Any]:
    """What `ArrowQuantV2.report` returns: what was written, and the figures of report.json."""
    return {"files": [str(path) for path in written.files], "notes": list(written.notes)} | {
        "figures": to_json(findings)
    }


def _report_of(out: Path) -> Path:
    return next((out / name for name in (PAGE, REPORT) if (out / name).exists()), out)


def stats_result(outcome: StatsOutcome) -> dict[str, Any]:
    """What stats lie there now: of how many layers, made from what, in which time groups."""
    summary = outcome.kept.summary
    return {
        "path": str(outcome.kept.folder),
        "layers": len(summary.layers),
        "inputs": len(summary.inputs),
        "samples": summary.count,
        "origin": summary.origin,
        "synthetic": any(one.synthetic for one in summary.samples),
        "time_groups": [list(edges) for edges in outcome.kept.groups.ranges()],
        "size_mb": sum(path.stat().st_size for path in outcome.kept.folder.iterdir()) / 1e6,
        "seconds": outcome.seconds,
        "reused": outcome.reused,
        "notes": list(outcome.notes),
    }


def validation_result(found: Findings) -> dict[str, Any]:
    """The four promised keys, and ours; `metric` says what `cosine_similarity` is of, and so what `passed` is about.

    On outputs a model passes when their cosine reaches the bar; on weights when each quantized layer's does.
    """
    layers = found.layers
    judged = [layer for layer in layers if not layer.decision.startswith("kept")]
    cosines = {layer.name: layer.weight_cosine for layer in judged if layer.weight_cosine is not None}
    worst = min(cosines, key=cosines.__getitem__, default=None)
    return {
        "cosine_similarity": found.accuracy,
        "passed": found.passed,
        "per_layer_accuracy": {layer.name: layer.weight_cosine for layer in layers},
        "compression_ratio": found.original_bytes / max(1, found.size_bytes),
        "metric": found.metric,
        "per_layer_metric": "weight cosine",
        "min_accuracy": found.min_accuracy,
        "weight_cosine_similarity": _mean(list(cosines.values())),
        "worst_layer": worst,
        "worst_cosine_similarity": None if worst is None else cosines[worst],
        "per_layer_mse": {layer.name: layer.weight_mse for layer in layers},
        "per_layer_output_cosine": _seen({layer.name: layer.output_cosine for layer in layers}),
        "per_layer_output_error": _seen({layer.name: _numbers(layer.output_error) for layer in layers}),
        "quantized_layers": sorted(layer.name for layer in judged),
        "bits_per_weight": _bits_per_weight(judged),
        "size_mb": found.size_bytes / 1e6,
        "original_mb": found.original_bytes / 1e6,
        "metrics": [asdict(metric) for metric in found.metrics],
        "steps": [asdict(step) | {"error": finite(step.error)} for step in found.steps],
        "time_groups": [list(edges) for edges in found.time_groups],
        "fallbacks_per_method": dict(found.fallbacks_per_method),
        "notes": list(found.notes),
        "facts": dict(found.facts),
    }


def _bits_per_weight(layers: Sequence[LayerFinding]) -> float | None:
    weights = sum(math.prod(layer.shape) for layer in layers)
    return sum(layer.bits_per_weight * math.prod(layer.shape) for layer in layers) / weights if weights else None


def _seen(found: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if value is not None}


def _numbers(errors: Sequence[float] | None) -> list[float | None] | None:
    return None if errors is None else [finite(error) for error in errors]


def inspection_result(folder: Path) -> dict[str, Any]:
    """Every layer of a stored model, and the sums over them."""
    with StoredModel(folder) as stored:
        layers = [_layer(stored.chunks(name)) for name in stored.names]
        first = [stored.chunks(name)[0] for name in stored.names]
        files = {path.name: path.stat().st_size for path in stored.files}
        metadata = dict(stored.metadata)
    elements = sum(one.num_params for one in first)
    return {
        "path": str(folder),
        "metadata": metadata,
        "files": files,
        "parameters": elements,
        "file_bits_per_weight": 8 * sum(files.values()) / max(1, elements),
        "quantized_bits_per_weight": quantized_bits_per_weight(first),
        "layers": layers,
    }


def diagnosis_result(diagnosis: Diagnosis) -> dict[str, Any]:
    """What `doctor` found, ready for JSON."""
    return {
        "verdict": diagnosis.verdict,
        "modality": diagnosis.modality,
        "calibration": diagnosis.calibration,
        "calibrated_layers": len(diagnosis.calibrated),
        "source_mb": diagnosis.source_bytes / 1e6,
        "predicted_size_mb": diagnosis.predicted_bytes / 1e6,
        "predicted_compression_ratio": diagnosis.source_bytes / max(1, diagnosis.predicted_bytes),
        "predicted_peak_memory_mb": diagnosis.predicted_peak_memory / 1e6,
        "available_memory_mb": diagnosis.available_memory / 1e6,
        "memory_verdict": diagnosis.memory_verdict,
        "needed_disk_mb": diagnosis.needed_disk / 1e6,
        "free_disk_mb": diagnosis.free_disk / 1e6,
        "disk_verdict": diagnosis.disk_verdict,
        "devices": list(diagnosis.devices),
        "accelerator": None if diagnosis.accelerator is None else _accelerator(diagnosis.accelerator),
        "reach": None if diagnosis.reach is None else _reach(diagnosis.reach),
        "layers": [
            {
                "layer_name": plan.tensor.name,
                "shape": list(plan.tensor.shape),
                "dtype": plan.tensor.dtype,
                "kind": plan.decision.kind,
                "got": plan.decision.got,
                "because": plan.decision.because,
                "stored_bytes": plan.stored_bytes,
                "bits_per_weight": plan.bits_per_weight,
            }
            for plan in diagnosis.plans
        ],
    }


def _accelerator(found: Accelerator) -> dict[str, Any]:
    return {
        "device": found.device,
        "name": found.name,
        "needed_memory_mb": found.needed / 1e6,
        "free_memory_mb": None if found.free is None else found.free / 1e6,
        "verdict": found.verdict,
    }


def _reach(reach: Reach) -> dict[str, float]:
    return {
        "smallest_mb": reach.smallest_bytes / 1e6,
        "largest_mb": reach.largest_bytes / 1e6,
        "smallest_bits_per_weight": reach.smallest_bits,
        "largest_bits_per_weight": reach.largest_bits,
    }


def quantized_bits_per_weight(first_chunks: Sequence[LayerEntry]) -> float | None:
    """Stored bits, parameters included, per weight of the quantized layers; None where there are none."""
    quantized = [one for one in first_chunks if one.layout is not None]
    weights = sum(one.num_params for one in quantized)
    return sum(one.bits_per_weight * one.num_params for one in quantized) / weights if weights else None


def _layer(chunks: Sequence[LayerEntry]) -> dict[str, Any]:
    one = chunks[0]
    return {
        "layer_name": one.layer_name,
        "shape": list(one.shape),
        "dtype": one.dtype,
        "quant_type": one.quant_type,
        "bit_width": one.bit_width,
        "bits_per_weight": one.bits_per_weight,
        "group_size": one.group_size,
        "method": one.method,
        "cosine_similarity": one.cosine_similarity,
        "mse": one.mse,
        "decision": one.decision,
        "chunks": len(chunks),
        "file": one.file.name,
    }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def generation_result(made: Generation) -> dict[str, Any]:
    """What `ArrowQuantV2.generate` returns."""
    return {
        "kind": made.kind,
        "text": made.text,
        "path": None if made.path is None else str(made.path),
        "tokens": made.tokens,
        "steps": made.steps,
        "seconds": made.seconds,
        "load_seconds": made.load_seconds,
        "tokens_per_second": None if made.tokens is None else made.tokens / max(made.seconds, 1e-9),
        "seconds_per_step": made.seconds / max(made.steps, 1),
        "peak_memory_mb": None if made.peak_memory is None else made.peak_memory / 1e6,
    }

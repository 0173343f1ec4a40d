"""What the files of a quantized model say of it, as Findings; runs no model and measures nothing."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

from arrow_quant_v2.publish import content_hash
from arrow_quant_v2.report.facts import SETTINGS
from arrow_quant_v2.sources.files import read_json
from arrow_quant_v2.store.reader import StoredModel
from arrow_quant_v2.validation.findings import Findings, LayerFinding, Metric, stated_bar
from arrow_quant_v2.workfolder import METADATA

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path
    from typing import Any

    from arrow_quant_v2.store.entries import LayerEntry

MEAN, LOWEST, LAYER_ERROR = "weight cosine", "lowest weight cosine of a layer", "output error of layers"
COMPARE = "`arrow-quant report FOLDER --original MODEL` runs both models, and shows that step by step."
NOT_RUN = (
    "The model was not run for this report: its figures are of weights, and of single layers' outputs on calibration"
    f" inputs. Weights flatter low widths; what counts are the outputs of the whole model. {COMPARE}"
)
RUN_FOR_THE_BAR = (
    "The whole model was run for the bar alone: all other figures are of weights, and of single layers' outputs on"
    f" calibration inputs. Weights flatter low widths; what counts are the outputs of the whole model. {COMPARE}"
)
COMPARED = {"command": "compared by", "program": "compared with"}  # facts of measuring beside those of making
STORED_CONTENT = "hash of the stored codes"


def stored_findings(folder: Path, facts: Mapping[str, str] | None = None, *, judged: bool = False) -> Findings:
    """All that is stored of a quantized model, with what else is known of how it was made.

    `judged`: whether the outputs of the whole model were looked at when it was made, which no file tells.

    A layer's output errors are those of its calibration; a model passes when each of its quantized layers' weights
    reaches the bar that it was made with.

    Raises:
        StoreError: no quantized model lies there, or it is damaged.
        SourceError: its metadata.json is damaged.
    """
    metadata = read_json(folder / METADATA) if (folder / METADATA).is_file() else {}
    with StoredModel(folder / _text(metadata.get("component"))) as stored:
        first = [stored.chunks(name)[0] for name in stored.names]
        size = sum(path.stat().st_size for path in stored.files)
        known = _stored_facts(metadata, stored.metadata, stored.entries)
    layers = tuple(_layer(one) for one in first)
    bar = stated_bar(metadata.get("configuration"))
    lowest = min((one.weight_cosine for one in layers if one.weight_cosine is not None), default=None)
    return Findings(
        accuracy=lowest,
        metric=LOWEST,
        min_accuracy=bar,
        passed=lowest is None or lowest >= bar,
        metrics=tuple(_metrics(layers)),
        layers=layers,
        steps=(),
        samples=(),
        time_groups=_time_groups(first),
        size_bytes=size,
        original_bytes=sum(one.info.nbytes for one in first),
        fallbacks_per_method=dict(Counter(one.method or "none" for one in layers if is_fallback(one.decision))),
        notes=(RUN_FOR_THE_BAR if judged else NOT_RUN,),
        facts={**(facts or {}), **known},
    )


def with_measured(known: Findings, measured: Findings) -> Findings:
    """What was measured just now, and from what was known before: how the model was made, and layers' time groups.

    A layer's output errors are those of the time that met more time groups: a few samples meet few.
    """
    before = {one.name: one.output_error for one in known.layers}
    layers = tuple(
        replace(one, output_error=earlier) if _met(earlier := before.get(one.name)) > _met(one.output_error) else one
        for one in measured.layers
    )
    groups = measured.time_groups or known.time_groups
    return replace(measured, layers=layers, time_groups=groups, facts={**known.facts, **_new_facts(known, measured)})


def _met(errors: Sequence[float] | None) -> int:
    return sum(map(math.isfinite, errors or ()))


def _new_facts(known: Findings, measured: Findings) -> dict[str, str]:
    """How it was measured, without what is said already of how the model was made: hashes, settings, the machine."""
    said = {name for name, fact in measured.facts.items() if fact in known.facts.values()}
    said |= {"configuration"} if SETTINGS in known.facts else set()
    said |= {"hardware"} & set(known.facts)
    return {COMPARED.get(name, name): fact for name, fact in measured.facts.items() if name not in said}


def is_fallback(decision: str) -> bool:
    """Whether a decision, as it stands in the file, is a fallback."""
    return decision.startswith("fallback")


def is_quantized(layer: LayerFinding) -> bool:
    """Whether a layer is stored as codes."""
    return layer.quant_type in {"int2", "int4", "int8"}


def mean_error(layer: LayerFinding) -> float | None:
    """The output error of a layer, mean over the time groups that were seen; None where none was."""
    seen = [error for error in layer.output_error or () if math.isfinite(error)]
    return sum(seen) / len(seen) if seen else None


def _layer(one: LayerEntry) -> LayerFinding:
    return LayerFinding(
        name=one.layer_name,
        shape=one.shape,
        quant_type=one.quant_type,
        bits_per_weight=one.bits_per_weight,
        method=one.method,
        decision=one.decision,
        weight_cosine=one.cosine_similarity,
        weight_mse=one.mse,
        output_error=None if one.output_error is None else tuple(map(_number, one.output_error)),
    )


def _number(value: float | None) -> float:
    """A null inside a list of another writer's file is no figure."""
    return math.nan if value is None else value


def _metrics(layers: Sequence[LayerFinding]) -> list[Metric]:
    cosines = [one.weight_cosine for one in layers if one.weight_cosine is not None]
    errors = [error for one in layers if (error := mean_error(one)) is not None]
    found = []
    if cosines:
        mean = sum(cosines) / len(cosines)
        found += [
            Metric(name=MEAN, value=mean, note="mean over quantized layers; it flatters low widths"),
            Metric(name=LOWEST, value=min(cosines)),
        ]
    if errors:
        note = f"share of a layer's output energy that is lost on calibration inputs; mean over {len(errors)} layers"
        found.append(Metric(name=LAYER_ERROR, value=sum(errors) / len(errors), better="lower", note=note))
    return found


def _time_groups(entries: Sequence[LayerEntry]) -> tuple[tuple[float, float], ...]:
    """The ranges of the first layer that has them; a model has one set of time groups."""
    for one in entries:
        groups = (one.time_aware_quant or {}).get("time_group_params") or ()
        ranges = [(group or {}).get("time_range") or {} for group in groups]
        if ranges and all(part.get("start") is not None and part.get("end") is not None for part in ranges):
            return tuple((part["start"], part["end"]) for part in ranges)
    return ()


def _stored_facts(
    metadata: Mapping[str, Any], keys: Mapping[str, str], entries: Sequence[LayerEntry]
) -> dict[str, str]:
    """Hashes and versions as the files tell them."""
    lines = ((f"{one.layer_name} {one.chunk}", one.dtype, one.shape, one.checksum) for one in entries)
    found = {
        "made with": f"arrow-quant-v2 {keys.get('program_version', 'of unknown version')}",
        "modality": _text(metadata.get("modality")) or keys.get("modality", ""),
        "hash of the original's names and shapes": keys.get("source_hash", ""),
        "hash of the original's values": _text(metadata.get("source_content_hash")),
        STORED_CONTENT: content_hash(lines),
    }
    return {name: value for name, value in found.items() if value}


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""

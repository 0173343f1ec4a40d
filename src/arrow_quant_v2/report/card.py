"""The model card: README.md with front matter that hubs read.

Holds no times, paths or machines, so that equal runs give equal bytes.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

import yaml

from arrow_quant_v2.report.stored import is_quantized
from arrow_quant_v2.report.summary import Summary, figure, kept_reasons, summarize

if TYPE_CHECKING:
    from pathlib import Path

    from arrow_quant_v2.validation.findings import Findings, Metric

MARK = "<!-- arrow-quant wrote this card; without this line it is taken for yours and kept -->"
INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag", "datasets")
CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)")


def card(findings: Findings, base_model: str, library: str, original_card: str | None) -> str:
    """The text of the card; `original_card` is that of the original, which its licence is taken from."""
    summary = summarize(findings)
    matter = {**_inherited(original_card), **_front_matter(findings, summary, base_model, library)}
    front = yaml.safe_dump(matter, sort_keys=False, allow_unicode=True, width=120)
    return f"---\n{front}---\n{MARK}\n\n{_body(findings, summary, base_model, kept=original_card is not None)}"


def is_ours(text: str) -> bool:
    """Whether a README.md is a card that this program wrote, and nobody took over."""
    return MARK in text


def base_model_of(source: Path) -> str:
    """The hub's name of a model, from its place in a hub's cache; else that of its folder.

    `_name_or_path` in a config.json does not tell it: there a fine-tuned model names the one that it was tuned from.
    """
    found = (CACHED.fullmatch(part) for part in source.parts)
    return next((f"{one[1]}/{one[2]}" for one in found if one), source.name)


def _front_matter(findings: Findings, summary: Summary, base_model: str, library: str) -> dict[str, Any]:
    widths = sorted({one.quant_type for one in findings.layers if is_quantized(one)})
    modality = findings.facts.get("modality")
    matter: dict[str, Any] = {
        "base_model": base_model,
        "base_model_relation": "quantized",
        "library_name": library,
        "tags": ["arrow-quant", "diffusion", "quantized", *widths, *([modality] if modality else [])],
    }
    measured = [one for one in findings.metrics if one.value is not None and math.isfinite(one.value)]
    if measured:
        matter["model-index"] = [{"name": _title(base_model, summary), "results": [_results(measured)]}]
    return matter


def _results(measured: list[Metric]) -> dict[str, Any]:
    """As the hub's model-index asks: a task, a data set and metrics."""
    metrics = [
        {"type": re.sub(r"\W+", "-", one.name.lower()).strip("-"), "name": one.name, "value": one.value}
        for one in measured
    ]
    data = {"name": "the original model's own outputs and weights", "type": "original-model"}
    return {"task": {"type": "other", "name": "closeness to the original model"}, "dataset": data, "metrics": metrics}


def _inherited(original_card: str | None) -> dict[str, Any]:
    """What the original's card says of its licence and task; nothing where it has no sound front matter."""
    found = re.match(r"---\r?\n(.*?)\r?\n---", original_card or "", re.DOTALL)
    try:
        matter = yaml.safe_load(found[1]) if found else None
    except (yaml.YAMLError, ValueError):  # ValueError: a date such as 2024-99-99
        return {}
    return {name: matter[name] for name in INHERITED if name in matter} if isinstance(matter, dict) else {}


def _title(base_model: str, summary: Summary) -> str:
    return f"{base_model.rpartition('/')[2]} {summary.widths}"


def _body(findings: Findings, summary: Summary, base_model: str, *, kept: bool) -> str:
    lines = [
        f"# {_plain(_title(base_model, summary))}",
        "",
        f"{_plain(base_model)}, quantized by ArrowQuant V2: {summary.size} instead of {summary.original_size}.",
        "",
        f"**{summary.verdict}**: {_plain(summary.reason)}.",
        "",
        *_metric_table(findings),
        f"{summary.counts}. {summary.bits} bits per quantized weight, everything stored counted.",
        "",
        *(f"- {count} kept: {_plain(reason)}" for reason, count in kept_reasons(findings).items()),
        "",
        "```python",
        "import arrow_quant_v2 as aq",
        "",
        'model = aq.load("this-folder")  # or aq.load_pipeline',
        "```",
        "",
        "`report.html` shows every layer, `report.json` holds the same figures."
        + (" The original's own card is `README.original.md`." if kept else ""),
    ]
    return "\n".join(lines) + "\n"


def _metric_table(findings: Findings) -> list[str]:
    if not findings.metrics:
        return []
    rows = [
        f"| {_plain(one.name)} | {figure(one.value)} {_plain(one.unit)} | {figure(one.original)} | {one.better} |"
        for one in findings.metrics
    ]
    return ["| metric | quantized | original | better |", "|---|---|---|---|", *rows, ""]


def _plain(text: str) -> str:
    """Text of others as one line in which Markdown and HTML mean nothing."""
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~&])", r"\\\1", " ".join(text.split()))

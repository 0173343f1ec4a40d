"""Findings of one model, or of several side by side, as one HTML page that needs nothing else. Writes no files.

jinja2 escapes everything that comes from a model or a person; the page's policy runs the two scripts that are ours, by
their hashes, and loads nothing from anywhere.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import importlib.util
import json
import math
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from arrow_quant_v2 import __version__
from arrow_quant_v2.errors import ConfigurationError, ValidationError
from arrow_quant_v2.report.changes import Changes, changes
from arrow_quant_v2.report.charts import Chart, charts, colour_of, compared_time_groups, trajectories
from arrow_quant_v2.report.spectrogram import spectrogram
from arrow_quant_v2.report.stored import mean_error
from arrow_quant_v2.report.summary import Summary, figure, kept_reasons, kind, megabytes, reason, summarize

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import jinja2

    from arrow_quant_v2.validation.findings import Findings, LayerFinding, SamplePair

NEEDED = ("jinja2", "plotly")
HOW_TO_GET = "pip install 'arrow-quant-v2[report]'"
PNG = b"\x89PNG\r\n\x1a\n"
COLUMNS = (  # of numbers, in the table of layers; one that is empty for every layer is left out
    ("bits/weight", "bits"),
    ("weight cosine", "weight_cosine"),
    ("output cosine", "output_cosine"),
    ("output error", "output_error"),
)
SMALL = 160  # pixels; smaller pictures are shown with sharp edges, larger than they are


@dataclass(frozen=True, kw_only=True)
class Row:
    """One layer of the table: text, and the numbers that it is sorted by."""

    name: str
    shape: str
    quant_type: str
    colour: str
    kind: str
    bits: float
    weight_cosine: float | None
    output_cosine: float | None
    output_error: float | None
    method: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Shown:
    """One side of a sample: text, or where the page finds its picture, sound and spectrogram."""

    text: str = ""
    source: str = ""
    picture: str = ""
    sharp: bool = False


@dataclass(frozen=True, kw_only=True)
class Made:
    """What one quantized model made of a sample; for texts also what changed."""

    model: str
    shown: Shown
    changes: Changes | None


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """The same thing made by the original and by every model, from one seed."""

    kind: str
    title: str
    seed: int
    original: Shown
    made: tuple[Made, ...]


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Everything that the page says of one model."""

    anchor: str
    title: str
    findings: Findings
    summary: Summary
    charts: tuple[tuple[str, Chart], ...]
    rows: tuple[Row, ...]
    columns: tuple[tuple[str, str], ...]
    kept: Mapping[str, int]


def missing_packages() -> list[str]:
    """Which packages of the extra `report` are not installed."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def page(models: Mapping[str, Findings], title: str | None = None) -> str:
    """The page of these models, by the names that they are shown under.

    Raises:
        ConfigurationError: no model is given, or a package is missing.
        ValidationError: a sample is no PNG picture or no WAV sound.
    """
    if lacking := missing_packages():
        raise ConfigurationError(f"report.html needs {' and '.join(lacking)}; {HOW_TO_GET}")
    if not models:
        raise ConfigurationError("a report was asked of no model; give one or more")
    panels = [_panel(f"model-{number}", name, found) for number, (name, found) in enumerate(models.items(), start=1)]
    shared = _shared_charts(models)
    drawn = [*shared, *(chart for panel in panels for chart in panel.charts)]
    return _template().render(
        title=title or next(iter(models)),
        panels=panels,
        shared=shared,
        galleries=_galleries(models),
        metric_names=_metric_names(models),
        figures=_script_safe({anchor: chart.figure | {"height": chart.height} for anchor, chart in drawn}),
        script=_own("report.js"),
        style=_own("report.css"),
        plotly=_plotly().packed,
        policy=_policy(_hash(_own("report.js").encode()), _plotly().hash),
        version=__version__,
    )


def _metric_names(models: Mapping[str, Findings]) -> list[str]:
    """The columns of figures, each once; what the verdict is about has a column of its own already."""
    judged = {found.metric for found in models.values()}
    names = dict.fromkeys(one.name for found in models.values() for one in found.metrics)
    return [name for name in names if judged != {name}]


def _panel(anchor: str, name: str, findings: Findings) -> Panel:
    numbered = enumerate(charts(findings), start=1)
    return Panel(
        anchor=anchor,
        title=name,
        findings=findings,
        summary=summarize(findings),
        charts=tuple((f"{anchor}-chart-{number}", chart) for number, chart in numbered),
        rows=(rows := tuple(_row(one) for one in findings.layers)),
        columns=tuple((name, field) for name, field in COLUMNS if any(getattr(row, field) is not None for row in rows)),
        kept=kept_reasons(findings),
    )


def _shared_charts(models: Mapping[str, Findings]) -> list[tuple[str, Chart]]:
    """Those with a line for each model; of one model its time groups are in its panel."""
    several = len(models) > 1
    steps = trajectories(models if several else {"": next(iter(models.values()))})
    made = (*steps, *(compared_time_groups(models) if several else ()))
    return [(f"shared-chart-{number}", chart) for number, chart in enumerate(made)]


def _row(one: LayerFinding) -> Row:
    return Row(
        name=one.name,
        shape=" x ".join(map(str, one.shape)) or "scalar",
        quant_type=one.quant_type,
        colour=colour_of(one.quant_type),
        kind=kind(one),
        bits=one.bits_per_weight,
        weight_cosine=one.weight_cosine,
        output_cosine=one.output_cosine,
        output_error=mean_error(one),
        method=one.method or "",
        reason=reason(one),
    )


# Samples


def _galleries(models: Mapping[str, Findings]) -> list[Gallery]:
    """Pairs that show the same thing lie together, whichever model they belong to."""
    found: dict[tuple[object, ...], list[tuple[str, SamplePair]]] = {}
    for name, findings in models.items():
        for pair in findings.samples:
            found.setdefault((pair.kind, pair.title, pair.seed, pair.original), []).append((name, pair))
    return [_gallery(pairs) for pairs in found.values()]


def _gallery(pairs: Sequence[tuple[str, SamplePair]]) -> Gallery:
    first = pairs[0][1]
    return Gallery(
        kind=first.kind,
        title=first.title,
        seed=first.seed,
        original=_shown(first.kind, first.original),
        made=tuple(
            Made(model=name, shown=_shown(pair.kind, pair.quantized), changes=_changes(pair)) for name, pair in pairs
        ),
    )


def _changes(pair: SamplePair) -> Changes | None:
    if isinstance(pair.original, str) and isinstance(pair.quantized, str):
        return changes(pair.original, pair.quantized)
    return None


def _shown(what: str, content: str | bytes) -> Shown:
    if isinstance(content, str):
        return Shown(text=content)
    if what == "audio":
        picture = _address("image/png", spectrogram(content))
        return Shown(source=_address("audio/wav", content), picture=picture)
    if not content.startswith(PNG):
        raise ValidationError(f"a picture begins with {content[:8]!r}; give it as PNG")
    width = int.from_bytes(content[16:20], "big")
    return Shown(source=_address("image/png", content), sharp=width < SMALL)


def _address(kind_of_content: str, content: bytes) -> str:
    return f"data:{kind_of_content};base64,{base64.b64encode(content).decode()}"


# The page's own parts


@dataclass(frozen=True)
class _Plotly:
    """plotly.js as gzip in base64, a third of its size, and the hash by which the page's policy knows it."""

    packed: str
    hash: str


@cache
def _plotly() -> _Plotly:
    script = (resources.files("plotly") / "package_data" / "plotly.min.js").read_bytes()
    packed = gzip.compress(script, 6, mtime=0)
    return _Plotly(packed=base64.b64encode(packed).decode(), hash=_hash(script))


@cache
def _own(name: str) -> str:
    return (resources.files("arrow_quant_v2.report") / "templates" / name).read_text(encoding="utf-8")


def _hash(script: bytes) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script).digest()).decode()}'"


def _policy(*scripts: str) -> str:
    """What the page may do: run these scripts, show what lies in itself, ask no one for anything."""
    return (
        f"default-src 'none'; script-src {' '.join(scripts)}; style-src 'unsafe-inline';"
        " img-src data: blob:; media-src data:; base-uri 'none'; form-action 'none'"
    )


def _script_safe(content: Mapping[str, Any]) -> str:
    """JSON that can stand inside a script element: nothing in it ends the element or begins a comment."""
    text = json.dumps(content, ensure_ascii=True, separators=(",", ":"), default=str, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


@cache
def _template() -> jinja2.Template:
    import jinja2  # noqa: PLC0415 - the extra may be missing

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_own),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"figure": figure, "megabytes": megabytes, "sortable": _sortable}
    environment.globals["colour_of"] = colour_of
    environment.globals["named"] = _named
    return environment.get_template("report.html")


def _sortable(value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else repr(value)


def _named(findings: Findings, name: str) -> Iterator[Any]:
    """The metrics of this name: one, or none."""
    return (one for one in findings.metrics if one.name == name)

"""Findings as charts: figures for plotly.js, as plain dictionaries, each with the same in words. Draws nothing.

A colour is the name of a custom property of the page, "--int2", so that charts follow light and dark.
"""

from __future__ import annotations

import html
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from arrow_quant_v2.report.stored import is_quantized, mean_error

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

    from arrow_quant_v2.validation.findings import Findings, LayerFinding

WORST = 30  # layers in the sorted bars; the table has all of them
LABELS = 40  # names beside a heat map at most
ROW, MARGIN = 15, 110  # pixels of a row, and of what is around the rows
FEWEST, TALLEST = 8, 900  # rows, pixels
LONGEST = 120  # letters of a name that is hovered
NAME = 26  # letters of a name beside a chart
FEW = 4  # powers of ten, between which there is room for more ticks
TOLD_APART = 10.0  # times; values that differ by more need a logarithmic axis
SMALLEST = 1e-12  # an error of zero has no place on a logarithmic axis
LINES = ("--line-1", "--line-2", "--line-3", "--line-4", "--line-5", "--line-6")
Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One chart: what it shows, the same in a sentence for those who cannot see it, and its figure."""

    title: str
    caption: str
    spoken: str
    figure: Json
    height: int


def charts(findings: Findings) -> list[Chart]:
    """The charts of one model; those that have nothing to show are left out."""
    labels, layers = group_labels(findings), judged_layers(findings)
    made = (
        _heat_map(layers, labels, findings),
        _by_time_group({"": findings}, labels),
        _worst(layers),
        _bits(layers),
    )
    return [chart for chart in made if chart is not None]


def judged_layers(findings: Findings) -> Sequence[LayerFinding]:
    """The quantized layers: those that were kept lose nothing, and would hide the others.

    All of them where none is ours, as of another quantizer's model.
    """
    return [one for one in findings.layers if is_quantized(one)] or findings.layers


def trajectories(models: Mapping[str, Findings]) -> list[Chart]:
    """Error of the whole model's outputs at each timestep: a chart for each original, a line for each model.

    Timesteps of different originals, such as shares of hidden tokens and noise levels, have no axis in common.
    """
    return _each(_trajectory, _sets(models, _original))


def _original(findings: Findings) -> Hashable:
    """Its tensors tell it from others."""
    return frozenset((one.name, one.shape) for one in findings.layers)


def _sets(models: Mapping[str, Findings], key: Callable[[Findings], Hashable]) -> list[dict[str, Findings]]:
    """The models that are alike, in the order in which they come."""
    found: dict[Hashable, dict[str, Findings]] = {}
    for name, findings in models.items():
        found.setdefault(key(findings), {})[name] = findings
    return list(found.values())


def _each(
    draw: Callable[[Mapping[str, Findings]], Chart | None], sets: Sequence[Mapping[str, Findings]]
) -> list[Chart]:
    """One chart for each set that has something to show; with the names in the title where there are several."""
    made = [(chart, names) for names in sets if (chart := draw(names)) is not None]
    if len(made) == 1:
        return [made[0][0]]
    return [replace(chart, title=f"{chart.title}: {', '.join(names)}") for chart, names in made]


def _trajectory(models: Mapping[str, Findings]) -> Chart | None:
    """Of models with the same timesteps."""
    lines = [
        _line(name, [one.timestep for one in found.steps], [one.error for one in found.steps], number)
        | {
            "customdata": [[_told(one.cosine), one.samples] for one in found.steps],
            "hovertemplate": "timestep %{x:.4g}: error %{y:.3g}<br>cosine %{customdata[0]}, %{customdata[1]} samples",
        }
        for number, (name, found) in enumerate(models.items())
        if found.steps
    ]
    if not lines:
        return None
    return Chart(
        title="Error along the denoising trajectory",
        caption="|original - quantized|² / |original|² of the whole model's outputs, both given the same input."
        + _meaning_of_time(next(iter(models.values()))),
        spoken=_range_in_words("the error of the model's outputs", [y for line in lines for y in line["y"]]),
        figure={"data": lines, "layout": {"xaxis": _axis("timestep"), "yaxis": _error_axis("error", lines)} | LEGEND},
        height=320,
    )


def compared_time_groups(models: Mapping[str, Findings]) -> list[Chart]:
    """Mean error of layers in each time group: a chart for each original and its groups, a line for each model."""

    def draw(alike: Mapping[str, Findings]) -> Chart | None:
        return _by_time_group(alike, group_labels(next(iter(alike.values()))))

    return _each(draw, _sets(models, lambda findings: (_original(findings), tuple(group_labels(findings)))))


def _meaning_of_time(findings: Findings) -> str:
    """What a timestep is where it is no step of a sampler."""
    hidden = findings.facts.get("modality") in {"text", "code"}
    return " Timesteps of masked text are shares of hidden tokens: 1 is where everything is hidden." if hidden else ""


def group_labels(findings: Findings) -> list[str]:
    """What each time group is called: its range of timesteps, or its number where that is not known."""
    count = max((len(one.output_error or ()) for one in findings.layers), default=0)
    if count == len(findings.time_groups):
        return [f"{start:.3g}\u2013{end:.3g}" for start, end in findings.time_groups]
    return [f"group {number}" for number in range(1, count + 1)]


def short_names(names: Sequence[str]) -> list[str]:
    """Names without ".weight", and without as much of their beginning as makes them fit beside a chart.

    Those that would be alike keep the last number of what is left out: "3…linear_1" of the third block.
    """
    plain = [name.removesuffix(".weight") for name in names]
    short = [_short(name) for name in plain]
    return [
        _safe(_numbered(name, end) if short.count(end) > 1 else end) for name, end in zip(plain, short, strict=True)
    ]


def _numbered(name: str, short: str) -> str:
    left_out = name[: len(name) - len(short) + 1].split(".")
    return next((part for part in reversed(left_out) if part.isdecimal()), "") + short


def _short(name: str) -> str:
    """The last parts of a name that fit: "bert.encoder.layer.0.output.dense" becomes "…layer.0.output.dense"."""
    if len(name) <= NAME:
        return name
    ends = (name[place + 1 :] for place, letter in enumerate(name) if letter == ".")
    return "…" + next((end for end in ends if 0 < len(end) < NAME), name[1 - NAME :])


def _safe(name: str) -> str:
    """A name without meaning for plotly.js, which takes some tags in its texts for markup; a long one is cut."""
    return html.escape(name if len(name) <= LONGEST else name[:LONGEST] + "…", quote=False)


def _heat_map(layers: Sequence[LayerFinding], labels: Sequence[str], findings: Findings) -> Chart | None:
    """Layer x time group, colour by the logarithm of the error."""
    seen = [one for one in layers if one.output_error is not None and len(one.output_error) == len(labels)]
    if not seen or len(labels) < 2:  # noqa: PLR2004 - one group alone is what the bars show
        return None
    errors = [[_positive(error) for error in one.output_error or ()] for one in seen]
    ticks = list(range(0, len(seen), -(-len(seen) // LABELS)))
    short = short_names([one.name for one in seen])
    trace = {
        "type": "heatmap",
        "z": [[None if error is None else math.log10(error) for error in row] for row in errors],
        "x": list(labels),
        "customdata": [[[_safe(one.name), _told(e)] for e in row] for one, row in zip(seen, errors, strict=True)],
        "hovertemplate": "%{customdata[0]}<br>%{x}: error %{customdata[1]}<extra></extra>",
        "hoverongaps": False,
        "colorscale": [[place, f"--heat-{number}"] for number, place in enumerate((0.0, 0.25, 0.5, 0.75, 1.0))],
        "colorbar": _colour_bar([error for row in errors for error in row if error is not None]),
        "xgap": 1,
        "ygap": 1 if len(seen) <= 2 * LABELS else 0,
    }
    axis = {"autorange": "reversed", "tickvals": ticks, "ticktext": [short[tick] for tick in ticks], "ticks": ""}
    worst = max(seen, key=lambda one: mean_error(one) or 0.0)
    return Chart(
        title="Output error by layer and time group",
        caption="Share of each layer's output energy that is lost; empty where no such input was seen. Layers from"
        f" first to last.{_meaning_of_time(findings)}",
        spoken=f"{len(seen)} layers in {len(labels)} time groups; most is lost in {worst.name},"
        f" {_told(mean_error(worst))} on average",
        figure={"data": [trace], "layout": {"yaxis": axis, "xaxis": _axis("timesteps") | {"type": "category"}}},
        height=min(TALLEST, MARGIN + ROW * max(FEWEST, len(seen))),
    )


def _colour_bar(errors: Sequence[float]) -> Json:
    """Powers of ten as they are read: 0.001, not -3."""
    if not errors:
        return {}
    low, high = (math.log10(edge(errors)) for edge in (min, max))
    powers = [float(power) for power in range(math.ceil(low), math.floor(high) + 1)] or [(low + high) / 2]
    ticks = {"tickvals": powers, "ticktext": [f"{10.0**power:.2g}" for power in powers]}
    return ticks | {"orientation": "h", "y": 1.0, "yanchor": "bottom", "thickness": 10}


def _by_time_group(models: Mapping[str, Findings], labels: Sequence[str]) -> Chart | None:
    """The mean over layers in each time group."""
    lines = [
        _line(name, list(labels), means, number)
        | {"hovertemplate": "%{x}: mean error %{y:.3g}<extra>" + ("%{fullData.name}" if name else "") + "</extra>"}
        for number, (name, found) in enumerate(models.items())
        if len(means := _group_means(judged_layers(found), len(labels))) > 1
    ]
    if not lines:
        return None
    return Chart(
        title="Output error by time group",
        caption="Mean over layers, where at least half of them met such inputs. Models differ in which end of the"
        f" trajectory is sensitive.{_meaning_of_time(next(iter(models.values())))}",
        spoken=_range_in_words("the mean error of layers", [y for line in lines for y in line["y"]]),
        figure={
            "data": lines,
            "layout": {"xaxis": _axis("timesteps") | {"type": "category"}, "yaxis": _error_axis("mean error", lines)}
            | LEGEND,
        },
        height=280,
    )


def _group_means(layers: Iterable[LayerFinding], count: int) -> list[float]:
    """Mean error of each group over the layers that have it; NaN where fewer than half of them do.

    Samples of some groups may reach few layers, whose mean says nothing beside that of all.
    """
    rows = [one.output_error for one in layers if one.output_error is not None and len(one.output_error) == count]
    columns = ([error for error in column if math.isfinite(error)] for column in zip(*rows, strict=True))
    return [sum(column) / len(column) if 2 * len(column) >= len(rows) else math.nan for column in columns]


def _worst(layers: Sequence[LayerFinding]) -> Chart | None:
    """The layers that lose most, the worst at the top: by their outputs where these are known, else by weights."""
    by_output = {one.name: error for one in layers if (error := mean_error(one)) is not None}
    by_weight = {one.name: 1.0 - one.weight_cosine for one in layers if one.weight_cosine is not None}
    errors = by_output or by_weight
    if not errors:
        return None
    kinds = {one.name: one.quant_type for one in layers}
    names = sorted(errors, key=lambda name: -errors[name])[:WORST]
    what = "output error" if by_output else "1 - weight cosine"
    trace = {
        "type": "bar",
        "orientation": "h",
        "x": [errors[name] for name in names],
        "customdata": [[_safe(name), _safe(kinds[name]), _told(errors[name])] for name in names],
        "hovertemplate": "%{customdata[0]}<br>%{customdata[1]}: %{customdata[2]}<extra></extra>",
        "marker": {"color": [colour_of(kinds[name]) for name in names]},
    }
    axis = {"autorange": "reversed", "tickvals": list(range(len(names))), "ticktext": short_names(names), "ticks": ""}
    return Chart(
        title=f"Layers that lose most: {what}",
        caption=f"The worst {len(names)} of {len(errors)} layers, {_of_what(bool(by_output))}; the table has them all.",
        spoken=f"worst is {names[0]} with {_told(errors[names[0]])}, then {_listed(names[1:3])}",
        figure={"data": [trace], "layout": {"yaxis": axis, "xaxis": _axis(what) | {"rangemode": "tozero"}}},
        height=MARGIN + 18 * len(names),
    )


def _of_what(by_output: bool) -> str:  # noqa: FBT001 - one half of a sentence
    return "mean over time groups" if by_output else "of weights alone"


def _bits(layers: Sequence[LayerFinding]) -> Chart | None:
    """Bits per weight in the order of the model, quantized layers alone: others dwarf them."""
    quantized = [one for one in layers if one.weight_cosine is not None]
    if not quantized:
        return None
    kinds = sorted({one.quant_type for one in quantized}, key=lambda kind: (len(kind), kind))
    traces: list[Json] = []
    for kind in kinds:
        places = [place for place, one in enumerate(quantized) if one.quant_type == kind]
        traces.append({
            "type": "bar",
            "name": _safe(_short(kind)),
            "x": [place + 1 for place in places],
            "y": [quantized[place].bits_per_weight for place in places],
            "customdata": [[_safe(quantized[place].name)] for place in places],
            "hovertemplate": "%{customdata[0]}<br>%{y:.3f} bits per weight<extra></extra>",
            "marker": {"color": colour_of(kind), "line": {"width": 0}},
            "showlegend": True,
        })  # fmt: skip
    counts = ", ".join(f"{len(trace['x'])} in {trace['name']}" for trace in traces)
    layout = {"xaxis": _axis("layer"), "yaxis": _axis("bits per weight") | {"rangemode": "tozero"}, "bargap": 0.1}
    return Chart(
        title="Bits per layer",
        caption="Everything stored counted, parameters of the grid too. Quantized layers from first to last.",
        spoken=f"of {len(quantized)} quantized layers {counts}",
        figure={"data": traces, "layout": layout | LEGEND},
        height=260,
    )


LEGEND: Json = {"legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}}


def colour_of(quant_type: str) -> str:
    """The custom property of the page that colours a width; all that was kept has one colour."""
    return f"--{quant_type}" if quant_type in {"int2", "int4", "int8"} else "--kept"


def _line(name: str, x: Sequence[object], y: Sequence[float], number: int) -> Json:
    colour = LINES[number % len(LINES)]
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "connectgaps": True,  # over a time group that no sample hit
        "name": _safe(_short(name)),
        "showlegend": bool(name),
        "x": list(x),
        "y": [_positive(value) for value in y],
        "line": {"color": colour, "width": 2},
        "marker": {"color": colour, "size": 7, "symbol": number % len(LINES)},
    }


def _error_axis(title: str, lines: Sequence[Json]) -> Json:
    """Logarithmic where errors differ by more than a power of ten, else from zero, which blows no difference up."""
    known = [y for line in lines for y in line["y"] if y is not None]
    if known and max(known) > TOLD_APART * min(known):
        return _axis(title) | {"type": "log"} | _ticks(min(known), max(known))
    return _axis(title) | {"rangemode": "tozero"}


def _ticks(low: float, high: float) -> Json:
    """1, 2 and 5 times each power of ten in this range, or the powers alone where these are enough."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if len(powers) <= FEW else (1,)
    values = [step * 10.0**power for power in powers for step in steps]
    return {"tickvals": values, "ticktext": [f"{value:.2g}" for value in values]}


def _axis(title: str) -> Json:
    return {"title": {"text": title}}


def _positive(error: float) -> float | None:
    """The error where a logarithm of it can be shown."""
    return max(error, SMALLEST) if math.isfinite(error) else None


def _told(value: float | None) -> str:
    return "unknown" if value is None or not math.isfinite(value) else f"{value:.3g}"


def _range_in_words(what: str, values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{what} lies between {_told(min(known, default=None))} and {_told(max(known, default=None))}"


def _listed(names: Sequence[str]) -> str:
    return " and ".join(names) or "none"

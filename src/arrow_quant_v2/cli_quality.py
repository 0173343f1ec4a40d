"""What validate and compare print: the verdict first, then the figures, then the worst layers; measures nothing."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import typer

from arrow_quant_v2.cli_tables import print_table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

WORST = 10
DIGITS = 5


def print_validation(found: Mapping[str, Any], count: int = WORST) -> None:
    """One model beside its original, and its `count` worst layers."""
    typer.echo(_verdict(found))
    bits, size, whole = found["bits_per_weight"], found["size_mb"], found["original_mb"]
    counted = "" if bits is None else f", {bits:.3f} bits per weight in quantized layers"
    typer.echo(f"  {size:.2f} MB, {found['compression_ratio']:.2f} times smaller than {whole:.2f} MB{counted}")
    for note in found["notes"]:
        typer.echo(f"  {note}")
    typer.echo("")
    rows = [
        (metric["name"], _shown(metric["value"]), _shown(metric["original"]), metric["unit"], metric["note"])
        for metric in found["metrics"]
    ]
    print_table(("metric", "quantized", "original", "unit", ""), rows)
    if found["steps"]:
        typer.echo("")
        steps = [
            (f"{one['timestep']:g}", _shown(one["cosine"]), _shown(one["error"]), str(one["samples"]))
            for one in found["steps"]
        ]
        print_table(("timestep", "output cosine", "output error", "samples"), steps)
    _print_layers(found, count)


def _verdict(found: Mapping[str, Any]) -> str:
    passed, cosine, bar = found["passed"], found["cosine_similarity"], found["min_accuracy"]
    verdict = "passed" if passed else "MISSED"
    if cosine is None:
        return f"{verdict}: bar {bar}, nothing is quantized"
    worst = found["worst_layer"]
    least = "" if worst is None else f"; least weight cosine {_shown(found['worst_cosine_similarity'])}, {worst}"
    return f"{verdict}: bar {bar}, {found['metric']}: {_shown(cosine)}{least}"


def _print_layers(found: Mapping[str, Any], count: int) -> None:
    names = worst_layers(found)[:count]
    if not names:
        return
    typer.echo("")
    bar, outputs = found["min_accuracy"], found["per_layer_output_cosine"]
    rows = [
        (
            name,
            _shown(found["per_layer_accuracy"][name]),
            f"{found['per_layer_mse'][name]:.3e}",
            _shown(outputs.get(name)),
            _shown(_largest(found["per_layer_output_error"].get(name))),
            "" if found["per_layer_accuracy"][name] >= bar else "below the bar",
        )
        for name in names
    ]
    whole = len(found["quantized_layers"])
    print_table((f"worst of {whole} layers", "weight cosine", "mse", "output cosine", "worst output error", ""), rows)


def worst_layers(found: Mapping[str, Any]) -> list[str]:
    """Quantized layers, those first whose outputs are farthest from the original's; by weights where none were seen."""
    outputs, weights = found["per_layer_output_cosine"], found["per_layer_accuracy"]
    return sorted(found["quantized_layers"], key=lambda name: (outputs.get(name, weights[name]), name))


def _largest(errors: Sequence[float | None] | None) -> float | None:
    return max((error for error in errors or () if error is not None), default=None)


def print_comparison(found: Mapping[str, Any]) -> None:
    """Several models side by side, one a row."""
    models = found["models"]
    names = list(dict.fromkeys(metric["name"] for model in models for metric in model["metrics"]))
    values = [{metric["name"]: metric["value"] for metric in model["metrics"]} for model in models]
    shown = [name for name in names if any(value.get(name) is not None for value in values)]
    rows = [
        (
            model["path"],
            _shown(model["bits_per_weight"], 3),
            f"{model['size_mb']:.2f}",
            f"{model['compression_ratio']:.2f}",
            *(_shown(value.get(name)) for name in shown),
            "passed" if model["passed"] else f"below {model['min_accuracy']}",
        )
        for model, value in zip(models, values, strict=True)
    ]
    typer.echo(f"{found['original']}: {found['original_mb']:.2f} MB")
    units = {metric["name"]: metric["unit"] for model in models for metric in model["metrics"]}
    titles = [f"{name} ({units[name]})" if units[name] else name for name in shown]
    print_table(("model", "bits/weight", "MB", "times smaller", *titles, ""), rows)
    for note in dict.fromkeys(note for model in models for note in model["notes"]):
        typer.echo(note)


def _shown(value: float | None, digits: int = DIGITS) -> str:
    if value is None:
        return ""
    return f"{value:.{digits}f}" if not value or math.log10(abs(value)) > -digits else f"{value:.2e}"

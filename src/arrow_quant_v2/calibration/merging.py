"""Stats of the same model and settings from different samples, added up. Knows no models and no run."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING

from arrow_quant_v2 import __version__
from arrow_quant_v2.calibration.stored_stats import KeptInput, Summary, write_input
from arrow_quant_v2.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from pydantic import JsonValue

    from arrow_quant_v2.calibration.stats import InputStats
    from arrow_quant_v2.calibration.stored_stats import KeptFile, KeptStats

    Key = tuple[str, ...]

MUST_AGREE = {
    "model": "model",
    "model_content": "values of the model's weights",
    "component": "component",
    "modality": "modality",
    "mask_token": "mask token",
    "apart": "way of keeping time groups (--compact)",
    "time_groups": "time groups",
}
ALIKE = "; make them with --like the first ones"


def merge_into(target: Path, stats: Sequence[KeptStats], asked: dict[str, JsonValue]) -> Summary:
    """Write the files of all stats together into `target`; what they would be if their samples had been shown at once.

    Raises:
        ConfigurationError: fewer than two are given, they do not belong together, or share samples.
        StoreError: one of them is damaged, or the disk refuses.
    """
    refuse_unlike(stats)
    numbers = [{entry.layers: number for number, entry in enumerate(one.summary.inputs)} for one in stats]
    keys = list(dict.fromkeys(key for of in numbers for key in of))
    first = stats[0].summary
    inputs = []
    for number, key in enumerate(keys):
        places = [(one, of[key]) for one, of in zip(stats, numbers, strict=True) if key in of]
        inputs.append(_merged_input(target, number, places))
    samples = tuple(part for one in stats for part in one.summary.samples)
    changed = {"program_version": __version__, "asked": asked, "samples": samples, "inputs": tuple(inputs)}
    return first.model_copy(update=changed)


def _merged_input(target: Path, number: int, places: Sequence[tuple[KeptStats, int]]) -> KeptInput:
    one, own = places[0]
    entry, apart = one.summary.inputs[own], one.summary.apart
    files: list[KeptFile | None] = []
    for place in range(len(entry.files)):
        total = _sum([kept.part(at, place) for kept, at in places])
        files.append(None if total is None else write_input(target, number, place if apart else None, total))
    return entry.model_copy(update={"files": tuple(files)})


def _sum(parts: Sequence[InputStats | None]) -> InputStats | None:
    total: InputStats | None = None
    for part in parts:
        if total is None:
            total = part
        elif part is not None:
            total.merge(part)
    return total


def refuse_unlike(stats: Sequence[KeptStats]) -> None:
    """Refuse stats that cannot be added up.

    Raises:
        ConfigurationError: names the two folders and what sets them apart.
    """
    if len(stats) < 2:  # noqa: PLR2004 - a sum
        raise ConfigurationError("two stats or more are needed to be merged")
    for one, other in combinations(stats, 2):
        _refuse_other_settings(one, other)
        _refuse_other_inputs(one, other)
        _refuse_other_strata(one, other)
    seen: dict[str, KeptStats] = {}
    for one in stats:
        for part in one.summary.samples:
            if part.identity in seen:
                raise ConfigurationError(
                    f"{one.folder}: was made from the same samples as {seen[part.identity].folder}, which would count"
                    " twice; use another --seed or another part of the data"
                )
            seen[part.identity] = one


def _refuse_other_settings(one: KeptStats, other: KeptStats) -> None:
    for field, words in MUST_AGREE.items():
        mine, theirs = getattr(one.summary, field), getattr(other.summary, field)
        if mine != theirs:
            remedy = ALIKE if field in {"time_groups", "apart"} else ""
            raise ConfigurationError(
                f"{one.folder} and {other.folder} cannot be merged: they have another {words},"
                f" {_short(mine)} and {_short(theirs)}{remedy}"
            )


def _short(entry: object) -> str:
    text = str(entry)
    return text if len(text) <= 40 else f"{text[:40]}..."  # noqa: PLR2004 - letters of a message


def _refuse_other_inputs(one: KeptStats, other: KeptStats) -> None:
    """The same layers share an input in both, and it has the same columns."""
    known = {layer: entry for entry in one.summary.inputs for layer in entry.layers}
    for entry in other.summary.inputs:
        for layer in entry.layers:
            mine = known.get(layer, entry)
            if _shape(mine) != _shape(entry):
                raise ConfigurationError(
                    f"{one.folder} and {other.folder} cannot be merged: the input of {layer} goes into other layers"
                )


def _shape(entry: KeptInput) -> tuple[object, ...]:
    return entry.layers, entry.columns, entry.channels, entry.transposed


def _refuse_other_strata(one: KeptStats, other: KeptStats) -> None:
    """A sum over time groups can be added to another one only where both weigh the groups alike."""
    mine, theirs = one.summary.sizes, other.summary.sizes
    alike = all(a * sum(theirs) == b * sum(mine) for a, b in zip(mine, theirs, strict=True))
    if not one.summary.apart and not alike:
        raise ConfigurationError(
            f"{one.folder} and {other.folder} cannot be merged: their time groups have {mine} and {theirs} calls, and"
            " were summed up with other weights; make them without --compact"
        )

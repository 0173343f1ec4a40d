"""Bits spent by measuring, beside the same size spent in other ways: errors of the outputs of seven real models.

    python bench/allocation.py [--models NAME ...] [--bits 2.5 3 4.5] [--samples N] [--room BITS] [--threads N]
                               [--folder DIR]

uniform     one width for all layers, with groups as small as fill the size
in order    two widths: the wider one from the first layer on, as far as the size goes
by name     8 bits for the first and last layers, embeddings and what tells the time, then as "in order"
allocation  --target-bits

Whole models are quantized, tables included, with the method of their modality; groups have 64 columns, but for
"uniform". Every way is calibrated on the same samples, and rivals may be --room bits larger than the target. Error is
|a - b|^2 / |a|^2 of the model's outputs, by the judge of `arrow-quant validate`, on inputs that nothing was fitted to.
Cells are noted one by one in DIR/cells.jsonl: a run that was killed goes on behind them.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from measure import CONSOLE, show
from quality import THREADS, Judge, our_weights, quiet
from quality_table import figure
from subjects import SUBJECTS, opened

from arrow_quant_v2 import ArrowQuantV2, DiffusionQuantConfig
from arrow_quant_v2.errors import ConfigurationError
from arrow_quant_v2.packed import WIDTHS
from arrow_quant_v2.plan import likely_calibrated, plan_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from subjects import Opened

    from arrow_quant_v2.plan import LayerPlan

    Settings = dict[str, Any]

SENSITIVE = re.compile(r"embed|emb_layers|time|label_emb|input_blocks\.0\.|\.out\.|head|decoder|proj_in|final")
GROUPS = (256, 128, 96, 64, 48, 40, 32, 24, 16, 8)
OURS = "allocation"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One way to spend the bits of one model: bits per weight as stored, and what became of the outputs.

    figure  what the model is known by, in the unit of its subject
    """

    model: str
    target: float
    way: str
    stored: float
    error: float
    cosine: float
    figure: float
    seconds: float

    @property
    def key(self) -> tuple[str, float, str]:
        """What tells one cell from another."""
        return self.model, self.target, self.way


# Ways to spend bits, told from shapes


def plans_at(model: Opened, settings: Settings) -> list[LayerPlan]:
    """The layers that are quantized, as calibration will find them."""
    config, infos = DiffusionQuantConfig(**settings), model.source.tensors
    calibrated = likely_calibrated(infos, config, model.runnable.modality, tied(model))
    return [plan for plan in plan_model(infos, config, calibrated) if plan.spec is not None]


def tied(model: Opened) -> dict[str, list[str]]:
    """Tensor -> every name by which the model uses it: a table that is also a head is fitted to its inputs."""
    uses: dict[int, list[str]] = {}
    parameters = dict(model.runnable.module.named_parameters(remove_duplicate=False))
    for place, parameter in parameters.items():
        uses.setdefault(id(parameter), []).append(place)
    return {name: uses[id(parameters[at])] for name, at in model.runnable.names.items() if at in parameters}


def bits_of(model: Opened, settings: Settings) -> float:
    """Stored bits per weight."""
    plans = plans_at(model, settings)
    return 8 * sum(plan.stored_bytes for plan in plans) / sum(plan.tensor.numel for plan in plans)


def uniform(model: Opened, base: Settings, target: float) -> Settings:
    """The width and group size that come nearest to the target from below, or else the smallest."""
    every = [base | {"bit_width": bits, "group_size": group} for bits in WIDTHS for group in GROUPS]
    sizes = [bits_of(model, one) for one in every]
    fitting = [(size, number) for number, size in enumerate(sizes) if size <= target]
    return every[max(fitting)[1] if fitting else sizes.index(min(sizes))]


def in_order(
    model: Opened, base: Settings, target: float, *, first: Callable[[str], bool] = lambda _: False
) -> Settings:
    """Layers made wider one after the other where the target holds, and from the first on again.

    Those that come `first` have 8 bits from the start.
    """
    widths = {plan.tensor.name: 8 if first(plan.tensor.name) else 2 for plan in plans_at(model, base)}
    for wider in (4, 8):
        for name in [name for name in widths if not first(name)]:
            changed = base | {"layer_bit_widths": widths | {name: wider}}
            if bits_of(model, changed) <= target:
                widths[name] = wider
    return base | {"layer_bit_widths": widths}


def by_name(model: Opened, base: Settings, target: float) -> Settings:
    """The rule of thumb; where the size has no room for all whose names match, the first and the last layer alone."""
    names = [plan.tensor.name for plan in plans_at(model, base)]
    ends = {names[0], names[-1]}
    matching = ends | {name for name in names if SENSITIVE.search(name)}
    for chosen in (matching, ends):
        found = in_order(model, base, target, first=chosen.__contains__)
        if bits_of(model, found) <= target:
            return found
    return in_order(model, base, target)


def allocated(model: Opened, base: Settings, target: float) -> Settings:  # noqa: ARG001 - one shape for all ways
    """What we do."""
    return {key: value for key, value in base.items() if key != "bit_width"} | {"target_bits": target}


WAYS: dict[str, Callable[[Opened, Settings, float], Settings]] = {
    "uniform": uniform,
    "in order": in_order,
    "by name": by_name,
    OURS: allocated,
}


# Measuring


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What one run of this bench is asked: `room` are bits that a rival may have beyond the target."""

    targets: Sequence[float]
    samples: int | None
    room: float
    threads: int
    folder: Path

    @property
    def few(self) -> Settings:
        """Settings."""
        return {} if self.samples is None else {"calibration_samples": self.samples}


def cell_of(judge: Judge, name: str, target: float, way: str, *, asked: Asked, out: Path) -> Cell:
    """Quantize as a user would, and judge what was stored."""
    for left in (out, out.with_name(f"{out.name}.partial")):
        shutil.rmtree(left, ignore_errors=True)
    subject = judge.model.subject
    base = {"bit_width": 2, "group_size": 64, "calibration_tokens": 0} | dict(subject.settings) | asked.few
    settings = WAYS[way](judge.model, base, target if way == OURS else target + asked.room)
    given = subject.calibration
    data, function = ({"calibration_data": str(given)}, None) if isinstance(given, Path) else ({}, given)
    config = DiffusionQuantConfig(min_accuracy=0.0, threads=asked.threads, **settings, **data)
    started = time.perf_counter()
    result = ArrowQuantV2().quantize_diffusion_model(subject.original, out, config, calibration=function)
    seconds = time.perf_counter() - started
    places = judge.model.runnable.names
    names = [one.layer_name for one in result["decisions"] if one.method and one.layer_name in places]
    figures = judge.figures(our_weights(out, names)[0])
    return Cell(model=name, target=target, way=way, stored=result["bits_per_weight"], seconds=seconds, **figures)


def cells_of(name: str, asked: Asked, done: Iterable[Cell]) -> Iterator[Cell]:
    """Every cell of one model that is not done yet."""
    there = {cell.key for cell in done}
    missing = [(target, way) for target in asked.targets for way in WAYS if (name, target, way) not in there]
    if not missing:
        return
    place = asked.folder / name
    place.mkdir(parents=True, exist_ok=True)
    with opened(SUBJECTS[name](place)) as model:
        measured = partial(cell_of, Judge(model), name, asked=asked, out=place / "out")
        for target, way in missing:
            cell = if_possible(measured, target, way)
            if cell is not None:
                yield cell


def if_possible(measured: Callable[[float, str], Cell], target: float, way: str) -> Cell | None:
    """The cell, or nothing where the model cannot be that small, which is told."""
    try:
        return measured(target, way)
    except ConfigurationError as error:
        CONSOLE.print(f"{target:g} bits, {way}: {error}")
        return None


def every_cell(names: Iterable[str], asked: Asked) -> list[Cell]:
    """All cells; each is noted as soon as it is known."""
    asked.folder.mkdir(parents=True, exist_ok=True)
    notes = asked.folder / "cells.jsonl"
    cells = [Cell(**json.loads(line)) for line in notes.read_text().splitlines()] if notes.exists() else []
    for name in names:
        for cell in cells_of(name, asked, cells):
            cells.append(cell)
            with notes.open("a") as file:
                file.write(json.dumps(asdict(cell)) + "\n")
            CONSOLE.print(f"{name} {cell.target:g} bits, {cell.way}: {shown(cell)}, {cell.seconds:.0f} s")
    return cells


# Shown


def shown(cell: Cell | None) -> str:
    """Error and stored bits."""
    return "" if cell is None else f"{figure(cell.error)} ({cell.stored:.2f})"


COLUMNS = ("model", "target", *WAYS)


def rows_of(cells: Sequence[Cell]) -> list[tuple[str, ...]]:
    """One row for each model and target."""
    found = {cell.key: cell for cell in cells}
    rows = dict.fromkeys((cell.model, cell.target) for cell in cells)
    return [(model, f"{target:g}", *(shown(found.get((model, target, way))) for way in WAYS)) for model, target in rows]


def markdown(cells: Sequence[Cell]) -> str:
    """The table for the docs."""
    lines = [COLUMNS, ("---",) * len(COLUMNS), *rows_of(cells)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    """Measure and print, model by model and size by size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--bits", type=float, nargs="+", default=[2.5, 3.0, 4.5])
    parser.add_argument("--samples", type=int, help="of calibration; those of the quality bench where left out")
    parser.add_argument("--room", type=float, default=0.05, help="bits that a rival may have beyond the target")
    parser.add_argument("--threads", type=int, default=THREADS, help="fewer where several runs share a machine")
    parser.add_argument("--folder", type=Path, default=Path("bench/out/allocation"))
    parser.add_argument("--markdown", type=Path)
    given = parser.parse_args()
    quiet(given.threads)
    asked = Asked(
        targets=given.bits, samples=given.samples, room=given.room, threads=given.threads, folder=given.folder
    )
    cells = every_cell(given.models, asked)
    show("Error of outputs (stored bits per weight)", COLUMNS, rows_of(cells))
    if given.markdown:
        given.markdown.write_text(markdown(cells))


if __name__ == "__main__":
    main()

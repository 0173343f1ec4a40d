"""Quality of outputs beside every peer's, at 2, 4 and 8 bits, on every real model here: one run, one table.

    python bench/quality.py --write [--models NAME ...]          the weights, for bench/peers/quality.py
    python bench/quality.py --only SETTING ...                   some settings of ours, by their names, and no other
    python bench/quality.py --peers bench/out/quality/run/peers.json [--json FILE] [--markdown FILE] [--into PAGE ...]

All get the same weights: linear layers and convolutions (as matrices), no tables. Peers round what lies in the folder;
those that look at inputs get H = mean x x^T of our own calibration samples, in the original model. Bits are counted as
stored: codes, scales, zeros; what a peer refused counts 16. Error is |a - b|^2 / |a|^2 of the model's outputs, by the
judge of `arrow-quant validate`, on inputs that nothing was fitted to. Ours is closer than a peer's cell where some
setting of ours with no more stored bits has less error. A run that was killed goes on in the same folder.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import torch
import transformers
from measure import CONSOLE, machine, show, write_json
from quality_table import OURS, VERDICT_COLUMNS, Cell, columns_of, filled, markdown, rows_of, shown, verdict_rows
from safetensors.torch import load_file, save_file
from subjects import SUBJECTS, Opened, opened

sys.path.append(str(Path(__file__).parent / "peers"))

from memory import PeakMemory

from arrow_quant_v2 import ArrowQuantV2, DiffusionQuantConfig
from arrow_quant_v2.calibration.collect import Watch, seen
from arrow_quant_v2.packed import ITEM_BITS
from arrow_quant_v2.plan import LOOKUP, plan_model
from arrow_quant_v2.sources.folder import open_model
from arrow_quant_v2.validation.outputs import compare_outputs, model_outputs, replaced

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Iterator, Mapping, Sequence

    from subjects import Subject
    from torch import Tensor

THREADS = 2
DESCRIBED = "model.json"  # of a model whose weights are written: its last file
LOOKED_AT = 64  # calls whose inputs peers are told of
SAMPLES_AT_8 = 16  # calls that ours is calibrated on there
KEYS = ("model", "peer", "setting", "bits")
# For those that ask for hardly more than the codes: no scales of channels, and at 2 and 4 bits the affine grid.
ROWS = {"group_size": None, "symmetric": True, "enable_spatial": False}
WIDE = {"group_size": 256, "method": "gptq", "enable_spatial": False}
NARROW = {"rows, symmetric": ROWS | {"method": "gptq"}, "g256, affine": WIDE}
GROUPS = {f"g{size}": {"group_size": size} for size in (128, 64, 32, 16)}
TUNED = {"tuning_steps": 100}
GRIDS: dict[int, dict[str, dict[str, Any]]] = {
    2: NARROW
    | {label: GROUPS[label] for label in ("g64", "g32", "g16")}
    | {"rows, symmetric, tuned": NARROW["rows, symmetric"] | TUNED, "g64, tuned": GROUPS["g64"] | TUNED},
    4: NARROW
    | {"rows, 4.15 bits": NARROW["rows, symmetric"] | {"target_bits": 4.15}}
    | {label: GROUPS[label] for label in ("g64", "g32", "g16")},
    8: {"rows, symmetric": ROWS} | GROUPS,
}


# What all of them round


def compared(model: Opened) -> dict[str, Tensor]:
    """Weights (out, in) in float32, by their names in the files: those of products that a call of the model makes."""
    places = dict(model.runnable.module.named_parameters(remove_duplicate=False))
    held = {name: places[place].detach() for name, place in model.runnable.names.items() if place in places}
    planned = [plan.tensor.name for plan in plan_model(model.source.tensors, DiffusionQuantConfig()) if plan.spec]
    tables = {held[name].data_ptr() for name in planned if name in held and LOOKUP.search(name)}
    names = [name for name in planned if name in held and held[name].data_ptr() not in tables]
    used = products(model, names, 1)
    return {name: held[name].flatten(1).clone() for name in names if name in used}


def products(model: Opened, names: list[str], calls: int) -> dict[str, Tensor]:
    """H = mean x x^T over inputs x of each layer in the original, (columns, columns), for those that have any."""
    samples = model.samples(calls, 0, model.subject.calibration).calls[:calls]
    parameters = model.runnable.parameters([model.runnable.names[name] for name in names])
    own = {model.runnable.names[name]: name for name in names}
    sums: dict[str, Tensor] = {}
    rows: dict[str, int] = {}
    for number, sample in enumerate(samples):
        for name, inputs in inputs_of(model, parameters, sample, number):
            sums[own[name]] = sums.get(own[name], 0) + inputs.T @ inputs
            rows[own[name]] = rows.get(own[name], 0) + len(inputs)
    return {name: total / rows[name] for name, total in sums.items()}


def inputs_of(
    model: Opened, parameters: Mapping[str, Tensor], sample: Any, number: int
) -> Iterator[tuple[str, Tensor]]:
    """Each layer's inputs in one call, (rows, columns)."""
    with torch.no_grad(), Watch(parameters) as watch:
        model.runnable.module(*sample.arguments, **sample.keywords)
    for name, product in watch.log:
        if name not in watch.parted and watch.products[product].inputs.numel():  # peers know no parts
            yield name, seen(watch.products[product], seed=number).rows


def write_weights(names: list[str], folder: Path) -> None:
    """What bench/peers/quality.py reads: a folder for each model; those that are there already are left."""
    for name in names:
        place = folder / name
        if (place / DESCRIBED).exists():
            continue
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        with opened(SUBJECTS[name](place)) as model:
            weights = compared(model)
            save_file(weights, place / "weights.safetensors")
            save_file(products(model, list(weights), LOOKED_AT), place / "products.safetensors")
            (place / DESCRIBED).write_text(json.dumps(described(model)))
        CONSOLE.print(f"{name}: {len(weights)} weights, {parameters(weights) / 1e6:.2f} M parameters")


def described(model: Opened) -> dict[str, Any]:
    """For peers that run the model themselves: its folder (None: a live module), and the token ids that ours sees."""
    original = model.subject.original
    calls = model.samples(LOOKED_AT, 0, model.subject.calibration).calls[:LOOKED_AT]
    ids = [sample.keywords.get("input_ids") for sample in calls]
    return {
        "folder": str(original.resolve()) if isinstance(original, Path) else None,
        "calls": [row.tolist() for batch in ids if isinstance(batch, torch.Tensor) for row in batch],
        "places": model.runnable.names,
    }


# Judging


class Judge:
    """What the original says to held-out inputs, and how far it is from there with other weights."""

    def __init__(self, model: Opened) -> None:
        self.model, self.samples = model, model.held_out()
        self.own = model_outputs(model.runnable, self.samples.calls)
        self.figure = model.subject.figure(model.runnable, self.samples)

    def figures(self, weights: Mapping[str, Tensor]) -> dict[str, float]:
        """Error, cosine, and the figure that people know; by names in the files."""
        places = dict(self.model.runnable.module.named_parameters(remove_duplicate=False))
        names = self.model.runnable.names
        held = {names[name]: weight for name, weight in weights.items()}
        values = {place: weight.reshape(places[place].shape).to(places[place]) for place, weight in held.items()}
        with replaced(self.model.runnable, values):
            theirs = model_outputs(self.model.runnable, self.samples.calls)
        found = compare_outputs(self.own, theirs, self.samples.calls)
        return {"error": found.error, "cosine": found.cosine, "figure": self.figure(values)}


def megabytes(model: Opened, weights: Mapping[str, Tensor], bits: float) -> float:
    """All weights in files: `bits` for those that are compared, everything else as it lies in the original's."""
    others = [info for info in model.source.tensors if info.name not in weights]
    return (bits + sum(math.prod(info.shape) * ITEM_BITS[info.dtype] for info in others)) / 8e6


def our_cells(name: str, subject: Subject, only: Container[str] = ()) -> Iterator[Cell]:
    """Every setting of ours, or only some, to be measured."""
    for bits, settings in GRIDS.items():
        chosen = [label for label in settings if not only or label in only]
        for label in (label for label in chosen if (bits, label) not in subject.without):
            yield Cell(model=name, peer=OURS, setting=label, bits=bits)


def our_cell(judge: Judge, weights: Mapping[str, Tensor], cell: Cell, out: Path) -> Cell:
    """Quantize as a user would, and judge what was stored."""
    subject = judge.model.subject
    for left in (out, out.with_name(f"{out.name}.partial")):
        shutil.rmtree(left, ignore_errors=True)
    config = our_config(judge.model, weights, settings_of(cell, subject))
    function = None if isinstance(subject.calibration, Path) or not config.enable_calibration else subject.calibration
    started = time.perf_counter()
    with PeakMemory() as peak:
        result = ArrowQuantV2().quantize_diffusion_model(subject.original, out, config, calibration=function)
    seconds = time.perf_counter() - started
    restored, bits = our_weights(out, list(weights))
    return replace(
        cell,
        stored=bits / parameters(weights),
        seconds=seconds,
        peak_mb=peak.megabytes,
        mb=result["model_size_mb"],
        **judge.figures(restored),
    )


def settings_of(cell: Cell, subject: Subject) -> dict[str, Any]:
    """At 8 bits fewer samples do: hardly anything is left to fit."""
    few = {"calibration_samples": SAMPLES_AT_8} if cell.bits == 8 else {}
    grid = GRIDS[cell.bits][cell.setting]
    width = {} if "target_bits" in grid else {"bit_width": cell.bits}
    return width | {"calibration_tokens": 0} | dict(subject.settings) | grid | few


def our_config(model: Opened, weights: Mapping[str, Tensor], settings: dict[str, Any]) -> DiffusionQuantConfig:
    """These weights alone, no bar, and what the subject is calibrated on."""
    given = model.subject.calibration
    data = {"calibration_data": str(given)} if isinstance(given, Path) else {}
    keep = tuple(info.name for info in model.source.tensors if info.name not in weights)
    return DiffusionQuantConfig(min_accuracy=0.0, keep=keep, threads=torch.get_num_threads(), **settings, **data)


def our_weights(out: Path, names: list[str]) -> tuple[dict[str, Tensor], int]:
    """What the file holds, and in how many bits."""
    with open_model(out) as model:
        stored: Any = model.source
        bits = sum(8 * chunk.stored_bytes for name in names for chunk in stored.stored.chunks(name))
        return {name: stored.read(name) for name in names}, bits


def peer_cell(judge: Judge, weights: Mapping[str, Tensor], told: dict[str, Any], folder: Path) -> Cell:
    """What bench/peers/quality.py wrote, judged."""
    file, bits = told.pop("file"), told.pop("stored_bits")
    cell = Cell(**told)
    if file is None:
        return cell
    figures = judge.figures(dict(weights) | load_file(folder / file))
    return replace(cell, stored=bits / parameters(weights), mb=megabytes(judge.model, weights, bits), **figures)


def parameters(weights: Mapping[str, Tensor]) -> int:
    """How many numbers they hold together."""
    return sum(weight.numel() for weight in weights.values())


def judged(
    name: str, peers: Iterable[dict[str, Any]], folder: Path, done: Iterable[Cell], only: Container[str] = ()
) -> Iterator[Cell]:
    """Every cell of one model that is not done yet; `only` are the settings of ours that are looked at."""
    there = {key_of(cell) for cell in done}
    with opened(SUBJECTS[name](folder / name)) as model:
        weights, judge = load_file(folder / name / "weights.safetensors"), Judge(model)
        CONSOLE.print(f"{name}: {judge.samples.count} samples, {judge.samples.origin}; {judge.figures(weights)}")
        for cell in our_cells(name, model.subject, only):
            if key_of(cell) not in there:
                yield our_cell(judge, weights, cell, folder / name / "ours")
        for told in peers:
            if key_of(Cell(**{key: told[key] for key in KEYS})) not in there:
                yield peer_cell(judge, weights, dict(told), folder)


def key_of(cell: Cell) -> tuple[Any, ...]:
    """What tells one cell from another."""
    return tuple(getattr(cell, key) for key in KEYS)


def cells_of(
    names: Iterable[str], peers: Sequence[dict[str, Any]], folder: Path, only: Container[str] = ()
) -> list[Cell]:
    """All cells; each is noted as soon as it is known, so that a run that was killed goes on behind it."""
    notes = folder / "cells.jsonl"
    cells = [Cell(**json.loads(line)) for line in notes.read_text().splitlines()] if notes.exists() else []
    for name in names:
        for cell in judged(name, [told for told in peers if told["model"] == name], folder, cells, only):
            cells.append(cell)
            with notes.open("a") as file:
                file.write(json.dumps(asdict(cell)) + "\n")
            CONSOLE.print(f"{name} INT{cell.bits} {cell.label}: {shown(cell)}, {cell.seconds:.0f} s", highlight=False)
    order = list(SUBJECTS)  # whichever run was first to note a model
    return sorted(cells, key=lambda cell: order.index(cell.model))


def main() -> None:
    """Write, or judge and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("bench/out/quality/run"))
    parser.add_argument("--models", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--threads", type=int, default=THREADS, help="fewer where several runs share a machine")
    parser.add_argument("--write", action="store_true", help="only write the weights, for bench/peers/quality.py")
    parser.add_argument("--peers", type=Path, help="what bench/peers/quality.py measured")
    parser.add_argument("--only", nargs="+", default=[], help="settings of ours, by their names")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--into", type=Path, nargs="+", default=[], help="pages whose tables are made again")
    given = parser.parse_args()
    quiet(given.threads)
    if given.write:
        write_weights(given.models, given.folder)
        return
    peers = json.loads(given.peers.read_text()) if given.peers else []
    cells = cells_of(given.models, peers, given.folder, given.only)
    for bits in dict.fromkeys(cell.bits for cell in cells):
        show(f"INT{bits}", columns_of(bits, cells), rows_of(bits, cells))
    show("At no more stored bits", VERDICT_COLUMNS, verdict_rows(cells))
    if given.json:
        write_json(given.json, {"machine": machine(), "cells": [asdict(cell) for cell in cells]})
    if given.markdown:
        given.markdown.write_text(markdown(cells))
    for page in given.into:
        page.write_text(filled(page.read_text(encoding="utf-8"), cells), encoding="utf-8")


def quiet(threads: int) -> None:
    """No bars, no warnings, so many threads."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


if __name__ == "__main__":
    main()

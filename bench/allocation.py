"""Bits spent by measuring, beside the same size spent in other ways, on the outputs of three real models.

    python bench/allocation.py minilm antiberty terrain [--bits 2.5 3 4.5] [--samples N] [--json FILE]

uniform     one width for all layers, with groups as small as fill the size
in order    two widths: the wider one from the first layer on, as far as the size goes
by name     8 bits for the first and last layers, embeddings and what tells the time, then as "in order"
allocation  --target-bits

Groups have 64 columns, but for "uniform". Every row is calibrated, and no other is larger than the allocation.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.append(str(Path(__file__).parent))

from calibrated import SUBJECTS, Subject, quantized_module

from arrow_quant_v2 import ArrowQuantV2, DiffusionQuantConfig
from arrow_quant_v2.packed import WIDTHS
from arrow_quant_v2.plan import LayerPlan, plan_model

if TYPE_CHECKING:
    from collections.abc import Sequence

    from arrow_quant_v2.packed import TensorInfo

SENSITIVE = re.compile(r"embed|emb_layers|time|label_emb|input_blocks\.0\.|\.out\.|head|decoder|proj_in|final")
GROUPS = (128, 96, 64, 48, 40, 32, 24, 16, 8)


def plans_at(infos: Sequence[TensorInfo], settings: dict[str, Any]) -> list[LayerPlan]:
    """The layers that are quantized, calibrated ones taken as their size is the same."""
    return [plan for plan in plan_model(infos, DiffusionQuantConfig(**settings)) if plan.spec is not None]


def bits_of(infos: Sequence[TensorInfo], settings: dict[str, Any]) -> float:
    """Stored bits per weight."""
    plans = plans_at(infos, settings)
    return 8 * sum(plan.stored_bytes for plan in plans) / sum(plan.tensor.numel for plan in plans)


def uniform(infos: Sequence[TensorInfo], base: dict[str, Any], target: float) -> dict[str, Any]:
    """The width and group size that come nearest to the target from below, or, where all are above, the smallest."""
    every = [{"bit_width": bits, "group_size": group} for bits in WIDTHS for group in GROUPS]
    fitting = [one for one in every if bits_of(infos, base | one) <= target + 0.05]  # a little more room than we have
    return max(fitting, key=lambda one: bits_of(infos, base | one))


def in_order(infos: Sequence[TensorInfo], base: dict[str, Any], target: float, first: dict[str, int]) -> dict[str, Any]:
    """Layers made wider one after the other where the target holds, and from the first on again."""
    widths = {plan.tensor.name: 2 for plan in plans_at(infos, base)} | first
    for wider in (4, 8):
        for name in [name for name in widths if name not in first]:
            changed = widths | {name: wider}
            if bits_of(infos, base | {"layer_bit_widths": changed}) <= target:
                widths = changed
    return base | {"layer_bit_widths": widths}


def by_name(infos: Sequence[TensorInfo], base: dict[str, Any], target: float) -> dict[str, Any]:
    """The rule of thumb; where the size has no room for all whose names match, the first and the last layer alone."""
    names = [plan.tensor.name for plan in plans_at(infos, base)]
    ends = dict.fromkeys((names[0], names[-1]), 8)
    matching = {name: 8 for name in names if SENSITIVE.search(name)} | ends
    for first in (matching, ends):
        settings = base | {"layer_bit_widths": dict.fromkeys(names, 2) | first}
        if bits_of(infos, settings) <= target:
            return in_order(infos, base, target, first)
    return in_order(infos, base, target, {})


def variants(infos: Sequence[TensorInfo], settings: dict[str, Any], target: float) -> dict[str, dict[str, Any]]:
    """The settings of each row."""
    base = {key: value for key, value in settings.items() if key == "keep"} | {"bit_width": 2, "group_size": 64}
    return {
        "uniform": uniform(infos, base, target),
        "in order": in_order(infos, base, target, {}),
        "by name": by_name(infos, base, target),
        "allocation": {"target_bits": target, "group_size": 64},
    }


def tensors_of(subject: Subject) -> list[TensorInfo]:
    """Names and shapes."""
    from arrow_quant_v2.packed import TensorInfo  # noqa: PLC0415 - a record for live modules alone
    from arrow_quant_v2.sources.folder import open_model  # noqa: PLC0415

    if isinstance(subject.model, torch.nn.Module):
        tensors = subject.model.state_dict().items()
        return [TensorInfo(name=n, shape=tuple(t.shape), dtype=str(t.dtype).removeprefix("torch.")) for n, t in tensors]
    with open_model(subject.model) as model:
        return list(model.source.tensors)


def row(subject: Subject, asked: dict[str, Any], work: Path) -> dict[str, Any]:
    """Quantize once, and measure."""
    out = work / "out"
    shutil.rmtree(out, ignore_errors=True)
    started = time.perf_counter()
    config = DiffusionQuantConfig(min_accuracy=0.0, method="gptq", **(subject.settings | asked))
    result = ArrowQuantV2().quantize_diffusion_model(subject.model, out, config, calibration=subject.calibration)
    seconds = time.perf_counter() - started
    figures = subject.measure(quantized_module(subject, out))
    return {"bits_per_weight": result["bits_per_weight"], "seconds": seconds, **figures}


def main() -> None:
    """Measure and print, model by model and size by size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", choices=[*SUBJECTS, []], default=[])
    parser.add_argument("--bits", type=float, nargs="*", default=[2.5, 3.0, 4.5])
    parser.add_argument("--samples", type=int)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    found: dict[str, list[dict[str, Any]]] = {}
    for name in given.models or SUBJECTS:
        make, samples = SUBJECTS[name]
        found[name] = []
        with tempfile.TemporaryDirectory() as work:
            subject = make(Path(work), given.samples or samples)
            infos = tensors_of(subject)
            for target in given.bits:
                for variant, asked in variants(infos, subject.settings, target).items():
                    if not given.only or variant in given.only:
                        figures = row(subject, asked, Path(work))
                        found[name].append({"target": target, "variant": variant, **figures})
                        Console(width=160).print(found[name][-1])
        show(name, found[name])
    if given.json:
        given.json.write_text(json.dumps(found, indent=2))


def show(name: str, rows: Sequence[dict[str, Any]]) -> None:
    """One table."""
    table = Table(title=name)
    for column in rows[0]:
        table.add_column(column, justify="left" if column == "variant" else "right")
    for one in rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in one.values()))
    Console(width=160).print(table)


if __name__ == "__main__":
    main()

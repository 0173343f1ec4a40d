"""Loading a quantized model, checked and ready to use, beside reading the same bytes with plain readinto."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

from arrow_quant_v2.packed import Layout, PackedTensor
from arrow_quant_v2.sources.parquet import ParquetSource
from arrow_quant_v2.store import LayerRecord, StoredModel, write_part

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BAR = 1.3
BITS = 4
SHAPES = [(18944, 3584), (3584, 18944), (3584, 3584)] * 8


def layers() -> Iterator[LayerRecord]:
    """Random codes in Dream-7B's shapes."""
    random = np.random.default_rng(0)
    for number, shape in enumerate(SHAPES):
        layout = Layout(shape=shape, bits=BITS, quant_axis=1, group_size=64)
        payload = PackedTensor(
            name=f"layers.{number}.weight",
            dtype="bfloat16",
            layout=layout,
            codes=random.integers(0, 256, (layout.rows, layout.row_bytes), np.uint8),
            scales=random.integers(1, 256, (layout.rows, layout.groups), np.uint8),
            zero_points=random.integers(0, 256, (layout.rows, layout.groups), np.uint8),
            row_scales=np.full(layout.rows, 0x3C00, np.uint16),
        )
        bits = 8 * payload.nbytes / payload.layout.columns / payload.layout.rows
        yield LayerRecord(payload=payload, bits_per_weight=bits, source_checksum=0, decision="made for a bench")


def write_model(folder: Path) -> int:
    """One file per layer, as quantize writes large layers; bytes of all files."""
    for number, record in enumerate(layers()):
        write_part(folder / f"weights-{number:05d}.parquet", [record], {"configuration": "{}", "source_hash": ""})
    return sum(path.stat().st_size for path in folder.iterdir())


def read_plainly(folder: Path) -> None:
    """Read every file into memory of its own."""
    for path in sorted(folder.iterdir()):
        with path.open("rb", buffering=0) as file:
            file.readinto(np.empty(path.stat().st_size, np.uint8).data)


def load(folder: Path) -> None:
    """Open, map and check every layer: codes and parameters are ready for a kernel."""
    with StoredModel(folder) as model:
        model.read_all(threads=2)


def load_first(folder: Path) -> None:
    """One layer as weights, without touching the others."""
    source = ParquetSource(folder)
    source.read("layers.2.weight")
    source.close()


def seconds(task: Callable[[Path], None], folder: Path) -> float:
    """Time of one call."""
    started = time.perf_counter()
    task(folder)
    return time.perf_counter() - started


def forget(folder: Path) -> None:
    """Let the page cache go."""
    os.sync()
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measure(folder: Path, size: int, repeats: int) -> list[dict[str, Any]]:
    """Reading and loading in turn, so that both meet the same noise; ratios pair by pair."""
    rows = []
    for cache in ("warm", "cold"):
        pairs = []
        for _ in range(repeats):
            times = []
            for task in (read_plainly, load):
                if cache == "cold":
                    forget(folder)
                times.append(seconds(task, folder))
            pairs.append(times)
        ratio = statistics.median(loaded / read for read, loaded in pairs)
        read, loaded = (statistics.median(column) for column in zip(*pairs, strict=True))
        rows.append({"cache": cache, "bytes": size, "read_s": read, "load_s": loaded, "ratio": ratio, "bar": BAR})
    return rows


def main() -> None:
    """Make a model in a temporary folder, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as name:
        folder = Path(name)
        size = write_model(folder)
        rows = measure(folder, size, given.repeats)
        one = statistics.median(seconds(load_first, folder) for _ in range(given.repeats))
    table = Table(title=f"{size / 1e9:.2f} GB of INT{BITS}, group 64, Dream-7B shapes")
    for column in ("page cache", "readinto s", "load s", "ratio", "bar", ""):
        table.add_column(column)
    for row in rows:
        figures = (f"{row[key]:.3f}" for key in ("read_s", "load_s", "ratio"))
        table.add_row(row["cache"], *figures, f"<= {BAR}", "pass" if row["ratio"] <= BAR else "MISS")
    Console(width=100).print(table)
    sys.stdout.write(f"one layer of 12.8 M weights, opened, checked and dequantized: {one:.3f} s\n")
    if given.json:
        given.json.write_text(json.dumps({"rows": rows, "one_layer_s": one}, indent=2))


if __name__ == "__main__":
    main()

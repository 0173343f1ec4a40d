"""Loading a stored model against reading the same bytes: `python tests/store/measure_load.py [GIGABYTES]`.

Writes a model of Dream-7B's layer shapes in INT4, then prints the time to have every layer checked and in memory
over the time to `readinto` the same files, best of five, page cache warm.
"""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from stored_examples import packed, record

from arrow_quant_v2.store import StoredModel, write_part

SHAPES = [(3584, 3584)] * 2 + [(512, 3584)] * 2 + [(18944, 3584)] * 3


def best(work, repeats: int = 5) -> float:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


def read_bytes(folder: Path, buffer: np.ndarray) -> None:
    for path in sorted(folder.glob("*.parquet")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer.data):
                pass


def main(gigabytes: float) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, size = Path(name), 0
        while size < gigabytes * 1e9:
            block = len(list(folder.iterdir()))
            layers = (packed(f"{block}.{i}", shape, group_size=128) for i, shape in enumerate(SHAPES))
            write_part(folder / f"{block:03}.parquet", map(record, layers), {})
            size += (folder / f"{block:03}.parquet").stat().st_size
        reading = best(lambda: read_bytes(folder, np.empty(2**30, np.uint8)))
        print(f"{size / 1e9:.2f} GB, readinto: {reading:.3f} s, {size / reading / 1e9:.2f} GB/s")
        for threads in (1, 2):
            loading = best(lambda threads=threads: StoredModel(folder).read_all(threads))
            print(f"load, {threads} threads: {loading:.3f} s, ratio {loading / reading:.2f}")
        print(f"open alone: {best(lambda: StoredModel(folder)) * 1e3:.1f} ms")


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 1.0)

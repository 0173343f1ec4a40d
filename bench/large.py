"""A model of 15 GB: peak memory and time of the whole command, beside reading the source and writing the result."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from dream import CONFIG, LAYERS
from rich.console import Console
from rich.table import Table

LARGEST_TENSOR = 152064 * 3584 * 2
BUFFER = 8 * 2**20
MEMORY_BAR = 3 * LARGEST_TENSOR + 500 * 10**6
TIME_BAR = 1.5


def made_elsewhere(folder: Path, layers: int, config: dict[str, object] = CONFIG) -> int:
    """Write the model in another process: the memory of this one counts in what its children seem to need."""
    written = f"write_model(Path({str(folder)!r}), {layers}, {config!r})"
    code = f"from dream import write_model; from pathlib import Path; print({written})"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    return int(subprocess.check_output([sys.executable, "-c", code], env=environment))


def forget(folder: Path) -> None:
    """Let the page cache go, so that every measurement reads from the disk."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def seconds_to_read(folder: Path) -> float:
    """Read every weight file once, in pieces, with plain readinto."""
    buffer = bytearray(BUFFER)
    started = time.perf_counter()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - started


def seconds_to_write(target: Path, count: int) -> float:
    """Write as many bytes as the result has, and wait for the disk."""
    buffer = os.urandom(BUFFER)
    started = time.perf_counter()
    with target.open("wb", buffering=0) as file:
        for start in range(0, count, BUFFER):
            file.write(buffer[: min(BUFFER, count - start)])
        os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    target.unlink()
    return seconds


def quantize(source: Path, out: Path, options: list[str]) -> tuple[float, int]:
    """Run the command in a process of its own: seconds, and the most memory it had."""
    command = [sys.executable, "-m", "arrow_quant_v2", "quantize", str(source), str(out), "--quiet", *options]
    started = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
    return seconds, usage.ru_maxrss * 1024


def one_run(work: Path, options: list[str]) -> dict[str, Any]:
    """One configuration, with its own reading and writing beside it."""
    source, out = work / "dream", work / "out"
    shutil.rmtree(out, ignore_errors=True)
    forget(source)
    read = seconds_to_read(source)
    forget(source)
    seconds, peak = quantize(source, out, options)
    stored = sum(path.stat().st_size for path in out.rglob("*.parquet"))
    write = seconds_to_write(work / "written", stored)
    return {
        "options": " ".join(options),
        "seconds": seconds,
        "read_seconds": read,
        "write_seconds": write,
        "ratio": seconds / (read + write),
        "time_bar": TIME_BAR,
        "peak_bytes": peak,
        "memory_bar": MEMORY_BAR,
        "stored_bytes": stored,
    }


def median_run(work: Path, options: list[str], rounds: int) -> dict[str, Any]:
    """The round of the median ratio: a disk that others use too reads at twice the speed a minute later."""
    return sorted((one_run(work, options) for _ in range(rounds)), key=lambda run: run["ratio"])[rounds // 2]


def show(runs: list[dict[str, Any]], source_bytes: int) -> None:
    """Print the table."""
    table = Table(title=f"Dream-7B shapes, {source_bytes / 1e9:.2f} GB in bfloat16; largest tensor 1.09 GB")
    for column in ("options", "result GB", "s", "read s", "write s", "ratio", "bar", "peak MB", "bar MB"):
        table.add_column(column)
    for run in runs:
        figures = (run["stored_bytes"] / 1e9, run["seconds"], run["read_seconds"], run["write_seconds"], run["ratio"])
        verdicts = (f"<= {TIME_BAR}", f"{run['peak_bytes'] / 1e6:.0f}", f"<= {MEMORY_BAR / 1e6:.0f}")
        table.add_row(run["options"], *(f"{figure:.2f}" for figure in figures), *verdicts)
    Console(width=120).print(table)


def main() -> None:
    """Write the model, run, report, delete."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("bench/out/large"), help="needs 20 GB; deleted afterwards")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    runs = []
    shutil.rmtree(given.folder, ignore_errors=True)
    try:
        total = made_elsewhere(given.folder / "dream", given.layers)
        for options in (
            ["--profile", "edge", "--method", "rtn"],
            ["--profile", "edge"],
            ["--profile", "local"],
        ):
            runs.append(median_run(given.folder, options, given.rounds))
            show(runs[-1:], total)
    finally:
        shutil.rmtree(given.folder, ignore_errors=True)
    show(runs, total)
    if given.json:
        given.json.write_text(json.dumps({"source_bytes": total, "runs": runs}, indent=2))


if __name__ == "__main__":
    main()

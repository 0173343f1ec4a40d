"""The table of one step, of loading and of memory, ours beside peers', and the part of a page that holds it.

    python bench/speed_table.py bench/out/speed.json --into docs/benchmarks.md

Measures nothing: bench/speed.py wrote the figures, those of peers among them. Its own --into does the same.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quality_table import SHORT, figure, markdown_table

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

COLUMNS = ("{}, one step", "ms", "of float32's speed", "error", "loaded in s", "MB until the first output", "file MB")
START, END = "<!-- speed -->\n", "<!-- end of speed -->"
ABOUT = """## One step beside peers

`make bench`, {threads} threads of {cpu}, PyTorch {torch}. Steps were taken in turns with the original's,
those of a peer in a process of its own, from which its ratio to float32 is. Error is the variance of what
differs from float32, as a part of its variance, and ours here of weights that were rounded without
calibration: how close models can be is the table further below. Loading and memory are those of another process, which
has imported its libraries, and does one step: from the original's files, from ours by `load`, which checks
them, and from what `torch.save` wrote of a peer's model, since no two have a format in common. Where a peer has no
figures there stands its own error.
"""


def rows_of(model: str, figures: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """The original and ours, then every peer."""
    fp32 = figures[model]["original float32"]["seconds"]
    for label, found in figures[model].items():
        yield row(label if label.startswith("original") else f"ArrowQuant, {label}", found, fp32)
    for found in figures["peers"]:
        if found["model"] == model:
            yield row(f"{found['peer']}, INT{found['bits']}, {found['dtype']}", found, found.get("fp32_seconds", 0.0))


def row(label: str, found: Mapping[str, Any], fp32: float) -> tuple[str, ...]:
    """One candidate, beside float32's seconds."""
    if found.get("failure"):
        return (label, short(found["failure"]), *[""] * (len(COLUMNS) - 2))
    step = (f"{1000 * found['seconds']:.1f}", f"{fp32 / found['seconds']:.2f}", figure(found["error"]))
    return (label, *step, *beginning(found), f"{found['file_mb']:.1f}" if "file_mb" in found else "")


def beginning(found: Mapping[str, Any]) -> tuple[str, str]:
    """Seconds to load and the memory until the first output."""
    if "load_seconds" in found:
        return f"{found['load_seconds']:.2f}", f"{found['peak_mb']:.0f}"
    return short(found.get("load_failure", "")), ""


def short(words: str) -> str:
    """One line of an error, as long as a cell takes."""
    return " ".join(words.split())[:SHORT]


def tables(figures: Mapping[str, Any]) -> str:
    """How it was measured, and one table for each model."""
    models = [name for name in figures if name not in {"machine", "peers"}]
    parts = [markdown_table((COLUMNS[0].format(name), *COLUMNS[1:]), rows_of(name, figures)) for name in models]
    return "\n\n".join([ABOUT.format(**figures["machine"]).rstrip(), *parts])


def filled(text: str, figures: Mapping[str, Any]) -> str:
    """A page with these tables between its marks; one without marks stays as it is."""
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    return f"{before}{start}\n{tables(figures)}\n\n{end}{after}" if end else text


def main(words: Sequence[str] | None = None) -> None:
    """Read the figures and write the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", type=Path, help="what bench/speed.py --json wrote")
    parser.add_argument("--into", type=Path, nargs="+", required=True)
    given = parser.parse_args(words)
    figures = json.loads(given.figures.read_text())
    for page in given.into:
        page.write_text(filled(page.read_text(encoding="utf-8"), figures), encoding="utf-8")


if __name__ == "__main__":
    main()

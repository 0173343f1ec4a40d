"""Charts of the table of quality beside peers: output error by stored bits, one panel a model, readable light and dark.

    .venv-peers/bin/python bench/charts.py bench/out/quality/quality.json --out docs/charts/quality.svg

Runs in the peers' environment, which has matplotlib.
"""

from __future__ import annotations

import argparse
import io
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl

mpl.use("svg")

from matplotlib import pyplot as plt
from matplotlib.ticker import FixedLocator, ScalarFormatter

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OURS = "ArrowQuant"
INK = "#7d8590"  # in between white and black paper
COLOURS = (
    "#e07b39",
    "#3fa34d",
    "#b05cc6",
    "#d64f6b",
    "#2ba5a5",
    "#a58a2c",
    "#8d6e63",
    "#6a7fdb",
    "#c0a0a0",
    "#5e8c61",
    "#9c4dcc",
)
MARKS = "osD^vPX*<>hd"
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "quality",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def name_of(peer: str) -> str:
    """A peer without its version."""
    words = peer.split()
    return " ".join(words[:-1]) if words[-1][0].isdigit() else peer


def panel(axes: Axes, model: str, cells: list[dict[str, Any]], peers: list[str]) -> None:
    """One model: every cell of a peer as a mark, the best of ours as a line."""
    for peer in peers:
        points = [(c["stored"], c["error"]) for c in cells if name_of(c["peer"]) == peer]
        number = peers.index(peer)
        look = {"color": COLOURS[number % len(COLOURS)], "marker": MARKS[number % len(MARKS)]}
        axes.plot(*zip(*points, strict=True), ls="", ms=4.5, mew=0, **look) if points else None
    points = sorted((c["stored"], c["error"]) for c in cells if c["peer"] == OURS)
    if points:
        axes.plot(*zip(*points, strict=True), color="#2f81f7", marker="o", ms=4.5, lw=1.8, zorder=5)
    axes.set_title(model, fontsize=10)
    axes.set_yscale("log")
    axes.set_xscale("log", base=2)
    axes.set_xlim(1.9, 12)
    axes.xaxis.set_major_locator(FixedLocator([2, 3, 4, 6, 8, 12]))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.minorticks_off()  # each is a kilobyte
    axes.grid(color=INK, alpha=0.25, lw=0.5)


def draw(cells: list[dict[str, Any]], out: Path) -> None:
    """All models."""
    done = [cell for cell in cells if cell["error"] and not cell["refused"] and 1.9 < cell["stored"] < 12]
    models = list(dict.fromkeys(cell["model"] for cell in done))
    peers = [peer for peer in dict.fromkeys(name_of(cell["peer"]) for cell in done) if peer != OURS]
    rows = -(-(len(models) + 1) // 4)
    figure, grid = plt.subplots(rows, 4, figsize=(12, 3 * rows), constrained_layout=True, squeeze=False)
    for axes, model in zip(grid.flat, models, strict=False):
        panel(axes, model, [cell for cell in done if cell["model"] == model], peers)
    for axes in grid.flat[len(models) :]:
        axes.axis("off")
    legend(grid.flat[len(models)], peers)
    figure.supxlabel("stored bits a weight", fontsize=9)
    figure.supylabel("error of outputs, |a - b|² / |a|²", fontsize=9)
    out.parent.mkdir(parents=True, exist_ok=True)
    written = io.StringIO()
    figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
    out.write_text(small(written.getvalue()))


def small(svg: str) -> str:
    """Tenths of a point are enough, names of parts are used nowhere, and nothing is indented."""
    rounded = re.sub(r"(\d\.\d)\d+", r"\1", re.sub(r' id="(?![mp])\w+"', "", svg))
    rounded = re.sub(r"'[\w ]+', | transform=\"rotate\(-0 [\d. ]+\)\"", "", rounded)  # typefaces before sans-serif
    rounded = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", rounded, flags=re.DOTALL)
    return "\n".join(line.strip() for line in rounded.splitlines() if line.strip()) + "\n"


def legend(axes: Axes, peers: list[str]) -> None:
    """Where a panel is left."""
    lines = [axes.plot([], [], color="#2f81f7", marker="o", ms=4.5, lw=1.8, label=OURS)[0]]
    for number, peer in enumerate(peers):
        look = {"color": COLOURS[number % len(COLOURS)], "marker": MARKS[number % len(MARKS)]}
        lines += axes.plot([], [], ls="", ms=4.5, mew=0, label=peer, **look)
    axes.legend(handles=lines, loc="center", frameon=False, fontsize=9)


def main() -> None:
    """Read, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("figures", type=Path, help="what bench/quality.py --json wrote")
    parser.add_argument("--out", type=Path, default=Path("docs/charts/quality.svg"))
    given = parser.parse_args()
    mpl.rcParams.update(STYLE)
    draw(json.loads(given.figures.read_text())["cells"], given.out)


if __name__ == "__main__":
    main()

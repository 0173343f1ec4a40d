"""Cells of the table of quality beside peers: who is closer at no more stored bits, and how that is shown.

Measures nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

OURS = "ArrowQuant"
WIDTHS = (2, 4, 8)
SHORT = 90  # characters of an error in a cell
SAME = "the same"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One setting of one peer, or of ours, at one width on one model.

    stored   bits per weight as the format stores them; weights that were refused count 16
    error    |a - b|^2 / |a|^2 of the model's outputs; cosine their mean cosine; figure: what the model is known by
    seconds  to quantize; peak_mb: beyond what the process held before; mb: all weight files
    refused  weights that the peer could not do, which stayed as they were, and `failure` in its own words why;
             without an error nothing could be done at all
    """

    model: str
    peer: str
    setting: str
    bits: int
    stored: float = 0.0
    error: float | None = None
    cosine: float | None = None
    figure: float | None = None
    seconds: float = 0.0
    peak_mb: float = 0.0
    mb: float = 0.0
    refused: int = 0
    failure: str | None = None

    @property
    def done(self) -> bool:
        """Whether there is anything to compare."""
        return self.error is not None

    @property
    def label(self) -> str:
        """The row that the cell stands in."""
        return f"{self.peer}, {self.setting}" if self.setting else self.peer


def rival(cell: Cell, cells: Iterable[Cell]) -> Cell | None:
    """The closest of ours on this model with no more stored bits, at whatever width; None: nothing is that small."""
    small = [one for one in cells if one.peer == OURS and one.model == cell.model and one.stored <= cell.stored]
    return min((one for one in small if one.done), key=error_of, default=None)


def error_of(cell: Cell) -> float:
    """The error of a cell that has one."""
    return float("inf") if cell.error is None else cell.error


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One model at one width: how many cells of peers are farther than ours, and those that are not.

    smaller  peers' cells with fewer stored bits than any of ours has
    closest  the closest peer that did all weights in less than twice the width; ours: the closest with no more bits
    """

    model: str
    bits: int
    beaten: int
    winners: tuple[Cell, ...]
    smaller: tuple[Cell, ...]
    closest: Cell | None
    ours: Cell | None


def verdict(model: str, bits: int, cells: Sequence[Cell]) -> Verdict:
    """Every peer's cell beside the closest of ours with no more stored bits."""
    peers = [one for one in cells if (one.model, one.bits) == (model, bits) and one.peer != OURS and one.done]
    beside = [(one, rival(one, cells)) for one in peers]
    winners = tuple(one for one, own in beside if own is not None and error_of(own) >= error_of(one))
    smaller = tuple(one for one, own in beside if own is None)
    fair = [one for one in peers if not one.refused and one.stored < 2 * bits]
    closest = min(fair, key=error_of, default=None)
    return Verdict(
        model=model,
        bits=bits,
        beaten=len(peers) - len(winners) - len(smaller),
        winners=winners,
        smaller=smaller,
        closest=closest,
        ours=None if closest is None else rival(closest, cells),
    )


def verdicts(cells: Sequence[Cell]) -> list[Verdict]:
    """Model by model, width by width."""
    models = dict.fromkeys(one.model for one in cells)
    widths = dict.fromkeys(one.bits for one in cells)
    return [verdict(model, bits, cells) for model in models for bits in WIDTHS if bits in widths]


# Words


def shown(cell: Cell | None) -> str:
    """Error and stored bits."""
    if cell is None:
        return ""
    if not cell.done:
        return (cell.failure or "")[:SHORT]
    left = f", {cell.refused} left" if cell.refused else ""
    return f"{figure(error_of(cell))} ({cell.stored:.2f}{left})"


def figure(value: float) -> str:
    """Two digits that count: 0.97, .012, 3e-5."""
    text = f"{value:.2g}"
    return text.removeprefix("0") if text.startswith("0.") else text


def words(one: Verdict) -> str:
    """What a verdict says."""
    total = one.beaten + len(one.winners) + len(one.smaller)
    if not total:
        return "no peer does it"
    said = [f"closer than {one.beaten} of {total}"]
    if one.winners:
        said.append("not than " + ", ".join(f"{c.label} {shown(c)}" for c in one.winners))
    if one.smaller:
        said.append("nothing as small as " + ", ".join(f"{c.label} {shown(c)}" for c in one.smaller))
    return "; ".join(said)


def rows_of(bits: int, cells: Sequence[Cell]) -> list[tuple[str, ...]]:
    """One row for each setting at this width: a cell for each model, then seconds, peak memory and files of all."""
    models = list(dict.fromkeys(one.model for one in cells))
    mine = [one for one in cells if one.bits == bits]
    return [row(label, models, [one for one in mine if one.label == label]) for label in labels(mine)]


def labels(cells: Iterable[Cell]) -> list[str]:
    """Ours first, then peers in the order they were measured in."""
    return list(dict.fromkeys(one.label for one in sorted(cells, key=lambda one: one.peer != OURS)))


def row(label: str, models: Sequence[str], cells: Sequence[Cell]) -> tuple[str, ...]:
    """One setting on every model."""
    found = {one.model: one for one in cells}
    done = [one for one in cells if one.done]
    sums = ("", "", "")
    if done:
        peak = max(one.peak_mb for one in done)
        sums = (f"{sum(one.seconds for one in done):.0f}", f"{peak:.0f}", f"{sum(one.mb for one in done):.1f}")
    return (label, *once([shown(found.get(model)) for model in models]), *sums)


def once(texts: Sequence[str]) -> list[str]:
    """The same text twice in a row is an error that need not be read twice."""
    return [SAME if text and text == before else text for text, before in zip(texts, ["", *texts], strict=False)]


def columns_of(bits: int, cells: Sequence[Cell]) -> tuple[str, ...]:
    """The heads of `rows_of`."""
    models = dict.fromkeys(one.model for one in cells)
    return (f"INT{bits}: error (bits)", *models, "s", "peak MB", "files MB")


def verdict_rows(cells: Sequence[Cell]) -> list[tuple[str, ...]]:
    """Model, width, the closest peer, the closest of ours with no more bits, and all others in words."""
    return [
        (
            f"{one.model} INT{one.bits}",
            shown(one.ours) + (f" {one.ours.setting}" if one.ours else ""),
            f"{shown(one.closest)} {one.closest.label}" if one.closest else "",
            words(one),
        )
        for one in verdicts(cells)
    ]


VERDICT_COLUMNS = ("model", "ours, error (bits)", "closest peer", "at no more stored bits ours is")


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; bars inside cells are told from its own."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(
        "| " + " | ".join(one.replace("|", "\\|").replace("\n", " ") for one in line) + " |" for line in lines
    )


def short_markdown(cells: Sequence[Cell]) -> str:
    """One row for each model, for each width ours beside the closest peer."""
    found = {(one.model, one.bits): one for one in verdicts(cells)}
    models = dict.fromkeys(one.model for one in cells)
    rows = [(model, *(pair(found.get((model, bits))) for bits in WIDTHS)) for model in models]
    return markdown_table(("output error (bits)", *(f"INT{bits}" for bits in WIDTHS)), rows)


def pair(one: Verdict | None) -> str:
    """Ours beside the closest peer, the closer of both in bold."""
    if one is None or one.closest is None:
        return ""
    won = one.ours is not None and error_of(one.ours) < error_of(one.closest)
    ours, theirs = shown(one.ours) or "none", shown(one.closest)
    return f"{bold(ours, on=won)} / {bold(theirs, on=not won)} {one.closest.peer}"


def bold(text: str, *, on: bool) -> str:
    """In bold or not."""
    return f"**{text}**" if on else text


def long_markdown(cells: Sequence[Cell]) -> str:
    """The verdicts, then every cell, width by width."""
    widths = [bits for bits in WIDTHS if any(one.bits == bits for one in cells)]
    parts = [markdown_table(VERDICT_COLUMNS, verdict_rows(cells))]
    return "\n\n".join([*parts, *(markdown_table(columns_of(bits, cells), rows_of(bits, cells)) for bits in widths)])


def markdown(cells: Sequence[Cell]) -> str:
    """Everything."""
    return f"{short_markdown(cells)}\n\n{long_markdown(cells)}\n"


PLACES = {"quality, in short": short_markdown, "quality": long_markdown}


def filled(text: str, cells: Sequence[Cell]) -> str:
    """A page whose tables stand between `<!-- NAME -->` and `<!-- end of NAME -->`, with those of these cells."""
    for name, made in PLACES.items():
        before, start, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- end of {name} -->")
        if end:
            text = f"{before}{start}\n{made(cells)}\n\n{end}{after}"
    return text

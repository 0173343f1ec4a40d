"""Tables of text that read well at any width, and whole in a pipe; knows nothing of models."""

from __future__ import annotations

import shutil
import sys
import textwrap
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

GAP = "  "


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print the rows under a bold header; a terminal's width is kept, a pipe gets one line per row."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    header, *body = (list(table_row) for table_row in table_lines(columns, rows, width))
    for line in header:
        typer.secho(line, bold=True)
    for line in (line for table_row in body for line in table_row):
        typer.echo(line)


def table_lines(
    columns: Sequence[str], rows: Sequence[Sequence[str]], width: int | None = None
) -> Iterator[Iterator[str]]:
    """The lines of the header, then those of each row.

    A row is one line where all rows fit into `width`; otherwise its first cell has a line of its own, and the
    last cell is wrapped.
    """
    cells = [[_printable(cell) for cell in row] for row in (columns, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    if width is None or sum(widths) + len(GAP) * (len(widths) - 1) <= width:
        yield from (iter([_joined(row, widths)]) for row in cells)
    else:
        yield from (_stacked(row, widths, width) for row in cells)


def _stacked(row: Sequence[str], widths: Sequence[int], width: int) -> Iterator[str]:
    yield row[0]
    hanging = sum(widths[1:-1]) + len(GAP) * (len(widths) - 1)
    indent = " " * (hanging if hanging < width // 2 else 2 * len(GAP))
    line = _joined(row[1:], widths[1:])
    yield from textwrap.wrap(line, width, initial_indent=GAP, subsequent_indent=indent)


def _joined(row: Sequence[str], widths: Sequence[int]) -> str:
    return GAP.join(cell.ljust(size) for cell, size in zip(row, widths, strict=True)).rstrip()


def _printable(cell: str) -> str:
    """Names come from files of others: no control sequence of theirs reaches the terminal."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in cell)

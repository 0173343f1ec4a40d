"""The rows of a calibration file: JSONL, Parquet or plain text. Knows nothing of models, and never unpickles.

The first rows count: reading stops when there are enough of them, so a file may be larger than memory and must not be
sorted. Bad rows are left out and named, and refused where they are more than one in ten.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from arrow_quant_v2.errors import ConfigurationError, SourceError
from arrow_quant_v2.sources.files import parse_object

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Row = dict[str, Any]
    Rows = Iterator[tuple[str, Callable[[], Row]]]

Made = TypeVar("Made")

KEYS = ("text", "prompt", "input_ids", "tokens", "data", "timestep", "shape", "inputs")
LONGEST_LINE = 64 << 20
BAD_SHARE = 0.1
NAMED = 3  # bad rows in a message
BATCH = 64  # rows of a Parquet file in memory at once
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, kw_only=True)
class Usable(Generic[Made]):
    """What became of the rows: those that could be used, and notes on those that could not."""

    made: tuple[Made, ...]
    notes: tuple[str, ...]


def read_rows(path: Path, count: int, make: Callable[[Row, str], Made]) -> Usable[Made]:
    """What `make` makes of the first `count` good rows; it is told the row and its place, and refuses by SourceError.

    Raises:
        ConfigurationError: the file cannot be read or has an unknown ending; no row is good, or over 10% are bad.
    """
    good: list[Made] = []
    bad: list[str] = []
    for where, parse in _rows(path):
        try:
            good.append(make(parse(), where))
        except SourceError as error:
            bad.append(str(error))
        if len(good) == count or len(bad) > BAD_SHARE * (count + len(bad)):
            break
    seen = len(good) + len(bad)
    if not seen:
        raise ConfigurationError(f"{path}: holds no rows; one row for each text or input is needed")
    if not good or len(bad) > BAD_SHARE * seen:
        raise ConfigurationError(f"{path}: {len(bad)} of {seen} rows cannot be used: {_first(bad)}")
    notes = (f"{len(bad)} of {seen} rows were left out: {_first(bad)}",) if bad else ()
    return Usable(made=tuple(good), notes=notes)


def _first(bad: list[str]) -> str:
    return "; ".join(bad[:NAMED]) + (f"; and {len(bad) - NAMED} more" if len(bad) > NAMED else "")


def _rows(path: Path) -> Rows:
    """Each row's place in words, and a function that reads it."""
    if path.suffix == ".parquet":
        return _parquet_rows(path)
    parse = _json_row if path.suffix == ".jsonl" else _text_row
    return ((where, partial(parse, line, where)) for where, line in _lines(path))


def _json_row(line: bytes, where: str) -> Row:
    return parse_object(line, where)


def _text_row(line: bytes, where: str) -> Row:
    try:
        return {"text": line.decode()}
    except UnicodeDecodeError as error:
        raise SourceError(f"{where}: is not UTF-8 ({error.reason} at byte {error.start})") from error


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """The lines that are not blank, with their numbers from 1."""
    number = 0
    try:
        with path.open("rb") as file:
            while line := file.readline(LONGEST_LINE + 1):
                number += 1
                if len(line) > LONGEST_LINE:
                    raise ConfigurationError(f"{path} line {number}: is longer than {LONGEST_LINE:,} bytes; split it")
                text = line.removeprefix(BOM).strip() if number == 1 else line.strip()
                if text:
                    yield f"{path.name} line {number}", text
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read: {error.strerror or error}") from error


def _parquet_rows(path: Path) -> Rows:
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            columns = names if "data" in names else [name for name in names if name in KEYS]
            if not columns:
                found = ", ".join(names)
                raise ConfigurationError(f"{path}: has the columns {found}; one of {', '.join(KEYS[:5])} is needed")
            number = 0
            for batch in file.iter_batches(batch_size=BATCH, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    present = {key: entry for key, entry in row.items() if entry is not None}
                    yield f"{path.name} row {number}", partial(dict, present)
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:  # the last two: text that is not UTF-8 ...
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigurationError(f"{path}: cannot be read as Parquet: {reason}") from error

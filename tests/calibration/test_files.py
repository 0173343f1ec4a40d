"""Rows of calibration files: what is read, what is left out, and every way in which a file can be bad."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from arrow_quant_v2.calibration import files
from arrow_quant_v2.calibration.files import read_rows
from arrow_quant_v2.errors import ConfigurationError, SourceError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

GOOD = {"text": "a white whale"}


def as_it_is(row: dict[str, Any], _: str) -> dict[str, Any]:
    return row


def only_text(row: dict[str, Any], where: str) -> str:
    if "text" not in row:
        raise SourceError(f"{where}: holds no text")
    return str(row["text"])


def test_a_line_of_jsonl_is_a_row(jsonl: Callable[..., Path]) -> None:
    assert read_rows(jsonl(GOOD, {"tokens": [1, 2]}), 9, as_it_is).made == (GOOD, {"tokens": [1, 2]})


def test_blank_lines_are_no_rows(jsonl: Callable[..., Path]) -> None:
    usable = read_rows(jsonl("", GOOD, "  ", "", GOOD), 9, as_it_is)
    assert (usable.made, usable.notes) == ((GOOD, GOOD), ())


def test_a_line_of_plain_text_is_a_row(tmp_path: Path) -> None:
    path = tmp_path / "whale.txt"
    path.write_bytes("\ufeffCall me Ishmael.\r\n\n  Some years ago\N{EM DASH}\n".encode())
    made = read_rows(path, 9, as_it_is).made
    assert made == ({"text": "Call me Ishmael."}, {"text": "Some years ago\N{EM DASH}"})


def test_a_row_of_parquet_is_a_row_without_its_nulls(tmp_path: Path) -> None:
    table = pa.table({"text": ["a", None, "c"], "tokens": [None, [5, 6], None], "label": [1, 2, 3]})
    pq.write_table(table, tmp_path / "rows.parquet")
    made = read_rows(tmp_path / "rows.parquet", 9, as_it_is).made
    assert made == ({"text": "a"}, {"tokens": [5, 6]}, {"text": "c"})


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_no_more_is_read_than_is_needed(ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / f"rows.{ending}"
    if ending == "jsonl":
        path.write_text('{"text": "a"}\n' * 4 + "broken\n" * 100)
    else:
        pq.write_table(pa.table({"text": ["a"] * 4 + [""] * 100_000}), path, row_group_size=4)
        monkeypatch.setattr(files, "BATCH", 4)
    seen: list[str] = []

    def make(row: dict[str, Any], where: str) -> str:
        seen.append(where)
        return only_text(row, where)

    assert len(read_rows(path, 4, make).made) == 4
    assert len(seen) == 4


def test_few_bad_rows_are_left_out_and_named(jsonl: Callable[..., Path]) -> None:
    usable = read_rows(jsonl(*[GOOD] * 16, "{", *[GOOD] * 13), 30, as_it_is)
    assert len(usable.made) == 29
    (note,) = usable.notes
    assert note.startswith("1 of 30 rows were left out: rows.jsonl line 17: not valid JSON at line 1, column 2")


def test_many_bad_rows_are_refused_and_the_first_are_named(jsonl: Callable[..., Path]) -> None:
    path = jsonl(*[GOOD] * 8, {"label": 1}, "[1]", "nonsense", "{", GOOD)
    expected = (
        r"rows.jsonl: 4 of 12 rows cannot be used: rows.jsonl line 9: holds no text; rows.jsonl line 10: holds a JSON"
        r" list.*; rows.jsonl line 11: not valid JSON.*; and 1 more"
    )
    with pytest.raises(ConfigurationError, match=expected):
        read_rows(path, 30, only_text)


def test_one_in_ten_is_not_too_many(jsonl: Callable[..., Path]) -> None:
    assert len(read_rows(jsonl("bad", *[GOOD] * 9), 9, as_it_is).made) == 9
    with pytest.raises(ConfigurationError, match="1 of 9 rows"):
        read_rows(jsonl("bad", *[GOOD] * 8), 9, as_it_is)


def test_a_file_of_bad_rows_is_not_read_to_its_end(jsonl: Callable[..., Path]) -> None:
    with pytest.raises(ConfigurationError, match="2 of 2 rows"):
        read_rows(jsonl(*["bad"] * 5000), 10, as_it_is)


# Bad files


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.txt"])
def test_an_empty_file_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("\n\n")
    with pytest.raises(ConfigurationError, match=f"{name}: holds no rows"):
        read_rows(tmp_path / name, 4, as_it_is)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"text": "a"', "not valid JSON"),
        ('"a text"', "holds a JSON str"),
        ("[" * 100_000, "not valid JSON"),
        ('{"tokens": [' + "9" * 5000 + "]}", "not valid JSON"),
    ],
    ids=["cut short", "no object", "nested too deeply", "a number too long"],
)
def test_a_bad_line_is_named(line: str, reason: str, jsonl: Callable[..., Path]) -> None:
    with pytest.raises(ConfigurationError, match=f"1 of 1 rows cannot be used: rows.jsonl line 1: {reason}"):
        read_rows(jsonl(line), 4, as_it_is)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.txt"])
def test_a_line_that_is_not_utf_8_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b'{"text": "\xff\xfe"}\n')
    with pytest.raises(ConfigurationError, match=f"{name} line 1: "):
        read_rows(tmp_path / name, 4, as_it_is)


def test_a_line_without_end_is_refused(jsonl: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LONGEST_LINE", 50)
    with pytest.raises(ConfigurationError, match="line 2: is longer than 50 bytes"):
        read_rows(jsonl(GOOD, {"text": "a" * 60}), 4, as_it_is)


def test_a_damaged_parquet_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(ConfigurationError, match=r"rows.parquet: cannot be read as Parquet"):
        read_rows(tmp_path / "rows.parquet", 4, as_it_is)


def test_parquet_text_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    raw = pa.array([b"\xff\xfe"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 1, raw.buffers())
    pq.write_table(pa.table({"text": text}), tmp_path / "rows.parquet")
    with pytest.raises(ConfigurationError, match=r"rows.parquet: cannot be read as Parquet"):
        read_rows(tmp_path / "rows.parquet", 4, as_it_is)


def test_parquet_without_a_known_column_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"caption": ["a"]}), tmp_path / "rows.parquet")
    with pytest.raises(ConfigurationError, match=r"has the columns caption; one of text, prompt, input_ids"):
        read_rows(tmp_path / "rows.parquet", 4, as_it_is)


def test_a_missing_file_is_a_clear_error(tmp_path: Path) -> None:
    for name in ("rows.jsonl", "rows.parquet"):
        with pytest.raises(ConfigurationError, match=f"{name}: cannot be read"):
            read_rows(tmp_path / name, 4, as_it_is)

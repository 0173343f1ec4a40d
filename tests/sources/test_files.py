from __future__ import annotations

import gc
import os
from typing import TYPE_CHECKING, NoReturn

import pytest

from arrow_quant_v2.errors import SourceError
from arrow_quant_v2.sources import files
from arrow_quant_v2.sources.files import ByteFile, read_json, refuse_traversal

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    path = tmp_path / "digits"
    path.write_bytes(b"0123456789")
    return path


def test_a_range_of_bytes_is_read(digits: Path) -> None:
    assert ByteFile(digits).read(3, 4) == b"456"
    assert ByteFile(digits).read(0, 99) == b""


def test_a_range_is_read_where_the_system_has_no_positioned_reads(
    digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "preadv")
    assert ByteFile(digits).read(3, 4) == b"456"


def test_a_system_that_reads_less_than_asked_is_asked_again(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: whole(fd, [views[0][:3]], at))
    assert ByteFile(digits).read(10) == b"0123456789"


def test_a_range_past_the_end_is_refused(digits: Path) -> None:
    with pytest.raises(SourceError, match=r"digits: ends at byte 10: 2 of 5 bytes asked for are there"):
        ByteFile(digits).read(5, 8)


def test_a_failing_disk_is_an_error_of_ours(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> NoReturn:
        raise OSError(5, "Input/output error")

    file = ByteFile(digits)
    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(SourceError, match=r"digits: reading at byte 4 failed: Input/output error"):
        file.read(3, 4)


def test_no_permission_is_refused_with_the_way_out(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> NoReturn:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", forbidden)  # a test that runs as root may read anything
    with pytest.raises(SourceError, match=r"digits: cannot be opened: Permission denied; make it readable \(chmod"):
        ByteFile(digits)


def test_a_missing_file_a_folder_and_a_lost_link_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("../blobs/abc")
    with pytest.raises(SourceError, match=r"nothing: does not exist"):
        ByteFile(tmp_path / "nothing")
    with pytest.raises(SourceError, match=r"is a folder"):
        ByteFile(tmp_path)
    with pytest.raises(
        SourceError, match=r"is a link to \.\./blobs/abc, which does not exist \(an unfinished download"
    ):
        ByteFile(tmp_path / "link")


def test_a_named_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SourceError, match=r"pipe: is not a regular file"):
        ByteFile(tmp_path / "pipe")


def test_a_file_that_nobody_closes_is_closed_with_its_last_user(digits: Path) -> None:
    file = ByteFile(digits)
    descriptor = file._fd
    os.fstat(descriptor)
    del file
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


BROKEN_JSON = {
    '{"a": 1,}': r"not valid JSON at line 1, column \d",
    '{\n"a"': r"not valid JSON at line 2, column 4",
    "": r"not valid JSON at line 1, column 1",
    "[1]": r"holds a JSON list; an object in braces is needed",
    '"x"': r"holds a JSON str",
    "{" * 10: r"not valid JSON",
    '{"a":' + "[" * 100_000: r"not valid JSON",
    '{"a":' + "9" * 5000 + "}": r"not valid JSON",
}


@pytest.mark.parametrize("text", BROKEN_JSON, ids=range(len(BROKEN_JSON)))
def test_broken_json_names_the_file_and_the_position(text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(SourceError, match=rf"config.json: {BROKEN_JSON[text]}"):
        read_json(path)


def test_json_that_is_no_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(SourceError, match=r"not valid JSON: 'utf-8'"):
        read_json(tmp_path / "config.json")


def test_json_over_the_limit_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.touch()
    os.truncate(path, files.JSON_LIMIT + 1)  # a sparse file
    with pytest.raises(SourceError, match=r"config.json: has 67,108,865 bytes; a JSON file of a model has at most"):
        read_json(path)


@pytest.mark.parametrize("name", ["a.safetensors", "sub/a.safetensors", "a..b", "...", "ä", "a:b"[::2]])
def test_names_below_the_folder_are_allowed(name: str) -> None:
    assert refuse_traversal(name, "index") == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../a", "a/../../b", "/a", "//a/b", "C:a", "C:\\a", "..\\a", "\\a", "a\0"]
)
def test_names_that_climb_out_are_refused_on_every_system(name: str) -> None:
    with pytest.raises(SourceError, match=r"index: points at .*, outside its own folder"):
        refuse_traversal(name, "index")

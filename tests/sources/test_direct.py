from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import pytest
import torch

from arrow_quant_v2.errors import SourceError
from arrow_quant_v2.sources import files
from arrow_quant_v2.sources.direct import BLOCK, is_cached, open_direct, read_direct
from arrow_quant_v2.sources.files import ByteFile
from arrow_quant_v2.sources.slices import as_tensor

if TYPE_CHECKING:
    from collections.abc import Callable

    Prepare = Callable[[Path], object]

SIZE = 5 * BLOCK + 77
RANGES = [(0, 1), (0, SIZE), (1, SIZE - 1), (BLOCK, BLOCK), (BLOCK - 1, 2), (BLOCK + 5, 3 * BLOCK), (SIZE - 1, 1)]
needs_direct = pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="this system always reads through its cache")


@pytest.fixture
def content() -> bytes:
    return torch.randint(256, (SIZE,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy().tobytes()


@pytest.fixture
def path(tmp_path: Path, content: bytes) -> Path:
    found = tmp_path / "weights"
    found.write_bytes(content)
    return found


def forget(path: Path) -> None:
    os.sync()
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


@needs_direct
@pytest.mark.parametrize(("offset", "count"), RANGES)
def test_a_range_past_the_page_cache_holds_the_bytes_of_the_file(
    path: Path, content: bytes, offset: int, count: int
) -> None:
    descriptor = open_direct(path)
    if descriptor is None:
        pytest.skip("this file system has no direct reads")
    assert read_direct(descriptor, count, offset).tobytes() == content[offset : offset + count]
    os.close(descriptor)


@needs_direct
def test_a_range_past_the_end_gives_what_is_there(path: Path, content: bytes) -> None:
    descriptor = open_direct(path)
    if descriptor is None:
        pytest.skip("this file system has no direct reads")
    assert read_direct(descriptor, 200, SIZE - 100).tobytes() == content[-100:]
    assert read_direct(descriptor, 200, SIZE + 9).tobytes() == b""
    os.close(descriptor)


@pytest.mark.parametrize("prepare", [Path.read_bytes, forget])
@pytest.mark.parametrize("place", RANGES)
def test_a_large_range_is_the_same_whichever_way_it_comes(
    path: Path,
    content: bytes,
    place: tuple[int, int],
    prepare: Callable[[Path], object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(files, "WORTH_ITS_WAY", 1)
    prepare(path)
    offset, count = place
    assert ByteFile(path).read_array(count, offset).tobytes() == content[offset : offset + count]


def test_what_lies_in_the_page_cache_is_taken_from_there(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.read_bytes()

    def never(*_: object) -> NoReturn:
        raise AssertionError("read from the disk")

    monkeypatch.setattr(files, "WORTH_ITS_WAY", 1)
    monkeypatch.setattr(files, "read_direct", never)
    assert len(ByteFile(path).read_array(SIZE, 0)) == SIZE


@needs_direct
def test_a_file_that_was_only_written_and_dropped_is_not_cached(path: Path) -> None:
    forget(path)
    descriptor = os.open(path, os.O_RDONLY)
    assert not is_cached(descriptor, 0, SIZE)
    path.read_bytes()
    assert is_cached(descriptor, 0, SIZE)
    os.close(descriptor)


def test_a_file_system_that_takes_no_direct_reads_is_read_the_ordinary_way(
    path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> NoReturn:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(files, "WORTH_ITS_WAY", 1)
    monkeypatch.setattr(files, "is_cached", lambda *_: False)
    monkeypatch.setattr(files, "read_direct", refused)
    assert ByteFile(path).read_array(SIZE, 0).tobytes() == content


@pytest.mark.parametrize("size", [SIZE, SIZE + BLOCK])
def test_a_range_past_the_end_is_refused_whichever_way_it_comes(
    path: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "WORTH_ITS_WAY", 1)
    forget(path)
    with pytest.raises(SourceError, match=rf"weights: ends at byte {SIZE:,}: {SIZE - 1:,} of {size:,} bytes"):
        ByteFile(path).read_array(size, 1)


def test_a_closed_file_is_not_read(path: Path) -> None:
    file = ByteFile(path)
    file.close()
    with pytest.raises(SourceError, match="was closed"):
        file.read_array(1, 0)


def test_both_ways_of_reading_are_given_back(path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else 0
    for _ in range(10):
        ByteFile(path).close()
    after = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else 0
    assert after == before


def test_elements_that_lie_at_odd_bytes_become_a_tensor_all_the_same(path: Path) -> None:
    values = ByteFile(path).read_array(4 * 10 + 1, 0)[1:]
    tensor = as_tensor(values, "float32")
    assert tensor.data_ptr() % 4 == 0
    assert tensor.view(torch.uint8).numpy().tobytes() == values.tobytes()

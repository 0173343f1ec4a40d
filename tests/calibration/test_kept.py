"""What is kept comes back as it was, from memory or from a file, and files are gone in the end."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_blocks import random, same

from arrow_quant_v2.calibration import kept
from arrow_quant_v2.calibration.kept import Kept
from arrow_quant_v2.errors import StoreError

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.complex64]


@pytest.fixture
def filed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing fits into memory, and everything is worth a file."""
    monkeypatch.setattr(kept, "IN_MEMORY", 0)
    monkeypatch.setattr(kept, "WORTH_A_FILE", 1)


@pytest.mark.parametrize("limit", [0, 2**30], ids=["files", "memory"])
@settings(deadline=None, max_examples=25)
@given(
    shape=st.lists(st.integers(0, 5), max_size=4),
    dtype=st.sampled_from(DTYPES),
    turned=st.booleans(),
    every=st.integers(1, 2),
)
def test_what_is_kept_comes_back(limit: int, shape: list[int], dtype: torch.dtype, turned: bool, every: int) -> None:
    values = (random(*shape) * 4).to(dtype)
    view = (values.permute(*range(values.ndim - 1, -1, -1)) if turned else values)[::every] if shape else values
    outputs = {"a": (view, None), "b": [3, "word", view.clone()]}
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(kept, "IN_MEMORY", limit)
        patch.setattr(kept, "WORTH_A_FILE", 1)
        held = Kept(Path(folder))
        held.put((1, 2), outputs)
        expected = {"a": (view.clone(), None), "b": [3, "word", view.clone()]}
        assert same(held.take((1, 2)), expected)
        assert same(held.take((1, 2)), expected)
        assert bool(list(Path(folder).rglob("*"))) == (limit == 0 and view.numel() > 0)
        held.close()
        assert list(Path(folder).rglob("*")) == []


@pytest.mark.parametrize("limit", [0, 2**30], ids=["files", "memory"])
def test_whoever_writes_into_it_changes_a_copy(limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "IN_MEMORY", limit)
    held, values = Kept(tmp_path), torch.ones(64, 64)
    held.put((0,), values)
    values.zero_()
    held.take((0,)).mul_(5.0)
    assert torch.equal(held.take((0,)), torch.ones(64, 64))
    held.close()


@pytest.mark.usefixtures("filed")
def test_files_hold_the_bytes_of_tensors_and_nothing_else(tmp_path: Path) -> None:
    held = Kept(tmp_path / "made" / "when needed")
    assert not (tmp_path / "made").exists()
    held.put((0,), {"word": torch.tensor([1.0, 2.0])})
    (file,) = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert file.read_bytes() == b"\x00\x00\x80\x3f\x00\x00\x00\x40"
    held.put((0,), torch.tensor([3.0]))
    (file,) = [path for path in tmp_path.rglob("*") if path.is_file()]  # the other one is gone
    assert file.read_bytes() == b"\x00\x00\x40\x40"
    held.close()


def test_memory_is_used_first_and_again_when_it_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "IN_MEMORY", 2 * 4 * 4096)
    held = Kept(tmp_path)

    def files_after(key: int, size: int) -> int:
        held.put((key,), torch.zeros(size))
        return len([path for path in tmp_path.rglob("*") if path.is_file()])

    assert [files_after(key, 4096) for key in range(4)] == [0, 0, 1, 2]
    assert files_after(0, 0) == 2
    assert files_after(2, 4096) == 1  # its place was the file's; now it is that of the first one
    assert files_after(5, 4096) == 2
    assert files_after(6, 100) == 2  # not worth a file
    held.close()


@pytest.mark.usefixtures("filed")
def test_what_is_no_plain_tensor_stays_in_memory(tmp_path: Path) -> None:
    held, sparse = Kept(tmp_path), torch.eye(3).to_sparse()
    held.put((0,), [sparse, torch.eye(3, requires_grad=True), 7])
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    found = held.take((0,))
    assert torch.equal(found[0].to_dense(), torch.eye(3))
    assert (found[1].requires_grad, found[2]) == (True, 7)
    held.close()


@pytest.mark.usefixtures("filed")
def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    held = Kept(tmp_path)
    monkeypatch.setattr(tempfile, "NamedTemporaryFile", full)
    with pytest.raises(StoreError, match=f"{tmp_path}.*: cannot hold what the blocks .*: No space left on device;"):
        held.put((0,), torch.ones(3))
    held.close()


def test_what_was_not_kept_is_not_there() -> None:
    with pytest.raises(KeyError):
        Kept().take((0, 0, 0))

from __future__ import annotations

import io
import os
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arrow_quant_v2.errors import SourceError
from arrow_quant_v2.sources import mapped
from arrow_quant_v2.sources.checkpoint import CheckpointSource

if TYPE_CHECKING:
    from arrow_quant_v2.sources.base import Source

FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])


def raw_of(state: object, *, zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def saved(state: object, folder: Path, *, zipped: bool = True) -> CheckpointSource:
    path = folder / "model.bin"
    path.write_bytes(raw_of(state, zipped=zipped))
    return CheckpointSource([path])


def refused(state: object, folder: Path, *, zipped: bool = True) -> str:
    with pytest.raises(SourceError) as caught:
        saved(state, folder, zipped=zipped)
    assert str(folder / "model.bin") in str(caught.value)
    return str(caught.value)


def values(source: Source) -> dict[str, list[float]]:
    return {info.name: source.read(info.name).tolist() for info in source.tensors}


@FORMATS
@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "module"])
def test_a_nested_state_dict_is_found(key: str, zipped: bool, tmp_path: Path) -> None:
    state = {"epoch": 3, key: OrderedDict(w=torch.tensor([1.0, 2.0])), "optimizer": {"m": torch.ones(9)}}
    assert values(saved(state, tmp_path, zipped=zipped)) == {"w": [1.0, 2.0]}


def test_plain_values_beside_tensors_are_left(tmp_path: Path) -> None:
    state = {"w": torch.ones(1), "step": 3, "name": "x", "none": None, "sizes": [1, 2], "deep": {"a": {"b": (1,)}}}
    assert values(saved(state, tmp_path)) == {"w": [1.0]}


def test_parameters_count_as_tensors(tmp_path: Path) -> None:
    assert values(saved({"w": torch.nn.Parameter(torch.ones(2))}, tmp_path)) == {"w": [1.0, 1.0]}


@FORMATS
def test_tensors_that_share_or_skip_storage_read_right(zipped: bool, tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    views = {
        "base": base,
        "tied": base,
        "row": base[2],
        "column": base[:, 1],
        "transposed": base.T,
        "window": base[1:3, 2:5],
        "every second": base[::2, ::3],
        "expanded": base[:1].expand(3, 6),
        "permuted": base.reshape(2, 3, 4).permute(2, 0, 1),
    }
    source = saved(views, tmp_path, zipped=zipped)
    for name, view in views.items():
        flat = view.reshape(-1)
        for start, stop in [(0, len(flat)), (1, len(flat) - 1), (3, 3), (len(flat) // 2, len(flat))]:
            assert torch.equal(source.read(name, start, stop), flat[start:stop]), name


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.command = f"touch '{path}'"

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (self.command,)


@FORMATS
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(zipped: bool, tmp_path: Path) -> None:
    message = refused({"w": torch.ones(1), "x": Touch(tmp_path / "ran")}, tmp_path, zipped=zipped)
    assert "GLOBAL posix.system" in message
    assert "could run code, so it was not loaded" in message
    assert "convert it on a machine apart" in message
    assert not (tmp_path / "ran").exists()


def test_the_attack_would_work_on_an_unsafe_reader(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(raw_of({"x": Touch(tmp_path / "ran")}))
    torch.load(path, weights_only=False)
    assert (tmp_path / "ran").exists()


def test_a_whole_pickled_module_is_refused_with_the_way_out(tmp_path: Path) -> None:
    message = refused(torch.nn.Linear(1, 1), tmp_path)
    assert "GLOBAL torch.nn.modules.linear.Linear" in message
    assert "safetensors.torch.save_file" in message


WRONG: dict[str, tuple[Any, str]] = {
    "a list": ([torch.ones(1)], "holds a list; a dict of tensors by name"),
    "one tensor": (torch.ones(1), "holds a Tensor; a dict of tensors by name"),
    "no tensors": ({"epoch": 3}, "holds no tensors; save the model's state_dict()"),
    "tensors in a list": ({"w": torch.ones(1), "more": [torch.ones(1)]}, "entry 'more' is a list with tensors"),
    "tensors in a dict": ({"w": torch.ones(1), "ema": {"w": torch.ones(1)}}, "entry 'ema' is a dict with tensors"),
    "a tensor without a name": ({3: torch.ones(1)}, "entry 3 is a Tensor with tensors"),
    "complex numbers": ({"w": torch.ones(1, dtype=torch.complex64)}, "w: has dtype complex64; allowed are float64"),
    "a sparse tensor": ({"w": torch.ones(1, 1).to_sparse()}, "w: is stored as torch.sparse_coo; an ordinary dense"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_no_state_dict_is_one_clear_error(kind: str, tmp_path: Path) -> None:
    state, message = WRONG[kind]
    assert message in refused(state, tmp_path)


def test_a_list_that_holds_itself_does_not_hang(tmp_path: Path) -> None:
    ring: list[Any] = [1]
    ring.append(ring)
    assert values(saved({"w": torch.ones(1), "ring": ring}, tmp_path)) == {"w": [1.0]}


@FORMATS
@pytest.mark.parametrize("keep", [0, 3, 100, -1, -500])
def test_a_truncated_checkpoint_is_refused(keep: int, zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(raw_of({"w": torch.ones(500)}, zipped=zipped)[:keep])
    with pytest.raises(SourceError, match=r"model.bin: .*truncated or damaged"):
        CheckpointSource([path])


def test_a_git_lfs_pointer_is_told(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n")
    with pytest.raises(SourceError, match=r"model.bin: is a Git LFS pointer"):
        CheckpointSource([path])


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"model.bin: does not exist"):
        CheckpointSource([tmp_path / "model.bin"])


needs_linux = pytest.mark.skipif(not mapped.MAPS.exists(), reason="only Linux tells where a map lies in its file")


@needs_linux
def test_reading_a_large_checkpoint_bit_by_bit_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    torch.save({"w": torch.ones(1 << 24)}, path)
    before = resident()
    source = CheckpointSource([path])
    for start in range(0, 1 << 24, 1 << 18):
        assert bool(source.read("w", start, start + (1 << 18)).all())
    assert resident() - before < 16 << 20  # of 64 MiB


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@needs_linux
def test_a_file_cut_short_after_opening_is_an_error_and_no_crash(tmp_path: Path) -> None:
    source = saved({"w": torch.ones(100_000)}, tmp_path)
    os.truncate(tmp_path / "model.bin", 1000)
    with pytest.raises(SourceError, match=r"model.bin: ends at byte 1,000"):
        source.read("w")


def test_values_are_read_through_the_map_where_its_place_is_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapped, "MAPS", tmp_path / "nothing")
    source = saved({"w": torch.arange(10.0)}, tmp_path)
    assert source._offsets == {"w": None}
    assert source.read("w", 3, 5).tolist() == [3.0, 4.0]


def test_a_checkpoint_of_a_machine_with_the_other_byte_order_is_read_right(tmp_path: Path) -> None:
    values_there = torch.arange(5.0)
    here = io.BytesIO(raw_of({"w": torch.from_numpy(values_there.numpy().byteswap())}))
    other = {"little": b"big", "big": b"little"}[sys.byteorder]
    with zipfile.ZipFile(here) as old, zipfile.ZipFile(tmp_path / "model.bin", "w") as new:
        for name in old.namelist():
            new.writestr(name, other if name.endswith("/byteorder") else old.read(name))
    assert torch.equal(CheckpointSource([tmp_path / "model.bin"]).read("w"), values_there)


VALID = {
    zipped: raw_of({"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.ones(2)}, zipped=zipped)
    for zipped in (True, False)
}


@FORMATS
@pytest.mark.filterwarnings("ignore::UserWarning")  # torch warns of a damaged number of the pickle protocol
@settings(max_examples=150, deadline=None)
@given(
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=3),
    keep=st.just(1.0) | st.floats(0, 1),
)
def test_a_damaged_checkpoint_reads_or_is_refused(
    zipped: bool, flips: list[tuple[float, int]], keep: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    raw = bytearray(VALID[zipped])
    for at, value in flips:
        raw[int(at * len(raw))] = value
    path = tmp_path_factory.getbasetemp() / "fuzzed.bin"
    path.unlink(missing_ok=True)  # a map of the last one may still be alive
    path.write_bytes(raw[: int(keep * len(raw))])
    try:
        source = CheckpointSource([path])
        for info in source.tensors:
            assert len(source.read(info.name)) == info.numel
    except SourceError as error:
        message = str(error)
        assert message.startswith(str(path))

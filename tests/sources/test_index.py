"""Sharded models: an index and its shards, in both formats that have them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest
import torch
from safetensors.torch import save_file

from arrow_quant_v2.errors import SourceError
from arrow_quant_v2.sources.checkpoint import CheckpointSource
from arrow_quant_v2.sources.safetensors import SafetensorsSource

if TYPE_CHECKING:
    from arrow_quant_v2.sources.base import Source

Save: TypeAlias = Callable[[dict[str, torch.Tensor], Path], None]
KINDS: dict[str, tuple[Save, Callable[[Path], Source]]] = {
    "safetensors": (save_file, SafetensorsSource.from_index),
    "bin": (torch.save, CheckpointSource.from_index),
}


@pytest.fixture(params=KINDS)
def suffix(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def write(folder: Path, suffix: str, weight_map: Any, shards: dict[str, list[str]]) -> Path:
    """Shards, each a list of tensor names, and an index; every tensor holds its name's length."""
    for shard, names in shards.items():
        KINDS[suffix][0]({name: torch.full((2,), len(name)) for name in names}, folder / shard)
    index = folder / f"model.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


def refused(index: Path, suffix: str) -> str:
    with pytest.raises(SourceError) as caught:
        KINDS[suffix][1](index)
    assert str(index.parent) in str(caught.value)
    return str(caught.value)


def test_tensors_come_from_their_shards(tmp_path: Path, suffix: str) -> None:
    index = write(
        tmp_path, suffix, {"a": "1.x", "bb": "sub/2.x"} | {"ccc": "1.x"}, {"1.x": ["a", "ccc"]} | sub(tmp_path)
    )
    source = KINDS[suffix][1](index)
    assert [(info.name, source.read(info.name).tolist()) for info in source.tensors] == [
        ("a", [1, 1]),
        ("bb", [2, 2]),
        ("ccc", [3, 3]),
    ]
    assert source.weight_files == (tmp_path / "1.x", tmp_path / "sub/2.x")
    assert "2" in source.location


def sub(folder: Path) -> dict[str, list[str]]:
    (folder / "sub").mkdir()
    return {"sub/2.x": ["bb"]}


def test_a_tensor_that_the_index_forgets_is_still_read(tmp_path: Path, suffix: str) -> None:
    index = write(tmp_path, suffix, {"a": "1.x"}, {"1.x": ["a", "forgotten"]})
    assert [info.name for info in KINDS[suffix][1](index).tensors] == ["a", "forgotten"]


@pytest.mark.parametrize(
    "shard",
    ["../secret.x", "sub/../../secret.x", "/etc/passwd", "C:\\secret.x", "..\\secret.x", "\\\\host\\x", "", "a\0b"],
)
def test_an_index_that_points_outside_its_folder_is_refused(shard: str, tmp_path: Path, suffix: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    KINDS[suffix][0]({"a": torch.ones(1)}, tmp_path / "secret.x")
    message = refused(write(folder, suffix, {"a": shard}, {}), suffix)
    assert f"tensor 'a': points at {shard!r}, outside its own folder" in message


def test_a_missing_shard_is_named(tmp_path: Path, suffix: str) -> None:
    message = refused(write(tmp_path, suffix, {"a": "1.x", "b": "2.x"}, {"1.x": ["a"]}), suffix)
    assert "1 of 2 shards are missing: 2.x; download them" in message


def test_a_tensor_missing_in_its_shard_is_named(tmp_path: Path, suffix: str) -> None:
    message = refused(write(tmp_path, suffix, {"a": "1.x", "b": "1.x"}, {"1.x": ["a"]}), suffix)
    assert "says that 1.x holds tensor 'b', which it does not" in message


def test_a_tensor_in_another_shard_than_promised_is_refused(tmp_path: Path, suffix: str) -> None:
    message = refused(write(tmp_path, suffix, {"a": "2.x", "b": "1.x"}, {"1.x": ["a"], "2.x": ["b"]}), suffix)
    assert "says that 2.x holds tensor 'a', which it does not" in message


def test_one_tensor_in_two_shards_is_refused(tmp_path: Path, suffix: str) -> None:
    message = refused(write(tmp_path, suffix, {"a": "1.x", "b": "2.x"}, {"1.x": ["a"], "2.x": ["a", "b"]}), suffix)
    assert "tensor 'a' lies in 1.x too" in message


@pytest.mark.parametrize("weight_map", [None, {}, ["1.x"], "1.x"])
def test_an_index_without_a_map_is_refused(weight_map: Any, tmp_path: Path, suffix: str) -> None:
    assert "has no `weight_map`" in refused(write(tmp_path, suffix, weight_map, {}), suffix)


def test_a_shard_that_is_no_name_is_refused(tmp_path: Path, suffix: str) -> None:
    assert "tensor 'a' points at 7" in refused(write(tmp_path, suffix, {"a": 7}, {}), suffix)


def test_a_broken_index_names_the_position(tmp_path: Path, suffix: str) -> None:
    index = tmp_path / "model.index.json"
    index.write_text('{"weight_map":\n {"a" "1.x"}}')
    assert "not valid JSON at line 2, column 7" in refused(index, suffix)

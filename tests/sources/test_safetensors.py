from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from arrow_quant_v2.errors import SourceError
from arrow_quant_v2.sources.safetensors import SafetensorsSource

if TYPE_CHECKING:
    from pathlib import Path

VALID = save({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3, dtype=torch.bfloat16)}, metadata={"k": "v"})


def file_of(header: dict[str, Any] | bytes, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def entry(dtype: str, shape: list[int], start: int, stop: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def test_the_layout_on_paper_is_read(tmp_path: Path) -> None:
    path = tmp_path / "paper.safetensors"
    path.write_bytes(
        b"\x3d\0\0\0\0\0\0\0" + b'{"x.weight":{"dtype":"I16","shape":[2],"data_offsets":[0,4]}}' + b"\x01\x00\xff\xff"
    )
    assert SafetensorsSource([path]).read("x.weight").tolist() == [1, -1]


def test_metadata_is_no_tensor(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(VALID)
    assert [info.name for info in SafetensorsSource([path]).tensors] == ["a", "b"]


WRONG = {
    "a header that claims 10 GB": (struct.pack("<Q", 10**10) + b"{}", "header too large"),
    "an empty file": (b"", "header too small"),
    "a header that is no JSON": (file_of(b"{{{{{{{{"), "invalid JSON in header"),
    "a header of a million brackets": (file_of(b'{"a":' + b"[" * 1_000_000), "recursion limit"),
    "values that are cut short": (file_of({"a": entry("F32", [2], 0, 8)}, b"1234"), "truncated or damaged"),
    "a file cut within the header": (VALID[:40], "truncated or damaged"),
    "bytes behind the last tensor": (VALID + b"12", "truncated or damaged"),
    "offsets that overlap": (
        file_of({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}, bytes(12)),
        "invalid offset for tensor `b`",
    ),
    "offsets past the end": (file_of({"a": entry("F32", [2], 800, 808)}, bytes(8)), "invalid offset for tensor `a`"),
    "a hole between tensors": (
        file_of({"a": entry("U8", [1], 0, 1), "b": entry("U8", [1], 2, 3)}, bytes(3)),
        "invalid offset for tensor `b`",
    ),
    "a shape that is not the offsets": (file_of({"a": entry("F32", [3], 0, 8)}, bytes(8)), "truncated or damaged"),
    "a shape whose product overflows": (file_of({"a": entry("F32", [2**63, 4], 0, 8)}, bytes(8)), "overflow"),
    "one name twice": (
        file_of(
            b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}',
            b"12",
        ),
        "invalid offset for tensor `a`",
    ),
    "a dtype that nobody knows": (file_of({"a": entry("F99", [1], 0, 8)}, bytes(8)), "unknown variant `F99`"),
    "complex numbers": (file_of({"a": entry("C64", [1], 0, 8)}, bytes(8)), "a: has dtype C64; allowed are float64"),
    "four-bit floats": (file_of({"a": entry("F4", [2], 0, 1)}, bytes(1)), "a: has dtype F4; allowed are float64"),
    "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", "run `git lfs pull`"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_file_is_one_clear_error(kind: str, tmp_path: Path) -> None:
    raw, message = WRONG[kind]
    path = tmp_path / "m.safetensors"
    path.write_bytes(raw)
    with pytest.raises(SourceError) as caught:
        SafetensorsSource([path])
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_file_cut_short_after_opening_is_an_error_and_no_crash(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.ones(100_000)}, path)
    source = SafetensorsSource([path])
    with path.open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(SourceError, match=r"m.safetensors: ends at byte 1,000"):
        source.read("a")


def test_one_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    paths = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    for path in paths:
        save_file({"a": torch.ones(1)}, path)
    with pytest.raises(SourceError, match=r"2.safetensors: tensor 'a' lies in 1.safetensors too"):
        SafetensorsSource(paths)


@settings(max_examples=150, deadline=None)
@given(
    flips=st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), max_size=4),
    length=st.integers(0, len(VALID)) | st.just(len(VALID)),
)
@example(flips=[(7, 255)], length=len(VALID))
def test_a_damaged_file_reads_or_is_refused(
    flips: list[tuple[int, int]], length: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    raw = bytearray(VALID)
    for at, value in flips:
        raw[at] = value
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    path.write_bytes(raw[:length])
    try:
        source = SafetensorsSource([path])
        for info in source.tensors:
            assert len(source.read(info.name)) == info.numel
    except SourceError as error:
        message = str(error)
        assert message.startswith(str(path))

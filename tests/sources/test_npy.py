from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

from arrow_quant_v2.errors import SourceError
from arrow_quant_v2.sources import npy
from arrow_quant_v2.sources.npy import NpySource

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray


def file_of(header: str, body: bytes = b"", version: int = 1) -> bytes:
    length = struct.pack("<H" if version == 1 else "<I", len(header))
    return b"\x93NUMPY" + bytes([version, 0]) + length + header.encode() + body


VALID = file_of("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }\n", bytes(24))


@given(
    array=nps.arrays(
        dtype=st.sampled_from([np.dtype(name) for name in npy.DTYPES]),
        shape=nps.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
    ),
    fortran=st.booleans(),
    cut=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
@settings(max_examples=100, deadline=None)
def test_whatever_numpy_saves_is_read(
    array: NDArray[np.generic], fortran: bool, cut: tuple[float, float], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "saved"
    folder.mkdir(exist_ok=True)
    np.save(folder / "a.npy", np.asarray(array, order="F" if fortran else "C"))
    start, stop = sorted(int(part * array.size) for part in cut)
    assert NpySource(folder).tensors[0].shape == array.shape
    assert NpySource(folder).read("a", start, stop).numpy().tobytes() == array.ravel()[start:stop].tobytes()


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<i2', 'fortran_order': False, 'shape': (2,), }\n",
        "{'descr': '<i2', 'fortran_order': False, 'shape': (2,)}",
        '{"shape": (2L,), "fortran_order": False, "descr": "<i2"}   \n',
        "  { 'fortran_order' : False , 'descr' : '<i2', 'shape' : ( 2 , ) , }",
    ],
)
@pytest.mark.parametrize("version", [1, 2])
def test_headers_of_other_writers_are_read(header: str, version: int, tmp_path: Path) -> None:
    (tmp_path / "a.b.weight.npy").write_bytes(file_of(header, b"\x01\x00\xff\xff", version))
    assert NpySource(tmp_path).read("a.b.weight").tolist() == [1, -1]


def header_of(descr: str, shape: str = "(1,)") -> str:
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n"


WRONG = {
    "Python objects": (file_of(header_of("'|O'"), bytes(8)), "holds Python objects (|O), which can run code"),
    "a record with an object": (file_of(header_of("[('a', '|O')]"), bytes(8)), "holds Python objects"),
    "a record": (file_of(header_of("[('a', '<f4')]"), bytes(8)), "allowed are <f8, <f4"),
    "big-endian numbers": (file_of(header_of("'>f4'"), bytes(8)), "is big-endian (>f4); save it in little-endian"),
    "complex numbers": (file_of(header_of("'<c8'"), bytes(8)), "has dtype <c8; allowed are <f8"),
    "numpy's bfloat16": (file_of(header_of("'<V2'"), bytes(8)), "has dtype <V2; allowed are <f8"),
    "values that are cut short": (VALID[:-1], "need 24 bytes"),
    "a header that is cut short": (VALID[:30], "ends at byte 30"),
    "an empty file": (b"", "ends at byte 0"),
    "another file": (b"PK\x03\x04" + bytes(90), "not with the mark of a .npy file"),
    "a version to come": (VALID[:6] + b"\x09" + VALID[7:], "is .npy version 9; 1 and 2 are read"),
    "a header of 4 GB": (b"\x93NUMPY\x02\x00\xff\xff\xff\xff{", "claims a header of 4,294,967,295 bytes"),
    "a header that calls": (file_of("__import__('os').system('x')", bytes(8)), "has the header"),
    "a header with more": (file_of(header_of("'<f4'")[:-2] + "'x': 1}", bytes(8)), "has the header"),
    "a header with less": (file_of("{'descr': '<f4', 'shape': (1,)}", bytes(8)), "has the header"),
    "a negative size": (file_of(header_of("'<f4'", "(-1,)"), bytes(8)), "has the header"),
    "a shape that is a number": (file_of(header_of("'<f4'", "3"), bytes(12)), "has the header"),
    "a size of 30 digits": (file_of(header_of("'<f4'", f"(0, {10**30})"), bytes(8)), "has the header"),
    "sizes whose product is huge": (file_of(header_of("'<f4'", f"({10**17}, {10**17})"), bytes(8)), "need 4"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_file_is_one_clear_error(kind: str, tmp_path: Path) -> None:
    raw, message = WRONG[kind]
    (tmp_path / "a.npy").write_bytes(raw)
    with pytest.raises(SourceError) as caught:
        NpySource(tmp_path)
    assert message in str(caught.value)
    assert str(tmp_path / "a.npy") in str(caught.value)


def test_what_numpy_pickles_is_refused_and_not_run(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([Touch(tmp_path / "ran")], dtype=object), allow_pickle=True)
    with pytest.raises(SourceError, match="holds Python objects"):
        NpySource(tmp_path)
    assert not (tmp_path / "ran").exists()


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return type(self.path).touch, (self.path,)


def test_a_file_cut_short_after_opening_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(VALID)
    source = NpySource(tmp_path)
    (tmp_path / "a.npy").write_bytes(VALID[:-8])
    with pytest.raises(SourceError, match=r"a.npy: ends at byte"):
        source.read("a")


def test_a_folder_without_arrays_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"holds no .npy files"):
        NpySource(tmp_path)
    with pytest.raises(SourceError, match=r"nowhere: cannot be opened: No such file"):
        NpySource(tmp_path / "nowhere")


@settings(max_examples=200, deadline=None)
@given(
    flips=st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), max_size=4),
    length=st.integers(0, len(VALID)) | st.just(len(VALID)),
)
def test_a_damaged_file_reads_or_is_refused(
    flips: list[tuple[int, int]], length: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    raw = bytearray(VALID)
    for at, value in flips:
        raw[at] = value
    folder = tmp_path_factory.getbasetemp() / "fuzzed"
    folder.mkdir(exist_ok=True)
    (folder / "a.npy").write_bytes(raw[:length])
    try:
        source = NpySource(folder)
        assert len(source.read("a")) == source.tensors[0].numel
    except SourceError as error:
        message = str(error)
        assert message.startswith(str(folder))

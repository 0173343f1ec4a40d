"""CRC-32: the standard's, by whichever code computes it, and of a whole from its parts."""

import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arrow_quant_v2.store import crc32 as room

NATIVE_FOLDS_FROM = 64


def bytes_of(text: bytes) -> np.ndarray:
    return np.frombuffer(text, np.uint8)


@pytest.fixture(params=["native", "zlib"])
def crc32(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    if request.param == "zlib":
        monkeypatch.setenv("ARROW_QUANT_KERNELS", "reference")
    room._fastest.cache_clear()
    yield room.crc32
    room._fastest.cache_clear()


def test_the_check_value_of_the_standard(crc32) -> None:
    assert crc32(bytes_of(b"123456789")) == 0xCBF43926


def test_nothing_changes_nothing(crc32) -> None:
    assert crc32(bytes_of(b"")) == 0
    assert crc32(bytes_of(b""), 0xDEADBEEF) == 0xDEADBEEF


def test_every_length_around_the_folding_equals_zlib(crc32) -> None:
    values = np.random.default_rng(0).integers(0, 256, 4 * NATIVE_FOLDS_FROM + 40, np.uint8)
    for length in range(values.size):
        for offset in range(min(length, 17)):
            part = values[offset:length]
            assert crc32(part, 7) == zlib.crc32(part.tobytes(), 7), (offset, length)


@given(first=st.binary(max_size=300), second=st.binary(max_size=300), before=st.integers(0, 2**32 - 1))
def test_it_goes_on_from_what_came_before(first: bytes, second: bytes, before: int) -> None:
    started = room.crc32(bytes_of(first), before)
    assert room.crc32(bytes_of(second), started) == zlib.crc32(first + second, before)


@given(first=st.binary(max_size=200), second=st.binary(max_size=200))
def test_the_whole_follows_from_the_parts(first: bytes, second: bytes) -> None:
    assert room.combine(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(first + second)

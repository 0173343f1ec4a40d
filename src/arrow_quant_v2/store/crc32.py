"""CRC-32 of bytes, and of a whole from those of its parts; knows nothing of what they hold.

The same checksum as zlib's, by the C++ library where it was built, which is three times as fast.
"""

from __future__ import annotations

import ctypes
import os
import zlib
from functools import cache, lru_cache
from typing import TYPE_CHECKING

from arrow_quant_v2.kernels.native import find_library, open_library

if TYPE_CHECKING:
    from collections.abc import Callable

    from arrow_quant_v2.packed import Bytes

POLYNOMIAL = 0xEDB88320
ONE = 1 << 31  # x^0 in the reflected order of bits that CRC-32 uses


def crc32(values: Bytes, before: int = 0) -> int:
    """CRC-32 of contiguous bytes that follow bytes with checksum `before`; releases the GIL."""
    return _fastest()(values, before)


@cache
def _fastest() -> Callable[[Bytes, int], int]:
    path = find_library()
    library = None if path is None or os.environ.get("ARROW_QUANT_KERNELS") == "reference" else open_library(path)
    if library is None or not library.aq_has_fast_crc32():
        return lambda values, before: zlib.crc32(values.data, before)

    def native(values: Bytes, before: int) -> int:
        size = ctypes.c_int64(values.nbytes)
        return int(library.aq_crc32(ctypes.c_uint32(before), ctypes.c_void_p(values.ctypes.data), size))

    return native


def combine(first: int, second: int, second_bytes: int) -> int:
    """CRC-32 of a + b, given the CRC-32 of a, that of b, and the number of bytes of b."""
    return _product(_shift(second_bytes), first) ^ second


@lru_cache(maxsize=64)
def _shift(count: int) -> int:
    """x^(8 count) modulo the polynomial: what `count` more bytes do to a checksum."""
    result, power = ONE, 1 << 23  # x^8
    while count:
        if count & 1:
            result = _product(result, power)
        power = _product(power, power)
        count >>= 1
    return result


def _product(a: int, b: int) -> int:
    """A * b modulo the polynomial."""
    total = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            total ^= b
        b = (b >> 1) ^ POLYNOMIAL if b & 1 else b >> 1
    return total

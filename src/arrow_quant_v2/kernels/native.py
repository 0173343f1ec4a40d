"""The C++ library: found and opened with ctypes; loads no torch, and knows nothing of what the functions mean."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path

import arrow_quant_v2.kernels as here
from arrow_quant_v2.errors import ConfigurationError

LIBRARY = "libarrow_quant_kernels.so"
ABI = 13


def find_library() -> Path | None:
    """The shared library beside this package, wherever the installer put it; None when it was not built."""
    found = (Path(folder) / LIBRARY for folder in here.__path__)
    return next((path for path in found if path.is_file()), None)


@cache
def open_library(path: Path) -> ctypes.CDLL:
    """Open the library.

    Raises:
        ConfigurationError: it belongs to another version of this package.
    """
    library = ctypes.CDLL(str(path))
    library.aq_isa.restype = ctypes.c_char_p
    library.aq_crc32.restype = ctypes.c_uint32
    if library.aq_abi() != ABI:
        raise ConfigurationError(
            f"{path}: its kernels have ABI {library.aq_abi()}, this package needs {ABI}; reinstall"
        )
    return library


def share_team(library: ctypes.CDLL, torch_folder: Path) -> bool:
    """Let the library's rows be shared by torch's own OpenMP threads; False where torch did not load GNU's.

    torch's threads spin for some milliseconds after each of its calls: others would have to share the cores with them.
    """
    places = (torch_folder / "lib", torch_folder.with_name("torch.libs"))
    for path in (path for place in places for path in sorted(place.glob("libgomp*.so*"))):
        try:
            openmp = ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD)  # the one that torch runs, or none
        except OSError:
            continue
        library.aq_use_team(openmp.GOMP_parallel)
        return True
    return False

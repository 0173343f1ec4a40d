"""The C++ kernels: found, loaded with ctypes, registered beside the reference; knows no mathematics."""

from __future__ import annotations

import ctypes
import os
import sys
import warnings
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from arrow_quant_v2.errors import ConfigurationError
from arrow_quant_v2.kernels import convolution_cpu, linear_cpu, ops, reference
from arrow_quant_v2.kernels.linear_cpu import DTYPES, pointer
from arrow_quant_v2.kernels.native import find_library, open_library, share_team

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ISAS = ("amx", "avx512vnni", "avx512", "avx2", "neon", "portable")
"""Instruction sets that a library may have, best first."""

threads_per_call: ContextVar[int | None] = ContextVar("threads_per_call", default=None)
"""How many threads one kernel call may use; None: as many as torch uses. A worker that shares the cores sets 1."""

_one_at_a_time = Lock()  # two threads that register at once would do it twice


def load_library(path: Path) -> ctypes.CDLL:
    """Load the library, and choose the instruction set that ARROW_QUANT_ISA names, if it names one.

    Raises:
        ConfigurationError: the library is of another version, or this processor lacks that instruction set.
    """
    library = open_library(path)
    wanted = os.environ.get("ARROW_QUANT_ISA")
    if wanted and library.aq_use_isa(wanted.encode()):
        raise ConfigurationError(
            f"ARROW_QUANT_ISA is {wanted!r}; this processor offers {', '.join(isas(library))}; unset it for the best"
        )
    return library


def isas(library: ctypes.CDLL) -> tuple[str, ...]:
    """Instruction sets that this library has and this processor runs, best first; the choice stays as it was."""
    chosen = library.aq_isa()
    names = tuple(name for name in ISAS if library.aq_use_isa(name.encode()) == 0)
    library.aq_use_isa(chosen)
    return names


def _threads() -> int:
    return threads_per_call.get() or torch.get_num_threads()


def register(library: ctypes.CDLL) -> None:
    """Let the dispatcher use the C++ kernels for every CPU tensor."""
    _register_codes(library)
    _register_columns(library)
    _register_hadamard(library)
    linear_cpu.register(library, _threads)
    convolution_cpu.register(library, _threads)


def _register_codes(library: ctypes.CDLL) -> None:
    def pack_cpp(codes: Tensor, bits: int) -> Tensor:
        ops.check_pack(codes, bits)
        rows, columns = codes.shape
        packed = codes.new_empty((rows, reference.row_bytes(columns, bits)))
        source = codes.contiguous()
        library.aq_pack(pointer(source), pointer(packed), *_sizes(rows, columns), bits, _threads())
        return packed

    def unpack_cpp(packed: Tensor, bits: int, columns: int) -> Tensor:
        ops.check_unpack(packed, bits, columns)
        codes = packed.new_empty((packed.shape[0], columns))
        source = packed.contiguous()
        library.aq_unpack(pointer(source), pointer(codes), *_sizes(packed.shape[0], columns), bits, _threads())
        return codes

    def quantize_cpp(
        weight: Tensor,
        bits: int,
        group_size: int,
        symmetric: bool,
        stretches: Sequence[float],
        importance: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        ops.check_quantize("quantize", weight, bits, group_size, stretches, importance)
        source = weight.contiguous()
        result = ops.empty_result(source, bits, min(group_size, weight.shape[1]), symmetric=symmetric)
        candidates = (ctypes.c_float * len(stretches))(*stretches)
        weights = None if importance is None else importance.contiguous()
        library.aq_quantize(
            pointer(source),
            DTYPES[weight.dtype],
            *_sizes(*weight.shape),
            bits,
            ctypes.c_int64(min(group_size, weight.shape[1])),
            candidates,
            len(stretches),
            None if weights is None else pointer(weights),
            *[pointer(t) if t.numel() else None for t in result],
            _threads(),
        )
        return result

    for kernel in (pack_cpp, unpack_cpp, quantize_cpp):
        ops.register_kernel(kernel.__name__.removesuffix("_cpp"), "CPU", kernel)


def _register_columns(library: ctypes.CDLL) -> None:
    def fit_grid_cpp(
        weight: Tensor,
        bits: int,
        group_size: int,
        symmetric: bool,
        stretches: Sequence[float],
        importance: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ops.check_quantize("fit_grid", weight, bits, group_size, stretches, importance)
        source = weight.contiguous()
        result = ops.empty_fit(source, min(group_size, weight.shape[1]))
        weights = None if importance is None else importance.contiguous()
        library.aq_fit_grid(
            pointer(source),
            DTYPES[weight.dtype],
            *_sizes(*weight.shape),
            bits,
            ctypes.c_int64(min(group_size, weight.shape[1])),
            int(symmetric),
            (ctypes.c_float * len(stretches))(*stretches),
            len(stretches),
            None if weights is None else pointer(weights),
            *[pointer(part) for part in result],
            _threads(),
        )
        return result

    def quantize_columns_cpp(
        block: Tensor, upper: Tensor, scale: Tensor, inverse: Tensor, zero: Tensor, bits: int
    ) -> tuple[Tensor, Tensor]:
        rows = {"scale": scale, "inverse": inverse, "zero": zero}
        ops.check_columns("quantize_columns", block, upper, rows, bits)
        return _columns(library.aq_quantize_columns, block, (upper, *rows.values()), bits)

    def quantize_columns_r2q_cpp(
        block: Tensor, upper: Tensor, mu: Tensor, a1: Tensor, a2: Tensor, inverse: Tensor, bits: int
    ) -> tuple[Tensor, Tensor]:
        rows = {"mu": mu, "a1": a1, "a2": a2, "inverse": inverse}
        ops.check_columns("quantize_columns_r2q", block, upper, rows, bits)
        return _columns(library.aq_quantize_columns_r2q, block, (upper, *rows.values()), bits)

    def descend_columns_cpp(
        codes: Tensor, pull: Tensor, gram: Tensor, mu: Tensor, a1: Tensor, a2: Tensor, inverse: Tensor, bits: int
    ) -> Tensor:
        rows = {"mu": mu, "a1": a1, "a2": a2, "inverse": inverse}
        ops.check_descent(codes, pull, gram, rows, bits)
        given = [tensor.contiguous() for tensor in (codes, pull, gram, *rows.values())]
        found = torch.empty_like(given[0])
        pointers = [pointer(tensor) for tensor in given]
        library.aq_descend_columns(*pointers, *_sizes(*codes.shape), bits, pointer(found), _threads())
        return found

    def fit_residual_cpp(
        weights: Tensor,
        importance: Tensor | None,
        mu: Tensor,
        a1: Tensor,
        a2: Tensor,
        bits: int,
        symmetric: bool,
        rounds: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ops.check_residual_fit(weights, importance, {"mu": mu, "a1": a1, "a2": a2}, bits, rounds)
        given = [None if one is None else one.contiguous() for one in (weights, importance, mu, a1, a2)]
        found = ops.empty_residual(weights)
        library.aq_fit_residual(
            *[None if one is None else pointer(one) for one in given],
            *_sizes(*weights.shape),
            len(mu),
            bits,
            int(symmetric),
            rounds,
            *[pointer(part) for part in found],
            _threads(),
        )
        return found

    ops.register_kernel("fit_residual", "CPU", fit_residual_cpp)
    ops.register_kernel("fit_grid", "CPU", fit_grid_cpp)
    ops.register_kernel("descend_columns", "CPU", descend_columns_cpp)
    ops.register_kernel("quantize_columns", "CPU", quantize_columns_cpp)
    ops.register_kernel("quantize_columns_r2q", "CPU", quantize_columns_r2q_cpp)


def _columns(kernel: Callable[..., None], block: Tensor, others: Sequence[Tensor], bits: int) -> tuple[Tensor, Tensor]:
    """Codes and errors of a column loop."""
    given = [tensor.contiguous() for tensor in (block, *others)]
    result = ops.empty_columns(given[0])
    pointers = [pointer(tensor) for tensor in given]
    kernel(*pointers, *_sizes(*block.shape), bits, *[pointer(part) for part in result], _threads())
    return result


def _register_hadamard(library: ctypes.CDLL) -> None:
    def hadamard_cpp(x: Tensor, block: int) -> Tensor:
        ops.check_hadamard(x, block)
        source = x.contiguous()
        turned = torch.empty_like(source)
        library.aq_hadamard(pointer(source), pointer(turned), *_sizes(x.numel() // block, block), _threads())
        return turned

    ops.register_kernel("hadamard", "CPU", hadamard_cpp)


def _sizes(rows: int, columns: int) -> tuple[ctypes.c_int64, ctypes.c_int64]:
    return ctypes.c_int64(rows), ctypes.c_int64(columns)


def wanted_library() -> ctypes.CDLL | None:
    """The C++ kernels; None where ARROW_QUANT_KERNELS=reference, or, with a warning, where they were not built.

    Raises:
        ConfigurationError: ARROW_QUANT_KERNELS or ARROW_QUANT_ISA has a value that is not allowed.
    """
    wanted = os.environ.get("ARROW_QUANT_KERNELS", "native")
    if wanted not in {"native", "reference"}:
        raise ConfigurationError(f"ARROW_QUANT_KERNELS is {wanted!r}; allowed: native, reference")
    if wanted == "reference":
        return None
    path = find_library()
    if path is None:
        warnings.warn(
            "arrow_quant_v2 was installed without its C++ kernels: the PyTorch reference runs, with the same results"
            " but slower; install a C++ compiler and reinstall to change that",
            stacklevel=2,
        )
    return None if path is None else load_library(path)


def _register_cuda() -> None:
    """Let the dispatcher use the Triton kernel for CUDA tensors; without Triton, with a warning, the reference."""
    try:
        from arrow_quant_v2.kernels import triton_cuda  # noqa: PLC0415 - takes a second, and a GPU
    except ImportError:
        warnings.warn(
            "Triton is not installed: the PyTorch reference runs on the GPU, with the same results but slower;"
            " pip install triton",
            stacklevel=2,
        )
    else:
        triton_cuda.register()


@cache
def _activate() -> str:
    library = wanted_library()
    if torch.cuda.is_available() and os.environ.get("ARROW_QUANT_KERNELS") != "reference":
        _register_cuda()
    if library is None:
        return "reference"
    register(library)
    if sys.platform == "linux":
        share_team(library, Path(torch.__file__).parent)
    return str(library.aq_isa().decode())


def activate() -> str:
    """Register the C++ kernels, and Triton's where there is a GPU, the first time that it is called.

    The result is the name of what was chosen for the CPU.

    Raises:
        ConfigurationError: ARROW_QUANT_KERNELS or ARROW_QUANT_ISA has a value that is not allowed.
    """
    with _one_at_a_time:
        return _activate()

"""Rounding of one weight by llama.cpp's own ggml_quantize_chunk, in xllamacpp's library. Knows no files or clocks."""

import ctypes
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch
import xllamacpp
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor
from with_gguf import Quantized, restore, stored

__all__ = ["quantize", "restore", "stored"]

# What llama.cpp takes where rows do not split into blocks of 256 (tensor_type_fallback in llama-quant.cpp)
RAGGED = {"Q2_K": "IQ4_NL", "Q3_K": "IQ4_NL", "IQ2_S": "IQ4_NL", "Q4_K": "Q5_0"}


@cache
def library() -> ctypes.CDLL:
    found = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
    found.ggml_quantize_init.argtypes = [ctypes.c_int]
    found.ggml_quantize_chunk.restype = ctypes.c_size_t
    found.ggml_quantize_chunk.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    return found


def quantize(weight: Tensor, bits: int, kind: str, products: Tensor | None = None) -> Quantized:  # noqa: ARG001
    """With an importance matrix, the mean squares of the inputs, where `products` are given."""
    if weight.shape[1] % GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0]:
        kind = RAGGED[kind]
    found = GGMLQuantizationType[kind]
    block, size = GGML_QUANT_SIZES[found]
    rows, columns = weight.shape
    if columns % block:
        raise ValueError(f"{columns} columns do not split into blocks of {block}")
    given, out = np.ascontiguousarray(weight.numpy()), np.empty((rows, columns // block * size), np.uint8)
    squares = None if products is None else np.ascontiguousarray(products.diagonal().numpy())
    pointer = None if squares is None else squares.ctypes.data
    library().ggml_quantize_init(int(found))

    def chunk(start: int, stop: int) -> None:
        at = int(found), given.ctypes.data, out.ctypes.data, start * columns
        library().ggml_quantize_chunk(*at, stop - start, columns, pointer)

    edges = np.linspace(0, rows, torch.get_num_threads() + 1).astype(int).tolist()
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(chunk, edges, edges[1:]))
    return Quantized(torch.from_numpy(out), found)

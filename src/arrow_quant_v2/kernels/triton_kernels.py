"""The Triton kernel that multiplies inputs with codes as they are stored; knows no torch and chooses no sizes.

Inside a group a weight is affine in its code, so a tile needs no weights: with c = code - 2^(bits-1) the products x c
are added up as the hardware does it for 8 or 16 bits, in which c is exact; scale, zero point and the sum of x come in
afterwards, in float32. On the r2q grid there are two such products: with the sign of the code's highest bit, and with
its other bits.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def codes_of(codes_ptr, n, k, inside, row_bytes, BITS: tl.constexpr):
    """Codes (k, n) int32 from packed rows, lowest bits first; 0 outside."""
    PER_BYTE: tl.constexpr = 8 // BITS
    place = n[None, :].to(tl.int64) * row_bytes + (k // PER_BYTE)[:, None]
    packed = tl.load(codes_ptr + place, mask=inside, other=0).to(tl.int32)
    return (packed >> ((k % PER_BYTE) * BITS)[:, None]) & ((1 << BITS) - 1)


@triton.jit
def scale_at(scales_ptr, row_scale, place, inside):
    """Stored scales at these places: row_scale (scale / 255)^2."""
    root = tl.load(scales_ptr + place, mask=inside, other=0).to(tl.float32) / 255.0
    return row_scale * root * root


@triton.jit
def zero_at(zeros_ptr, place, inside, BITS: tl.constexpr, SYMMETRIC: tl.constexpr):
    """Zero points at these places, less 2^(bits-1)."""
    if SYMMETRIC:
        return place * 0.0
    STEPS: tl.constexpr = 255 // ((1 << BITS) - 1)
    return tl.load(zeros_ptr + place, mask=inside, other=0).to(tl.float32) / STEPS - (1 << (BITS - 1))


@triton.jit
def mean_at(zeros_ptr, place, inside, a1, a2, BITS: tl.constexpr, SYMMETRIC: tl.constexpr):
    """The means mu of groups on the r2q grid."""
    if SYMMETRIC:
        return place * 0.0
    share = (255.0 - 2.0 * tl.load(zeros_ptr + place, mask=inside, other=0).to(tl.float32)) / 255.0
    return (a1 + ((1 << (BITS - 1)) - 1) * a2) * share


@triton.jit
def high_of(code, BITS: tl.constexpr):
    """1 where the highest bit of a code is set, otherwise -1."""
    return 2 * (code >> (BITS - 1)) - 1


@triton.jit
def low_of(code, BITS: tl.constexpr):
    """2 low - m of the other bits: odd numbers from -m to m."""
    LARGEST: tl.constexpr = (1 << (BITS - 1)) - 1
    return 2 * (code & LARGEST) - LARGEST


@triton.jit
def multiplied(x, part, offset, INTEGER: tl.constexpr, WIDE: tl.constexpr):
    """Products (m, n) float32 of inputs (m, k) and whole numbers (k, n); of x + offset where inputs are integers.

    All of these numbers are exact in 16 bits; WIDE multiplies them in float32, for an interpreter without bfloat16.
    """
    if INTEGER:
        return (tl.dot(x, part.to(tl.int8)) + offset * tl.sum(part, axis=0)[None, :]).to(tl.float32)
    if WIDE:
        return tl.dot(x.to(tl.float32), part.to(tl.float32), input_precision="ieee")
    return tl.dot(x, part.to(x.dtype), input_precision="ieee")


@triton.jit
def weights_at(
    code,
    scales_ptr,
    zeros_ptr,
    row_scale,
    n,
    k,
    inside,
    groups,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SYMMETRIC: tl.constexpr,
):
    """Weights (k, n) float32, each with the parameters of its own group."""
    place = n[None, :] * groups + (k // GROUP)[:, None]
    if RESIDUAL:
        a1 = scale_at(scales_ptr, row_scale[None, :], 2 * place, inside)
        a2 = scale_at(scales_ptr, row_scale[None, :], 2 * place + 1, inside)
        mu = mean_at(zeros_ptr, place, inside, a1, a2, BITS, SYMMETRIC)
        weight = mu + a1 * high_of(code, BITS) + a2 * low_of(code, BITS)
    else:
        zero = zero_at(zeros_ptr, place, inside, BITS, SYMMETRIC)
        scale = scale_at(scales_ptr, row_scale[None, :], place, inside)
        weight = (code - (1 << (BITS - 1)) - zero) * scale
    return tl.where(inside, weight, 0.0)


@triton.jit
def summed(x, in_k, offset, INTEGER: tl.constexpr):
    """Sums (m,) float32 over the columns of inputs (m, k); of x + offset where inputs are integers."""
    if INTEGER:
        return (tl.sum(x.to(tl.int32), axis=1) + offset * tl.sum(in_k.to(tl.int32), axis=0)).to(tl.float32)
    return tl.sum(x.to(tl.float32), axis=1)


@triton.jit
def in_one_group(
    x,
    code,
    inside,
    in_k,
    in_n,
    scales_ptr,
    zeros_ptr,
    row_scale,
    place,
    offset,
    BITS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    INTEGER: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Products (m, n) float32 with weights of one group each, whose parameters lie at `place` (n,)."""
    sums = summed(x, in_k, offset, INTEGER)[:, None]
    if RESIDUAL:
        a1 = scale_at(scales_ptr, row_scale, 2 * place, in_n)
        a2 = scale_at(scales_ptr, row_scale, 2 * place + 1, in_n)
        mu = mean_at(zeros_ptr, place, in_n, a1, a2, BITS, SYMMETRIC)
        high = multiplied(x, tl.where(inside, high_of(code, BITS), 0), offset, INTEGER, WIDE)
        low = multiplied(x, tl.where(inside, low_of(code, BITS), 0), offset, INTEGER, WIDE)
        return mu[None, :] * sums + a1[None, :] * high + a2[None, :] * low
    zero = zero_at(zeros_ptr, place, in_n, BITS, SYMMETRIC)
    scale = scale_at(scales_ptr, row_scale, place, in_n)
    centred = multiplied(x, tl.where(inside, code - (1 << (BITS - 1)), 0), offset, INTEGER, WIDE)
    return (centred - zero[None, :] * sums) * scale[None, :]


@triton.jit
def product(
    x_ptr,
    steps_ptr,
    codes_ptr,
    scales_ptr,
    zeros_ptr,
    row_scales_ptr,
    bias_ptr,
    out_ptr,
    m_size,
    n_size,
    k_size,
    row_bytes,
    groups,
    step_groups,
    offset,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    STEP_GROUP: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    INTEGER: tl.constexpr,
    ONE_GROUP: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile (BLOCK_M, BLOCK_N) of x W^T + bias, added up in float32.

    x (m, k) floats; or int8 with steps (m, step_groups) float32, where the input is (x + offset) step. Where
    ONE_GROUP, BLOCK_K columns lie in one group; otherwise every weight looks for its own.
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_m, in_n = m < m_size, n < n_size
    row_scale = tl.load(row_scales_ptr + n, mask=in_n, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, k_size, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        in_k = k < k_size
        inside = in_k[:, None] & in_n[None, :]
        code = codes_of(codes_ptr, n, k, inside, row_bytes, BITS)
        x = tl.load(x_ptr + m[:, None].to(tl.int64) * k_size + k[None, :], mask=in_m[:, None] & in_k[None, :], other=0)
        if ONE_GROUP:
            tile = in_one_group(
                x,
                code,
                inside,
                in_k,
                in_n,
                scales_ptr,
                zeros_ptr,
                row_scale,
                n * groups + start // GROUP,
                offset,
                BITS,
                RESIDUAL,
                SYMMETRIC,
                INTEGER,
                WIDE,
            )
            if INTEGER:
                step = tl.load(steps_ptr + m * step_groups + start // STEP_GROUP, mask=in_m, other=0.0)
                tile *= step[:, None]
            total += tile
        else:
            weight = weights_at(
                code, scales_ptr, zeros_ptr, row_scale, n, k, inside, groups, BITS, GROUP, RESIDUAL, SYMMETRIC
            )
            total += tl.dot(x.to(tl.float32), weight, input_precision="ieee")
    if HAS_BIAS:
        total += tl.load(bias_ptr + n, mask=in_n, other=0.0).to(tl.float32)[None, :]
    place = m[:, None].to(tl.int64) * n_size + n[None, :]
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=in_m[:, None] & in_n[None, :])

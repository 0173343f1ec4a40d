"""What every operation on codes means, in plain torch, bit for bit; knows nothing of speed.

All sums run in float32 lanes that are folded in halves, in blocks of columns that go on in float64, so that a vector
kernel can repeat them exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn.functional import pad

from arrow_quant_v2.packed import WHOLE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

LANES = 16
BLOCK = 512
BLOCKS = 64
ROUNDER = 1.5 * 2.0**23  # around it the numbers of float32 are the whole ones
SMALLEST_ROW_SCALE = 2.0**-100
SMALLEST_STEP = 2.0**-126
FLAT = 2.0**-16  # codes of a smaller variance, relative to their squares, are all the same but for rounding
LARGEST_BFLOAT16 = 0x7F7F
LARGEST_ROW_SCALE = (2.0 - 2.0**-7) * 2.0**127  # the same as a number


def row_bytes(columns: int, bits: int) -> int:
    """Bytes of a packed row: every row starts on a byte."""
    return -(-columns * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """(rows, columns) uint8 codes -> (rows, row_bytes) uint8; code 0 sits in the lowest bits of byte 0."""
    per_byte = 8 // bits
    rows, columns = codes.shape
    in_row = row_bytes(columns, bits)
    padded = pad(codes, (0, in_row * per_byte - columns))
    fields = padded.reshape(rows, in_row, per_byte).to(torch.int32)
    shifts = torch.arange(per_byte, dtype=torch.int32, device=codes.device) * bits
    return (fields << shifts).sum(dim=-1).to(torch.uint8)


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """(rows, row_bytes) uint8 -> (rows, columns) uint8, the inverse of `pack`."""
    shifts = torch.arange(0, 8, bits, dtype=torch.int32, device=packed.device)
    fields = packed.to(torch.int32)[..., None] >> shifts  # (rows, row_bytes, per_byte)
    codes: Tensor = (fields & (2**bits - 1)).to(torch.uint8)
    return codes.flatten(1)[:, :columns].contiguous()


def scale_of(scales: Tensor, row_scales: Tensor) -> Tensor:
    """(rows, groups) uint8 codes and (rows,) bfloat16 -> (rows, groups) float32: row_scale * (code / 255)^2."""
    squares = scales.to(torch.float32) * scales.to(torch.float32)
    return row_scales.to(torch.float32)[:, None] * (squares / 65025.0)


def zero_of(zero_points: Tensor, scales: Tensor, bits: int) -> Tensor:
    """(rows, groups) uint8 codes -> (rows, groups) float32 zero points; an empty tensor means symmetric."""
    if zero_points.numel() == 0:
        return torch.full(scales.shape, float(2 ** (bits - 1)), device=scales.device)
    return zero_points.to(torch.float32) / float(255 // (2**bits - 1))


def per_column(parameters: Tensor, group_size: int, columns: int) -> Tensor:
    """(rows, groups) -> (rows, columns): every column gets its group's parameter."""
    return parameters.repeat_interleave(group_size, dim=1)[:, :columns]


def dequantize(
    codes: Tensor,
    scales: Tensor,
    zero_points: Tensor,
    row_scales: Tensor,
    bits: int,
    columns: int,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """(rows, row_bytes) packed codes and their parameters -> (rows, columns): (code - zero_point) * scale."""
    group_size = min(group_size, columns)
    scale = per_column(scale_of(scales, row_scales), group_size, columns)
    zero = per_column(zero_of(zero_points, scales, bits), group_size, columns)
    return ((unpack(codes, bits, columns).to(torch.float32) - zero) * scale).to(dtype)


class Residual(NamedTuple):
    """The r2q grid of some groups, float32: levels mu +- a1 + a2 k, k odd from -m to m, where m = 2^(bits-1) - 1."""

    mu: Tensor
    a1: Tensor
    a2: Tensor


def largest_low(bits: int) -> int:
    """M = 2^(bits-1) - 1, the largest number in the lower bits of a code."""
    return int(2 ** (bits - 1) - 1)


def residual_of(scales: Tensor, zero_points: Tensor, row_scales: Tensor, bits: int) -> Residual:
    """(rows, 2 groups) and (rows, groups) uint8 codes, (rows,) bfloat16 -> (rows, groups) each, in float32.

    a = row_scale * (code / 255)^2 and mu = (a1 + m a2) * ((255 - 2 zero_point) / 255), or 0 without zero points.
    """
    pairs = scale_of(scales, row_scales).unflatten(1, (-1, 2))
    a1, a2 = pairs[..., 0], pairs[..., 1]
    if not zero_points.numel():
        return Residual(mu=torch.zeros_like(a1), a1=a1, a2=a2)
    share = (255.0 - 2.0 * zero_points.to(torch.float32)) / 255.0
    return Residual(mu=(a1 + float(largest_low(bits)) * a2) * share, a1=a1, a2=a2)


def residual_level(codes: Tensor, grid: Residual, bits: int) -> Tensor:
    """What codes mean on a grid that broadcasts with them: (mu +- a1) + a2 (2 low - m)."""
    m = largest_low(bits)
    centre = torch.where(codes > m, grid.mu + grid.a1, grid.mu - grid.a1)
    low = (codes & m).to(torch.float32)
    return centre + grid.a2 * (2.0 * low - float(m))


def inverse_of(a2: Tensor) -> Tensor:
    """1 / (2 a2), or 0 where a2 is."""
    return torch.where(a2 > 0.0, 0.5 / torch.where(a2 > 0.0, a2, 1.0), 0.0)


def residual_codes(weight: Tensor, grid: Residual, inverse: Tensor, bits: int) -> Tensor:
    """The nearest codes, uint8; inverse is 1 / (2 a2), or 0 where a2 is.

    The upper half of the levels lies above mu and the lower half below, because a1 >= m a2.
    """
    m = largest_low(bits)
    top = weight >= grid.mu
    centre = torch.where(top, grid.mu + grid.a1, grid.mu - grid.a1)
    low = rounded((weight - centre) * inverse + 0.5 * m, float(m))
    return (low + torch.where(top, float(m + 1), 0.0)).to(torch.uint8)


def dequantize_r2q(
    codes: Tensor,
    scales: Tensor,
    zero_points: Tensor,
    row_scales: Tensor,
    bits: int,
    columns: int,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """(rows, row_bytes) packed codes and their r2q parameters -> (rows, columns) of `dtype`."""
    group_size = min(group_size, columns)
    grid = residual_of(scales, zero_points, row_scales, bits)
    wide = Residual(*(per_column(part, group_size, columns) for part in grid))
    return residual_level(unpack(codes, bits, columns), wide, bits).to(dtype)


def hadamard(x: Tensor, block: int) -> Tensor:
    """(..., columns) float32: the last axis in blocks, each times Sylvester's matrix over the root of its size."""
    blocks = x.reshape(-1, block)
    half = 1
    while half < block:
        pairs = blocks.reshape(-1, block // (2 * half), 2, half)
        first, second = pairs[:, :, 0], pairs[:, :, 1]
        blocks = torch.stack([first + second, first - second], dim=2).reshape(-1, block)
        half *= 2
    return (blocks * (1.0 / math.sqrt(block))).reshape(x.shape)


def lane_sum(values: Tensor) -> Tensor:
    """(..., n) float32 -> (...) float64, added in lanes and blocks; zeros added at the end change nothing."""
    return _in_order(folded(lane_blocks(values)))


def lane_blocks(values: Tensor) -> Tensor:
    """(..., n) float32 -> (..., blocks, 8): sixteen columns added in pairs i and i + 8, then blocks of 512 of them."""
    block = BLOCK if values.shape[-1] > BLOCK else -(-values.shape[-1] // LANES) * LANES
    padded = pad(values, (0, -values.shape[-1] % block))
    lanes = padded.reshape(*values.shape[:-1], -1, block // LANES, 2, LANES // 2)  # (..., blocks, steps, pair, lanes)
    return _in_order((lanes[..., 0, :] + lanes[..., 1, :]).transpose(-1, -2))


def folded(lanes: Tensor) -> Tensor:
    """(..., 8) float32 -> (...) float64: lane i meets lane i + 4, then i + 2, i + 1."""
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes[..., 0].to(torch.float64)


def _in_order(terms: Tensor) -> Tensor:
    """(..., n) -> (...): the sum from the first to the last, in this order."""
    total = terms[..., 0]
    for i in range(1, terms.shape[-1]):
        total = total + terms[..., i]
    return total


def split_groups(weight: Tensor, group_size: int) -> Tensor:
    """(rows, columns) -> (rows, groups, group_size), the ragged tail padded with zeros."""
    return pad(weight, (0, -weight.shape[1] % group_size)).reshape(weight.shape[0], -1, group_size)


@dataclass(frozen=True, kw_only=True, eq=False)
class Fit:
    """What a method wants of each group, before parameters are stored; every tensor is (rows, groups) float32.

    zero_point = mean_q - mean_w * full / scale, where scale is what `step` becomes when it is stored.
    """

    step: Tensor
    full: Tensor
    mean_q: Tensor
    mean_w: Tensor


def cover(groups: Tensor, bits: int, symmetric: bool) -> Fit:
    """The smallest step whose grid covers each group; 0.0 always lies in the range. groups: (rows, n, group_size)."""
    low = groups.amin(dim=-1).clamp(max=0.0)
    high = groups.amax(dim=-1).clamp(min=0.0)
    if symmetric:
        step = torch.maximum(high, -low) / float(2 ** (bits - 1) - 1)
    else:
        step = high * (1.0 / (2**bits - 1)) - low * (1.0 / (2**bits - 1))
    full = torch.where(high > low, step.clamp(min=SMALLEST_STEP), 0.0)
    if symmetric:
        middle = torch.full_like(full, float(2 ** (bits - 1)))
        return Fit(step=full, full=full, mean_q=middle, mean_w=torch.zeros_like(full))
    offset = torch.where(full > 0.0, low / torch.where(full > 0.0, full, 1.0), 0.0)
    return Fit(step=full, full=full, mean_q=torch.zeros_like(full), mean_w=offset)


def clip_search(
    groups: Tensor, mask: Tensor, cover_all: Fit, bits: int, symmetric: bool, stretches: Sequence[float]
) -> Fit:
    """The clipping ratio whose codes, refitted by least squares weighted with `mask`, explain most of each group.

    A stretch is 1 / clipping ratio. Symmetric codes are counted from the middle one, where their zero point stays.
    """
    full = cover_all.full
    units = groups * torch.where(full > 0.0, 1.0 / torch.where(full > 0.0, full, 1.0), 0.0)[..., None]
    middle = float(2 ** (bits - 1))
    zero = torch.full_like(full, middle) if symmetric else 0.0 - cover_all.mean_w
    mass, sum_w = lane_sum(mask), lane_sum(mask * units)
    fit, best = cover_all, torch.full_like(mass, -torch.inf)
    for stretch in stretches:
        codes = rounded(units * stretch + zero[..., None], float(2**bits - 1)) - (middle if symmetric else 0.0)
        weighted = codes * mask
        sum_q, sum_qq, sum_qw = lane_sum(weighted), lane_sum(weighted * codes), lane_sum(weighted * units)
        line = least_squares(sum_q, sum_qq, sum_qw, sum_w, mass, last_zero=0.0 if symmetric else float(2**bits - 1))
        better = line.gain > best
        best = torch.where(better, line.gain, best)
        step = (line.slope * full.to(torch.float64)).to(torch.float32).clamp(min=SMALLEST_STEP)
        fit = Fit(
            step=torch.where(better, step, fit.step),
            full=full,
            mean_q=torch.where(better, line.mean_q.to(torch.float32), fit.mean_q),
            mean_w=torch.where(better, line.mean_w.to(torch.float32), fit.mean_w),
        )
    return fit


@dataclass(frozen=True, kw_only=True, eq=False)
class Line:
    """w = slope (q - mean_q) + mean_w, and the squares that it explains beyond the mean; (rows, groups) float64.

    The gain is -inf where the codes tell nothing of the weights.
    """

    slope: Tensor
    mean_q: Tensor
    mean_w: Tensor
    gain: Tensor


def least_squares(sum_q: Tensor, sum_qq: Tensor, sum_qw: Tensor, sum_w: Tensor, mass: Tensor, last_zero: float) -> Line:
    """The line through codes q and weights w that leaves the least squares, its zero point within [0, last_zero].

    The free line has slope cov(q, w) / var(q) and zero point mean_q - mean_w / slope. Where that lies outside, or the
    codes do not vary, the best zero point is the end that the weights lean away from, and the line pivots there.
    """
    mean_q, mean_w = sum_q * mass.reciprocal(), sum_w / mass
    variance, covariance = sum_qq - sum_q * mean_q, sum_qw - sum_w * mean_q
    zero = mean_q * covariance - mean_w * variance  # times covariance
    varies = (variance > FLAT * sum_qq) & (covariance > 0.0)
    free = varies & (zero >= 0.0) & (zero <= last_zero * covariance)
    end = torch.where(sum_w < 0.0, last_zero, 0.0)
    variance = torch.where(free, variance, sum_qq - end * (2.0 * sum_q - end * mass))
    covariance = torch.where(free, covariance, sum_qw - end * sum_w)
    gain = covariance * covariance / variance - torch.where(free, 0.0, sum_w * mean_w)
    return Line(
        slope=covariance / variance,
        mean_q=torch.where(free, mean_q, end),
        mean_w=torch.where(free, mean_w, 0.0),
        gain=torch.where((variance > 0.0) & (covariance > 0.0), gain, -torch.inf),
    )


def up_to_bfloat16(values: Tensor) -> Tensor:
    """The smallest bfloat16 that is not below each positive float32 (the largest finite one at the top)."""
    upper = (values.view(torch.int32) + 0xFFFF) >> 16
    return (upper.clamp(max=LARGEST_BFLOAT16) << 16).view(torch.float32).to(torch.bfloat16)


def only_scales(step: Tensor, *, cover_all: bool) -> Tensor:
    """(rows,) steps of rows that are one group each -> bfloat16: the nearest, or the next that is not below.

    With no scale under it, it may be as small as a step.
    """
    step = torch.where(step > SMALLEST_STEP, step, SMALLEST_STEP)
    return up_to_bfloat16(step) if cover_all else step.to(torch.bfloat16).clamp(max=LARGEST_ROW_SCALE)


def rounded(codes: Tensor, max_code: float) -> Tensor:
    """Clip to [0, max_code], then round half to even; NaN, which no caller lets through, becomes 0."""
    return codes.nan_to_num(nan=0.0).clamp(0.0, max_code).round()


def stored_scales(step: Tensor, *, cover_all: bool) -> tuple[Tensor, Tensor]:
    """(rows, groups) steps -> uint8 codes and (rows,) bfloat16 row scales; the code of an only group is 255."""
    if step.shape[1] == 1:
        return torch.full_like(step, WHOLE, dtype=torch.uint8), only_scales(step[:, 0], cover_all=cover_all)
    row_scales = up_to_bfloat16(step.amax(dim=1).clamp(min=SMALLEST_ROW_SCALE))
    return scale_codes(step, row_scales, cover_all=cover_all), row_scales


def scale_codes(step: Tensor, row_scales: Tensor, *, cover_all: bool) -> Tensor:
    """(rows, groups) steps -> uint8 codes; round to nearest needs scales that are not below the steps."""
    squares = step / row_scales.to(torch.float32)[:, None]
    roots = squares.to(torch.float64).sqrt().to(torch.float32) * 255.0  # torch's float32 sqrt may be an ulp off
    whole = roots.ceil() if cover_all else roots.round()
    return torch.where(step > 0.0, whole.clamp(1.0, 255.0), 0.0).to(torch.uint8)


def zero_codes(fit: Fit, inverse: Tensor, bits: int, *, whole: bool) -> Tensor:
    """(rows, groups) uint8 codes of the zero points; whole zero points put 0.0 exactly on a code."""
    zeros = torch.where(inverse > 0.0, fit.mean_q - fit.mean_w * (fit.full * inverse), 0.0)
    zeros = zeros.nan_to_num(nan=0.0).clamp(0.0, float(2**bits - 1))
    zeros = zeros.round() if whole else zeros
    return (zeros * float(255 // (2**bits - 1))).round().to(torch.uint8)


def fit_grid(
    weight: Tensor,
    bits: int,
    group_size: int,
    symmetric: bool,
    stretches: Sequence[float],
    importance: Tensor | None,
) -> Fit:
    """What `quantize` would store for each group, before it is stored; see ops.fit_grid."""
    columns = weight.shape[1]
    group_size = min(group_size, columns)
    groups = split_groups(weight.to(torch.float32), group_size)
    fit = cover(groups, bits, symmetric)
    if not stretches:
        return fit
    mask = torch.ones(columns, device=weight.device) if importance is None else importance.to(torch.float32)
    return clip_search(groups, split_groups(mask[None], group_size), fit, bits, symmetric, stretches)


def quantize_columns(
    block: Tensor, upper: Tensor, scale: Tensor, inverse: Tensor, zero: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    """The column loop of GPTQ within one group: (rows, n) codes and errors; see ops.quantize_columns."""
    weights, errors = block.clone(), torch.empty_like(block)
    codes = torch.empty_like(block, dtype=torch.uint8)
    for t in range(block.shape[1]):
        w = weights[:, t]
        q = rounded(w * inverse + zero, float(2**bits - 1))
        e = (w - (q - zero) * scale) / upper[t, t]
        codes[:, t], errors[:, t] = q.to(torch.uint8), e
        weights[:, t + 1 :] = weights[:, t + 1 :] - e[:, None] * upper[t, t + 1 :]
    return codes, errors


def quantize_columns_r2q(
    block: Tensor, upper: Tensor, mu: Tensor, a1: Tensor, a2: Tensor, inverse: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    """The same on the r2q grid: (rows, n) codes and errors; see ops.quantize_columns_r2q."""
    weights, errors = block.clone(), torch.empty_like(block)
    codes, grid = torch.empty_like(block, dtype=torch.uint8), Residual(mu=mu, a1=a1, a2=a2)
    for t in range(block.shape[1]):
        w = weights[:, t]
        q = residual_codes(w, grid, inverse, bits)
        e = (w - residual_level(q, grid, bits)) / upper[t, t]
        codes[:, t], errors[:, t] = q, e
        weights[:, t + 1 :] = weights[:, t + 1 :] - e[:, None] * upper[t, t + 1 :]
    return codes, errors


def descend_columns(codes: Tensor, pull: Tensor, gram: Tensor, grid: Residual, inverse: Tensor, bits: int) -> Tensor:
    """Coordinate descent over the codes (rows, n) of one group, grid of (rows,); see ops.descend_columns."""
    found, pull = codes.clone(), pull.clone()
    for t in range(codes.shape[1]):
        before = residual_level(codes[:, t], grid, bits)
        found[:, t] = residual_codes(before + pull[:, t] / gram[t, t], grid, inverse, bits)
        change = before - residual_level(found[:, t], grid, bits)
        pull[:, t + 1 :] = pull[:, t + 1 :] + change[:, None] * gram[t, t + 1 :]
    return found


def quantize(
    weight: Tensor,
    bits: int,
    group_size: int,
    symmetric: bool,
    stretches: Sequence[float],
    importance: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Round to nearest (no stretches) or clip search with least-squares refit; see ops.quantize."""
    columns = weight.shape[1]
    fit = fit_grid(weight, bits, group_size, symmetric, stretches, importance)
    group_size = min(group_size, columns)
    groups = split_groups(weight.to(torch.float32), group_size)
    present = split_groups(torch.ones(1, columns, device=weight.device), group_size)
    scales, row_scales = stored_scales(fit.step, cover_all=not stretches)
    scale = scale_of(scales, row_scales)
    inverse = torch.where(scales > 0, 1.0 / torch.where(scales > 0, scale, 1.0), 0.0)
    zero_points = torch.empty(weight.shape[0], 0, dtype=torch.uint8, device=weight.device)
    if not symmetric:
        zero_points = zero_codes(fit, inverse, bits, whole=not stretches)
    scaled, zero = groups * inverse[..., None], zero_of(zero_points, scales, bits)[..., None]
    if not stretches:
        codes, levels = covered(scaled, zero, bits)
    elif symmetric:
        codes, levels = clipped(scaled, zero, bits)
    else:
        codes = rounded(scaled + zero, float(2**bits - 1))
        levels = codes - zero
    sums = error_sums(scaled, levels * present, scales, row_scales)
    return pack(codes.to(torch.uint8).flatten(1)[:, :columns], bits), scales, zero_points, row_scales, sums


def covered(scaled: Tensor, zero: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes and levels (code - zero point) nearest to weights in units of their scale, on a grid that covers them.

    A whole zero point and ROUNDER make one exact number: adding it rounds once, half to even. Only a rounding error can
    push a code over the end; it is put back, and its level counts as it was: half a step off either way.
    """
    anchor = zero + ROUNDER
    shifted = scaled + anchor
    return (shifted - ROUNDER).nan_to_num(nan=0.0).clamp(0.0, float(2**bits - 1)), shifted - anchor


def clipped(scaled: Tensor, zero: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The same on a grid that does not cover all weights; its zero point is whole."""
    anchor, last = zero + ROUNDER, ROUNDER + float(2**bits - 1)
    shifted = (scaled + anchor).nan_to_num(nan=ROUNDER).clamp(ROUNDER, last)
    return shifted - ROUNDER, shifted - anchor


def error_sums(scaled: Tensor, levels: Tensor, scales: Tensor, row_scales: Tensor) -> Tensor:
    """(rows, 3) float64: sum w^2, sum q^2, sum (w - q)^2 of a row, from (rows, groups, group_size) in units of scale.

    Lanes of a block are weighted with (scale / row_scale)^2 and added over the row, 64 blocks in float32 at a time.
    """
    shares = scales.to(torch.float32) * scales.to(torch.float32) / 65025.0  # (rows, groups)
    row_square = row_scales.to(torch.float64) * row_scales.to(torch.float64)
    sums = []
    for terms in (scaled, levels, scaled - levels):
        blocks = lane_squares(terms)  # (rows, groups, blocks, lanes)
        factors = (shares * shares)[..., None, None].expand_as(blocks)
        sums.append(row_square * _in_order(folded(_fused_sum(_chunked(blocks), _chunked(factors)))))
    return torch.stack(sums, dim=1)


def lane_squares(values: Tensor) -> Tensor:
    """(..., n) float32 -> (..., blocks, 8): squares in sixteen lanes, blocks of 512 columns, then lanes i and i + 8."""
    block = BLOCK if values.shape[-1] > BLOCK else -(-values.shape[-1] // LANES) * LANES
    padded = pad(values, (0, -values.shape[-1] % block))
    steps = padded.reshape(*values.shape[:-1], -1, block // LANES, LANES).transpose(-1, -2)
    lanes = _fused_sum(steps, steps)
    return lanes[..., : LANES // 2] + lanes[..., LANES // 2 :]


def _chunked(blocks: Tensor) -> Tensor:
    """(rows, groups, blocks, lanes) -> (rows, chunks, lanes, 64): 64 blocks of a row each, the last filled with 0."""
    in_row = blocks.flatten(1, 2)
    chunks: Tensor = pad(in_row, (0, 0, 0, -in_row.shape[1] % BLOCKS)).unflatten(1, (-1, BLOCKS))
    return chunks.transpose(-1, -2)


def _fused_sum(left: Tensor, right: Tensor) -> Tensor:
    """(..., n) twice -> (...): the sum of products from the first to the last, each rounded once with its addition."""
    total = torch.zeros_like(left[..., 0])
    for i in range(left.shape[-1]):
        total = multiply_add(left[..., i], right[..., i], total)
    return total


def multiply_add(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The float32 a * b + c, rounded once, as processors do it.

    In float64 the product is exact. Where the sum is not, its last bit is made odd, which no float32 and no tie between
    two of them has: so the second rounding goes where a single one would.
    """
    product, more = a.to(torch.float64) * b.to(torch.float64), c.to(torch.float64)
    total = product + more
    part = total - product
    lost = (product - (total - part)) + (more - part)  # what the addition dropped, exactly
    even = (total.view(torch.int64) & 1) == 0
    beyond = torch.nextafter(total, lost.sign() * torch.inf)
    return torch.where(even & (lost.abs() > 0.0), beyond, total).to(torch.float32)

"""Every operation on codes, declared once: schema, shapes and meaning; knows nothing of how a device does it.

PyTorch's dispatcher picks the kernel. What is registered here is the reference of kernels/reference.py, which runs
everywhere; kernels/cpu.py registers the C++ kernels beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from arrow_quant_v2.errors import QuantizationError
from arrow_quant_v2.kernels import reference, residual_fit
from arrow_quant_v2.packed import ROTATIONS, WIDTHS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

MOST_ROUNDS = 1000
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
DEQUANTIZE_SCHEMA = (
    "dequantize(Tensor codes, Tensor scales, Tensor zero_points, Tensor row_scales,"
    " int bits, int columns, int group_size, ScalarType dtype) -> Tensor"
)
QUANTIZE_SCHEMA = (
    "quantize(Tensor weight, int bits, int group_size, bool symmetric, float[] stretches, Tensor? importance=None)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
FIT_GRID_SCHEMA = (
    "fit_grid(Tensor weight, int bits, int group_size, bool symmetric, float[] stretches, Tensor? importance=None)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
QUANTIZE_COLUMNS_SCHEMA = (
    "quantize_columns(Tensor block, Tensor upper, Tensor scale, Tensor inverse, Tensor zero, int bits)"
    " -> (Tensor, Tensor)"
)
DEQUANTIZE_R2Q_SCHEMA = DEQUANTIZE_SCHEMA.replace("dequantize", "dequantize_r2q")
QUANTIZE_COLUMNS_R2Q_SCHEMA = (
    "quantize_columns_r2q(Tensor block, Tensor upper, Tensor mu, Tensor a1, Tensor a2, Tensor inverse, int bits)"
    " -> (Tensor, Tensor)"
)
DESCEND_COLUMNS_SCHEMA = (
    "descend_columns(Tensor codes, Tensor pull, Tensor gram, Tensor mu, Tensor a1, Tensor a2, Tensor inverse, int bits)"
    " -> Tensor"
)
FIT_RESIDUAL_SCHEMA = (
    "fit_residual(Tensor weights, Tensor? importance, Tensor mu, Tensor a1, Tensor a2, int bits, bool symmetric,"
    " int rounds) -> (Tensor, Tensor, Tensor)"
)
Implementation = TypeVar("Implementation", bound=Callable[..., Any])

# Not torch.library.custom_op: its first call loads torch.compile's machinery, 80 MB and more than a second.
_LIBRARY = torch.library.Library("arrow_quant", "DEF")


def operator(schema: str) -> Callable[[Implementation], Implementation]:
    """Declare an op; what is decorated is its meaning on every device, and becomes the op itself."""
    name = schema[: schema.index("(")]

    def declare(meaning: Implementation) -> Implementation:
        _LIBRARY.define(schema)
        _LIBRARY.impl(name, meaning, "CompositeExplicitAutograd")
        op: Implementation = getattr(torch.ops.arrow_quant, name).default
        return op

    return declare


def shapes_of(name: str) -> Callable[[Implementation], Implementation]:
    """State the shapes of an op's results, for torch.compile."""
    declare: Callable[[Implementation], Implementation] = torch.library.register_fake(
        f"arrow_quant::{name}", lib=_LIBRARY
    )
    return declare


def register_gradient(name: str, backward: Callable[..., Any], remember: Callable[..., None]) -> None:
    """State the gradient of an op, whichever kernel computes it."""
    torch.library.register_autograd(f"arrow_quant::{name}", backward, setup_context=remember, lib=_LIBRARY)


def register_kernel(name: str, device: str, kernel: Callable[..., Any]) -> None:
    """Let the dispatcher use this kernel for tensors of the device, "CPU" or "CUDA"."""
    _LIBRARY.impl(name, kernel, device)


@operator("pack(Tensor codes, int bits) -> Tensor")
def pack(codes: Tensor, bits: int) -> Tensor:
    """(rows, columns) uint8 codes -> (rows, ceil(columns * bits / 8)) uint8; code 0 in the lowest bits of byte 0.

    Raises:
        QuantizationError: the width is not 2, 4 or 8, or the codes are not a uint8 matrix.
    """
    check_pack(codes, bits)
    return reference.pack(codes, bits)


@shapes_of("pack")
def _(codes: Tensor, bits: int) -> Tensor:
    return codes.new_empty((codes.shape[0], reference.row_bytes(codes.shape[1], bits)))


@operator("unpack(Tensor packed, int bits, int columns) -> Tensor")
def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """(rows, row_bytes) uint8 -> (rows, columns) uint8 codes, the inverse of `pack`.

    Raises:
        QuantizationError: the width is not 2, 4 or 8, or the bytes of a row do not hold that many columns.
    """
    check_unpack(packed, bits, columns)
    return reference.unpack(packed, bits, columns)


@shapes_of("unpack")
def _(packed: Tensor, bits: int, columns: int) -> Tensor:  # noqa: ARG001 - a shape needs no width
    return packed.new_empty((packed.shape[0], columns))


@operator(DEQUANTIZE_SCHEMA)
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
    """Packed codes and their parameters -> (rows, columns) of `dtype`: (code - zero_point) * scale in float32.

    codes (rows, row_bytes) uint8, scales (rows, groups) uint8, zero_points the same or (rows, 0) for symmetric,
    row_scales (rows,) bfloat16; dtype float32, bfloat16 or float16, rounded half to even.

    Raises:
        QuantizationError: a width, shape or dtype is not one of these.
    """
    check_dequantize("dequantize", codes, scales, zero_points, row_scales, bits, columns, group_size, dtype)
    return reference.dequantize(codes, scales, zero_points, row_scales, bits, columns, group_size, dtype)


@shapes_of("dequantize")
def _(
    codes: Tensor,
    scales: Tensor,  # noqa: ARG001
    zero_points: Tensor,  # noqa: ARG001
    row_scales: Tensor,  # noqa: ARG001
    bits: int,  # noqa: ARG001
    columns: int,
    group_size: int,  # noqa: ARG001
    dtype: torch.dtype,
) -> Tensor:
    return codes.new_empty((codes.shape[0], columns), dtype=dtype)


@operator(DEQUANTIZE_R2Q_SCHEMA)
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
    """Packed codes on the r2q grid -> (rows, columns) of `dtype`: (mu +- a1) + a2 (2 low - m) in float32.

    As `dequantize`, but scales (rows, 2 groups) uint8 are a1, a2 of each group, and zero_points (rows, groups) or
    (rows, 0) say where between its ends mu lies. m = 2^(bits-1) - 1; + where the highest bit of the code is set, low
    the other bits.

    Raises:
        QuantizationError: a width, shape or dtype is not one of these.
    """
    check_dequantize("dequantize_r2q", codes, scales, zero_points, row_scales, bits, columns, group_size, dtype)
    return reference.dequantize_r2q(codes, scales, zero_points, row_scales, bits, columns, group_size, dtype)


@shapes_of("dequantize_r2q")
def _(
    codes: Tensor,
    scales: Tensor,  # noqa: ARG001
    zero_points: Tensor,  # noqa: ARG001
    row_scales: Tensor,  # noqa: ARG001
    bits: int,  # noqa: ARG001
    columns: int,
    group_size: int,  # noqa: ARG001
    dtype: torch.dtype,
) -> Tensor:
    return codes.new_empty((codes.shape[0], columns), dtype=dtype)


@operator("hadamard(Tensor x, int block) -> Tensor")
def hadamard(x: Tensor, block: int) -> Tensor:
    """(..., columns) float32 -> the same: each block of the last axis times Sylvester's matrix / sqrt(block).

    The matrix is symmetric and its own inverse. block is a power of two from 8 to 1024 that divides the columns. The
    signs that go with it are in kernels/rotation.py.

    Raises:
        QuantizationError: the block or the dtype is not one of these.
    """
    check_hadamard(x, block)
    return reference.hadamard(x, block)


@shapes_of("hadamard")
def _(x: Tensor, block: int) -> Tensor:  # noqa: ARG001
    return x.new_empty(x.shape)


def _remember_block(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:  # noqa: ARG001
    ctx.block = inputs[1]


def _turned_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return hadamard(grad, ctx.block), None


register_gradient("hadamard", _turned_gradient, _remember_block)


@operator(QUANTIZE_SCHEMA)
def quantize(
    weight: Tensor,
    bits: int,
    group_size: int,
    symmetric: bool,
    stretches: Sequence[float],
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A weight matrix -> packed codes, their parameters and the error, in one pass.

    weight (rows, columns) float32, bfloat16 or float16. Without `stretches`: round to nearest on the smallest grid
    that covers each group and 0.0, error at most half a step. With them (each 1 / clipping ratio): the candidate
    whose least-squares refit, weighted by `importance` (columns,) float32 or 1, explains most of the group.

    Returns codes (rows, row_bytes) uint8; scales (rows, groups) uint8, 255 where a row is one group; zero_points
    (rows, groups) uint8, or (rows, 0) when symmetric; row_scales (rows,) bfloat16; and sums (rows, 3) float64 of w^2,
    q^2 and (w - q)^2, which are not finite where the row is not.

    Raises:
        QuantizationError: a width, shape, dtype, stretch or importance is not one of these.
    """
    check_quantize("quantize", weight, bits, group_size, stretches, importance)
    return reference.quantize(weight, bits, group_size, symmetric, stretches, importance)


@shapes_of("quantize")
def _(
    weight: Tensor,
    bits: int,
    group_size: int,
    symmetric: bool,
    stretches: Sequence[float],  # noqa: ARG001
    importance: Tensor | None = None,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return empty_result(weight, bits, group_size, symmetric=symmetric)


@operator(FIT_GRID_SCHEMA)
def fit_grid(
    weight: Tensor,
    bits: int,
    group_size: int,
    symmetric: bool,
    stretches: Sequence[float],
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fitting half of `quantize`, for callers that store parameters and choose codes themselves.

    Takes what `quantize` takes. Returns step, full, mean_q and mean_w, each (rows, groups) float32: the scale that
    each group wants, and its zero point mean_q - mean_w * full / scale once a scale is stored.

    Raises:
        QuantizationError: a width, shape, dtype, stretch or importance is not one of these.
    """
    check_quantize("fit_grid", weight, bits, group_size, stretches, importance)
    fit = reference.fit_grid(weight, bits, group_size, symmetric, stretches, importance)
    return fit.step.clone(), fit.full.clone(), fit.mean_q.clone(), fit.mean_w.clone()  # no two may share memory


@shapes_of("fit_grid")
def _(
    weight: Tensor,
    bits: int,  # noqa: ARG001
    group_size: int,
    symmetric: bool,  # noqa: ARG001
    stretches: Sequence[float],  # noqa: ARG001
    importance: Tensor | None = None,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return empty_fit(weight, group_size)


def empty_fit(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Room for what `fit_grid` returns."""
    rows, columns = weight.shape

    def room() -> Tensor:
        return weight.new_empty((rows, -(-columns // group_size)), dtype=torch.float32)

    return room(), room(), room(), room()


@operator(QUANTIZE_COLUMNS_SCHEMA)
def quantize_columns(
    block: Tensor, upper: Tensor, scale: Tensor, inverse: Tensor, zero: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    """The column loop of GPTQ (Frantar et al., 2022, arXiv 2210.17323) within one group, on a grid that is given.

    For column t = 0, 1, ...: q_t = round(clip(w_t * inverse + zero)), e_t = (w_t - (q_t - zero) * scale) / U_tt, and
    every later column t' gets w_t' - e_t U_tt'. block (rows, n); upper U (n, n), of which the upper triangle is read,
    with U_tt > 0; scale, inverse (1 / scale, or 0 where scale is) and zero (rows,); all float32.

    Returns codes (rows, n) uint8 and errors e (rows, n) float32.

    Raises:
        QuantizationError: a width, shape, dtype or the diagonal of U is not one of these.
    """
    check_columns("quantize_columns", block, upper, {"scale": scale, "inverse": inverse, "zero": zero}, bits)
    return reference.quantize_columns(block, upper, scale, inverse, zero, bits)


@shapes_of("quantize_columns")
def _(
    block: Tensor,
    upper: Tensor,  # noqa: ARG001
    scale: Tensor,  # noqa: ARG001
    inverse: Tensor,  # noqa: ARG001
    zero: Tensor,  # noqa: ARG001
    bits: int,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    return empty_columns(block)


def empty_columns(block: Tensor) -> tuple[Tensor, Tensor]:
    """Room for what `quantize_columns` returns."""
    return block.new_empty(block.shape, dtype=torch.uint8), block.new_empty(block.shape)


@operator(QUANTIZE_COLUMNS_R2Q_SCHEMA)
def quantize_columns_r2q(
    block: Tensor, upper: Tensor, mu: Tensor, a1: Tensor, a2: Tensor, inverse: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    """As `quantize_columns`, on the r2q grid: mu, a1, a2 and inverse (1 / (2 a2), or 0 where a2 is) (rows,) float32.

    q_t = the upper half of the codes where w_t >= mu, centre = mu +- a1, and within it
    low = round(clip((w_t - centre) * inverse + m / 2, 0, m)); its value is centre + a2 (2 low - m), m = 2^(bits-1) - 1.
    That is the nearest level where a1 >= m a2.

    Raises:
        QuantizationError: a width, shape, dtype or the diagonal of U is not one of these.
    """
    check_columns("quantize_columns_r2q", block, upper, {"mu": mu, "a1": a1, "a2": a2, "inverse": inverse}, bits)
    return reference.quantize_columns_r2q(block, upper, mu, a1, a2, inverse, bits)


@shapes_of("quantize_columns_r2q")
def _(
    block: Tensor,
    upper: Tensor,  # noqa: ARG001
    mu: Tensor,  # noqa: ARG001
    a1: Tensor,  # noqa: ARG001
    a2: Tensor,  # noqa: ARG001
    inverse: Tensor,  # noqa: ARG001
    bits: int,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    return empty_columns(block)


@operator(DESCEND_COLUMNS_SCHEMA)
def descend_columns(
    codes: Tensor, pull: Tensor, gram: Tensor, mu: Tensor, a1: Tensor, a2: Tensor, inverse: Tensor, bits: int
) -> Tensor:
    """Coordinate descent over the codes of one group (QuantEase, Behdin et al., 2023, arXiv 2309.01885).

    For column t = 0, 1, ...: v_t = the level of c_t, c_t becomes the code nearest to v_t + p_t / G_tt, and every later
    column t' gets p_t' + (v_t - v_t') G_tt', v_t' being the new level. codes c (rows, n) uint8; pull p = (W - Q) H for
    these columns, (rows, n), and gram G = H between them, (n, n), with G_tt > 0, float32; mu, a1, a2 and inverse as
    `quantize_columns_r2q` has them, of which the affine grid of scale s is the one with a1 = 2^(bits-2) s, a2 = s / 2.

    Returns codes (rows, n) uint8. tr((W - Q) H (W - Q)^T) is never larger for them, but for rounding.

    Raises:
        QuantizationError: a width, shape, dtype or the diagonal of G is not one of these.
    """
    check_descent(codes, pull, gram, {"mu": mu, "a1": a1, "a2": a2, "inverse": inverse}, bits)
    return reference.descend_columns(codes, pull, gram, reference.Residual(mu=mu, a1=a1, a2=a2), inverse, bits)


@shapes_of("descend_columns")
def _(
    codes: Tensor,
    pull: Tensor,  # noqa: ARG001
    gram: Tensor,  # noqa: ARG001
    mu: Tensor,  # noqa: ARG001
    a1: Tensor,  # noqa: ARG001
    a2: Tensor,  # noqa: ARG001
    inverse: Tensor,  # noqa: ARG001
    bits: int,  # noqa: ARG001
) -> Tensor:
    return codes.new_empty(codes.shape)


def check_descent(codes: Tensor, pull: Tensor, gram: Tensor, of_rows: Mapping[str, Tensor], bits: int) -> None:
    """Refuse what the kernels of `descend_columns` must not see.

    Raises:
        QuantizationError: a width, shape, dtype or the diagonal of G does not fit.
    """
    who = "descend_columns"
    _check_bits(who, bits)
    _check_matrix(f"{who}: codes", codes, (torch.uint8,))
    rows, columns = codes.shape
    _check_beside(who, "the codes ask", {"pull": (pull, (rows, columns)), "gram": (gram, (columns, columns))})
    _check_beside(who, "the codes ask", {what: (tensor, (rows,)) for what, tensor in of_rows.items()})
    _check_diagonal(who, "gram", gram)


@operator(FIT_RESIDUAL_SCHEMA)
def fit_residual(
    weights: Tensor,
    importance: Tensor | None,
    mu: Tensor,
    a1: Tensor,
    a2: Tensor,
    bits: int,
    symmetric: bool,
    rounds: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The residual grid of each group by alternation, as in R2Q; the mathematics is told in quantizers/r2q_core.py.

    weights w (n, groups) float32, one group in a column, and importance h the same or None for 1 each, finite and not
    below 0; mu, a1 and a2 (starts, groups) float32 are grids with a1 >= m a2 >= 0 and |mu| <= a1 + m a2. From the
    start with the smallest sum h (w - q)^2 on, q the level nearest to w, `rounds` times the grid of least squares for
    the codes that are there is taken wherever the sum gets smaller. Symmetric grids keep their mu.

    Returns mu, a1 and a2 (groups,) float32.

    Raises:
        QuantizationError: a width, shape, dtype or number of rounds is not one of these.
    """
    check_residual_fit(weights, importance, {"mu": mu, "a1": a1, "a2": a2}, bits, rounds)
    grids = reference.Residual(mu=mu, a1=a1, a2=a2)
    fitted = residual_fit.fit_residual(weights, importance, grids, bits, rounds, symmetric=symmetric)
    return fitted.mu.clone(), fitted.a1.clone(), fitted.a2.clone()


@shapes_of("fit_residual")
def _(
    weights: Tensor,
    importance: Tensor | None,  # noqa: ARG001 - here and below: the weights alone say the shapes
    mu: Tensor,  # noqa: ARG001
    a1: Tensor,  # noqa: ARG001
    a2: Tensor,  # noqa: ARG001
    bits: int,  # noqa: ARG001
    symmetric: bool,  # noqa: ARG001
    rounds: int,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_residual(weights)


def check_residual_fit(
    weights: Tensor, importance: Tensor | None, grids: Mapping[str, Tensor], bits: int, rounds: int
) -> None:
    """Refuse what the kernels of `fit_residual` must not see.

    Raises:
        QuantizationError: a width, shape, dtype or number of rounds does not fit.
    """
    who = "fit_residual"
    _check_bits(who, bits)
    _check_matrix(f"{who}: weights", weights, (torch.float32,))
    n, groups = weights.shape
    starts = len(grids["mu"]) if grids["mu"].ndim else 0
    if not (n and groups and starts and 0 <= rounds <= MOST_ROUNDS):
        found = f"{n} weights in {groups} groups, {starts} starts, {rounds} rounds"
        raise QuantizationError(f"{who}: {found}; allowed: from 1, rounds from 0 to {MOST_ROUNDS}")
    beside = {} if importance is None else {"importance": (importance, (n, groups))}
    _check_beside(who, "the weights ask", beside)
    _check_beside(who, "the weights ask", {what: (tensor, (starts, groups)) for what, tensor in grids.items()})


def check_columns(who: str, block: Tensor, upper: Tensor, of_rows: Mapping[str, Tensor], bits: int) -> None:
    """Refuse what the kernels of `quantize_columns` and `quantize_columns_r2q` must not see; `who` is asked.

    Raises:
        QuantizationError: a width, shape, dtype or the diagonal of U does not fit.
    """
    _check_bits(who, bits)
    _check_matrix(f"{who}: block", block, (torch.float32,))
    rows, columns = block.shape
    _check_beside(who, "the block asks", {"upper": (upper, (columns, columns))})
    _check_beside(who, "the block asks", {what: (tensor, (rows,)) for what, tensor in of_rows.items()})
    _check_diagonal(who, "upper", upper)


def _check_beside(who: str, asking: str, wanted: Mapping[str, tuple[Tensor, tuple[int, ...]]]) -> None:
    """Refuse what is not float32, or has another shape than is asked for."""
    for what, (tensor, shape) in wanted.items():
        if tensor.dtype != torch.float32 or tuple(tensor.shape) != shape:
            raise QuantizationError(
                f"{who}: {what} is {tensor.dtype} {tuple(tensor.shape)}; {asking} for float32 {shape}"
            )


def _check_diagonal(who: str, what: str, matrix: Tensor) -> None:
    if len(matrix) and not float(matrix.diagonal().min()) > 0.0:
        raise QuantizationError(
            f"{who}: the diagonal of {what} goes down to {float(matrix.diagonal().min())}; allowed: above 0"
        )


def check_hadamard(x: Tensor, block: int) -> None:
    """Refuse what the kernels of `hadamard` must not see.

    Raises:
        QuantizationError: the block or the dtype does not fit.
    """
    if block not in ROTATIONS:
        raise QuantizationError(f"hadamard: block is {block}; allowed: {', '.join(map(str, ROTATIONS))}")
    if not x.ndim or x.dtype != torch.float32 or x.shape[-1] % block:
        raise QuantizationError(
            f"hadamard: x is {x.dtype} {tuple(x.shape)}; allowed: float32 whose last axis splits into blocks of {block}"
        )


def empty_residual(weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Room for what `fit_residual` returns."""
    groups = weights.shape[1]
    return weights.new_empty(groups), weights.new_empty(groups), weights.new_empty(groups)


def empty_result(
    weight: Tensor, bits: int, group_size: int, *, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Room for what `quantize` returns."""
    rows, columns = weight.shape
    groups = -(-columns // group_size)
    return (
        weight.new_empty((rows, reference.row_bytes(columns, bits)), dtype=torch.uint8),
        weight.new_empty((rows, groups), dtype=torch.uint8),
        weight.new_empty((rows, 0 if symmetric else groups), dtype=torch.uint8),
        weight.new_empty((rows,), dtype=torch.bfloat16),
        weight.new_empty((rows, 3), dtype=torch.float64),
    )


def check_quantize(
    who: str, weight: Tensor, bits: int, group_size: int, stretches: Sequence[float], importance: Tensor | None
) -> None:
    """Refuse what the kernels of `quantize` and `fit_grid` must not see; `who` is the one that is asked.

    Raises:
        QuantizationError: a width, shape, dtype, stretch or importance does not fit.
    """
    _check_bits(who, bits)
    _check_matrix(f"{who}: weight", weight, FLOATS)
    rows, columns = weight.shape
    if rows == 0 or columns == 0:
        raise QuantizationError(f"{who}: the weight is {rows} x {columns}; it needs a row and a column")
    if group_size < columns and (group_size < 8 or group_size % 8):  # noqa: PLR2004 - whole bytes at every width
        raise QuantizationError(
            f"{who}: group_size is {group_size}; allowed: a multiple of 8, or all {columns} columns"
        )
    if not all(0.0 < stretch < math.inf for stretch in stretches):
        raise QuantizationError(f"{who}: stretches are {list(stretches)}; allowed: finite numbers above 0")
    if importance is not None:
        _check_importance(who, importance, columns)


def _check_importance(who: str, importance: Tensor, columns: int) -> None:
    if importance.shape != (columns,) or importance.dtype != torch.float32:
        raise QuantizationError(
            f"{who}: importance is {importance.dtype} {tuple(importance.shape)}; allowed: float32 ({columns},)"
        )
    least, most = float(importance.min()), float(importance.max())
    if not 0.0 <= least <= most < math.inf:
        raise QuantizationError(f"{who}: importance goes from {least} to {most}; allowed: finite, not below 0")


def check_pack(codes: Tensor, bits: int) -> None:
    """Refuse what is not a matrix of codes.

    Raises:
        QuantizationError: a width, shape or dtype does not fit.
    """
    _check_bits("pack", bits)
    _check_matrix("pack: codes", codes, (torch.uint8,))


def check_unpack(packed: Tensor, bits: int, columns: int) -> None:
    """Refuse bytes that do not hold `columns` codes a row.

    Raises:
        QuantizationError: a width, shape or dtype does not fit.
    """
    _check_bits("unpack", bits)
    _check_matrix("unpack: packed", packed, (torch.uint8,))
    needed = reference.row_bytes(columns, bits)
    if columns < 0 or packed.shape[1] != needed:
        raise QuantizationError(
            f"unpack: a row has {packed.shape[1]} bytes; {columns} codes of {bits} bits take {needed}"
        )


def check_dequantize(
    who: str,
    codes: Tensor,
    scales: Tensor,
    zero_points: Tensor,
    row_scales: Tensor,
    bits: int,
    columns: int,
    group_size: int,
    dtype: torch.dtype,
) -> None:
    """Refuse parameters that do not belong to the codes; `who` is `dequantize` or `dequantize_r2q`.

    Raises:
        QuantizationError: a width, shape or dtype does not fit.
    """
    check_unpack(codes, bits, columns)
    if group_size < 1:
        raise QuantizationError(f"{who}: group_size is {group_size}; allowed: 1 or more columns")
    rows, groups = codes.shape[0], -(-columns // group_size)
    _check_parameters(f"{who}: scales", scales, torch.uint8, (rows, 2 * groups if who == "dequantize_r2q" else groups))
    if zero_points.numel():
        _check_parameters(f"{who}: zero_points", zero_points, torch.uint8, (rows, groups))
    _check_parameters(f"{who}: row_scales", row_scales, torch.bfloat16, (rows,))
    if dtype not in FLOATS:
        raise QuantizationError(f"{who}: dtype is {dtype}; allowed: {', '.join(map(str, FLOATS))}")


def _check_parameters(what: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype or tensor.shape != shape:
        raise QuantizationError(f"{what} are {tensor.dtype} {tuple(tensor.shape)}; the codes ask for {dtype} {shape}")


def _check_bits(who: str, bits: int) -> None:
    if bits not in WIDTHS:
        raise QuantizationError(f"{who}: bits is {bits}; allowed: {', '.join(map(str, WIDTHS))}")


def _check_matrix(who: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if tensor.ndim != 2 or tensor.dtype not in dtypes:  # noqa: PLR2004 - a matrix
        names = ", ".join(str(dtype) for dtype in dtypes)
        raise QuantizationError(f"{who} is {tensor.dtype} with {tensor.ndim} dimensions; allowed: a matrix of {names}")

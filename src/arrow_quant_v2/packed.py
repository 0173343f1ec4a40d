"""PackedTensor, the one noun between all rooms: codes, parameters, shape. Does no arithmetic on weights."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

import numpy as np

from arrow_quant_v2.errors import QuantizationError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

Bits: TypeAlias = Literal[2, 4, 8]
Grid: TypeAlias = Literal["affine", "r2q", "row"]
Bytes: TypeAlias = "NDArray[np.uint8]"
Halfwords: TypeAlias = "NDArray[np.uint16]"
Floats: TypeAlias = "NDArray[np.float32]"

WIDTHS: tuple[Bits, ...] = (2, 4, 8)
GRIDS: tuple[Grid, ...] = get_args(Grid)
ROTATIONS = tuple(2**power for power in range(3, 11))
WHOLE = 255  # the scale of a group whose scale is that of its row
ITEM_BITS = {
    "float64": 64, "float32": 32, "float16": 16, "bfloat16": 16, "float8_e4m3fn": 8, "float8_e5m2": 8,
    "int64": 64, "int32": 32, "int16": 16, "int8": 8, "uint8": 8, "bool": 8,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Name, shape and dtype of one tensor that lies in a source or a store; holds no values."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a scalar."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the values in this dtype."""
        return self.numel * ITEM_BITS[self.dtype] // 8


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a tensor becomes a matrix of codes: rows, columns, and columns sharing parameters.

    `quant_axis` splits the shape: the axes before it are rows, the rest are columns. It is None per
    tensor: one row, one group. A linear (out, in) and a convolution (out, in, *kernel) have axis 1,
    experts (expert, out, in) axis 2. `group_size` None means one group per row. The last group of a
    row is shorter where the columns do not divide: the ragged tail. `grid` is what the codes of a group mean; "row" is
    the affine one of rows that are one group each, whose scale is that of the row.
    """

    shape: tuple[int, ...]
    bits: Bits
    quant_axis: int | None
    group_size: int | None
    grid: Grid = "affine"

    @property
    def rows(self) -> int:
        """Rows of the code matrix."""
        return 1 if self.quant_axis is None else math.prod(self.shape[: self.quant_axis])

    @property
    def columns(self) -> int:
        """Codes per row."""
        return math.prod(self.shape if self.quant_axis is None else self.shape[self.quant_axis :])

    @property
    def group(self) -> int:
        """Columns per group, never more than there are."""
        return self.columns if self.group_size is None else min(self.group_size, self.columns)

    @property
    def groups(self) -> int:
        """Groups per row, the ragged tail included."""
        return -(-self.columns // self.group)

    @property
    def scales_per_row(self) -> int:
        """Scales of one row: one of each group, or two on the r2q grid. On the row grid it is known and not stored."""
        return self.groups * (2 if self.grid == "r2q" else 1)

    @property
    def channels(self) -> int | None:
        """Input channels, which lie along the first axis of the columns; None where there is no such axis."""
        axis = self.quant_axis
        return None if axis is None or not 0 <= axis < len(self.shape) else self.shape[axis]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of packed codes; a row starts on a byte."""
        return -(-self.columns * self.bits // 8)

    def on(self, grid: Grid) -> Layout:
        """The same rows and columns with codes of this grid; the affine one of rows of one group is the row grid."""
        return replace(self, grid=sparing(grid, self.groups))


def sparing(grid: Grid, groups: int) -> Grid:
    """The grid of rows of so many groups that stores least: an only group needs no scale beside the row's."""
    return "row" if grid == "affine" and groups == 1 else grid


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedTensor:
    """Codes and parameters of the rows `first_row` and on of one tensor; arrays may be memory-mapped.

    codes         uint8 (rows, row_bytes)       lowest bits first, every row starts on a byte
    scales        uint8 (rows, scales_per_row)  scale = row_scale * (scales / 255)^2; 255 each on the row grid
    zero_points   uint8 (rows, groups)          zero_point = zero_points / (255 / (2^bits - 1)); None: 2^(bits-1)
    row_scales    uint16 (rows,)                the bits of a bfloat16
    rotation      columns of one block          None: the input channels are not turned
    equalization  float32 (channels,) above 0   None: 1 each

    weight ~ scale * (code - zero_point). On the r2q grid, with m = 2^(bits-1) - 1, the scales of a group are a1, a2 and
    its zero point is mu = (a1 + m a2) (1 - 2 zero_points / 255), None: 0; with top the highest bit of a code and low
    the others, weight ~ mu + (a1 if top else -a1) + a2 (2 low - m), where a1 >= m a2 keeps the levels in order.

    What is coded is W s with its channels turned in blocks, where s is the equalization; the layer's input is x / s,
    turned alike (kernels/rotation.py). `dtype` is that of the original tensor.
    """

    name: str
    dtype: str
    layout: Layout
    codes: Bytes
    scales: Bytes
    zero_points: Bytes | None
    row_scales: Halfwords
    first_row: int = 0
    rotation: int | None = None
    equalization: Floats | None = None

    def __post_init__(self) -> None:
        """Refuse arrays that do not fit the layout.

        Raises:
            QuantizationError: an array has another shape or dtype than the layout asks, scales of the row grid are not
                255, or the rotation or the equalization does not fit the input channels.
        """
        rows = len(self.codes)
        self._demand("codes", self.codes, (rows, self.layout.row_bytes), np.uint8)
        self._demand("scales", self.scales, (rows, self.layout.scales_per_row), np.uint8)
        self._demand("row_scales", self.row_scales, (rows,), np.uint16)
        if self.zero_points is not None:
            self._demand("zero_points", self.zero_points, (rows, self.layout.groups), np.uint8)
        if self.layout.grid == "row":
            self._demand_whole_rows()
        if not 0 <= self.first_row <= self.first_row + rows <= self.layout.rows:
            raise QuantizationError(
                f"{self.name}: rows {self.first_row} to {self.first_row + rows} lie outside its {self.layout.rows}"
            )
        for problem in basis_problems(self.layout, self.rotation, self.equalization):
            raise QuantizationError(f"{self.name}: {problem}")

    def _demand(self, what: str, array: NDArray[np.generic], shape: tuple[int, ...], dtype: type) -> None:
        if array.shape != shape or array.dtype != dtype:
            raise QuantizationError(
                f"{self.name}: {what} are {array.dtype} {array.shape}; the layout asks for {np.dtype(dtype)} {shape}"
            )

    def _demand_whole_rows(self) -> None:
        if self.layout.groups != 1 or (self.scales != WHOLE).any():
            raise QuantizationError(
                f"{self.name}: {self.layout.groups} groups in a row, with scales from {self.scales.min(initial=WHOLE)};"
                f" the row grid is for one group, of scale {WHOLE}: use the affine grid"
            )

    @property
    def rows(self) -> int:
        """Rows held here: all of the tensor's, or one chunk's."""
        return int(self.codes.shape[0])

    @property
    def nbytes(self) -> int:
        """Every stored byte: codes and parameters; the scales of the row grid are known without being stored."""
        scales = None if self.layout.grid == "row" else self.scales
        parts = (self.codes, scales, self.zero_points, self.row_scales, self.equalization)
        return sum(part.nbytes for part in parts if part is not None)


def basis_problems(layout: Layout, rotation: int | None, equalization: Floats | None) -> Iterator[str]:
    """What is wrong with a rotation and an equalization of the input channels of this layout, in words."""
    if rotation is not None:
        if rotation not in ROTATIONS:
            yield f"rotation {rotation}; allowed are {', '.join(map(str, ROTATIONS))}, or none"
        elif not layout.channels or layout.channels % rotation:
            yield f"rotation {rotation} does not divide its input channels, {layout.channels}"
    if equalization is not None:
        if equalization.shape != (layout.channels,) or equalization.dtype != np.float32:
            found = f"{equalization.dtype} {equalization.shape}"
            yield f"equalization is {found}; its input channels ask for float32 ({layout.channels},)"
        elif not (np.isfinite(equalization) & (equalization > 0)).all():
            yield f"equalization goes from {equalization.min()} to {equalization.max()}; allowed: finite, above 0"


@dataclass(frozen=True, kw_only=True)
class WeightError:
    """Sums over the elements of a tensor, from which cosine and mean squared error follow; they add up.

    `original` = sum w^2, `quantized` = sum q^2, `difference` = sum (w - q)^2, `count` elements.
    """

    original: float
    quantized: float
    difference: float
    count: int

    def __add__(self, other: WeightError) -> WeightError:
        """The same over both sets of elements."""
        return WeightError(
            original=self.original + other.original,
            quantized=self.quantized + other.quantized,
            difference=self.difference + other.difference,
            count=self.count + other.count,
        )

    @property
    def cosine(self) -> float:
        """Cosine between weight and quantized weight, exactly 1.0 where they are equal."""
        if self.difference == 0.0:
            return 1.0
        norm = math.sqrt(self.original) * math.sqrt(self.quantized)
        if norm == 0.0:
            return 0.0
        return max(-1.0, min(1.0, (self.original + self.quantized - self.difference) / (2.0 * norm)))

    @property
    def mse(self) -> float:
        """Mean squared error."""
        return self.difference / self.count if self.count else 0.0


NO_ERROR = WeightError(original=0.0, quantized=0.0, difference=0.0, count=0)

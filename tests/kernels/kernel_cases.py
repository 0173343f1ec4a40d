"""Weights of every kind, and quantized weights as one record, for the tests of the kernels."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor

from arrow_quant_v2.kernels import ops, reference
from arrow_quant_v2.packed import WIDTHS, WeightError

LARGEST = float(np.float32(1e38))  # beyond 2.2e38 half a step more is no float32
STRETCHES = (1.0, 1.2, 1.4, 1.6, 1.8, 2.1)

widths = st.sampled_from(WIDTHS)
group_sizes = st.integers(1, 17).map(lambda n: 8 * n)


@dataclass(frozen=True, kw_only=True, eq=False)
class Quantized:
    """What `ops.quantize` returned, and how it was asked."""

    bits: int
    columns: int
    group_size: int
    codes: Tensor
    scales: Tensor
    zero_points: Tensor
    row_scales: Tensor
    sums: Tensor

    @property
    def weight(self) -> Tensor:
        """What the codes mean, in float32."""
        stored = (self.codes, self.scales, self.zero_points, self.row_scales)
        result: Tensor = ops.dequantize(*stored, self.bits, self.columns, self.group_size, torch.float32)
        return result

    @property
    def step(self) -> Tensor:
        """The stored scale of every weight, (rows, columns) float64."""
        scale = reference.scale_of(self.scales, self.row_scales)
        return reference.per_column(scale, min(self.group_size, self.columns), self.columns).double()

    @property
    def error(self) -> WeightError:
        """The sums of all rows."""
        original, quantized, difference = self.sums.sum(dim=0).tolist()
        count = self.columns * self.codes.shape[0]
        return WeightError(original=original, quantized=quantized, difference=difference, count=count)


def quantized(
    weight: Tensor,
    bits: int,
    group_size: int = 64,
    *,
    symmetric: bool = False,
    stretches: tuple[float, ...] = (),
    importance: Tensor | None = None,
) -> Quantized:
    result = ops.quantize(weight, bits, group_size, symmetric, stretches, importance)
    names = ("codes", "scales", "zero_points", "row_scales", "sums")
    kept: dict[str, Any] = dict(zip(names, result, strict=True))
    return Quantized(bits=bits, columns=weight.shape[1], group_size=group_size, **kept)


def gaussian(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def columns_case(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `ops.quantize_columns` takes: a block, an upper factor, and a grid for each row; row 0 has no scale."""
    random = torch.Generator().manual_seed(seed)
    upper = torch.randn(columns, columns, generator=random).triu(1) * 0.3
    upper += torch.diag(0.1 + torch.rand(columns, generator=random))
    scale, zero = torch.rand(rows, generator=random), 3.0 * torch.rand(rows, generator=random)
    scale[:1] = 0.0
    inverse = torch.where(scale > 0.0, 1.0 / scale, 0.0)
    return torch.randn(rows, columns, generator=random), upper, scale, inverse, zero


def residual_columns_case(rows: int, columns: int, bits: int, seed: int = 0) -> tuple[Tensor, ...]:
    """What `ops.quantize_columns_r2q` takes: a1 >= m a2, as writers keep it; row 0 has no a2."""
    random = torch.Generator().manual_seed(seed)
    block, upper = columns_case(rows, columns, seed)[:2]
    a2 = torch.rand(rows, generator=random) / 2**bits
    a2[:1] = 0.0
    a1 = reference.largest_low(bits) * a2 + torch.rand(rows, generator=random)
    inverse = torch.where(a2 > 0.0, 0.5 / a2, 0.0)
    return block, upper, torch.randn(rows, generator=random), a1, a2, inverse


def descent_case(rows: int, columns: int, bits: int, seed: int = 0) -> tuple[Tensor, ...]:
    """What `ops.descend_columns` takes: any codes, P and G of some weights and inputs, and the grids of r2q."""
    random = torch.Generator().manual_seed(seed)
    weight, _, mu, a1, a2, inverse = residual_columns_case(rows, columns, bits, seed)
    codes = torch.randint(2**bits, (rows, columns), dtype=torch.uint8, generator=random)
    inputs = torch.randn(2 * columns + 3, columns, generator=random)
    gram = inputs.T @ inputs
    grid = reference.Residual(mu=mu[:, None], a1=a1[:, None], a2=a2[:, None])
    pull = (weight - reference.residual_level(codes, grid, bits)) @ gram
    return codes, pull, gram, mu, a1, a2, inverse


def residual_fit_case(
    n: int, groups: int, bits: int, starts: int = 1, seed: int = 0, *, symmetric: bool = False
) -> tuple[Tensor, ...]:
    """What `ops.fit_residual` takes: groups that lie about the levels, some of no account, and grids that may be."""
    random = torch.Generator().manual_seed(seed)
    a2 = torch.rand(starts, groups, generator=random)
    a2[:, :1] = 0.0
    a1 = reference.largest_low(bits) * a2 + torch.rand(starts, groups, generator=random)
    mu = torch.zeros(starts, groups) if symmetric else 0.3 * torch.randn(starts, groups, generator=random)
    importance = torch.rand(n, groups, generator=random)
    importance[:, -1:] = 0.0
    return 2.0 ** (bits - 1) * torch.randn(n, groups, generator=random), importance, mu, a1, a2


@st.composite
def rows(draw: st.DrawFn, columns: int) -> "np.ndarray[Any, np.dtype[np.float32]]":
    """One row: noise of any magnitude and offset, an outlier, one value, zeros, or whatever hypothesis likes."""
    kind = draw(st.sampled_from(["noise", "offset", "outlier", "same", "any"]))
    values = st.floats(-LARGEST, LARGEST, width=32)
    if kind == "any":
        return draw(arrays.arrays(np.float32, columns, elements=values))
    if kind == "same":
        return np.full(columns, draw(values), np.float32)
    noise = np.random.default_rng(draw(st.integers(0, 2**32))).standard_normal(columns)
    if kind == "outlier":
        noise[draw(st.integers(0, columns - 1))] = draw(st.sampled_from([-1e4, 30.0, 1e30]))
    offset = draw(st.sampled_from([-5.0, 1.0, 40.0])) if kind == "offset" else 0.0
    magnitude = 10.0 ** draw(st.integers(-46, 36))
    return np.clip((noise + offset) * magnitude, -LARGEST, LARGEST).astype(np.float32)


@st.composite
def weights(draw: st.DrawFn, most_rows: int = 3, most_columns: int = 150) -> Tensor:
    """(rows, columns) of any finite float32, each row of a kind of its own."""
    columns = draw(st.integers(1, most_columns))
    count = draw(st.integers(1, most_rows))
    return torch.from_numpy(np.stack([draw(rows(columns)) for _ in range(count)]))

"""Weights that share an input, quantized so that their outputs change least: the basis, then the column loop.

Knows nothing of models, files or where the stats come from.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from arrow_quant_v2.engines.one_core import each_on_one_core, tiles
from arrow_quant_v2.kernels.tensors import dequantized
from arrow_quant_v2.quantizers.basis import Basis, rotation_block
from arrow_quant_v2.quantizers.gptq import REFITS, ROWS, SWEEPS, gptq
from arrow_quant_v2.quantizers.gptq_factor import factorize, suitable_damping
from arrow_quant_v2.quantizers.result import joined, not_finite, weight_error
from arrow_quant_v2.quantizers.smoothing import rounding_loss
from arrow_quant_v2.quantizers.spatial import ALPHAS, SpatialQuantizer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from arrow_quant_v2.config import LayerSpec
    from arrow_quant_v2.packed import Layout, PackedTensor, TensorInfo, WeightError
    from arrow_quant_v2.quantizers.gptq_factor import Factor
    from arrow_quant_v2.quantizers.smoothing import Ranges

MATRIX = 2  # axes
SMALL_HESSIAN = 256 * 2**20  # bytes up to which H and its factor are in memory for every basis
AT_ONCE = 16 * ROWS  # rows of a weight that have all its copies at once: a head of a vocabulary is large
TRIED_ROWS = 256  # of all weights of an input together: enough to tell which basis is better


@dataclass(frozen=True, kw_only=True, eq=False)
class Sight:
    """What the fit needs of the stats of one input: H, how many tokens are in it, and absmax of each channel.

    ranges      where the inputs lie in each time group; None: not known
    parts       the same of rows of the weight that have inputs of their own, by the first one and that after the last
    transposed  rows of the weight belong to inputs, not to outputs
    """

    hessian: Tensor
    count: int
    absmax: Tensor
    ranges: Ranges | None = None
    parts: Mapping[tuple[int, int], Sight] = field(default_factory=dict)
    transposed: bool = False

    @property
    def plain(self) -> bool:
        """Whether all rows belong to outputs, and meet the same inputs."""
        return not (self.parts or self.transposed)


@dataclass(frozen=True, kw_only=True)
class Freedom:
    """What the fit may try: turned channels, equalized channels, refits of each group's grid, and sweeps after all.

    smooth  a basis counts by what the outputs lose when inputs are rounded to 8 bits as well
    """

    rotate: bool = True
    equalize: bool = False
    smooth: bool = False
    refits: int = REFITS
    sweeps: int = SWEEPS

    @property
    def quick(self) -> Freedom:
        """The same without refits and sweeps, for what only ranks: bases and widths are taken to gain alike by both."""
        return replace(self, refits=0, sweeps=0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Weight:
    """A weight to be fitted: values (rows, columns) float32, the tensor that they are, and what is asked of it.

    `wanted` are other values that suit its inputs better (see quantizers.correction); None: there are none.
    """

    values: Tensor
    info: TensorInfo
    layout: Layout
    spec: LayerSpec
    wanted: Tensor | None = None

    @property
    def aim(self) -> Tensor:
        """What the column loop comes near to."""
        return self.values if self.wanted is None else self.wanted

    @property
    def is_linear(self) -> bool:
        """Whether it belongs to a linear layer, whose inputs may be rounded too."""
        return len(self.info.shape) == MATRIX

    def some(self, count: int) -> Weight:
        """At most `count` of its rows, evenly spaced."""
        rows = len(self.values)
        if rows <= count:
            return self
        chosen = spaced(rows, count).to(self.values.device)
        layout = replace(self.layout, shape=(count, *self.layout.shape[self.layout.quant_axis or 0 :]), quant_axis=1)
        wanted = None if self.wanted is None else self.wanted[chosen]
        return replace(self, values=self.values[chosen], layout=layout, wanted=wanted)


def spaced(rows: int, count: int) -> Tensor:
    """The numbers of at most `count` of some rows, evenly spaced."""
    return torch.arange(rows) if rows <= count else torch.linspace(0, rows - 1, count).long()


@dataclass(frozen=True, kw_only=True, eq=False)
class Fitted:
    """A weight quantized; `left` is what was wanted - Q (rows, columns) in the basis of the model.

    `remarks` say in words what part of it could not be fitted to inputs of its own.
    """

    packed: PackedTensor
    basis: Basis
    error: WeightError
    left: Tensor
    remarks: tuple[str, ...] = ()


def fit_together(weights: Sequence[Weight], sight: Sight, freedom: Freedom) -> list[Fitted]:
    """Each weight by its spec, all of them in the one basis that loses least of their outputs.

    Raises:
        QuantizationError: H has no Cholesky factor, or a weight is not finite.
    """
    best = _best(weights, sight, every_basis(weights, sight, freedom), smooth=freedom.smooth)
    if freedom.sweeps:
        best.prepare_sweeps()
    if len(weights) == 1:
        return [best.fitted(weights[0], freedom)]  # its rows are shared out instead
    return each_on_one_core(lambda weight: best.fitted(weight, freedom), weights)


def _best(weights: Sequence[Weight], sight: Sight, bases: Sequence[Basis], *, smooth: bool) -> InBasis:
    """The input seen in the basis that loses least; the first one where several do.

    Where H is large, one basis is looked at after the other, and the best one made once more.
    """
    groups = sorted({weight.layout.group for weight in weights})
    tried = [weight.some(max(16, TRIED_ROWS // len(weights))) for weight in weights]
    if len(bases) == 1:
        return InBasis(bases[0], sight, groups)
    if sight.hessian.nbytes <= SMALL_HESSIAN:
        seen = each_on_one_core(lambda basis: InBasis(basis, sight, groups), bases)
        pairs = [(one, weight) for one in seen for weight in tried]
        losses = each_on_one_core(lambda pair: pair[0].loss(pair[1], smooth=smooth), pairs)
        totals = [sum(losses[at : at + len(tried)]) for at in range(0, len(losses), len(tried))]
        return seen[totals.index(min(totals))]
    totals = [_total_loss(InBasis(basis, sight, groups), tried, smooth=smooth) for basis in bases]
    return InBasis(bases[totals.index(min(totals))], sight, groups)


def _total_loss(seen: InBasis, weights: Sequence[Weight], *, smooth: bool) -> float:
    return sum(each_on_one_core(lambda weight: seen.loss(weight, smooth=smooth), weights))


def every_basis(weights: Sequence[Weight], sight: Sight, freedom: Freedom) -> list[Basis]:
    """Every basis that may be tried; the one that changes nothing comes first."""
    channels = len(sight.absmax)
    found = [Basis(channels=channels)]
    block = rotation_block(channels) if freedom.rotate else None
    if block is not None:
        found.append(Basis(channels=channels, rotation=block))
    unsure = freedom.smooth and sight.ranges is not None and not sight.ranges.tell_channels
    if freedom.equalize and not unsure and all(weight.spec.equalize for weight in weights):
        spatial = SpatialQuantizer(sight.absmax)
        unfolded = [weight.aim.reshape(len(weight.aim), channels, -1) for weight in weights]
        found += [spatial.basis(unfolded, alpha) for alpha in ALPHAS]
    return found


class InBasis:
    """An input seen in one basis, with H's factor for each size of groups."""

    def __init__(self, basis: Basis, sight: Sight, groups: Sequence[int]) -> None:
        self.basis, self.sight = basis, sight
        self.hessian = basis.moment(sight.hessian)
        damping = suitable_damping(len(self.hessian), sight.count)
        self.factors: dict[int, Factor] = {group: factorize(self.hessian, group, damping) for group in groups}

    def prepare_sweeps(self) -> None:
        """Make what sweeps need of H, once for all weights that are fitted beside each other."""
        for factor in self.factors.values():
            _ = factor.spans

    def loss(self, weight: Weight, *, smooth: bool = False) -> float:
        """tr(dW H dW^T) of a quick fit; to `smooth`, also what inputs of a linear layer cost that are rounded."""
        left, ranges = self.fitted(weight, Freedom().quick).left, self.sight.ranges
        lost = loss_of(self.basis.weight(left), self.hessian)
        if smooth and ranges is not None and weight.is_linear:
            lost += rounding_loss(weight.aim, ranges, self.basis)
        return lost

    def fitted(self, weight: Weight, freedom: Freedom) -> Fitted:
        """The weight by its spec."""
        factor = self.factors[weight.layout.group]
        changed = (self.basis.weight(weight.aim[rows]).contiguous() for rows in tiles(len(weight.aim), AT_ONCE))
        own = {"refits": freedom.refits, "sweeps": freedom.sweeps}
        rows = joined([gptq(part, weight.spec, factor, **own) for part in changed])
        if not np.isfinite(rows.sums).all():
            raise not_finite(weight.values, weight.info.name, weight.info.shape)
        scale = self.basis.equalization
        packed = rows.packed(
            weight.info.name,
            weight.info.dtype,
            weight.layout,
            rotation=self.basis.rotation,
            equalization=None if scale is None else scale.cpu().numpy(),
        )
        left = dequantized(packed).to(weight.values.device)  # for the moment, Q
        error = error_of(weight.values, left)
        torch.sub(weight.aim, left, out=left)
        return Fitted(packed=packed, basis=self.basis, error=error, left=left)


def loss_of(left: Tensor, hessian: Tensor) -> float:
    """tr(dW H dW^T) of `left` = dW (rows, columns): the squared error of outputs, for the inputs that made H."""
    return float(((left @ hessian) * left).sum(dtype=torch.float64))


def error_of(weight: Tensor, quantized: Tensor) -> WeightError:
    """The sums in the basis of the model: an equalized weight has others."""
    sums = [_squares(weight[rows], quantized[rows]) for rows in tiles(len(weight), ROWS)]
    return weight_error(np.array(sums), weight.numel())


def _squares(weight: Tensor, quantized: Tensor) -> tuple[float, float, float]:
    """The sums of w^2, q^2 and (w - q)^2."""
    parts = (weight, quantized, weight - quantized)
    original, other, difference = (float(part.to(torch.float64).square().sum()) for part in parts)
    return original, other, difference


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """How close the outputs Q x of a quantized weight are to those of W, over some inputs x.

    errors  |W x - Q x|^2 / |W x|^2 in each time group; NaN without any input
    cosine  between W x and Q x over all of them; 1.0 where both are zero
    """

    errors: tuple[float, ...]
    cosine: float


def outputs_beside(left: Tensor, weight: Tensor, probes: Sequence[Tensor]) -> Outputs:
    """Outputs of W and of Q = W - `left` for inputs (tokens, columns) of each time group."""
    return outputs_of_parts([(left, weight, probes)])


def outputs_of_parts(parts: Sequence[tuple[Tensor, Tensor, Sequence[Tensor]]]) -> Outputs:
    """The same of a weight whose rows have inputs of their own: `left`, W and inputs of each part of it."""
    errors, total = [], np.zeros(3)
    for inputs in zip(*(probes for _, _, probes in parts), strict=True):
        lost, whole, both = (
            sum(sums) for sums in zip(*(_sums(part, x) for part, x in zip(parts, inputs, strict=True)), strict=True)
        )
        seen = any(len(x) for x in inputs)
        errors.append(lost / whole if whole > 0.0 else 0.0 if seen else float("nan"))
        total += (lost, whole, both)
    return Outputs(errors=tuple(errors), cosine=_cosine(*total.tolist()))


def _sums(part: tuple[Tensor, Tensor, Sequence[Tensor]], inputs: Tensor) -> tuple[float, ...]:
    """|(W - Q) x|^2, |W x|^2 and their product, over all inputs."""
    missed, given = (inputs @ matrix.mT for matrix in part[:2])
    products = ((missed, missed), (given, given), (missed, given))
    return tuple(float((one * other).sum(dtype=torch.float64)) for one, other in products)


def _cosine(lost: float, whole: float, both: float) -> float:
    """Of W x and Q x, from |(W - Q) x|^2, |W x|^2 and their product."""
    other = whole - 2.0 * both + lost
    if not whole > 0.0:
        return 1.0
    return (whole - both) / float(np.sqrt(whole * other)) if other > 0.0 else 0.0

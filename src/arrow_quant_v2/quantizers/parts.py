"""Weights of which not every row meets the same inputs, or whose rows belong to inputs, fitted part by part.

Each expert of a stack, each group of a convolution, and each projection of attention to something else has an H of its
own. Knows nothing of models, files or where the stats come from.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from arrow_quant_v2.engines.one_core import each_on_one_core
from arrow_quant_v2.kernels.tensors import dequantized
from arrow_quant_v2.quantizers.basis import Basis
from arrow_quant_v2.quantizers.calibrated import Fitted, InBasis, Sight, error_of, every_basis, loss_of, spaced
from arrow_quant_v2.quantizers.gptq_rows import gptq_rows, values_of, weights_alone
from arrow_quant_v2.quantizers.result import joined, not_finite

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from arrow_quant_v2.packed import PackedTensor
    from arrow_quant_v2.quantizers.calibrated import Freedom, Weight
    from arrow_quant_v2.quantizers.result import QuantizedRows

FEW = 8  # times as many columns as tokens: an H of fewer says little of a part
JUDGES, JUDGED_ROWS = 8, 32  # parts, and rows of each, by which a basis is chosen for all
JUDGED_COLUMNS = 64  # of a weight whose rows belong to inputs, as whole groups
OWN, SHARED, ALONE = "to inputs of their own", "to the inputs of all", "by their weights alone"


@dataclass(frozen=True, kw_only=True, eq=False)
class _Part:
    """Some rows of a weight, what they are fitted by, and how a decision calls that; seen: tokens of their own.

    `first` is the number of the first one among all rows of the weight.
    """

    first: int
    weight: Weight
    sight: Sight
    by: str
    seen: int


def fit_in_parts(weights: Sequence[Weight], sight: Sight, freedom: Freedom) -> list[Fitted]:
    """Each weight by its spec and the inputs of each of its parts; all parts of one weight in one basis.

    A part that saw few tokens is fitted to what all parts are given, or by its weights alone, whichever loses less for
    those few; one that saw none by its weights alone.

    Raises:
        QuantizationError: an H has no Cholesky factor, or a weight is not finite.
    """
    return [(_by_rows if sight.transposed else _by_columns)(weight, sight, freedom) for weight in weights]


@dataclass(frozen=True, kw_only=True, eq=False)
class Judged:
    """Some rows and columns of a part, quantized: what they became, and what was wanted.

    rows     (r,) int64 among all rows of the weight, columns (c,) int64, left = dW (r, c)
    outputs  tr(dW H dW^T) and tr(W H W^T)
    sizes    |dW|^2 and |W|^2
    stands   for how many times as many outputs of the whole weight these stand, parts counted by their tokens
    """

    rows: Tensor
    columns: Tensor
    left: Tensor
    outputs: tuple[float, float]
    sizes: tuple[float, float]
    stands: float


def judged_parts(weight: Weight, sight: Sight, freedom: Freedom) -> list[Judged]:
    """Some rows of the parts that saw most tokens, or some groups of columns where rows belong to inputs.

    Raises:
        QuantizationError: an H has no Cholesky factor.
    """
    parts = list(_parts(weight, sight))
    judges = _judges(parts)
    seen = sum(part.seen * len(part.weight.values) for part in judges)
    others = sum(part.seen * len(part.weight.values) for part in parts) / seen if seen else 1.0
    if sight.transposed:
        return [_judged_columns(part, others) for part in judges]
    basis = _basis(parts, weight, sight, replace(freedom, equalize=False))
    return [_judged_rows(part, basis, sight, freedom, others) for part in judges]


def lost_of(judged: Sequence[Judged]) -> tuple[float, float]:
    """tr(dW H dW^T) / tr(W H W^T) and |dW|^2 / |W|^2."""
    lost, whole = (sum(one.outputs[place] for one in judged) for place in (0, 1))
    changed, size = (sum(one.sizes[place] for one in judged) for place in (0, 1))
    return lost / whole if whole else 0.0, changed / size if size else 0.0


def _judged_rows(part: _Part, basis: Basis, sight: Sight, freedom: Freedom, others: float) -> Judged:
    some = replace(part, weight=part.weight.some(JUDGED_ROWS))
    left, aim = _better(some, basis, sight, freedom)[0].left, some.weight.aim
    return Judged(
        rows=part.first + spaced(len(part.weight.values), JUDGED_ROWS),
        columns=torch.arange(aim.shape[1]),
        left=left,
        outputs=(loss_of(left, part.sight.hessian), loss_of(aim, part.sight.hessian)),
        sizes=(float(left.square().sum()), float(aim.square().sum())),
        stands=others * len(part.weight.values) / len(aim),
    )


def _judged_columns(part: _Part, others: float) -> Judged:
    group, columns = part.weight.layout.group, part.weight.values.shape[1]
    starts = group * spaced(max(1, columns // group), max(1, JUDGED_COLUMNS // group))
    chosen = (starts[:, None] + torch.arange(min(group, columns))).flatten()
    aim, hessian = part.weight.aim.cpu()[:, chosen], part.sight.hessian.cpu()
    left = aim - values_of(_rows(part, aim), part.weight.spec, len(chosen))
    return Judged(
        rows=part.first + torch.arange(len(aim)),
        columns=chosen,
        left=left,
        outputs=(loss_of(left.mT, hessian), loss_of(aim.mT, hessian)),
        sizes=(float(left.square().sum()), float(aim.square().sum())),
        stands=others * columns / len(chosen),
    )


def _rows(part: _Part, aim: Tensor) -> QuantizedRows:
    """What a part whose rows belong to inputs becomes, or some columns of it."""
    if part.by == ALONE:
        return weights_alone(aim, part.weight.spec)
    return gptq_rows(aim.cpu(), part.weight.spec, part.sight.hessian.cpu(), part.sight.count)  # too narrow for a GPU


def _judges(parts: Sequence[_Part]) -> list[_Part]:
    """Those that saw most tokens."""
    return sorted(parts, key=lambda part: -part.seen)[:JUDGES]


def _by_columns(weight: Weight, sight: Sight, freedom: Freedom) -> Fitted:
    parts = list(_parts(weight, sight))
    basis = _basis(parts, weight, sight, replace(freedom, equalize=False))

    def fitted(part: _Part) -> tuple[Fitted, str]:
        return _better(part, basis, sight, freedom)

    found = each_on_one_core(fitted, parts) if len(parts) > 1 else [fitted(part) for part in parts]
    packed = _joined(weight, [one.packed for one, _ in found], basis)
    ways = [by for _, by in found]
    return _whole(weight, packed, basis, parts, ways)


def _by_rows(weight: Weight, sight: Sight, _: Freedom) -> Fitted:
    """Channels along the columns are outputs, so nothing is turned."""
    parts = list(_parts(weight, sight))
    rows = joined(each_on_one_core(lambda part: _rows(part, part.weight.aim), parts))
    if not np.isfinite(rows.sums).all():
        raise not_finite(weight.values, weight.info.name, weight.info.shape)
    packed = rows.packed(weight.info.name, weight.info.dtype, weight.layout)
    return _whole(weight, packed, Basis(channels=weight.layout.channels or 1), parts, [part.by for part in parts])


def _parts(weight: Weight, sight: Sight) -> Iterator[_Part]:
    """All rows of the weight, in their order: parts that saw tokens, and what lies between them."""
    if not sight.parts:
        yield _Part(first=0, weight=weight, sight=sight, by=OWN, seen=sight.count)
        return
    start = 0
    for (first, stop), own in sorted(sight.parts.items()):
        if start < first:
            yield _part(weight, start, first, None, sight)
        yield _part(weight, first, stop, own, sight)
        start = stop
    if start < len(weight.values):
        yield _part(weight, start, len(weight.values), None, sight)


def _part(weight: Weight, start: int, stop: int, own: Sight | None, shared: Sight) -> _Part:
    rows = slice(start, stop)
    layout = replace(weight.layout, shape=(stop - start, *weight.layout.shape[weight.layout.quant_axis or 0 :]))
    some = replace(
        weight,
        values=weight.values[rows],
        layout=replace(layout, quant_axis=1),
        wanted=None if weight.wanted is None else weight.wanted[rows],
    )
    if own is None or not own.hessian.diagonal().any():
        return _Part(first=start, weight=some, sight=_blind(shared, some), by=ALONE, seen=0)
    few = FEW * own.count < len(own.hessian)
    if few and shared.transposed:
        return _Part(first=start, weight=some, sight=_blind(shared, some), by=ALONE, seen=own.count)
    return _Part(first=start, weight=some, sight=own, by=SHARED if few else OWN, seen=own.count)


def _blind(sight: Sight, weight: Weight) -> Sight:
    """As if every input were seen alike often, and none with another: by it, weights alone decide."""
    count = len(weight.values) if sight.transposed else len(sight.hessian)
    return Sight(hessian=torch.eye(count, device=sight.absmax.device), count=100 * count, absmax=sight.absmax)


def _basis(parts: Sequence[_Part], weight: Weight, sight: Sight, freedom: Freedom) -> Basis:
    """The basis that loses least of what the parts of most tokens give; the first one where several do."""
    bases = every_basis([weight], sight, freedom)
    judges = _judges(parts)
    if len(bases) == 1:
        return bases[0]
    pairs = [(basis, part) for basis in bases for part in judges]
    losses = each_on_one_core(lambda pair: _loss(*pair), pairs)
    totals = [sum(losses[at : at + len(judges)]) for at in range(0, len(losses), len(judges))]
    return bases[totals.index(min(totals))]


def _loss(basis: Basis, part: _Part) -> float:
    return InBasis(basis, part.sight, [part.weight.layout.group]).loss(part.weight.some(JUDGED_ROWS))


def _better(part: _Part, basis: Basis, sight: Sight, freedom: Freedom) -> tuple[Fitted, str]:
    """A part fitted, and by what: of few tokens in two ways, of which those tokens choose."""
    groups = [part.weight.layout.group]
    if part.by != SHARED:
        return InBasis(basis, part.sight, groups).fitted(part.weight, freedom), part.by
    ways = ((SHARED, sight), (ALONE, _blind(sight, part.weight)))
    found = [(InBasis(basis, one, groups).fitted(part.weight, freedom), by) for by, one in ways]
    return min(found, key=lambda pair: loss_of(pair[0].left, part.sight.hessian))


def _joined(weight: Weight, parts: Sequence[PackedTensor], basis: Basis) -> PackedTensor:
    """The rows of all parts, as one tensor."""
    zeros = [part.zero_points for part in parts if part.zero_points is not None]
    return replace(
        parts[0],
        layout=weight.layout,
        codes=np.concatenate([part.codes for part in parts]),
        scales=np.concatenate([part.scales for part in parts]),
        zero_points=np.concatenate(zeros) if zeros else None,
        row_scales=np.concatenate([part.row_scales for part in parts]),
        rotation=basis.rotation,
    )


def _whole(weight: Weight, packed: PackedTensor, basis: Basis, parts: Sequence[_Part], ways: Sequence[str]) -> Fitted:
    """The weight as all its parts make it, and what is to be said of those that had too few tokens."""
    quantized = dequantized(packed).to(weight.values.device)
    rows: Counter[str] = Counter()
    for part, by in zip(parts, ways, strict=True):
        rows[by] += len(part.weight.values)
    told = [f"{rows[by]} of its {len(weight.values)} rows {by}" for by in (SHARED, ALONE) if rows[by]]
    return Fitted(
        packed=packed,
        basis=basis,
        error=error_of(weight.values, quantized),
        left=weight.aim - quantized,
        remarks=(f"too few tokens: {', '.join(told)}",) if told else (),
    )

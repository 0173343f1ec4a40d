"""Calibrated quantization of a whole model: each block is fitted on what the quantized blocks before it give.

Knows nothing of how samples were found, nor of where the results are kept.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from arrow_quant_v2.calibration.drift import Drift, Originals
from arrow_quant_v2.calibration.observe import observe, strata
from arrow_quant_v2.engines.one_core import each_on_one_core
from arrow_quant_v2.errors import QuantizationError
from arrow_quant_v2.kernels.tensors import dequantized
from arrow_quant_v2.quantizers.calibrated import Freedom, Sight, Weight, fit_together, output_error
from arrow_quant_v2.quantizers.correction import corrected
from arrow_quant_v2.quantizers.time_aware import TimeAwareQuantizer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import nn

    from arrow_quant_v2.calibration.blocks import Walk
    from arrow_quant_v2.calibration.observe import Strata
    from arrow_quant_v2.calibration.stats import InputStats
    from arrow_quant_v2.decisions import Decision, Kind
    from arrow_quant_v2.packed import PackedTensor, WeightError
    from arrow_quant_v2.plan import LayerPlan
    from arrow_quant_v2.quantizers.calibrated import Fitted
    from arrow_quant_v2.quantizers.time_aware import TimeGroupParameters
    from arrow_quant_v2.time_groups import TimeGroups


@dataclass(frozen=True, kw_only=True, eq=False)
class CalibratedLayer:
    """One layer as calibration left it.

    output_error  ||dW x||^2 / ||W x||^2 over inputs x of each time group, W as it is after it was corrected
    activations   8-bit parameters of its inputs in each time group; None: time-aware quantization is off
    spread        mean, std, min and max of its inputs in each time group
    """

    plan: LayerPlan
    packed: PackedTensor
    error: WeightError
    decision: Decision
    output_error: tuple[float, ...]
    activations: tuple[TimeGroupParameters, ...] | None
    spread: Mapping[str, Sequence[float]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Fitting:
    """What a run through all blocks needs: plans by the module's own names of their weights, and where results go.

    values    a plan -> its weight, (rows, columns) float32
    finished  a plan -> the weight that an earlier run made of it, or None
    keep      takes each layer as it is done
    holding   keeps a part's weights in memory
    strength  how much of the drift of its inputs a weight makes up for, 0 to 1
    """

    plans: Mapping[str, LayerPlan]
    groups: TimeGroups
    freedom: Freedom
    time_aware: bool
    shown: str
    values: Callable[[LayerPlan], torch.Tensor]
    finished: Callable[[LayerPlan], torch.Tensor | None]
    keep: Callable[[CalibratedLayer], None]
    holding: Callable[[nn.Module], AbstractContextManager[None]] = lambda _: nullcontext()
    strength: float = 0.0


def fit_in_sequence(walk: Walk, ask: Fitting) -> None:
    """Quantize all planned layers of the walk, block by block, input by input.

    A layer whose inputs no sample gives, or which are always 0, is left as it is: it is not kept, and quantizing it
    without calibration is the caller's.

    Raises:
        QuantizationError: a weight or an input is not finite, or the model cannot be called with a sample.
    """
    parts = strata(walk.samples, ask.groups)
    for number, block in enumerate(walk.blocks):
        with ask.holding(block.module):
            _fit_block(walk, number, parts, ask)


def _fit_block(walk: Walk, number: int, parts: Strata, ask: Fitting) -> None:
    """Fit all layers of a block, and run it on all samples; at first also with its original weights, for the drift."""
    block, samples = walk.blocks[number], range(len(walk.samples))
    last = block is walk.blocks[-1]
    if ask.strength and not last:
        each_on_one_core(lambda sample: walk.finish(number, walk.beside(sample)), samples)
    originals = Originals(walk.parameters) if ask.strength else None
    for place, layers in enumerate(block.inputs):
        if originals is not None:
            originals.remember(layers)
        if not _restored(walk, layers, ask):
            drift = Drift(originals) if originals is not None and (number or place) else None
            stats = observe(walk, number, layers, parts, drift)
            if stats is not None:
                _fit(walk, stats, layers, ask, drift)
    if not last:
        each_on_one_core(lambda sample: walk.finish(number, sample), samples)
        walk.forget(number)


def _restored(walk: Walk, layers: tuple[str, ...], ask: Fitting) -> bool:
    """Put what an earlier run made into the model; False where it did not make all: their basis is a common choice."""
    weights = [ask.finished(ask.plans[layer]) for layer in layers]
    for layer, weight in zip(layers, weights, strict=True):
        if weight is None:
            return False
        _put(walk.parameters[layer], weight)
    return True


def _put(parameter: torch.Tensor, values: torch.Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(values.reshape(parameter.shape))


def _fit(walk: Walk, stats: InputStats, layers: Sequence[str], ask: Fitting, drift: Drift | None) -> None:
    """Fit the layers that share one input, and put what they became into the model."""
    for layer, values in fit_input(stats, layers, ask, None if drift is None else drift.matrix).items():
        _put(walk.parameters[layer], values)


def fit_input(
    stats: InputStats, layers: Sequence[str], ask: Fitting, drift: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """Fit layers that share one input and hand them on; the weight (rows, columns) that each of them became.

    `drift` is D of that input (see calibration.drift); None: it has none, or it is not known.

    Raises:
        QuantizationError: a weight is not finite, or H has no Cholesky factor.
    """
    weights = [_weight(ask.plans[layer], ask) for layer in layers]
    if drift is not None:
        values = [weight.values for weight in weights]
        wanted = corrected(values, stats.second.matrix, drift, stats.count, ask.strength)
        weights = [replace(weight, wanted=one) for weight, one in zip(weights, wanted, strict=True)]
    sight = Sight(hessian=stats.second.matrix, count=stats.count, absmax=stats.absmax.amax(dim=0))
    fitted, trouble = _spatial_or_per_channel(weights, sight, ask.freedom)
    for layer, weight, one in zip(layers, weights, fitted, strict=True):
        ask.keep(_layer(ask.plans[layer], weight, one, stats, ask, trouble=trouble))
    return {layer: dequantized(one.packed) for layer, one in zip(layers, fitted, strict=True)}  # bits as stored


def _spatial_or_per_channel(
    weights: Sequence[Weight], sight: Sight, freedom: Freedom
) -> tuple[list[Fitted], tuple[str, ...]]:
    """The fit; where equalization fails, one without it and with one group per row, and what failed."""
    try:
        return fit_together(weights, sight, freedom), ()
    except QuantizationError as error:
        if not freedom.equalize:
            raise
        plain = [_per_channel(weight) for weight in weights]
        fitted = fit_together(plain, sight, replace(freedom, equalize=False))
        return fitted, (f"spatial quantization failed ({error}), so per channel",)


def _per_channel(weight: Weight) -> Weight:
    """The same weight, asked for one group per row."""
    return replace(weight, layout=replace(weight.layout, group_size=None), spec=replace(weight.spec, group_size=None))


def _weight(plan: LayerPlan, ask: Fitting) -> Weight:
    if plan.spec is None or plan.layout is None:
        raise QuantizationError(f"{plan.tensor.name}: has no spec to be quantized by; this is a bug, please report it")
    return Weight(values=ask.values(plan), info=plan.tensor, layout=plan.layout, spec=plan.spec)


def _layer(
    plan: LayerPlan, weight: Weight, fitted: Fitted, stats: InputStats, ask: Fitting, *, trouble: tuple[str, ...]
) -> CalibratedLayer:
    errors = tuple(output_error(fitted.left, weight.aim, stats.probes))
    spread = stats.spread()
    ranges: tuple[TimeGroupParameters, ...] | None = None
    try:
        ranges = TimeAwareQuantizer(ask.groups).parameters(spread["min"], spread["max"]) if ask.time_aware else None
    except QuantizationError as error:
        trouble = (*trouble, f"time-aware quantization failed ({error}), so no activation ranges are stored")
    return CalibratedLayer(
        plan=plan,
        packed=fitted.packed,
        error=fitted.error,
        decision=_decision(plan, fitted, errors, trouble, ask.shown),
        output_error=errors,
        activations=ranges,
        spread=spread,
    )


def _decision(
    plan: LayerPlan, fitted: Fitted, errors: Sequence[float], trouble: tuple[str, ...], shown: str
) -> Decision:
    """What the plan said, and what calibration adds to it; a fallback where a part of the strategy failed."""
    known = [error for error in errors if error == error]  # noqa: PLR0124 - not NaN
    basis = f", {fitted.basis}" if str(fitted.basis) else ""
    mean = sum(known) / max(1, len(known))
    because = f"{plan.decision.because}, calibrated on {shown}{basis}, output error {mean:.2g}"
    kind: Kind = "fallback" if trouble else plan.decision.kind
    return replace(plan.decision, kind=kind, because="; ".join((because, *trouble)))

"""Calibrated quantization of a whole model: each block is fitted on what the quantized blocks before it give.

Knows nothing of how samples were found, nor of where the results are kept.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from arrow_quant_v2.attempts import fit_somehow, refuse_wild
from arrow_quant_v2.calibration.drift import Drift, Originals
from arrow_quant_v2.calibration.importance import ALIKE
from arrow_quant_v2.calibration.observe import observe, strata
from arrow_quant_v2.engines.one_core import each_on_one_core
from arrow_quant_v2.errors import BarMissedError, QuantizationError
from arrow_quant_v2.fallback import Bar, warn_of_fallback
from arrow_quant_v2.kernels.tensors import dequantized
from arrow_quant_v2.quantizers.calibrated import Sight, Weight, outputs_of_parts
from arrow_quant_v2.quantizers.correction import corrected
from arrow_quant_v2.quantizers.smoothing import Ranges
from arrow_quant_v2.quantizers.time_aware import TimeAwareQuantizer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import nn

    from arrow_quant_v2.attempts import Made
    from arrow_quant_v2.calibration.blocks import Walk
    from arrow_quant_v2.calibration.importance import Importance
    from arrow_quant_v2.calibration.observe import Strata
    from arrow_quant_v2.calibration.stats import InputStats
    from arrow_quant_v2.decisions import Decision, Kind
    from arrow_quant_v2.packed import PackedTensor, WeightError
    from arrow_quant_v2.plan import LayerPlan
    from arrow_quant_v2.quantizers.calibrated import Fitted, Freedom, Outputs
    from arrow_quant_v2.quantizers.time_aware import TimeGroupParameters
    from arrow_quant_v2.time_groups import TimeGroups

OUTPUT_COSINE = "output cosine"
NO_BAR = Bar()


@dataclass(frozen=True, kw_only=True, eq=False)
class CalibratedLayer:
    """One layer as calibration left it.

    output_error  ||dW x||^2 / ||W x||^2 over inputs x of each time group, W as it is after it was corrected
    activations   8-bit parameters of its inputs in each time group; None: time-aware quantization is off
    smoothed      they are those of its inputs as they are once their channels are equalized
    spread        mean, std, min and max of its inputs in each time group
    """

    plan: LayerPlan
    packed: PackedTensor
    error: WeightError
    decision: Decision
    output_error: tuple[float, ...]
    activations: tuple[TimeGroupParameters, ...] | None
    spread: Mapping[str, Sequence[float]]
    smoothed: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Fitting:
    """What a run through all blocks needs: plans by the module's own names of their weights, and where results go.

    values    a plan -> its weight, (rows, columns) float32
    finished  a plan -> the weight that an earlier run made of it, or None
    keep      takes each layer as it is done
    holding   keeps a part's weights in memory
    importance  how much each row of each input counts
    strength  how much of the drift of its inputs a weight makes up for, 0 to 1
    bar       what the outputs of each layer must reach
    asked     a plan -> the width that was asked of this layer at first
    at        a plan and the bits that it missed its bar with -> its plan at the next width, or None
    give_up   takes each layer that no way of fitting can be gone with, and why
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
    importance: Importance = ALIKE
    strength: float = 0.0
    bar: Bar = NO_BAR
    asked: Callable[[LayerPlan], int] = lambda plan: 0 if plan.spec is None else plan.spec.bits
    at: Callable[[LayerPlan, int], LayerPlan | None] = lambda _plan, _bits: None
    give_up: Callable[[LayerPlan, str], None] = lambda _plan, _because: None


def fit_in_sequence(walk: Walk, ask: Fitting) -> None:
    """Quantize all planned layers of the walk, block by block, input by input.

    A layer whose inputs no sample gives, or which are always 0, is left as it is: it is not kept, and quantizing it
    without calibration is the caller's.

    Raises:
        QuantizationError: a weight or an input is not finite, or the model cannot be called with a sample.
    """
    parts = replace(strata(walk.samples, ask.groups), importance=ask.importance)
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
            known = originals is not None and (number or place) and walk.parted.keys().isdisjoint(layers)
            drift = Drift(originals) if originals is not None and known else None
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

    A layer whose outputs are not close enough is fitted again at the next width, before anything is fitted to what it
    gives. Where no fit can be done, the layers are given up: they are the caller's to quantize without calibration.
    `drift` is D of that input (see calibration.drift); None: it has none, or it is not known.

    Raises:
        QuantizationError: a weight is not finite; or, by the bar, a layer may not have more bits or nothing may fail.
    """
    where = stats.absmax.device
    tries = [_Try(plan=ask.plans[layer], weight=_weight(ask.plans[layer], ask, where)) for layer in layers]
    try:
        fits = _close_enough(_made_up_for(tries, stats, drift, ask), stats, ask)
    except BarMissedError:
        raise
    except QuantizationError as error:
        refuse_wild([one.weight for one in tries])
        if ask.bar.fail_fast:
            raise
        for one in tries:
            ask.give_up(one.plan, str(error))
        return {}
    for fit in fits:
        ask.keep(_layer(fit, stats, ask))
    return {layer: dequantized(fit.fitted.packed) for layer, fit in zip(layers, fits, strict=True)}  # bits as stored


@dataclass(frozen=True, kw_only=True, eq=False)
class _Try:
    """A layer to be fitted, and in words what did not go as asked."""

    plan: LayerPlan
    weight: Weight
    trouble: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class _Fit(_Try):
    """A layer that was fitted, and how close its outputs are."""

    fitted: Fitted
    outputs: Outputs


def _made_up_for(tries: list[_Try], stats: InputStats, drift: torch.Tensor | None, ask: Fitting) -> list[_Try]:
    """The weights that suit their inputs, where those have drifted."""
    if drift is None:
        return tries
    values = [_outputs_first(one.weight.values, stats) for one in tries]
    try:
        wanted = corrected(values, stats.second.matrix, drift, stats.count, ask.strength)
    except QuantizationError as error:
        if ask.bar.fail_fast:
            raise
        trouble = f"making up for earlier layers failed ({error}), so not made up for"
        return [replace(one, trouble=(trouble,)) for one in tries]
    aims = [_outputs_first(aim, stats) for aim in wanted]
    return [replace(one, weight=replace(one.weight, wanted=aim)) for one, aim in zip(tries, aims, strict=True)]


def _outputs_first(matrix: torch.Tensor, stats: InputStats) -> torch.Tensor:
    """(out, in) of a weight as it is stored, and back."""
    return matrix.mT.contiguous() if stats.transposed else matrix


def _close_enough(tries: Sequence[_Try], stats: InputStats, ask: Fitting) -> list[_Fit]:
    """All of them fitted, those that miss their bar again at ever more bits."""
    fits = _fitted(tries, stats, ask)
    while low := [place for place, fit in enumerate(fits) if _demands_more(fit, ask)]:
        again = _fitted([_widened(fits[place], ask) for place in low], stats, ask)
        for place, fit in zip(low, again, strict=True):
            fits[place] = fit
    return fits


def _demands_more(fit: _Fit, ask: Fitting) -> bool:
    asked = ask.asked(fit.plan)
    name, bits = fit.plan.tensor.name, fit.weight.spec.bits
    more = ask.bar.demands_more(name, OUTPUT_COSINE, fit.outputs.cosine, bits, asked)
    return more and ask.at(fit.plan, bits) is not None


def _widened(fit: _Fit, ask: Fitting) -> _Try:
    """The same layer, asked for at the next width."""
    bits = fit.weight.spec.bits
    plan = ask.at(fit.plan, bits)
    if plan is None or plan.spec is None or plan.layout is None:
        raise QuantizationError(f"{fit.plan.tensor.name}: has no next width; this is a bug, please report it")
    missed = ask.bar.missed(OUTPUT_COSINE, fit.outputs.cosine, bits, ask.asked(fit.plan))
    weight = replace(fit.weight, spec=plan.spec, layout=plan.layout)
    return _Try(plan=plan, weight=weight, trouble=(*fit.trouble, missed))


def _fitted(tries: Sequence[_Try], stats: InputStats, ask: Fitting) -> list[_Fit]:
    """The layers fitted together, and how close each of them is."""
    sight = sight_of(stats)
    made, trouble = fit_somehow([one.weight for one in tries], sight, ask.freedom, fail_fast=ask.bar.fail_fast)
    return [
        _Fit(
            plan=one.plan,
            weight=result.weight,
            trouble=(*one.trouble, *trouble, *result.fitted.remarks),
            fitted=result.fitted,
            outputs=_outputs(result, stats, sight),
        )
        for one, result in zip(tries, made, strict=True)
    ]


def sight_of(stats: InputStats) -> Sight:
    """The stats as the fit sees them; parts that overlap, or are not all that was seen, are taken together."""
    ends = [0, *(end for part in sorted(stats.parts) for end in part)]
    apart = ends == sorted(ends) and sum(own.count for own in stats.parts.values()) == stats.count
    return Sight(
        hessian=stats.second.matrix,
        count=stats.count,
        absmax=stats.absmax.amax(dim=0),
        ranges=_ranges(stats),
        parts={part: sight_of(own) for part, own in stats.parts.items()} if apart else {},
        transposed=stats.transposed,
    )


def _ranges(stats: InputStats) -> Ranges:
    spread, where = stats.spread(), stats.absmax.device
    low, high = (torch.tensor(spread[side], dtype=torch.float32, device=where) for side in ("min", "max"))
    return Ranges(absmax=stats.absmax, low=low, high=high, count=stats.count)


def _outputs(made: Made, stats: InputStats, sight: Sight) -> Outputs:
    """How close the outputs are, those of each part for its own inputs."""
    left, aim = made.fitted.left, made.weight.aim
    seen = {part: stats.parts[part] for part in sight.parts} or {(0, len(aim)): stats}
    return outputs_of_parts(
        [
            (_outputs_first(left[first:stop], stats), _outputs_first(aim[first:stop], stats), own.probes)
            for (first, stop), own in seen.items()
        ]
    )


def _weight(plan: LayerPlan, ask: Fitting, device: torch.device) -> Weight:
    if plan.spec is None or plan.layout is None:
        raise QuantizationError(f"{plan.tensor.name}: has no spec to be quantized by; this is a bug, please report it")
    return Weight(values=ask.values(plan).to(device), info=plan.tensor, layout=plan.layout, spec=plan.spec)


def _layer(fit: _Fit, stats: InputStats, ask: Fitting) -> CalibratedLayer:
    trouble, basis = fit.trouble, fit.fitted.basis
    smoothed = ask.freedom.smooth and fit.weight.is_linear and basis.equalization is not None
    inputs = _ranges(stats).in_basis(basis) if smoothed else _ranges(stats)
    ranges: tuple[TimeGroupParameters, ...] | None = None
    try:
        if ask.time_aware:
            ranges = TimeAwareQuantizer(ask.groups).parameters(inputs.low.tolist(), inputs.high.tolist())
    except QuantizationError as error:
        if ask.bar.fail_fast:
            raise
        trouble = (*trouble, f"time-aware quantization failed ({error}), so no activation ranges are stored")
    decision = _decision(fit, trouble, ask)
    if trouble:
        warn_of_fallback(decision.layer_name, f"{decision.got} {decision.method}: {'; '.join(trouble)}")
    return CalibratedLayer(
        plan=replace(fit.plan, spec=fit.weight.spec, layout=fit.weight.layout),
        packed=fit.fitted.packed,
        error=fit.fitted.error,
        decision=decision,
        output_error=fit.outputs.errors,
        activations=ranges,
        spread=stats.spread(),
        smoothed=smoothed,
    )


def _decision(fit: _Fit, trouble: tuple[str, ...], ask: Fitting) -> Decision:
    """What the plan said, and what calibration adds to it; a fallback where a part of the strategy failed."""
    known = [error for error in fit.outputs.errors if error == error]  # noqa: PLR0124 - not NaN
    basis = f", {fit.fitted.basis}" if str(fit.fitted.basis) else ""
    mean = sum(known) / max(1, len(known))
    planned = fit.plan.decision
    because = f"{planned.because}, calibrated on {ask.shown}{basis}, output error {mean:.2g}"
    kind: Kind = "fallback" if trouble else planned.kind
    remark = ask.bar.remark(OUTPUT_COSINE, fit.outputs.cosine, fit.weight.spec.bits, ask.asked(fit.plan))
    return replace(planned, kind=kind, because="; ".join((because, *trouble, *remark)), method=fit.weight.spec.method)

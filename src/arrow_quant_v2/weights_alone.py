"""A layer quantized from its weights alone, as asked, or else simpler, wider, or not at all.

Knows nothing of other layers, of inputs, or of where results are kept.
"""

from __future__ import annotations

from contextvars import copy_context
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from arrow_quant_v2.errors import QuantizationError
from arrow_quant_v2.fallback import Bar, warn_of_fallback
from arrow_quant_v2.layers import records, slices, work
from arrow_quant_v2.plan import kept_plan

if TYPE_CHECKING:
    from collections.abc import Callable

    from arrow_quant_v2.config import Modality
    from arrow_quant_v2.layers import Piece
    from arrow_quant_v2.plan import LayerPlan
    from arrow_quant_v2.sources.base import Source
    from arrow_quant_v2.store.record import LayerRecord

WEIGHT_COSINE = "weight cosine"
SIMPLER = {"r2q": "clip", "clip": "rtn"}


@dataclass(frozen=True, kw_only=True, eq=False)
class Alone:
    """What is asked of layers that are quantized from their weights alone.

    bar     what the weight cosine of each must reach; None: something better judges them
    asked   a plan -> the width that was asked of this layer at first
    wider   a plan and the bits that it has -> its plan at the next width, or None
    """

    source: Source
    modality: Modality
    slice_bytes: int
    bar: Bar | None
    fail_fast: bool
    asked: Callable[[LayerPlan], int]
    wider: Callable[[LayerPlan, int], LayerPlan | None]


def settled(plan: LayerPlan, pieces: list[Piece], ask: Alone) -> tuple[LayerPlan, list[LayerRecord]]:
    """The rows of the store that hold this layer, and the plan that was followed in the end.

    `pieces` are what became of its slices by the plan; they are let go of.

    Raises:
        QuantizationError: a method failed and nothing may; or the layer misses its bar and may not have more bits.
    """
    said: tuple[str, ...] = ()
    while True:
        following = _next(plan, pieces, ask) if any(_failed(piece) for piece in pieces) else None
        if following is None:
            layer = list(records(_told(plan, said), pieces, ask.modality))
            following = _closer(plan, layer[0].cosine_similarity, ask)
            if following is None:
                return _finished(plan, layer, said, ask)
        plan, because = following
        said = (*said, because)
        apart = copy_context()  # the work sets how many threads the kernels may use
        pieces = [apart.run(work, ask.source, one) for one in slices(plan, ask.slice_bytes)]


def _finished(
    plan: LayerPlan, layer: list[LayerRecord], said: tuple[str, ...], ask: Alone
) -> tuple[LayerPlan, list[LayerRecord]]:
    """The layer as it stays, whatever it was before; told where that is not what was asked."""
    if said:
        warn_of_fallback(plan.tensor.name, f"{plan.decision.got} {plan.decision.method or ''}: {'; '.join(said)}")
    told, cosine = _told(plan, said), layer[0].cosine_similarity
    if ask.bar is None or plan.spec is None or cosine is None:
        return told, layer
    remark = ask.bar.remark(WEIGHT_COSINE, cosine, plan.spec.bits, ask.asked(plan))
    told = replace(told, decision=replace(told.decision, because="; ".join((told.decision.because, *remark))))
    return told, [replace(one, decision=str(told.decision)) for one in layer]


def _failed(piece: Piece) -> bool:
    return isinstance(piece.result, QuantizationError)


def _next(plan: LayerPlan, pieces: list[Piece], ask: Alone) -> tuple[LayerPlan, str]:
    """What is done where the method failed: a simpler one, more bits, or nothing at all; and why."""
    error = next(piece.result for piece in pieces if isinstance(piece.result, QuantizationError))
    pieces.clear()
    if ask.fail_fast or plan.spec is None:
        raise error
    method, bits = plan.spec.method, plan.spec.bits
    failed = f"{method} failed at int{bits} ({error})"
    if method in SIMPLER:
        return _by(plan, SIMPLER[method]), failed
    wide = ask.wider(plan, bits)
    return (kept_plan(plan, "every method failed") if wide is None else wide), failed


def _closer(plan: LayerPlan, cosine: float | None, ask: Alone) -> tuple[LayerPlan, str] | None:
    """The same layer at the next width, and why, where it misses its bar."""
    if ask.bar is None or plan.spec is None or cosine is None:
        return None
    bits, asked = plan.spec.bits, ask.asked(plan)
    if not ask.bar.demands_more(plan.tensor.name, WEIGHT_COSINE, cosine, bits, asked):
        return None
    wide = ask.wider(plan, bits)
    return None if wide is None else (wide, ask.bar.missed(WEIGHT_COSINE, cosine, bits, asked))


def _by(plan: LayerPlan, method: str) -> LayerPlan:
    """The same width by another method, on the affine grid."""
    if plan.spec is None or plan.layout is None:
        return plan
    return replace(
        plan,
        spec=replace(plan.spec, method=method),
        layout=plan.layout.on("affine"),
        decision=replace(plan.decision, method=method),
    )


def _told(plan: LayerPlan, said: tuple[str, ...]) -> LayerPlan:
    """The plan with what went before it."""
    if not said:
        return plan
    decision = plan.decision
    return replace(plan, decision=replace(decision, kind="fallback", because="; ".join((decision.because, *said))))

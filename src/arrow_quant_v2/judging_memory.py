"""How much memory judges and tuning take beside the fitting of layers, told before any work; reads no values."""

from __future__ import annotations

from typing import TYPE_CHECKING

from arrow_quant_v2.calibration.given import LONGEST
from arrow_quant_v2.judging import MOST_CALLS
from arrow_quant_v2.plan import LOOKUP
from arrow_quant_v2.tuning import SAMPLES
from arrow_quant_v2.validation.outputs import ROOM

if TYPE_CHECKING:
    from collections.abc import Sequence

    from arrow_quant_v2.config import DiffusionQuantConfig
    from arrow_quant_v2.plan import Calibrated, LayerPlan

FLOAT = 4  # bytes
COMPARED = 2  # outputs of all calls: the original's, and those of other weights
DIVERGED = 14  # more where whole plans are judged: logarithms of both, and in twice the digits what they are made into
AT_WORK = 3  # outputs of one call in each thread: as they are, in float32, as probabilities
TUNED = 3 + 1 + SAMPLES  # numbers for each weight: the code and its two moments, the gradient, and that of each call


def judging_bytes(plans: Sequence[LayerPlan], calibrated: Calibrated, config: DiffusionQuantConfig, cores: int) -> int:
    """No more than this is taken by judges of outputs and by tuning; 0 where neither is asked, or nothing calibrated.

    Outputs of pictures and sounds are as small as these; text has `LONGEST` tokens in a call at most.
    """
    if not calibrated.names:
        return 0
    call = LONGEST * _width(plans, calibrated)
    kept = min(ROOM, MOST_CALLS * call)
    whole = config.has_target and config.whole_plans > 1
    judges = COMPARED * bool(config.min_accuracy) + (COMPARED + DIVERGED) * whole
    working = AT_WORK * cores * call if judges or config.tuning_steps else 0
    return FLOAT * (judges * kept + working + _tuning(plans, calibrated, config, call, cores))


def _tuning(
    plans: Sequence[LayerPlan], calibrated: Calibrated, config: DiffusionQuantConfig, call: int, cores: int
) -> int:
    """Floats: what the original says to all calls, what moves with every weight, and what gradients need of a call."""
    if not config.tuning_steps:
        return 0
    said = min(ROOM, config.calibration_samples * call)
    weights = sum(plan.tensor.numel for plan in plans if plan.layout is not None)
    inputs = (p.layout.columns for p in plans if p.layout is not None and p.tensor.name in calibrated.names)
    return said + TUNED * weights + 2 * cores * LONGEST * sum(inputs)


def _width(plans: Sequence[LayerPlan], calibrated: Calibrated) -> int:
    """Numbers that a model says of one token: as many as there are tokens where it has a head, else a table's columns.

    Without tables, of pictures and sounds, the widest layer's.
    """
    tables = [plan.tensor.shape for plan in plans if LOOKUP.search(plan.tensor.name) and len(plan.tensor.shape) > 1]
    if not tables:
        return max((p.layout.columns for p in plans if p.layout is not None), default=1)
    tokens, columns = max(tables)[:2]
    heads = (plan for plan in plans if plan.tensor.name in calibrated.names and len(plan.tensor.shape) > 1)
    return tokens if any(plan.tensor.shape[0] == tokens for plan in heads) else columns

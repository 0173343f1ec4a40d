"""How long a calibrated run will take, from the first call of the model and two small trials; does none of the work."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
from torch.utils import _pytree as pytree

from arrow_quant_v2.calibration.collect import MOST_ROWS
from arrow_quant_v2.engines.one_core import each_on_one_core
from arrow_quant_v2.judging import MOST_CALLS
from arrow_quant_v2.kernels.cpu import threads_per_call
from arrow_quant_v2.quantizers.calibrated import TRIED_ROWS
from arrow_quant_v2.quantizers.gptq import SWEEPS, gptq
from arrow_quant_v2.quantizers.gptq_factor import factorize
from arrow_quant_v2.tuning import FEWEST, HELD_OUT, LOOKS
from arrow_quant_v2.tuning import SAMPLES as AT_ONCE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from arrow_quant_v2.calibration.blocks import Block, Walk
    from arrow_quant_v2.calibration.sample import Sample
    from arrow_quant_v2.config import LayerSpec
    from arrow_quant_v2.plan import LayerPlan

CPU = torch.device("cpu")
TRIAL_ROWS, TRIAL_COLUMNS = 1024, 256  # of a weight
PRODUCT = 1024  # rows and columns of a product of matrices
BASES = 2  # that H is looked at in
BACKWARDS = 3  # times as long as a call forwards alone
FACTORS = 3  # of H: one for each basis, and the best one again where H is large


def seconds_to_fit(
    walk: Walk,
    plans: Mapping[str, LayerPlan],
    reading: float,
    *,
    beside: bool = False,
    sweeps: int = SWEEPS,
    device: torch.device = CPU,
) -> float:
    """Seconds for all blocks of the walk: calls of the model, what is made of H, column loops, sweeps; `reading` more.

    `plans` are by the module's own names of the weights; `beside`: the original blocks run too, and D is added up; on
    the device layers are fitted.
    """
    layers = [plans[layer] for block in walk.blocks for inputs in block.inputs for layer in inputs]
    spec = next((plan.spec for plan in layers if plan.spec is not None), None)
    if spec is None:
        return reading
    weights = sum(plan.tensor.numel for plan in layers)
    rows = sum(min(MOST_ROWS, _size(sample)) for sample in walk.samples) * (3 if beside else 1)  # H is half of a matrix
    products = sum(_products(block, plans, rows, sweeps, frozenset(walk.turned)) for block in walk.blocks)
    per_weight, per_product = each_on_one_core(lambda spec: _timed(spec, sweeps, device), [spec])[0]
    cores = (threads_per_call.get() or torch.get_num_threads()) if device == CPU else 1  # they share one device
    return reading + ((2 if beside else 1) * _calls(walk) + weights * per_weight + products * per_product) / cores


def seconds_to_judge(walk: Walk) -> float:
    """Seconds for the calls by which the whole model is judged once; judges run them on all cores."""
    return min(MOST_CALLS, len(walk.samples)) * _call(walk) / (threads_per_call.get() or torch.get_num_threads())


def seconds_to_tune(walk: Walk, steps: int) -> float:
    """Seconds for so many steps of tuning: calls forwards and backwards, and looks at those that are held out."""
    if not steps or len(walk.samples) < FEWEST:
        return 0.0
    held_out = len(range(0, len(walk.samples), HELD_OUT))
    step = min(len(walk.samples) - held_out, max(1, AT_ONCE // walk.samples[0].count))
    calls = len(walk.samples) + step * steps * BACKWARDS + held_out * (1 + min(steps, LOOKS))
    return calls * _call(walk) / (threads_per_call.get() or torch.get_num_threads())


def _call(walk: Walk) -> float:
    """Seconds of one core for one call of the whole model, of the mean size."""
    sizes = [_size(sample) for sample in walk.samples]
    return sum(block.seconds for block in walk.blocks) * sum(sizes) / (sizes[0] * len(sizes))


def _calls(walk: Walk) -> float:
    """Seconds of one core: each block runs whole once, and on the average half of it for each of its inputs."""
    sizes = [_size(sample) for sample in walk.samples]
    once = sum(block.seconds * (1.0 + len(block.inputs) / 2.0) for block in walk.blocks)
    return once * sum(sizes) / sizes[0]


def _size(sample: Sample) -> int:
    """Elements of the largest tensor that a sample gives."""
    leaves: Sequence[object] = pytree.tree_leaves((sample.arguments, dict(sample.keywords)))
    return max((leaf.numel() for leaf in leaves if isinstance(leaf, torch.Tensor)), default=0) or 1


def _products(block: Block, plans: Mapping[str, LayerPlan], rows: int, sweeps: int, turned: frozenset[str]) -> float:
    """Multiplications, each with its addition, that H, its factors, errors fed into later columns, and sweeps need."""
    total = 0.0
    for inputs in block.inputs:
        layouts = (plans[layer].layout for layer in inputs)
        columns = max(layout.columns for layout in layouts if layout is not None)
        out = sum(plans[layer].tensor.numel // columns for layer in inputs)
        swept = 0 if turned.issuperset(inputs) else sweeps * out  # rows of inputs are not swept
        of_h = rows / 2.0 + FACTORS * columns / 6.0
        total += columns**2 * (of_h + (out + 2 * BASES * TRIED_ROWS) / 2.0 + swept)
    return total


def _timed(spec: LayerSpec, sweeps: int = SWEEPS, device: torch.device = CPU) -> tuple[float, float]:
    """Seconds of one core for one weight in the column loop, and for one multiplication and addition."""
    draw = torch.Generator().manual_seed(0)
    square = torch.randn(PRODUCT, PRODUCT, generator=draw).to(device)
    weight = torch.randn(TRIAL_ROWS, TRIAL_COLUMNS, generator=draw).to(device)
    group = TRIAL_COLUMNS if spec.group_size is None else min(spec.group_size, TRIAL_COLUMNS)
    seen = square[:, :TRIAL_COLUMNS]
    factor = factorize(seen.mT @ seen, group)
    torch.mm(square, square)[0, 0].item()  # a device has done all that came before, and its library is loaded
    moments = [time.perf_counter()]
    gptq(weight, spec, factor, sweeps=sweeps)
    moments.append(time.perf_counter())
    torch.mm(square, square)[0, 0].item()
    moments.append(time.perf_counter())
    return (moments[1] - moments[0]) / weight.numel(), (moments[2] - moments[1]) / PRODUCT**3

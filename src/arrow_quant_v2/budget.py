"""How much memory and disk a plan will take, before any work; reads no values."""

from __future__ import annotations

import ctypes
import math
import os
import re
import resource
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from arrow_quant_v2.errors import ConfigurationError
from arrow_quant_v2.layers import chunk_bytes
from arrow_quant_v2.packed import ITEM_BITS
from arrow_quant_v2.plan import quant_axis

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from arrow_quant_v2.config import DiffusionQuantConfig
    from arrow_quant_v2.packed import TensorInfo
    from arrow_quant_v2.plan import LayerPlan

LARGEST_SLICE = 8 * 2**20  # small enough to stay in the last cache between reading and quantizing
SMALLEST_SLICE = 2**20
SLICES_AT_WORK = 32 * 2**20  # of all workers together: many cores take smaller slices
SLICES_PER_WORKER = 2
RESULTS_AHEAD = 16 * 2**20  # what workers may get done, given room, while a layer is written
NATIVE = ("float32", "bfloat16", "float16")  # the others are widened to float32 first
COPIES_OF_CHUNK = 2  # inside Arrow, while a row group is written
MOMENTS = 9  # matrices as large as H at once: H, D, and in each of two bases H, its factor and what they are made with
REGROUPED_MOMENTS = 2  # more where groups may be of two sizes: a factor of H for each, in each of two bases
EQUALIZED_MOMENTS = 6  # more where channels may be equalized in three ways
COPIES_FITTED, COPIES_OF_GROUP = 10, 9  # of a layer as it is fitted; more of the columns of the group at work
ROWS_AT_ONCE = 8 * 2048  # of inputs, in the samples that are seen together
RUNNING = 400 * 2**20  # transformers or diffusers, and what one call of a model leaves with torch
OUTPUTS = 2**30  # of blocks, kept in memory; the others lie in files
FLOAT = 4  # bytes
COPIES = 3  # of H: as seen, in another basis, and its factor; of a tensor: as read, quantized, and what that lost
ROOM = 2**30  # libraries and inputs
SWEPT = 512  # columns that a sweep visits together, or more where a group has more
LIBRARIES = 192 * 2**20  # what torch and Arrow import late, and keep, once work begins

_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How a run uses memory: `workers` threads on slices of `slice_bytes`, and the predicted peak in bytes.

    Slices beyond `in_flight` are started as long as the results that were not yet taken have at most `ahead_bytes`.
    """

    workers: int
    slice_bytes: int
    ahead_bytes: int
    peak_bytes: int

    @property
    def in_flight(self) -> int:
        """Slices that may be started and not yet taken, however large their results."""
        return self.workers * SLICES_PER_WORKER


def plan_budget(plans: Sequence[LayerPlan], config: DiffusionQuantConfig) -> Budget:
    """The fastest budget that keeps the peak below `max_memory`.

    Raises:
        ConfigurationError: not even the smallest one does.
    """
    workers = config.threads or cores()
    slice_bytes = min(LARGEST_SLICE, max(SMALLEST_SLICE, SLICES_AT_WORK // workers))
    ahead = RESULTS_AHEAD
    budget = _budget(plans, workers, slice_bytes, ahead)
    while config.max_memory is not None and budget.peak_bytes > config.max_memory:
        if workers == 1 and slice_bytes <= SMALLEST_SLICE and not ahead:
            raise ConfigurationError(
                f"max_memory is {megabytes(config.max_memory)}; this model needs"
                f" {megabytes(_rounded_up(budget.peak_bytes))},"
                f" because its largest layer is {_largest(plans).tensor.name}; allow that much"
            )
        if ahead:
            ahead = 0
        elif slice_bytes > SMALLEST_SLICE:
            slice_bytes //= 2
        else:
            workers //= 2
        budget = _budget(plans, workers, slice_bytes, ahead)
    return budget


def calibration_bytes(
    plans: Sequence[LayerPlan], names: frozenset[str], *, equalized: bool, regrouped: bool = False
) -> int:
    """No more than this is taken while the layers of these names are fitted; 0 where there are none.

    The whole model lies in memory in float32, and beside it the weights of one block as they were, and for a moment as
    they are; inputs of the widest layer four times, of the quantized and of the original model, as they are seen and as
    they are added up; H in every basis, and that of each expert; the largest layer as it is fitted; and what finished
    blocks gave.
    """
    fitted = [plan for plan in plans if plan.tensor.name in names and plan.layout is not None]
    if not fitted:
        return 0
    widest = max(plan.layout.columns for plan in fitted if plan.layout is not None)
    bases = REGROUPED_MOMENTS + REGROUPED_MOMENTS * equalized
    moments = MOMENTS + EQUALIZED_MOMENTS * equalized + bases * regrouped
    blocks: Counter[str] = Counter()
    for plan in fitted:
        blocks[_likely_block(plan.tensor.name)] += plan.tensor.numel
    weights = sum(plan.tensor.numel for plan in plans) + 2 * max(blocks.values())
    experts = max((_parts(plan) for plan in fitted), default=0)
    fit = max(_fitted_floats(plan) for plan in fitted)
    floats = weights + 4 * ROWS_AT_ONCE * widest + moments * widest**2 + experts + fit
    return resident_bytes() + LIBRARIES + RUNNING + OUTPUTS + 4 * floats


def _fitted_floats(plan: LayerPlan) -> int:
    """Floats of one layer as it is fitted, and of H between the columns that a sweep visits together."""
    if plan.layout is None:
        return 0
    columns, group = plan.layout.columns, plan.layout.group
    span = min(columns, -(-SWEPT // group) * group)
    return COPIES_FITTED * plan.tensor.numel + COPIES_OF_GROUP * plan.tensor.numel * group // columns + span**2


def _parts(plan: LayerPlan) -> int:
    """Floats of one H for each expert of a stack; 0 where there are none."""
    shape, layout = plan.tensor.shape, plan.layout
    stack = layout is not None and layout.quant_axis == 2  # noqa: PLR2004 - (expert, out, in)
    return shape[0] * shape[2] ** 2 if stack else 0


def _likely_block(name: str) -> str:
    """A name up to its first number: blocks.3.attention.query -> blocks.3; the whole name where it has none."""
    return re.sub(r"(\.\d+)\..*", r"\1", name, count=1)


def _budget(plans: Sequence[LayerPlan], workers: int, slice_bytes: int, ahead: int) -> Budget:
    largest = _largest(plans) if plans else None
    stored = largest.stored_bytes if largest else 0
    slices = max((_slices_bytes(plan, workers, slice_bytes) for plan in plans), default=0)
    writing = COPIES_OF_CHUNK * min(stored, chunk_bytes(largest)) if largest else 0
    joining = stored if largest and largest.tensor.nbytes > slice_bytes else 0
    done = min(ahead, sum(plan.stored_bytes for plan in plans))
    peak = resident_bytes() + LIBRARIES + slices + done + stored + max(joining, writing)
    return Budget(workers=workers, slice_bytes=slice_bytes, ahead_bytes=ahead, peak_bytes=peak)


def _slices_bytes(plan: LayerPlan, workers: int, slice_bytes: int) -> int:
    """Every slice in flight as its result, no larger than itself; those at work also as read and as float32."""
    tensor = plan.tensor
    row = tensor.nbytes // plan.layout.rows if plan.layout else 0
    piece = min(tensor.nbytes, max(slice_bytes, row))
    widened = 0 if plan.layout is None or tensor.dtype in NATIVE else piece * 32 // ITEM_BITS[tensor.dtype]
    return workers * (SLICES_PER_WORKER * piece + piece + widened)


def _largest(plans: Sequence[LayerPlan]) -> LayerPlan:
    return max(plans, key=lambda plan: plan.stored_bytes)


def resident_bytes() -> int:
    """Memory that this process takes now; where the system does not tell, the most that it ever took."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def give_back_memory() -> None:
    """Return freed memory to the system: Arrow keeps it otherwise, and glibc once more for every thread."""
    pa.default_memory_pool().release_unused()
    if _trim is not None:
        _trim(0)


def running_bytes(tensors: Iterable[TensorInfo]) -> int:
    """A whole model in float32, and what is made of its widest H or its largest tensor, where it runs."""
    shapes = [info.shape for info in tensors]
    widest = max((math.prod(shape[quant_axis(shape) :]) for shape in shapes if len(shape) > 1), default=0)
    largest = max(map(math.prod, shapes), default=0)
    return FLOAT * (sum(map(math.prod, shapes)) + COPIES * max(widest**2, largest)) + ROOM


def available_bytes() -> int:
    """Memory that this machine can give now; where the system does not tell, all that it has."""
    table = Path("/proc/meminfo")
    if not table.exists():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    fields = dict(line.split(":", 1) for line in table.read_text(encoding="ascii").splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def cores() -> int:
    """Cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _rounded_up(count: int) -> int:
    """What `megabytes` shows of it is enough."""
    unit = 10**7 if count >= 10**9 else 10**5
    return -(-count // unit) * unit


def megabytes(count: float) -> str:
    """Like "512 MB" or "1.25 GB", in decimal units."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"  # noqa: PLR2004

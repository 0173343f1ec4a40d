"""Whether anything stands between a call of an op and its CPU kernel; knows nothing of what ops do.

torch's dispatcher keeps, for a tensor and for the thread, the set of what wants to see a call: autograd, a mode that
traces or fakes, a transform of torch.func, another device. Where nothing does, calling a kernel itself is the same.
"""

from __future__ import annotations

from functools import reduce
from operator import or_

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet

INDIFFERENT = ("CPU", "AutogradCPU", "AutocastCPU", "ADInplaceOrView", "BackendSelect")
"""Keys that change no call without gradients; packed weights follow autocast themselves."""


def _others() -> int:
    keys = (DispatchKeySet(getattr(DispatchKey, name)) for name in INDIFFERENT)
    return ~reduce(or_, (key.raw_repr() for key in keys))


OTHERS = _others()


def nothing_between(x: Tensor) -> bool:
    """Whether an op of x, without gradients, would go to its CPU kernel and nowhere else."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or torch._C._autograd._profiler_enabled():  # noqa: SLF001
        return False
    of_thread = torch._C._dispatch_tls_local_include_set().raw_repr()  # noqa: SLF001
    return not (torch._C._dispatch_keys(x).raw_repr() | of_thread) & OTHERS  # noqa: SLF001

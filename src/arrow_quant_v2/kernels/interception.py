"""Whether anything stands between a call of an op and its CPU kernel; knows nothing of what ops do.

torch's dispatcher keeps, for a tensor and for the thread, the set of what wants to see a call: autograd, a mode that
traces or fakes, a transform of torch.func, another device. Where nothing does, calling a kernel itself is the same.
"""

from __future__ import annotations

from functools import reduce
from operator import or_

from torch import Tensor, is_grad_enabled
from torch._C import DispatchKey, DispatchKeySet, _dispatch_keys, _dispatch_tls_local_include_set
from torch._C._autograd import _profiler_enabled
from torch.compiler import is_compiling

INDIFFERENT = ("CPU", "AutogradCPU", "AutocastCPU", "ADInplaceOrView", "BackendSelect")
"""Keys that change no call without gradients; packed weights follow autocast themselves."""


def _others() -> int:
    keys = (DispatchKeySet(getattr(DispatchKey, name)) for name in INDIFFERENT)
    return ~reduce(or_, (key.raw_repr() for key in keys))


OTHERS = _others()


def nothing_between(x: Tensor) -> bool:
    """Whether an op of x, without gradients, would go to its CPU kernel and nowhere else."""
    if is_compiling() or is_grad_enabled() or _profiler_enabled():
        return False
    return not (_dispatch_keys(x).raw_repr() | _dispatch_tls_local_include_set().raw_repr()) & OTHERS

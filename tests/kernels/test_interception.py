"""A kernel is called without the dispatcher only where nothing wants to see the call."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from arrow_quant_v2.kernels.interception import nothing_between


class Mode(TorchDispatchMode):
    """Sees every call, and lets it through."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def seen_in(run: Callable[[Callable[[Tensor], Tensor]], Any]) -> bool:
    """Whether the call is seen by what `run` puts around a function of a tensor."""
    found: list[bool] = []

    def watched(x: Tensor) -> Tensor:
        found.append(not nothing_between(x))
        return x.sum()

    with torch.no_grad():
        run(watched)
    return found[0]


def with_a_mode(function: Callable[[Tensor], Tensor]) -> None:
    with Mode():
        function(torch.ones(3))


def with_fakes(function: Callable[[Tensor], Tensor]) -> None:
    with FakeTensorMode():
        function(torch.ones(3))


def with_a_profiler(function: Callable[[Tensor], Tensor]) -> None:
    with torch.profiler.profile():
        function(torch.ones(3))


INTERCEPTIONS: dict[str, Callable[[Callable[[Tensor], Tensor]], Any]] = {
    "vmap": lambda function: torch.vmap(function)(torch.ones(2, 3)),
    "functionalize": lambda function: torch.func.functionalize(function)(torch.ones(3)),
    "derivatives": lambda function: torch.func.vjp(function, torch.ones(3)),
    "a mode": with_a_mode,
    "fake tensors": with_fakes,
    "a profiler": with_a_profiler,
    "gradients": lambda function: torch.enable_grad()(function)(torch.ones(3)),
    "another device": lambda function: function(torch.ones(3, device="meta")),
    "a sparse layout": lambda function: function(torch.ones(3, 3).to_sparse()),
    "conjugation": lambda function: function(torch.ones(3, dtype=torch.complex64).conj()),
}


@pytest.mark.parametrize("name", INTERCEPTIONS)
def test_what_wants_to_see_a_call_sees_it(name: str) -> None:
    assert seen_in(INTERCEPTIONS[name])


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_trace_sees_the_call() -> None:
    assert seen_in(lambda function: torch.jit.trace(function, torch.ones(3)))


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_where_nothing_stands_between_the_kernel_is_called_itself(without: Any) -> None:
    with without():
        assert nothing_between(torch.ones(3))
        assert nothing_between(torch.nn.Parameter(torch.ones(3)))
        assert nothing_between(torch.ones(4, 3).T[1:])
    with without(), torch.autocast("cpu", torch.bfloat16):
        assert nothing_between(torch.ones(3))

"""How a running model knows its time: from its caller, from its arguments, from the tokens that are masked."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

from arrow_quant_v2 import ConfigurationError, timestep
from arrow_quant_v2.runtime.clock import Clock
from arrow_quant_v2.time_groups import TimeGroups

THOUSAND = TimeGroups(edges=(0.0, 250.0, 500.0, 1000.0))
FRACTIONS = TimeGroups(edges=(0.0, 0.5, 1.0))


class Asked(nn.Module):
    """A model that says which group it is in."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock
        self.register_forward_pre_hook(clock.starts, with_kwargs=True)
        self.register_forward_hook(clock.ends, always_call=True)

    def forward(self, sample: Any = None, timestep: Any = None, sigma: Any = None, input_ids: Any = None) -> Any:
        if sample == "fail":
            raise ValueError
        return self.clock.now()


@pytest.mark.parametrize(
    ("arguments", "keywords", "group"),
    [
        ((0, 10), {}, 0),
        ((0,), {"timestep": torch.tensor([300, 300])}, 1),
        ((), {"timestep": torch.tensor(999.0)}, 2),
        ((), {"timestep": 5000}, 2),
        ((), {"sigma": torch.tensor([[260.0]])}, 1),
        ((), {"timestep": None}, None),
        ((), {"timestep": float("nan")}, None),
        ((), {"input_ids": torch.tensor([[4, 4, 1, 1]])}, None),
    ],
)
def test_the_time_is_found_in_what_a_model_is_called_with(
    arguments: Any, keywords: dict[str, Any], group: int | None
) -> None:
    assert Asked(Clock(THOUSAND))(*arguments, **keywords) == group


def test_the_time_of_a_masked_text_is_the_share_that_is_masked() -> None:
    model = Asked(Clock(FRACTIONS, mask_token=4))
    assert model(input_ids=torch.tensor([[4, 4, 1, 4]])) == 1
    assert model(input_ids=torch.tensor([[4, 2, 1, 0]])) == 0


def test_a_caller_knows_better() -> None:
    model = Asked(Clock(THOUSAND))
    with timestep(600):
        assert model(timestep=10) == 2
        with timestep(torch.tensor([300.0])):
            assert model() == 1
        assert model() == 2
        assert model.clock.now() == 2
    assert model() is None


def test_a_call_that_failed_leaves_no_time_behind() -> None:
    model = Asked(Clock(THOUSAND))
    with pytest.raises(ValueError):
        model("fail", timestep=10)
    assert model.clock.now() is None


def test_other_threads_are_told_nothing() -> None:
    clock = Clock(THOUSAND)
    with timestep(600), ThreadPoolExecutor(1) as pool:
        assert pool.submit(clock.now).result() is None


@pytest.mark.parametrize("wrong", ["soon", None, float("nan"), float("inf"), torch.tensor([1.0, 2.0])])
def test_a_time_is_one_finite_number(wrong: Any) -> None:
    with pytest.raises(ConfigurationError, match="timestep"), timestep(wrong):
        pass


def test_a_copy_has_a_clock_of_its_own() -> None:
    model = Asked(Clock(THOUSAND))
    other = copy.deepcopy(model)
    assert other.clock is not model.clock
    assert other(timestep=300) == 1

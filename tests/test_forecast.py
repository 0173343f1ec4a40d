"""The time that a calibrated run is told to take."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from arrow_quant_v2 import DiffusionQuantConfig, forecast
from arrow_quant_v2.calibration.blocks import walking
from arrow_quant_v2.calibration.sample import Sample
from arrow_quant_v2.engines.one_core import cores_at_most
from arrow_quant_v2.forecast import seconds_to_fit
from arrow_quant_v2.judging import MOST_CALLS
from arrow_quant_v2.packed import TensorInfo
from arrow_quant_v2.plan import Calibrated, LayerPlan, plan_model
from arrow_quant_v2.tuning import SAMPLES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from arrow_quant_v2.calibration.blocks import Walk


class Slow(nn.Module):
    """Two blocks of two layers; each takes 20 ms."""

    def __init__(self) -> None:
        super().__init__()
        pairs = [[nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)] for _ in range(2)]
        self.blocks = nn.ModuleList(nn.Sequential(*pair) for pair in pairs)
        for block in self.blocks:
            block.register_forward_hook(lambda *_: time.sleep(0.02))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def plans(module: nn.Module, bits: int = 4) -> dict[str, LayerPlan]:
    infos = [TensorInfo(name=name, shape=tuple(p.shape), dtype="float32") for name, p in module.named_parameters()]
    names = frozenset(info.name for info in infos)
    config = DiffusionQuantConfig(bit_width=bits, group_size=16)
    return {plan.tensor.name: plan for plan in plan_model(infos, config, Calibrated(names=names))}


def foretold(rows: int, samples: int, cores: int = 1, reading: float = 0.0, sweeps: int = 3) -> float:
    with torch.random.fork_rng(devices=()):
        module = Slow()
    calls = [Sample(arguments=(torch.ones(rows, 64),), timestep=0.0) for _ in range(samples)]
    with cores_at_most(cores), walking(module, calls, dict(module.named_parameters())) as walk:
        return seconds_to_fit(walk, plans(module), reading, sweeps=sweeps)


@pytest.fixture
def no_fitting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast, "_timed", lambda *_: (0.0, 0.0))


@pytest.mark.usefixtures("no_fitting")
def test_blocks_run_once_for_their_outputs_and_half_for_each_input() -> None:
    expected = 2 * 0.02 * 10 * (1.0 + 2 / 2)
    assert expected <= foretold(rows=4, samples=10) <= 2 * expected


@pytest.mark.usefixtures("no_fitting")
def test_cores_share_the_calls_and_reading_is_added() -> None:
    assert foretold(rows=4, samples=10, cores=4, reading=3.0) < 3.0 + 0.8 / 2
    assert foretold(rows=4, samples=10, cores=4, reading=3.0) >= 3.0 + 0.8 / 4


def test_weights_and_products_take_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast, "_timed", lambda *_: (1.0, 0.0))
    assert foretold(rows=4, samples=1) == pytest.approx(4 * 64 * 64, rel=0.01)
    monkeypatch.setattr(forecast, "_timed", lambda *_: (0.0, 1.0))
    assert foretold(rows=2048, samples=64) > 4 * 64 * 64 * 64 * 2048 / 2


def test_sweeps_are_two_half_products_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast, "_timed", lambda *_: (0.0, 1.0))
    found = foretold(rows=4, samples=1), foretold(rows=4, samples=1, sweeps=0)
    assert found[0] - found[1] == pytest.approx(3 * 4 * 64**3, rel=0.01)


def test_rows_that_belong_to_inputs_are_not_swept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast, "_timed", lambda *_: (0.0, 1.0))
    with walked(samples=1) as walk:
        walk.turned = frozenset(layer for block in walk.blocks for inputs in block.inputs for layer in inputs)
        found = [seconds_to_fit(walk, plans(walk.module), 0.0, sweeps=sweeps) for sweeps in (0, 3)]
    assert found[0] == pytest.approx(found[1], rel=0.01)


@contextmanager
def walked(samples: int) -> Iterator[Walk]:
    with torch.random.fork_rng(devices=()):
        module = Slow()
    calls = [Sample(arguments=(torch.ones(1, 64),), timestep=0.0) for _ in range(samples)]
    with cores_at_most(1), walking(module, calls, dict(module.named_parameters())) as walk:
        yield walk


def test_judging_is_a_call_for_each_of_some_samples() -> None:
    with walked(samples=64) as walk:
        assert MOST_CALLS * 0.04 <= forecast.seconds_to_judge(walk) <= 2 * MOST_CALLS * 0.04


def test_tuning_is_calls_forwards_and_backwards_and_some_looks() -> None:
    with walked(samples=16) as walk:
        calls = 16 + 100 * SAMPLES * forecast.BACKWARDS + 2 * 11  # 16 once, and 2 of them held out
        assert calls * 0.04 <= forecast.seconds_to_tune(walk, 100) <= 2 * calls * 0.04
        assert forecast.seconds_to_tune(walk, 0) == 0.0


def test_one_call_cannot_be_tuned_by() -> None:
    with walked(samples=1) as walk:
        assert forecast.seconds_to_tune(walk, 100) == 0.0


def test_the_trials_take_less_than_a_moment() -> None:
    (plan, *_) = plans(Slow(), bits=2).values()
    assert plan.spec is not None
    started = time.perf_counter()
    per_weight, per_product = forecast._timed(plan.spec)
    assert time.perf_counter() - started < 10.0
    assert 1e-9 < per_weight < 1e-4
    assert 1e-13 < per_product < 1e-8


def test_the_host_has_its_own_number_of_threads_again() -> None:
    before = torch.get_num_threads()
    with cores_at_most(3):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before

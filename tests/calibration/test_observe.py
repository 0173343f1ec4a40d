"""What goes into the layers of a block over all samples, and time groups that follow its change."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_blocks import Bert, Layer, made, matrices, random, samples_of, token_samples
from torch import nn

from arrow_quant_v2.calibration.balance import balanced
from arrow_quant_v2.calibration.blocks import walking
from arrow_quant_v2.calibration.observe import SAMPLES_AT_ONCE, observe, strata
from arrow_quant_v2.calibration.sample import Sample
from arrow_quant_v2.errors import QuantizationError
from arrow_quant_v2.kernels.cpu import threads_per_call
from arrow_quant_v2.time_groups import TimeGroups, uniform_groups

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from arrow_quant_v2.calibration.stats import InputStats


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = threads_per_call.get()
    yield
    threads_per_call.set(before)


def observed(module: nn.Module, samples: list[Sample], *layers: str, groups: TimeGroups | None = None) -> InputStats:
    """The stats of the input that these layers share."""
    parts = strata(samples, groups or uniform_groups([sample.timestep for sample in samples], 2))
    with walking(module, samples, matrices(module)) as walk:
        (number,) = [i for i, block in enumerate(walk.blocks) if layers in block.inputs]
        for before in range(number):
            for sample in range(len(samples)):
                walk.finish(before, sample)
        return observe(walk, number, layers, parts)


# Stats


@settings(deadline=None, max_examples=50)
@given(
    timesteps=st.lists(st.floats(0.0, 1000.0), min_size=1, max_size=50),
    edges=st.sets(st.integers(1, 999), max_size=5),
)
def test_the_weights_of_each_group_that_was_seen_add_up_to_the_same(timesteps: list[float], edges: set[int]) -> None:
    groups = TimeGroups(edges=(0.0, *sorted(map(float, edges)), 1000.0))
    parts = strata([Sample(timestep=t) for t in timesteps], groups)
    own: dict[int, float] = {}
    for group, weight, timestep in zip(parts.groups, parts.weights, timesteps, strict=True):
        assert group == groups.group_of(timestep)
        own[group] = own.get(group, 0.0) + weight
    assert sum(own.values()) == pytest.approx(len(timesteps))
    assert list(own.values()) == pytest.approx([len(timesteps) / len(own)] * len(own))
    assert parts.count == groups.count


def test_all_samples_are_added_up_with_their_weights() -> None:
    """Eleven samples, more than run at once, of two groups; each has one row more than the one before."""
    layer = made(lambda: nn.Linear(8, 3))
    samples = [Sample(arguments=(random(i + 1, 8, seed=i),), timestep=float(i >= 8)) for i in range(11)]
    assert len(samples) > SAMPLES_AT_ONCE
    groups = TimeGroups(edges=(0.0, 1.0, 2.0))
    found = observed(layer, samples, "weight", groups=groups)
    rows = [sample.arguments[0] for sample in samples]
    h = sum((11 / (2 * 8) if i < 8 else 11 / (2 * 3)) * row.T @ row for i, row in enumerate(rows))
    torch.testing.assert_close(found.second.matrix, h, rtol=1e-5, atol=1e-5)
    assert (found.count, found.rows.tolist(), found.layers) == (66, [36, 30], ("weight",))
    for group, own in enumerate((torch.cat(rows[:8]), torch.cat(rows[8:]))):
        assert found.spread()["mean"][group] == pytest.approx(float(own.mean()))
        assert found.spread()["std"][group] == pytest.approx(float(own.std(correction=0)))
        assert (found.spread()["min"][group], found.spread()["max"][group]) == (float(own.min()), float(own.max()))


def test_stats_do_not_depend_on_the_number_of_threads() -> None:
    found = []
    for threads in (1, 2, 5):
        threads_per_call.set(threads)
        samples = samples_of(*((random(3, 8, seed=i),) for i in range(20)))
        found.append(observed(made(lambda: nn.Linear(8, 3)), samples, "weight").tensors())
    for other in found[1:]:
        assert all(torch.equal(tensor, other[name]) for name, tensor in found[0].items())


def test_layers_inside_a_model_are_seen_with_what_they_are_given() -> None:
    module, plain, given = made(Bert), made(Bert), []
    plain.encoder.layer[1].down.register_forward_pre_hook(lambda _, x: given.append(x[0].reshape(-1, 16)))
    for sample in token_samples():
        plain(*sample.arguments)
    found = observed(module, token_samples(), "encoder.layer.1.down.weight", groups=TimeGroups(edges=(0.0, 9.0)))
    x = torch.cat(given)
    torch.testing.assert_close(found.second.matrix, x.T @ x, rtol=1e-4, atol=1e-5)
    assert torch.equal(found.absmax[0], x.abs().amax(dim=0))


class Expert(nn.Module):
    """Tokens with a positive first channel go to a layer that others do not."""

    def __init__(self) -> None:
        super().__init__()
        self.chosen, self.every = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.every(x) + self.chosen(x[x[:, 0] > 0]).sum()


def test_a_sample_without_tokens_for_a_layer_adds_nothing() -> None:
    x = random(6, 8).abs()
    samples = samples_of((-x,), (x,), (-x,))
    found = observed(made(Expert), samples, "chosen.weight", groups=TimeGroups(edges=(0.0, 9.0)))
    torch.testing.assert_close(found.second.matrix, x.T @ x)
    assert found.count == 6
    assert observed(made(Expert), samples_of((-x,)), "chosen.weight") is None


def test_zeros_say_nothing_of_a_layer() -> None:
    samples = samples_of((torch.zeros(4, 8),), (torch.zeros(4, 8),))
    assert observed(made(lambda: nn.Linear(8, 3)), samples, "weight") is None


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_inputs_that_are_not_finite_are_refused_by_the_names_of_their_layers(bad: float) -> None:
    samples = samples_of((torch.ones(4, 8),), (torch.full((4, 8), bad),))
    with pytest.raises(QuantizationError, match="the inputs of weight hold NaN or infinity; leave that sample out"):
        observed(made(lambda: nn.Linear(8, 3)), samples, "weight")


# Time groups


class Loud(nn.Module):
    """Layers of every kind; their inputs grow tenfold while t goes from 500 to 600, and stay as they are elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.convolution, self.attended = nn.Linear(8, 8), nn.Conv1d(4, 4, 3), Layer()

    def forward(self, x: Tensor, t: float) -> Tensor:
        x = x * 10.0 ** min(max((t - 500.0) / 100.0, 0.0), 1.0)
        return self.linear(x).sum() + self.convolution(x).sum() + self.attended(x)[0].sum()


def calls(timesteps: list[float], x: Tensor) -> list[Sample]:
    return [Sample(arguments=(x, t), timestep=t) for t in timesteps]


def test_where_inputs_change_there_are_more_groups() -> None:
    timesteps = [float(t) for t in range(0, 1001, 20)]
    groups = balanced(made(Loud), calls(timesteps, random(2, 4, 8)), 6)
    inside = [edge for edge in groups.edges if 490.0 <= edge <= 610.0]
    assert (groups.count, len(inside)) == (6, 5)  # 100 of 1000 timesteps have all edges but the two ends
    uniform = uniform_groups(timesteps, 6)
    assert len([edge for edge in uniform.edges if 490.0 <= edge <= 610.0]) <= 1


def test_an_even_change_gives_even_groups() -> None:
    class Even(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor, t: float) -> Tensor:
            return self.linear(x * math.exp(t))

    groups = balanced(made(Even), calls([0.0, 1.0, 2.0, 3.0, 4.0], torch.ones(1, 8)), 3)
    assert groups.edges == (0.0, 1.5, 2.5, 4.0)


def test_every_layer_has_the_same_say_whatever_its_range() -> None:
    """The inputs of one layer double from 0 to 1, the others from 1 to 2: one of them is a million times as large."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.small, self.large = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor, t: float) -> Tensor:
            return self.small(x * 2.0 ** min(t, 1.0)) + self.large(1e6 * x * 2.0 ** max(t - 1.0, 0.0))

    groups = balanced(made(Two), calls([0.0, 0.5, 1.0, 1.5, 2.0], torch.ones(1, 8)), 3)
    assert groups.edges == (0.0, 0.75, 1.25, 2.0)


class Sometimes(nn.Module):
    """A layer that only some steps call, by keyword and with half precision, or with nothing at all."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.sometimes = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, t: float) -> Any:
        if 2.0 <= t < 4.0:
            nn.functional.linear(input=60000.0 * x.half(), weight=self.sometimes.weight.half())
            nn.functional.linear(input=60000.0 * x, weight=self.sometimes.weight)
        self.sometimes(x[:0])
        return self.always(x * (10.0 if t >= 6.0 else 1.0))


def test_a_layer_that_is_not_called_does_not_count_as_a_change() -> None:
    timesteps = [float(t) for t in range(9)]
    groups = balanced(made(Sometimes), calls(timesteps, torch.ones(1, 8)), 2)
    assert groups.edges == (0.0, 5.5, 8.0)


def test_where_nothing_changes_there_is_one_group() -> None:
    module = made(lambda: nn.Linear(8, 8))
    still = [Sample(arguments=(torch.ones(1, 8),), timestep=float(t)) for t in range(4)]
    assert balanced(module, still, 5).edges == (0.0, 3.0)
    assert balanced(module, still[:1], 5).count == 1
    assert balanced(nn.Identity(), still, 5).count == 1

"""A whole model fitted block by block: every layer sees what the quantized layers before it give."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from arrow_quant_v2 import DiffusionQuantConfig
from arrow_quant_v2.calibration.blocks import walking
from arrow_quant_v2.config import LayerSpec
from arrow_quant_v2.errors import InterruptedRunError, QuantizationError
from arrow_quant_v2.kernels.cpu import threads_per_call
from arrow_quant_v2.kernels.tensors import dequantized
from arrow_quant_v2.one_tensor import dequantize_tensor, quantize_tensor
from arrow_quant_v2.packed import TensorInfo
from arrow_quant_v2.plan import Calibrated, plan_model
from arrow_quant_v2.quantizers.calibrated import Freedom
from arrow_quant_v2.sequential import CalibratedLayer, Fitting, fit_in_sequence
from arrow_quant_v2.time_groups import TimeGroups

sys.path.append(str(Path(__file__).parent / "calibration"))

from small_blocks import Layer, made, matrices, random, samples_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from arrow_quant_v2.calibration.sample import Sample
    from arrow_quant_v2.plan import LayerPlan

GROUPS = TimeGroups(edges=(0.0, 3.0, 6.0))
LAYERS = [f"layers.{i}.{name}.weight" for i in range(2) for name in ("q", "k", "v", "out", "up", "down")]


class Model(nn.Module):
    """Two layers of attention, a head, one layer that is given zeros, and one that is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(32), Layer(32)])
        self.head, self.silent, self.spare = nn.Linear(32, 64), nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)[0]
        return self.head(x) + self.silent(0.0 * x).sum()


@dataclass
class Kept:
    """What a run hands on, layer by layer; it stops once there are `most`."""

    most: int = 1000
    layers: dict[str, CalibratedLayer] = field(default_factory=dict)

    def __call__(self, layer: CalibratedLayer) -> None:
        self.layers[layer.plan.tensor.name] = layer
        if len(self.layers) >= self.most:
            raise InterruptedRunError("enough")

    def weight(self, plan: LayerPlan) -> Tensor | None:
        layer = self.layers.get(plan.tensor.name)
        return None if layer is None else dequantized(layer.packed)


def inputs(seed: int) -> Tensor:
    """Correlated: some directions are a hundred times as strong as others."""
    return random(4, 24, 32, seed=seed) * torch.logspace(0.5, -1.5, 32) @ random(32, 32, seed=77) / 3.0


def samples() -> list[Sample]:
    return samples_of(*((inputs(seed) * (1.0 + seed),) for seed in range(6)))


def fit(
    module: nn.Module, kept: Kept, finished: Any = lambda _: None, *, bits: Any = 4, **asked: Any
) -> dict[str, CalibratedLayer]:
    parameters = matrices(module)
    infos = [TensorInfo(name=n, shape=tuple(p.shape), dtype="float32") for n, p in parameters.items()]
    config = DiffusionQuantConfig(bit_width=bits, group_size=32)
    plans = plan_model(infos, config, Calibrated(names=frozenset(parameters), method="gptq"))
    original = {name: p.clone() for name, p in parameters.items()}
    settings: dict[str, Any] = {
        "plans": {plan.tensor.name: plan for plan in plans},
        "groups": GROUPS,
        "freedom": Freedom(),
        "time_aware": True,
        "shown": "6 samples of noise",
        "values": lambda plan: original[plan.tensor.name],
        "finished": finished,
        "keep": kept,
        "strength": 0.5,
    }
    with walking(module, samples(), parameters) as walk:
        fit_in_sequence(walk, Fitting(**(settings | asked)))
    return kept.layers


def inputs_of(module: nn.Module) -> dict[str, dict[str, list[float]]]:
    """Least, largest and mean of the inputs of each layer in both time groups, as the model itself is given them."""
    found: dict[str, list[list[Tensor]]] = {
        f"{n}.weight": [[], []] for n, p in module.named_modules() if isinstance(p, nn.Linear)
    }
    hooks = []
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear):
            own = found[f"{name}.weight"]
            hooks.append(part.register_forward_pre_hook(lambda _, x, own=own: own[group].append(x[0].flatten())))
    for sample in samples():
        group = GROUPS.group_of(sample.timestep)
        module(*sample.arguments)
    for hook in hooks:
        hook.remove()
    joined = {name: [torch.cat(own) for own in both] for name, both in found.items() if both[0]}
    return {
        name: {
            "min": [float(own.min()) for own in both],
            "max": [float(own.max()) for own in both],
            "mean": [float(own.double().mean()) for own in both],
        }
        for name, both in joined.items()
    }


@pytest.fixture(scope="module")
def fitted() -> tuple[nn.Module, dict[str, CalibratedLayer]]:
    """The model at 2 bits, and its layers; not to be changed."""
    module = made(Model)
    return module, fit(module, Kept(), bits=2)


def test_every_layer_that_is_given_something_is_fitted_once_and_in_order(fitted: Any) -> None:
    assert list(fitted[1]) == [*LAYERS, "head.weight"]


def test_fitted_layers_end_in_the_model(fitted: Any) -> None:
    module, layers = fitted
    original = matrices(made(Model))
    for name, parameter in matrices(module).items():
        if name in layers:
            torch.testing.assert_close(parameter, dequantized(layers[name].packed), rtol=1e-5, atol=1e-6)
            assert not torch.equal(parameter, original[name])
        else:
            assert torch.equal(parameter, original[name])


def test_every_layer_was_shown_what_it_is_given_in_the_quantized_model(fitted: Any) -> None:
    """Layers of the first input are shown what the original gives; all others something else."""
    module, layers = fitted
    quantized, original = inputs_of(module), inputs_of(made(Model))
    first = LAYERS[:3]
    for name, layer in layers.items():
        for what, own in quantized[name].items():
            assert layer.spread[what] == pytest.approx(own, rel=1e-4, abs=1e-5)
        same = layer.spread["max"] == pytest.approx(original[name]["max"], rel=1e-4)
        assert same == (name in first)


def test_outputs_are_closer_than_without_calibration(fitted: Any) -> None:
    original, plain = made(Model), made(Model)
    spec = LayerSpec(bits=2, group_size=32, method="clip", symmetric=False)
    for name, parameter in matrices(plain).items():
        parameter.copy_(dequantize_tensor(quantize_tensor(parameter, name, spec, "group")))
    x = inputs(99) * 3.0
    errors = [float((module(x) - original(x)).square().sum()) for module in (fitted[0], plain)]
    assert errors[0] < 0.5 * errors[1]


def test_weights_that_make_up_for_earlier_layers_bring_outputs_closer() -> None:
    """On inputs that were not seen. Nothing precedes the first input, so its layers are the same."""
    original = made(Model)
    x = torch.cat([inputs(seed) * 3.0 for seed in range(90, 99)])
    errors, first = [], []
    for strength in (0.0, 0.5, 1.0):
        module = made(Model)
        layers = fit(module, Kept(), bits=2, strength=strength, freedom=Freedom(sweeps=0))  # which gain by themselves
        errors.append(float((module(x) - original(x)).square().sum()))
        first.append(dequantized(layers[LAYERS[0]].packed))
    assert errors[1] < 0.95 * errors[0]
    assert errors[2] < errors[0]
    assert torch.equal(first[0], first[1])
    assert torch.equal(first[0], first[2])


def test_each_layer_comes_with_what_a_report_needs(fitted: Any) -> None:
    for name, layer in fitted[1].items():
        assert layer.decision.layer_name == name
        assert "calibrated on 6 samples of noise" in layer.decision.because
        assert f", output error {sum(layer.output_error) / 2:.2g}" in layer.decision.because
        assert (", turned in blocks of 32" in layer.decision.because) == (layer.packed.rotation == 32)
        assert len(layer.output_error) == GROUPS.count
        assert all(0.0 < error < 0.5 for error in layer.output_error)
        assert layer.activations is not None
        assert [(one.start, one.end) for one in layer.activations] == [(0.0, 3.0), (3.0, 6.0)]
        for one, low, high in zip(layer.activations, layer.spread["min"], layer.spread["max"], strict=True):
            assert one.scale == pytest.approx((max(high, 0.0) - min(low, 0.0)) / 255)
        assert layer.error.cosine > 0.8


def test_without_time_groups_there_are_no_ranges() -> None:
    assert {layer.activations for layer in fit(made(Model), Kept(), time_aware=False).values()} == {None}


def test_what_is_finished_is_used_and_not_fitted() -> None:
    """The head sees another value than anything that fitting would have given."""
    other = {name: random(*p.shape, seed=5) for name, p in matrices(made(Model)).items() if name.startswith("layers.1")}
    module = made(Model)
    layers = fit(module, Kept(), lambda plan: other.get(plan.tensor.name))
    assert list(layers) == [*LAYERS[:6], "head.weight"]
    for name, weight in other.items():
        assert torch.equal(matrices(module)[name], weight)
    assert layers["head.weight"].spread["max"] == pytest.approx(inputs_of(module)["head.weight"]["max"], rel=1e-4)


@pytest.mark.parametrize("most", [1, 2, 4, 9])
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(most: int, fitted: Any) -> None:
    """Also inside a group of layers that share a basis: those that were finished are fitted again with the others."""
    first, second = Kept(most=most), Kept()
    with pytest.raises(InterruptedRunError):
        fit(made(Model), first, bits=2)
    assert list(first.layers) == [*LAYERS, "head.weight"][:most]
    module = made(Model)
    found = first.layers | fit(module, second, first.weight, bits=2)
    assert len(second.layers) == {1: 13, 2: 13, 4: 9, 9: 4}[most]
    for name, layer in fitted[1].items():
        assert found[name].packed.codes.tobytes() == layer.packed.codes.tobytes()
        assert found[name].packed.scales.tobytes() == layer.packed.scales.tobytes()
        assert found[name].decision == layer.decision


@pytest.fixture
def _threads() -> Iterator[None]:
    before = threads_per_call.get()
    yield
    threads_per_call.set(before)


@pytest.mark.usefixtures("_threads")
def test_any_number_of_threads_gives_the_same_bytes(fitted: Any) -> None:
    for threads in (2, 5):
        threads_per_call.set(threads)
        for name, layer in fit(made(Model), Kept(), bits=2).items():
            assert layer.packed.codes.tobytes() == fitted[1][name].packed.codes.tobytes()
            assert layer.spread == fitted[1][name].spread


def test_a_weight_that_is_not_finite_is_named() -> None:
    module = made(Model)

    def values(plan: LayerPlan) -> Tensor:
        weight = matrices(made(Model))[plan.tensor.name].clone()
        weight[3, 5] = torch.nan if plan.tensor.name == LAYERS[4] else 0.0
        return weight

    with pytest.raises(QuantizationError, match=r"layers.0.up.weight: the value at \[3, 5\] is nan"):
        fit(module, Kept(), values=values)
    assert not any("forward" in vars(part) for part in module.modules())


def test_inputs_that_are_not_finite_name_their_layers() -> None:
    module = made(Model)
    module.layers[0].up.weight[0, 0] = torch.inf
    with pytest.raises(QuantizationError, match=r"the inputs of layers.0.down.weight hold NaN or infinity"):
        fit(module, Kept(), lambda plan: module.get_parameter(plan.tensor.name) if "up" in plan.tensor.name else None)


def test_a_plan_that_says_nothing_is_a_bug() -> None:
    kept = plan_model(
        [TensorInfo(name=n, shape=tuple(p.shape), dtype="float32") for n, p in matrices(made(Model)).items()],
        DiffusionQuantConfig(keep=["*"]),
    )
    with pytest.raises(QuantizationError, match=r"layers.0.q.weight: has no spec to be quantized by; this is a bug"):
        fit(made(Model), Kept(), plans={plan.tensor.name: plan for plan in kept})

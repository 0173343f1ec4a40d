"""Layers that run on packed weights give what the layers of torch give with the dequantized ones."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from packed_models import distance, normal, packed
from torch import nn

from arrow_quant_v2.errors import QuantizationError
from arrow_quant_v2.kernels.linear import rounded_by_scale
from arrow_quant_v2.runtime.clock import Clock, timestep
from arrow_quant_v2.runtime.modules import QuantizedLinear, StaticRanges, run_packed
from arrow_quant_v2.runtime.packed_weight import PackedWeight
from arrow_quant_v2.time_groups import TimeGroups

TURNED: dict[str, Any] = {"rotation": 16, "equalized": True}
CONVOLUTIONS = [
    (nn.Conv1d(32, 48, 3, padding=2, dilation=2), (2, 32, 20)),
    (nn.Conv2d(32, 48, 3, stride=2, padding=1, padding_mode="reflect"), (2, 32, 9, 9)),
    (nn.Conv2d(32, 48, 3, groups=2, padding="same", bias=False), (2, 32, 9, 9)),
    (nn.Conv3d(16, 32, (1, 3, 3), padding=(0, 1, 1)), (1, 16, 4, 6, 6)),
]


def both(layer: nn.Module, **how: Any) -> tuple[nn.Module, Any]:
    """A layer with the dequantized weight, and one that runs on the codes."""
    weight = PackedWeight(packed(layer.weight.detach(), **how))  # type: ignore[operator,union-attr]
    plain, layer = copy.deepcopy(layer), copy.deepcopy(layer)
    with torch.no_grad():
        plain.weight.copy_(weight.dequantized())  # type: ignore[operator,union-attr]
    return plain, run_packed(layer, weight)


@pytest.mark.parametrize("how", [{}, TURNED, {"grid": "r2q"}])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_linear_layer(dtype: torch.dtype, bias: bool, how: dict[str, Any]) -> None:
    plain, layer = both(nn.Linear(64, 48, bias=bias), **how)
    x = normal(2, 5, 64).to(dtype)
    assert layer(x).dtype == dtype
    assert distance(layer(x), plain(x.float())) < (3e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("how", [{}, TURNED, {"grid": "r2q"}])
def test_a_linear_layer_follows_autocast(how: dict[str, Any]) -> None:
    plain, layer = both(nn.Linear(64, 48), **how)
    x = normal(2, 5, 64)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == plain(x).dtype == torch.bfloat16
        assert distance(layer(x), plain(x)) < 1e-2


@pytest.mark.parametrize(("layer", "shape"), CONVOLUTIONS, ids=lambda value: str(value).replace(" ", ""))
@pytest.mark.parametrize("how", [{}, {"rotation": 8, "equalized": True}])
@pytest.mark.parametrize("batch", [1, 8])  # inputs of fewer values than the weight has, and of more
def test_a_convolution(layer: nn.Module, shape: tuple[int, ...], how: dict[str, Any], batch: int) -> None:
    plain, layer = both(layer, **how)
    x = normal(batch * shape[0], *shape[1:])
    assert distance(layer(x), plain(x)) < 3e-5
    assert distance(layer(x.bfloat16()), plain(x)) < 2e-2
    assert distance(layer(x[0]), plain(x[0])) < 3e-5


def test_an_embedding() -> None:
    plain, layer = both(nn.Embedding(60, 64, padding_idx=3), **TURNED)
    ids = torch.tensor([[1, 3, 59], [3, 0, 1]])
    assert distance(layer(ids), plain(ids)) < 3e-5
    assert layer.half()(ids).dtype == torch.float16
    assert layer.padding_idx == 3


def test_it_stays_what_it_was_to_others() -> None:
    original = nn.Linear(64, 48)
    holder = nn.ModuleList([original])
    layer = run_packed(original, PackedWeight(packed(original.weight.detach())))
    assert layer is holder[0]
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features, layer.weight.shape) == (64, 48, (48, 64))
    assert [name for name, _ in layer.named_parameters()] == ["bias"]


@pytest.mark.parametrize("how", [{}, TURNED])
@pytest.mark.parametrize("activations", [None, "dynamic", "static"])
def test_gradients_are_those_of_the_dequantized_layer(activations: Any, how: dict[str, Any]) -> None:
    plain, layer = both(nn.Linear(64, 48), **how)
    layer.activations, layer.ranges = activations, StaticRanges(scales=(0.05,), zero_points=(128,))
    found, expected = normal(5, 64).requires_grad_(), normal(5, 64).requires_grad_()
    layer(found).sum().backward()
    plain(expected).sum().backward()
    assert distance(found.grad, expected.grad) < 3e-5
    assert distance(layer.bias.grad, plain.bias.grad) < 3e-5


@pytest.mark.parametrize("activations", [None, "dynamic"])
def test_it_compiles_without_a_break(activations: Any) -> None:
    _, layer = both(nn.Linear(64, 48), **TURNED)
    layer.activations = activations
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert distance(compiled(normal(5, 64)), layer(normal(5, 64))) < 3e-5


def test_copies_pickles_and_states_give_the_same() -> None:
    _, layer = both(nn.Linear(64, 48), **TURNED)
    _, other = both(nn.Linear(64, 48), **TURNED)
    other.load_state_dict(layer.state_dict())
    for same in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), other):
        assert torch.equal(same(normal(5, 64)), layer(normal(5, 64)))


def test_dynamic_activations_err_by_little() -> None:
    plain, layer = both(nn.Linear(64, 48))
    layer.activations = "dynamic"
    assert 0 < distance(layer(normal(50, 64)), plain(normal(50, 64))) < 1e-2


@pytest.mark.parametrize("how", [{}, TURNED])
def test_static_activations_are_those_of_the_time_group(how: dict[str, Any]) -> None:
    plain, layer = both(nn.Linear(64, 48), **how)
    layer.activations, layer.ranges = "static", StaticRanges(scales=(0.02, 0.1), zero_points=(120, 100))
    layer.clock = Clock(TimeGroups(edges=(0.0, 0.5, 1.0)))
    x = normal(50, 64)
    for time, scale, zero_point in ((0.2, 0.02, 120), (0.9, 0.1, 100)):
        with timestep(time):
            assert distance(layer(x), plain(rounded_by_scale(x, scale, zero_point))) < 3e-5
    assert distance(layer(x), plain(rounded_by_scale(x, *layer.ranges.whole))) < 3e-5


def test_the_range_of_an_unknown_time_covers_all() -> None:
    ranges = StaticRanges(scales=(0.02, 0.1), zero_points=(250, 10))
    scale, zero_point = ranges.whole
    assert -zero_point * scale == pytest.approx(-5.0, abs=scale)
    assert (255 - zero_point) * scale == pytest.approx(24.5, abs=scale)


def test_corrections_are_added_in_their_time_group_alone() -> None:
    plain, layer = both(nn.Linear(64, 48))
    layer.corrections = torch.stack([torch.zeros(48), torch.ones(48)])
    layer.clock = Clock(TimeGroups(edges=(0.0, 0.5, 1.0)))
    x = normal(5, 64)
    assert distance(layer(x), plain(x)) < 3e-5
    for time, added in ((0.2, 0.0), (0.9, 1.0)):
        with timestep(time):
            assert distance(layer(x), plain(x) + added) < 3e-5


def test_the_first_layer_that_is_not_finite_is_named() -> None:
    plain, layer = both(nn.Linear(64, 48))
    large = (60000.0 * plain.weight[:1].sign()).half()  # so that every term of the first output is positive
    with pytest.warns(RuntimeWarning, match=r"weight: its outputs in torch.float16 are not finite although its inputs"):
        layer(large)
    layer(torch.full((1, 64), float("nan")))  # its inputs are to blame
    assert layer.checks_left == 0
    layer(large)


def test_classes_that_compute_otherwise_are_refused() -> None:
    class Twice(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    weight = PackedWeight(packed(normal(48, 64)))
    for layer in (Twice(64, 48), nn.Embedding(48, 64, max_norm=1.0), nn.Bilinear(2, 3, 4)):
        with pytest.raises(QuantizationError, match=r"weight: .* cannot run packed; Linear, .* itself can"):
            run_packed(layer, weight)
    with pytest.raises(QuantizationError, match=r"weight: is \(48, 64\); the layer's weight is"):
        run_packed(nn.Linear(64, 47), weight)


def test_another_layer_of_the_same_class_is_that_of_torch() -> None:
    for layer, x in ((nn.Linear(64, 48), normal(5, 64)), (nn.Conv1d(32, 48, 3), normal(2, 32, 9))):
        _, runs = both(layer)
        other: Any = type(runs)(*(64, 48) if isinstance(layer, nn.Linear) else (32, 48, 3))
        layer.load_state_dict(other.state_dict())
        assert torch.equal(other(x), layer(x))


def test_it_says_what_it_holds() -> None:
    _, layer = both(nn.Linear(64, 48), **TURNED)
    assert isinstance(layer, QuantizedLinear)
    assert "(48, 64) as 4-bit codes in groups of 32, affine, equalized, turned by 16" in repr(layer)

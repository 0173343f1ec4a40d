"""The watch sees every product with a weight, and the rows that it makes of an input give the layer's own outputs."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from arrow_quant_v2.calibration.collect import MOST_ROWS, EnoughSeen, Product, Watch, seen

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def made(make: Callable[[], Any]) -> Any:
    """A module in eval mode, the same every time; torch's own generator is left alone."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval().requires_grad_(requires_grad=False)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def watched(module: nn.Module, *arguments: Any, stop: int | None = None) -> Watch:
    watch = Watch(dict(module.named_parameters()), stop)
    with watch:
        module(*arguments)
    return watch


def outputs_of(product: Product, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The layer's outputs, one row for each place, as the rows of its input give them."""
    return seen(product, seed=0).rows @ weight.flatten(1).T + (0.0 if bias is None else bias)


def places_first(outputs: Tensor) -> Tensor:
    """(batch, out, *places) -> (batch * places, out)."""
    return outputs.movedim(1, -1).flatten(0, -2)


# Rows


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")  # torch pads a copy
@example(axes=2, kernel=4, stride=1, dilation=1, padding="same", mode="zeros", uneven=False, batch=2)
@settings(deadline=None, max_examples=120)
@given(
    axes=st.integers(1, 3),
    kernel=st.integers(1, 4),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    padding=st.sampled_from([0, 1, 2, "same", "valid"]),
    mode=st.sampled_from(["zeros", "circular", "reflect"]),
    uneven=st.booleans(),
    batch=st.integers(0, 2),
)
def test_rows_of_a_convolution_give_its_outputs_at_every_place(  # noqa: PLR0917 - hypothesis names them
    axes: int, kernel: int, stride: int, dilation: int, padding: Any, mode: str, uneven: bool, batch: int
) -> None:
    """`uneven`: the first axis has a kernel, stride, padding and dilation of its own; a batch of 0 is no batch axis."""
    assume(padding != "same" or stride == 1)
    each: dict[str, Any] = {"kernel_size": kernel, "stride": stride, "dilation": dilation, "padding": padding}
    if uneven and axes > 1:
        first = {"kernel_size": 3, "stride": 1, "dilation": 1, "padding": 1}
        each = {k: v if isinstance(v, str) else (first[k], *[v] * (axes - 1)) for k, v in each.items()}
    layer = made(lambda: CONVOLUTIONS[axes](3, 4, **each, padding_mode=mode))
    shape = (9, 8) if axes == 2 else (7,) * axes
    assume(axes < 3 or batch < 2)  # more places than are looked at
    x = random(*([batch] if batch else []), 3, *shape)
    watch = watched(layer, x)
    assert watch.log == [("weight", 0)]
    outputs = layer(x) if batch else layer(x)[None]
    torch.testing.assert_close(
        outputs_of(watch.products[0], layer.weight, layer.bias), places_first(outputs), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7), (2, 2, 3, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_of_a_linear_layer_are_its_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    layer = made(lambda: nn.Linear(7, 5)).to(dtype)
    x = random(*shape).to(dtype)
    found = seen(watched(layer, x).products[0], seed=0)
    assert found.rows.dtype == torch.float32
    assert torch.equal(found.rows, x.float().reshape(-1, 7))
    assert torch.equal(found.absmax, x.float().reshape(-1, 7).abs().amax(dim=0))


def test_absmax_is_of_channels_and_moments_of_all_elements() -> None:
    x = torch.arange(24.0).reshape(1, 2, 3, 4) - 13.0
    found = seen(watched(made(lambda: nn.Conv2d(2, 1, 3)), x).products[0], seed=0)
    assert found.absmax.tolist() == [13.0, 10.0]
    assert found.moments.tolist() == [24.0, float(x.sum()), float(x.square().sum()), -13.0, 10.0]
    assert found.rows.shape == (2, 18)


def test_of_many_tokens_some_are_chosen_and_always_the_same() -> None:
    x = torch.arange(5000.0).reshape(5, 1000, 1)
    found = [seen(Product(inputs=x, place=None), seed=seed) for seed in (3, 3, 4)]
    rows = [one.rows[:, 0] for one in found]
    assert len(rows[0]) == MOST_ROWS
    assert (rows[0].diff() > 0).all()
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])
    assert found[0].moments[0] == 5000
    assert found[0].absmax.tolist() == [4999.0]
    few = Product(inputs=x[:2], place=None)
    assert torch.equal(seen(few, seed=3).rows, seen(few, seed=4).rows)
    assert len(seen(few, seed=3).rows) == 2000


def test_of_many_places_some_are_chosen_and_each_is_a_place() -> None:
    layer = made(lambda: nn.Conv2d(2, 6, 3, padding=1, stride=2, bias=False))
    x = random(3, 2, 96, 64)
    product = watched(layer, x).products[0]
    outputs = places_first(layer(x))
    rows = outputs_of(product, layer.weight)
    assert len(outputs) > len(rows) == MOST_ROWS
    at = torch.cdist(rows.double(), outputs.double()).min(dim=1)
    assert at.values.max() < 1e-5
    assert (at.indices.diff() > 0).all()
    assert torch.equal(seen(product, seed=1).rows, seen(product, seed=1).rows)
    assert not torch.equal(seen(product, seed=1).rows, seen(product, seed=2).rows)


# What is seen


class Projections(nn.Module):
    """Query, key and value, with something between the first two."""

    def __init__(self, between: Callable[[Tensor], Any] = lambda _: None) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(6, 4)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        self.between(x)
        return q + self.k(x) + self.v(x)


def test_layers_that_are_given_one_tensor_are_one_input() -> None:
    x = random(2, 6)
    watch = watched(made(Projections), x)
    assert watch.log == [("q.weight", 0), ("k.weight", 0), ("v.weight", 0)]
    assert [torch.equal(product.inputs, x) for product in watch.products] == [True]


def test_a_tensor_that_is_written_into_is_another_input_from_then_on() -> None:
    x = random(2, 6)
    before = x.clone()
    watch = watched(made(lambda: Projections(lambda x: x.mul_(2.0))), x)
    assert watch.log == [("q.weight", 0), ("k.weight", 1), ("v.weight", 1)]
    assert torch.equal(watch.products[0].inputs, before)
    assert torch.equal(watch.products[1].inputs, 2.0 * before)


@pytest.mark.parametrize("keep", [True, False])
def test_tensors_that_follow_each_other_in_memory_are_different_inputs(keep: bool) -> None:
    layer = made(lambda: nn.Linear(6, 4))
    with Watch(dict(layer.named_parameters()), keep=keep) as watch:
        for number in range(40):
            layer(torch.full((2, 6), float(number)))
    assert watch.log == [("weight", number) for number in range(40)]
    assert [float(product.inputs[0, 0]) for product in watch.products] == ([*range(40)] if keep else [])


def test_convolutions_that_move_differently_are_different_inputs() -> None:
    layers = made(lambda: nn.ModuleList([nn.Conv2d(2, 3, 3), nn.Conv2d(2, 4, 3), nn.Conv2d(2, 3, 3, stride=2)]))
    x = random(1, 2, 8, 8)
    with Watch(dict(layers.named_parameters())) as watch:
        for layer in layers:
            layer(x)
    assert watch.log == [("0.weight", 0), ("1.weight", 0), ("2.weight", 1)]


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: nn.Bilinear(4, 4, 4), None),
        (lambda: nn.Embedding(9, 4), None),
        (lambda: nn.LayerNorm(4), (2, 4)),
    ],
    ids=["bilinear", "embedding", "norm"],
)
def test_what_is_no_product_of_one_input_with_a_matrix_is_not_noted(layer: Any, shape: tuple[int, ...] | None) -> None:
    module = made(layer)
    x = (random(*shape),) if shape else ((random(2, 4),) * 2 if isinstance(module, nn.Bilinear) else (torch.arange(3),))
    assert watched(module, *x).log == []


def test_a_part_of_a_weight_is_noted_as_such_and_a_copy_not_at_all() -> None:
    layer = made(lambda: nn.Linear(6, 4))
    x = random(2, 6)
    with Watch({"weight": layer.weight}) as watch:
        functional.linear(x, layer.weight[:2])
        functional.linear(x, layer.weight.clone())
    assert watch.log == [("weight", 0)]
    assert watch.parted == {"weight": {(0, 2)}}


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: nn.Conv2d(6, 8, 3, groups=2, padding=1, bias=False), (2, 6, 5, 7)),
        (lambda: nn.Conv1d(6, 6, 4, groups=6, stride=2, bias=False), (6, 9)),
    ],
    ids=["grouped", "depthwise, no batch"],
)
def test_rows_of_each_group_give_its_outputs(layer: Any, shape: tuple[int, ...]) -> None:
    module, x = made(layer), random(*shape)
    with Watch(dict(module.named_parameters())) as watch:
        outputs = module(x)
    assert set(watch.parted) == {"weight"}
    assert [product.part for product in watch.products] == [
        (g * module.out_channels // module.groups, (g + 1) * module.out_channels // module.groups)
        for g in range(module.groups)
    ]
    batched = outputs if outputs.ndim == x.ndim == len(module.kernel_size) + 2 else outputs[None]
    parts = [outputs_of(p, module.weight[slice(*(p.part or (0, 0)))]) for p in watch.products]
    torch.testing.assert_close(torch.cat(parts, dim=1), places_first(batched), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2])
def test_rows_of_a_transposed_convolution_give_its_patches(groups: int) -> None:
    """As far apart as they are wide, patches do not overlap, and are the outputs."""
    module, x = made(lambda: nn.ConvTranspose1d(6, 4, 3, stride=3, groups=groups, bias=False)), random(2, 6, 5)
    with Watch(dict(module.named_parameters())) as watch:
        outputs = module(x)  # (2, 4, 15)
    assert all(product.transposed for product in watch.products)
    found = []
    for product in watch.products:
        weight = module.weight if product.part is None else module.weight[slice(*product.part)]
        patches = seen(product, seed=0).rows @ weight.flatten(1)  # (2 * 5, out * 3)
        found.append(patches.reshape(2, 5, -1, 3).permute(0, 2, 1, 3).flatten(2))
    torch.testing.assert_close(torch.cat(found, dim=1), outputs, rtol=1e-4, atol=1e-5)


def test_rows_of_a_weight_are_known_by_where_they_lie() -> None:
    weight = random(12, 6)
    with Watch({"weight": weight}) as watch:
        for part in (weight[4:8], weight, weight[:, :3], weight[:4].clone(), weight[::2], weight[8:].mT):
            functional.linear(random(2, part.shape[1]), part)
    assert [(product.part, product.place) for product in watch.products] == [((4, 8), None), (None, None)]
    assert watch.log == [("weight", 0), ("weight", 1)]


def test_experts_have_the_tokens_that_are_routed_to_them() -> None:
    weight, x = random(3, 8, 16), random(10, 16)
    ends = torch.tensor([4, 4, 10], dtype=torch.int32)
    with Watch({"weight": weight}) as watch:
        functional.grouped_mm(x, weight.mT, offs=ends)
    assert [product.part for product in watch.products] == [(0, 8), (8, 16), (16, 24)]
    assert [len(product.inputs) for product in watch.products] == [4, 0, 6]
    assert torch.equal(torch.cat([product.inputs for product in watch.products]), x)


def test_a_layer_that_is_called_twice_counts_twice() -> None:
    layer = made(lambda: nn.Linear(6, 6))
    watch = watched(nn.Sequential(layer, layer), random(2, 6))
    assert watch.log == [("0.weight", 0), ("0.weight", 1)]


def test_products_without_a_layer_are_seen() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Parameter(torch.ones(4, 6)), nn.Parameter(torch.ones(4, 4, 3))

        def forward(self, x: Tensor) -> Tensor:
            between = functional.linear(input=x, weight=self.one)
            return functional.conv1d(weight=self.other, input=between.mT[None], padding="same", dilation=2)

    x, module = random(5, 6), made(Functional)
    watch = watched(module, x)
    assert watch.log == [("one", 0), ("other", 1)]
    torch.testing.assert_close(outputs_of(watch.products[1], module.other), places_first(module(x)))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_both_products_of_multi_head_attention_are_seen(batch_first: bool, bias: bool) -> None:
    module = made(lambda: nn.MultiheadAttention(16, 2, batch_first=batch_first, bias=bias))
    x = random(3, 5, 16)
    plainly = module(x, x, x)[0]
    watch = Watch(dict(module.named_parameters()))
    with watch:
        outputs = module(x, x, x)[0]
    assert watch.log == [("in_proj_weight", 0), ("out_proj.weight", 1)]
    torch.testing.assert_close(outputs, plainly)
    rows = seen(watch.products[0], seed=0).rows
    assert sorted(rows.tolist()) == sorted(x.reshape(-1, 16).tolist())
    made_of_rows = outputs_of(watch.products[1], module.out_proj.weight, module.out_proj.bias)
    expected = (outputs.transpose(0, 1) if batch_first else outputs).reshape(-1, 16)
    torch.testing.assert_close(made_of_rows, expected, rtol=1e-4, atol=1e-6)


def test_attention_to_something_else_shares_no_input() -> None:
    """Query and key are multiplied with parts of one weight."""
    module = made(lambda: nn.MultiheadAttention(16, 2))
    watch = Watch(dict(module.named_parameters()))
    with watch:
        module(random(5, 16), (other := random(4, 16, seed=1)), other)
    assert set(watch.parted) == {"in_proj_weight"}
    inputs = [number for _, number in watch.log]
    assert len(set(inputs)) == len(inputs)
    assert watch.log[-1][0] == "out_proj.weight"


def test_a_transformer_layer_of_torch_hides_no_product() -> None:
    module = made(lambda: nn.TransformerEncoderLayer(16, 2, 32, batch_first=True))
    x = random(2, 5, 16)
    plainly = module(x)
    watch = Watch(dict(module.named_parameters()))
    with watch:
        outputs = module(x)
    names = ["self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"]
    assert watch.log == list(zip(names, range(4), strict=True))
    torch.testing.assert_close(outputs, plainly, rtol=1e-4, atol=1e-5)


def test_the_call_ends_when_enough_was_seen() -> None:
    reached = []
    module = made(lambda: Projections(lambda _: reached.append("between")))
    watch = Watch(dict(module.named_parameters()), stop=1)
    with pytest.raises(EnoughSeen), watch:
        module(random(2, 6))
    assert watch.log == [("q.weight", 0)]
    assert reached == []
    assert not issubclass(EnoughSeen, Exception)  # models catch those


def test_the_watch_is_confined_to_its_thread() -> None:
    module, inside, outside = made(lambda: nn.Linear(6, 4)), threading.Event(), threading.Event()
    logs: dict[str, list[tuple[str, int]]] = {}

    def watching() -> None:
        with Watch(dict(module.named_parameters())) as watch:
            inside.set()
            outside.wait(10)
            module(random(1, 6))
        logs["watching"] = watch.log

    thread = threading.Thread(target=watching)
    thread.start()
    inside.wait(10)
    module(random(3, 6))
    with Watch(dict(module.named_parameters())) as watch:
        module(random(2, 6))
        module(random(2, 6))
    outside.set()
    thread.join()
    assert logs["watching"] == [("weight", 0)]
    assert len(watch.log) == 2

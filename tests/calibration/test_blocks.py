"""Blocks are found in models of every shape, and a walk gives what the model itself would have given."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

import pytest
import torch
from small_blocks import (
    MODELS,
    Bert,
    Layer,
    UNet,
    deep,
    diffusers_unet,
    given_by,
    made,
    matrices,
    random,
    same,
    samples_of,
    stack,
    vectors,
)
from torch import nn

from arrow_quant_v2.calibration import kept
from arrow_quant_v2.calibration.blocks import candidates, walking
from arrow_quant_v2.calibration.collect import Watch
from arrow_quant_v2.calibration.sample import Sample
from arrow_quant_v2.engines.one_core import each_on_one_core
from arrow_quant_v2.errors import QuantizationError
from arrow_quant_v2.kernels.cpu import threads_per_call

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from arrow_quant_v2.calibration.blocks import Block, Walk

every_model = pytest.mark.parametrize("name", MODELS)


def opened(name: str) -> tuple[Any, list[Sample]]:
    make, samples = MODELS[name]
    return made(make), samples()


def finish(walk: Walk, numbers: range) -> None:
    for number, sample in product(numbers, range(len(walk.samples))):
        walk.finish(number, sample)


def given(walk: Walk) -> dict[tuple[int, int, int], Any]:
    """(block, sample, call) -> what the walk will hand out."""
    return {
        (number, sample, call): walk._kept.take((number, sample, call))
        for number, block in enumerate(walk.blocks)
        for sample in range(len(walk.samples))
        for call in range(block.calls)
    }


def as_the_model_gives(walk: Walk, module: nn.Module) -> dict[tuple[int, int, int], Any]:
    found = {}
    for sample in range(len(walk.samples)):
        of_this = given_by(walk, module, sample)
        found |= {(number, sample, call): outputs for (number, call), outputs in of_this.items()}
    return dict(sorted(found.items()))


# Candidates


def test_blocks_of_a_text_model() -> None:
    module = made(Bert)
    names = [name for name, _ in candidates(module, frozenset(matrices(module)))]
    assert names == ["encoder.layer.0", "encoder.layer.1", "encoder.layer.2", "head"]


def test_blocks_of_lists_inside_lists() -> None:
    module = made(UNet)
    names = [name for name, _ in candidates(module, frozenset(matrices(module)))]
    inside = [f"{side}.{i}.{j}" for side in ("down", "up") for i in range(2) for j in range(2)]
    assert names == ["enter", *inside[:4], "shrink.0", "shrink.1", *inside[4:], "leave"]


@pytest.mark.parametrize(
    ("make", "names"),
    [(stack, [""]), (deep, ["0", "2", "3"]), (lambda: nn.Linear(8, 3), [""]), (Layer, [""])],
    ids=["a stack of single layers", "a stack of stacks", "a layer", "a block"],
)
def test_blocks_of_small_things(make: Callable[[], nn.Module], names: list[str]) -> None:
    module = made(make)
    assert [name for name, _ in candidates(module, frozenset(matrices(module)))] == names


def terrain() -> nn.Module:
    from terrain_unet import TerrainUNet  # noqa: PLC0415 - imports onnx

    with torch.device("meta"):
        return TerrainUNet()


@pytest.mark.parametrize(
    ("make", "count"), [(terrain, 87), (diffusers_unet, 17), (Bert, 4), (UNet, 12), (deep, 3), (stack, 1)]
)
def test_every_weight_lies_in_exactly_one_block_and_every_block_can_be_called(
    make: Callable[[], nn.Module], count: int
) -> None:
    module = made(make)
    found = list(candidates(module, frozenset(matrices(module))))
    inside = [name for at, part in found for name in (f"{at}.{own}".strip(".") for own in matrices(part))]
    assert sorted(inside) == sorted(matrices(module))
    assert len(found) == count
    assert not any(isinstance(part, nn.ModuleList) for _, part in found)


def test_what_holds_nothing_that_is_watched_is_no_block() -> None:
    module = made(Bert)
    assert [name for name, _ in candidates(module, frozenset({"head.weight"}))] == [""]
    two = frozenset({"encoder.layer.1.q.weight", "encoder.layer.1.k.weight"})
    assert [name for name, _ in candidates(module, two)] == ["encoder.layer.1"]
    assert list(candidates(module, frozenset())) == []


# What is found


@every_model
def test_every_product_belongs_to_one_block(name: str) -> None:
    module, samples = opened(name)
    watched = matrices(module)
    with walking(module, samples, watched) as walk:
        found = [layer for block in walk.blocks for layers in block.inputs for layer in layers]
        assert sorted(found) == sorted(watched)
        assert all(set(block.uses) == {layer for layers in block.inputs for layer in layers} for block in walk.blocks)


def test_inputs_come_in_the_order_in_which_they_are_used() -> None:
    module, samples = opened("bert")
    with walking(module, samples, matrices(module)) as walk:
        at = "encoder.layer.0"
        assert next(block for block in walk.blocks if block.name == at).inputs == (
            (f"{at}.q.weight", f"{at}.k.weight", f"{at}.v.weight"),
            (f"{at}.out.weight",),
            (f"{at}.up.weight",),
            (f"{at}.down.weight",),
        )
        assert [block.name for block in walk.blocks if block.inputs] == [
            at,
            "encoder.layer.1",
            "encoder.layer.2",
            "head",
        ]


def test_a_block_that_runs_again_is_one_block() -> None:
    module, samples = opened("again")
    with walking(module, samples, matrices(module)) as walk:
        assert [(block.name, block.calls) for block in walk.blocks] == [("layers.0", 4), ("layers.1", 2)]
        assert walk.blocks[0].uses["layers.0.q.weight"] == 4
        assert len(walk.watch(0, ("layers.0.up.weight",), 0).products) == 4


def test_a_block_with_two_names_is_one_block() -> None:
    module, samples = opened("again")
    both = {name: p for name, p in module.named_parameters(remove_duplicate=False) if p.ndim > 1}
    assert "same.0.q.weight" in both
    with walking(module, samples, both) as walk:
        assert [(block.name, block.calls) for block in walk.blocks] == [("layers.0", 4), ("layers.1", 2)]
        assert len({layer for layers in walk.blocks[0].inputs for layer in layers}) == 6


def test_a_weight_that_two_blocks_share_belongs_to_the_first() -> None:
    module, samples = opened("tied")
    with walking(module, samples, matrices(module)) as walk:
        assert next(layers for layers in walk.blocks[0].inputs if len(layers) == 1) == ("layers.0.out.weight",)
        assert not any("out" in layer for layers in walk.blocks[1].inputs for layer in layers)


@pytest.mark.parametrize("name", sorted(MODELS.keys() - {"tied"}))
def test_what_a_block_multiplies_is_what_the_model_multiplies_there(name: str) -> None:
    module, samples = opened(name)
    watched, plain = matrices(module), made(MODELS[name][0])
    with walking(module, samples, watched) as walk:
        for number, block in enumerate(walk.blocks):
            for layers, sample in product(block.inputs, range(len(samples))):
                with torch.no_grad(), Watch({layer: matrices(plain)[layer] for layer in layers}) as expected:
                    plain(*samples[sample].arguments)
                found = walk.watch(number, layers, sample)
                assert same([one.inputs for one in found.products], [one.inputs for one in expected.products])
            finish(walk, range(number, number + 1))


# What is handed out


@every_model
def test_every_block_gives_what_it_gives_in_the_model(name: str) -> None:
    module, samples = opened(name)
    with walking(module, samples, matrices(module)) as walk:
        finish(walk, range(len(walk.blocks)))
        assert same(given(walk), as_the_model_gives(walk, made(MODELS[name][0])))


def changed(module: nn.Module, block: Block) -> None:
    parameters = matrices(module)
    for layer in block.uses:
        rows = torch.arange(len(parameters[layer])).reshape(-1, *[1] * (parameters[layer].ndim - 1))
        parameters[layer].mul_(1.0 + 0.1 * rows)


@every_model
def test_later_blocks_see_what_earlier_ones_give_after_a_change(name: str) -> None:
    """Blocks change one after the other; after each change, all that was kept is what the changed model gives."""
    module, samples = opened(name)
    plain = made(MODELS[name][0])
    with walking(module, samples, matrices(module)) as walk:
        before = as_the_model_gives(walk, plain)
        for number, block in enumerate(walk.blocks):
            changed(module, block)
            finish(walk, range(number, number + 1))
            changed(plain, block)
            expected = {key: one for key, one in as_the_model_gives(walk, plain).items() if key[0] <= number}
            assert same({key: walk._kept.take(key) for key in expected}, expected)
        fitted = {key: outputs for key, outputs in before.items() if walk.blocks[key[0]].inputs}
        assert not any(same(walk._kept.take(key), outputs) for key, outputs in fitted.items())


def test_samples_in_threads_give_what_they_give_one_after_the_other() -> None:
    found = []
    for threads in (1, 2, 5):
        module, _ = opened("again")
        samples = samples_of(*((random(2, 4, 8, seed=i),) for i in range(12)))
        threads_per_call.set(threads)
        with walking(module, samples, matrices(module)) as walk:
            seen = []
            for number, block in enumerate(walk.blocks):
                for layers in block.inputs:
                    watches = each_on_one_core(lambda i: walk.watch(number, layers, i), range(12))  # noqa: B023 - at once
                    seen.append([[one.inputs for one in watch.products] for watch in watches])
                each_on_one_core(lambda i: walk.finish(number, i), range(12))  # noqa: B023 - at once
            found.append((given(walk), seen))
    assert same(found[0], found[1])
    assert same(found[0], found[2])


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = threads_per_call.get()
    yield
    threads_per_call.set(before)


# Memory


@every_model
def test_outputs_in_files_are_the_same(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, samples = opened(name)
    with walking(module, samples, matrices(module)) as walk:
        finish(walk, range(len(walk.blocks)))
        in_memory = given(walk)
    monkeypatch.setattr(kept, "IN_MEMORY", 100)
    monkeypatch.setattr(kept, "WORTH_A_FILE", 1)
    module, samples = opened(name)
    with walking(module, samples, matrices(module), tmp_path) as walk:
        finish(walk, range(len(walk.blocks)))
        assert same(given(walk), in_memory)
        assert [path for path in tmp_path.rglob("*") if path.is_file()]
    assert list(tmp_path.iterdir()) == []


def test_files_are_gone_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "IN_MEMORY", 0)
    monkeypatch.setattr(kept, "WORTH_A_FILE", 1)
    module, samples = opened("bert")
    with pytest.raises(ZeroDivisionError), walking(module, samples, matrices(module), tmp_path) as walk:
        fails_after(walk, tmp_path)
    assert list(tmp_path.iterdir()) == []


def fails_after(walk: Walk, folder: Path) -> None:
    walk.finish(0, 0)
    assert [path for path in folder.rglob("*") if path.is_file()]
    raise ZeroDivisionError


# The model afterwards


@every_model
def test_the_model_has_its_own_forwards_again(name: str) -> None:
    module, samples = opened(name)
    before = [vars(part).copy() for part in module.modules()]
    hooks = [(len(part._forward_hooks), len(part._forward_pre_hooks)) for part in module.modules()]
    with walking(module, samples, matrices(module)) as walk:
        assert all("forward" in vars(block.module) for block in walk.blocks)
        walk.finish(0, 0)
    assert [vars(part) for part in module.modules()] == before
    assert hooks == [(len(part._forward_hooks), len(part._forward_pre_hooks)) for part in module.modules()]


def test_the_model_has_its_own_forwards_again_after_an_error() -> None:
    module, samples = opened("bert")
    with pytest.raises(ZeroDivisionError), walking(module, samples, matrices(module)):
        raise ZeroDivisionError
    assert not any("forward" in vars(part) for part in module.modules())


def test_a_forward_that_someone_else_put_there_stays() -> None:
    module, samples = opened("bert")
    own = module.head.forward

    def put(x: torch.Tensor) -> torch.Tensor:
        return own(x) + 1.0

    module.head.forward = put
    with walking(module, samples, matrices(module)) as walk:
        last = len(walk.blocks) - 1
        finish(walk, range(last + 1))
        assert same(walk._kept.take((last, 0, 0)), module(*samples[0].arguments)[0])
    assert module.head.forward is put


def test_outside_the_walk_the_model_runs_as_always() -> None:
    module, samples = opened("unet")
    plainly = made(UNet)(*samples[0].arguments)
    with walking(module, samples, matrices(module)) as walk:
        walk.finish(0, 0)
        assert torch.equal(module(*samples[0].arguments), plainly)


# What is refused


class Breaks(nn.Module):
    """Runs, unless there are as many tokens as `at`."""

    def __init__(self, error: type[Exception], at: int) -> None:
        super().__init__()
        self.layer, self.error, self.at = nn.Linear(8, 8), error, at

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) == self.at:
            raise self.error("no such thing")
        return self.layer(x)


@pytest.mark.parametrize(
    "error", [TypeError, RuntimeError, AssertionError, ZeroDivisionError, KeyError, NotImplementedError]
)
def test_a_model_that_cannot_be_called_says_with_what_and_why(error: type[Exception]) -> None:
    module = made(lambda: Breaks(error, 2))
    with (
        pytest.raises(
            QuantizationError,
            match=rf"cannot be called with calibration sample 0: {error.__name__}: .*no such thing.*; give",
        ),
        walking(module, samples_of((random(2, 8),)), matrices(module)),
    ):
        pass
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    with walking(module, samples_of((random(3, 8),), (random(2, 8),)), matrices(module)) as walk:
        walk.finish(0, 0)
        with pytest.raises(QuantizationError, match=rf"calibration sample 1: {error.__name__}"):
            walk.finish(0, 1)


def test_arguments_that_do_not_fit_are_named() -> None:
    module = made(Bert)
    with (
        pytest.raises(
            QuantizationError, match=r"sample 0: TypeError: .*forward\(\).* argument.*; give samples that fit"
        ),
        walking(module, [Sample(keywords={"wrong": 1}, timestep=0.0)], matrices(module)),
    ):
        pass


def test_no_samples_are_refused() -> None:
    module = made(Bert)
    with pytest.raises(QuantizationError, match="give one sample or more"), walking(module, [], matrices(module)):
        pass


class Repeats(nn.Module):
    """Runs its first layer as often as it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, x: torch.Tensor, times: int) -> torch.Tensor:
        for _ in range(times):
            x = self.layers[0](x)[0]
        return self.layers[1](x)[0]


def test_a_sample_that_runs_a_block_more_often_is_refused_and_less_often_is_not() -> None:
    module, x = made(Repeats), random(1, 4, 8)
    with walking(module, samples_of((x, 2), (x, 1), (x, 3)), matrices(module)) as walk:
        finish(walk, range(1))
        for sample, times in ((0, 2), (1, 1)):
            walk.finish(1, sample)
            assert same(walk._kept.take((1, sample, 0))[0], made(Repeats)(x, times))
        with pytest.raises(
            QuantizationError,
            match=r"layers.0: is called more than 2 times with calibration sample 2, but 2 times with",
        ):
            walk.finish(1, 2)


def test_a_layer_that_nobody_calls_is_in_no_block() -> None:
    module = made(Bert)
    module.spare = made(lambda: nn.Linear(8, 8))
    with walking(module, MODELS["bert"][1](), matrices(module)) as walk:
        assert [block.name for block in walk.blocks if "spare" in block.name] == []


def test_vectors_differ() -> None:
    """Otherwise samples could be mixed up without a test that sees it."""
    one, other, _ = vectors()
    assert not torch.equal(one.arguments[0], other.arguments[0])

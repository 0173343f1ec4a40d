"""A module whose weights come into memory with the part that runs."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch
from text_models import opened, save_folder, small_module

from arrow_quant_v2.calibration.blocks import walking
from arrow_quant_v2.calibration.collect import Watch
from arrow_quant_v2.calibration.sample import Sample
from arrow_quant_v2.calibration.transformers_model import open_transformers
from arrow_quant_v2.errors import SourceError
from arrow_quant_v2.sources.folder import open_model

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from arrow_quant_v2.calibration.runnable import Runnable
    from arrow_quant_v2.sources.folder import Model

IDS = torch.arange(12)[None]
HEAD = "cls.predictions.decoder.weight"
WORDS = "bert.embeddings.word_embeddings.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of four blocks, its head tied to its embedding: the files hold one of them."""
    module = small_module("BertForMaskedLM", num_hidden_layers=4)
    tensors = {name: tensor for name, tensor in module.state_dict().items() if name != HEAD}
    return save_folder(tmp_path_factory.mktemp("tied"), module, tensors)


@pytest.fixture
def model(folder: Path) -> Iterator[Model]:
    with open_model(folder) as model:
        yield model


@pytest.fixture
def streamed(model: Model) -> Runnable:
    return open_transformers(model, "text", 4, on_demand=True)


def in_memory(module: Any) -> set[str]:
    """Parameters with values."""
    return {name for name, p in module.named_parameters(remove_duplicate=False) if not p.is_meta}


def logits(runnable: Runnable) -> torch.Tensor:
    with torch.no_grad():
        return runnable.module(input_ids=IDS).logits


def test_it_gives_what_the_model_in_memory_gives(folder: Path, streamed: Runnable) -> None:
    assert torch.equal(logits(streamed), logits(opened(folder, 4)))
    assert in_memory(streamed.module) == set()


def test_one_part_is_in_memory_while_it_runs(streamed: Runnable) -> None:
    seen = []
    for layer in streamed.module.bert.encoder.layer:
        layer.attention.register_forward_hook(lambda *_: seen.append(in_memory(streamed.module)))
    logits(streamed)
    assert [{name.split(".")[3] for name in names} for names in seen] == [{"0"}, {"1"}, {"2"}, {"3"}]
    assert [len(names) for names in seen] == [16] * 4


def test_what_is_held_keeps_what_is_done_to_it_and_is_gone_afterwards(streamed: Runnable) -> None:
    layer = streamed.module.bert.encoder.layer[1]
    before = logits(streamed)
    name = "bert.encoder.layer.1.output.dense.weight"
    parameters = streamed.parameters([name])
    with streamed.holding(layer):
        parameters[name].zero_()
        assert not torch.equal(logits(streamed), before)
        assert not parameters[name].any()
    assert parameters[name].is_meta
    assert torch.equal(logits(streamed), before)


def test_tied_parameters_are_one_wherever_they_are_in_memory(streamed: Runnable) -> None:
    words = streamed.parameters([WORDS])
    with streamed.holding(streamed.module.cls):
        assert words[WORDS] is streamed.module.get_parameter(HEAD)
        assert streamed.module.get_parameter(WORDS).is_meta
        with streamed.holding(streamed.module.bert.embeddings):
            assert streamed.module.get_parameter(WORDS) is streamed.module.get_parameter(HEAD)
        assert not words[WORDS].is_meta
    assert words[WORDS].is_meta


def test_only_the_names_asked_for_are_known(streamed: Runnable) -> None:
    parameters = streamed.parameters([WORDS])
    assert (list(parameters), len(parameters)) == ([WORDS], 1)
    with pytest.raises(KeyError):
        parameters[HEAD]


def test_calls_may_overlap(folder: Path, streamed: Runnable) -> None:
    expected, found = logits(opened(folder, 4)), list[torch.Tensor]()
    threads = [threading.Thread(target=lambda: found.extend(logits(streamed) for _ in range(5))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 20
    assert all(torch.equal(one, expected) for one in found)
    assert in_memory(streamed.module) == set()


def test_a_weight_that_cannot_be_read_is_named_and_leaves_nothing_behind(
    model: Model, streamed: Runnable, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = model.source.read

    def damaged(name: str, *rest: Any) -> torch.Tensor:
        if name == "bert.encoder.layer.2.output.dense.weight":
            raise SourceError(f"{name}: cannot be read")
        return read(name, *rest)

    monkeypatch.setattr(model.source, "read", damaged)
    with pytest.raises(SourceError, match=r"layer\.2\.output\.dense\.weight: cannot be read"):
        logits(streamed)
    assert in_memory(streamed.module) == set()


def samples(count: int = 2) -> list[Sample]:
    return [Sample(keywords={"input_ids": IDS + i}, timestep=0.5) for i in range(count)]


def watched(runnable: Runnable) -> list[str]:
    return [place for place in runnable.names.values() if runnable.module.get_parameter_or_buffer(place).ndim == 2]


def test_a_walk_finds_the_same_blocks(folder: Path, streamed: Runnable) -> None:
    found = []
    for runnable in (opened(folder, 4), streamed):
        with walking(runnable.module, samples(), runnable.parameters(watched(runnable)), clock=runnable.clock) as walk:
            found.append([(b.name, b.inputs, b.calls, dict(b.uses), b.users) for b in walk.blocks])
    assert found[0] == found[1]
    assert found[0][-1][1][-1] == (WORDS,)  # the tied head
    assert streamed.reading > 0.0


def test_outputs_that_no_later_block_looks_at_are_let_go(folder: Path) -> None:
    runnable = opened(folder, 4)
    with walking(runnable.module, samples(), runnable.parameters(watched(runnable))) as walk:
        names = [block.name for block in walk.blocks]
        for number in range(4):
            for sample in range(2):
                walk.finish(number, sample)
            walk.forget(number)
        kept = {name: not walk._kept.take((at, 1, 0)).is_meta for at, name in enumerate(names[:4])}
        assert kept == {names[0]: True, names[1]: False, names[2]: False, names[3]: True}  # glue looks at embeddings
        watch = walk.watch(4, walk.blocks[4].inputs[0], 1)
    watching = Watch(runnable.parameters(walk.blocks[4].inputs[0]))
    with torch.no_grad(), watching:
        runnable.module(**samples()[1].keywords)
    assert torch.equal(watch.products[0].inputs, watching.products[0].inputs)


class Skipping(torch.nn.Module):
    """What the first block gives is needed after the third."""

    def __init__(self) -> None:
        super().__init__()
        pairs = [[torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)] for _ in range(4)]
        self.blocks = torch.nn.ModuleList(torch.nn.Sequential(*pair) for pair in pairs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.blocks[0](x)
        third = self.blocks[2](self.blocks[1](first))
        return self.blocks[3](third + first)


def test_what_is_needed_between_blocks_is_kept() -> None:
    with torch.random.fork_rng(devices=()):
        module = Skipping()
    calls = [Sample(arguments=(torch.ones(1, 8),), timestep=0.0)]
    with walking(module, calls, dict(module.named_parameters())) as walk:
        users = {block.name: block.users for block in walk.blocks}
    assert users["blocks.0"] is None
    assert users["blocks.1"] == {"blocks.2"}
    assert users["blocks.2"] is None

"""What outputs feel of changed weights: told by gradients, and seen by changing them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

sys.path.append(str(Path(__file__).parents[1]))

from text_models import opened, save_folder, small_module

from arrow_quant_v2.calibration.runnable import Runnable
from arrow_quant_v2.calibration.sample import Sample
from arrow_quant_v2.calibration.sensitivity import Change, Felt, first_tensor, sensitivity
from arrow_quant_v2.calibration.transformers_model import open_transformers
from arrow_quant_v2.sources.folder import open_model

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor


class Mixed(nn.Module):
    """A table, a convolution, and linear layers of which one is called twice; `aside` changes nothing in the output."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 12)
        self.conv = nn.Conv1d(12, 16, 3, padding=1)
        self.twice = nn.Linear(16, 16)
        self.out, self.aside = nn.Linear(16, 5), nn.Linear(16, 4)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        x = self.conv(self.table(ids).mT).mT.relu_()
        x = x + self.twice(self.twice(x).tanh())
        return {"ids": ids, "output": self.out(x), "aside": self.aside(x)}


@pytest.fixture
def mixed() -> Runnable:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        module = Mixed().eval().requires_grad_(requires_grad=False)
    return Runnable(module=module, modality="text", names={})


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def samples(count: int, length: int = 6, words: int = 7) -> list[Sample]:
    ids = torch.randint(words, (count, 1, length), generator=torch.Generator().manual_seed(1))
    return [Sample(arguments=(one,), timestep=0.0) for one in ids]


def told(runnable: Runnable, shown: Sequence[Sample], changes: Mapping[str, Change], **more: Any) -> Felt:
    return sensitivity(runnable, shown, [1.0] * len(shown), changes, **more)


def whole(parameter: Tensor, scale: float, ways: int = 3) -> Change:
    """All rows, each way twice as large as the one before."""
    errors = torch.stack([scale * 2**way * draw(*parameter.shape) for way in range(ways)])
    return Change(rows=torch.arange(len(parameter)), errors=errors)


@torch.no_grad()
def measured(runnable: Runnable, shown: Sequence[Sample], name: str, seeds: int, scale: float) -> float:
    """|dy|^2 / |y|^2, where every weight is changed by chance, signs of rows independent of each other."""
    parameter = dict(runnable.module.named_parameters())[name]
    before, total = parameter.clone(), 0.0
    for seed in range(seeds):
        for sample in shown:
            y = first_tensor(runnable.module(*sample.arguments))
            signs = draw(len(parameter), seed=seed).sign().reshape(-1, *(1,) * (parameter.ndim - 1))
            parameter.copy_(before + scale * draw(*parameter.shape) * signs)
            total += float((first_tensor(runnable.module(*sample.arguments)) - y).norm() / y.norm()) ** 2
            parameter.copy_(before)
    return total / seeds / len(shown)


@pytest.mark.parametrize("name", ["conv.weight", "twice.weight", "out.weight"])
def test_what_is_told_is_what_happens(mixed: Runnable, name: str) -> None:
    parameter = dict(mixed.module.named_parameters())[name]
    found = told(mixed, samples(80), {name: whole(parameter, 1e-3)}).changes[name]
    assert float(found[0]) == pytest.approx(measured(mixed, samples(20), name, 5, 1e-3), rel=0.4)
    assert (found / found[0]).tolist() == pytest.approx([1.0, 4.0, 16.0], rel=1e-5)


def test_a_table_is_felt_by_column(mixed: Runnable) -> None:
    found = told(mixed, samples(80, length=1), {}, tables=["table.weight"]).tables["table.weight"]
    assert found.shape == (12,)
    expected = measured(mixed, samples(20, length=1), "table.weight", 10, 1e-3)
    assert float((found * 1e-6 * draw(7, 12).square().mean(dim=0)).sum()) == pytest.approx(expected, rel=0.4)


def test_some_rows_tell_of_all(mixed: Runnable) -> None:
    change = whole(dict(mixed.module.named_parameters())["conv.weight"], 1e-3, ways=1)
    every = told(mixed, samples(8), {"conv.weight": change}).changes["conv.weight"]
    parts = [
        told(mixed, samples(8), {"conv.weight": Change(rows=rows, errors=change.errors[:, rows])})
        for rows in (torch.arange(0, 16, 2), torch.arange(1, 16, 2))
    ]
    assert float(sum(part.changes["conv.weight"] for part in parts) / 2) == pytest.approx(float(every))


def test_what_the_output_does_not_depend_on_is_not_told(mixed: Runnable) -> None:
    changes = {
        name: whole(dict(mixed.module.named_parameters())[name], 1e-3) for name in ("aside.weight", "out.weight")
    }
    assert set(told(mixed, samples(2), changes).changes) == {"out.weight"}


def test_the_model_is_left_as_it_was(mixed: Runnable) -> None:
    before = {name: parameter.clone() for name, parameter in mixed.module.named_parameters()}
    told(mixed, samples(3), {"out.weight": whole(before["out.weight"], 1.0)})
    assert all(torch.equal(parameter, before[name]) for name, parameter in mixed.module.named_parameters())
    assert not any(parameter.requires_grad for parameter in mixed.module.parameters())


def test_logits_are_felt_as_the_divergence_of_hidden_tokens() -> None:
    module = small_module("BertForMaskedLM")
    runnable = Runnable(module=module, modality="text", names={}, mask_token=4)
    ids = torch.randint(5, 40, (40, 1, 8), generator=torch.Generator().manual_seed(0))
    ids[:, :, 2:5] = 4
    shown = [Sample(keywords={"input_ids": one}, timestep=0.4) for one in ids]
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    parameter = dict(module.named_parameters())[name]
    change = whole(parameter, 0.01, ways=1)
    found = float(told(runnable, shown, {name: change}).changes[name])
    assert found == pytest.approx(2 * diverged(module, shown, parameter, change.errors[0]), rel=0.5)


@torch.no_grad()
def diverged(module: nn.Module, shown: Sequence[Sample], parameter: Tensor, error: Tensor) -> float:
    """Mean KL divergence at hidden tokens, over signs of rows that are independent of each other."""
    before, total = parameter.clone(), 0.0
    for number, one in enumerate(shown):
        p = module(**one.keywords).logits[0, 2:5].log_softmax(-1)
        parameter.copy_(before + error * draw(len(error), 1, seed=number).sign())
        q = module(**one.keywords).logits[0, 2:5].log_softmax(-1)
        parameter.copy_(before)
        total += float((p.exp() * (p - q)).sum(-1).mean())
    return total / len(shown)


def test_weights_that_are_read_on_demand_are_felt_alike(tmp_path: Path) -> None:
    module = small_module("BertForMaskedLM")
    folder = save_folder(tmp_path / "model", module, mask_token_id=4)
    names = [f"bert.encoder.layer.{n}.attention.output.dense.weight" for n in range(2)]
    changes = {name: whole(dict(module.named_parameters())[name], 0.01) for name in names}
    shown = [Sample(keywords={"input_ids": torch.tensor([[2, 9, 4, 4, 7, 3]])}, timestep=0.5)]
    expected = told(opened(folder), shown, changes, seed=3)
    with open_model(folder) as model:
        streamed = open_transformers(model, "text", None, on_demand=True)
        assert streamed.on_demand is not None
        found = told(streamed, shown, changes, seed=3)
        meta = [name for name in names if streamed.parameters(names)[name].is_meta]
    assert meta == names
    for name in names:
        assert found.changes[name].tolist() == pytest.approx(expected.changes[name].tolist())

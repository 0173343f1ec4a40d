"""What outputs feel of changed weights: told by gradients, and seen by changing them."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

sys.path.append(str(Path(__file__).parents[1]))

from text_models import opened, save_folder, small_module

from arrow_quant_v2.calibration.backwards import first_tensor
from arrow_quant_v2.calibration.runnable import Runnable
from arrow_quant_v2.calibration.sample import Sample
from arrow_quant_v2.calibration.sensitivity import Change, Felt, sensitivity
from arrow_quant_v2.calibration.transformers_model import open_transformers
from arrow_quant_v2.calibration.weight_gradient import Piece, Pieces
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


def told(runnable: Runnable, shown: Sequence[Sample], changes: Mapping[str, Change | Pieces], **more: Any) -> Felt:
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


class Parted(nn.Module):
    """Weights whose rows have inputs of their own, or belong to inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 16)
        self.grouped = nn.Conv1d(16, 16, 3, padding=1, groups=2)
        self.spread = nn.ConvTranspose1d(16, 12, 3, padding=1)
        self.turned = nn.Parameter(torch.randn(12, 16) / 3.0)
        self.experts = nn.Parameter(torch.randn(3, 16, 16) / 4.0)
        self.stack = nn.Parameter(torch.randn(2, 16, 16) / 4.0)
        self.out = nn.Linear(16, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.spread(self.grouped(self.table(ids).mT).tanh()).mT.flatten(0, 1)
        x = torch.addmm(torch.zeros(16), x, self.turned).add_(0.1)
        x = x.tanh() + torch.cat([nn.functional.linear(x[number::2], self.experts[2 * number]) for number in range(2)])
        ends = torch.tensor([len(x) // 3, len(x)], dtype=torch.int32)
        return self.out(x.relu() + torch._grouped_mm(x, self.stack.mT, offs=ends))


@pytest.fixture
def parted() -> Runnable:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        module = Parted().eval().requires_grad_(requires_grad=False)
    return Runnable(module=module, modality="text", names={})


def in_pieces(matrix: Tensor, scale: float, *, apart: int, some: int, of: int) -> Pieces:
    """All rows and columns of `some` of the `of` parts that the rows are, each way twice as large as the one before."""
    errors, size = scale * draw(*matrix.shape), len(matrix) // of
    pieces = [
        Piece(
            rows=size * part + torch.arange(size),
            columns=torch.arange(matrix.shape[1]),
            errors=errors[size * part : size * (part + 1)],
            apart=apart,
        )
        for part in range(some)
    ]
    twice = [replace(piece, errors=2.0 * piece.errors) for piece in pieces]
    return Pieces(columns=matrix.shape[1], ways=(tuple(pieces), tuple(twice)))


PARTED = {  # rows of the matrix that each of them is, the axis of its outputs, and how many parts its rows are
    "grouped.weight": (16, 0, 2),
    "spread.weight": (16, 1, 1),
    "turned": (12, 1, 1),
    "experts": (48, 0, 3),
    "stack": (32, 0, 2),
}


@pytest.mark.parametrize("name", PARTED)
def test_what_is_told_of_parts_is_what_happens(parted: Runnable, name: str) -> None:
    rows, apart, of = PARTED[name]
    matrix = dict(parted.module.named_parameters())[name].reshape(rows, -1)
    pieces = in_pieces(matrix, 1e-3, apart=apart, some=of, of=of)
    found = told(parted, samples(80), {name: pieces}).changes[name]
    assert float(found[0]) == pytest.approx(measured(parted, samples(20), name, 5, 1e-3), rel=0.4)
    assert float(found[1] / found[0]) == pytest.approx(4.0, rel=1e-5)


def test_each_part_of_a_weight_is_told_alone(parted: Runnable) -> None:
    matrix = parted.module.experts.reshape(48, -1)
    felt = [
        told(parted, samples(8), {"experts": in_pieces(matrix, 1e-3, apart=0, some=some, of=3)}).changes["experts"]
        for some in (1, 2, 3)
    ]
    assert float(felt[0][0]) == pytest.approx(float(felt[1][0]))  # nobody asks the second expert
    assert float(felt[2][0]) > 1.2 * float(felt[1][0])


def test_parts_are_told_beside_what_is_not_in_parts(parted: Runnable) -> None:
    matrix, out = parted.module.turned, parted.module.out.weight
    changes = {"turned": in_pieces(matrix, 1e-3, apart=1, some=1, of=1), "out.weight": whole(out, 1e-3)}
    both = told(parted, samples(4), changes).changes
    for name, change in changes.items():
        assert both[name].tolist() == pytest.approx(told(parted, samples(4), {name: change}).changes[name].tolist())


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

"""What the allocation is held against: rivals that fill the size, and a table in which no cell is forgotten."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from arrow_quant_v2.packed import TensorInfo

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(BENCH)])
    return importlib.import_module("allocation")


@pytest.fixture
def model():
    shapes = {"embed.weight": (512, 256)} | {f"blocks.{n}.weight": (256, 256) for n in range(20)}
    shapes |= {"blocks.19.bias": (256,), "head.weight": (64, 256)}
    tensors = [TensorInfo(name=name, shape=shape, dtype="float32") for name, shape in shapes.items()]
    runnable = SimpleNamespace(modality="text", module=torch.nn.Module(), names={})
    return SimpleNamespace(source=SimpleNamespace(tensors=tensors), runnable=runnable)


@pytest.mark.parametrize("target", [2.5, 3.0, 4.5])
def test_rivals_fill_the_size_and_never_pass_it(bench, model, target) -> None:
    base = {"bit_width": 2, "group_size": 64}
    for way in ("uniform", "in order", "by name"):
        stored = bench.bits_of(model, bench.WAYS[way](model, base, target))
        assert target - 0.4 < stored <= target, way


def test_a_table_that_is_also_a_head_is_fitted_to_its_inputs(bench, model) -> None:
    base = {"bit_width": 4, "group_size": 64, "enable_calibration": True}
    methods = {plan.tensor.name: plan.spec.method for plan in bench.plans_at(model, base)}
    module = torch.nn.ModuleDict({"embed": torch.nn.Embedding(512, 256), "decoder": torch.nn.Linear(256, 512)})
    module["decoder"].weight = module["embed"].weight
    model.runnable.module, model.runnable.names = module, {"embed.weight": "embed.weight"}
    tied = {plan.tensor.name: plan.spec.method for plan in bench.plans_at(model, base)}
    assert (methods["embed.weight"], tied["embed.weight"]) == ("clip", "r2q")
    assert methods | {"embed.weight": "r2q"} == tied


def test_names_that_look_sensitive_come_first_where_they_fit(bench, model) -> None:
    base = {"bit_width": 2, "group_size": 64}
    widths = {target: bench.by_name(model, base, target)["layer_bit_widths"] for target in (2.6, 4.5)}
    assert {name for name, bits in widths[4.5].items() if bits == 8} == {"embed.weight", "head.weight"}
    assert widths[4.5]["blocks.0.weight"] == 4
    assert widths[2.6]["embed.weight"] < 8, "there is no room for it"


def test_a_cell_that_was_not_measured_is_empty(bench) -> None:
    cell = bench.Cell(model="m", target=2.5, way="uniform", stored=2.53, error=0.19, cosine=0.9, figure=1.0, seconds=1)
    assert bench.rows_of([cell]) == [("m", "2.5", ".19 (2.53)", "", "", "")]
    assert bench.markdown([cell]).splitlines()[0] == "| model | target | uniform | in order | by name | allocation |"

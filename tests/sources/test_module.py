from __future__ import annotations

import pytest
import torch
from torch import nn

from arrow_quant_v2.errors import SourceError
from arrow_quant_v2.sources.module import ModuleSource


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scratch", torch.ones(2), persistent=False)


def test_parameters_and_persistent_buffers_appear_and_tied_weights_under_each_name() -> None:
    model = Small()
    source = ModuleSource(model)
    assert [info.name for info in source.tensors] == sorted(model.state_dict())
    assert "scratch" not in [info.name for info in source.tensors]
    assert torch.equal(source.read("head.weight"), source.read("embed.weight"))
    assert source.read("norm.num_batches_tracked").tolist() == [0]


def test_reading_carries_no_gradient_and_no_tie_to_the_module() -> None:
    model = Small()
    read = ModuleSource(model).read("embed.weight")
    assert not read.requires_grad
    read.zero_()
    assert bool(model.embed.weight.any())


def test_a_later_change_of_the_module_shows() -> None:
    model = Small()
    source = ModuleSource(model)
    nn.init.constant_(model.embed.weight, 7.0)
    assert source.read("embed.weight", 0, 2).tolist() == [7.0, 7.0]


def test_weights_that_are_not_contiguous_are_flattened_row_by_row() -> None:
    model = nn.Linear(4, 3)
    model.weight = nn.Parameter(torch.arange(12.0).reshape(4, 3).T)
    assert ModuleSource(model).read("weight", 2, 7).tolist() == [6.0, 9.0, 1.0, 4.0, 7.0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_weights_on_another_device_come_to_the_cpu() -> None:
    model = nn.Linear(4, 3).cuda()
    read = ModuleSource(model).read("weight", 2, 7)
    assert read.device.type == "cpu"
    assert torch.equal(read, model.weight.detach().reshape(-1)[2:7].cpu())


def test_a_module_without_values_is_refused() -> None:
    with pytest.raises(SourceError, match=r"module Linear: bias: has no values \(device meta\)"):
        ModuleSource(nn.Linear(2, 2, device="meta"))


def test_a_module_without_tensors_is_refused() -> None:
    with pytest.raises(SourceError, match=r"module ReLU: has no parameters or persistent buffers"):
        ModuleSource(nn.ReLU())


def test_an_unknown_dtype_is_refused() -> None:
    model = nn.Module()
    model.register_buffer("phase", torch.ones(1, dtype=torch.complex64))
    with pytest.raises(SourceError, match=r"module Module: phase: has dtype complex64; allowed are float64"):
        ModuleSource(model)

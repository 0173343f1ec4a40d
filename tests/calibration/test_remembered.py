"""Samples that a model made of itself are taken from the folder of an unfinished run, and are the very same."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1]))

from small_models import content_of
from small_pipelines import PIPELINES
from text_models import save_folder, small_module

from arrow_quant_v2 import ArrowQuantV2, DiffusionQuantConfig
from arrow_quant_v2.calibration import identity, remembered
from arrow_quant_v2.calibration.pipelines import open_pipeline
from arrow_quant_v2.calibration.remembered import Memory
from arrow_quant_v2.calibration.sample import Sample
from arrow_quant_v2.calibration.samples import Asked
from arrow_quant_v2.calibration.transformers_model import open_transformers
from arrow_quant_v2.errors import InterruptedRunError
from arrow_quant_v2.sources.folder import open_model

if TYPE_CHECKING:
    from collections.abc import Iterator

    from arrow_quant_v2.calibration.runnable import Runnable
    from arrow_quant_v2.calibration.sample import Samples

ASKED = Asked(count=6, steps=3)
SETTINGS: dict[str, Any] = {
    "bit_width": 2,
    "group_size": 16,
    "calibration_samples": 4,
    "calibration_tokens": 0,
    "enable_calibration": True,
    "threads": 2,
}


def bert(folder: Path) -> Path:
    module = small_module("BertForMaskedLM", vocab_size=64, hidden_size=32, intermediate_size=64)
    return save_folder(folder, module, mask_token_id=4)


@pytest.fixture
def runnable(tmp_path: Path) -> Iterator[Runnable]:
    with open_model(bert(tmp_path / "bert")) as model:
        yield open_transformers(model, "text")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Asked]:
    """Every question that samples were made for."""
    asked: list[Asked] = []
    make = remembered.gather

    def counting(runnable: Runnable, question: Asked) -> Samples:
        asked.append(question)
        return make(runnable, question)

    monkeypatch.setattr(remembered, "gather", counting)
    return asked


def same(one: Samples, other: Samples) -> bool:
    told = [(samples.origin, samples.identity, samples.notes, samples.synthetic) for samples in (one, other)]
    return told[0] == told[1] and identity.of_calls(one.calls) == identity.of_calls(other.calls)


def test_what_was_made_once_is_not_made_again(runnable: Runnable, made: list[Asked], tmp_path: Path) -> None:
    memory = Memory(folder=tmp_path / "samples", model=lambda: "this one")
    first = memory.gather(runnable, ASKED)
    assert same(memory.gather(runnable, ASKED), first)
    assert made == [ASKED]
    assert len(list((tmp_path / "samples").iterdir())) == 1


@pytest.mark.parametrize(
    ("asked", "model"), [({"seed": 1}, "this one"), ({"count": 5}, "this one"), ({}, "the same one with other values")]
)
def test_another_question_is_another_answer(
    asked: dict[str, Any], model: str, runnable: Runnable, made: list[Asked], tmp_path: Path
) -> None:
    Memory(folder=tmp_path / "samples", model=lambda: "this one").gather(runnable, ASKED)
    Memory(folder=tmp_path / "samples", model=lambda: model).gather(runnable, replace(ASKED, **asked))
    assert len(made) == 2


def test_a_damaged_file_is_as_if_it_were_not_there(runnable: Runnable, made: list[Asked], tmp_path: Path) -> None:
    memory = Memory(folder=tmp_path / "samples", model=lambda: "this one")
    first = memory.gather(runnable, ASKED)
    (path,) = (tmp_path / "samples").iterdir()
    whole = path.read_bytes()
    for damaged in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[: len(whole) // 2], b"", whole[:8] + b"{" * 50):
        path.write_bytes(damaged)
        assert same(memory.gather(runnable, ASKED), first)
    assert len(made) == 5


def test_what_a_function_gives_only_the_function_can_tell(
    runnable: Runnable, made: list[Asked], tmp_path: Path
) -> None:
    asked = replace(ASKED, callable=lambda _: iter([({"input_ids": torch.ones(1, 4, dtype=torch.int64)}, 0.5)]))
    memory = Memory(folder=tmp_path / "samples", model=lambda: "this one")
    for _ in range(2):
        memory.gather(runnable, asked)
    assert len(made) == 2
    assert not (tmp_path / "samples").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", ["ddpm classes", "sdxl", "sd3", "flux", "z image", "wan", "stable audio"])
def test_a_pipelines_calls_come_back_bit_for_bit(name: str, tmp_path: Path, made: list[Asked]) -> None:
    runnable = open_pipeline(PIPELINES[name].save(tmp_path / "pipeline"), None, "image")
    memory = Memory(folder=tmp_path / "samples", model=lambda: "this one")
    first, again = (memory.gather(runnable, ASKED) for _ in range(2))
    assert same(first, again)
    assert len(made) == 1
    for one, other in zip(first.calls, again.calls, strict=True):
        for key, value in one.keywords.items():
            if isinstance(value, torch.Tensor):
                found = other.keywords[key]
                assert isinstance(found, torch.Tensor)
                assert value.clone().stride() == found.stride()


def test_one_tensor_in_two_places_stays_one(tmp_path: Path) -> None:
    x, odd = torch.ones(2, 3), torch.arange(12.0).reshape(3, 4).mT
    call = Sample(arguments=(x, [x, None, 2.5]), keywords={"more": {"x": x, "odd": odd}}, timestep=float("inf"))
    tensors = remembered._Tensors()
    entry = remembered._entry(call.arguments, tensors), remembered._entry(call.keywords, tensors)
    assert len(tensors.flat) == 2
    back = remembered._Tensors(flat=tensors.flat)
    (first, (second, nothing, number)), more = (remembered._value(one, back) for one in entry)
    assert first is second is more["more"]["x"]
    assert (nothing, number) == (None, 2.5)
    assert torch.equal(more["more"]["odd"], odd)
    assert more["more"]["odd"].stride() == odd.stride()


def test_a_run_that_was_stopped_goes_on_with_its_samples(tmp_path: Path, made: list[Asked]) -> None:
    """Also with those that the outcome is judged by; and the bytes are those of a run that was not stopped."""
    api, config = ArrowQuantV2(), DiffusionQuantConfig(**SETTINGS, min_accuracy=0.01)
    model = bert(tmp_path / "model")
    answers = iter([False, True])
    with pytest.raises(InterruptedRunError):
        api.quantize_diffusion_model(model, tmp_path / "out", config, should_stop=lambda: next(answers))
    assert len(made) == 2
    api.quantize_diffusion_model(model, tmp_path / "out", config)
    assert len(made) == 2
    assert not (tmp_path / "out.partial").exists()
    api.quantize_diffusion_model(model, tmp_path / "whole", config)
    assert content_of(tmp_path / "out") == content_of(tmp_path / "whole")

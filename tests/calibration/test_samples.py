"""What is gathered when little, much or nothing is given, and when two gatherings count as the same."""

from __future__ import annotations

import dataclasses
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from diffusers import UNet1DModel, UNet2DModel
from text_models import ids_of, image_model, opened, same_calls, small_module

from arrow_quant_v2.calibration import identity
from arrow_quant_v2.calibration.runnable import Runnable
from arrow_quant_v2.calibration.sample import Sample, Samples
from arrow_quant_v2.calibration.samples import Asked, gather
from arrow_quant_v2.calibration.synthetic import random_latents, random_tokens
from arrow_quant_v2.calibration.tokens import vocabulary_of
from arrow_quant_v2.errors import ConfigurationError, QuantizationError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TEXTS = [{"text": "the sea was calm"}, {"text": "a white whale rose slowly"}]


def function(_: torch.nn.Module) -> Any:
    yield {"input_ids": torch.tensor([[2, 9, 3]])}, 0.5


# Where from


def test_a_function_counts_more_than_a_file(masked: Runnable, jsonl: Callable[..., Path]) -> None:
    samples = gather(masked, Asked(count=4, data=jsonl(*TEXTS), callable=function))
    assert (samples.origin, len(samples.calls)) == ("a function of the user's own", 1)


def test_a_file_counts_more_than_the_own_trajectory(masked: Runnable, jsonl: Callable[..., Path]) -> None:
    samples = gather(masked, Asked(count=40, data=jsonl(*TEXTS * 6, "bad")))
    assert (samples.origin, len(samples.calls), samples.synthetic) == ("rows.jsonl", 40, False)
    assert len(samples.notes) == 1


def test_a_masked_model_needs_nothing(masked: Runnable) -> None:
    samples = gather(masked, Asked(count=6, length=20))
    assert (samples.origin, sum(len(call.keywords["input_ids"]) for call in samples.calls)) == (
        "the model's own trajectory",
        6,
    )
    assert (samples.synthetic, samples.notes) == (False, ())


def test_another_text_model_is_given_random_tokens(encoder: Runnable) -> None:
    samples = gather(encoder, Asked(count=6, length=20))
    assert (samples.origin, len(samples.calls), samples.synthetic) == ("random inputs", 6, True)


def test_a_model_of_images_without_a_scheduler_is_given_noise() -> None:
    samples = gather(image_model(), Asked(count=6))
    assert (samples.origin, len(samples.calls), samples.synthetic) == ("random inputs", 6, True)


@pytest.fixture
def continuous(monkeypatch: pytest.MonkeyPatch) -> list[Asked]:
    """In place of the trajectories of images and sound: what they were asked for."""
    seen: list[Asked] = []

    def trajectory(_: Runnable, asked: Asked) -> Samples:
        seen.append(asked)
        return Samples(calls=(), origin="steps", identity="x", notes=("a note",))

    module = ModuleType("continuous")
    module.trajectory = trajectory  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "arrow_quant_v2.calibration.continuous", module)
    return seen


def test_a_model_of_images_with_a_scheduler_has_a_trajectory(continuous: list[Asked]) -> None:
    asked = Asked(count=6)
    assert gather(dataclasses.replace(image_model(), scheduler=object()), asked).origin == "steps"
    assert continuous == [asked]


def test_prompts_of_a_file_are_told_to_the_trajectory(continuous: list[Asked], jsonl: Callable[..., Path]) -> None:
    path = jsonl(*[{"prompt": "a whale"}] * 19, {"prompt": 5})
    samples = gather(image_model(), Asked(count=30, data=path, seed=3))
    assert continuous == [Asked(count=30, seed=3, prompts=("a whale",) * 19)]
    assert samples.origin == "steps, prompts of rows.jsonl"
    assert samples.notes == ("1 of 20 rows were left out: rows.jsonl line 20: prompt is 5; a text is needed", "a note")


@pytest.mark.parametrize("wrong", [{"count": 0}, {"count": 1, "steps": 0}, {"count": 1, "length": -1}])
def test_nothing_can_be_asked_for_less_than_once(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigurationError, match=r"of calibration is (0|-1); a positive whole number is needed"):
        Asked(**wrong)


# The same again


@pytest.mark.usefixtures("torch_threads")
def test_the_same_question_gives_the_same_samples_on_any_number_of_threads(
    masked: Runnable, encoder: Runnable, jsonl: Callable[..., Path]
) -> None:
    path = jsonl(*TEXTS)
    for runnable, asked in (
        (masked, Asked(count=9, length=20)),
        (masked, Asked(count=9, data=path)),
        (encoder, Asked(count=9)),
    ):
        torch.set_num_threads(1)
        first = gather(runnable, asked)
        torch.set_num_threads(3)
        again = gather(runnable, asked)
        other = gather(runnable, dataclasses.replace(asked, seed=1))
        assert torch.get_num_threads() == 3
        assert same_calls(first.calls, again.calls)
        assert not same_calls(first.calls, other.calls)
        assert first.identity == again.identity != other.identity


def test_what_decides_the_samples_decides_their_identity(masked: Runnable, jsonl: Callable[..., Path]) -> None:
    path = jsonl(*TEXTS)
    one = jsonl(TEXTS[0], name="one.jsonl")
    asked = Asked(count=4, length=20)
    others = [
        asked,
        dataclasses.replace(asked, count=5),
        dataclasses.replace(asked, steps=3),
        dataclasses.replace(asked, length=21),
        dataclasses.replace(asked, data=path),
        dataclasses.replace(asked, data=one),
        dataclasses.replace(asked, callable=function),
    ]
    identities = {gather(masked, each).identity for each in others}
    assert len(identities) == len(others)
    assert all(len(each) == 64 for each in identities)


BASE = Sample(keywords={"x": torch.zeros(2)}, timestep=0.5)


@pytest.mark.parametrize(
    "other",
    [
        Sample(keywords={"y": torch.zeros(2)}, timestep=0.5),
        Sample(keywords={"x": torch.zeros(2)}, timestep=0.25),
        Sample(keywords={"x": torch.zeros(1, 2)}, timestep=0.5),
        Sample(keywords={"x": torch.zeros(2, dtype=torch.int32)}, timestep=0.5),
        Sample(keywords={"x": torch.ones(2)}, timestep=0.5),
        Sample(keywords={"x": [torch.zeros(2)]}, timestep=0.5),
        Sample(keywords={"x": torch.zeros(2), "flag": None}, timestep=0.5),
        Sample(arguments=(torch.zeros(2),), timestep=0.5),
        Sample(timestep=0.5),
    ],
)
def test_whatever_differs_in_a_call_changes_its_identity(other: Sample) -> None:
    assert identity.of_calls([BASE]) != identity.of_calls([other])


def test_equal_calls_have_one_identity() -> None:
    nested = {"x": {"b": torch.zeros(4).bfloat16(), "a": (1, [torch.zeros(2, 3).T])}}
    turned = {"x": {"a": (1, [torch.zeros(3, 2)]), "b": torch.zeros(4).bfloat16()}}
    first, second = (identity.of_calls([Sample(keywords=k, timestep=1.0)]) for k in (nested, turned))
    assert first == second


def test_arrays_that_differ_where_nobody_prints_them_differ() -> None:
    arrays = np.zeros(2000), np.zeros(2000)
    arrays[1][1000] = 1.0
    first, second, again = (
        identity.of_calls([Sample(keywords={"x": array}, timestep=1.0)]) for array in (*arrays, np.zeros(2000))
    )
    assert first == again != second


# Made up


def test_random_tokens_are_ordinary_ones_between_special_ones(encoder: Runnable) -> None:
    special = vocabulary_of(encoder).special
    calls = random_tokens(encoder, 20, seed=0)
    for call in calls:
        ids = ids_of(call).tolist()
        assert (ids[0], ids[-1], call.timestep) == (2, 3, 0.0)
        assert not set(ids[1:-1]) & special
    assert {len(ids_of(call)) for call in calls} <= {*range(32, 65)}
    assert len({len(ids_of(call)) for call in calls}) == 8


def test_tokens_cannot_be_made_up_where_all_are_special() -> None:
    runnable = Runnable(module=small_module("BertForMaskedLM", vocab_size=1), modality="text", names={}, mask_token=0)
    with pytest.raises(QuantizationError, match="holds no token but special ones"):
        random_tokens(runnable, 4, seed=0)


def test_random_latents_are_noise_at_every_time() -> None:
    calls = random_latents(image_model(cross_attention_dim=8), 10, seed=0)
    assert [int(call.timestep // 100) for call in calls] == [*range(10)]
    for call in calls:
        assert {key: value.shape for key, value in call.keywords.items()} == {  # type: ignore[attr-defined]
            "sample": (1, 3, 4, 4),
            "timestep": (1,),
            "encoder_hidden_states": (1, 77, 8),
        }
    noise = torch.cat([call.keywords["sample"] for call in calls])  # type: ignore[misc]
    assert abs(float(noise.mean())) < 0.2
    assert 0.8 < float(noise.std()) < 1.2


def test_a_model_of_diffusers_takes_what_is_made_up() -> None:
    with torch.random.fork_rng(devices=()):
        image = UNet2DModel(
            sample_size=8, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1, num_class_embeds=5,
            down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
        )  # fmt: skip
        sound = UNet1DModel(
            sample_size=32, in_channels=2, out_channels=2, block_out_channels=(32, 32, 64), extra_in_channels=64
        )
    for module, shape in ((image, (1, 3, 8, 8)), (sound, (1, 2, 32))):
        (call,) = random_latents(Runnable(module=module, modality="image", names={}), 1, seed=0)
        assert call.keywords["sample"].shape == shape  # type: ignore[attr-defined]
        assert module(**call.keywords).sample.shape == shape


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"in_channels": None}, r"does not tell the shape of what it takes \(in_channels, sample_size\)"),
        ({"sample_size": None}, "does not tell the shape"),
    ],
)
def test_a_shape_that_nothing_tells_cannot_be_made_up(config: dict[str, Any], reason: str) -> None:
    with pytest.raises(QuantizationError, match=reason):
        gather(image_model(**config), Asked(count=2))


def test_an_argument_that_nothing_tells_cannot_be_made_up() -> None:
    class Conditioned(torch.nn.Module):
        config = type("Config", (), {"in_channels": 3, "sample_size": (4, 6)})()

        def forward(self, sample: torch.Tensor, timestep: torch.Tensor, pooled: torch.Tensor) -> None: ...

    with pytest.raises(QuantizationError, match="Conditioned: its argument pooled cannot be made up"):
        random_latents(Runnable(module=Conditioned(), modality="image", names={}), 1, seed=0)


# The real ones


def test_minilm_reads_texts_as_they_are(minilm: Path, jsonl: Callable[..., Path]) -> None:
    runnable = opened(minilm)
    samples = gather(runnable, Asked(count=8, data=jsonl({"text": "Call me Ishmael."}, {"text": "Some years ago"})))
    assert [runnable.tokenizer.decode(ids_of(call)) for call in samples.calls] == [
        "[CLS] call me ishmael. [SEP]",
        "[CLS] some years ago [SEP]",
    ]


def test_antiberty_is_shown_states_of_its_own(antiberty: Path) -> None:
    samples = gather(opened(antiberty, mask_token=4), Asked(count=6, length=64, steps=4))
    rows = [row for call in samples.calls for row in call.keywords["input_ids"]]  # type: ignore[attr-defined]
    times = sorted(float((row == 4).sum() / len(row)) for row in rows)
    assert [int(6 * time - 1e-9) for time in times] == pytest.approx([*range(6)], abs=1)

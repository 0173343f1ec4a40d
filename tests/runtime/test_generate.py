"""Generating: text uncovered behind a prompt, pictures and sounds in files, the same for the same seed."""

from __future__ import annotations

import json
import re
import shutil
import wave
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from hypothesis import given, strategies
from PIL import Image
from small_library_models import BY_NAME
from small_pipelines import PIPELINES

from arrow_quant_v2 import ArrowQuantV2, ConfigurationError, DiffusionQuantConfig, QuantizationError
from arrow_quant_v2.cli_progress import printable, told_steps
from arrow_quant_v2.errors import SourceError
from arrow_quant_v2.runtime import generate as door
from arrow_quant_v2.runtime import generate_text
from arrow_quant_v2.runtime.generate_arguments import PipelineWish, arguments
from arrow_quant_v2.runtime.generate_pipeline import generate_file
from arrow_quant_v2.runtime.generate_text import HIDDEN

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from small_models import Run

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(55)))
CONFIG = partial(DiffusionQuantConfig, group_size=16, method="rtn", min_accuracy=0.0, threads=1)


def quantized(source: Path, out: Path, **settings: Any) -> Path:
    ArrowQuantV2().quantize_diffusion_model(source, out, CONFIG(**settings))
    return out


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized masked language model of 60 words, with its vocabulary."""
    root = tmp_path_factory.mktemp("text")
    source = BY_NAME["BertForMaskedLM"].save(root / "source")
    (source / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return quantized(source, root / "out", modality="text")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    return quantized(PIPELINES["ddpm"].save(root / "source"), root / "out")


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sounds")
    dance = replace(PIPELINES["dance"], config=PIPELINES["dance"].config | {"sample_rate": 16000})
    return quantized(dance.save(root / "source"), root / "out")


@dataclass
class Steps:
    """What is told of each step."""

    told: list[tuple[int, int, str]]

    def __call__(self, step: int, steps: int, text: str) -> None:
        self.told.append((step, steps, text))


# Text


def test_a_text_is_uncovered_step_by_step_behind_its_prompt(text: Path) -> None:
    steps = Steps([])
    made = ArrowQuantV2().generate(text, "w1 w2 w3", steps=4, length=8, step_callback=steps)
    assert re.fullmatch(r"w1 w2 w3( w\d+){8}", made["text"])
    assert [step for step, _, _ in steps.told] == [1, 2, 3, 4]
    assert [shown.count(HIDDEN) for _, _, shown in steps.told] == [6, 4, 2, 0]
    assert (made["kind"], made["tokens"], made["steps"], made["path"]) == ("text", 8, 4, None)
    assert made["tokens_per_second"] == pytest.approx(8 / made["seconds"])


def test_the_seed_decides(text: Path) -> None:
    one, same, other = (ArrowQuantV2().generate(text, seed=seed, length=12)["text"] for seed in (3, 3, 4))
    assert one == same != other


def test_a_token_for_each_step_by_default(text: Path) -> None:
    assert ArrowQuantV2().generate(text, length=5)["steps"] == 5
    assert ArrowQuantV2().generate(text, length=5, steps=99)["steps"] == 5
    assert ArrowQuantV2().generate(text)["tokens"] == 62  # all that 64 positions leave


def test_at_temperature_nothing_every_seed_writes_the_likeliest(text: Path) -> None:
    make = partial(ArrowQuantV2().generate, text, "w1", length=12, steps=6)
    cold = [make(seed=seed, temperature=0)["text"] for seed in (1, 2)]
    warm = [make(seed=seed, temperature=1.0)["text"] for seed in (1, 2)]
    assert cold[0] == cold[1]
    assert warm[0] != warm[1]
    assert warm[0] == make(seed=1)["text"], "1 is what nobody asks for"
    assert make(seed=1, temperature=1e-6)["text"] == cold[0] != warm[0]


def test_blocks_are_finished_from_left_to_right_and_share_the_steps(text: Path) -> None:
    steps = Steps([])
    made = ArrowQuantV2().generate(text, "w1", steps=5, length=10, block_length=4, step_callback=steps)
    assert [shown.count(HIDDEN) for _, _, shown in steps.told] == [8, 6, 4, 2, 0]
    assert [re.sub(r"\s+", "", shown).count(HIDDEN * 2) > 0 for _, _, shown in steps.told] == [True] * 4 + [False]
    for _, _, shown in steps.told:
        known, _, hidden = shown.partition(HIDDEN)
        assert len(known.split()) >= 1 + (10 - shown.count(HIDDEN)) // 4 * 4 or not hidden
    assert (made["steps"], made["tokens"]) == (5, 10)


def test_a_block_as_long_as_the_text_is_none(text: Path) -> None:
    make = partial(ArrowQuantV2().generate, text, length=9, steps=4)
    assert make(block_length=9)["text"] == make(block_length=99)["text"] == make()["text"]
    assert make(block_length=3)["text"] != make()["text"]


@given(length=strategies.integers(1, 40), block=strategies.integers(1, 40), wanted=strategies.integers(1, 40))
def test_every_token_is_uncovered_in_as_many_steps_as_asked_for(length: int, block: int, wanted: int) -> None:
    steps = max(min(wanted, length), -(-length // block))
    plan = [*generate_text._plan(length, steps, min(block, length))]
    assert len(plan) == steps
    for first, group in groupby(plan, key=lambda step: step.first):
        own = [step.hidden for step in group]
        assert own[-1] == 0
        assert own == sorted(set(own), reverse=True), "each step uncovers something"
        assert max(own, default=0) < min(block, length - first)


@pytest.fixture(scope="module")
def talker(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The masked language model with an end of texts, w9, which it writes soon, and a chat template."""
    folder = tmp_path_factory.mktemp("talker") / "out"
    shutil.copytree(text, folder)
    tokenizer = transformers.BertTokenizer(str(text / "vocab.txt"), eos_token="w9")
    tokenizer.chat_template = (
        "{% for m in messages %}w1 {{ m.content }} w2 {% endfor %}{% if add_generation_prompt %}w3{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    return folder


def test_a_text_is_over_where_the_model_ends_it(talker: Path) -> None:
    every = [ArrowQuantV2().generate(talker, "w4", seed=seed, length=40) for seed in range(8)]
    ended = [made for made in every if made["tokens"] < 40]
    assert ended, "a token of 56 among 40"
    for made in ended:
        assert "w9" not in made["text"]
        assert len(made["text"].split()) == made["tokens"], "the prompt, and all but the end"
        assert made["steps"] <= 40
    blocks = [ArrowQuantV2().generate(talker, "w4", seed=seed, length=40, block_length=4) for seed in range(8)]
    assert any(made["steps"] < 40 for made in blocks), "nothing behind the end is uncovered"
    assert all(made["tokens"] <= made["steps"] for made in blocks)


def test_in_a_chat_the_answer_alone_is_told(talker: Path) -> None:
    steps = Steps([])
    made = ArrowQuantV2().generate(talker, "w4 w5", chat=True, length=6, block_length=2, step_callback=steps, seed=1)
    assert re.fullmatch(r"(w\d+ ?)*", made["text"])
    assert len(made["text"].split()) in {made["tokens"], made["tokens"] - 1}
    assert all(not shown.startswith("w1 w4 w5") for _, _, shown in steps.told)
    with pytest.raises(ConfigurationError, match="a chat begins with a message; give one with --prompt"):
        ArrowQuantV2().generate(talker, chat=True)
    with pytest.raises(ConfigurationError, match=r"length is 58; .* the prompt is 7: allowed is 1 to 57"):
        ArrowQuantV2().generate(talker, "w4 w5 w6 w6", chat=True, length=58)


def test_a_chat_template_that_fails_is_told(talker: Path, tmp_path: Path) -> None:
    shutil.copytree(talker, tmp_path / "out")
    (tmp_path / "out" / "chat_template.jinja").write_text("{{ raise_exception('only in pairs') }}")
    with pytest.raises(ConfigurationError, match=r"the chat template of its tokenizer fails .*only in pairs"):
        ArrowQuantV2().generate(tmp_path / "out", "w1", chat=True)


def test_a_text_can_be_written_to_a_file(text: Path, tmp_path: Path) -> None:
    made = ArrowQuantV2().generate(text, length=3, output_path=tmp_path / "a.txt")
    assert (tmp_path / "a.txt").read_text() == made["text"] + "\n"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"length": 63}, r"length is 63; the model takes 64 tokens, of which the prompt is 0: allowed is 1 to 62"),
        ({"length": 0}, "length is 0"),
        ({"steps": 0}, "steps is 0; allowed: 1 and more"),
        ({"prompt": "w1 " * 62}, "of which the prompt is 62"),
        ({"prompt": "w1 [MASK] w2 [MASK]"}, "the prompt has 2 hidden tokens; only what comes behind a prompt"),
        ({"device": "gpu"}, r"device is 'gpu'; torch .* can run a model here on cpu"),
        ({"seed": 2**63}, "seed is 9223372036854775808; allowed: whole numbers of 64 bits"),
        ({"prompt": "w1 what"}, "the prompt has 1 parts, of 2, that are not in the model's vocabulary"),
        ({"temperature": -0.1}, r"temperature is -0\.1; allowed: 0 \(the likeliest tokens\) and more"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"block_length": 0, "length": 9}, "block_length is 0; allowed: 1 to 9"),
        ({"block_length": 4, "length": 9, "steps": 2}, r"9 tokens are 3 blocks of 4.* give --steps 3 or more"),
        ({"chat": True, "prompt": "w1"}, r"its tokenizer has no chat template .* leave --chat out"),
        ({"guidance": 2.0, "height": 8}, "writes text; leave --guidance, --height out"),
        ({"output_path": "a.png"}, r"a\.png: the result is written as \*\.txt"),
        ({"output_path": "no/where.txt"}, "its folder does not exist"),
    ],
)
def test_what_does_not_fit_a_text_is_refused(text: Path, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        ArrowQuantV2().generate(text, **asked)


def test_without_a_tokenizer_there_is_no_text(text: Path, tmp_path: Path) -> None:
    shutil.copytree(text, tmp_path / "bare", ignore=shutil.ignore_patterns("vocab.txt"))
    config = json.loads((tmp_path / "bare" / "config.json").read_text()) | {"mask_token_id": 4}
    (tmp_path / "bare" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigurationError, match="no tokenizer lies beside its weights; put its files"):
        ArrowQuantV2().generate(tmp_path / "bare")


def test_a_model_that_hides_nothing_uncovers_nothing(tmp_path: Path) -> None:
    source = BY_NAME["Qwen2ForCausalLM"].save(tmp_path / "source")
    with pytest.raises(ConfigurationError, match="Qwen2ForCausalLM: has no mask token"):
        ArrowQuantV2().generate(quantized(source, tmp_path / "out", modality="text"))


def test_a_model_type_that_transformers_does_not_know(text: Path, tmp_path: Path) -> None:
    shutil.copytree(text, tmp_path / "odd")
    (tmp_path / "odd" / "config.json").write_text(json.dumps({"model_type": "oddity"}))
    with pytest.raises(SourceError, match="does not know this model"):
        ArrowQuantV2().generate(tmp_path / "odd")


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized DiffusionGemma, whose canvas is 8 tokens, with a vocabulary of 60 words."""
    root = tmp_path_factory.mktemp("blocks")
    source = BY_NAME["DiffusionGemmaForBlockDiffusion"].save(root / "source")
    (root / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    transformers.BertTokenizer(str(root / "vocab.txt")).save_pretrained(source)
    return quantized(source, root / "out", modality="text")


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
def test_a_model_of_block_diffusion_writes_in_its_own_way(blocks: Path) -> None:
    steps = Steps([])
    make = partial(ArrowQuantV2().generate, blocks, "w1 w2", length=16, steps=3)
    one, same, other = make(seed=1, step_callback=steps), make(seed=1), make(seed=2)
    assert one["text"] == same["text"] != other["text"]
    assert one["text"].startswith("w1 w2")
    assert 1 <= one["tokens"] <= 16
    assert one["steps"] == len(steps.told) <= 6
    with pytest.raises(ConfigurationError, match="length is 0"):
        make(length=0)


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
def test_block_diffusion_is_as_warm_as_asked_for(blocks: Path) -> None:
    make = partial(ArrowQuantV2().generate, blocks, "w1 w2", length=8, steps=4, seed=1)
    assert make(temperature=0.8)["text"] == make()["text"], "what transformers takes where the model says nothing"
    assert make(temperature=0.01)["text"] != make()["text"]
    with pytest.raises(ConfigurationError, match="temperature is 0; allowed: more"):
        make(temperature=0)
    with pytest.raises(ConfigurationError, match="its blocks have 8 tokens; leave --block-length out"):
        make(block_length=4)
    with pytest.raises(ConfigurationError, match="no chat template"):
        make(chat=True)


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
def test_a_chat_with_block_diffusion(blocks: Path, tmp_path: Path) -> None:
    shutil.copytree(blocks, tmp_path / "out")
    (tmp_path / "out" / "chat_template.jinja").write_text("w1 {{ messages[0].content }} w2")
    steps = Steps([])
    made = ArrowQuantV2().generate(tmp_path / "out", "w7", chat=True, length=8, steps=2, step_callback=steps)
    assert len(made["text"].split()) <= made["tokens"] <= 8
    assert not any(shown.startswith("w1 w7 w2") for _, _, shown in steps.told)


@pytest.mark.parametrize(
    "asked", [{"length": "3"}, {"block_length": 2.5}, {"steps": True}, {"seed": "1"}, {"frames": 2.0}]
)
def test_a_whole_number_is_asked_for(text: Path, asked: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=rf"{next(iter(asked))} is .*; needed: a whole number"):
        ArrowQuantV2().generate(text, **asked)


@pytest.mark.parametrize("asked", [{"temperature": "hot"}, {"guidance": "3"}, {"fps": []}])
def test_a_number_is_asked_for(text: Path, asked: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=rf"{next(iter(asked))} is .*; needed: a number"):
        ArrowQuantV2().generate(text, **asked)


# Pictures and sounds


def test_a_picture_is_written(pictures: Path, tmp_path: Path) -> None:
    steps = Steps([])
    made = ArrowQuantV2().generate(pictures, steps=3, output_path=tmp_path / "a.png", step_callback=steps)
    with Image.open(tmp_path / "a.png") as picture:
        assert (picture.format, picture.size) == ("PNG", (16, 16))
    assert steps.told == [(1, 3, ""), (2, 3, ""), (3, 3, "")]
    assert (made["kind"], made["steps"], made["tokens"], made["text"]) == ("image", 3, None, None)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_the_seed_decides_on_a_picture(pictures: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        ArrowQuantV2().generate(pictures, seed=seed, steps=2, output_path=tmp_path / f"{name}.png")
    one, same, other = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert one == same != other


def test_a_sound_is_written(sounds: Path, tmp_path: Path) -> None:
    made = ArrowQuantV2().generate(sounds, steps=2, output_path=tmp_path / "a.wav")
    with wave.open(str(tmp_path / "a.wav")) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (2, 2, 16000)
        assert file.getnframes() == 64
    assert made["kind"] == "audio"


def test_a_class_that_the_pipeline_does_not_name_is_none() -> None:
    class Named:
        labels = {"zero": 0, "four": 4}  # noqa: RUF012

        def __call__(self, class_labels: list[int]) -> None:
            """Nothing."""

    given = [arguments(Named(), prompt, None, 0, PipelineWish()) for prompt in ("zero", "4")]
    assert given == [{"class_labels": [0]}, {"class_labels": [4]}]
    with pytest.raises(ConfigurationError, match="the prompt is '5'; give the number of a class or a name such as fo"):
        arguments(Named(), "5", None, 0, PipelineWish())


def test_a_class_is_chosen_by_its_number(tmp_path: Path) -> None:
    source = PIPELINES["consistency"].save(tmp_path / "source")
    folder = quantized(source, tmp_path / "out")
    assert ArrowQuantV2().generate(folder, "3", steps=1, output_path=tmp_path / "a.png")["steps"] == 1
    with pytest.raises(ConfigurationError, match="makes pictures of classes, and the prompt is 'a cat'"):
        ArrowQuantV2().generate(folder, "a cat", output_path=tmp_path / "b.png")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"prompt": "a red bicycle"}, "DDPMPipeline: takes no prompt"),
        ({"length": 3, "chat": True}, "is a pipeline, which writes no text; leave --length, --chat out"),
        ({"guidance": 3.0}, "DDPMPipeline: takes no guidance; leave --guidance out"),
        ({"height": 32}, "DDPMPipeline: takes no height; leave --height out"),
        ({"negative_prompt": "fog"}, "DDPMPipeline: takes no negative prompt; leave --negative-prompt out"),
        ({"frames": 4}, "DDPMPipeline: takes no frames"),
        ({"fps": 4}, "DDPMPipeline: makes no video; leave --fps out"),
        ({"fps": 51}, "fps is 51; allowed: more than 0, and 50 at most"),
        ({"width": 0}, "width is 0; allowed: 1 and more"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"output_path": "a.wav"}, r"a\.wav: the result is written as \*\.png"),
        ({"steps": 0}, "steps is 0"),
    ],
)
def test_what_does_not_fit_a_pipeline_is_refused(
    pictures: Path, asked: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        ArrowQuantV2().generate(pictures, **{"output_path": tmp_path / "a.png"} | asked)
    assert not [*tmp_path.iterdir()]


def test_a_file_is_replaced_only_when_asked(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"mine")
    make = partial(ArrowQuantV2().generate, pictures, steps=1, output_path=tmp_path / "a.png")
    with pytest.raises(ConfigurationError, match=r"a\.png: exists"):
        make()
    assert (tmp_path / "a.png").read_bytes() == b"mine"
    make(overwrite=True)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


class Prompted:
    """A pipeline that takes a prompt, and does as it is told."""

    def __init__(self, output: Any) -> None:
        self.output = output

    def __call__(self, prompt: str, generator: torch.Generator) -> Any:
        if isinstance(self.output, Exception):
            raise self.output
        return self.output


@dataclass
class Output:
    """As pipelines give it; iterable, as theirs are."""

    images: Any = None
    audios: Any = None
    frames: Any = None
    meshes: Any = None

    def __iter__(self) -> Any:
        return iter(name for name, value in vars(self).items() if value is not None)


def test_a_pipeline_that_wants_a_prompt_is_given_one(tmp_path: Path) -> None:
    run = partial(generate_file, out=tmp_path / "a.wav", seed=0, steps=None, told=Steps([]))
    with pytest.raises(ConfigurationError, match="makes what a text says; give one with --prompt"):
        run(Prompted(Output()), None)
    with pytest.raises(QuantizationError, match=r"Prompted: fails: ValueError: too loud"):
        run(Prompted(ValueError("too loud\nand more")), "rain")
    with pytest.raises(QuantizationError, match="gives meshes; only pictures, videos and sounds are written"):
        run(Prompted(Output(meshes=[1])), "rain")
    with pytest.raises(QuantizationError, match="none of its parts tells the samples per second"):
        run(Prompted(Output(audios=torch.zeros(1, 9))), "rain")
    assert not [*tmp_path.iterdir()]


def test_an_interrupted_pipeline_leaves_nothing(pictures: Path, tmp_path: Path) -> None:
    def stop(step: int, _steps: int, _text: str) -> None:
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ArrowQuantV2().generate(pictures, steps=3, output_path=tmp_path / "a.png", step_callback=stop)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("entry", [["os", "system"], ["custom", "Unet"]])
def test_a_pipeline_with_a_strange_part_is_refused(pictures: Path, tmp_path: Path, entry: list[str]) -> None:
    shutil.copytree(pictures, tmp_path / "strange")
    index = json.loads((tmp_path / "strange" / "model_index.json").read_text()) | {"evil": entry}
    (tmp_path / "strange" / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(SourceError, match="only classes of diffusers and transformers are run"):
        ArrowQuantV2().generate(tmp_path / "strange", output_path=tmp_path / "a.png")


# Folders that make nothing


def test_one_part_of_a_pipeline_makes_nothing(pictures: Path) -> None:
    with pytest.raises(SourceError, match="is one part of a pipeline, a UNet2DModel; give the pipeline's folder"):
        ArrowQuantV2().generate(pictures / "unet")


def test_a_folder_that_is_not_there_makes_nothing(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"nowhere: does not exist; give a model folder"):
        ArrowQuantV2().generate(tmp_path / "nowhere")


def test_an_empty_folder_makes_nothing(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"has neither model_index\.json nor config\.json"):
        ArrowQuantV2().generate(tmp_path)


def test_the_peak_of_memory_is_told() -> None:
    peak = door.peak_memory()
    assert peak is None or 10**7 < peak < 10**12


# The command


def test_the_command_prints_the_text_alone(text: Path, arrow_quant: Callable[..., Run]) -> None:
    done = arrow_quant("generate", text, "--prompt", "w7", "--length", 4, "--seed", 1)
    assert done.code == 0, done.err
    assert re.fullmatch(r"w7( w\d+){4}\n", done.out)
    assert "1/4 w7" in done.err
    assert re.search(r"4 steps in .* 4 tokens, .* tokens/s, .* s/step, peak memory \d+ MB", done.err)


def test_the_command_gives_json(text: Path, arrow_quant: Callable[..., Run]) -> None:
    done = arrow_quant("generate", text, "--length", 3, "--json", "--quiet")
    assert json.loads(done.out)["tokens"] == 3
    assert done.err == ""


def test_the_command_names_the_file(pictures: Path, arrow_quant: Callable[..., Run], tmp_path: Path) -> None:
    done = arrow_quant("generate", pictures, "--steps", 1, "--out", tmp_path / "a.png")
    assert done.out.strip() == str(tmp_path / "a.png")
    assert "s/step" in done.err


def test_the_command_refuses_with_its_code(pictures: Path, arrow_quant: Callable[..., Run]) -> None:
    done = arrow_quant("generate", pictures, "--prompt", "a fox")
    assert (done.code, done.out) == (2, "")
    assert "takes no prompt; leave --prompt out" in done.err


def test_interrupted_in_the_command(
    text: Path, arrow_quant: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ArrowQuantV2, "generate", interrupted)
    done = arrow_quant("generate", text)
    assert done.code == 130
    assert "nothing was written" in done.err


def test_a_terminal_is_shown_no_control_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert printable("a\x1b[2Jb\nc\td\x07") == "a\ufffd[2Jb\nc\td\ufffd"
    with told_steps(quiet=False) as told:
        told(1, 2, "one\x1b")
    assert capsys.readouterr().err == "1/2 one\ufffd\n"


def test_antiberty_writes_an_antibody(antiberty: Path, tmp_path: Path) -> None:
    shutil.copytree(antiberty, tmp_path / "source")
    shutil.copy(antiberty.parent / "vocab.txt", tmp_path / "source")
    folder = quantized(tmp_path / "source", tmp_path / "out", bit_width=4, modality="text")
    with pytest.warns(UserWarning, match="have no place in the model"):
        made = ArrowQuantV2().generate(folder, "E V Q L V E S G G G L V Q P G G S L R L S C", length=88, steps=8)
    sequence = made["text"].replace(" ", "")
    assert len(sequence) == 110
    assert set(sequence) <= set("ACDEFGHIKLMNPQRSTVWY")
    assert "W" in sequence[30:40]  # behind the first loop of every antibody
    assert "YYC" in sequence[80:105]  # before the third

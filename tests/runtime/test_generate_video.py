"""Videos, and what else a pipeline is told: in a file that is there as a whole, or refused before any work."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_pipelines import save_wan

from arrow_quant_v2 import ArrowQuantV2, ConfigurationError, DiffusionQuantConfig, QuantizationError
from arrow_quant_v2.runtime.generate_arguments import PipelineWish, arguments, pictures_per_second
from arrow_quant_v2.runtime.generate_pipeline import generate_file
from arrow_quant_v2.runtime.video import ENDINGS, as_pictures, durations, write_video

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from small_models import Run

SMALL = {"height": 32, "width": 48, "frames": 5, "steps": 2}


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized Wan with a text encoder and a decoder of a few thousand weights."""
    root = tmp_path_factory.mktemp("film")
    config = DiffusionQuantConfig(group_size=8, method="rtn", min_accuracy=0.0, threads=1, enable_calibration=False)
    ArrowQuantV2().quantize_diffusion_model(save_wan(root / "source"), root / "out", config)
    return root / "out"


@pytest.mark.parametrize(("ending", "kind"), ENDINGS.items())
def test_a_video_is_written_as_an_animated_picture(film: Path, tmp_path: Path, ending: str, kind: str) -> None:
    out = tmp_path / f"a{ending}"
    told: list[int] = []
    made = ArrowQuantV2().generate(
        film, "a fox runs", output_path=out, fps=8, step_callback=lambda step, *_: told.append(step), **SMALL
    )
    with Image.open(out) as picture:
        assert (picture.format, picture.size, picture.n_frames) == (kind, (48, 32), 5)
        picture.seek(1)
        picture.load()
        assert picture.info["duration"] in {120, 125, 130}
    assert (made["kind"], made["steps"], made["path"]) == ("video", 2, str(out))
    assert told == [1, 2]
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_the_seed_the_words_and_the_guidance_decide(film: Path, tmp_path: Path) -> None:
    def made(name: str, prompt: str = "a fox", **asked: Any) -> bytes:
        out = tmp_path / f"{name}.png"
        ArrowQuantV2().generate(film, prompt, output_path=out, **SMALL | asked)
        return out.read_bytes()

    first = made("first")
    assert made("same") == first
    others = [
        made("seed", seed=1),
        made("words", "a red bicycle"),
        made("guidance", guidance=2.0),
        made("negative", negative_prompt="red"),
    ]
    assert len({first, *others}) == 5


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"output_path": "a.mp4"}, r"a\.mp4: the result is written as \*\.webp, \*\.png, \*\.gif"),
        ({"temperature": 0.5, "block_length": 4}, "leave --temperature, --block-length out"),
        ({"guidance": 1.0, "negative_prompt": "fog"}, "where guidance_scale is more than 1, and it is 1.0; give a gr"),
        ({"prompt": None}, "makes what a text says; give one with --prompt"),
    ],
)
def test_what_does_not_fit_a_video_is_refused(film: Path, tmp_path: Path, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        ArrowQuantV2().generate(film, **{"prompt": "a fox", "output_path": tmp_path / "a.webp"} | SMALL | asked)
    assert not [*tmp_path.iterdir()]


def test_what_the_pipeline_refuses_is_told_in_its_words(film: Path, tmp_path: Path) -> None:
    with pytest.raises(QuantizationError, match=r"WanPipeline: fails: ValueError: .*divisible by 16"):
        ArrowQuantV2().generate(film, "a fox", output_path=tmp_path / "a.webp", **SMALL | {"height": 33})
    assert not [*tmp_path.iterdir()]


def test_the_command_writes_a_video(film: Path, arrow_quant: Callable[..., Run], tmp_path: Path) -> None:
    sizes = ("--height", 32, "--width", 48, "--frames", 5, "--fps", 12.5, "--guidance", 1.5, "--negative-prompt", "fog")
    done = arrow_quant("generate", film, "--prompt", "a fox", "--steps", 1, *sizes, "--out", tmp_path / "a.gif")
    assert done.code == 0, done.err
    assert done.out.strip() == str(tmp_path / "a.gif")
    assert re.search("1 steps? in ", done.err)


# The file


@pytest.mark.parametrize("fps", [1, 7, 16, 24, 29.97, 50])
@pytest.mark.parametrize("tick", [1, 10])
def test_pictures_take_as_long_together_as_they_should(fps: float, tick: int) -> None:
    found = durations(81, fps, tick)
    assert len(found) == 81
    assert all(one % tick == 0 for one in found)
    assert max(found) - min(found) <= tick
    assert abs(sum(found) - 81_000 / fps) <= tick / 2


def test_pictures_come_as_arrays_tensors_or_of_pil(tmp_path: Path) -> None:
    array = np.linspace(0, 1, 8 * 6 * 3).reshape(8, 6, 3)
    tensor = torch.from_numpy(array).movedim(-1, 0).bfloat16().float()
    rounded = np.rint(array * 255).astype(np.uint8)
    write_video(tmp_path / "a", as_pictures([array, 1 - array, Image.fromarray(rounded)]), 10, ".png")
    with Image.open(tmp_path / "a") as video:
        assert np.array_equal(np.asarray(video), rounded), "PNG loses nothing"
        video.seek(2)
        assert np.array_equal(np.asarray(video), rounded)
    write_video(tmp_path / "b", as_pictures([tensor, 1 - tensor]), 10, ".png")
    with Image.open(tmp_path / "b") as video:
        assert np.abs(np.asarray(video).astype(int) - rounded).max() <= 1
    with pytest.raises(ValueError, match=r"a picture is \(8, 6\)"):
        as_pictures([array[..., 0]])
    with pytest.raises(ValueError, match="there is none"):
        as_pictures([])


# What a pipeline is told


@dataclass
class Output:
    """As pipelines give it; iterable, as theirs are."""

    frames: Any = None
    audio: Any = None
    images: Any = None
    audios: Any = None

    def __iter__(self) -> Any:
        return iter(name for name, value in vars(self).items() if value is not None)


class Filming:
    """A pipeline that makes a video with a sound, and wants to know its speed."""

    def __init__(self, frames: Any) -> None:
        self.frames = frames

    def __call__(self, prompt: str, num_frames: int = 3, frame_rate: float = 25.0) -> Output:
        self.rate = frame_rate
        return Output(frames=[self.frames], audio=torch.zeros(1, 2, 9))


def test_a_pipeline_that_asks_for_the_speed_is_told(tmp_path: Path) -> None:
    pipeline = Filming(np.random.default_rng(0).random((3, 8, 8, 3)))
    run = partial(generate_file, pipeline, "rain", seed=0, steps=None, told=lambda *_: None)
    with pytest.warns(UserWarning, match=r"Filming: its sound is not written, for a\.webp has none"):
        made = run(tmp_path / "a.webp", wish=PipelineWish(fps=10))
    assert (made.kind, pipeline.rate) == ("video", 10)
    assert pictures_per_second(pipeline, PipelineWish(), 16.0) == 25.0
    assert pictures_per_second(SimpleNamespace(), PipelineWish(), 16.0) == 16.0


def test_frames_that_are_no_pictures_leave_nothing(tmp_path: Path) -> None:
    run = partial(generate_file, prompt="rain", out=tmp_path / "a.gif", seed=0, steps=None, told=lambda *_: None)
    with (
        pytest.warns(UserWarning, match="its sound"),
        pytest.raises(QuantizationError, match="Filming: gives frames that are no pictures: ValueError: a picture is"),
    ):
        run(Filming(np.zeros((3, 8, 8))))
    assert not [*tmp_path.iterdir()]


@dataclass
class Guided:
    """A pipeline with two kinds of guidance, as Flux and Qwen-Image have them."""

    transformer: Any = field(default_factory=lambda: SimpleNamespace(config=SimpleNamespace(guidance_embeds=True)))

    def __call__(
        self, prompt: str, negative_prompt: str = "", true_cfg_scale: float = 1.0, guidance_scale: float | None = None
    ) -> None:
        """Nothing."""


def test_a_distilled_model_is_guided_by_what_it_was_distilled_for() -> None:
    asked = PipelineWish(guidance=3.5)
    distilled, plain = Guided(), Guided(SimpleNamespace(config=SimpleNamespace(guidance_embeds=False)))
    assert arguments(distilled, "a fox", None, 0, asked) == {"prompt": "a fox", "guidance_scale": 3.5}
    assert arguments(plain, "a fox", None, 0, asked) == {"prompt": "a fox", "true_cfg_scale": 3.5}
    both = PipelineWish(guidance=3.5, negative_prompt="fog")
    assert arguments(plain, "a fox", None, 0, both)["negative_prompt"] == "fog"
    with pytest.raises(ConfigurationError, match=r"where true_cfg_scale is more than 1, and it is 1\.0; call it from"):
        arguments(distilled, "a fox", None, 0, both)

"""What a pipeline of diffusers is given; knows the arguments that its class takes, not what they do."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from arrow_quant_v2.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    Takes = Mapping[str, inspect.Parameter]

COUNTS = ("num_frames", "video_length", "frames")  # what pipelines call the pictures of a video
RATES = ("frame_rate", "fps")  # and how many of them are a second, where they want to know it
TRUE_GUIDANCE = "true_cfg_scale"  # what models that were distilled for a guidance call the usual one
PLAIN = "call it from Python, where it can be given: diffusers.DiffusionPipeline.from_pretrained(FOLDER)"
FASTEST = 50.0  # pictures in a second that every format and browser shows


@dataclass(frozen=True, kw_only=True)
class PipelineWish:
    """What a pipeline may be told besides a prompt, a seed and steps; None: as it has it.

    negative_prompt  what is not to be shown or heard
    guidance         how closely the prompt is followed (the scale of classifier-free guidance)
    height, width    of pictures, in pixels
    frames           pictures of a video
    fps              of them in a second
    """

    negative_prompt: str | None = None
    guidance: float | None = None
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    fps: float | None = None

    def __post_init__(self) -> None:
        """Refuse what is no number, and numbers that mean nothing.

        Raises:
            ConfigurationError: one of them does.
        """
        refuse_no_numbers(self, whole=("height", "width", "frames"), real=("guidance", "fps"))
        for name in ("height", "width", "frames"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise ConfigurationError(f"{name} is {count}; allowed: 1 and more")
        if self.guidance is not None and not (math.isfinite(self.guidance) and self.guidance >= 0):
            raise ConfigurationError(f"guidance is {self.guidance}; allowed: 0 and more")
        if self.fps is not None and not 0 < self.fps <= FASTEST:
            raise ConfigurationError(f"fps is {self.fps}; allowed: more than 0, and {FASTEST:.0f} at most")


def refuse_no_numbers(wish: object, whole: Iterable[str], real: Iterable[str]) -> None:
    """Refuse attributes that are neither None nor whole numbers, or numbers.

    Raises:
        ConfigurationError: one is not.
    """
    for names, kinds, needed in ((whole, int, "a whole number"), (real, int | float, "a number")):
        for name in names:
            value = getattr(wish, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, kinds)):
                raise ConfigurationError(f"{name} is {value!r}; needed: {needed}")


def taken(build: type[Any]) -> Takes:
    """The arguments of a pipeline's call."""
    return inspect.signature(build.__call__).parameters


def is_of_video(build: type[Any]) -> bool:
    """Whether pipelines of this class make a video: they ask how many pictures it has."""
    return any(name in taken(build) for name in COUNTS)


def arguments(pipeline: Any, prompt: str | None, steps: int | None, seed: int, wish: PipelineWish) -> dict[str, Any]:
    """The keywords of the pipeline's call.

    Raises:
        ConfigurationError: it takes no such argument, or needs another one.
    """
    takes = taken(type(pipeline))
    given: dict[str, Any] = {"generator": torch.Generator().manual_seed(seed)} if "generator" in takes else {}
    if steps is not None:
        given["num_inference_steps"] = steps
    given |= _said(pipeline, prompt, takes) | _guided(pipeline, wish, takes) | _shaped(pipeline, wish, takes)
    required = [n for n, p in takes.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    missing = [name for name in required if name not in given and name != "self"]
    if missing:
        raise ConfigurationError(f"{type(pipeline).__name__}: also needs {', '.join(missing)}; {PLAIN}")
    return given


def _said(pipeline: Any, prompt: str | None, takes: Takes) -> dict[str, Any]:
    """The prompt as this pipeline takes it: as words, or as the number or name of a class."""
    name = type(pipeline).__name__
    if "prompt" in takes:
        if prompt is None:
            raise ConfigurationError(f"{name}: makes what a text says; give one with --prompt")
        return {"prompt": prompt}
    if "class_labels" in takes:
        return {"class_labels": [_class_label(pipeline, prompt)]}
    if prompt:
        raise ConfigurationError(f"{name}: takes no prompt; leave --prompt out")
    return {}


def _class_label(pipeline: Any, prompt: str | None) -> int:
    labels: dict[str, int] = getattr(pipeline, "labels", None) or {}
    if prompt in labels:
        return int(labels[prompt])
    if prompt is not None and prompt.strip().isdecimal() and int(prompt) in (labels.values() or (int(prompt),)):
        return int(prompt)
    known = f" or a name such as {', '.join(sorted(labels)[:3])}" if labels else ""
    raise ConfigurationError(
        f"{type(pipeline).__name__}: makes pictures of classes, and the prompt is {prompt!r};"
        f" give the number of a class{known} with --prompt"
    )


def _guided(pipeline: Any, wish: PipelineWish, takes: Takes) -> dict[str, Any]:
    """Guidance and what it leads away from, which means nothing without guidance."""
    given: dict[str, Any] = {}
    scale = _scale(pipeline, takes)
    if wish.guidance is not None:
        given[_known(pipeline, takes, "guidance", (scale,))] = wish.guidance
    if wish.negative_prompt is None:
        return given
    given[_known(pipeline, takes, "negative_prompt", ("negative_prompt",))] = wish.negative_prompt
    leading = TRUE_GUIDANCE if TRUE_GUIDANCE in takes else scale
    strength = given.get(leading, takes[leading].default if leading in takes else None)
    if isinstance(strength, int | float) and strength <= 1:
        way_out = "give a greater --guidance" if leading == scale else PLAIN
        raise ConfigurationError(
            f"{type(pipeline).__name__}: follows a negative prompt where {leading} is more than 1, and it is"
            f" {strength}; {way_out}"
        )
    return given


def _scale(pipeline: Any, takes: Takes) -> str:
    """What this pipeline calls its guidance; models that were not distilled for one take the usual one."""
    if TRUE_GUIDANCE not in takes:
        return "guidance_scale"
    config = getattr(getattr(pipeline, "transformer", None), "config", None)
    distilled = "guidance_scale" in takes and bool(getattr(config, "guidance_embeds", False))
    return "guidance_scale" if distilled else TRUE_GUIDANCE


def _shaped(pipeline: Any, wish: PipelineWish, takes: Takes) -> dict[str, Any]:
    asked = {"height": ("height",), "width": ("width",), "frames": COUNTS}
    wanted = {name: getattr(wish, name) for name in asked}
    given = {_known(pipeline, takes, name, asked[name]): n for name, n in wanted.items() if n is not None}
    if wish.fps is None:
        return given
    if not is_of_video(type(pipeline)):
        raise ConfigurationError(f"{type(pipeline).__name__}: makes no video; leave --fps out")
    return given | {name: wish.fps for name in RATES if name in takes}


def _known(pipeline: Any, takes: Takes, asked: str, names: tuple[str, ...]) -> str:
    """The name by which the class takes it."""
    found = next((name for name in names if name in takes), None)
    if found is None:
        option = f"--{asked.replace('_', '-')}"
        raise ConfigurationError(f"{type(pipeline).__name__}: takes no {asked.replace('_', ' ')}; leave {option} out")
    return found


def pictures_per_second(pipeline: Any, wish: PipelineWish, otherwise: float) -> float:
    """As wished for, else as the class has it."""
    stated = (taken(type(pipeline))[name].default for name in RATES if name in taken(type(pipeline)))
    known = (rate for rate in (wish.fps, *stated) if isinstance(rate, int | float) and rate > 0)
    return min(float(next(known, otherwise)), FASTEST)

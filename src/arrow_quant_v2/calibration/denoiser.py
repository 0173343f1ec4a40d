"""What a denoiser of diffusers is called with, told from its forward's signature and its config; runs nothing.

An argument that every class names alike has one line in `ARGUMENTS`. How a class counts time, how its latents lie, and
what sign its output has, are in no config: those are the small tables beside it, taken from the pipelines of diffusers.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from arrow_quant_v2.errors import QuantizationError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import nn

STATES = ("sample", "hidden_states", "x")
TIMES = ("timestep", "timestep_ratio", "t")
SIDE, FRAMES, LENGTH = 64, 3, 1024  # latents of a model whose config names no size; frames cost as much as images
TOKENS = 77  # of a random condition
NO_NEGATIVE_PROMPT = frozenset({"StableAudioDiTModel"})  # the branch without condition is given zeros

# The text encoder's width, by the config's name for it; models that project the text also name the inner width.
TEXT_WIDTHS = (
    "caption_channels", "joint_attention_dim", "cross_attention_input_dim", "text_embed_dim", "text_dim",
    "cap_feat_dim", "context_in_dim", "in_text_dim", "encoder_hid_dim", "cross_attention_dim",
)  # fmt: skip

# Models that are given the noise level in [0, 1], not the step of training in [0, 1000]; those that are given how much
# of the noise is gone; and those whose output points the other way.
FRACTION = frozenset({
    "FluxTransformer2DModel", "Flux2Transformer2DModel", "ChromaTransformer2DModel", "QwenImageTransformer2DModel",
    "AuraFlowTransformer2DModel", "LongCatImageTransformer2DModel", "OvisImageTransformer2DModel",
    "BriaFibo2Transformer2DModel", "Krea2Transformer2DModel", "NucleusMoEImageTransformer2DModel",
    "PRXTransformer2DModel",
})  # fmt: skip
RISING = frozenset({"Lumina2Transformer2DModel", "ZImageTransformer2DModel"})
NEGATED = RISING | {"NucleusMoEImageTransformer2DModel"}
ROWS = frozenset({"QwenImageTransformer2DModel", "NucleusMoEImageTransformer2DModel"})  # latents are rows of patches
DIAGONAL = frozenset({"LongCatImageTransformer2DModel", "OvisImageTransformer2DModel"})  # how text tokens are placed
OWN_ROTARY = frozenset({"CogView4Transformer2DModel", "GlmImageTransformer2DModel"})  # they place patches themselves
LISTS = frozenset({"ZImageTransformer2DModel"})  # pictures and prompts are lists, one item for each of the batch
FRAMES_FIRST = frozenset({"CogVideoXTransformer3DModel", "UNetSpatioTemporalConditionModel"})


@dataclass(frozen=True, kw_only=True, eq=False)
class Draw:
    """One branch of one trajectory: where its numbers come from.

    condition   draws what the two branches differ in
    shared      draws what they share; it starts alike for both
    empty       whether it is the branch without condition
    encoded     what the prompt became: states (1, tokens, width), a pooled state (1, width), a mask (1, tokens)
    """

    condition: torch.Generator
    shared: torch.Generator
    empty: bool
    encoded: tuple[torch.Tensor, ...] = ()

    def states(self, width: int) -> torch.Tensor:
        """(1, tokens, width): what the text encoder said, or normal numbers."""
        return self._fitting(3, width, (1, TOKENS, width))

    def pooled(self, width: int) -> torch.Tensor:
        """(1, width): what the text encoder said of the whole prompt, or normal numbers."""
        return self._fitting(2, width, (1, width))

    def mask(self, tokens: int) -> torch.Tensor | None:
        """(1, tokens): which tokens of the prompt are no padding."""
        masks = (t for t in self.encoded if not t.is_floating_point() and t.shape[-1] == tokens and t.ndim == 2)  # noqa: PLR2004
        return next(masks, None)

    def _fitting(self, axes: int, width: int, otherwise: Sequence[int]) -> torch.Tensor:
        fitting = (t for t in self.encoded if t.is_floating_point() and (t.ndim, t.shape[-1]) == (axes, width))
        found = next(fitting, None)
        return torch.randn(*otherwise, generator=self.condition) if found is None else found


@dataclass(frozen=True, eq=False)
class Denoiser:
    """A model of diffusers: its class, its config, and the parameters of its forward.

    `classes` are the numbers of those that it may be told, where not all that it has room for.
    """

    module: nn.Module
    classes: tuple[int, ...] = ()

    @cached_property
    def kind(self) -> str:
        """The name of the class."""
        return type(self.module).__name__

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The config, read-only; empty for a module that is not of diffusers."""
        found: Any = getattr(self.module, "config", None)
        return found if isinstance(found, dict) else {}

    @cached_property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """The parameters of forward."""
        return inspect.signature(self.module.forward).parameters

    @cached_property
    def state(self) -> str:
        """The argument that carries the noisy sample."""
        return self._one_of(STATES, "the noisy sample")

    @cached_property
    def time(self) -> str:
        """The argument that carries the time."""
        return self._one_of(TIMES, "the time")

    def _one_of(self, names: Sequence[str], what: str) -> str:
        found = next((name for name in names if name in self.parameters), None)
        if found is None:
            raise self.refusal(", ".join(self.parameters), f"none of these arguments is {what} ({', '.join(names)})")
        return found

    def refusal(self, argument: str, reason: str) -> QuantizationError:
        """The error for an argument that cannot be derived."""
        return QuantizationError(
            f"{self.kind}.forward cannot be called: {argument}: {reason};"
            " give calibration samples by a callable that returns its arguments"
        )

    def size(self, *names: str) -> int:
        """The first of these entries of the config that is set."""
        found = next((self.config[name] for name in names if self.config.get(name)), None)
        found = found[0] if isinstance(found, list | tuple) and found else found
        if not isinstance(found, int):
            raise self.refusal(names[0], f"its size is not in the model's config ({', '.join(names)})")
        return found

    @cached_property
    def sides(self) -> tuple[int, int]:
        """Height and width of the latents; of the grid of patches where the latents are rows of patches."""
        if self.in_rows:
            return SIDE // 2, SIDE // 2
        named = self.config.get("sample_size")
        high = self.config.get("sample_height", named) or SIDE
        wide = self.config.get("sample_width", named) or SIDE
        return (high[0] if isinstance(high, list | tuple) else high), (
            wide[-1] if isinstance(wide, list | tuple) else wide
        )

    @cached_property
    def in_rows(self) -> bool:
        """Whether the latents are (1, patches, channels)."""
        return "img_ids" in self.parameters or self.kind in ROWS or self.kind.startswith("LTXVideo")

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Of the latents that the sampler steps; the model's input may have more channels."""
        channels, (high, wide) = self.channels, self.sides
        if self.in_rows:
            return 1, high * wide * (FRAMES if "num_frames" in self.parameters else 1), channels
        if "1D" in self.kind or "Audio" in self.kind:
            length = self.config.get("sample_size") or LENGTH
            return 1, channels, length[0] if isinstance(length, list | tuple) else length
        if self.kind in FRAMES_FIRST:
            return 1, FRAMES, channels, high, wide
        if "3D" in self.kind or "Motion" in self.kind:
            return 1, channels, self.config.get("video_length") or FRAMES, high, wide
        return 1, channels, high, wide

    @cached_property
    def channel_axis(self) -> int:
        """The axis of `shape` that counts channels."""
        return 2 if self.in_rows or self.kind in FRAMES_FIRST else 1

    @cached_property
    def channels(self) -> int:
        """Of the latents: a model with a learned variance gives more, one that is shown a picture takes more."""
        taken = self.size("in_channels", "in_dim")
        return min(taken, self.config.get("out_channels") or taken)

    @cached_property
    def has_even_levels(self) -> bool:
        """Whether its pipeline spaces the noise levels of a flow evenly: 1, 1 - 1/n .. 1/n."""
        return self.in_rows or self.kind.startswith(("Lumina2", "Hunyuan", "Krea2", "ZImage"))

    @cached_property
    def patches(self) -> int:
        """How many patches the latents have, which the shift of a flow's schedule depends on."""
        if self.in_rows:
            return self.shape[1]
        patch = self.config.get("patch_size") or self.config.get("all_patch_size") or 1
        side = patch[-1] if isinstance(patch, list | tuple) else patch
        return math.prod(self.sides) // (side * side)

    def clock(self, step: torch.Tensor) -> torch.Tensor:
        """(1,): the model's own time argument at a scheduler's timestep."""
        time = step.reshape(1)
        if self.kind in FRACTION or self.kind in RISING:
            time = time / 1000
        if self.kind in RISING:
            time = 1 - time
        time = time * self.config.get("timestep_scale", 1) if self.kind.startswith("Sana") else time
        return time.float() if time.is_floating_point() else time

    @cached_property
    def guidance_is_an_input(self) -> bool:
        """Whether the model was distilled to need one branch: it is told the strength, or never had a second one."""
        told = self.config.get("guidance_embeds") or self.config.get("time_cond_proj_dim")
        return bool(told) or self.kind == "FluxTransformer2DModel"

    @cached_property
    def has_empty_branch(self) -> bool:
        """Whether it can be called without condition: an empty prompt, or the class that stands for none."""
        return bool({"encoder_hidden_states", "cap_feats"} & set(self.parameters)) or self._null_class is not None

    @cached_property
    def _null_class(self) -> int | None:
        count: int | None = self.config.get("num_embeds_ada_norm")
        return count if "class_labels" in self.parameters and self.kind == "DiTTransformer2DModel" else None

    def conditions(self, draw: Draw) -> dict[str, object]:
        """Every argument of forward but the noisy sample and the time.

        Raises:
            QuantizationError: one is needed and cannot be derived; names it.
        """
        made = {name: ARGUMENTS[name](self, draw) for name in self.parameters if name in ARGUMENTS}
        given = {name: value for name, value in made.items() if value is not None}
        for name, parameter in self.parameters.items():
            needed = parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
            if needed and name not in {self.state, self.time, *given}:
                raise self.refusal(name, "nothing is known of what belongs there")
        return given

    def seen(self, latents: torch.Tensor, picture: torch.Tensor | None) -> torch.Tensor | list[torch.Tensor]:
        """The model's input: the latents, and beside them what a model that continues a picture is shown of it."""
        if self.kind in LISTS:
            return list(latents.clone().unsqueeze(2))
        return latents.clone() if picture is None else torch.cat([latents, picture], self.channel_axis)

    def said(self, output: Any) -> torch.Tensor:
        """The model's output, like the latents but for the channels of a learned variance, as a sampler takes it."""
        said: torch.Tensor = torch.stack(output[0]).squeeze(2) if self.kind in LISTS else output[0]
        return -said if self.kind in NEGATED else said

    def picture(self, generator: torch.Generator) -> torch.Tensor | None:
        """Normal numbers for the channels that are no latents; None where there are none."""
        shape = list(self.shape)
        shape[self.channel_axis] = self.size("in_channels", "in_dim") - self.channels
        return torch.randn(shape, generator=generator) if shape[self.channel_axis] else None


# What each argument is made of. None: it is left out, as its pipeline leaves it out.


def _states(model: Denoiser, draw: Draw) -> torch.Tensor:
    states = draw.states(model.size(*TEXT_WIDTHS))
    return torch.zeros_like(states) if draw.empty and model.kind in NO_NEGATIVE_PROMPT else states


def _tokens(model: Denoiser, draw: Draw) -> int:
    width = model.size(*TEXT_WIDTHS)
    encoded = (t.shape[1] for t in draw.encoded if t.ndim == 3 and t.shape[-1] == width)  # noqa: PLR2004
    return next(encoded, TOKENS)


def _mask(model: Denoiser, draw: Draw) -> torch.Tensor | None:
    if "UNet2D" in model.kind:
        return None
    mask = draw.mask(_tokens(model, draw))
    needed = {"encoder_attention_mask", "encoder_hidden_states_mask"} & {
        name for name, parameter in model.parameters.items() if parameter.default is parameter.empty
    }
    return torch.ones(1, _tokens(model, draw), dtype=torch.int64) if needed and mask is None else mask


def _pooled(model: Denoiser, draw: Draw) -> torch.Tensor:
    return draw.pooled(model.size("pooled_projection_dim", "in_text_dim2"))


def _guidance(model: Denoiser, _: Draw) -> torch.Tensor | None:
    scale = 1000.0 if model.kind.startswith("Hunyuan") else float(model.config.get("guidance_embeds_scale", 1))
    return torch.tensor([3.5 * scale]) if model.config.get("guidance_embeds") else None


def _image_places(model: Denoiser, _: Draw) -> torch.Tensor:
    """(patches, axes): row and column of each patch; the axis before them is the picture's number."""
    high, wide = model.sides
    places = torch.zeros(high, wide, _axes(model))
    places[..., 1] = torch.arange(high)[:, None]
    places[..., 2] = torch.arange(wide)[None, :]
    if model.kind.startswith("LongCat"):
        places[..., :3] += torch.tensor([1, 512, 512])
    return places.reshape(high * wide, -1)


def _text_places(model: Denoiser, draw: Draw) -> torch.Tensor:
    """(tokens, axes): the number of the token on the fourth axis, or on those of rows and columns, or zeros."""
    places = torch.zeros(_tokens(model, draw), _axes(model))
    places[:, slice(1, 3) if model.kind in DIAGONAL else slice(3, None)] = torch.arange(len(places))[:, None].float()
    return places


def _axes(model: Denoiser) -> int:
    return len(model.config.get("axes_dims_rope") or (16, 56, 56))


def _class_labels(model: Denoiser, draw: Draw) -> torch.Tensor | None:
    """A class; or for the models that are told something else there, numbers of the width that they project."""
    kind = model.config.get("class_embed_type")
    count = model.config.get("num_embeds_ada_norm" if "Transformer" in model.kind else "num_class_embeds")
    if kind == "timestep":
        return torch.randint(0, 1000, (1,), generator=draw.shared)
    if kind in {"projection", "simple_projection"}:
        return draw.pooled(model.size("projection_class_embeddings_input_dim"))
    if kind is not None:
        raise model.refusal("class_labels", f"its class_embed_type {kind!r} is unknown")
    if count is None:
        return None
    if draw.empty and model._null_class is not None:  # noqa: SLF001
        return torch.tensor([model._null_class])  # noqa: SLF001
    known = [number for number in model.classes if number < count] or range(count)
    return torch.tensor([known[int(torch.randint(0, len(known), (1,), generator=draw.shared))]])


def _added(model: Denoiser, draw: Draw) -> dict[str, object] | None:
    """What SDXL and PixArt are told beside the prompt: sizes in pixels, and the prompt as a whole."""
    if "Transformer" in model.kind:
        return _picture_size(model)
    kind = model.config.get("addition_embed_type")
    if kind == "text_time":
        return _text_time(model, draw)
    if kind == "image":
        return {"image_embeds": draw.pooled(model.size("encoder_hid_dim"))}
    if kind not in {None, "text"} or model.config.get("encoder_hid_dim_type") not in {None, "text_proj"}:
        raise model.refusal("added_cond_kwargs", f"addition_embed_type {kind!r} needs pictures")
    return None


def _picture_size(model: Denoiser) -> dict[str, object]:
    asked = model.config.get("use_additional_conditions")
    if not (model.config.get("sample_size") == 128 if asked is None else asked):  # noqa: PLR2004
        return {"resolution": None, "aspect_ratio": None}
    high, wide = (8.0 * side for side in model.sides)
    return {"resolution": torch.tensor([[high, wide]]), "aspect_ratio": torch.tensor([[high / wide]])}


def _text_time(model: Denoiser, draw: Draw) -> dict[str, object]:
    width, each = model.size("projection_class_embeddings_input_dim"), model.size("addition_time_embed_dim")
    high, wide = (8.0 * side for side in model.sides)
    refiner = width - 5 * each == 1280  # noqa: PLR2004 : the width of its text encoder
    sizes = [high, wide, 0, 0, 6.0] if refiner else [high, wide, 0, 0, high, wide]
    return {"text_embeds": draw.pooled(width - len(sizes) * each), "time_ids": torch.tensor([sizes])}


def _strength(model: Denoiser, _: Draw) -> torch.Tensor | None:
    """(1, width): sines and cosines of the strength of guidance that a distilled model imitates, here 7.5."""
    width = model.config.get("time_cond_proj_dim")
    if width is None:
        return None
    if not isinstance(width, int) or width % 2:
        raise model.refusal("timestep_cond", f"its width {width!r} is odd")
    rates = torch.exp(-math.log(10_000) * torch.arange(width // 2) / (width // 2 - 1))
    angles = 6500 * rates[None, :]  # of (strength - 1) * 1000
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def _duration(model: Denoiser, draw: Draw) -> torch.Tensor:
    width = model.size("global_states_input_dim")
    given = next((t for t in draw.encoded if t.shape[1:] == (1, width)), None)
    return torch.randn(1, 1, width, generator=draw.shared) if given is None else given


def _rotary(model: Denoiser, _: Draw) -> object:
    from diffusers.models.embeddings import get_1d_rotary_pos_embed  # noqa: PLC0415

    half = model.size("attention_head_dim") // 2
    return get_1d_rotary_pos_embed(half, model.shape[2] + 1, use_real=True, repeat_interleave_real=False)


def _image_rotary(model: Denoiser, _: Draw) -> None:
    if model.kind not in OWN_ROTARY and model.config.get("use_rotary_positional_embeddings", True):
        raise model.refusal("image_rotary_emb", "its pipeline computes it")


def _pixels(model: Denoiser, _: Draw) -> torch.Tensor:
    high, wide = model.sides
    return torch.tensor([[8.0 * high, 8.0 * wide]])


ARGUMENTS: dict[str, Callable[[Denoiser, Draw], object]] = {
    "encoder_hidden_states": _states,
    "cap_feats": lambda model, draw: list(_states(model, draw)),
    "encoder_attention_mask": _mask,
    "encoder_hidden_states_mask": _mask,
    "pooled_projections": _pooled,
    "guidance": _guidance,
    "img_ids": _image_places,
    "txt_ids": _text_places,
    "img_shapes": lambda model, _: [[(1, *model.sides)]],
    "class_labels": _class_labels,
    "added_cond_kwargs": _added,
    "timestep_cond": _strength,
    "global_hidden_states": _duration,
    "rotary_embedding": _rotary,
    "image_rotary_emb": _image_rotary,
    "original_size": _pixels,
    "target_size": _pixels,
    "crop_coords": lambda *_: torch.zeros(1, 2),
    "num_frames": lambda *_: FRAMES,
    "height": lambda model, _: model.sides[0],
    "width": lambda model, _: model.sides[1],
}

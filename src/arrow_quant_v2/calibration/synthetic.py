"""The last resort: inputs that are made up at random. Layers fed with them are not fed what they will see in use."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

from arrow_quant_v2.calibration import chance
from arrow_quant_v2.calibration.sample import Sample
from arrow_quant_v2.calibration.tokens import shown, spread_lengths, vocabulary_of
from arrow_quant_v2.errors import QuantizationError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from arrow_quant_v2.calibration.runnable import Runnable

WORDS = 77  # of the text that a denoiser is told, as CLIP encodes it
TRAINED_STEPS = 1000
VIDEO_FRAMES = 8


def random_tokens(runnable: Runnable, count: int, seed: int, length: int | None = None) -> tuple[Sample, ...]:
    """Ordinary tokens, each as likely as another, between the special ones; lengths from half of `length` to all of it.

    Raises:
        QuantizationError: the model takes no tokens.
    """
    vocabulary = vocabulary_of(runnable)
    draw = chance.generator(seed, "random tokens")
    ordinary = vocabulary.ordinary().nonzero()[:, 0]
    if not len(ordinary):
        raise QuantizationError(f"{type(runnable.module).__name__}: its vocabulary holds no token but special ones")
    sizes = spread_lengths(vocabulary, count, length, draw)
    rows = (ordinary[torch.randint(len(ordinary), (1, size), generator=draw)] for size in sizes)
    return tuple(shown(runnable.module, vocabulary.wrapped(row)[0], 0.0) for row in rows)


def random_latents(runnable: Runnable, count: int, seed: int) -> tuple[Sample, ...]:
    """Normal noise of the shape that the model's config tells, at times stratified over its trained steps.

    Raises:
        QuantizationError: the config does not tell the shape, or the forward needs what cannot be made up.
    """
    draw = chance.generator(seed, "random latents")
    trained = getattr(getattr(runnable.scheduler, "config", None), "num_train_timesteps", None) or TRAINED_STEPS
    steps = [round(time * (trained - 1)) for time in chance.stratified(count, draw)]
    return tuple(Sample(keywords=dict(_made_up(runnable, step, draw)), timestep=float(step)) for step in steps)


def _made_up(runnable: Runnable, step: int, draw: torch.Generator) -> Iterator[tuple[str, torch.Tensor]]:
    """Every argument that the forward must be given, and the class where the model was trained with classes."""
    name = type(runnable.module).__name__
    config: Any = getattr(runnable.module, "config", None)
    arguments = list(inspect.signature(runnable.module.forward).parameters.values())
    classes = getattr(config, "num_class_embeds", None)
    for position, argument in enumerate(arguments):
        needed = argument.default is argument.empty and argument.kind is argument.POSITIONAL_OR_KEYWORD
        if argument.name == "timestep":
            yield argument.name, torch.tensor([float(step)])
        elif argument.name == "encoder_hidden_states" and (width := getattr(config, "cross_attention_dim", None)):
            yield argument.name, torch.randn(1, WORDS, int(width), generator=draw)
        elif argument.name == "class_labels" and classes:
            yield argument.name, torch.randint(int(classes), (1,), generator=draw)
        elif position == 0:
            yield argument.name, torch.randn(_latent_shape(config, name), generator=draw)
        elif needed:
            raise QuantizationError(
                f"{name}: its argument {argument.name} cannot be made up; give calibration data (--calibration)"
            )


def _latent_shape(config: Any, name: str) -> tuple[int, ...]:
    """(1, channels, *sizes): one size for sound, two for images, three for video."""
    channels, size = getattr(config, "in_channels", None), getattr(config, "sample_size", None)
    if not isinstance(channels, int) or not isinstance(size, (int, list, tuple)):
        raise QuantizationError(
            f"{name}: its config does not tell the shape of what it takes (in_channels, sample_size);"
            " give calibration data (--calibration)"
        )
    if not isinstance(size, int):
        return (1, channels, *size)
    dimensions = 1 if "1D" in name else 2
    frames = (VIDEO_FRAMES,) if "3D" in name else ()
    return (1, channels, *frames, *[size] * dimensions)

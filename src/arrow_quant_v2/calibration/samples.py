"""The front of calibration: what is asked for, and the samples that a model is shown. Runs no model for its layers."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from arrow_quant_v2.calibration import identity
from arrow_quant_v2.calibration.given import from_callable, from_file, is_text
from arrow_quant_v2.calibration.sample import Samples
from arrow_quant_v2.calibration.synthetic import random_latents, random_tokens
from arrow_quant_v2.calibration.tokens import mean_length
from arrow_quant_v2.calibration.unmasking import STEPS, own_trajectory
from arrow_quant_v2.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from torch import nn

    from arrow_quant_v2.calibration.runnable import Runnable

OWN = "the model's own trajectory"
MADE_UP = "random inputs"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is to be gathered.

    count     samples, at most; as many where they are made and not given
    tokens    of text that are shown, however short the sequences are: more samples than `count` where it takes more
    seed      of every random choice
    data      a calibration file
    callable  a function: module -> (inputs, timestep), ...; counts more than a file
    steps     denoising steps of the model's own trajectory
    length    tokens of a sequence, special ones included; None: a default for what is shown
    prompts   what a pipeline's own trajectory is told; filled from the file where it holds prompts

    Raises:
        ConfigurationError: a number is not positive.
    """

    count: int
    tokens: int = 0
    seed: int = 0
    data: Path | None = None
    callable: Callable[[nn.Module], Iterable[tuple[Any, float]]] | None = None
    steps: int = STEPS
    length: int | None = None
    prompts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("count", "steps", "length"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ConfigurationError(f"{name} of calibration is {number}; a positive whole number is needed")


def gather(runnable: Runnable, asked: Asked) -> Samples:
    """The samples: from the function, else the file, else the model's own trajectory, else made up at random.

    The same question always gives the same samples, whatever torch's number of threads; torch's own generator is
    left as it was. `identity` covers the values of what was given, and the settings of what was made: for those the
    caller adds the identity of the model.

    Raises:
        ConfigurationError: what was given cannot be used.
        SourceError: a file of arrays is damaged.
        QuantizationError: the model cannot be called.
    """
    if asked.callable is not None:
        return _given(from_callable(runnable.module, asked.callable, asked.count), "a function of the user's own")
    if asked.data is not None:
        return _from_file(runnable, asked, asked.data)
    if is_text(runnable):
        return _text(runnable, asked)
    if runnable.scheduler is not None:
        return _continuous(runnable, asked)
    calls = random_latents(runnable, asked.count, asked.seed)
    return _made(calls, MADE_UP, asked, synthetic=True)


def _given(calls: tuple[Any, ...], origin: str, notes: tuple[str, ...] = ()) -> Samples:
    return Samples(calls=calls, origin=origin, identity=identity.of_calls(calls), notes=notes)


def _made(calls: tuple[Any, ...], origin: str, asked: Asked, *settings: object, synthetic: bool = False) -> Samples:
    decided = identity.of_settings(origin, asked.count, asked.seed, asked.steps, asked.length, *settings)
    return Samples(calls=calls, origin=origin, identity=decided, synthetic=synthetic)


def _from_file(runnable: Runnable, asked: Asked, path: Path) -> Samples:
    given = from_file(runnable, path, asked.count, asked.seed, asked.length, tokens=asked.tokens)
    if not given.prompts:
        return _given(given.calls, path.name, given.notes)
    samples = _continuous(runnable, replace(asked, data=None, prompts=given.prompts))
    return replace(samples, origin=f"{samples.origin}, prompts of {path.name}", notes=(*given.notes, *samples.notes))


def _text(runnable: Runnable, asked: Asked) -> Samples:
    asked = replace(asked, count=max(asked.count, -(-asked.tokens // mean_length(runnable, asked.length))))
    if runnable.mask_token is None:
        calls = random_tokens(runnable, asked.count, asked.seed, asked.length)
        return _made(calls, MADE_UP, asked, synthetic=True)
    calls = own_trajectory(runnable, asked.count, asked.seed, steps=asked.steps, length=asked.length)
    return _made(calls, OWN, asked, runnable.mask_token)


def _continuous(runnable: Runnable, asked: Asked) -> Samples:
    """The trajectory of a model of images or sound; diffusers is imported no sooner than here."""
    continuous = importlib.import_module("arrow_quant_v2.calibration.continuous")
    samples: Samples = continuous.trajectory(runnable, asked)
    return samples

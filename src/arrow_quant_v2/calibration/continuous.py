"""Calls that a diffusion model of images or sound makes when it runs from noise with its own sampler.

Knows samplers and guidance; what a class of model is called with is `denoiser`'s to know.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from arrow_quant_v2.calibration.denoiser import Denoiser, Draw
from arrow_quant_v2.calibration.prompts import PROMPTS, encode
from arrow_quant_v2.calibration.sample import Sample, Samples
from arrow_quant_v2.engines.one_core import each_on_one_core
from arrow_quant_v2.errors import QuantizationError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from arrow_quant_v2.calibration.prompts import Encoded
    from arrow_quant_v2.calibration.runnable import Runnable

LEAST_RUNS = 4  # trajectories, so that few samples still come from several noises, classes and prompts
STRENGTH = 5.0  # of guidance; pipelines use 3 to 7.5
DISTILLED = frozenset({
    "LCMScheduler", "TCDScheduler", "FlowMatchLCMScheduler", "CMStochasticIterativeScheduler",
})  # few-step samplers, whose models have the guidance in their weights  # fmt: skip
OWN_LOOP = frozenset({"SCMScheduler"})  # its pipeline rescales inputs and outputs beside it
# What a model or a sampler raises when it is given something else than it is made for.
MISFITS = (TypeError, ValueError, AttributeError, LookupError, RuntimeError, ArithmeticError)


class Asked(Protocol):
    """How many calls, from which seed, of how many steps of the sampler; and what the model is told, or ours if none.

    It is what this file needs of the record of what is asked of calibration.
    """

    @property
    def count(self) -> int: ...  # noqa: D102

    @property
    def seed(self) -> int: ...  # noqa: D102

    @property
    def steps(self) -> int: ...  # noqa: D102

    @property
    def prompts(self) -> Sequence[str]: ...  # noqa: D102


def trajectory(runnable: Runnable, asked: Asked) -> Samples:
    """`asked.count` calls of the model on its way from noise to a result, in `asked.steps` steps of its own scheduler.

    Several trajectories run, with a noise, a class or a prompt of their own each; of each step of the sampler, and of
    each branch of the guidance, equally many calls are kept (to within one). Tensors are float32 with a batch of one.
    Prompts are encoded by the text encoders beside the model; where that is impossible conditions are normal numbers,
    and a note says so.

    Raises:
        QuantizationError: the model has no scheduler, cannot be called, or says something that is no finite number.
    """
    model = Denoiser(runnable.module, runnable.classes)
    scheduler = _scheduler(model, runnable)
    times = _timed(model, scheduler, asked.steps).timesteps
    branches = 2 if model.has_empty_branch and not _is_distilled(model, scheduler) else 1
    runs = max(-(-asked.count // (len(times) * branches)), min(asked.count, LEAST_RUNS))
    kept = _kept(asked.count, len(times), branches, runs)
    texts = tuple(asked.prompts) or PROMPTS[runnable.modality]
    encoded, note = _encoded(runnable, model, len(kept), texts)
    tour = _Tour(model=model, scheduler=scheduler, steps=asked.steps, seed=asked.seed, branches=branches)
    found = each_on_one_core(lambda run: _run(tour, run, kept[run], encoded), range(len(kept)))
    return Samples(
        calls=tuple(sample for samples in found for sample in samples),
        origin=f"the model's own trajectory ({len(times)} steps of {type(scheduler).__name__})",
        identity=_identity(tour, asked.count, None if note else texts),
        notes=(note,) if note else (),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Tour:
    """What all trajectories have in common."""

    model: Denoiser
    scheduler: Any
    steps: int
    seed: int
    branches: int

    def generator(self, *what: object) -> torch.Generator:
        """One for this purpose, from nothing but the seed and its name."""
        digest = hashlib.sha256(repr((self.seed, *what)).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _scheduler(model: Denoiser, runnable: Runnable) -> Any:
    found = runnable.scheduler
    name = type(found).__name__
    if found is None or name in OWN_LOOP or not hasattr(found, "step"):
        lies = "no scheduler that can be opened lies beside it" if found is None else f"{name} has a loop of its own"
        raise QuantizationError(
            f"{model.kind}: its trajectory is unknown: {lies} (scheduler/ in the pipeline's folder; some need a package"
            " of their own, such as torchsde); give calibration samples by a callable"
        )
    return found


def _timed(model: Denoiser, scheduler: Any, steps: int) -> Any:
    """A scheduler of one's own, at the start of `steps` steps.

    Some pipelines choose the noise levels themselves, and all that shift them by the size of the picture say its size.
    """
    fresh = copy.deepcopy(scheduler)
    accepts = inspect.signature(fresh.set_timesteps).parameters
    options: dict[str, Any] = {}
    if model.has_even_levels and "sigmas" in accepts and not fresh.config.get("use_flow_sigmas"):
        options["sigmas"] = [1 - step / steps for step in range(steps)]
    if "mu" in accepts and fresh.config.get("use_dynamic_shifting"):
        options["mu"] = _shift(fresh.config, model, steps)
    try:
        fresh.set_timesteps(**{"num_inference_steps": steps} | options)
    except MISFITS as error:
        raise QuantizationError(
            f"{type(fresh).__name__} refuses {steps} steps: {error}; ask for fewer, or give samples by a callable"
        ) from error
    return fresh


def _shift(config: Mapping[str, Any], model: Denoiser, steps: int) -> float:
    """The shift of a flow's noise levels: a line through its values for the smallest and the largest picture.

    Flux 2 has its own: a line through its values at 10 and 200 steps, which are lines through the size.
    """
    patches = model.patches
    if model.kind == "Flux2Transformer2DModel":
        at_10, at_200 = 8.73809524e-05 * patches + 1.89833333, 0.00016927 * patches + 0.45666666
        return at_200 if patches > 4300 else at_200 + (at_200 - at_10) / 190 * (steps - 200)  # noqa: PLR2004
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return float(low + (high - low) * (patches - few) / (many - few))


def _is_distilled(model: Denoiser, scheduler: Any) -> bool:
    return model.guidance_is_an_input or type(scheduler).__name__ in DISTILLED


def _kept(count: int, steps: int, branches: int, runs: int) -> list[frozenset[tuple[int, int]]]:
    """Which (step, branch) of each trajectory is kept, of trajectories of which anything is.

    Every step keeps count / steps, rounded down or up, and the trajectories and branches take turns.
    """
    lanes = [(run, (run + half) % branches) for half in range(branches) for run in range(runs)]
    kept: dict[int, set[tuple[int, int]]] = {}
    turn = 0
    for step in range(steps):
        for _ in range((step + 1) * count // steps - step * count // steps):
            run, branch = lanes[turn % len(lanes)]
            kept.setdefault(run, set()).add((step, branch))
            turn += 1
    return [frozenset(kept[run]) for run in sorted(kept)]


def _encoded(runnable: Runnable, model: Denoiser, runs: int, texts: Sequence[str]) -> tuple[list[Encoded], str | None]:
    """What each trajectory's prompt became, the empty prompt last; and the note that says why, where nothing did."""
    if not {"encoder_hidden_states", "cap_feats"} & set(model.parameters):
        return [()] * (runs + 1), None
    used = texts[:runs]
    try:
        *said, empty = encode(runnable.module, [*used, ""])
    except QuantizationError as error:
        return [()] * (runs + 1), f"conditions are random numbers, not encoded prompts: {error}"
    return [*(said[run % len(said)] for run in range(runs)), empty], None


def _run(tour: _Tour, run: int, kept: frozenset[tuple[int, int]], encoded: Sequence[Encoded]) -> list[Sample]:
    """One trajectory, as far as anything of it is kept."""
    model = tour.model
    scheduler, noise = _timed(model, tour.scheduler, tour.steps), tour.generator("noise", run)
    last = max(step for step, _ in kept)
    found: list[Sample] = []
    with torch.no_grad():
        latents = torch.randn(*model.shape, generator=noise) * getattr(scheduler, "init_noise_sigma", 1.0)
        picture = model.picture(noise)
        conditions = [model.conditions(draw) for draw in _draws(tour, run, encoded)]
        for step, time in enumerate(scheduler.timesteps[: last + 1]):
            seen = model.seen(_scaled(scheduler, latents, time), picture)
            clock = model.clock(time)
            calls = [{model.state: seen, model.time: clock} | condition for condition in conditions]
            found += [
                Sample(keywords=call, timestep=float(clock))
                for branch, call in enumerate(calls)
                if (step, branch) in kept
            ]
            outputs = [_output(model, call, step) for call in calls]
            latents = _stepped(model, scheduler, (outputs, time, latents), noise)
    return found


def _draws(tour: _Tour, run: int, encoded: Sequence[Encoded]) -> list[Draw]:
    """Of the branch with a condition and, where there is guidance, of the one without, which is always the same."""
    with_condition = Draw(
        condition=tour.generator("condition", run),
        shared=tour.generator("shared", run),
        empty=False,
        encoded=encoded[run],
    )
    without = Draw(
        condition=tour.generator("empty"), shared=tour.generator("shared", run), empty=True, encoded=encoded[-1]
    )
    return [with_condition, without][: tour.branches]


def _scaled(scheduler: Any, latents: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
    if not hasattr(scheduler, "scale_model_input"):
        return latents
    scaled: torch.Tensor = scheduler.scale_model_input(latents, time)
    return scaled.float()


def _output(model: Denoiser, call: Mapping[str, Any], step: int) -> torch.Tensor:
    try:
        output = model.said(model.module(**call))
    except MISFITS as error:
        raise QuantizationError(
            f"{model.kind} cannot be called with {', '.join(call)} as they were derived from its config:"
            f" {type(error).__name__}: {error}; give calibration samples by a callable that returns its arguments"
        ) from error
    if not torch.isfinite(output).all():
        raise QuantizationError(
            f"{model.kind}: at step {step} of its trajectory, timestep {float(call[model.time]):g}, its output is not"
            " finite; compare its weights with the original, or give calibration samples by a callable"
        )
    return output


def _stepped(
    model: Denoiser,
    scheduler: Any,
    at: tuple[Sequence[torch.Tensor], torch.Tensor, torch.Tensor],
    noise: torch.Generator,
) -> torch.Tensor:
    """The latents one step further, guided."""
    outputs, time, latents = at
    size = latents.shape[model.channel_axis]
    direction = outputs[0].narrow(model.channel_axis, 0, size)
    if len(outputs) > 1:
        without = outputs[1].narrow(model.channel_axis, 0, size)
        direction = without + STRENGTH * (direction - without)
    if str(scheduler.config.get("variance_type")).startswith("learned"):
        rest = outputs[0].narrow(model.channel_axis, size, outputs[0].shape[model.channel_axis] - size)
        direction = torch.cat([direction, rest], model.channel_axis)
    draws = "generator" in inspect.signature(scheduler.step).parameters
    try:
        stepped = scheduler.step(direction, time, latents, return_dict=False, **({"generator": noise} if draws else {}))
    except MISFITS as error:
        raise QuantizationError(
            f"{type(scheduler).__name__} cannot step {model.kind}: {error}; give calibration samples by a callable"
        ) from error
    following: torch.Tensor = stepped[0]
    return following.float()


def _identity(tour: _Tour, count: int, texts: Sequence[str] | None) -> str:
    """A hash of the settings and the seed; of the prompts where they were encoded."""
    settings = {
        "count": count,
        "seed": tour.seed,
        "steps": tour.steps,
        "prompts": texts,
        "classes": tour.model.classes,
        "model": [tour.model.kind, _public(tour.model.config)],
        "scheduler": [type(tour.scheduler).__name__, _public(tour.scheduler.config)],
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def _public(config: Mapping[str, Any]) -> dict[str, Any]:
    """Without the entries that say where and by which version it was saved."""
    return {name: value for name, value in config.items() if not name.startswith("_")}

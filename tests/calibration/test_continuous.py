"""Calls along a diffusion model's own trajectory are what its pipeline would make, spread evenly, and repeatable."""

from __future__ import annotations

import copy
import inspect
import json
import math
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_pipelines import PIPELINES, Small

from arrow_quant_v2.calibration import continuous, denoiser
from arrow_quant_v2.calibration.continuous import trajectory
from arrow_quant_v2.calibration.denoiser import Denoiser
from arrow_quant_v2.calibration.pipelines import open_pipeline
from arrow_quant_v2.errors import QuantizationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from arrow_quant_v2.calibration.runnable import Runnable
    from arrow_quant_v2.calibration.sample import Sample, Samples

# diffusers 0.42 imports by names of its own that it has deprecated, and uses arrays in a way that numpy 2 deprecates
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("FutureWarning", "DeprecationWarning")]

ONE_BRANCH = {"ddpm", "ddpm learned variance", "ddpm classes", "edm", "consistency", "lcm", "flux", "dance"}
cases = pytest.mark.parametrize("name", PIPELINES)


@dataclass(frozen=True)
class Asked:
    count: int = 12
    seed: int = 0
    steps: int = 3
    prompts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Found:
    runnable: Runnable
    samples: Samples


@pytest.fixture(scope="module", autouse=True)
def little_pictures() -> Iterator[None]:
    """Latents of 16 by 16 for the models whose config names no size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(denoiser, "SIDE", 16)
        yield


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Found]:
    """The opened pipeline and 16 of its calls; made once."""

    @cache
    def make(name: str) -> Found:
        runnable = open_pipeline(PIPELINES[name].save(tmp_path_factory.mktemp("pipelines") / name))
        return Found(runnable, trajectory(runnable, Asked()))

    return make


def same(one: object, other: object) -> bool:
    """Equal to the bit, tensors within mappings and lists too."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(np.array_equal(one, other)) if isinstance(one, np.ndarray) else one == other


def same_calls(one: Samples, other: Samples) -> bool:
    return len(one.calls) == len(other.calls) and all(
        a.timestep == b.timestep and same(dict(a.keywords), dict(b.keywords))
        for a, b in zip(one.calls, other.calls, strict=True)
    )


def time_of(sample: Sample) -> torch.Tensor:
    time: Any = next(sample.keywords[name] for name in ("timestep", "t") if name in sample.keywords)
    return time


@cases
def test_the_model_can_be_called_with_every_sample(name: str, found: Callable[[str], Found]) -> None:
    runnable, samples = found(name).runnable, found(name).samples
    assert len(samples.calls) == 12
    for sample in samples.calls[::4]:
        with torch.no_grad():
            output = runnable.module(**sample.keywords)[0]
        assert all(torch.isfinite(part).all() for part in output)
        assert time_of(sample).shape == (1,)
        assert float(time_of(sample)) == sample.timestep


@cases
def test_each_step_of_the_scheduler_is_kept_equally_often(name: str, found: Callable[[str], Found]) -> None:
    counts = Counter(sample.timestep for sample in found(name).samples.calls)
    model = Denoiser(found(name).runnable.module)
    times = continuous._timed(model, found(name).runnable.scheduler, 3).timesteps
    visits = Counter(float(model.clock(time)) for time in times)  # some samplers visit a step twice
    assert counts.keys() == visits.keys()
    assert all(12 // len(times) <= counts[time] / visits[time] <= -(-12 // len(times)) for time in visits)


@cases
def test_both_branches_of_guidance_are_kept_equally_often(name: str, found: Callable[[str], Found]) -> None:
    conditions = [condition_of(sample) for sample in found(name).samples.calls]
    if conditions[0] is None:
        assert set(conditions) == {None}
        return
    counts = Counter(conditions).most_common()
    if name in ONE_BRANCH:
        assert len(counts) in {3, 4}  # four trajectories, of which two may be given the same class
    else:
        assert counts[0][1] == 6  # the one empty condition
        assert len(counts) >= 3


def condition_of(sample: Sample) -> tuple[float, ...] | int | None:
    """What the call is conditioned on, in a form that can be counted."""
    if (labels := sample.keywords.get("class_labels")) is not None:
        return int(labels)
    states: Any = sample.keywords.get("encoder_hidden_states", sample.keywords.get("cap_feats"))
    states = states[0] if isinstance(states, list) else states
    return None if states is None else tuple(states.flatten()[:8].tolist())


def test_the_class_that_stands_for_none_is_the_number_of_classes(found: Callable[[str], Found]) -> None:
    labels = Counter(int(sample.keywords["class_labels"]) for sample in found("dit").samples.calls)
    assert labels[10] == 6
    assert all(0 <= label <= 10 for label in labels)


@pytest.mark.parametrize("named", [{"3": "three", "7": "seven"}, {"3": "three", "7": "seven", "99": "beyond"}])
def test_classes_that_the_pipeline_names_are_the_ones_that_are_shown(named: dict[str, str], tmp_path: Path) -> None:
    index = PIPELINES["dit"].save(tmp_path) / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"id2label": named}))
    runnable = open_pipeline(tmp_path)
    assert runnable.classes == tuple(map(int, named))
    labels = {int(sample.keywords["class_labels"]) for sample in trajectory(runnable, Asked(count=24)).calls}
    assert labels == {3, 7, 10}


def test_other_classes_are_other_samples(found: Callable[[str], Found]) -> None:
    runnable = replace(found("dit").runnable, classes=(3,))
    assert trajectory(runnable, Asked()).identity != found("dit").samples.identity


@pytest.mark.parametrize("name", ["ddpm", "consistency", "sd inpaint", "lcm", "flux", "stable audio"])
def test_the_same_seed_makes_the_same_calls_on_any_number_of_threads(name: str, found: Callable[[str], Found]) -> None:
    runnable, samples = found(name).runnable, found(name).samples
    before, torch_state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(1)
    try:
        torch.manual_seed(7)
        again = trajectory(runnable, Asked())
    finally:
        torch.set_num_threads(before)
        torch.set_rng_state(torch_state)
    other = trajectory(runnable, Asked(seed=1))
    assert same_calls(samples, again)
    assert samples.identity == again.identity
    assert not same_calls(samples, other)
    assert samples.identity != other.identity


@pytest.mark.parametrize("name", ["ddpm", "sd pndm", "stable audio"])
def test_nothing_global_is_changed(name: str, tmp_path: Any) -> None:
    def state() -> tuple[object, ...]:
        flags = (torch.is_grad_enabled(), torch.get_num_threads(), torch.get_default_dtype())
        return (*flags, torch.are_deterministic_algorithms_enabled(), torch.get_rng_state().tolist())

    root, before = PIPELINES[name].save(tmp_path), state()
    runnable = open_pipeline(root)
    schedule = dict(runnable.scheduler.__dict__)
    trajectory(runnable, Asked())
    assert state() == before
    assert not any(parameter.requires_grad for parameter in runnable.module.parameters())
    assert runnable.scheduler.__dict__.keys() == schedule.keys()
    assert same(dict(runnable.scheduler.__dict__), schedule)


def test_the_identity_follows_every_setting(found: Callable[[str], Found]) -> None:
    runnable = found("ddpm").runnable
    asked = [Asked(), Asked(count=9), Asked(seed=3), Asked(steps=2)]
    other = replace(runnable, scheduler=diffusers.DDIMScheduler())
    identities = [trajectory(runnable, one).identity for one in asked] + [trajectory(other, Asked()).identity]
    assert len(set(identities)) == 5
    assert all(len(identity) == 64 for identity in identities)


@given(count=st.integers(1, 300), steps=st.integers(1, 60), branches=st.integers(1, 2), least=st.integers(1, 4))
def test_any_count_is_spread_evenly(count: int, steps: int, branches: int, least: int) -> None:
    runs = max(-(-count // (steps * branches)), min(count, least))
    kept = continuous._kept(count, steps, branches, runs)
    assert sum(map(len, kept)) == count
    assert all(kept)
    of_steps = Counter(step for run in kept for step, _ in run)
    of_branches = Counter(branch for run in kept for _, branch in run)
    assert all(count // steps <= of_steps[step] <= math.ceil(count / steps) for step in range(steps))
    assert max(of_branches[branch] for branch in range(branches)) - min(of_branches[b] for b in range(branches)) <= 1


# What diffusers' own pipelines make of the same model and scheduler


def text(width: int = 24, pooled: int = 0, *, masks: bool = False) -> dict[str, Any]:
    """Encoded prompts, as a pipeline takes them."""
    given: dict[str, Any] = {
        "prompt_embeds": torch.ones(1, 77, width),
        "negative_prompt_embeds": torch.ones(1, 77, width),
    }
    if pooled:
        given |= {f"{sign}pooled_prompt_embeds": torch.ones(1, pooled) for sign in ("", "negative_")}
    if masks:
        given |= {f"{sign}prompt_attention_mask": torch.ones(1, 77) for sign in ("", "negative_")}
    return given | {"output_type": "latent"}


def side(pixels: int) -> dict[str, int]:
    return {"height": pixels, "width": pixels}


WHOLE = {"negative_prompt": None, "use_resolution_binning": False}
FLUX_TEXT = {name: value for name, value in text(pooled=20).items() if not name.startswith("negative")}
GIVEN: Mapping[str, dict[str, Any]] = {
    "ddpm": {},
    "sd pndm": text() | side(128),
    "sd ddim v": text() | side(128),
    "sdxl": text(pooled=32) | side(128),
    "sd3": text(pooled=20) | side(64),
    "flux": FLUX_TEXT | side(128),
    "pixart": text(masks=True) | side(64) | WHOLE,
    "sana": text(masks=True) | side(256) | WHOLE,
    "aura": text(masks=True) | side(64),
    "qwen": text() | side(128),
    "wan": text() | side(128) | {"num_frames": 9},
}


def called_by_its_pipeline(small: Small, runnable: Runnable, given: dict[str, Any]) -> list[dict[str, Any]]:
    """The arguments of each call that the pipeline's own class makes of the denoiser."""
    build = getattr(diffusers, small.pipeline)
    known = {small.component: runnable.module, "scheduler": runnable.scheduler, "requires_safety_checker": False}
    parts = {
        p.name: known.get(p.name, None if p.default is p.empty else p.default)
        for p in list(inspect.signature(build.__init__).parameters.values())[1:]
    }
    pipeline, calls = build(**parts), []
    names = list(inspect.signature(runnable.module.forward).parameters)

    def note(_: object, arguments: tuple[object, ...], keywords: dict[str, object]) -> None:
        calls.append(dict(zip(names, arguments, strict=False)) | keywords)

    hook = runnable.module.register_forward_pre_hook(note, with_kwargs=True)
    pipeline.set_progress_bar_config(disable=True)
    pipeline(**given, num_inference_steps=3, generator=torch.Generator().manual_seed(0))
    hook.remove()
    return calls


@pytest.mark.parametrize("name", GIVEN)
def test_times_and_shapes_are_those_of_its_pipeline(name: str, found: Callable[[str], Found]) -> None:
    ours = found(name).samples.calls
    runnable = replace(found(name).runnable, scheduler=copy.deepcopy(found(name).runnable.scheduler))
    theirs = called_by_its_pipeline(PIPELINES[name], runnable, GIVEN[name])
    times = {float(torch.as_tensor(call["timestep"]).flatten()[0]) for call in theirs}
    assert sorted({sample.timestep for sample in ours}) == pytest.approx(sorted(times), rel=1e-5)
    for argument, value in ours[0].keywords.items():
        if isinstance(value, torch.Tensor) and argument != "timestep":
            batched = argument not in {"img_ids", "txt_ids"}
            assert theirs[0][argument].shape[batched:] == value.shape[batched:], argument
            assert theirs[0][argument].dtype == value.dtype, argument


def test_a_trajectory_is_that_of_its_pipeline(tmp_path: Any) -> None:
    """The same noise leads to the same inputs, step by step: sampler, scaling and signs are right."""
    small = replace(PIPELINES["ddpm"], scheduler="DDIMScheduler", pipeline="DDIMPipeline")
    runnable = open_pipeline(small.save(tmp_path))
    ours = trajectory(runnable, Asked()).calls[:3]
    noise = ours[0].keywords["sample"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffusers.pipelines.ddim.pipeline_ddim.randn_tensor", lambda *_, **__: noise)
        theirs = called_by_its_pipeline(small, runnable, {"output_type": "pt"})
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our.keywords["sample"], their["sample"], rtol=1e-4, atol=1e-5)


# What cannot be run


class Unknown(torch.nn.Module):
    """Looks like a model of diffusers and needs an argument that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {"in_channels": 2, "sample_size": 4}

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, phase: torch.Tensor) -> tuple[torch.Tensor]:
        return (sample * timestep * phase,)


def test_an_argument_that_nobody_knows_is_named(found: Callable[[str], Found]) -> None:
    runnable = replace(found("ddpm").runnable, module=Unknown())
    with pytest.raises(QuantizationError, match=r"Unknown.forward cannot be called: phase: .* by a callable"):
        trajectory(runnable, Asked())


def test_a_size_that_no_config_names_is_named(found: Callable[[str], Found]) -> None:
    module = Unknown()
    module.config = {}
    with pytest.raises(QuantizationError, match=r"in_channels: its size is not in the model's config"):
        trajectory(replace(found("ddpm").runnable, module=module), Asked())


def test_a_module_that_takes_no_noisy_sample_is_refused(found: Callable[[str], Found]) -> None:
    module = torch.nn.utils.skip_init(torch.nn.Linear, 2, 2)
    module.config = {"in_channels": 2}
    with pytest.raises(QuantizationError, match=r"none of these arguments is the noisy sample"):
        trajectory(replace(found("ddpm").runnable, module=module), Asked())


def test_without_a_scheduler_there_is_no_trajectory(found: Callable[[str], Found]) -> None:
    with pytest.raises(QuantizationError, match=r"no scheduler .* by a callable"):
        trajectory(replace(found("ddpm").runnable, scheduler=None), Asked())
    with pytest.raises(QuantizationError, match=r"SCMScheduler has a loop of its own"):
        trajectory(replace(found("ddpm").runnable, scheduler=diffusers.SCMScheduler()), Asked())


def test_more_steps_than_the_scheduler_has_are_refused(found: Callable[[str], Found]) -> None:
    with pytest.raises(QuantizationError, match=r"DDPMScheduler refuses 5000 steps: .* ask for fewer"):
        trajectory(found("ddpm").runnable, Asked(steps=5000))


def test_a_model_that_derived_arguments_do_not_fit_is_named(tmp_path: Any) -> None:
    runnable = open_pipeline(PIPELINES["sd pndm"].save(tmp_path))
    runnable.module.register_to_config(cross_attention_dim=23)
    with pytest.raises(QuantizationError, match=r"UNet2DConditionModel cannot be called with sample, timestep, enc"):
        trajectory(runnable, Asked())


def test_an_output_that_is_not_finite_names_the_step(tmp_path: Any) -> None:
    runnable = open_pipeline(PIPELINES["ddpm"].save(tmp_path))
    calls = 0

    def spoil(_: object, __: object, output: Any) -> Any:
        nonlocal calls
        calls += 1
        return (output[0] * math.nan,) if calls > 2 else output

    runnable.module.register_forward_hook(spoil)
    with pytest.raises(QuantizationError, match=r"UNet2DModel: at step 2 of its trajectory, timestep 250, .* finite"):
        trajectory(runnable, Asked(count=1, steps=4))

"""Codes and grids tuned by what the whole model says: true gradients, never worse, the same bytes each time."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import content_of
from torch import nn

from arrow_quant_v2 import ArrowQuantV2, ConfigurationError, DiffusionQuantConfig, QuantizationError
from arrow_quant_v2.calibration.runnable import Runnable
from arrow_quant_v2.calibration.sample import Sample
from arrow_quant_v2.calibration.samples import Asked, gather
from arrow_quant_v2.calibration.transformers_model import open_transformers
from arrow_quant_v2.config import LayerSpec
from arrow_quant_v2.engines.one_core import cores_at_most
from arrow_quant_v2.errors import InterruptedRunError
from arrow_quant_v2.kernels.tensors import dequantized
from arrow_quant_v2.packed import Bits, Grid, Layout, PackedTensor
from arrow_quant_v2.quantizers import quantizer
from arrow_quant_v2.quantizers.basis import Basis
from arrow_quant_v2.quantizers.tunable import Tunable
from arrow_quant_v2.sources.folder import open_model
from arrow_quant_v2.store import StoredModel
from arrow_quant_v2.tuning import Tuner

if TYPE_CHECKING:
    from collections.abc import Iterator

TEXT = Path(__file__).parents[1] / "examples" / "models" / "text"
pytestmark = pytest.mark.usefixtures("calibrating_without_warnings")
api = ArrowQuantV2()
SEVERAL: tuple[Grid, ...] = ("affine", "r2q")  # the grids of rows of several groups


def packed_of(
    weight: torch.Tensor, bits: Bits, grid: Grid = "affine", *, group: int | None = 32, symmetric: bool = False
) -> PackedTensor:
    """A weight (rows, columns) by its weights alone."""
    method = "r2q" if grid == "r2q" else "clip"
    spec = LayerSpec(bits=bits, group_size=group, method=method, symmetric=symmetric)
    layout = Layout(shape=tuple(weight.shape), bits=bits, quant_axis=1, group_size=group)
    return quantizer(method)(weight, spec).packed("weight", "float32", layout.on(grid))


def weight_of(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


# One layer


@settings(deadline=None, max_examples=40)
@given(
    bits=st.sampled_from(get_args(Bits)),
    grid=st.sampled_from(SEVERAL),
    symmetric=st.booleans(),
    columns=st.integers(33, 80),
    seed=st.integers(0, 2**31),
)
def test_one_stored_number_more_changes_the_weight_as_its_gradient_says(
    *, bits: Bits, grid: Grid, symmetric: bool, columns: int, seed: int
) -> None:
    packed = packed_of(weight_of(3, columns, seed), bits, grid, symmetric=symmetric)
    direction = weight_of(3, columns, seed + 1)
    felt = Tunable(packed).felt(direction)
    arrays = [packed.scales] if packed.zero_points is None else [packed.scales, packed.zero_points]
    for gradient, array in zip(felt[:-1], arrays, strict=True):
        place = (seed % array.shape[0], seed % array.shape[1])
        if not 1 <= array[place] <= 254:
            continue
        ends = []
        for step in (-1, 1):
            changed = array.copy()
            changed[place] = int(array[place]) + step
            named = {"scales" if array is packed.scales else "zero_points": changed}
            ends.append(float((dequantized(PackedTensor(**{**vars(packed), **named})) * direction).sum()))
        # exact: weights are linear in a zero point and quadratic in a stored scale
        assert (ends[1] - ends[0]) / 2 == pytest.approx(float(gradient[place]), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("bits", get_args(Bits))
@pytest.mark.parametrize("grid", SEVERAL)
def test_all_codes_from_first_to_last_change_the_weight_as_their_gradient_says(bits: Bits, grid: Grid) -> None:
    packed, direction = packed_of(weight_of(3, 70), bits, grid), weight_of(3, 70, 1)
    ends = [PackedTensor(**{**vars(packed), "codes": packed.codes * 0 + byte}) for byte in (0, 255)]
    change = (dequantized(ends[1]) - dequantized(ends[0])) * direction
    torch.testing.assert_close(Tunable(packed).felt(direction)[-1] * (2**bits - 1), change, rtol=1e-3, atol=1e-4)


def test_gradients_are_felt_through_a_turn_and_scales_of_channels() -> None:
    weight, direction = weight_of(8, 64), weight_of(8, 64, 1)
    equalization = torch.rand(64, generator=torch.Generator().manual_seed(2)) + 0.5
    basis = Basis(channels=64, rotation=32, equalization=equalization)
    plain = packed_of(basis.weight(weight), 4)
    packed = PackedTensor(**{**vars(plain), "rotation": 32, "equalization": equalization.numpy()})
    gradient = Tunable(packed).felt(direction)[0]
    at = tuple(divmod(int(packed.scales.argmin()), packed.scales.shape[1]))  # 255 could not grow
    ends = []
    for step in (-1, 1):
        scales = packed.scales.copy()
        scales[at] = int(scales[at]) + step
        ends.append(float((dequantized(PackedTensor(**{**vars(packed), "scales": scales})) * direction).sum()))
    assert (ends[1] - ends[0]) / 2 == pytest.approx(float(gradient[at]), rel=1e-3)


@pytest.mark.parametrize("grid", SEVERAL)
def test_steps_against_the_gradient_bring_a_weight_closer_by_its_grid_and_by_its_codes(grid: Grid) -> None:
    target = weight_of(16, 128)
    packed = packed_of(weight_of(16, 128) + 0.3 * weight_of(16, 128, 1), 2, grid)
    tunable, errors = Tunable(packed), []
    for step in range(200):
        error = tunable.weight() - target
        errors.append(float(error.square().sum()))
        tunable.move(tunable.felt(2.0 * error), 1.0 - step / 200)
    assert min(errors) < 0.8 * errors[0]  # the best is what is kept: codes may turn to and fro afterwards
    assert (tunable.packed.codes != packed.codes).any()
    assert (tunable.packed.scales != packed.scales).any()


@pytest.mark.parametrize("bits", get_args(Bits))
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_scale_of_a_row_of_one_group_is_felt_as_a_stored_scale_of_255_would_be(
    bits: Bits, *, symmetric: bool
) -> None:
    """The weight is linear in it: d/ds of row_scale (s / 255)^2 is 2 / 255 of the weight."""
    packed, direction = packed_of(weight_of(3, 40), bits, group=None, symmetric=symmetric), weight_of(3, 40, 1)
    felt = Tunable(packed).felt(direction)
    whole = (dequantized(packed) * direction).sum(dim=1, keepdim=True) * (2.0 / 255.0)
    torch.testing.assert_close(felt[0], whole, rtol=1e-4, atol=1e-5)
    assert len(felt) == (2 if symmetric else 3)


@pytest.mark.parametrize("bits", get_args(Bits))
def test_a_row_of_one_group_moves_the_scale_of_its_row_to_where_its_codes_lose_least(bits: Bits) -> None:
    target = weight_of(16, 128)
    packed = packed_of(1.3 * target, bits, group=None, symmetric=True)
    levels = dequantized(packed)
    best = (levels * target).sum(dim=1, keepdim=True) / levels.square().sum(dim=1, keepdim=True)
    least = float((best * levels - target).square().sum())
    tunable, errors = Tunable(packed), []
    for _ in range(400):
        error = tunable.weight() - target
        errors.append(float(error.square().sum()))
        of_scale, of_codes = tunable.felt(2.0 * error)
        tunable.move([of_scale, torch.zeros_like(of_codes)], float(2**bits - 1))
    assert errors[0] > 1.2 * least
    assert min(errors) < 1.02 * least + 2e-3 * errors[0]
    assert (tunable.packed.codes == packed.codes).all()
    assert (tunable.packed.scales == 255).all()
    assert tunable.packed.nbytes == packed.nbytes


def test_the_scale_of_a_row_of_one_group_stays_a_positive_number_however_far_it_is_moved() -> None:
    for sign in (1.0, -1.0):
        tunable = Tunable(packed_of(weight_of(2, 64), 2, group=None, symmetric=True))
        for _ in range(50):
            tunable.move([torch.full((2, 1), sign), torch.zeros(2, 64)], 1e5)
        assert 0.1 < float(tunable.weight().abs().max()) < 100.0


def test_levels_of_the_residual_grid_stay_in_order() -> None:
    tunable = Tunable(packed_of(weight_of(16, 64), 4, "r2q"))
    for _ in range(300):
        scales = torch.from_numpy(tunable.packed.scales)
        against = torch.ones_like(scales, dtype=torch.float32)
        against[:, 1::2] = -1.0  # the second scale grows, the first one shrinks
        tunable.move([against, torch.zeros(16, 2), torch.zeros(16, 64)], 1.0)
    pairs = torch.from_numpy(tunable.packed.scales).long().unflatten(1, (-1, 2))
    assert (pairs[..., 0] ** 2 >= 7 * pairs[..., 1] ** 2).all()


# A real model


def test_a_real_text_model_says_more_of_what_it_said_on_samples_that_were_held_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("arrow_quant_v2.tuning.SAMPLES", 2)
    with cores_at_most(1), open_model(TEXT) as model:
        runnable = open_transformers(model, "text")
        asked = Asked(count=32, tokens=0, seed=0, data=None, callable=None)
        calls = [
            Sample(keywords={name: value[:2] for name, value in call.keywords.items()}, timestep=call.timestep)  # type: ignore[index]  # keywords of text are tensors
            for call in gather(runnable, asked).calls
        ]
        tuner = Tuner(runnable, calls)
        matrices = [info for info in model.source.tensors if len(info.shape) == 2]
        weights = {info.name: model.source.read(info.name).float().reshape(info.shape) for info in matrices}
        layers = {}
        for name, place in tuner.tunable(list(weights)).items():
            layers[place] = [Tunable(packed_of(weights[name], 2, group=64))]
        before = {place: parts[0].packed.codes.copy() for place, parts in layers.items()}
        least: list[float] = []
        tuned = tuner.tune(layers, 40, 0, after_step=lambda _, loss: least.append(loss))
    assert tuned.after < 0.8 * tuned.before
    assert all(later <= earlier for earlier, later in pairwise(least))
    assert any((parts[0].codes != before[place]).any() for place, parts in tuned.layers.items())


# A whole run


class Denoiser(nn.Module):
    """Two blocks, and a buffer of weights that nothing has a gradient of when it is told so."""

    def __init__(self, *, detached: bool = False) -> None:
        super().__init__()
        self.detached = detached
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 96), nn.SiLU(), nn.Linear(96, 64)) for _ in "ab")

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x * t)
        return x.detach() if self.detached else x


def samples(_: nn.Module) -> Iterator[tuple[Any, float]]:
    draw = torch.Generator().manual_seed(0)
    for step in (0.3, 0.6, 0.9) * 8:
        yield (torch.randn(8, 64, generator=draw), torch.tensor(step)), step


def quantize(out: Path, module: nn.Module | None = None, **asked: Any) -> dict[str, Any]:
    given = {"bit_width": 2, "group_size": 32, "modality": "image", "min_accuracy": 0.0, "tuning_steps": 40}
    given["code_sweeps"] = 0  # which leave too little to tune in so small a model
    stop, report = asked.pop("should_stop", bool), asked.pop("report", None)
    config = DiffusionQuantConfig(**(given | {"calibration_samples": 24} | asked))
    return api.quantize_diffusion_model(
        module or Denoiser(), out, config, report, calibration=samples, should_stop=stop
    )


def payloads(out: Path) -> dict[str, PackedTensor]:
    with StoredModel(out) as stored:
        return {n: one for n in stored.names for one in stored.read(n) if isinstance(one, PackedTensor)}


def test_tuning_moves_codes(tmp_path: Path) -> None:
    moved = 0
    for seed in (0, 1, 2):  # which of them ends at a step that has moved some depends on the processor
        one, other = (tmp_path / f"{seed}-{steps}" for steps in (0, 100))
        quantize(one, tuning_steps=0, seed=seed)
        quantize(other, tuning_steps=100, seed=seed)
        before, after = payloads(one), payloads(other)
        moved += sum(int((before[name].codes != after[name].codes).sum()) for name in before)
    assert moved


def test_a_tuned_run_keeps_the_size_and_says_what_it_did(tmp_path: Path) -> None:
    plain, tuned = (quantize(tmp_path / f"{n}", tuning_steps=n) for n in (0, 100))
    assert tuned["bits_per_weight"] == plain["bits_per_weight"]
    one, other = payloads(tmp_path / "0"), payloads(tmp_path / "100")
    assert any((one[name].scales != other[name].scales).any() for name in one)
    told = "100 steps of tuning, loss of outputs on 3 held-out calls"
    assert sum(told in decision.because for decision in tuned["decisions"]) == len(one)
    assert any(told in note for note in tuned["notes"])
    with StoredModel(tmp_path / "100") as stored:
        entry = next(e for e in stored.entries if e.layout is not None)
        assert told in entry.decision
    weight = dict(Denoiser().named_parameters())[entry.layer_name].flatten()
    found = dequantized(other[entry.layer_name]).flatten()
    assert entry.cosine_similarity == pytest.approx(float(torch.cosine_similarity(weight, found, dim=0)), abs=1e-5)


def test_a_tuned_run_of_one_scale_a_row_keeps_the_size_too(tmp_path: Path) -> None:
    asked = {"group_size": None, "symmetric": True, "method": "gptq", "enable_spatial": False}
    plain, tuned = (quantize(tmp_path / f"{n}", tuning_steps=n, **asked) for n in (0, 100))
    assert tuned["bits_per_weight"] == plain["bits_per_weight"]
    one, other = payloads(tmp_path / "0"), payloads(tmp_path / "100")
    assert {tensor.layout.grid for tensor in one.values()} == {"row"}
    assert any((one[name].row_scales != other[name].row_scales).any() for name in one)


def test_equal_runs_give_equal_bytes_whatever_the_threads(tmp_path: Path) -> None:
    for threads in (1, 2):
        quantize(tmp_path / f"{threads}", threads=threads)
    one, other = (content_of(tmp_path / f"{threads}") for threads in (1, 2))
    assert {k: v for k, v in one.items() if k.endswith(".parquet")} == {
        k: v for k, v in other.items() if k.endswith(".parquet")
    }


@pytest.mark.parametrize("moment", ["tuning, step 3 of 40", "judging"])
def test_a_run_that_was_stopped_while_it_was_tuned_ends_with_the_same_bytes(moment: str, tmp_path: Path) -> None:
    quantize(tmp_path / "whole", min_accuracy=0.1)
    told: list[str] = []
    with pytest.raises((InterruptedRunError, KeyboardInterrupt)):
        quantize(tmp_path / "out", min_accuracy=0.1, **stopping_at(moment, told))
    quantize(tmp_path / "out", min_accuracy=0.1, report=lambda message, _: told.append(message))
    whole, out = content_of(tmp_path / "whole"), content_of(tmp_path / "out")
    assert [v for k, v in whole.items() if k.endswith(".parquet")] == [
        v for k, v in out.items() if k.endswith(".parquet")
    ]


def stopping_at(moment: str, told: list[str]) -> dict[str, Any]:
    """A report and a wish to stop: gently while it is tuned, at once afterwards."""

    def report(message: str, _: float) -> None:
        told.append(message)
        if moment in message and moment == "judging":
            raise KeyboardInterrupt

    return {
        "report": report,
        "should_stop": lambda: any("tuning the grids" in one for one in told) and "tuning" in moment,
    }


def test_a_model_without_gradients_stays_as_it_is_and_says_so(tmp_path: Path) -> None:
    result = quantize(tmp_path / "out", Denoiser(detached=True))
    plain = quantize(tmp_path / "plain", Denoiser(detached=True), tuning_steps=0)
    assert any("not tuned, for the model has no gradients" in note for note in result["notes"])
    assert result["bits_per_weight"] == plain["bits_per_weight"]
    assert all(
        (one.scales == other.scales).all()
        for one, other in zip(payloads(tmp_path / "out").values(), payloads(tmp_path / "plain").values(), strict=True)
    )
    with pytest.raises(QuantizationError, match="no gradients"):
        quantize(tmp_path / "strict", Denoiser(detached=True), fail_fast=True)


def test_one_call_is_too_few_to_hold_one_out(tmp_path: Path) -> None:
    result = quantize(tmp_path / "out", calibration_samples=1)
    assert any("one call of the model is too few to tune by" in note for note in result["notes"])
    runnable = Runnable(module=Denoiser(), modality="image", names={})
    with pytest.raises(QuantizationError, match="too few to tune by"):
        Tuner(runnable, [Sample(arguments=(torch.ones(1, 64), torch.tensor(1.0)), timestep=0.5)])


@pytest.mark.parametrize("unseen", [{"enable_calibration": False}, {"method": "clip"}, {"stats": "folder"}])
def test_tuning_by_what_is_not_run_is_refused(unseen: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="so the model is not run"):
        DiffusionQuantConfig(tuning_steps=10, **unseen)

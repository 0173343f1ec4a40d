"""How much rows of inputs count: as gradients tell it, as outputs feel it, and what layers make of it."""

from __future__ import annotations

import json
import sys
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

sys.path.append(str(Path(__file__).parents[1]))

from small_models import content_of, normal
from text_models import save_folder, small_module

from arrow_quant_v2 import ArrowQuantV2, DiffusionQuantConfig
from arrow_quant_v2.calibration.backwards import backwards
from arrow_quant_v2.calibration.collect import MOST_ROWS, kept_rows
from arrow_quant_v2.calibration.felt import Felt
from arrow_quant_v2.calibration.importance import LEAST, Importance, importance
from arrow_quant_v2.calibration.remembered import Memory
from arrow_quant_v2.calibration.runnable import Runnable
from arrow_quant_v2.calibration.sample import Sample
from arrow_quant_v2.calibration.stats import InputStats, Seen, moments_of
from arrow_quant_v2.errors import InterruptedRunError, StoreError
from arrow_quant_v2.kernels.tensors import dequantized
from arrow_quant_v2.store.reader import StoredModel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

CHANNELS, TOKENS = 64, 6


def undrawn(kind: type[nn.Module], *sizes: int, **settings: int) -> Any:
    """A layer whose weights the global generator did not draw."""
    layer: Any = nn.utils.skip_init(kind, *sizes, **settings)
    layer.weight.data.copy_(normal(*layer.weight.shape, seed=len(layer.weight)) * 2)
    layer.bias.data.zero_()
    return layer


class Weighed(nn.Module):
    """Tokens go through two layers, then count as much as they are told to."""

    def __init__(self, say: Tensor) -> None:
        super().__init__()
        self.say = say
        self.first, self.second = undrawn(nn.Linear, CHANNELS, 128), undrawn(nn.Linear, 128, 64)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, channels) -> (batch, tokens, 64)."""
        out: Tensor = self.second(self.first(x).tanh()) * self.say[:, None]
        return out


def opened(module: nn.Module) -> Runnable:
    names = {name: name for name, _ in module.named_parameters()}
    return Runnable(module=module.eval().requires_grad_(requires_grad=False), modality="image", names=names)


def samples(count: int, *shape: int) -> list[Sample]:
    return [Sample(arguments=(normal(1, *shape, seed=seed) * 20,), timestep=0.0) for seed in range(count)]


def test_a_row_counts_by_the_square_of_what_outputs_feel_of_it() -> None:
    say = torch.tensor([1.0, 2.0, 4.0, 1.0, 0.0, 1.0])
    found = importance(opened(Weighed(say)), samples(400, TOKENS, CHANNELS))
    felt = torch.stack(list(found.felt["second.weight"])).mean(dim=0)
    assert (felt / felt[0])[:5].tolist() == pytest.approx([1.0, 4.0, 16.0, 1.0, 0.0], rel=0.2)
    assert float(felt.mean()) == pytest.approx(1.0, rel=1e-3)


def test_what_layers_share_is_the_mean_and_no_row_is_of_no_account() -> None:
    felt = Importance(felt={"q": [torch.tensor([0.0, 2.0])], "k": [torch.tensor([0.0, 4.0])], "v": [torch.ones(3)]})
    assert felt.of(("q", "k"), 0, 2).tolist() == [pytest.approx(LEAST), 3.0]  # type: ignore[union-attr]
    assert felt.of(("q", "v"), 0, 2) is None
    assert felt.of(("q", "unknown"), 0, 2) is None


def test_of_many_rows_those_count_that_stats_keep() -> None:
    felt = torch.arange(1, MOST_ROWS + 101).float()
    kept = kept_rows(len(felt), 7)
    assert kept is not None
    say = Importance(felt={"w": [torch.ones(0)] * 7 + [felt]}).of(("w",), 7, MOST_ROWS)
    assert say is not None
    assert torch.equal(say, felt[kept])


class Places(nn.Module):
    """A convolution of which one place of the picture is looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = undrawn(nn.Conv2d, 3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(1, 3, 4, 5) -> (1, 4)."""
        out: Tensor = self.conv(x)[:, :, 2, 3]
        return out


def test_rows_of_a_convolution_are_the_places_that_its_kernel_visits() -> None:
    found = importance(opened(Places()), samples(3, 3, 4, 5))
    for felt in found.felt["conv.weight"]:
        assert felt.nonzero().flatten().tolist() == [2 * 5 + 3]


class Twice(Weighed):
    """One layer is called twice."""

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, channels) -> (batch, tokens, 64)."""
        out: Tensor = self.second(self.first(x)) + self.second(self.first(-x))
        return out


def test_all_rows_count_alike_for_a_weight_with_several_inputs_in_a_call() -> None:
    found = importance(opened(Twice(torch.ones(TOKENS))), samples(2, TOKENS, CHANNELS))
    assert not found.felt


def test_rows_go_into_h_as_often_as_they_count() -> None:
    rows, say = normal(5, CHANNELS), torch.tensor([1.0, 4.0, 0.25, 1.0, 2.0])
    stats = InputStats(("w",), 1, columns=CHANNELS, channels=CHANNELS)
    stats.add([Seen(rows=rows, moments=moments_of(rows), absmax=rows.abs().amax(dim=0), say=say)], [0], [0.5])
    assert torch.allclose(stats.second.matrix, 0.5 * (rows * say[:, None]).T @ rows, atol=1e-7)


# Going on with what was felt


def stopped_after(calls: int) -> Any:
    def tell(done: int, _: int) -> None:
        if done >= calls:
            raise KeyboardInterrupt

    return tell


def same(one: Importance, other: Importance) -> bool:
    pairs = [zip(rows, other.felt[name], strict=True) for name, rows in one.felt.items()]
    return one.felt.keys() == other.felt.keys() and all(torch.equal(*pair) for pair in chain(*pairs))


def test_what_was_felt_before_a_stop_is_not_asked_for_again_and_the_same_comes_out(tmp_path: Path) -> None:
    model, calls = opened(Weighed(torch.ones(TOKENS))), samples(11, TOKENS, CHANNELS)
    kept, told = Felt(folder=tmp_path, key="this"), list[tuple[int, int]]()
    with pytest.raises(KeyboardInterrupt):
        importance(model, calls, kept=kept, tell=stopped_after(8))
    assert len(list(tmp_path.iterdir())) == 8
    found = importance(model, calls, kept=kept, tell=lambda *numbers: told.append(numbers))
    assert told == [(8, 8), (11, 8)]
    assert same(found, importance(model, calls))
    assert same(importance(model, calls, kept=kept), found)


@pytest.mark.parametrize("damage", [lambda whole: whole[:-1], lambda whole: whole.replace(b"first", b"firsv")])
def test_a_damaged_file_and_all_behind_it_are_asked_for_again(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    model, calls = opened(Weighed(torch.ones(TOKENS))), samples(6, TOKENS, CHANNELS)
    kept, told = Felt(folder=tmp_path, key="this"), list[tuple[int, int]]()
    found = importance(model, calls, kept=kept)
    path = tmp_path / "this-2.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    assert same(importance(model, calls, kept=kept, tell=lambda *numbers: told.append(numbers)), found)
    assert told[0] == (2, 2)


def test_other_calls_other_values_and_another_seed_are_other_answers(tmp_path: Path) -> None:
    calls = samples(2, TOKENS, CHANNELS)
    one = Memory(folder=tmp_path, model=lambda: "this").felt(calls, 0)
    others = [
        Memory(folder=tmp_path, model=lambda: "this").felt(calls, 1),
        Memory(folder=tmp_path, model=lambda: "this").felt(calls[:1], 0),
        Memory(folder=tmp_path, model=lambda: "another").felt(calls, 0),
    ]
    assert one.key not in {other.key for other in others}
    assert one.key == Memory(folder=tmp_path, model=lambda: "this").felt(samples(2, TOKENS, CHANNELS), 0).key


# What layers make of it


def shown(module: nn.Module) -> Iterator[tuple[Tensor, float]]:  # the first two tokens lie in few directions
    for seed in range(24):
        x = normal(4, TOKENS, CHANNELS, seed=seed) * 20
        x[:, :2] = x[:, :2, :8] @ normal(8, CHANNELS, seed=99) * 8
        yield x, (seed + 0.5) / 24


def lost(out: Path, module: nn.Module) -> float:
    """|a - b|^2 / |a|^2 of the outputs, on inputs that nothing was fitted to."""
    with torch.no_grad():
        x = torch.cat([x.roll(1, 0) + normal(*x.shape, seed=7) for x, _ in shown(module)])
        exact = module(x)
        with StoredModel(out) as stored:
            for name in ("first.weight", "second.weight"):
                (packed,) = stored.read(name)
                module.get_parameter(name).copy_(dequantized(packed))  # type: ignore[arg-type]
        return float((module(x) - exact).square().sum() / exact.square().sum())


def test_layers_are_fitted_to_the_tokens_that_outputs_feel(tmp_path: Path) -> None:
    say = torch.tensor([1.0, 1.0, 0.05, 0.05, 0.05, 0.05])
    errors = []
    for enabled in (True, False):
        config = DiffusionQuantConfig(
            bit_width=2, group_size=16, modality="image", method="gptq", min_accuracy=0.0, threads=1,
            enable_calibration=True, enable_spatial=False, enable_importance=enabled,
        )  # fmt: skip
        out = tmp_path / str(enabled)
        ArrowQuantV2().quantize_diffusion_model(Weighed(say), out, config, calibration=shown)
        errors.append(lost(out, Weighed(say)))
    assert errors[0] < 0.8 * errors[1]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many calls gradients were asked for, each time."""
    numbers: list[int] = []

    def counting(runnable: Runnable, calls: list[Sample], *arguments: Any, **settings: Any) -> Any:
        numbers.append(len(calls))
        return backwards(runnable, calls, *arguments, **settings)

    monkeypatch.setattr("arrow_quant_v2.calibration.importance.backwards", counting)
    return numbers


def bert(folder: Path) -> Path:
    module = small_module("BertForMaskedLM", vocab_size=64, hidden_size=32, intermediate_size=64)
    return save_folder(folder, module, mask_token_id=4)


TEN_CALLS = DiffusionQuantConfig(
    group_size=16, min_accuracy=0.0, calibration_samples=40, calibration_tokens=0, enable_calibration=True
)


def test_a_run_that_was_stopped_goes_on_with_what_was_felt(tmp_path: Path, asked: list[int]) -> None:
    model, api = bert(tmp_path / "model"), ArrowQuantV2()
    with pytest.raises(InterruptedRunError, match="stopped after 4 of 10 samples"):
        api.quantize_diffusion_model(model, tmp_path / "out", TEN_CALLS, should_stop=lambda: True)
    for out in ("out", "whole"):
        api.quantize_diffusion_model(model, tmp_path / out, TEN_CALLS)
    assert asked == [10, 6, 10]
    assert content_of(tmp_path / "out") == content_of(tmp_path / "whole")


def test_a_full_disk_costs_nothing_that_was_felt_before(
    tmp_path: Path, asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, api, keep = bert(tmp_path / "model"), ArrowQuantV2(), Felt.keep

    def full(felt: Felt, call: int, rows: Any) -> None:
        if call == 6:
            raise StoreError("No space left on device")
        keep(felt, call, rows)

    with monkeypatch.context() as patched:
        patched.setattr(Felt, "keep", full)
        with pytest.raises(StoreError, match="the same settings go on with it"):
            api.quantize_diffusion_model(model, tmp_path / "out", TEN_CALLS)
    api.quantize_diffusion_model(model, tmp_path / "out", TEN_CALLS)
    assert asked == [10, 4]


def test_what_was_felt_of_a_model_that_was_built_otherwise_is_not_taken(tmp_path: Path, asked: list[int]) -> None:
    model, api = bert(tmp_path / "model"), ArrowQuantV2()
    with pytest.raises(InterruptedRunError):
        api.quantize_diffusion_model(model, tmp_path / "out", TEN_CALLS, should_stop=lambda: True)
    built = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(built | {"hidden_act": "relu"}))
    api.quantize_diffusion_model(model, tmp_path / "out", TEN_CALLS)
    assert asked == [10, 10]


class Opaque(torch.autograd.Function):
    """Has no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """The same again."""
        return x.clone()


class WithoutGradients(Weighed):
    """Its last step cannot be gone back."""

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, channels) -> (batch, tokens, 64)."""
        out: Tensor = Opaque.apply(super().forward(x))
        return out


def test_a_model_without_gradients_is_calibrated_with_all_tokens_alike_and_says_so(tmp_path: Path) -> None:
    config = DiffusionQuantConfig(group_size=16, modality="image", min_accuracy=0.0, enable_calibration=True)
    with pytest.warns(UserWarning, match="all tokens count alike, because gradients tell nothing"):
        result = ArrowQuantV2().quantize_diffusion_model(
            WithoutGradients(torch.ones(TOKENS)), tmp_path / "out", config, calibration=shown
        )
    assert any("all tokens count alike" in note for note in result["notes"])

"""Layers of every kind that products come in are fitted to their inputs, and their outputs are closer for it."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from small_models import content_of
from text_models import save_folder, small_module
from torch import nn

from arrow_quant_v2 import ArrowQuantV2, budget, preparation
from arrow_quant_v2.budget import calibration_bytes
from arrow_quant_v2.config import DiffusionQuantConfig, LayerSpec
from arrow_quant_v2.errors import InterruptedRunError
from arrow_quant_v2.kernels.cpu import threads_per_call
from arrow_quant_v2.kernels.tensors import dequantized
from arrow_quant_v2.one_tensor import dequantize_tensor, quantize_tensor
from arrow_quant_v2.packed import Layout, TensorInfo
from arrow_quant_v2.plan import Calibrated, plan_model, quant_axis
from arrow_quant_v2.quantizers import gptq_factor
from arrow_quant_v2.quantizers.calibrated import Freedom, Weight, loss_of
from arrow_quant_v2.quantizers.parts import fit_in_parts, judged_parts, lost_of
from arrow_quant_v2.sequential import Fitting, fit_in_sequence, sight_of
from arrow_quant_v2.store import StoredModel
from arrow_quant_v2.time_groups import TimeGroups

sys.path.append(str(Path(__file__).parent / "calibration"))

from small_blocks import made, random, samples_of

from arrow_quant_v2.calibration.blocks import walking
from arrow_quant_v2.calibration.observe import observe_block, strata
from arrow_quant_v2.calibration.stats import InputStats
from arrow_quant_v2.calibration.stored_stats import write_input

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from arrow_quant_v2.quantizers.calibrated import Sight
    from arrow_quant_v2.sequential import CalibratedLayer

GROUPS = TimeGroups(edges=(0.0, 4.0, 8.0))
Inputs = tuple[Any, ...]


@dataclass(frozen=True)
class Kind:
    """A module, what it is called with, and the weights that are of the kind."""

    make: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]
    weights: tuple[str, ...]


def correlated(*shape: int, seed: int) -> Tensor:
    """Some directions of the last axis are a hundred times as strong as others."""
    columns = shape[-1]
    mixed = random(columns, columns, seed=77) / columns**0.5
    return random(*shape, seed=seed) * torch.logspace(0.5, -1.5, columns) @ mixed * 3.0


def rows(*shape: int) -> Callable[[int], Inputs]:
    return lambda seed: (correlated(*shape, seed=seed),)


def images(*shape: int) -> Callable[[int], Inputs]:
    """Channels are correlated as the last axis is; (batch, channels, *places)."""
    return lambda seed: (correlated(shape[0], *shape[2:], shape[1], seed=seed).movedim(-1, 1).contiguous(),)


def conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D  # noqa: PLC0415 - takes seconds

    layer = Conv1D(48, 64)
    nn.init.normal_(layer.weight, std=0.1)
    return layer


class Gpt2Mlp(nn.Module):
    """The feed-forward part of GPT-2 as transformers has it."""

    def __init__(self) -> None:
        from transformers import GPT2Config  # noqa: PLC0415
        from transformers.models.gpt2.modeling_gpt2 import GPT2MLP  # noqa: PLC0415

        super().__init__()
        self.mlp = GPT2MLP(128, GPT2Config(n_embd=64))
        for part in (self.mlp.c_fc, self.mlp.c_proj):
            nn.init.normal_(part.weight, std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


class Attending(nn.Module):
    """Attention to something else: query, and key and value, are multiplied with parts of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return self.attention(x, other, other, need_weights=False)[0]


def experts(implementation: str, count: int = 4) -> nn.Module:
    from transformers import Qwen3MoeConfig  # noqa: PLC0415
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock  # noqa: PLC0415

    config = Qwen3MoeConfig(hidden_size=64, num_experts=count, num_experts_per_tok=2, moe_intermediate_size=48)
    config._experts_implementation = implementation
    block = Qwen3MoeSparseMoeBlock(config)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.15)
    return block


def diffusion_gemma_experts(count: int = 4, chosen: int = 2) -> nn.Module:
    from transformers.models.diffusion_gemma import modeling_diffusion_gemma as diffusion_gemma  # noqa: PLC0415

    sizes = {"hidden_size": 64, "num_experts": count, "top_k_experts": chosen, "moe_intermediate_size": 48}
    config = diffusion_gemma.DiffusionGemmaTextConfig(**sizes)
    config._experts_implementation = "grouped_mm"
    found = diffusion_gemma.DiffusionGemmaTextExperts(config)
    for parameter in found.parameters():
        nn.init.normal_(parameter, std=0.15)
    return found


def routed(seed: int) -> Inputs:
    """Tokens, the two experts of each, and their say; each expert is given tokens of its own range."""
    draw = torch.Generator().manual_seed(seed)
    chosen = torch.rand(96, 4, generator=draw).argsort(dim=1)[:, :2]
    say = torch.rand(96, 2, generator=draw)
    return correlated(96, 64, seed=seed) * (1.0 + chosen[:, :1]), chosen, say


def glu_convolution() -> nn.Module:
    from diffusers.models.transformers.sana_transformer import GLUMBConv  # noqa: PLC0415

    return GLUMBConv(32, 32, expand_ratio=2)


def upsample() -> nn.Module:
    from diffusers.models.upsampling import Upsample2D  # noqa: PLC0415

    return Upsample2D(48, use_conv_transpose=True, out_channels=32)


EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
KINDS = {
    "Conv1D": Kind(conv1d, rows(2, 40, 64), ("weight",)),
    "GPT-2": Kind(Gpt2Mlp, rows(2, 40, 64), ("mlp.c_fc.weight", "mlp.c_proj.weight")),
    "grouped": Kind(lambda: nn.Conv2d(64, 64, 3, groups=2, padding=1), images(2, 64, 8, 8), ("weight",)),
    "grouped in one axis": Kind(lambda: nn.Conv1d(64, 32, 3, groups=4), images(2, 64, 40), ("weight",)),
    "depthwise, diffusers": Kind(glu_convolution, images(2, 32, 8, 8), ("conv_depth.weight",)),
    "transposed": Kind(lambda: nn.ConvTranspose2d(64, 32, 2, stride=2), images(2, 64, 8, 8), ("weight",)),
    "transposed, overlapping": Kind(upsample, images(2, 48, 8, 8), ("conv.weight",)),
    "transposed and grouped": Kind(
        lambda: nn.ConvTranspose1d(64, 32, 4, stride=2, groups=2), images(2, 64, 40), ("weight",)
    ),
    "attention to something else": Kind(
        Attending,
        lambda seed: (correlated(2, 40, 64, seed=seed), correlated(2, 30, 64, seed=seed + 500)),
        ("attention.in_proj_weight",),
    ),
    "experts, grouped": Kind(lambda: experts("grouped_mm"), rows(2, 96, 64), EXPERTS),
    "experts, one by one": Kind(lambda: experts("eager"), rows(2, 96, 64), EXPERTS),
    "experts of DiffusionGemma": Kind(diffusion_gemma_experts, routed, ("gate_up_proj", "down_proj")),
}


def fit(module: nn.Module, calls: Sequence[Inputs], names: Sequence[str], **asked: Any) -> dict[str, CalibratedLayer]:
    """The weights of these names at 2 bits, in the module and as they were kept."""
    parameters = {name: dict(module.named_parameters())[name] for name in names}
    infos = [TensorInfo(name=n, shape=tuple(p.shape), dtype="float32") for n, p in parameters.items()]
    config = DiffusionQuantConfig(bit_width=2, group_size=32)
    plans = plan_model(infos, config, Calibrated(names=frozenset(names), method=asked.pop("method", "gptq")))
    original = {name: p.clone() for name, p in parameters.items()}
    kept: dict[str, CalibratedLayer] = {}
    settings: dict[str, Any] = {
        "plans": {plan.tensor.name: plan for plan in plans},
        "groups": GROUPS,
        "freedom": Freedom(),
        "time_aware": True,
        "shown": "samples of noise",
        "values": lambda plan: original[plan.tensor.name].reshape(-1, plan.layout.columns),
        "finished": lambda _: None,
        "keep": lambda layer: kept.update({layer.plan.tensor.name: layer}),
    }
    with walking(module, samples_of(*calls), parameters) as walk:
        fit_in_sequence(walk, Fitting(**(settings | asked)))
    return kept


def plainly(module: nn.Module, names: Sequence[str]) -> nn.Module:
    """The same weights at 2 bits, by themselves."""
    spec = LayerSpec(bits=2, group_size=32, method="clip", symmetric=False)
    parameters = dict(module.named_parameters())
    for name in names:
        parameters[name].copy_(dequantize_tensor(quantize_tensor(parameters[name], name, spec, "group")))
    return module


def error(module: nn.Module, original: nn.Module, inputs: Callable[[int], Inputs]) -> float:
    """On inputs that were not seen."""
    calls = [inputs(seed) for seed in range(90, 96)]
    pairs = [(module(*call), original(*call)) for call in calls]
    return float(sum((one - other).square().sum() for one, other in pairs))


@pytest.mark.parametrize("method", ["gptq", "r2q"])
@pytest.mark.parametrize("name", KINDS)
def test_outputs_are_closer_than_from_the_weights_alone(name: str, method: str) -> None:
    """A row of a depthwise kernel has but nine weights, which four levels fit about as well by themselves."""
    kind = KINDS[name]
    original, module = made(kind.make), made(kind.make)
    layers = fit(module, [kind.inputs(seed) for seed in range(8)], kind.weights, method=method)
    assert set(layers) == set(kind.weights)
    assert all("calibrated on samples of noise" in layer.decision.because for layer in layers.values())
    assert {layer.decision.kind for layer in layers.values()} == {"quantized"}
    assert all(0.0 < error < 0.7 for layer in layers.values() for error in layer.output_error)
    alone = plainly(made(kind.make), kind.weights)
    least = 1.0 if "depthwise" in name else 0.75
    assert error(module, original, kind.inputs) < least * error(alone, original, kind.inputs)


def test_stored_codes_are_what_the_module_has() -> None:
    for kind in KINDS.values():
        module = made(kind.make)
        layers = fit(module, [kind.inputs(seed) for seed in range(2)], kind.weights, strength=0.5)
        for name, layer in layers.items():
            parameter = dict(module.named_parameters())[name]
            assert layer.packed.layout.shape == tuple(parameter.shape)
            torch.testing.assert_close(parameter.reshape(len(layer.packed.codes), -1), dequantized(layer.packed))


def test_neither_threads_nor_their_number_change_a_byte() -> None:
    for name in ("transposed and grouped", "experts, grouped", "attention to something else"):
        kind, found = KINDS[name], []
        for threads in (1, 3):
            before = threads_per_call.set(threads)
            layers = fit(made(kind.make), [kind.inputs(seed) for seed in range(4)], kind.weights)
            threads_per_call.reset(before)
            found.append([(one.packed.codes.tobytes(), one.packed.scales.tobytes()) for one in layers.values()])
        assert found[0] == found[1]


def test_experts_that_few_tokens_reach_are_fitted_to_those_of_all_or_by_their_weights_alone() -> None:
    """Of 16 experts one is given all tokens but three, one three, and the others none."""

    def few(seed: int) -> Inputs:
        chosen = torch.full((200, 1), 5)
        chosen[:3] = 7
        return correlated(200, 64, seed=seed), chosen, torch.ones(200, 1)

    def make() -> nn.Module:
        return diffusion_gemma_experts(count=16, chosen=1)

    original, module, alone = (made(make) for _ in range(3))
    with pytest.warns(UserWarning, match="too few tokens"):
        layers = fit(module, [few(0)], ("gate_up_proj", "down_proj"))
    for layer in layers.values():
        assert layer.decision.kind == "fallback"
        told, every = layer.decision.because, layer.packed.layout.rows
        of_all = (
            f"{every // 16} of its {every} rows to the inputs of all, {every // 16 * 14} of its {every} rows by their"
        )
        assert f"too few tokens: {of_all}" in told or f"{every // 16 * 15} of its {every} rows by their weights" in told
    plainly(alone, ("gate_up_proj", "down_proj"))
    assert error(module, original, few) < 0.75 * error(alone, original, few)
    x = correlated(50, 64, seed=3), torch.full((50, 1), 11), torch.ones(50, 1)  # an expert that no token reached
    lost = [float((one(*x) - original(*x)).square().sum()) for one in (module, alone)]
    assert lost[0] < 1.2 * lost[1]


def test_parts_that_overlap_are_fitted_to_what_all_of_them_are_given() -> None:
    class Overlapping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(0.1 * random(48, 64))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight[:32]) + nn.functional.linear(2.0 * x, self.weight[16:])

    inputs = rows(2, 96, 64)
    original, module, alone = (made(Overlapping) for _ in range(3))
    fit(module, [inputs(seed) for seed in range(4)], ("weight",))
    plainly(alone, ("weight",))
    assert error(module, original, inputs) < 0.75 * error(alone, original, inputs)


@pytest.mark.parametrize("name", KINDS)
def test_some_of_a_weight_tells_what_all_of_it_would_lose(name: str) -> None:
    kind = KINDS[name]
    module = made(kind.make)
    calls = samples_of(*(kind.inputs(seed) for seed in range(4)))
    parameters = {one: dict(module.named_parameters())[one] for one in kind.weights}
    with walking(module, calls, parameters) as walk:
        seen = observe_block(walk, 0, range(4), strata(calls, GROUPS))
    for (layer,), stats in seen.items():
        sight, told = sight_of(stats), {}
        for bits in (2, 4):
            weight = asked_for(layer, parameters[layer], bits)
            told[bits] = lost_of(judged_parts(weight, sight, Freedom(refits=0)))[0]
            (fitted,) = fit_in_parts([weight], sight, Freedom(refits=0))
            lost = outputs_lost(fitted.left, sight) / outputs_lost(weight.values, sight)
            assert told[bits] == pytest.approx(lost, rel=0.5)
        assert told[4] < 0.5 * told[2]


def asked_for(name: str, values: Tensor, bits: int) -> Weight:
    spec = LayerSpec(bits=bits, group_size=32, method="gptq", symmetric=False)
    info = TensorInfo(name=name, shape=tuple(values.shape), dtype="float32")
    layout = Layout(shape=info.shape, bits=bits, quant_axis=quant_axis(info.shape), group_size=32, grid=spec.grid)
    return Weight(values=values.reshape(-1, layout.columns), info=info, layout=layout, spec=spec)


def outputs_lost(matrix: Tensor, sight: Sight) -> float:
    """tr(dW H dW^T), each part with its own H."""
    parts = sight.parts or {(0, len(matrix)): sight}
    rows = {part: matrix[slice(*part)] for part in parts}
    return sum(loss_of(one.mT if sight.transposed else one, parts[part].hessian) for part, one in rows.items())


@pytest.mark.parametrize("name", KINDS)
def test_stats_that_were_kept_are_what_was_seen(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    module, calls = made(kind.make), samples_of(*(kind.inputs(seed) for seed in range(4)))
    parameters = {one: dict(module.named_parameters())[one] for one in kind.weights}
    with walking(module, calls, parameters) as walk:
        (seen,) = (observe_block(walk, block, range(4), strata(calls, GROUPS)) for block in range(len(walk.blocks)))
    for number, (layers, stats) in enumerate(seen.items()):
        assert stats is not None
        write_input(tmp_path, number, None, stats)
        again = InputStats.of(layers, load_file(tmp_path / f"{number:05d}.safetensors"), transposed=stats.transposed)
        assert_same_sight(sight_of(again), sight_of(stats))
        assert bool(stats.parts) == (name not in WHOLE)


WHOLE = {"Conv1D", "GPT-2", "transposed", "transposed, overlapping"}


def assert_same_sight(one: Sight, other: Sight) -> None:
    assert torch.equal(one.hessian, other.hessian)
    assert torch.equal(one.absmax, other.absmax)
    assert (one.count, one.transposed, set(one.parts)) == (other.count, other.transposed, set(other.parts))
    for part, own in one.parts.items():
        assert_same_sight(own, other.parts[part])


# Whole models


def token_calls(module: nn.Module) -> Iterator[tuple[Any, float]]:
    size = module.get_input_embeddings().num_embeddings
    for seed in range(6):
        draw = torch.Generator().manual_seed(seed)
        yield {"input_ids": torch.randint(0, size, (1, 24), generator=draw)}, seed / 6.0


WIDE = {"hidden_size": 64, "head_dim": 32, "num_key_value_heads": 2, "vocab_size": 64, "num_hidden_layers": 2}
MODELS = {
    "GPT2Model": (
        {"hidden_size": 64, "vocab_size": 64},
        r"\.(c_attn|c_proj|c_fc)\.weight",
        8,
    ),
    "Qwen3MoeForCausalLM": (
        WIDE | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
        r"experts\.\w+_proj$",
        4,
    ),
}


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = MODELS[request.param][0]
    return save_folder(tmp_path_factory.mktemp(request.param) / request.param, small_module(request.param, **settings))


def settings_of(**more: Any) -> DiffusionQuantConfig:
    common = {"bit_width": 2, "group_size": 32, "enable_calibration": True, "threads": 2, "min_accuracy": 0.0}
    return DiffusionQuantConfig(**(common | {"calibration_samples": 6, "calibration_tokens": 0} | more))


def said_of(out: Path, pattern: str) -> list[str]:
    with StoredModel(out) as stored:
        return [one.decision for one in stored.entries if re.search(pattern, one.layer_name)]


def test_a_whole_model_is_calibrated_and_goes_on_where_it_was_stopped(folder: Path, tmp_path: Path) -> None:
    _, pattern, count = MODELS[folder.name]
    api = ArrowQuantV2()
    api.quantize_diffusion_model(folder, tmp_path / "whole", settings_of(), calibration=token_calls)
    said = said_of(tmp_path / "whole", pattern)
    assert len(said) == count
    assert all("calibrated on 6 samples" in one and "not calibrated" not in one for one in said)
    answers = iter([False, False, True])
    with pytest.raises(InterruptedRunError):
        api.quantize_diffusion_model(
            folder, tmp_path / "stopped", settings_of(), calibration=token_calls, should_stop=lambda: next(answers)
        )
    api.quantize_diffusion_model(folder, tmp_path / "stopped", settings_of(), calibration=token_calls)
    assert content_of(tmp_path / "stopped") == content_of(tmp_path / "whole")


def test_experts_that_are_computed_from_copies_of_their_weights_are_calibrated_all_the_same(tmp_path: Path) -> None:
    block = made(lambda: experts("batched_mm"))
    config = settings_of(modality="text")

    def shown(_: nn.Module) -> Iterator[tuple[Any, float]]:
        yield from ((correlated(1, 96, 64, seed=seed), seed / 6.0) for seed in range(6))

    ArrowQuantV2().quantize_diffusion_model(block, tmp_path / "out", config, calibration=shown)
    said = said_of(tmp_path / "out", "experts")
    assert len(said) == 2
    assert all("calibrated on 6 samples" in one and "not calibrated" not in one for one in said)
    assert block.experts.config._experts_implementation == "batched_mm"  # what the user gave stays as it is


def test_weights_that_are_read_on_demand_give_the_same_bytes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = ArrowQuantV2()
    api.quantize_diffusion_model(folder, tmp_path / "memory", settings_of(), calibration=token_calls)
    monkeypatch.setattr(preparation, "available_bytes", lambda: 0)
    told = api.quantize_diffusion_model(folder, tmp_path / "disk", settings_of(), calibration=token_calls)
    assert any("read from disk block by block" in note for note in told["notes"])
    assert content_of(tmp_path / "disk") == content_of(tmp_path / "memory")


@pytest.mark.parametrize("bits", [3.2, 5.0])
def test_a_size_is_kept_and_bits_are_spent_by_what_outputs_lose(folder: Path, tmp_path: Path, bits: float) -> None:
    _, pattern, count = MODELS[folder.name]
    sized = settings_of(bit_width=4, target_bits=bits)
    result = ArrowQuantV2().quantize_diffusion_model(folder, tmp_path / "sized", sized, calibration=token_calls)
    assert result["bits_per_weight"] <= bits
    said = said_of(tmp_path / "sized", pattern)
    assert len(said) == count
    assert all("told from" not in one and "calibrated on 6 samples" in one for one in said)  # from the model's outputs


def test_bits_are_spent_alike_where_weights_are_read_on_demand(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api, sized = ArrowQuantV2(), settings_of(bit_width=4, target_bits=3.2, whole_plans=1)
    api.quantize_diffusion_model(folder, tmp_path / "memory", sized, calibration=token_calls)
    monkeypatch.setattr(preparation, "available_bytes", lambda: 0)
    api.quantize_diffusion_model(folder, tmp_path / "disk", sized, calibration=token_calls)
    assert content_of(tmp_path / "disk") == content_of(tmp_path / "memory")


@pytest.mark.parametrize("compact", [False, True])
def test_stats_hold_inputs_of_every_kind(folder: Path, tmp_path: Path, compact: bool) -> None:
    api, pattern = ArrowQuantV2(), MODELS[folder.name][1]
    api.calibrate(folder, tmp_path / "stats", settings_of(), calibration=token_calls, compact=compact)
    for name, asked in (("out", {}), ("sized", {"target_bits": 4.0, "bit_width": 4})):
        config = settings_of(stats=str(tmp_path / "stats"), **asked)
        result = api.quantize_diffusion_model(folder, tmp_path / name, config)
        said = said_of(tmp_path / name, pattern)
        assert all("calibrated on stats stats (6 samples of a function of the user's own)" in one for one in said)
        assert result["bits_per_weight"] <= 4.0


def test_layers_fitted_to_stats_are_those_fitted_to_the_same_inputs(tmp_path: Path) -> None:
    """Of a layer alone nothing comes before it whose errors it could make up for."""
    kind, api = KINDS["transposed"], ArrowQuantV2()

    def shown(_: nn.Module) -> Iterator[tuple[Any, float]]:
        yield from ((kind.inputs(seed), seed / 6.0) for seed in range(6))

    module = nn.Sequential(made(kind.make))
    config = settings_of(modality="image", enable_spatial=False)
    api.calibrate(module, tmp_path / "stats", config, calibration=shown)
    api.quantize_diffusion_model(module, tmp_path / "at once", config, calibration=shown)
    api.quantize_diffusion_model(module, tmp_path / "later", config.replace(stats=str(tmp_path / "stats")))
    codes = []
    for name in ("at once", "later"):
        with StoredModel(tmp_path / name) as stored:
            codes.append([chunk.codes.tobytes() for chunk in stored.read("0.weight")])
    assert codes[0] == codes[1]


def test_memory_is_foretold_with_an_h_for_each_expert_and_no_more() -> None:
    shapes = {"experts": (64, 96, 512), "head": (512, 512)}
    infos = [TensorInfo(name=name, shape=shape, dtype="float32") for name, shape in shapes.items()]
    plans = plan_model(infos, settings_of())
    both, head = (calibration_bytes(plans, frozenset(names), equalized=False) for names in (shapes, ("head",)))
    weights = 4 * (2 + 8) * 64 * 96 * 512
    assert 4 * 64 * 512**2 <= both - head <= 4 * 64 * 512**2 + weights + 2**26


def test_memory_is_foretold_with_what_a_sweep_over_large_groups_needs() -> None:
    wide = TensorInfo(name="wide", shape=(512, 4096), dtype="float32")
    narrow, half, whole = (
        calibration_bytes(plan_model([wide], settings_of(group_size=size)), frozenset({"wide"}), equalized=False)
        for size in (64, 2048, None)
    )
    assert whole - narrow == pytest.approx(4 * (9 * 512 * (4096 - 64) + 4096**2 - 512**2), abs=2**24)
    assert half - narrow == pytest.approx(4 * (9 * 512 * (2048 - 64) + 2048**2 - 512**2), abs=2**24)
    assert budget.SWEPT == gptq_factor.SWEPT

"""Bits spent by a size: never more than it, where they matter, the same ones after a kill, and people's word obeyed."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from real_models import minilm_states
from runs_with_a_size import CALIBRATED, KILLED, SMALL
from small_models import Run, content_of, layers, run_python, save_model
from text_models import save_folder, small_module
from torch import Tensor, nn

from arrow_quant_v2 import ArrowQuantV2, ConfigurationError, DiffusionQuantConfig, losses
from arrow_quant_v2.allocation import LayerLoss, Scope, allocate, forethought, reach
from arrow_quant_v2.calibration.transformers_model import open_transformers
from arrow_quant_v2.layer_widths import Form, LayerWidth
from arrow_quant_v2.packed import TensorInfo
from arrow_quant_v2.plan import NOTHING_CALIBRATED, Calibrated, forms_apart, likely_calibrated, plans_by_form
from arrow_quant_v2.sources.folder import open_model
from arrow_quant_v2.store import StoredModel
from arrow_quant_v2.whole_plans import Spent, WholePlan, kept_plans, whole_plans

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from arrow_quant_v2.config import Method, Modality

api = ArrowQuantV2()
MINILM = {"group_size": 64, "keep": ("*embeddings*", "pooler*"), "min_accuracy": 0.0}
TEXTS = [
    f"The {one} {other} before the {last}."
    for one, other, last in zip(
        ("ferry leaves the harbour", "bread rises slowly", "letters were opened", "compiler turns words into code",
         "snow fell all night", "bank raised its rates", "clock was repaired", "bacteria share genes",
         "violin was played", "rain is expected", "list was sorted", "train stopped at the bridge"),
        ("at seven", "in a cold kitchen", "by nobody at all", "line by line", "without a sound", "twice as fast",
         "with a hairpin", "among strangers", "in the old house", "in the north", "for no good reason", "for hours"),
        ("storm", "dinner", "funeral", "deadline", "thaw", "election", "auction", "antibiotics", "concert", "harvest",
         "meeting", "strike"),
        strict=True,
    )
]  # fmt: skip


def scope(shapes: dict[str, tuple[int, ...]], modality: Modality = "text", **asked: Any) -> Scope:
    infos = [TensorInfo(name=name, shape=shape, dtype="float16") for name, shape in shapes.items()]
    calibrated = Calibrated(names=frozenset(shapes)) if modality == "image" else NOTHING_CALIBRATED
    config = DiffusionQuantConfig(**asked)
    return Scope(tensors=infos, config=config, modality=modality, component="", calibrated=calibrated)


COARSE = Form(2, 256), Form(4, 256)  # of groups of 128, as they are asked for
FORMS = (Form(2), Form(4), Form(8), Form(16), *COARSE)


def losses_at(two: float, four: float, eight: float, coarse: float = 1.25) -> dict[Form, float]:
    """What a layer loses at each width, and how many times as much in groups of twice as many columns."""
    of_groups = {Form(2, size): coarse * two for size in (128, 256)} | {
        Form(4, size): coarse * four for size in (128, 256)
    }
    return {Form(2): two, Form(4): four, Form(8): eight} | of_groups


shape_tables = st.dictionaries(
    st.text("abcdef", min_size=1, max_size=6),
    st.tuples(st.integers(1, 6).map(lambda n: 64 * n), st.integers(4, 40).map(lambda n: 8 * n)),
    min_size=1,
    max_size=8,
)


@settings(max_examples=40, deadline=None)
@given(
    shapes=shape_tables,
    share=st.floats(0, 1),
    seed=st.integers(0, 99),
    files=st.booleans(),
    modality=st.sampled_from(["text", "image"]),
)
def test_a_size_is_never_passed(
    shapes: dict[str, tuple[int, ...]], share: float, seed: int, files: bool, modality: Modality
) -> None:
    possible = reach(scope(shapes, modality, target_bits=3.0))
    low, high = possible.smallest_bits, possible.largest_bits
    asked: dict[str, Any] = {"target_bits": min(high, 1e-9 + low + share * (high - low))}
    if files:
        low, high = possible.smallest_bytes, possible.largest_bytes - 100
        asked = {"target_size": round(low + 100 + share * (high - low))}  # the size itself is text as well
    draw = torch.Generator().manual_seed(seed)
    measured, own = (
        {
            name: LayerLoss(
                at=dict(zip(FORMS, sorted(torch.rand(len(FORMS), generator=draw).tolist())[::-1], strict=True)),
                equalized_with=(name,) if torch.rand(1, generator=draw) < 0.5 else (),
            )
            for name in shapes
        }
        for _ in range(2)
    )
    whole = scope(shapes, modality, **asked)
    for one in whole_plans(whole, measured, own):
        plans = whole.plans(one.widths)
        stored = sum(map(whole.stored, plans))
        assert stored * 8 <= asked.get("target_bits", 99) * sum(plan.tensor.numel for plan in plans), one.way
        assert whole.files(plans) <= asked.get("target_size", float("inf")), one.way


def test_bits_go_where_the_loss_is_and_the_reason_says_so() -> None:
    shapes = dict.fromkeys(("calm", "wild", "blind"), (256, 256))
    asked = scope(shapes, target_bits=4.5)
    table = {
        "calm": LayerLoss(at=losses_at(0.01, 0.001, 0.0)),
        "wild": LayerLoss(at=losses_at(0.98, 0.06, 0.0)),
        "blind": LayerLoss(at=losses_at(0.01, 0.001, 0.0), told="weights"),
    }
    widths = allocate(asked, table)
    assert {name: one.bits for name, one in widths.items()} == {"calm": 2, "wild": 8, "blind": 2}
    plans = {plan.tensor.name: str(plan.decision) for plan in asked.plans(widths)}
    assert plans["wild"] == "int8: g128 clip as asked, 98 % of the model's loss at int2, target 4.5 bits"
    assert plans["blind"].endswith("1 % of the model's loss at int2, told from its weights alone, target 4.5 bits")


def test_larger_groups_are_chosen_where_they_lose_little_and_the_reason_says_so() -> None:
    shapes = dict.fromkeys(("calm", "wild"), (256, 512))
    table = {
        "calm": LayerLoss(at=losses_at(0.01, 0.001, 0.0, coarse=1.01)),
        "wild": LayerLoss(at=losses_at(0.99, 0.06, 0.0, coarse=3.0)),
    }
    asked = scope(shapes, target_bits=3.125)  # groups of 128 at 2 and 4 bits take 2.16 and 4.16
    plans = {plan.tensor.name: plan for plan in asked.plans(allocate(asked, table))}
    assert {name: (plan.spec.bits, plan.spec.group_size) for name, plan in plans.items() if plan.spec} == {
        "calm": (2, 256), "wild": (4, 128),
    }  # fmt: skip
    assert str(plans["calm"].decision).startswith("int2: g256 clip as chosen, 1 % of the model's loss at int2")
    assert str(plans["wild"].decision).startswith("int4: g128 clip as asked, 99 % of the model's loss at int2")


@pytest.mark.parametrize(
    ("method", "modality", "forms"),
    [
        (None, "text", {"int2 g64 r2q", "int2 g64 gptq", "int2 g128 gptq"}),
        (None, "image", {"int2 g64 gptq", "int2 g128 gptq"}),
        ("r2q", "text", {"int2 g64 r2q", "int2 g128 r2q"}),
        ("gptq", "text", {"int2 g64 gptq", "int2 g128 gptq"}),
        ("rtn", "text", {"int2 g64 rtn", "int2 g128 rtn"}),
    ],
)
def test_fewer_parameters_may_be_chosen_but_no_grid_that_people_did_not_ask_for(
    method: Method | None, modality: Modality, forms: set[str]
) -> None:
    config = DiffusionQuantConfig(target_bits=3.0, group_size=64, method=method, enable_calibration=True)
    info = TensorInfo(name="wide", shape=(64, 256), dtype="float32")
    plans = plans_by_form([info], config, likely_calibrated([info], config, modality))
    every = [plans[form]["wide"] for form in forms_apart(plans, "wide")]
    assert {str(plan.spec) for plan in every if plan.spec is not None and plan.spec.bits == 2} == forms
    assert [form.bits for form in forms_apart(plans, "wide")[:4]] == [2, 4, 8, 16]


@pytest.mark.parametrize(("columns", "group"), [(64, 64), (256, None), (256, 65_536)])
def test_groups_are_not_larger_than_a_row_or_than_may_be_asked(columns: int, group: int | None) -> None:
    info = TensorInfo(name="narrow", shape=(256, columns), dtype="float32")
    plans = plans_by_form([info], DiffusionQuantConfig(target_bits=3.0, group_size=group))
    assert forms_apart(plans, "narrow") == (Form(2), Form(4), Form(8), Form(16))


def test_room_for_scales_of_channels_is_kept_where_they_were_worth_it() -> None:
    shapes = {"scaled": (64, 256), "plain": (64, 256)}
    at = losses_at(1.0, 0.1, 0.0)
    table = {name: LayerLoss(at=at, equalized_with=(name,) if name == "scaled" else ()) for name in shapes}
    asked = scope(shapes, "image", target_bits=6.0, group_size=64)
    plans = {plan.tensor.name: plan for plan in asked.plans(allocate(asked, table))}
    assert {name: plan.spec.equalize for name, plan in plans.items() if plan.spec} == {"scaled": True, "plain": False}
    assert asked.stored(plans["scaled"]) == plans["scaled"].stored_bytes + 4 * 256
    assert asked.stored(plans["plain"]) == plans["plain"].stored_bytes


def test_the_smallest_size_has_no_scales_of_channels_and_can_be_asked_for() -> None:
    shapes = {"scaled": (64, 256)}
    smallest = reach(scope(shapes, "image", target_bits=3.0)).smallest_bits
    assert smallest == reach(scope(shapes, "text", target_bits=3.0)).smallest_bits
    asked = scope(shapes, "image", target_bits=smallest)
    widths = allocate(asked, {"scaled": LayerLoss(at=losses_at(1.0, 0.1, 0.0), equalized_with=("scaled",))})
    assert (widths["scaled"].bits, widths["scaled"].equalize) == (2, False)


def test_scales_of_channels_make_room_input_by_input_the_least_lossy_first() -> None:
    shapes = dict.fromkeys(("query", "key", "out"), (64, 256))
    together = ("query", "key")
    table = {
        "query": LayerLoss(at=losses_at(0.4, 0.1, 0.0), equalized_with=together),
        "key": LayerLoss(at=losses_at(0.3, 0.1, 0.0), equalized_with=together),
        "out": LayerLoss(at=losses_at(0.6, 0.1, 0.0), equalized_with=("out",)),
    }
    smallest = reach(scope(shapes, "image", target_bits=3.0)).smallest_bits
    room = 8 * 4 * 256 / (64 * 256)  # bits per weight of a layer that its scales take
    found = {}
    for scaled in (3, 2, 1):
        asked = scope(shapes, "image", target_bits=smallest + 1e-9 + scaled * room / 3)
        found[scaled] = {name for name, one in allocate(asked, table).items() if one.equalize}
    assert found == {3: {"query", "key", "out"}, 2: {"query", "key"}, 1: set()}


# A real model


def texts(folder: Path) -> str:
    (folder / "texts.txt").write_text("\n".join(TEXTS))
    return str(folder / "texts.txt")


def cosine(original: Path, out: Path, folder: Path) -> float:
    """Of the states of tokens of texts that calibration did not see."""
    api.convert(out, folder)
    states = []
    for path in (original, folder):
        with open_model(path) as model:
            runnable = open_transformers(model, "text")
        states.append(minilm_states(runnable.module, runnable.tokenizer, HELD_OUT)["token cosine"])
    return float(torch.nn.functional.cosine_similarity(*states, dim=-1).mean())


HELD_OUT = (
    "The violin was older than the house it was kept in.",
    "Heavy rain is expected in the north until Thursday.",
    "Sorting a list twice gives the same list.",
    "Whoever arrives first opens the windows and makes coffee.",
)


def test_minilm_at_3_bits_is_closer_than_one_width_of_the_same_size(minilm: Path, tmp_path: Path) -> None:
    shown = {"enable_calibration": True, "calibration_data": texts(tmp_path), "calibration_tokens": 0, "method": "gptq"}
    asked = {
        "uniform": MINILM | shown | {"bit_width": 2, "group_size": 16},
        "allocated": MINILM | shown | {"target_bits": 3.0, "whole_plans": 1},
    }
    found = {}
    for name, own in asked.items():
        result = api.quantize_diffusion_model(minilm, tmp_path / name, DiffusionQuantConfig(**own, grid_refits=0))
        found[name] = result["bits_per_weight"], cosine(minilm, tmp_path / name, tmp_path / f"{name}-again")
    assert found["allocated"][0] <= 3.0 <= found["uniform"][0]
    assert found["allocated"][1] > found["uniform"][1] + 0.005


def test_a_size_of_files_is_met_within_one_percent_and_foretold(
    minilm: Path, tmp_path: Path, arrow_quant: Callable[..., Run]
) -> None:
    doctor = json.loads(arrow_quant("doctor", minilm, "--target-size", "9MB", "--json").out)
    quick = ("--min-accuracy", 0, "-q", "--json")
    ran = arrow_quant("quantize", minilm, tmp_path / "out", "--target-size", "9MB", *quick)
    assert ran.code == 0, ran.err
    size = json.loads(ran.out)["model_size_mb"]
    assert 8.91 < size <= 9.0
    assert doctor["predicted_size_mb"] == pytest.approx(size, rel=0.01)
    assert doctor["reach"]["smallest_mb"] < 9.0 < doctor["reach"]["largest_mb"]
    widths = json.loads(ran.out)["bit_widths"]
    assert sum(widths.values()) == json.loads(ran.out)["quantized_layers"]
    assert len(widths) > 1
    reasons = [x["decision"] for x in api.inspect(tmp_path / "out")["layers"] if x["method"]]
    assert all("told from its weights alone, target 9.000 MB" in reason for reason in reasons)


# Going on, overruling, refusing


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    module = small_module("BertForMaskedLM", hidden_size=64, intermediate_size=128, num_hidden_layers=1)
    return save_folder(tmp_path_factory.mktemp("bert"), module, mask_token_id=4)


def test_a_killed_run_goes_on_with_the_same_widths(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    config = DiffusionQuantConfig(**SMALL)
    result = api.quantize_diffusion_model(bert, tmp_path / "whole", config, lambda message, _: said.append(message))
    assert len(result["bit_widths"]) > 1
    assert any(re.match(r"measuring what \d+ layers lose", message) for message in said)
    killed = run_python(
        KILLED, bert, tmp_path / "out", json.dumps(SMALL), r"3/\d+ calibrated", timeout=300, **CALIBRATED
    )
    assert killed.code == -signal.SIGKILL, killed.err
    assert (tmp_path / "out.partial" / "allocation.json").exists()
    monkeypatch.setattr(losses, "sensitivity", None)  # nothing is measured again
    api.quantize_diffusion_model(bert, tmp_path / "out", config)
    assert content_of(tmp_path / "out") == content_of(tmp_path / "whole")


def test_a_table_and_the_outputs_are_measured(bert: Path, tmp_path: Path) -> None:
    api.quantize_diffusion_model(bert, tmp_path / "out", DiffusionQuantConfig(**SMALL))
    found = {x["layer_name"]: x["decision"] for x in api.inspect(tmp_path / "out")["layers"]}
    for name in ("bert.embeddings.word_embeddings.weight", "bert.encoder.layer.0.output.dense.weight"):
        assert re.search(r"% of the model's loss at int2, target 4 bits", found[name])


class Three(nn.Module):
    """Three layers, between which a model does something that gradients do not pass."""

    def __init__(self, between: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor] = Tensor.clone) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(64, 64) for _ in range(3))
        self.between, self.after = between, after

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.after(self.third(self.between(self.second(self.first(x).relu()))))


class Unwatched(Three):
    @torch.no_grad()
    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return super().forward(x, timestep)


@torch.library.custom_op("arrow_quant_tests::doubled", mutates_args=())
def _doubled(x: Tensor) -> Tensor:
    return 2.0 * x


def through_an_operator(x: Tensor) -> Tensor:
    return _doubled(x)  # which itself cannot be copied with its module


def through_numpy(x: Tensor) -> Tensor:
    return torch.from_numpy(2.0 * x.numpy())


def noise(_: nn.Module) -> Iterator[tuple[Any, float]]:
    for seed in range(6):
        draw = torch.Generator().manual_seed(seed)
        yield {"x": torch.randn(16, 64, generator=draw), "timestep": torch.tensor(seed / 6)}, seed / 6


NOISY: dict[str, Any] = {
    "target_bits": 4.4, "group_size": 32, "modality": "image", "enable_calibration": True, "min_accuracy": 0.0,
}  # fmt: skip
WITHOUT_GRADIENTS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "an operator without autograd": (lambda: Three(through_an_operator), "no autograd formula was registered"),
    "a detour through numpy": (lambda: Three(through_numpy), "Can't call numpy"),
    "token ids instead of floats": (lambda: Three(Tensor.clone, Tensor.long), "no tensor of floating-point numbers"),
    "a forward that is never watched": (lambda: Unwatched(Tensor.clone), "runs without gradients"),
}


@pytest.mark.filterwarnings("ignore:bits are spent", "ignore:all tokens count alike")
@pytest.mark.parametrize("kind", WITHOUT_GRADIENTS)
def test_where_gradients_tell_nothing_each_layers_own_outputs_do(kind: str, tmp_path: Path) -> None:
    make, because = WITHOUT_GRADIENTS[kind]
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        module = make()
    with torch.no_grad():
        module.second.weight[:, 5] *= 40.0  # far from the others: two bits would lose these
    config = DiffusionQuantConfig(enable_spatial=False, enable_rotation=False, **NOISY)
    result = api.quantize_diffusion_model(module, tmp_path / "out", config, calibration=noise)
    assert any(because in note for note in result["notes"])
    layers = {one.layer_name: one for one in result["decisions"] if one.method}
    assert all("told from its own outputs" in one.because for one in layers.values())
    assert layers["second.weight"].got in {"int4", "int8"}
    assert result["bits_per_weight"] <= 4.4


def test_channels_are_equalized_where_a_size_has_room_for_it_and_nowhere_else(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        module = Three(Tensor.clone)

    def uneven(_: nn.Module) -> Iterator[tuple[Any, float]]:
        for inputs, at in noise(module):
            inputs["x"][:, ::7] *= 300.0  # of the first layer alone
            yield inputs, at

    asked = NOISY | {"enable_rotation": False, "method": "gptq"}
    stored = {}
    for bits in (2.55, 5.0):
        config = DiffusionQuantConfig(**asked | {"target_bits": bits})
        result = api.quantize_diffusion_model(module, tmp_path / f"{bits}", config, calibration=uneven)
        assert result["bits_per_weight"] <= bits
        with StoredModel(tmp_path / f"{bits}") as model:
            stored[bits] = {one.layer_name for one in model.entries if one.equalization is not None}
    assert stored == {2.55: set(), 5.0: {"first.weight"}}


def test_what_measuring_noted_is_told_by_the_run_that_goes_on_too(tmp_path: Path) -> None:
    path = tmp_path / "allocation.json"
    widths = {
        "a": LayerWidth(bits=4, because="so", equalize=False, group_size=128, affine=True),
        "b": LayerWidth(bits=16, because="or so"),
    }
    plans = (WholePlan(way="one", widths=widths, lost=0.5), WholePlan(way="other", widths=widths))
    spent, other = Spent(plans=plans, notes=("some layers have no gradients",)), Spent(plans=plans[:1])
    assert kept_plans(path, lambda: spent) == spent
    assert kept_plans(path, lambda: other) == spent
    path.write_text('{"a": [4, "so", false]}', encoding="utf-8")
    assert kept_plans(path, lambda: other) == other


@pytest.mark.filterwarnings("ignore:bits are spent", "ignore:all tokens count alike")
def test_a_run_killed_while_it_wrote_its_widths_goes_on(tmp_path: Path) -> None:
    unfinished = tmp_path / "out.partial"
    unfinished.mkdir()
    (unfinished / "allocation.json.tmp").write_text('{"widths": {"fir', encoding="utf-8")
    config = DiffusionQuantConfig(**NOISY)
    result = api.quantize_diffusion_model(Unwatched(Tensor.clone), tmp_path / "out", config, calibration=noise)
    assert any("runs without gradients" in note for note in result["notes"])
    assert not unfinished.exists()


def test_what_gradients_do_not_reach_is_told_from_its_own_outputs(tmp_path: Path) -> None:
    config = DiffusionQuantConfig(**NOISY)
    result = api.quantize_diffusion_model(Three(Tensor.detach), tmp_path / "out", config, calibration=noise)
    told = {one.layer_name: "told from its own outputs" in one.because for one in result["decisions"] if one.method}
    assert told == {"first.weight": True, "second.weight": True, "third.weight": False}
    assert not any("gradients" in note for note in result["notes"])


def test_stats_spend_bits_by_what_each_layers_own_outputs_lose(bert: Path, tmp_path: Path) -> None:
    common = {"group_size": 16, "min_accuracy": 0.0, "enable_calibration": True, "calibration_tokens": 0}
    api.calibrate(bert, tmp_path / "stats", DiffusionQuantConfig(calibration_samples=6, **common))
    config = DiffusionQuantConfig(target_bits=4.0, stats=str(tmp_path / "stats"), **common)
    result = api.quantize_diffusion_model(bert, tmp_path / "out", config)
    assert 3.6 < result["bits_per_weight"] <= 4.0
    assert len(result["bit_widths"]) > 1
    assert any("stats do not tell what the model's outputs lose" in note for note in result["notes"])
    said = {one.layer_name: one.because for one in result["decisions"] if one.method}
    fitted = {name: told for name, told in said.items() if "calibrated on stats" in told}
    assert len(fitted) > 5
    assert all("told from its own outputs" in told for told in fitted.values())
    assert all("told from its weights alone" in told for name, told in said.items() if name not in fitted)


def test_people_overrule_what_is_measured(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", layers(6))
    config = DiffusionQuantConfig(
        target_bits=4.0, group_size=32, min_accuracy=0.0, layer_bit_widths={"layers.00": 8},
        sensitive_layer_patterns=[r"\.05\."], skip_sensitive_layers=True,
    )  # fmt: skip
    result = api.quantize_diffusion_model(model, tmp_path / "out", config)
    got = {one.layer_name: one.got for one in result["decisions"]}
    assert (got["layers.00.weight"], got["layers.05.weight"]) == ("int8", "float32")
    assert result["bits_per_weight"] <= 4.0


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"target_bits": 2.0}, r"target_bits is 2; the layers of this model can take 2\.\d+ to 32\.00 bits per weight"),
        ({"target_bits": 33.0}, r"target_bits is 33; .* it fits already"),
        ({"target_size": "3kB"}, r"target_size is 0\.003 MB; the weight files of this model can take 0\.\d+ MB to "),
        ({"target_size": "1GB"}, r"target_size is 1\.000 GB; .* it fits already"),
    ],
)
def test_what_is_out_of_reach_is_refused_before_any_work(asked: dict[str, Any], said: str, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", layers(6))
    config = DiffusionQuantConfig(**asked)
    with pytest.raises(ConfigurationError, match=said):
        api.quantize_diffusion_model(model, tmp_path / "out", config)
    with pytest.raises(ConfigurationError, match=said):
        api.doctor(model, config)
    assert not list(tmp_path.glob("out*"))


def test_two_sizes_contradict_each_other(tmp_path: Path, arrow_quant: Callable[..., Run]) -> None:
    model = save_model(tmp_path / "model", layers(2))
    for asked in (("--bits", 2, "--target-bits", 3), ("--target-size", "3GB", "--target-bits", 3)):
        refused = arrow_quant("quantize", model, tmp_path / "out", *asked)
        assert refused.code == 2
        assert "which contradict each other; leave one of them out" in refused.err
    config = DiffusionQuantConfig.from_profile("edge", target_bits=3.0)
    assert config.replace(threads=1).target_bits == 3.0
    assert DiffusionQuantConfig.from_yaml_text(config.to_yaml()) == config


def test_the_size_before_measuring_is_about_right() -> None:
    asked = scope({f"layer{n}": (64 * n, 256) for n in range(1, 9)}, target_bits=3.3, group_size=64)
    plans = asked.plans(forethought(asked))
    stored, weights = (sum(x) for x in zip(*((p.stored_bytes, p.tensor.numel) for p in plans), strict=True))
    assert 3.2 < 8 * stored / weights <= 3.3


@pytest.mark.filterwarnings("ignore:.*weight cosine .* is below min_accuracy")
def test_what_the_page_shows_runs(minilm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "minilm").symlink_to(minilm)
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[1] / "docs" / "allocation.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    exec(compile(code, "allocation.md", "exec"), names := {"__name__": "allocation"})
    assert 2.9 < names["result"]["bits_per_weight"] <= 3.0

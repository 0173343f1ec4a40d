"""Widths that are not enough, and methods that fail: what comes instead, what is said, and what stays an error."""

from __future__ import annotations

import json
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_models import content_of, layers, save_model

from arrow_quant_v2 import ArrowQuantV2, ConfigurationError, DiffusionQuantConfig, QuantizationError
from arrow_quant_v2 import layers as layers_room
from arrow_quant_v2.errors import BarMissedError
from arrow_quant_v2.fallback import Bar
from arrow_quant_v2.store import StoredModel

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

api = ArrowQuantV2()


@pytest.fixture
def _told() -> Iterator[None]:
    """Fallbacks warn; what they say is looked at where it matters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def quantize(model: Path, out: Path, **asked: object) -> dict[str, Any]:
    return api.quantize_diffusion_model(model, out, DiffusionQuantConfig(**{"group_size": 64, "threads": 1, **asked}))


def decisions(folder: Path) -> dict[str, str]:
    with StoredModel(folder) as stored:
        return {one.layer_name: one.decision for one in stored.entries}


def one_is_hard(count: int = 4) -> dict[str, torch.Tensor]:
    """Layers of which the second one is harder than the others: its weights are squares of normal ones."""
    tensors = layers(count)
    tensors["layers.01.weight"] *= 20.0 * tensors["layers.01.weight"].abs()
    return tensors


# The bar


def test_a_width_that_was_not_asked_for_has_a_bar_of_its_own() -> None:
    bar = Bar(min_accuracy=0.7)
    assert [bar.at(bits, asked=2) for bits in (2, 4, 8)] == [0.7, 0.85, 0.95]
    assert [bar.at(bits, asked=4) for bits in (4, 8)] == [0.7, 0.95]
    assert bar.at(8, asked=8) == 0.7


@given(accuracy=st.floats(0.0, 1.0), bits=st.sampled_from([2, 4, 8]), asked=st.sampled_from([2, 4, 8]))
def test_no_bar_is_ever_relaxed(accuracy: float, bits: int, asked: int) -> None:
    assert Bar(min_accuracy=accuracy).at(bits, asked) >= accuracy


# Weights alone: every layer for itself


def test_none_falls_back_when_the_bar_is_met(tmp_path: Path) -> None:
    """Any warning is an error here."""
    result = quantize(save_model(tmp_path / "model"), tmp_path / "out", bit_width=2, min_accuracy=0.93)
    assert (result["bit_width"], result["bit_widths"], result["passed"]) == (2, {2: 12}, True)
    assert (result["fallbacks_per_method"], result["fallback_rate_per_method"]) == ({}, {"clip": 0.0})


def test_int2_becomes_int4_in_the_layer_that_misses_the_bar_alone(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", one_is_hard())
    told = r"layers\.01\.weight: int4 clip: weight cosine 0\.9\d+ at int2 is below 0\.93"
    with pytest.warns(UserWarning, match=told):
        result = quantize(model, tmp_path / "out", bit_width=2, min_accuracy=0.93)
    assert (result["bit_width"], result["bit_widths"], result["passed"]) == (2, {2: 3, 4: 1}, True)
    assert (result["fallbacks_per_method"], result["fallback_rate_per_method"]) == ({"clip": 1}, {"clip": 0.25})
    said = decisions(tmp_path / "out")
    assert said["layers.01.weight"].startswith("fallback as int4 instead of int2: g64 clip as asked, ")
    assert said["layers.01.weight"].endswith("; weight cosine 0.90873 at int2 is below 0.93")
    assert said["layers.00.weight"] == "int2: g64 clip as asked, the last group of a row has 32 columns"
    summary = json.loads((tmp_path / "out" / "metadata.json").read_text())
    assert summary["bit_widths"] == {"2": 3, "4": 1}
    assert summary["fallbacks"] == {"layers.01.weight": said["layers.01.weight"]}
    assert (summary["fallbacks_per_method"], summary["fallback_rate_per_method"]) == ({"clip": 1}, {"clip": 0.25})


@pytest.mark.usefixtures("_told")
def test_int4_becomes_int8(tmp_path: Path) -> None:
    result = quantize(save_model(tmp_path / "model", one_is_hard()), tmp_path / "out", bit_width=4, min_accuracy=0.995)
    assert (result["bit_widths"], result["passed"]) == ({4: 3, 8: 1}, True)


@pytest.mark.usefixtures("_told")
def test_the_whole_chain_is_gone_and_told(tmp_path: Path) -> None:
    result = quantize(save_model(tmp_path / "model"), tmp_path / "out", bit_width=2, min_accuracy=0.999)
    assert (result["bit_width"], result["bit_widths"], result["passed"]) == (2, {8: 12}, True)
    said = decisions(tmp_path / "out")["layers.00.weight"]
    assert said.startswith("fallback as int8 instead of int2: g64 clip as asked")
    assert "weight cosine 0.94" in said
    assert "at int2 is below 0.999; weight cosine 0.99" in said
    assert said.endswith("at int4 is below 0.999")


@pytest.mark.usefixtures("_told")
def test_the_whole_model_gets_more_bits_where_that_is_asked(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", one_is_hard())
    result = quantize(model, tmp_path / "out", bit_width=2, min_accuracy=0.93, fallback="model")
    assert (result["bit_widths"], result["passed"]) == ({4: 4}, True)
    said = decisions(tmp_path / "out")
    assert all("layers.01.weight: weight cosine 0.90873 at int2" in said[f"layers.0{n}.weight"] for n in range(4))


@pytest.mark.usefixtures("_told")
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_miss_at_int8_ends_the_run(bits: int, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    told = r"layers\.00\.weight: weight cosine 0\.9999\d* at int8 is below 1; use smaller"
    with pytest.raises(BarMissedError, match=told):
        quantize(model, tmp_path / "out", bit_width=bits, min_accuracy=1.0)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_fail_fast_raises_at_any_width(bits: int, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    with pytest.raises(QuantizationError, match=rf"layers\.00\.weight: weight cosine .* at int{bits} is below 1"):
        quantize(model, tmp_path / "out", bit_width=bits, min_accuracy=1.0, fail_fast=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_width_given_by_name_stays_and_the_verdict_says_so(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", one_is_hard())
    with pytest.warns(UserWarning, match=r"layers\.01\.weight: weight cosine 0\.9\d+ at int2 is below 0\.93"):
        result = quantize(
            model, tmp_path / "out", bit_width=2, min_accuracy=0.93, layer_bit_widths={"layers.01.weight": 2}
        )
    assert (result["bit_widths"], result["passed"]) == ({2: 4}, False)
    assert "stays below its bar: weight cosine 0.9" in decisions(tmp_path / "out")["layers.01.weight"]


@pytest.mark.parametrize(
    "settings", [{"fallback": "all"}, {"fallback": None}, {"min_accuracy": 1.5}, {"bit_width": 3}, {"fail_fast": 1}]
)
def test_what_makes_no_sense_is_refused_before_any_work(settings: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=f"{next(iter(settings))} is .*; allowed: "):
        quantize(tmp_path / "no model", tmp_path / "out", **settings)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("_told")
@pytest.mark.parametrize("modality", ["text", "code", "image", "audio"])
def test_modality_stays_what_it_is(modality: str, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", one_is_hard())
    result = quantize(model, tmp_path / "out", bit_width=2, min_accuracy=0.93, modality=modality)
    assert (result["modality"], result["bit_widths"]) == (modality, {2: 3, 4: 1})
    with StoredModel(tmp_path / "out") as stored:
        assert {one.modality for one in stored.entries} == {modality}


# Methods that fail


METHODS = ("r2q", "clip", "rtn")


@pytest.mark.usefixtures("_told")
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    method=st.sampled_from(METHODS),
    failing=st.sets(st.tuples(st.sampled_from(METHODS), st.sampled_from([2, 4, 8])), max_size=9),
    fail_fast=st.booleans(),
)
def test_no_method_that_fails_loses_the_run(
    method: str, failing: set[tuple[str, int]], fail_fast: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever fails at whatever width: every layer is there, and those that are not as asked say what failed."""
    folder = tmp_path_factory.mktemp("failing")
    model = save_model(folder / "model", layers(2, 32, 64))
    asked = {"bit_width": 2, "method": method, "min_accuracy": 0.0, "modality": "image", "fail_fast": fail_fast}
    with pytest.MonkeyPatch.context() as patch:
        fail(patch, failing)
        if fail_fast and (method, 2) in failing:
            with pytest.raises(QuantizationError, match="injected"):
                quantize(model, folder / "out", **asked)
            return
        result = quantize(model, folder / "out", **asked)
    order = [(one, bits) for bits in (2, 4, 8) for one in chain(method)]
    expected = next((step for step in order if step not in failing), None)
    for decision in result["decisions"]:
        if decision.layer_name.endswith(".weight"):
            assert (decision.method, decision.got) == (
                (None, "float32") if expected is None else (expected[0], f"int{expected[1]}")
            )
            assert (decision.kind == "fallback") == ((method, 2) in failing)
            assert ("injected" in decision.because) == ((method, 2) in failing)


def chain(method: str) -> list[str]:
    """A method, and the simpler ones behind it."""
    return list(METHODS[METHODS.index(method) :])


def fail(patch: pytest.MonkeyPatch, failing: set[tuple[str, int]]) -> None:
    """Let methods fail at some widths."""
    found = layers_room.quantizer

    def injured(method: str) -> Any:
        real = found(method)

        def quantized(weight: torch.Tensor, spec: Any) -> Any:
            if (method, spec.bits) in failing:
                raise QuantizationError("injected")
            return real(weight, spec)

        return quantized

    patch.setattr(layers_room, "quantizer", injured)


def test_a_weight_that_is_not_finite_stays_an_error(tmp_path: Path) -> None:
    tensors = layers(2)
    tensors["layers.01.weight"][3, 5] = torch.nan
    with pytest.raises(QuantizationError, match=r"layers\.01\.weight: the value at \[3, 5\] is nan"):
        quantize(save_model(tmp_path / "model", tensors), tmp_path / "out", bit_width=2)


# Going on


@pytest.mark.usefixtures("_told")
@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_run_with_fallbacks_that_was_stopped_ends_with_the_same_bytes(after: int, tmp_path: Path) -> None:
    model, asked = save_model(tmp_path / "model", one_is_hard()), {"bit_width": 2, "min_accuracy": 0.93}
    whole = quantize(model, tmp_path / "whole", **asked)
    answers = iter([False] * (2 * after - 1) + [True] * 9)
    config = DiffusionQuantConfig(**{"group_size": 64, "threads": 1, **asked})
    with pytest.raises(Exception, match="stopped after"):
        api.quantize_diffusion_model(model, tmp_path / "out", config, should_stop=lambda: next(answers))
    again = quantize(model, tmp_path / "out", **asked)
    assert content_of(tmp_path / "out") == content_of(tmp_path / "whole")
    assert again["decisions"] == whole["decisions"]
    assert again["fallbacks_per_method"] == {"clip": 1}

"""Everything that is found out about two models: text, pictures, sounds, live modules, and what cannot be run."""

from __future__ import annotations

import io
import json
import math
import warnings
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from PIL import Image
from small_models import save_model
from small_pipelines import PIPELINES
from text_models import SPECIAL, WORDS, save_bert, save_folder, small_module

from arrow_quant_v2 import ArrowQuantV2, ConfigurationError, DiffusionQuantConfig
from arrow_quant_v2.calibration import chance, remembered
from arrow_quant_v2.errors import SourceError, ValidationError
from arrow_quant_v2.runtime.spectrogram import Spectrogram
from arrow_quant_v2.validation import judge
from arrow_quant_v2.validation.judge import Heard, Wish, find_out, gather

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from arrow_quant_v2.calibration.runnable import Runnable
    from arrow_quant_v2.calibration.sample import Samples
    from arrow_quant_v2.calibration.samples import Asked
    from arrow_quant_v2.validation.findings import Findings

api = ArrowQuantV2()


def quantized(model: Any, out: Path, bits: int, **settings: Any) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of weight cosines below the bar
        api.quantize_diffusion_model(model, out, DiffusionQuantConfig(bit_width=bits, group_size=8, **settings))
    return out


def figures(found: Findings) -> dict[str, float | None]:
    return {metric.name: metric.value for metric in found.metrics}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return PIPELINES["dit"].save(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bert(tmp_path_factory.mktemp("masked"), "BertForMaskedLM", words=WORDS)


@pytest.fixture(autouse=True)
def _untouched_torch() -> Iterator[None]:
    torch.manual_seed(99)
    before = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_neither_the_bar_nor_validate_sees_what_layers_were_fitted_to_nor_what_the_other_sees(
    masked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def noted(runnable: Runnable, question: Asked) -> Samples:
        asked.append(question.seed)
        return gather(runnable, question)

    monkeypatch.setattr(remembered, "gather", noted)
    monkeypatch.setattr(judge, "gather", noted)
    last = 2**63 - 1
    config = {"enable_calibration": True, "calibration_samples": 4, "calibration_tokens": 0, "min_accuracy": 0.01}
    out = quantized(masked, tmp_path / "out", 8, seed=last, **config)
    find_out(masked, out, Wish(count=4, pairs=0))
    assert len(set(asked)) == 3
    assert asked == [last, chance.held_out(last, chance.JUDGING), chance.held_out(last, chance.VALIDATION)]
    assert all(0 <= seed < 2**63 for seed in asked)


def test_pictures_of_more_bits_are_closer(tmp_path: Path) -> None:
    original = PIPELINES["ddpm"].save(tmp_path / "original")
    wish = Wish(count=8, steps=4, pairs=1)
    told: list[tuple[str, float]] = []
    outs = {bits: quantized(original, tmp_path / f"int{bits}", bits) for bits in (2, 8)}
    found = {bits: find_out(original, out, wish, lambda *said: told.append(said)) for bits, out in outs.items()}
    low, high = (figures(found[bits]) for bits in (2, 8))
    for name in ("output cosine", "PSNR", "SSIM", "latent SQNR"):
        assert (low[name] or 0.0) < (high[name] or math.inf), name
    assert (low["latent error"] or 0.0) > 10 * (high["latent error"] or 0.0)
    assert found[8].accuracy > 0.999
    assert found[8].metric.startswith("output cosine")
    (pair,) = found[8].samples
    assert isinstance(pair.quantized, bytes)
    with Image.open(io.BytesIO(pair.quantized)) as picture:
        assert (picture.format, picture.size) == ("PNG", (16, 16))
    assert [step.timestep for step in found[8].steps] == sorted(step.timestep for step in found[8].steps)
    assert sum(step.samples for step in found[8].steps) == 8
    fractions = [fraction for _, fraction in told[len(told) // 2 + 1 :]]
    assert fractions[-1] == 1.0
    assert any("comparing outputs" in message for message, _ in told)


def test_every_quantized_layer_has_errors_of_its_own_in_each_time_group(pictures: Path, tmp_path: Path) -> None:
    found = find_out(pictures, quantized(pictures, tmp_path / "int4", 4), Wish(count=8, steps=4, pairs=0))
    layers = [layer for layer in found.layers if layer.quant_type == "int4" and len(layer.shape) > 1]
    seen = [layer for layer in layers if layer.output_error is not None]
    assert len(seen) == 4
    assert {len(layer.output_error or ()) for layer in seen} == {len(found.time_groups)}
    assert all(0.0 < error < 0.1 for layer in seen for error in layer.output_error or () if not math.isnan(error))
    kept = [layer for layer in found.layers if layer.decision.startswith("kept") and layer.output_error is not None]
    assert {error for layer in kept for error in layer.output_error or () if not math.isnan(error)} <= {0.0}
    assert all(0.95 < (layer.output_cosine or 0.0) < 1.0 for layer in seen)


def test_sounds_are_compared_as_sounds(tmp_path: Path) -> None:
    dance = PIPELINES["dance"]
    original = replace(dance, config=dance.config | {"sample_rate": 8000}).save(tmp_path / "original")
    found = find_out(original, quantized(original, tmp_path / "int8", 8), Wish(count=4, steps=3, pairs=1))
    got = figures(found)
    assert got["SNR"] > 10.0
    assert 0.0 <= got["log-mel distance"] < 10.0
    assert found.samples[0].kind == "audio"
    assert found.samples[0].original[:4] == b"RIFF"


def test_pictures_that_are_sounds_are_compared_as_sounds(tmp_path: Path) -> None:
    PIPELINES["ddpm"].save(tmp_path / "original")
    shown = Spectrogram(rate=8000, bands=16, window=320, size=512, hop=128, range=60.0)
    (tmp_path / "original" / "spectrogram.json").write_text(json.dumps(shown.json()))
    copy = quantized(tmp_path / "original", tmp_path / "int8", 8)
    found = find_out(tmp_path / "original", copy, Wish(count=4, steps=3, pairs=1))
    assert (found.samples[0].kind, found.samples[0].quantized[:4]) == ("audio", b"RIFF")
    assert {"SNR", "log-mel distance"} <= set(figures(found))
    assert "PSNR" not in figures(found)


def test_a_masked_text_model_is_judged_by_losses_and_by_what_it_writes(masked: Path, tmp_path: Path) -> None:
    words = [*SPECIAL, *WORDS]
    small = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "bos_token_id": 2, "eos_token_id": 3}
    judge = save_folder(tmp_path / "judge", small_module("GPT2LMHeadModel", **small))
    (judge / "vocab.txt").write_text("\n".join(words) + "\n")
    (judge / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    found = {
        bits: find_out(masked, quantized(masked, tmp_path / f"int{bits}", bits), Wish(count=8, judge=judge))
        for bits in (2, 8)
    }
    low, high = figures(found[2]), figures(found[8])
    assert low["KL at masked tokens"] > 10 * high["KL at masked tokens"] >= 0.0
    assert low["agreement of decoded tokens"] < high["agreement of decoded tokens"] <= 1.0
    losses = {metric.name: metric for metric in found[8].metrics if metric.unit == "nats/token"}
    assert {"NLL at 15% masked", "NLL at 50% masked", "NLL at 85% masked", "NELBO"} < set(losses)
    assert losses["NELBO"].value == pytest.approx(losses["NELBO"].original, rel=0.05)
    assert high["perplexity under judge"] > 1.0
    (first, second) = found[8].samples
    assert first.original != second.original
    assert set(str(first.original).split()) <= set(WORDS)


def test_the_same_wish_finds_the_same(masked: Path, tmp_path: Path) -> None:
    out = quantized(masked, tmp_path / "int4", 4)
    one, other = (find_out(masked, out, Wish(count=4)) for _ in range(2))
    assert one.metrics == other.metrics
    assert one.steps == other.steps
    assert one.layers == other.layers
    assert find_out(masked, out, Wish(count=4, seed=5)).metrics != one.metrics


def test_an_original_says_the_same_once_to_several(masked: Path, tmp_path: Path, monkeypatch) -> None:
    outs = [quantized(masked, tmp_path / f"int{bits}", bits) for bits in (8, 4)]
    alone = [find_out(masked, out, Wish(count=4, pairs=1)) for out in outs]
    asked: list[object] = []
    monkeypatch.setattr(judge, "gather", lambda *given: asked.append(given) or gather(*given))
    heard = Heard()
    together = [find_out(masked, out, Wish(count=4, pairs=1), heard=heard) for out in outs]
    assert len(asked) == 1
    assert [one.metrics for one in together] == [one.metrics for one in alone]
    assert [asdict(one.samples[0]) for one in together] == [asdict(one.samples[0]) for one in alone]
    assert find_out(masked, outs[0], Wish(count=4, pairs=1, seed=5), heard=heard).metrics != alone[0].metrics


def test_held_out_texts_are_what_losses_are_of(masked: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("the sea was calm and a white whale rose slowly\nour ship near the deep water\n")
    out = quantized(masked, tmp_path / "int8", 8)
    found = find_out(masked, out, Wish(samples=texts, count=4, pairs=0))
    assert "texts.txt" in found.facts["compared on"]
    assert figures(found)["NLL at 50% masked"] is not None
    assert found.samples == ()
    assert figures(found) != figures(find_out(masked, out, Wish(count=4, pairs=0)))


def test_a_model_beside_itself_is_equal_and_can_be_written_as_json(masked: Path) -> None:
    found = find_out(masked, masked, Wish(count=4, pairs=1))
    assert (found.accuracy, found.passed) == (pytest.approx(1.0), True)
    assert figures(found)["output error"] == 0.0
    assert figures(found)["output SQNR"] is None
    assert found.samples[0].original == found.samples[0].quantized
    report = api.validate_quality(masked, masked, count=4, pairs=0)
    assert json.loads(json.dumps(report, allow_nan=False))["passed"]


def test_a_converted_model_is_as_close_as_the_one_it_was_made_of(masked: Path, tmp_path: Path) -> None:
    out = quantized(masked, tmp_path / "int2", 2)
    api.convert(out, tmp_path / "converted")
    ours, theirs = (find_out(masked, path, Wish(count=4, pairs=0)) for path in (out, tmp_path / "converted"))
    assert theirs.accuracy == pytest.approx(ours.accuracy, abs=1e-6)
    assert theirs.size_bytes == theirs.original_bytes
    assert {layer.quant_type for layer in theirs.layers} == {"float32"}


def test_a_live_module_is_compared_on_a_function_s_samples(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=()):
        module = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 64))
    draw = torch.Generator().manual_seed(3)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.1, generator=draw)
    out = quantized(module, tmp_path / "int8", 8, modality="image")
    report = api.validate_quality(
        module, out, samples=lambda _: ((torch.randn(2, 64, generator=draw), float(t)) for t in range(6)), count=6
    )
    assert report["metric"].startswith("output cosine")
    assert report["cosine_similarity"] > 0.999
    assert report["facts"]["compared on"].startswith("12 samples")
    assert set(report["per_layer_output_cosine"]) == {"0.weight", "2.weight"}


def test_only_the_layer_that_was_changed_has_an_error(masked: Path, tmp_path: Path) -> None:
    module = small_module("BertForMaskedLM")
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    with torch.no_grad():
        module.get_parameter(name).mul_(1.1)
    other = save_folder(tmp_path / "other", module)
    found = find_out(masked, other, Wish(count=4, pairs=0))
    wrong = {layer.name: layer.output_error for layer in found.layers if any(layer.output_error or ())}
    assert set(wrong) == {name}
    assert wrong[name] == pytest.approx([0.01] * len(found.time_groups), rel=1e-3)


def test_models_that_cannot_be_run_are_compared_by_weights_and_say_so(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    out = quantized(model, tmp_path / "out", 4)
    found = find_out(model, out)
    assert found.metric.startswith("weight cosine")
    assert found.notes[0].startswith("weights only, the model was not run: ")
    assert (found.steps, found.samples) == ((), ())
    asked = find_out(model, out, Wish(weights_only=True))
    assert asked.notes == ("weights only, as asked",)
    texts = tmp_path / "texts.txt"
    texts.write_text("the sea\n")
    with pytest.raises(SourceError, match="lacks"):
        find_out(model, out, Wish(samples=texts))


def test_models_larger_than_memory_are_compared_by_weights(
    masked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("arrow_quant_v2.validation.judge.available_bytes", lambda: 10**8)
    found = find_out(masked, quantized(masked, tmp_path / "out", 8))
    assert "running both models takes 1.07 GB, 100.0 MB are there" in found.notes[0]
    assert found.accuracy > 0.999


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"count": 0}, "count is 0; allowed: 1 and more"),
        ({"pairs": -1}, "pairs is -1; allowed: 0 and more"),
        ({"min_accuracy": 2.0}, "min_accuracy is 2.0; allowed"),
        ({"colour": 1}, "colour: unknown; allowed: component, count, judge"),
        ({"samples": "nowhere.txt"}, "nowhere.txt: is no file"),
    ],
)
def test_a_wish_that_cannot_be_met_is_refused(asked: dict[str, Any], message: str, masked: Path) -> None:
    with pytest.raises(ConfigurationError, match=message):
        api.validate_quality(masked, masked, **asked)


def test_a_judge_that_looks_ahead_is_refused(masked: Path, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="sees what comes after a token"):
        find_out(masked, quantized(masked, tmp_path / "out", 8), Wish(count=4, judge=masked))

"""Whole ways through the program on real models: quantized, loaded again, run, and judged by their outputs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
import pytest
import torch
from real_models import ANTIBODIES, encoder_nll, minilm_states, packaged
from transformers import AutoModel, AutoTokenizer

import arrow_quant_v2 as aq
from arrow_quant_v2 import ArrowQuantV2, DiffusionQuantConfig
from arrow_quant_v2.sources.folder import open_model
from arrow_quant_v2.validation.metrics import cosine

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

api = ArrowQuantV2()
SENTENCES = (
    "The ship left the harbour before dawn.",
    "A letter arrived from the capital this morning.",
    "Bread is made of flour, water, salt and yeast.",
    "The court postponed its decision until spring.",
)
FIRST_BLOCK = ["*layer.[1-9].*", "*layer.1[0-9].*"]  # what is kept, so that calibration takes seconds


@dataclass(frozen=True)
class Bounds:
    """What the output cosine of a width must lie in, weights rounded without calibration."""

    least: float
    most: float


EXPECTED = {
    "minilm": {2: Bounds(-1.0, 0.8), 4: Bounds(0.9, 0.995), 8: Bounds(0.999, 1.0)},
    "antiberty": {2: Bounds(0.3, 0.8), 4: Bounds(0.9, 0.99), 8: Bounds(0.999, 1.0)},
}


def embedded(module: torch.nn.Module, folder: Path) -> torch.Tensor:
    return minilm_states(module, AutoTokenizer.from_pretrained(folder), SENTENCES)["sentence cosine"]


def test_complete_quantization_pipeline(minilm: Path, tmp_path: Path) -> None:
    texts, out, back = tmp_path / "texts.txt", tmp_path / "int4", tmp_path / "back"
    texts.write_text("\n".join(SENTENCES) + "\n")
    config = DiffusionQuantConfig(
        bit_width=4, enable_calibration=True, calibration_data=str(texts), calibration_samples=4, calibration_tokens=0,
        keep=FIRST_BLOCK,
    )  # fmt: skip
    result = api.quantize_diffusion_model(minilm, out, config)
    assert (result["modality"], result["passed"]) == ("text", True)
    assert result["calibration"]["samples"] == 4
    report = api.validate_quality(minilm, out)
    assert (report["passed"], report["metric"].split(":")[0]) == (True, "output cosine")
    assert report["compression_ratio"] == pytest.approx(result["compression_ratio"], rel=1e-3)
    floats = {one["layer_name"] for one in api.inspect(out)["layers"] if one["dtype"] == "float32"}
    assert floats == set(report["per_layer_accuracy"])
    api.convert(out, back)
    restored, packed = AutoModel.from_pretrained(back).eval(), aq.load(out)
    assert torch.allclose(embedded(restored, back), embedded(packed, out), atol=1e-3)


@pytest.mark.filterwarnings("ignore:.*have no place in the model")
def test_load_quantized_model_from_parquet(quantized: Callable[[str, int], Any]) -> None:
    made = quantized("minilm", 4)
    rows = [row for file in made.path.glob("*.parquet") for row in pq.read_table(file).to_pylist()]
    assert {row["quant_type"] for row in rows} == {"int4", "float32", "int64"}
    loaded = dict(aq.load(made.path).named_parameters())
    module = AutoModel.from_pretrained(made.original).eval()
    with open_model(made.path) as model:
        for name, own in module.named_parameters():
            stored = model.source.read(name).reshape(own.shape).float()
            assert cosine(own.detach(), stored) > 0.98, name
            if name in loaded and loaded[name].is_floating_point() and loaded[name].shape == own.shape:
                assert torch.allclose(loaded[name].float(), stored), name


@pytest.mark.filterwarnings("ignore:.*have no place in the model")
def test_inference_with_quantized_model(quantized: Callable[[str, int], Any]) -> None:
    made = quantized("minilm", 8)
    original = embedded(AutoModel.from_pretrained(made.original).eval(), made.original)
    found = embedded(aq.load(made.path), made.path)
    assert torch.nn.functional.cosine_similarity(original, found, dim=1).min() > 0.999

    proteins = quantized("antiberty", 8)
    vocabulary = packaged("antiberty", "trained_models/vocab.txt")
    (loss,) = encoder_nll(aq.load(proteins.path), ANTIBODIES[:1], vocabulary, (0.5,))
    assert loss < 0.6  # a model that knows nothing loses 3


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("name", ["minilm", "antiberty"])
def test_output_quality_validation(name: str, bits: int, quantized: Callable[[str, int], Any]) -> None:
    made, expected = quantized(name, bits), EXPECTED[name][bits]
    token = 4 if name == "antiberty" else None
    report = api.validate_quality(made.original, made.path, mask_token=token, count=8, pairs=0, min_accuracy=0.85)
    assert expected.least < report["cosine_similarity"] <= expected.most
    assert report["passed"] is (bits > 2)
    assert report["weight_cosine_similarity"] == pytest.approx(made.result["cosine_similarity"], abs=1e-6)
    if name == "antiberty":
        losses = {one["name"]: one for one in report["metrics"] if one["unit"] == "nats/token"}
        worse = losses["NLL at 50% masked"]["value"] - losses["NLL at 50% masked"]["original"]
        assert worse > 0.2 if bits == 2 else abs(worse) < 0.2


def test_end_to_end_with_time_aware_quantization(antiberty: Path, tmp_path: Path) -> None:
    config = DiffusionQuantConfig(
        bit_width=2, enable_calibration=True, calibration_samples=8, calibration_tokens=0, mask_token=4,
        num_time_groups=2, keep=FIRST_BLOCK, min_accuracy=0.5,
    )  # fmt: skip
    result = api.quantize_diffusion_model(antiberty, tmp_path / "int2", config)
    assert len(result["calibration"]["time_groups"]) == 2
    report = api.validate_quality(antiberty, tmp_path / "int2", count=8, pairs=0)
    assert report["time_groups"] == result["calibration"]["time_groups"]
    assert report["facts"]["compared on"].endswith("the model's own trajectory")
    assert [0.0 <= step["timestep"] <= 1.0 for step in report["steps"]] == [True, True]
    fitted = [one for one in api.inspect(tmp_path / "int2")["layers"] if "calibrated on" in one["decision"]]
    assert len(fitted) == 6 + 1  # matrices of the first block, and the head's
    errors = [report["per_layer_output_error"][one["layer_name"]] for one in fitted]
    assert all(len(groups) == 2 and 0.0 < min(groups) <= max(groups) < 0.5 for groups in errors)


def test_end_to_end_with_validation_system(
    quantized: Callable[[str, int], Any], arrow_quant: Callable[..., Any]
) -> None:
    low, high = quantized("minilm", 2), quantized("minilm", 8)
    missed = arrow_quant("validate", low.original, low.path, "--count", 4, "--quiet")
    assert missed.code == 3
    assert missed.out.startswith("MISSED: bar 0.85, output cosine: last hidden states or logits")
    passed = arrow_quant("validate", high.original, high.path, "--count", 4, "--json", "--quiet")
    assert (passed.code, json.loads(passed.out)["passed"]) == (0, True)
    weights = arrow_quant("validate", low.original, low.path, "--weights-only", "--min-accuracy", 0.5, "--quiet")
    assert weights.code == 0
    both = arrow_quant("compare", low.path, high.path, "--original", low.original, "--count", 4, "--quiet")
    first, _, two, eight, *_ = both.out.splitlines()
    assert first.startswith(str(low.original))
    assert (two.startswith(str(low.path)), eight.startswith(str(high.path))) == (True, True)
    assert (two.rstrip().endswith("below 0.85"), eight.rstrip().endswith("passed")) == (True, True)

"""The promised Python API on real models, on every kind of source, and with everything that can be wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import content_of, layers, normal, save_model

from arrow_quant_v2 import (
    ArrowQuantizer,
    ArrowQuantV2,
    ConfigurationError,
    DiffusionQuantConfig,
    QuantizationError,
    ValidationError,
)
from arrow_quant_v2 import api as api_room
from arrow_quant_v2 import layers as layers_room
from arrow_quant_v2.budget import resident_bytes
from arrow_quant_v2.decisions import Decision
from arrow_quant_v2.errors import SourceError
from arrow_quant_v2.sources.folder import open_model

if TYPE_CHECKING:
    from collections.abc import Callable

PROMISED = {
    "quantized_path", "compression_ratio", "cosine_similarity", "model_size_mb", "modality", "bit_width",
    "quantization_time_s",
}  # fmt: skip
VALIDATED = {"cosine_similarity", "passed", "per_layer_accuracy", "compression_ratio"}
LEAST_COSINE = {2: 0.85, 4: 0.98, 8: 0.9999}
LEAST_RATIO = {2: 12.0, 4: 7.0, 8: 3.7}

api = ArrowQuantV2()


def quantize(model: Path | torch.nn.Module, out: Path, **settings: object) -> dict[str, object]:
    return api.quantize_diffusion_model(model, out, DiffusionQuantConfig(**settings))


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    with open_model(path) as model:
        return {info.name: model.source.read(info.name).reshape(info.shape) for info in model.source.tensors}


# real models


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("name", ["minilm", "antiberty"])
def test_a_real_model_gives_every_promised_key(name: str, bits: int, quantized: Callable[..., object]) -> None:
    model = quantized(name, bits)
    result = model.result
    assert set(result) >= PROMISED
    assert (result["quantized_path"], result["bit_width"], result["modality"]) == (str(model.path), bits, "text")
    assert result["cosine_similarity"] >= LEAST_COSINE[bits]
    assert result["compression_ratio"] >= LEAST_RATIO[bits]
    assert result["quantization_time_s"] > 0
    weights = sum(path.stat().st_size for path in model.path.glob("*.parquet"))
    assert result["model_size_mb"] == weights / 1e6
    assert bits < result["bits_per_weight"] < bits + 0.5
    assert {type(one) for one in result["decisions"]} == {Decision}
    assert len(result["decisions"]) == result["layers"] == result["quantized_layers"] + result["kept_layers"]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("name", ["minilm", "antiberty"])
def test_a_real_model_is_validated_as_it_was_measured(name: str, bits: int, quantized: Callable[..., object]) -> None:
    model = quantized(name, bits)
    heard: list[float] = []
    report = api.validate_quality(
        model.original, model.path, weights_only=True, progress_callback=lambda _, fraction: heard.append(fraction)
    )
    assert set(report) >= VALIDATED
    assert report["metric"].startswith("weight cosine")
    assert report["passed"] is (report["worst_cosine_similarity"] >= 0.85)
    assert report["cosine_similarity"] == pytest.approx(model.result["cosine_similarity"], abs=1e-6)
    assert report["worst_cosine_similarity"] == pytest.approx(model.result["worst_cosine_similarity"], abs=1e-6)
    assert report["worst_layer"] == model.result["worst_layer"]
    assert report["compression_ratio"] == pytest.approx(model.result["compression_ratio"])
    kept = set(report["per_layer_accuracy"]) - set(report["quantized_layers"])
    assert {report["per_layer_accuracy"][layer] for layer in kept} == {1.0}
    assert heard[-1] == 1.0


def test_int8_keeps_every_layer_of_minilm(quantized: Callable[..., object]) -> None:
    model = quantized("minilm", 8)
    report = api.validate_quality(model.original, model.path, weights_only=True)
    assert min(report["per_layer_accuracy"].values()) >= 0.9999


def test_everything_but_the_weights_is_copied(quantized: Callable[..., object]) -> None:
    model = quantized("minilm", 4)
    before, after = content_of(model.original), content_of(model.path)
    del before["model.safetensors"]
    config = json.loads(after.pop("config.json"))
    assert config.pop("quantization_config")["bits"] == 4
    assert config == json.loads(before.pop("config.json"))
    before["README.original.md"] = before.pop("README.md")  # that name is our card's
    assert {name: after[name] for name in before} == before
    weights = {f"weights-0000{number}-of-00002.parquet" for number in (1, 2)}  # the embedding is a file of its own
    assert {name for name in after if name not in before} == {"metadata.json", "README.md", *weights}


@pytest.mark.parametrize("name", ["minilm", "antiberty"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_doctor_knows_the_size_beforehand(name: str, bits: int, quantized: Callable[..., object]) -> None:
    model = quantized(name, bits)
    before = resident_bytes() / 1e6  # of this process, whatever ran in it: the prediction starts from it
    found = api.doctor(model.original, DiffusionQuantConfig(bit_width=bits, group_size=64))
    assert found["predicted_size_mb"] == pytest.approx(model.result["model_size_mb"], rel=0.01)
    assert found["predicted_compression_ratio"] == pytest.approx(model.result["compression_ratio"], rel=0.01)
    assert found["verdict"] == "fits"
    assert 50 < found["predicted_peak_memory_mb"] - before < 1000
    assert [one["layer_name"] for one in found["layers"]] == [d.layer_name for d in model.result["decisions"]]


def test_profiles_bring_their_widths(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    for profile, bits, group in (("edge", 2, 64), ("local", 4, 128), ("cloud", 8, 128)):
        config = DiffusionQuantConfig.from_profile(profile)
        result = api.quantize_diffusion_model(model, tmp_path / profile, config)
        assert (result["bit_width"], result["min_accuracy"]) == (bits, config.min_accuracy)
        groups = {one["group_size"] for one in api.inspect(tmp_path / profile)["layers"]}
        assert groups == {None, group}


def test_the_default_is_local(tmp_path: Path) -> None:
    assert api.quantize_diffusion_model(save_model(tmp_path / "model"), tmp_path / "out")["bit_width"] == 4


# where weights come from


def test_a_live_module_is_quantized_where_its_modality_is_said(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Conv2d(16, 32, 3))
    with pytest.raises(ConfigurationError, match=r"a live module has no files.*modality="):
        quantize(module, tmp_path / "out")
    result = quantize(module, tmp_path / "out", modality="image", bit_width=8)
    assert (result["modality"], result["quantized_layers"]) == ("image", 2)
    found = tensors_of(tmp_path / "out")
    assert torch.cosine_similarity(found["1.weight"].flatten(), module[1].weight.flatten(), dim=0) > 0.9999
    assert torch.equal(found["0.bias"], module[0].bias)
    assert api.doctor(module, DiffusionQuantConfig(modality="image"))["modality"] == "image"


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_every_floating_dtype_comes_back_as_itself(dtype: str, tmp_path: Path) -> None:
    weight = normal(64, 100, dtype=getattr(torch, dtype))
    quantize(save_model(tmp_path / "model", {"w": weight}), tmp_path / "out", bit_width=4, group_size=32)
    found = tensors_of(tmp_path / "out")["w"]
    assert found.dtype == weight.dtype
    assert torch.cosine_similarity(found.double().flatten(), weight.double().flatten(), dim=0) > 0.98


def test_a_wider_source_of_the_same_values_gives_the_same_codes(tmp_path: Path) -> None:
    half = normal(64, 96, dtype=torch.bfloat16)
    payloads = []
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        place = tmp_path / str(dtype)
        quantize(save_model(place / "model", {"w": half.to(dtype)}), place / "out", bit_width=2)
        with open_model(place / "out") as model:
            (payload,) = model.source.stored.read("w")
            payloads.append((payload.codes.tobytes(), payload.scales.tobytes(), payload.row_scales.tobytes()))
    assert len(set(payloads)) == 1


def test_a_folder_of_npy_files_is_a_model(tmp_path: Path) -> None:
    folder = tmp_path / "arrays"
    folder.mkdir()
    for name, tensor in layers(2).items():
        np.save(folder / f"{name}.npy", tensor.numpy())
    result = quantize(folder, tmp_path / "out", modality="audio", bit_width=8)
    assert (result["quantized_layers"], result["kept_layers"]) == (2, 2)
    assert sorted(content_of(tmp_path / "out")) == ["README.md", "metadata.json", "weights-00001-of-00001.parquet"]


def test_a_shard_more_or_less_makes_no_difference(tmp_path: Path) -> None:
    tensors = layers(4)
    save_model(tmp_path / "one" / "model", tensors)  # the card names the folder that the model lay in
    several = save_model(tmp_path / "several" / "model", tensors)
    (several / "model.safetensors").unlink()
    places = {name: f"model-{1 + i % 3:05d}-of-00003.safetensors" for i, name in enumerate(tensors)}
    for shard in set(places.values()):
        save_file({name: tensors[name] for name in tensors if places[name] == shard}, several / shard)
    (several / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    for name in ("one", "several"):
        quantize(tmp_path / name / "model", tmp_path / f"{name}-out")
    assert content_of(tmp_path / "one-out") == content_of(tmp_path / "several-out")


def test_one_weight_file_is_a_model_and_the_output_may_lie_beside_it(tmp_path: Path) -> None:
    file = save_model(tmp_path / "model") / "model.safetensors"
    quantize(file, tmp_path / "model" / "out", modality="text")
    assert sorted(content_of(tmp_path / "model" / "out")) == [
        "README.md",
        "metadata.json",
        "weights-00001-of-00001.parquet",
    ]


def test_a_snapshot_of_links_is_a_model(tmp_path: Path) -> None:
    save_model(tmp_path / "real")
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "0123", tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted((tmp_path / "real").iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    quantize(snapshot, tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"


def test_our_own_model_is_quantized_again_to_fewer_bits(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    quantize(model, tmp_path / "int8", bit_width=8)
    result = quantize(tmp_path / "int8", tmp_path / "int2", bit_width=2, group_size=64, min_accuracy=0.5)
    assert result["modality"] == "text"
    assert api.validate_quality(model, tmp_path / "int2")["per_layer_accuracy"]["layers.00.weight"] > 0.9
    config = json.loads((tmp_path / "int2" / "config.json").read_text())
    assert config["quantization_config"]["bits"] == 2
    assert json.loads((tmp_path / "int2" / "metadata.json").read_text())["bit_width"] == 2


def test_relative_paths_and_trailing_slashes_are_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    for out in ("out/", "./deep/er/out", "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        result = api.quantize_diffusion_model("model/", out)
        assert (Path(result["quantized_path"]) / "metadata.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "empty", "model", "out"]


# odd tensors


def test_odd_tensors_come_back(tmp_path: Path) -> None:
    tensors = {
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 7),
        "mask": torch.full((40, 40), float("-inf")).triu(1)[0],
        "flags": torch.tensor([True, False]),
        "ids": torch.arange(2000).reshape(2, 1000),
        "tail": normal(40, 67),
        "wide": normal(2, 5000),
    }
    model = save_model(tmp_path / "model", tensors)
    quantize(model, tmp_path / "out", bit_width=8, group_size=32)
    found = tensors_of(tmp_path / "out")
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        n: tuple(t.shape) for n, t in tensors.items()
    }
    for name in ("scalar", "empty", "mask", "flags", "ids"):
        assert torch.equal(found[name], tensors[name])
    report = api.validate_quality(model, tmp_path / "out")
    assert min(report["per_layer_accuracy"].values()) > 0.9999
    assert json.loads(json.dumps(report, allow_nan=False))["passed"]


def test_a_model_without_weights_to_quantize_is_kept_whole(tmp_path: Path) -> None:
    tensors = {"ids": torch.arange(5000).reshape(5, 1000), "bias": normal(64)}
    result = quantize(save_model(tmp_path / "model", tensors), tmp_path / "out")
    assert (result["quantized_layers"], result["cosine_similarity"], result["passed"]) == (0, None, True)
    assert torch.equal(tensors_of(tmp_path / "out")["ids"], tensors["ids"])
    assert api.validate_quality(tmp_path / "model", tmp_path / "out")["passed"]


def test_rows_and_layers_are_cut_anywhere_without_a_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"w": normal(50, 300), "experts": normal(4, 20, 64), "bias": normal(5000)}
    model = save_model(tmp_path / "model", tensors)
    quantize(model, tmp_path / "whole", bit_width=4, group_size=64)
    monkeypatch.setattr(layers_room, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(layers_room, "KEPT_CHUNK_BYTES", 1000)
    monkeypatch.setattr("arrow_quant_v2.orchestrator.slices", lambda plan, _: layers_room.slices(plan, 700))
    quantize(model, tmp_path / "cut", bit_width=4, group_size=64)
    chunks = {one["layer_name"]: one["chunks"] for one in api.inspect(tmp_path / "cut")["layers"]}
    assert min(chunks.values()) > 1
    whole, cut = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in tensors)
    api.convert(tmp_path / "cut", tmp_path / "converted")
    converted = load_file(tmp_path / "converted" / "model.safetensors")
    assert all(torch.equal(whole[name], converted[name]) for name in tensors)
    with open_model(tmp_path / "cut") as opened:
        for name, tensor in whole.items():
            flat = tensor.flatten()
            for start, stop in ((0, 1), (299, 301), (1234, 4321), (flat.numel() - 1, flat.numel()), (7, 7)):
                assert torch.equal(opened.source.read(name, start, stop), flat[start:stop])


# what is refused


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "nan"), (float("inf"), "inf"), (float("-inf"), "-inf")])
def test_nan_and_infinity_name_the_tensor_and_the_position(value: float, word: str, tmp_path: Path) -> None:
    tensors = layers(3)
    tensors["layers.01.weight"][17, 42] = value
    model = save_model(tmp_path / "model", tensors)
    with pytest.raises(QuantizationError) as caught:
        quantize(model, tmp_path / "out")
    assert f"layers.01.weight: the value at [17, 42] is {word}" in str(caught.value)
    assert "--keep 'layers.01.weight'" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]  # nothing half-written
    assert quantize(model, tmp_path / "out", keep=["layers.01.weight"])["kept_layers"] == 4


def test_a_value_beyond_float32_is_named(tmp_path: Path) -> None:
    weight = normal(4, 16, 32, dtype=torch.float64)
    weight[3, 15, 31] = 1e300
    with pytest.raises(QuantizationError, match=r"w: the value at \[3, 15, 31\] is 1e\+300"):
        quantize(save_model(tmp_path / "model", {"w": weight}), tmp_path / "out")


def test_an_unknown_modality_says_how_to_set_it(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", architectures=["Mystery"])
    with pytest.raises(SourceError, match=r"unknown modality .*--modality \(modality= in Python\).*text, code"):
        quantize(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert quantize(model, tmp_path / "out", modality="code")["modality"] == "code"


def test_a_missed_bar_is_a_warning_or_with_fail_fast_an_error(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    with pytest.warns(UserWarning, match=r"layers\.\d+\.weight: weight cosine 0\.9\d+ at int2 is below 0.999"):
        result = quantize(model, tmp_path / "out", bit_width=2, min_accuracy=0.999, fallback="none")
    assert not result["passed"]
    with pytest.raises(QuantizationError, match=r"at int2 is below 0\.999; leave fail_fast out"):
        quantize(model, tmp_path / "other", bit_width=2, min_accuracy=0.999, fail_fast=True)
    assert not api.validate_quality(model, tmp_path / "out")["passed"]  # the bar that it was made with
    assert api.validate_quality(model, tmp_path / "out", min_accuracy=0.5)["passed"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


@pytest.mark.parametrize("place", [".", "out", "tokenizer/out", ".."])
def test_an_output_in_or_around_the_model_is_refused(place: str, tmp_path: Path) -> None:
    model = save_model(tmp_path / "models" / "model")
    before = content_of(tmp_path)
    with pytest.raises(ConfigurationError, match="lies in the model's own folder or around it"):
        quantize(model, model / place)
    assert content_of(tmp_path) == before


def test_a_model_in_the_place_of_the_unfinished_output_is_safe(tmp_path: Path) -> None:
    model = save_model(tmp_path / "m.partial")
    before = content_of(tmp_path)
    with pytest.raises(ConfigurationError, match="lies in the model's own folder"):
        quantize(model, tmp_path / "m")
    quantize(model, tmp_path / "q")
    save_model(tmp_path / "x.partial")
    with pytest.raises(ConfigurationError, match=r"x.partial: is needed for the unfinished output, but is something"):
        quantize(model, tmp_path / "x")
    with pytest.raises(ConfigurationError, match=r"x.partial: is in the way"):
        api.convert(tmp_path / "q", tmp_path / "x")
    assert {name: content_of(tmp_path)[name] for name in before} == before


def test_a_broken_config_is_found_before_the_work(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    (model / "config.json").write_text("{")
    heard: list[str] = []
    with pytest.raises(SourceError, match=r"model/config.json"):
        api.quantize_diffusion_model(
            model, tmp_path / "out", DiffusionQuantConfig(modality="text"), lambda message, _: heard.append(message)
        )
    assert heard == []


def test_models_that_are_no_copies_are_not_compared(tmp_path: Path) -> None:
    quantize(save_model(tmp_path / "model"), tmp_path / "out")
    other = save_model(tmp_path / "other", layers(3))
    with pytest.raises(ValidationError, match=r"layers.03.bias: is missing from .*other"):
        api.validate_quality(other, tmp_path / "out")
    reshaped = save_model(tmp_path / "reshaped", layers(12, rows=32))
    with pytest.raises(ValidationError, match=r"layers.00.bias: is \[32\] in .*reshaped.* and \[64\] in .*out"):
        api.validate_quality(reshaped, tmp_path / "out")
    holed = layers()
    holed["layers.00.bias"][0] = float("nan")
    with pytest.raises(ValidationError, match=r"layers\.00\.bias: holds NaN or infinity in one model"):
        api.validate_quality(save_model(tmp_path / "holed", holed), tmp_path / "out")


def test_all_that_is_to_be_compared_is_there_before_any_of_it_is_run(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    quantize(model, tmp_path / "out")
    heard: list[str] = []
    with pytest.raises(SourceError, match="nowhere: does not exist"):
        api.compare(
            model, [tmp_path / "out", tmp_path / "nowhere"], progress_callback=lambda said, _: heard.append(said)
        )
    assert heard == []


def test_a_bar_that_a_size_does_not_reach_asks_for_a_larger_one(tmp_path: Path) -> None:
    config = DiffusionQuantConfig(target_bits=3.0, group_size=32, min_accuracy=0.999, modality="text")
    with pytest.warns(UserWarning, match=r"\(min_accuracy 0.999\); ask for a larger size, or smaller groups"):
        result = api.quantize_diffusion_model(save_model(tmp_path / "model"), tmp_path / "out", config)
    assert not result["passed"]


def test_a_keep_pattern_that_fits_nothing_is_warned_of(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    with pytest.warns(UserWarning, match="keep pattern 'lm_haed' fits no tensor of the model, so it keeps nothing"):
        quantize(model, tmp_path / "out", keep=["lm_haed", "layers.01.*"])


def test_a_prompt_is_words_or_the_number_of_a_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str | None] = []
    monkeypatch.setattr(api_room, "generate", lambda _folder, wish, _told: asked.append(wish.prompt))
    monkeypatch.setattr(api_room, "generation_result", lambda _: {})
    for prompt in ("seven", 7, None):
        api.generate(tmp_path, prompt)
    assert asked == ["seven", "7", None]
    with pytest.raises(ConfigurationError, match=r"prompt is \['seven'\]; allowed: words, the number of a class"):
        api.generate(tmp_path, ["seven"])


@pytest.mark.parametrize("bar", [-0.1, 1.5, float("nan")])
def test_a_bar_that_is_no_cosine_is_refused(bar: float, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="min_accuracy is"):
        api.validate_quality(tmp_path, tmp_path, min_accuracy=bar)


def test_only_what_we_quantized_is_inspected(minilm: Path) -> None:
    with pytest.raises(ValidationError, match="is not quantized by this program"):
        api.inspect(minilm)


def test_only_diffusion_is_a_mode() -> None:
    with pytest.raises(ConfigurationError, match="mode is 'llm'; allowed: diffusion"):
        ArrowQuantV2(mode="llm")


# tensors in memory


def test_lora_weights_are_quantized_online() -> None:
    tensors = {"lora_A": normal(16, 320), "lora_B": normal(320, 16, dtype=torch.bfloat16), "bias": normal(50)}
    packed = api.quantize(tensors, bit_width=8)
    found = api.dequantize(packed)
    assert {name: (t.shape, t.dtype) for name, t in found.items()} == {
        name: (t.shape, t.dtype) for name, t in tensors.items()
    }
    for name, tensor in tensors.items():
        assert torch.cosine_similarity(found[name].float().flatten(), tensor.float().flatten(), dim=0) > 0.9999
        assert packed[name].name == name


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_one_tensor_is_at_most_half_a_step_off(bits: int, granularity: str, symmetric: bool) -> None:
    tensor = normal(24, 5, 3, 3)
    one = ArrowQuantizer(bits, granularity=granularity, group_size=16, symmetric=symmetric)
    packed = one.quantize(tensor)
    found = one.dequantize(packed)
    rows = {"tensor": 1, "channel": 24, "group": 24}[granularity]
    assert packed.scales.shape == (rows, 3 if granularity == "group" else 1)
    assert (packed.zero_points is None) is symmetric
    row_scales = torch.from_numpy(packed.row_scales.astype(np.int16)).view(torch.bfloat16).double()
    steps = row_scales[:, None] * (torch.from_numpy(packed.scales).double() / 255) ** 2
    columns = tensor.numel() // rows
    step = steps.repeat_interleave(packed.layout.group, dim=1)[:, :columns]
    off = (found - tensor).double().reshape(rows, columns).abs()
    assert (off <= step * 0.5001 + 1e-12).all()
    assert (found.shape, found.dtype) == (tensor.shape, tensor.dtype)


@pytest.mark.parametrize("shape", [(), (7,), (3, 4), (2, 3, 40), (4, 3, 2, 2, 2)])
def test_tensors_of_any_rank_are_packed(shape: tuple[int, ...]) -> None:
    tensor = normal(*shape) + 1
    for granularity in ("tensor", "channel", "group"):
        one = ArrowQuantizer(8, granularity=granularity)
        found = one.dequantize(one.quantize(tensor))
        assert found.shape == tensor.shape
        assert torch.allclose(found, tensor, atol=0.02)


def test_one_tensor_may_be_clipped() -> None:
    tensor = normal(64, 128)
    errors = []
    for method in ("rtn", "clip"):
        one = ArrowQuantizer(2, method=method)
        errors.append(float((one.dequantize(one.quantize(tensor)) - tensor).pow(2).mean()))
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(0, 4), r"w: is float32 \[0, 4\]; a floating-point tensor with values"),
        (torch.ones(4, 4, dtype=torch.int32), r"w: is int32 \[4, 4\]"),
        (torch.tensor([[1.0, 2.0], [float("nan"), 4.0]]), r"w: the value at \[1, 0\] is nan"),
        (torch.tensor(float("inf")), r"w: the value at \[\] is inf"),
        (np.ones((4, 4), np.float32), r"w: is a ndarray; a torch.Tensor is needed"),
    ],
)
def test_what_is_no_weight_is_refused_by_name(tensor: object, message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        ArrowQuantizer().quantize(tensor, "w")


@pytest.mark.parametrize("given", [torch.ones(4, 4), [torch.ones(4, 4)]])
def test_tensors_have_names(given: object) -> None:
    with pytest.raises(ConfigurationError, match=r"tensors is a (Tensor|list); needed: a mapping of names to tensors"):
        ArrowQuantV2().quantize(given)
    with pytest.raises(QuantizationError, match="a Tensor is no PackedTensor, as quantize gives it"):
        ArrowQuantizer().dequantize(torch.ones(4, 4))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 3}, "bits is 3; allowed: 2, 4 or 8"),
        ({"granularity": "row"}, "granularity is 'row'; allowed: tensor, channel, group"),
        ({"group_size": 12}, "group_size is 12; allowed: a multiple of 8"),
        ({"method": "gptq"}, "method is 'gptq'; allowed: rtn, clip, r2q"),
    ],
)
def test_a_wrong_setting_is_refused_before_any_tensor(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        ArrowQuantizer(**settings)


# planning ahead


def test_the_doctor_knows_small_models_with_many_names_too(tmp_path: Path) -> None:
    tensors = {f"{'very.' * 10}long.name.{i}.weight": normal(64, 128, seed=i) for i in range(40)}
    model = save_model(tmp_path / "model", tensors)
    for bits in (2, 4, 8):
        config = DiffusionQuantConfig(bit_width=bits)
        result = api.quantize_diffusion_model(model, tmp_path / f"int{bits}", config)
        predicted = api.doctor(model, config)["predicted_size_mb"]
        assert predicted == pytest.approx(result["model_size_mb"], rel=0.01)


def test_the_doctor_reads_no_values(tmp_path: Path) -> None:
    tensors = layers(2)
    tensors["layers.00.weight"][0, 0] = float("nan")
    found = api.doctor(save_model(tmp_path / "model", tensors), disk=tmp_path / "not" / "yet" / "there")
    kept = {one["layer_name"]: one["because"] for one in found["layers"] if one["kind"] == "kept"}
    assert kept == {f"layers.0{i}.bias": "a bias, norm or other 1-D tensor" for i in range(2)}
    assert found["free_disk_mb"] == pytest.approx(shutil.disk_usage(tmp_path).free / 1e6, rel=0.05)

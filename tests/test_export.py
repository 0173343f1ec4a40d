"""What convert writes, loaded by the libraries that the models come from."""

# ruff: noqa: PLC0415 - the libraries take seconds to import and warn while they do

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from small_models import content_of, layers, normal, save_model

from arrow_quant_v2 import ArrowQuantV2, ConfigurationError, DiffusionQuantConfig
from arrow_quant_v2 import export as room
from arrow_quant_v2.errors import SourceError, StoreError
from arrow_quant_v2.sources.folder import open_model

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore")  # what the libraries say of themselves is their business

TOKENS = torch.tensor([[101, 7592, 2088, 102], [101, 3899, 4937, 102], [101, 2023, 2003, 102]])

api = ArrowQuantV2()


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny image diffusion pipeline, as diffusers saves it."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    unet = UNet2DModel(sample_size=16, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8, **blocks)
    folder = tmp_path_factory.mktemp("pipelines") / "ddpm"
    DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=20)).save_pretrained(folder)
    return folder


def dequantized(folder: Path, component: str | None = None) -> dict[str, torch.Tensor]:
    with open_model(folder, component) as model:
        return {info.name: model.source.read(info.name).reshape(info.shape) for info in model.source.tensors}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_converted_encoder_is_loaded_and_does_nearly_the_same(
    quantized: Callable[..., object], tmp_path: Path
) -> None:
    from transformers import AutoModel

    model = quantized("minilm", 8)
    written = api.convert(model.path, tmp_path / "converted")
    assert written["files"] == [str(tmp_path / "converted" / "model.safetensors")]
    assert written["size_mb"] == pytest.approx(90.9, abs=0.1)
    assert "quantization_config" not in json.loads((tmp_path / "converted" / "config.json").read_text())
    assert not (tmp_path / "converted" / "metadata.json").exists()

    original, converted, filled = (AutoModel.from_pretrained(path).eval() for path in (
        model.original, tmp_path / "converted", model.original
    ))  # fmt: skip
    filled.load_state_dict(dequantized(model.path), strict=False)
    with torch.no_grad():
        wanted, found, same = (net(TOKENS).last_hidden_state for net in (original, converted, filled))
    assert torch.cosine_similarity(wanted.flatten(1), found.flatten(1)).min() > 0.999
    assert torch.equal(found, same)


def test_a_converted_masked_language_model_is_loaded(quantized: Callable[..., object], tmp_path: Path) -> None:
    from transformers import BertForMaskedLM

    model = quantized("antiberty", 8)
    api.convert(model.path, tmp_path / "converted")
    tokens = torch.tensor([[2, 5, 6, 4, 8, 9, 4, 11, 3]])
    nets = [BertForMaskedLM.from_pretrained(path).eval() for path in (model.original, tmp_path / "converted")]
    with torch.no_grad():
        wanted, found = (net(tokens).logits for net in nets)
    assert torch.cosine_similarity(wanted.flatten(), found.flatten(), dim=0) > 0.999


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_converted_values_are_those_of_the_codes(bits: int, quantized: Callable[..., object], tmp_path: Path) -> None:
    model = quantized("minilm", bits)
    heard: list[float] = []
    api.convert(model.path, tmp_path / "out", progress_callback=lambda _, fraction: heard.append(fraction))
    assert equal(load_file(tmp_path / "out" / "model.safetensors"), dequantized(model.path))
    assert heard == sorted(heard)
    assert heard[-1] == 1.0


def test_a_pipeline_s_denoiser_is_quantized_and_loaded_again(pipeline: Path, tmp_path: Path) -> None:
    from diffusers import DDPMPipeline

    out, back = tmp_path / "int8", tmp_path / "back"
    result = api.quantize_diffusion_model(pipeline, out, DiffusionQuantConfig(bit_width=8, group_size=32))
    assert result["modality"] == "image"
    before, after = content_of(pipeline), content_of(out)
    for name in ("model_index.json", "scheduler/scheduler_config.json"):
        assert after[name] == before[name]
    assert set(after) == {
        "README.md", "metadata.json", "model_index.json", "scheduler/scheduler_config.json", "unet/config.json",
        "unet/weights-00001-of-00001.parquet",
    }  # fmt: skip
    asked = json.loads(after["unet/config.json"])["quantization_config"]
    assert (asked["quant_method"], asked["bits"], asked["group_size"]) == ("arrow_quant", 8, 32)
    assert api.validate_quality(pipeline, out)["worst_cosine_similarity"] > 0.9999
    assert len(api.inspect(out)["layers"]) == result["layers"]

    api.convert(out, back)
    assert content_of(back).keys() == before.keys()
    assert json.loads((back / "unet" / "config.json").read_text()) == json.loads(before["unet/config.json"])
    pictures = []
    for folder in (pipeline, back):
        pipe = DDPMPipeline.from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        seed = torch.Generator().manual_seed(0)
        pictures.append(torch.from_numpy(pipe(num_inference_steps=3, generator=seed, output_type="np").images))
    assert torch.allclose(*pictures, atol=0.05)


def test_the_component_may_be_chosen(pipeline: Path, tmp_path: Path) -> None:
    config = DiffusionQuantConfig(component="unet", modality="image")
    assert api.quantize_diffusion_model(pipeline, tmp_path / "out", config)["quantized_layers"] > 0
    with pytest.raises(SourceError, match="has no component 'vae'"):
        api.quantize_diffusion_model(pipeline, tmp_path / "vae", config.replace(component="vae"))


def test_a_large_model_is_cut_into_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import BertConfig, BertForMaskedLM

    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    BertForMaskedLM(BertConfig(vocab_size=99, **size)).save_pretrained(tmp_path / "model")
    api.quantize_diffusion_model(tmp_path / "model", tmp_path / "int4")
    monkeypatch.setattr(room, "SHARD_BYTES", 100_000)
    written = api.convert(tmp_path / "int4", tmp_path / "back")
    assert len(written["files"]) > 2
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    names = set(index["weight_map"])
    assert names == set(dequantized(tmp_path / "int4"))
    assert equal(dequantized(tmp_path / "back"), dequantized(tmp_path / "int4"))
    loaded = BertForMaskedLM.from_pretrained(tmp_path / "back").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in dequantized(tmp_path / "int4").items())


def test_every_dtype_and_shape_is_written_aligned(tmp_path: Path) -> None:
    tensors = {
        "a.flags": torch.tensor([True, False, True]),
        "b.half": normal(33, 67, dtype=torch.bfloat16),
        "c.double": normal(40, 40, dtype=torch.float64),
        "d.bytes": torch.arange(7, dtype=torch.uint8),
        "e.scalar": torch.tensor(2.5, dtype=torch.float16),
        "f.empty": torch.zeros(3, 0),
        "g.eight": normal(64, 64).to(torch.float8_e4m3fn),
    }
    api.quantize_diffusion_model(save_model(tmp_path / "model", tensors), tmp_path / "int8")
    api.convert(tmp_path / "int8", tmp_path / "back")
    path = tmp_path / "back" / "model.safetensors"
    header = json.loads(path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")])
    assert header["__metadata__"] == {"format": "pt"}
    with safe_open(path, "pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    assert {n: (t.shape, t.dtype) for n, t in found.items()} == {n: (t.shape, t.dtype) for n, t in tensors.items()}
    kept = {one["layer_name"] for one in api.inspect(tmp_path / "int8")["layers"] if one["group_size"] is None}
    assert all(torch.equal(found[name].float(), tensors[name].float()) for name in kept)


def test_a_checkpoint_becomes_safetensors_without_being_quantized(antiberty: Path, tmp_path: Path) -> None:
    api.convert(antiberty, tmp_path / "out")
    assert equal(dequantized(tmp_path / "out"), dequantized(antiberty))
    assert (tmp_path / "out" / "config.json").read_bytes() == (antiberty / "config.json").read_bytes()


def test_metadata_of_others_is_copied(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    (model / "metadata.json").write_text('{"modality": "code"}')
    (model / "extra").mkdir()
    (model / "extra" / "metadata.json").write_text("{}")
    api.convert(model, tmp_path / "same")
    assert (tmp_path / "same" / "metadata.json").read_text() == '{"modality": "code"}'
    api.quantize_diffusion_model(model, tmp_path / "int4")
    api.convert(tmp_path / "int4", tmp_path / "back")
    assert (tmp_path / "back" / "extra" / "metadata.json").exists()


def test_an_existing_output_is_refused(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    before = content_of(tmp_path)
    for out, message in (("model", "exists; choose another"), ("model/in", "lies in the model's own folder")):
        with pytest.raises(ConfigurationError, match=message):
            api.convert(model, tmp_path / out)
    assert content_of(tmp_path) == before
    (tmp_path / "empty").mkdir()
    api.convert(model, tmp_path / "empty")
    assert (tmp_path / "empty" / "model.safetensors").exists()


def test_a_damaged_model_leaves_nothing_behind(tmp_path: Path) -> None:
    api.quantize_diffusion_model(save_model(tmp_path / "model", layers(3)), tmp_path / "int4")
    (file,) = (tmp_path / "int4").glob("*.parquet")
    content = bytearray(file.read_bytes())
    with open_model(tmp_path / "int4") as model:
        codes = model.source.stored.read("layers.02.weight")[0].codes.tobytes()
    content[content.index(codes) + 100] ^= 1
    file.write_bytes(content)
    with pytest.raises(StoreError, match=r"layers\.02\.weight .*checksum"):
        api.convert(tmp_path / "int4", tmp_path / "back")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["int4", "model"]

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

from arrow_quant_v2.errors import SourceError
from arrow_quant_v2.sources.modality import detect_modality, modality_of


def folder(root: Path, **files: Any) -> Path:
    """A model folder with JSON files; `unet__config` is unet/config.json."""
    root.mkdir(exist_ok=True)
    for name, content in files.items():
        path = root / f"{name.replace('__', '/')}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    return root


def test_metadata_wins_over_the_pipeline_and_the_pipeline_over_the_config(tmp_path: Path) -> None:
    root = folder(tmp_path, config={"_class_name": "UNet2DModel"})
    assert detect_modality(root, "") == "image"
    folder(root, model_index={"_class_name": "StableAudioPipeline"})
    assert detect_modality(root, "") == "audio"
    folder(root, metadata={"modality": "code"})
    assert detect_modality(root, "") == "code"


def test_metadata_of_something_else_is_passed_over(tmp_path: Path) -> None:
    assert detect_modality(folder(tmp_path, metadata={"author": "x"}, config={"model_type": "bert"}), "") == "text"


@pytest.mark.parametrize("stated", ["video", "Image", "", 3, ["image"]])
def test_metadata_with_an_unknown_modality_is_refused(stated: Any, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"metadata.json: modality is .*; allowed are text, code, image, audio"):
        detect_modality(folder(tmp_path, metadata={"modality": stated}), "")


@pytest.mark.parametrize(
    ("pipeline", "component", "expected"),
    [
        ("StableDiffusionXLPipeline", "UNet2DConditionModel", "image"),
        ("FluxPipeline", "FluxTransformer2DModel", "image"),
        ("WanPipeline", "WanTransformer3DModel", "image"),
        ("LTX2Pipeline", "LTX2VideoTransformer3DModel", "image"),
        ("DreamLitePipeline", "DreamLiteTransformer2DModel", "image"),
        ("AudioLDM2Pipeline", "AudioLDM2UNet2DConditionModel", "audio"),
        ("StableAudioPipeline", "StableAudioDiTModel", "audio"),
        ("DanceDiffusionPipeline", "UNet1DModel", "audio"),
        ("LLaDA2Pipeline", "LLaDA2MoeModelLM", "text"),
        ("DiffusionGemmaPipeline", "DiffusionGemmaForBlockDiffusion", "text"),
        ("MyPipeline", "UNet2DModel", "image"),
        ("MyPipeline", "StableAudioDiTModel", "audio"),
    ],
)
def test_a_pipeline_tells_by_its_own_class_then_by_its_denoiser(
    pipeline: str, component: str, expected: str, tmp_path: Path
) -> None:
    index = {
        "_class_name": pipeline,
        "unet": ["diffusers", component],
        "text_encoder": ["transformers", "CLIPTextModel"],
    }
    assert detect_modality(folder(tmp_path, model_index=index), "unet") == expected


def test_a_pipeline_of_unknown_classes_tells_by_its_autoencoder_or_the_config_of_its_denoiser(tmp_path: Path) -> None:
    index = {"_class_name": "My", "net": ["my", "Net"], "vae": ["diffusers", "AutoencoderOobleck"]}
    assert detect_modality(folder(tmp_path / "a", model_index=index), "net") == "audio"
    root = folder(
        tmp_path / "b", model_index={"_class_name": "My"}, net__config={"_class_name": "DiTTransformer2DModel"}
    )
    assert detect_modality(root, "net") == "image"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"architectures": ["BertForMaskedLM"], "model_type": "bert"}, "text"),
        ({"architectures": ["AntiBERTy"], "model_type": "bert"}, "text"),
        ({"architectures": ["ModernBertForMaskedLM"], "model_type": "modernbert"}, "text"),
        ({"architectures": ["DreamModel"], "model_type": "Dream"}, "text"),
        ({"architectures": ["LLaDAModelLM"], "model_type": "llada"}, "text"),
        ({"architectures": ["MDLM"], "model_type": "mdlm"}, "text"),
        ({"architectures": ["DiffusionGemmaForBlockDiffusion"], "model_type": "diffusion_gemma"}, "text"),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, "text"),
        ({"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"}, "text"),
        ({"architectures": ["HubertModel"], "model_type": "hubert"}, "audio"),
        ({"_class_name": "UNet1DModel"}, "audio"),
        ({"_class_name": "AutoencoderOobleck"}, "audio"),
        ({"_class_name": "StableAudioDiTModel"}, "audio"),
        ({"_class_name": "UNet2DModel"}, "image"),
        ({"_class_name": "AutoencoderKL"}, "image"),
        ({"_class_name": "PixArtTransformer2DModel"}, "image"),
        ({"_class_name": "SD3Transformer2DModel"}, "image"),
        ({"_class_name": "SanaTransformer2DModel"}, "image"),
        ({"architectures": ["DiffuCoder"], "model_type": "Dream"}, "code"),
        ({"architectures": ["DreamModel"], "model_type": "Dream", "_name_or_path": "Dream-org/Dream-Coder-7B"}, "code"),
        ({"architectures": ["DreamModel"], "_name_or_path": "hub/Dream-Encoder-Decoder-codec"}, "text"),
    ],
)
def test_a_config_tells_by_its_classes_and_model_type(config: dict[str, Any], expected: str, tmp_path: Path) -> None:
    assert detect_modality(folder(tmp_path, config=config), "") == expected


@pytest.mark.parametrize(
    "name", ["Dream-Coder-v0-7B", "DiffuCoder-7B-cpGRPO", "stable-diffcoder", "my_code_model", "codebert"]
)
def test_a_text_model_in_a_folder_named_after_code_makes_code(name: str, tmp_path: Path) -> None:
    assert detect_modality(folder(tmp_path / name, config={"model_type": "Dream"}), "") == "code"
    snapshot = tmp_path / f"models--o--{name}" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    assert detect_modality(folder(snapshot, config={"model_type": "Dream"}), "") == "code"


def test_an_image_model_in_a_folder_named_after_code_makes_images(tmp_path: Path) -> None:
    assert detect_modality(folder(tmp_path / "code", config={"_class_name": "UNet2DModel"}), "") == "image"


@pytest.mark.parametrize("config", [None, {}, {"architectures": ["Foo"]}, {"architectures": "x", "model_type": 3}])
def test_an_unknown_modality_says_how_to_set_it(config: Any, tmp_path: Path) -> None:
    root = tmp_path if config is None else folder(tmp_path, config=config)
    with pytest.raises(SourceError, match=r"unknown modality .*--modality .*metadata.json: text, code, image, audio"):
        detect_modality(root, "")


@pytest.mark.parametrize("name", ["metadata", "model_index", "config"])
def test_broken_json_is_named_with_its_position(name: str, tmp_path: Path) -> None:
    (tmp_path / f"{name}.json").write_text("{\n oops")
    with pytest.raises(SourceError, match=rf"{name}.json: not valid JSON at line 2, column 2"):
        detect_modality(tmp_path, "")


UNDECIDED = {"DiffusionPipeline", "RFD4ProteinaPipeline"}  # the base class; proteins


def test_every_pipeline_that_diffusers_ships_is_known() -> None:
    spec = importlib.util.find_spec("diffusers")
    assert spec is not None
    assert spec.origin is not None
    sources = (Path(spec.origin).parent / "pipelines").rglob("*.py")
    names = {name for file in sources for name in re.findall(r"^class (\w+Pipeline)\(", file.read_text(), re.MULTILINE)}
    assert len(names) > 200
    assert {name for name in names if modality_of(name) is None} <= UNDECIDED
    assert {name for name in names if modality_of(name) == "text"} == {"LLaDA2Pipeline", "DiffusionGemmaPipeline"}

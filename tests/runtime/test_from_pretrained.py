"""The libraries' own from_pretrained on folders that quantize wrote: the same outputs as the dequantized model's."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import diffusers
import pytest
import torch
import transformers
from safetensors.torch import load_file
from small_library_models import BY_NAME, LIBRARY_MODELS, LibraryModel
from small_models import run_python
from small_pipelines import PIPELINES

import arrow_quant_v2 as aq
from arrow_quant_v2 import ArrowQuantV2, ConfigurationError, DiffusionQuantConfig
from arrow_quant_v2.errors import SourceError, StoreError
from arrow_quant_v2.runtime.packed_weight import PackedWeight

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TOLERANCE = 1e-3
WIDTHS = (2, 4, 8)


@dataclass(frozen=True)
class Folders:
    """A quantized model, and the same dequantized, as the library writes it."""

    quantized: Path
    converted: Path


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Folders]:
    """The folders of a small model at this width; not to be changed."""

    @cache
    def make(name: str, bits: int) -> Folders:
        root, model = tmp_path_factory.mktemp("pretrained"), BY_NAME[name]
        config = DiffusionQuantConfig(
            bit_width=bits, group_size=16, method="rtn", modality=model.modality, min_accuracy=0.0, threads=1
        )
        ArrowQuantV2().quantize_diffusion_model(model.save(root / "source"), root / "out", config)
        ArrowQuantV2().convert(root / "out", root / "converted")
        return Folders(root / "out", root / "converted")

    return make


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Relative to the root mean square of the other."""
    assert one.shape == other.shape
    return float((one - other).abs().max() / other.pow(2).mean().sqrt())


def packed_in(module: torch.nn.Module) -> list[str]:
    return [name for name, part in module.named_modules() if isinstance(part, PackedWeight)]


def dequantized(model: LibraryModel, folder: Path) -> torch.nn.Module:
    """The converted model as its library loads it: of diffusers WanTransformer3DModel only where accelerate is."""
    if model.name != "WanTransformer3DModel":
        return model.cls.from_pretrained(folder)
    module = model.build()
    module.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"))
    return module


@pytest.mark.filterwarnings("ignore:.*PatchEmbed computes with pos_embed", "ignore:.*Output` is deprecated")
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("model", LIBRARY_MODELS, ids=lambda model: model.name)
def test_every_class_computes_what_its_dequantized_weights_compute(
    model: LibraryModel, bits: int, folders: Callable[[str, int], Folders]
) -> None:
    found = folders(model.name, bits)
    expected = model.call(dequantized(model, found.converted))
    theirs, ours = model.cls.from_pretrained(found.quantized), aq.load(found.quantized)
    assert type(theirs) is model.cls
    assert type(ours) is model.cls
    assert packed_in(theirs)
    assert packed_in(theirs) == packed_in(ours)
    assert not theirs.training
    assert difference(model.call(theirs), expected) < TOLERANCE
    assert difference(model.call(ours), expected) < TOLERANCE


@pytest.mark.parametrize(
    "imports", ["arrow_quant_v2, transformers, diffusers", "transformers, diffusers, arrow_quant_v2"]
)
def test_a_fresh_process_loads_it_whichever_was_imported_first(
    imports: str, folders: Callable[[str, int], Folders]
) -> None:
    code = f"""import sys, {imports}
from diffusers import UNet2DModel
from transformers import AutoModelForMaskedLM
for loaded in (UNet2DModel.from_pretrained(sys.argv[1]), AutoModelForMaskedLM.from_pretrained(sys.argv[2])):
    print(type(loaded).__name__, sum(type(part).__name__ == "PackedWeight" for part in loaded.modules()))"""
    names = ("UNet2DModel", "BertForMaskedLM")
    done = run_python(code, *(folders(name, 4).quantized for name in names))
    expected = [(name, len(packed_in(BY_NAME[name].cls.from_pretrained(folders(name, 4).quantized)))) for name in names]
    assert done.out.split() == [str(word) for pair in expected for word in pair], done.err


def test_libraries_imported_first_and_used_already_are_told_too(folders: Callable[[str, int], Folders]) -> None:
    code = """import sys
from diffusers import UNet2DModel
from transformers import BertForMaskedLM
refused = 0
for cls, folder in ((UNet2DModel, sys.argv[1]), (BertForMaskedLM, sys.argv[2])):
    try:
        cls.from_pretrained(folder)
    except (OSError, ValueError):
        refused += 1
import arrow_quant_v2
cls.from_pretrained(folder)
print(refused)"""
    done = run_python(code, *(folders(name, 4).quantized for name in ("UNet2DModel", "BertForMaskedLM")))
    assert done.out.strip() == "2", done.err  # without us nothing is loaded, and nothing made up


def test_importing_us_imports_no_library() -> None:
    done = run_python(
        "import sys, arrow_quant_v2\nprint({'torch', 'transformers', 'diffusers', 'numpy'} & {*sys.modules})"
    )
    assert done.out.strip() == "set()", done.err


@pytest.mark.parametrize("auto", ["AutoModelForMaskedLM", "AutoModelForPreTraining", "AutoModel"])
@pytest.mark.filterwarnings("ignore:.*which are zeros now", "ignore:.*have no place in the model")
def test_the_auto_classes_find_it(auto: str, folders: Callable[[str, int], Folders]) -> None:
    module = getattr(transformers, auto).from_pretrained(folders("BertForMaskedLM", 4).quantized)
    assert module.config.quantization_config.quant_method == "arrow_quant"
    assert packed_in(module)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized pipeline."""
    root = tmp_path_factory.mktemp("pipeline")
    source, config = PIPELINES["ddpm"].save(root / "source"), DiffusionQuantConfig(group_size=16, method="rtn")
    ArrowQuantV2().quantize_diffusion_model(source, root / "out", config)
    return root / "out"


def test_a_pipeline_is_loaded_by_diffusers_and_runs(pipeline: Path) -> None:
    found = diffusers.DiffusionPipeline.from_pretrained(pipeline)
    assert isinstance(found, diffusers.DDPMPipeline)
    assert packed_in(found.unet)
    draw = torch.Generator().manual_seed(0)
    assert found(generator=draw, num_inference_steps=2, output_type="np").images.shape == (1, 16, 16, 3)


def test_a_pipeline_that_diffusers_saves_is_loaded_again(pipeline: Path, tmp_path: Path) -> None:
    found = diffusers.DiffusionPipeline.from_pretrained(pipeline)
    found.save_pretrained(tmp_path / "again")
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "again")
    assert not [*tmp_path.rglob("*.safetensors")]
    call = BY_NAME["UNet2DModel"].call
    assert torch.equal(call(again.unet), call(found.unet))
    assert torch.equal(call(aq.load(tmp_path / "again")), call(found.unet))


# What is saved


@pytest.mark.parametrize("name", ["UNet2DModel", "BertForMaskedLM", "DiffusionGemmaForBlockDiffusion"])
def test_what_is_saved_is_loaded_again(name: str, folders: Callable[[str, int], Folders], tmp_path: Path) -> None:
    model, found = BY_NAME[name], folders(name, 2)
    before = model.cls.from_pretrained(found.quantized)
    before.save_pretrained(tmp_path / "again")
    after = model.cls.from_pretrained(tmp_path / "again")
    assert torch.equal(model.call(after), model.call(before))
    assert packed_in(after) == packed_in(before)
    assert ArrowQuantV2().inspect(tmp_path / "again")["layers"]
    for path in found.quantized.glob("*.parquet"):
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_a_changed_tensor_is_saved_as_it_is_now(folders: Callable[[str, int], Folders], tmp_path: Path) -> None:
    model = BY_NAME["BertForMaskedLM"]
    before = model.cls.from_pretrained(folders("BertForMaskedLM", 4).quantized)
    with torch.no_grad():
        before.cls.predictions.bias += 1.5
    before.save_pretrained(tmp_path / "again")
    after = model.cls.from_pretrained(tmp_path / "again")
    assert torch.equal(after.cls.predictions.bias, before.cls.predictions.bias)
    assert torch.equal(model.call(after), model.call(before))


def test_a_cast_model_is_saved_in_its_dtype(folders: Callable[[str, int], Folders], tmp_path: Path) -> None:
    cls = transformers.BertForMaskedLM
    before = cls.from_pretrained(folders("BertForMaskedLM", 4).quantized, dtype=torch.bfloat16)
    assert before.dtype == torch.bfloat16
    before.save_pretrained(tmp_path / "again")
    after = cls.from_pretrained(tmp_path / "again")
    assert after.dtype == torch.bfloat16
    assert torch.equal(after.bert.embeddings.LayerNorm.weight, before.bert.embeddings.LayerNorm.weight)


def test_a_folder_is_not_saved_over_itself(folders: Callable[[str, int], Folders]) -> None:
    found = folders("UNet2DModel", 4).quantized
    with pytest.raises(ConfigurationError, match="was loaded from there"):
        diffusers.UNet2DModel.from_pretrained(found).save_pretrained(found)


def test_nothing_is_saved_beside_other_weights(folders: Callable[[str, int], Folders], tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigurationError, match=r"holds other weights, model\.safetensors"):
        diffusers.UNet2DModel.from_pretrained(folders("UNet2DModel", 4).quantized).save_pretrained(tmp_path)


# What is asked for


@pytest.mark.parametrize("name", ["UNet2DModel", "BertForMaskedLM"])
def test_modules_to_not_convert_are_plain_layers(
    name: str, folders: Callable[[str, int], Folders], tmp_path: Path
) -> None:
    model, found = BY_NAME[name], folders(name, 4)
    asked = model.cls.from_pretrained(found.quantized).hf_quantizer.quantization_config
    part = {"UNet2DModel": "conv_in", "BertForMaskedLM": "bert.embeddings"}[name]
    asked.modules_to_not_convert = [part]
    module = model.cls.from_pretrained(found.quantized, quantization_config=asked)
    assert not [place for place in packed_in(module) if place.startswith(part)]
    assert packed_in(module)
    assert difference(model.call(module), model.call(model.cls.from_pretrained(found.converted))) < TOLERANCE
    module.save_pretrained(tmp_path / "again")
    assert packed_in(model.cls.from_pretrained(tmp_path / "again")) == packed_in(module)


def test_what_was_kept_when_it_was_quantized_is_kept(tmp_path: Path) -> None:
    source = BY_NAME["BertForMaskedLM"].save(tmp_path / "source")
    config = DiffusionQuantConfig(group_size=16, method="rtn", keep=["*embeddings*"], modality="text")
    ArrowQuantV2().quantize_diffusion_model(source, tmp_path / "out", config)
    module = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    assert type(module.get_input_embeddings()) is torch.nn.Embedding
    assert module.config.quantization_config.modules_to_not_convert == ["*embeddings*"]
    assert packed_in(module)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["UNet2DModel", "Qwen2ForCausalLM"])
def test_the_dtype_is_that_of_what_is_computed(
    name: str, dtype: torch.dtype, folders: Callable[[str, int], Folders]
) -> None:
    module = BY_NAME[name].cls.from_pretrained(folders(name, 8).quantized, torch_dtype=dtype)
    assert module.dtype == dtype
    assert {parameter.dtype for parameter in module.parameters()} == {dtype}


@pytest.mark.filterwarnings("ignore:.*have no place in the model")
def test_loading_information_is_given(folders: Callable[[str, int], Folders]) -> None:
    with pytest.warns(UserWarning, match=r"lacks pooler.dense.weight, pooler.dense.bias, which are zeros now"):
        _, told = transformers.BertModel.from_pretrained(
            folders("BertForMaskedLM", 4).quantized, output_loading_info=True
        )
    assert told["missing_keys"] == ["pooler.dense.weight", "pooler.dense.bias"]
    assert all(name.startswith("cls.") for name in told["unexpected_keys"])


def test_the_activations_can_be_rounded(folders: Callable[[str, int], Folders]) -> None:
    model, found = BY_NAME["BertForMaskedLM"], folders("BertForMaskedLM", 8).quantized
    exact = model.cls.from_pretrained(found)
    asked = exact.hf_quantizer.quantization_config
    asked.activations = "dynamic"
    rounded = model.cls.from_pretrained(found, quantization_config=asked)
    assert 0 < difference(model.call(rounded), model.call(exact)) < 0.1


# What is refused

REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "several devices": ({"device_map": {"a": "cpu", "b": "cuda:0"}}, "goes to one device"),
    "an unknown device": ({"device_map": "quantum"}, "device is 'quantum'; torch .* can run a model here on cpu"),
    "no number of a device": ({"device_map": 1.5}, "device_map is 1.5; allowed: a device"),
    "a variant": ({"variant": "fp16"}, "variant='fp16' cannot be followed"),
    "no dtype": ({"torch_dtype": "floaty"}, "dtype is 'floaty'"),
    "another quantization": (
        {"quantization_config": transformers.FineGrainedFP8Config()},
        "quantization_config is a FineGrainedFP8Config",
    ),
}


@pytest.mark.parametrize("what", REFUSALS)
@pytest.mark.parametrize("name", ["UNet2DModel", "BertForMaskedLM"])
def test_what_cannot_be_followed_is_refused(name: str, what: str, folders: Callable[[str, int], Folders]) -> None:
    given, message = REFUSALS[what]
    with pytest.raises(ConfigurationError, match=message):
        BY_NAME[name].cls.from_pretrained(folders(name, 4).quantized, **given)


@pytest.mark.filterwarnings("ignore:.*have no place in the model")
def test_another_class_is_refused(folders: Callable[[str, int], Folders]) -> None:
    with pytest.raises(SourceError, match=r"lacks classifier.weight, classifier.bias of BertForSequenceClass"):
        transformers.AutoModelForSequenceClassification.from_pretrained(folders("BertForMaskedLM", 4).quantized)
    with pytest.raises(SourceError, match=r"does not fit AutoencoderKL: the file lacks decoder"):
        diffusers.AutoencoderKL.from_pretrained(folders("UNet2DModel", 4).quantized)


@pytest.mark.parametrize("name", ["UNet2DModel", "BertForMaskedLM"])
def test_a_config_of_ours_beside_other_weights_is_refused(
    name: str, folders: Callable[[str, int], Folders], tmp_path: Path
) -> None:
    found = folders(name, 4)
    BY_NAME[name].save(tmp_path / "mixed")
    (tmp_path / "mixed" / "config.json").write_bytes((found.quantized / "config.json").read_bytes())
    with pytest.raises(ConfigurationError, match=r"a folder with config.json and \*.parquet on this disk"):
        BY_NAME[name].cls.from_pretrained(tmp_path / "mixed")


@pytest.mark.parametrize("name", ["UNet2DModel", "BertForMaskedLM"])
def test_damaged_weights_are_refused(name: str, folders: Callable[[str, int], Folders], tmp_path: Path) -> None:
    for path in folders(name, 4).quantized.iterdir():
        content = bytearray(path.read_bytes())
        if path.suffix == ".parquet":
            content[len(content) // 2] ^= 0xFF
        (tmp_path / path.name).write_bytes(content)
    with pytest.raises(StoreError):
        BY_NAME[name].cls.from_pretrained(tmp_path)


def test_folders_of_others_are_loaded_as_ever(tmp_path: Path) -> None:
    model = BY_NAME["BertForMaskedLM"]
    found = model.cls.from_pretrained(model.save(tmp_path))
    assert torch.equal(model.call(found), model.call(model.build()))
    assert getattr(found, "hf_quantizer", None) is None

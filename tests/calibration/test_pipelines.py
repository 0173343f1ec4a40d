"""A denoiser of diffusers is opened with the weights of its files in float32, and nothing of the folder is run."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_pipelines import PIPELINES

from arrow_quant_v2.calibration.pipelines import open_pipeline
from arrow_quant_v2.errors import QuantizationError, SourceError

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("FutureWarning", "DeprecationWarning")]
WEIGHTS = "diffusion_pytorch_model.safetensors"


def change(path: Path, **entries: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.mark.parametrize("name", ["ddpm", "dit", "flux", "wan", "dance", "stable audio"])
def test_weights_and_computed_tables_are_those_of_diffusers(name: str, tmp_path: Path) -> None:
    small = PIPELINES[name]
    runnable = open_pipeline(small.save(tmp_path))
    expected = small.build()
    assert not runnable.module.training
    assert type(runnable.module) is type(expected)
    assert runnable.modality == ("audio" if name in {"dance", "stable audio"} else "image")
    assert type(runnable.scheduler).__name__ == small.scheduler
    assert runnable.names == {key: key for key in expected.state_dict()}
    for (key, tensor), (_, other) in zip(all_tensors(runnable.module), all_tensors(expected), strict=True):
        assert torch.equal(tensor, other), key


def all_tensors(module: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Parameters and buffers, also those that are in no file."""
    return [*module.named_parameters(), *module.named_buffers()]


def test_half_precision_files_are_opened_in_float32(tmp_path: Path) -> None:
    root = PIPELINES["ddpm"].save(tmp_path)
    path = root / "unet" / WEIGHTS
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path)
    module = open_pipeline(root).module
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    half = PIPELINES["ddpm"].build().bfloat16().float()
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), half.parameters(), strict=True))


def test_old_names_of_attention_are_understood(tmp_path: Path) -> None:
    root = PIPELINES["ddpm"].save(tmp_path)
    path, weights = root / "unet" / WEIGHTS, load_file(root / "unet" / WEIGHTS)
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    renamed = {}
    for name in weights:
        renamed[name] = name
        for now, then in old.items():
            renamed[name] = renamed[name].replace(now, then)
    save_file({renamed[name]: tensor for name, tensor in weights.items()}, path)
    assert open_pipeline(root).names == {then: name for name, then in renamed.items()}


def test_a_bare_model_folder_has_no_scheduler(tmp_path: Path) -> None:
    root = PIPELINES["ddpm"].save(tmp_path)
    (root / "model_index.json").unlink()
    assert open_pipeline(root / "unet").scheduler is None


@pytest.mark.parametrize("entry", [["evil", "Schedule"], ["diffusers", "DPMSolverSDEScheduler"]])
def test_a_scheduler_that_cannot_be_opened_is_none(tmp_path: Path, entry: list[str]) -> None:
    root = PIPELINES["ddpm"].save(tmp_path)
    change(root / "model_index.json", scheduler=entry)
    change(root / "scheduler" / "scheduler_config.json", _class_name=entry[1])
    assert (open_pipeline(root).scheduler is None) == (entry[0] == "evil" or "torchsde" not in sys.modules)


def test_a_missing_weight_is_named(tmp_path: Path) -> None:
    root = PIPELINES["ddpm"].save(tmp_path)
    weights = load_file(root / "unet" / WEIGHTS)
    del weights["conv_in.weight"]
    save_file(weights, root / "unet" / WEIGHTS)
    with pytest.raises(SourceError, match=r"lacks 1 tensors of UNet2DModel, the first is conv_in.weight"):
        open_pipeline(root)


def test_a_weight_of_another_shape_is_named(tmp_path: Path) -> None:
    root = PIPELINES["ddpm"].save(tmp_path)
    change(root / "unet" / "config.json", in_channels=5)
    with pytest.raises(SourceError, match=r"conv_in.weight is \(8, 3, 3, 3\), but config.json asks for \(8, 5, 3, 3\)"):
        open_pipeline(root)


@pytest.mark.parametrize("name", ["Backdoor", "os", "__all__", "DDPMScheduler", "StableDiffusionPipeline", None, 3])
def test_only_models_of_diffusers_are_built(tmp_path: Path, name: object) -> None:
    root = PIPELINES["ddpm"].save(tmp_path)
    change(root / "unet" / "config.json", _class_name=name)
    with pytest.raises(SourceError, match=r"_class_name is .* which is no ModelMixin of diffusers"):
        open_pipeline(root)


def test_a_module_that_the_index_names_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = PIPELINES["ddpm"].save(tmp_path)
    (root / "evil.py").write_text("raise SystemExit('was imported')")
    monkeypatch.syspath_prepend(str(root))
    change(root / "model_index.json", unet=["evil", "UNet2DModel"])
    with pytest.raises(SourceError, match=r"unet is a class of 'evil'; only classes of diffusers"):
        open_pipeline(root)
    assert "evil" not in sys.modules


@pytest.mark.parametrize("wrong", [{"block_out_channels": 3}, {"down_block_types": ["NoBlock"] * 2}])
def test_a_config_that_builds_nothing_is_named(tmp_path: Path, wrong: dict[str, Any]) -> None:
    root = PIPELINES["ddpm"].save(tmp_path)
    change(root / "unet" / "config.json", **wrong)
    with pytest.raises(SourceError, match=r"config.json: UNet2DModel cannot be built from it"):
        open_pipeline(root)


def test_without_diffusers_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = PIPELINES["ddpm"].save(tmp_path)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(QuantizationError, match=r"pip install diffusers transformers"):
        open_pipeline(root)


def test_opening_leaves_the_random_state_as_it_was(tmp_path: Path) -> None:
    root, before = PIPELINES["pixart"].save(tmp_path), torch.get_rng_state()
    open_pipeline(root)
    assert torch.equal(torch.get_rng_state(), before)

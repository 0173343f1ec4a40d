from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from arrow_quant_v2.errors import SourceError
from arrow_quant_v2.sources.side_files import side_files

if TYPE_CHECKING:
    from pathlib import Path


def touched(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def kept(root: Path, component: str, *weights: str) -> list[str]:
    return [path.as_posix() for path in side_files(root, component, [root / weight for weight in weights])]


def test_everything_that_is_no_weight_is_kept_in_order(tmp_path: Path) -> None:
    others = ["1_Pooling/config.json", "README.md", "config.json", "modeling_x.py", "tokenizer.model", "vocab.txt"]
    assert kept(touched(tmp_path, *others, "model.safetensors"), "", "model.safetensors") == others


@pytest.mark.parametrize(
    "twin",
    [
        "pytorch_model.bin", "model.fp16.safetensors", "model.non_ema.safetensors", "pytorch_model.fp16.bin",
        "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "model.safetensors.index.json",
        "diffusion_pytorch_model.safetensors.index.fp16.json", "model-00001-of-00002.fp16.safetensors",
        "tf_model.h5", "flax_model.msgpack", "rust_model.ot", "consolidated.safetensors", "consolidated.00.pth",
        "onnx/model.onnx", "onnx/model.onnx_data", "openvino/openvino_model.bin", "openvino/openvino_model.xml",
        "original/consolidated.00.pth", "model-q4_k.gguf", "any.gguf", "model.onnx", "model.ckpt",
    ],
)  # fmt: skip
def test_the_same_weights_in_another_format_are_left_behind(twin: str, tmp_path: Path) -> None:
    assert kept(touched(tmp_path, "model.safetensors", "config.json", twin), "", "model.safetensors") == ["config.json"]
    component = touched(tmp_path / "p", "unet/model.safetensors", "unet/config.json", f"unet/{twin}")
    assert kept(component, "unet", "unet/model.safetensors") == ["unet/config.json"]


@pytest.mark.parametrize(
    "other",
    [
        "training_args.bin", "optimizer.pt", "2_Dense/model.safetensors", "models/readme.txt", "model_index.json",
        "modelcard.json", "adapter.safetensors", "embeddings.npy", "model.py", "tokenizer/model.onnx.json",
    ],
)  # fmt: skip
def test_files_that_only_look_like_weights_are_kept(other: str, tmp_path: Path) -> None:
    assert kept(touched(tmp_path, "model.safetensors", other), "", "model.safetensors") == [other]


def test_a_twin_of_a_file_with_an_unusual_name_is_left_behind(tmp_path: Path) -> None:
    root = touched(
        tmp_path, "dream-00001-of-00002.safetensors", "dream-00002-of-00002.safetensors", "dream.ckpt", "x.ckpt"
    )
    chosen = ("dream-00001-of-00002.safetensors", "dream-00002-of-00002.safetensors")
    assert kept(touched(root, "dream.safetensors.index.json"), "", *chosen) == ["x.ckpt"]


def test_other_components_of_a_pipeline_are_kept_with_all_their_formats(tmp_path: Path) -> None:
    others = [
        "model_index.json",
        "vae/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    root = touched(tmp_path, *others, "unet/diffusion_pytorch_model.safetensors")
    assert kept(root, "unet", "unet/diffusion_pytorch_model.safetensors") == others


@pytest.mark.parametrize("whole", ["flux1-dev.safetensors", "v1-5-pruned.ckpt", "sd3.gguf"])
def test_a_whole_pipeline_in_one_file_is_left_behind(whole: str, tmp_path: Path) -> None:
    root = touched(tmp_path, "model_index.json", "unet/model.safetensors", whole)
    assert kept(root, "unet", "unet/model.safetensors") == ["model_index.json"]


def test_what_tools_keep_in_a_folder_is_left_behind(tmp_path: Path) -> None:
    root = touched(
        tmp_path, "model.safetensors", ".git/x", ".cache/huggingface/x", "code/__pycache__/x.pyc", "code/x.py"
    )
    assert kept(root, "", "model.safetensors") == ["code/x.py"]


def test_links_within_the_model_are_followed(tmp_path: Path) -> None:
    root = touched(tmp_path, "model.safetensors", "a/config.json")
    (root / "b").symlink_to("a")
    (root / "c.json").symlink_to("a/config.json")
    assert kept(root, "", "model.safetensors") == ["a/config.json", "b/config.json", "c.json"]


@pytest.mark.parametrize("target", ["secret.txt", "folder"])
def test_a_link_out_of_the_model_is_refused_because_its_target_would_be_copied(target: str, tmp_path: Path) -> None:
    touched(tmp_path, "secret.txt", "folder/x")
    root = touched(tmp_path / "model", "model.safetensors")
    (root / "notes").symlink_to(f"../{target}")
    with pytest.raises(
        SourceError, match=rf"notes: is a link to .*{target}, outside the model; put a copy of it there"
    ):
        kept(root, "", "model.safetensors")


def test_a_link_to_nothing_is_refused(tmp_path: Path) -> None:
    root = touched(tmp_path, "model.safetensors")
    (root / "notes").symlink_to("gone")
    with pytest.raises(SourceError, match=r"notes: is a link to .*gone, which does not exist"):
        kept(root, "", "model.safetensors")


@pytest.mark.parametrize(("link", "target"), [("a/up", ".."), ("self", "self"), ("a/b", "../c"), ("here", ".")])
def test_a_circle_of_links_is_refused(link: str, target: str, tmp_path: Path) -> None:
    root = touched(tmp_path, "model.safetensors", "a/x", "c/x")
    (root / "c/d").symlink_to("../a")
    (root / link).symlink_to(target)
    with pytest.raises(SourceError, match=r"is a link to "):
        kept(root, "", "model.safetensors")


def test_weights_behind_a_link_that_the_user_made_are_followed(tmp_path: Path) -> None:
    touched(tmp_path, "big_disk/model.safetensors")
    root = touched(tmp_path / "model", "config.json")
    (root / "model.safetensors").symlink_to("../big_disk/model.safetensors")
    assert kept(root, "", "model.safetensors") == ["config.json"]


def test_a_folder_that_may_not_be_listed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def walk(_: object, onerror: object, **__: object) -> list[object]:
        raise_it(PermissionError(13, "Permission denied", str(tmp_path / "private")), onerror)
        return []

    monkeypatch.setattr("os.walk", walk)
    with pytest.raises(SourceError, match=r"private: cannot be opened: Permission denied; make it readable"):
        kept(tmp_path, "")


def raise_it(error: OSError, onerror: object) -> None:
    assert callable(onerror)
    onerror(error)

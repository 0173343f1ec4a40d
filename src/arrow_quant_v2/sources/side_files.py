"""Which files of a model folder go beside the quantized weights unchanged. Knows nothing of what the weights are."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from arrow_quant_v2.errors import SourceError
from arrow_quant_v2.sources.files import cannot_open

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

SKIPPED_FOLDERS = {".git", ".cache", "__pycache__"}  # made by tools, never part of a model
EXPORTS = {"onnx", "openvino", "coreml", "original"}  # folders with the same weights for another program
STEMS = (
    "diffusion_pytorch_model", "diffusion_flax_model", "model", "pytorch_model",
    "tf_model", "flax_model", "rust_model", "consolidated",
)  # fmt: skip
SUFFIXES = ("safetensors", "bin", "pt", "pth", "ckpt", "gguf")
FOREIGN = (".h5", ".msgpack", ".onnx", ".onnx_data", ".ot", ".gguf", ".tflite", ".mlmodel", ".flashpack", ".pdparams")
VARIANT = rf"([.-][\w.-]*)?\.({'|'.join(SUFFIXES)})(\.index(\.\w+)?\.json)?"


def side_files(root: Path, component: str, weight_files: Iterable[Path]) -> tuple[Path, ...]:
    """Every file below `root`, relative and sorted, but the weights of `component` in any format.

    Raises:
        SourceError: a folder cannot be listed, or a link leads nowhere or out of the model.
    """
    weights = {path.relative_to(root) for path in weight_files if path.is_relative_to(root)}
    twin = _twin_names(weights)
    home = _home(root)
    found = ((path, path.relative_to(root)) for path in _files_below(root, home))
    kept = {rel: path for path, rel in found if rel not in weights and not _is_twin(rel, component, twin)}
    for path in kept.values():
        _refuse_stray_link(path, home)
    return tuple(sorted(kept))


def _twin_names(weights: Iterable[Path]) -> re.Pattern[str]:
    """Names of files that hold the same weights: the usual ones, and the chosen files' stem with another ending."""
    chosen = {re.sub(r"-\d+-of-\d+|\.\w+$", "", path.name) for path in weights}
    return re.compile(f"({'|'.join(map(re.escape, sorted(chosen.union(STEMS))))}){VARIANT}")


def _is_twin(path: Path, component: str, twin: re.Pattern[str]) -> bool:
    """Whether the file holds the component's weights in another format, precision or packing."""
    if component and path.parent == Path():  # a whole pipeline in one file, beside the folders
        return path.name.endswith((*FOREIGN, *(f".{suffix}" for suffix in SUFFIXES)))
    if component and path.parts[0] != component:
        return False
    inner = path.relative_to(component) if component else path
    if len(inner.parts) > 1:
        return inner.parts[0] in EXPORTS
    return twin.fullmatch(path.name) is not None or path.name.endswith(FOREIGN)


def _home(root: Path) -> Path:
    """The folder that links may not leave: the model, or the repository in a hub cache that it is a snapshot of."""
    real = root.resolve()
    caches = (p.parent for p in (real, *real.parents) if p.name == "snapshots" and (p.parent / "blobs").is_dir())
    return next(caches, real)


def _files_below(root: Path, home: Path) -> Iterator[Path]:
    for current, folders, files in os.walk(root, onerror=_refuse_folder, followlinks=True):
        here = Path(current)
        folders[:] = sorted(set(folders) - SKIPPED_FOLDERS)
        for path in (here / name for name in folders):
            _refuse_stray_link(path, home)
            _refuse_cycle(path)
        yield from (here / name for name in files)


def _refuse_folder(error: OSError) -> NoReturn:
    raise cannot_open(Path(error.filename), error) from error


def _refuse_stray_link(path: Path, home: Path) -> None:
    """What lies behind a link is copied, so a link in a downloaded model must not reach the user's own files."""
    if not path.is_symlink():
        return
    target = Path(os.path.realpath(path))
    if not target.exists():
        raise SourceError(f"{path}: is a link to {target}, which does not exist; download the model again or remove it")
    if not target.is_relative_to(home):
        raise SourceError(f"{path}: is a link to {target}, outside the model; put a copy of it there, or remove it")


def _refuse_cycle(path: Path) -> None:
    if path.is_symlink() and path.resolve() in {parent.resolve() for parent in path.parents}:
        raise SourceError(f"{path}: is a link to a folder that contains it; remove the link")

"""Which files of a folder are the weights, which component of a pipeline is meant, and what is copied beside them.

Knows the names that transformers and diffusers give to files; reads no weights itself.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arrow_quant_v2.errors import SourceError
from arrow_quant_v2.sources.files import cannot_open, read_json, refuse_traversal
from arrow_quant_v2.sources.side_files import side_files

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import TracebackType

    from typing_extensions import Self

    from arrow_quant_v2.sources.base import Source

PIPELINE = "model_index.json"
DENOISERS = ("transformer", "unet", "model", "prior", "decoder", "transformer_2", "diffusion_decoder")
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
NOT_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state.*|random_states.*)\.(bin|pt|pth)")
SHARD = re.compile(r"-(\d+)-of-(\d+)")


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """A format of weights: its suffixes, and the class that reads it, imported when it is needed."""

    suffixes: tuple[str, ...]
    module: str
    reader: str

    def load(self) -> Any:
        return getattr(importlib.import_module(f"arrow_quant_v2.sources.{self.module}"), self.reader)


PARQUET = _Kind(suffixes=(".parquet",), module="parquet", reader="ParquetSource")
SAFETENSORS = _Kind(suffixes=(".safetensors",), module="safetensors", reader="SafetensorsSource")
CHECKPOINT = _Kind(suffixes=(".bin", ".pt", ".pth", ".ckpt"), module="checkpoint", reader="CheckpointSource")
NPY = _Kind(suffixes=(".npy",), module="npy", reader="NpySource")
FILES = (SAFETENSORS, CHECKPOINT)  # the preferred one first


@dataclass(frozen=True, kw_only=True)
class Model:
    """An opened model: its weights, and where the rest of it lies.

    `component` is "" for a plain folder, else the subfolder of a pipeline that holds the weights.
    `side_files` are relative to `root`, sorted: everything that goes beside the quantized weights unchanged.
    """

    source: Source
    root: Path
    component: str
    side_files: tuple[Path, ...]

    @property
    def folder(self) -> Path:
        """Where the weights lie."""
        return self.root / self.component

    def close(self) -> None:
        """Close the source."""
        self.source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def open_model(path: Path | str, component: str | None = None) -> Model:
    """Open a model folder or one weight file; headers are read, values are not.

    `component` chooses a part of a diffusers pipeline; by default its denoiser.

    Raises:
        SourceError: nothing readable lies there, several things do, or a file is damaged or hostile.
    """
    root = Path(path)
    try:
        if root.is_dir():
            return _open_folder(root, component)
        exists = root.exists()
    except OSError as error:
        raise cannot_open(root, error) from error
    if not exists:
        raise SourceError(f"{root}: does not exist; give a model folder or file on this disk ({_download(path)})")
    if component:
        raise SourceError(f"{root}: is one file and has no component {component!r}; give the pipeline's folder")
    return Model(source=_open_file(root), root=root.parent, component="", side_files=())


def _download(path: Path | str) -> str:
    named = str(path) if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) else "OWNER/NAME"
    return f"a model of the Hugging Face hub is downloaded first: hf download {named}"


def _open_folder(root: Path, component: str | None) -> Model:
    part = _component(root, component)
    source = _open_weights(root / part)
    try:
        beside = side_files(root, part, source.weight_files)
    except SourceError:
        source.close()
        raise
    return Model(source=source, root=root, component=part, side_files=beside)


def _component(root: Path, asked: str | None) -> str:
    """The subfolder that holds the weights: that of the asked component, of the denoiser, or "" for the root."""
    index = root / PIPELINE
    if not index.exists():
        if asked:
            raise SourceError(f"{root}: is no pipeline (no {PIPELINE}), so it has no component {asked!r}; leave it out")
        return ""
    parts = [name for name in _declared(index) if (root / name).is_dir()]
    if asked and asked not in parts:
        raise SourceError(f"{root}: has no component {asked!r}; it has {', '.join(parts) or 'none'}")
    found = asked or next((name for name in DENOISERS if name in parts), None)
    if found is None:
        raise SourceError(
            f"{root}: none of its components is a denoiser ({', '.join(DENOISERS)});"
            f" choose one with --component: {', '.join(parts) or 'but none lies there'}"
        )
    return found


def _declared(index: Path) -> list[str]:
    """The components of a pipeline: the entries [library, class]; [null, null] is one that was left out."""
    entries = read_json(index).items()
    names = [name for name, entry in entries if isinstance(entry, list) and all(entry) and entry[1:]]
    return [refuse_traversal(name, f"{index}: component") for name in names]


def _open_weights(folder: Path) -> Source:
    """Read the preferred one of the formats that lie in a folder: files with the usual names before any others."""
    names = _names(folder)
    if any(name.endswith(PARQUET.suffixes) for name in names):
        source: Source = PARQUET.load()(folder)
        return source
    for choose in (_usual, _only):
        for kind in FILES:
            if chosen := choose(kind, names, folder):
                return _read(kind, [folder / name for name in chosen])
    if any(name.endswith(NPY.suffixes) for name in names):
        arrays: Source = NPY.load()(folder)
        return arrays
    looked_for = ", ".join(f"*{suffix}" for kind in (PARQUET, *FILES, NPY) for suffix in kind.suffixes)
    raise SourceError(f"{folder}: holds no weights; looked for {looked_for}{_elsewhere(folder)}")


def _elsewhere(folder: Path) -> str:
    below = sorted({hit.parent.name for hit in folder.glob("*/*.safetensors")})
    return (
        f"; there are some in {', '.join(below[:5])}: give that folder"
        if below
        else "; give the folder that holds them"
    )


def _names(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir() if not entry.is_dir())
    except OSError as error:
        raise cannot_open(folder, error) from error


def _usual(kind: _Kind, names: list[str], _folder: Path) -> list[str]:
    """The file or index with a name that diffusers or transformers gives."""
    usual = (stem + suffix + end for end in ("", ".index.json") for stem in STEMS for suffix in kind.suffixes)
    return next(([name] for name in usual if name in names), [])


def _only(kind: _Kind, names: list[str], folder: Path) -> list[str]:
    """The one index, file, or set of shards with any name."""
    indexes = [name for name in names if name.endswith(tuple(s + ".index.json" for s in kind.suffixes))]
    if len(indexes) == 1:
        return indexes
    weights = [name for name in names if name.endswith(kind.suffixes) and not NOT_WEIGHTS.fullmatch(name)]
    families = sorted({SHARD.sub("", name) for name in weights})
    if len(families) > 1:
        raise SourceError(f"{folder}: holds several models: {', '.join(families)}; give the file that you mean")
    _refuse_gaps(weights, folder)
    return weights


def _refuse_gaps(names: Iterable[str], folder: Path) -> None:
    """Check that shards without an index are all there, by the numbers in their names."""
    numbered = [(int(hit[1]), int(hit[2])) for hit in map(SHARD.search, names) if hit]
    if numbered and sorted(numbered) != [(i, len(numbered)) for i in range(1, len(numbered) + 1)]:
        total = max(last for _, last in numbered)
        raise SourceError(f"{folder}: holds {len(numbered)} of {total} shards and no index; download the others")


def _open_file(path: Path) -> Source:
    for kind in FILES:
        if path.name.endswith((*kind.suffixes, *(suffix + ".index.json" for suffix in kind.suffixes))):
            return _read(kind, [path])
    allowed = ", ".join(suffix for kind in FILES for suffix in kind.suffixes)
    raise SourceError(f"{path}: is no weight file; a file ends in {allowed}: give one, or the model's folder")


def _read(kind: _Kind, paths: list[Path]) -> Source:
    reader = kind.load()
    source: Source = reader.from_index(paths[0]) if paths[0].name.endswith(".index.json") else reader(paths)
    return source

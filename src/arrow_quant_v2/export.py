"""A model of any source as safetensors again, streamed, loadable by transformers and diffusers.

Knows nothing of quantization: a quantized source hands out dequantized values.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from arrow_quant_v2.errors import ConfigurationError
from arrow_quant_v2.packed import ITEM_BITS
from arrow_quant_v2.progress import Progress
from arrow_quant_v2.publish import CONFIG, REPORTS, copy_file, original_name, write_json
from arrow_quant_v2.sources.files import read_json
from arrow_quant_v2.sources.safetensors import DTYPES
from arrow_quant_v2.store.writer import fsync
from arrow_quant_v2.workfolder import (
    METADATA,
    explained,
    is_output,
    make_durable_tree,
    partial_of,
    refuse_overlap,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import BinaryIO

    from arrow_quant_v2.packed import TensorInfo
    from arrow_quant_v2.sources.base import Source
    from arrow_quant_v2.sources.folder import Model

SHARD_BYTES = 5 * 10**9  # as transformers and diffusers cut their own
SLICE_BYTES = 8 * 2**20
CODES = {ours: theirs for theirs, ours in DTYPES.items()}


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written: the files, and the bytes of their tensors."""

    files: tuple[Path, ...]
    tensor_bytes: int


def export_model(model: Model, out: Path, report: Callable[[str, float], object] | None = None) -> Exported:
    """Write every tensor in its original dtype, with the model's other files, into the new folder `out`.

    Raises:
        ConfigurationError: `out` exists, or lies in the model's own folder or around it.
        SourceError: the model cannot be read.
        StoreError: the model's codes are damaged, or the disk refuses.
    """
    partial = partial_of(out)
    with explained(out):
        if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
            raise ConfigurationError(f"{out}: exists; choose another output folder")
        if os.path.lexists(partial):
            raise ConfigurationError(f"{partial}: is in the way, perhaps of an unfinished run; remove or rename it")
    refuse_overlap(out, model.root, [*model.source.weight_files, *(model.root / path for path in model.side_files)])
    try:
        exported = _write_all(model, partial, report)
        make_durable_tree(partial)
        with explained(out):
            partial.replace(out)
            fsync(partial.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Exported(
        files=tuple(out / path.relative_to(partial) for path in exported.files), tensor_bytes=exported.tensor_bytes
    )


def _write_all(model: Model, target: Path, report: Callable[[str, float], object] | None) -> Exported:
    weights = target / model.component
    with explained(weights):
        weights.mkdir(parents=True)
    for path in model.side_files:
        if (name := _exported_name(path, model)) is not None:
            copy_file(model.root / path, target / name)
    stem = _stem(weights / CONFIG, model.component)
    tensors = model.source.tensors
    progress = Progress(report, sum(info.nbytes for info in tensors))
    shards = list(_shards(tensors))
    files = []
    for number, shard in enumerate(shards, start=1):
        numbered = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        files.append(weights / f"{stem}{numbered}.safetensors")
        with explained(files[-1]), files[-1].open("wb") as file:
            _write_shard(model.source, shard, file, progress)
    total = sum(info.nbytes for info in tensors)
    if len(shards) > 1:
        places = {info.name: file.name for file, shard in zip(files, shards, strict=True) for info in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        write_json(weights / f"{stem}.safetensors.index.json", index)
    return Exported(files=tuple(files), tensor_bytes=total)


def _exported_name(path: Path, model: Model) -> Path | None:
    """What a file is called beside dequantized weights: the original's card has its name back, ours are left out."""
    if not is_output(model.root) or len(path.parts) > 1:
        return path
    if path.name in {METADATA, *REPORTS}:
        return None
    names = (Path(name) for name in REPORTS if original_name(Path(name), ()) == path)
    return next(names, path)


def _stem(config: Path, component: str) -> str:
    """The name that the loading library looks for; `config` loses what it said of the quantization."""
    content = read_json(config) if config.exists() else {}
    if content.pop("quantization_config", None) is not None:
        write_json(config, content)
    return "diffusion_pytorch_model" if _is_diffusers(content, component) else "model"


def _is_diffusers(config: dict[str, Any], component: str) -> bool:
    return "_class_name" in config or (bool(component) and "architectures" not in config)


def _shards(tensors: Sequence[TensorInfo]) -> Iterator[list[TensorInfo]]:
    """Neighbours by name, in files of at most SHARD_BYTES where no tensor is larger."""
    shard: list[TensorInfo] = []
    size = 0
    for info in tensors:
        if shard and size + info.nbytes > SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append(info)
        size += info.nbytes
    if shard:
        yield shard


def _write_shard(source: Source, tensors: Sequence[TensorInfo], file: BinaryIO, progress: Progress) -> None:
    """One safetensors file: u64 header size, JSON header padded to eight bytes, values; widest dtypes first."""
    ordered = sorted(tensors, key=lambda info: (-ITEM_BITS[info.dtype], info.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for info in ordered:
        header[info.name] = {
            "dtype": CODES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [offset, offset + info.nbytes],
        }
        offset += info.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for info in ordered:
        _write_values(source, info, file, progress)


def _write_values(source: Source, info: TensorInfo, file: BinaryIO, progress: Progress) -> None:
    step = max(1, SLICE_BYTES * 8 // ITEM_BITS[info.dtype])
    for start in range(0, info.numel, step):
        stop = min(info.numel, start + step)
        values = source.read(info.name, start, stop).view(torch.uint8).numpy()
        file.write(values.data)
        progress.advance(values.nbytes, info.name)
    progress.tell(info.name)

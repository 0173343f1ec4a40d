"""A model that was loaded from our folder, as such a folder again: codes as they were, other tensors as they are now.

Knows nothing of transformers or diffusers, which write the files beside the weights.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from arrow_quant_v2.errors import ConfigurationError
from arrow_quant_v2.runtime.packed_weight import PackedWeight
from arrow_quant_v2.sources.files import read_json
from arrow_quant_v2.store.crc32 import crc32
from arrow_quant_v2.store.reader import StoredModel
from arrow_quant_v2.store.record import LayerRecord, RawTensor, split
from arrow_quant_v2.store.schema import RESERVED_KEYS
from arrow_quant_v2.store.writer import explained, write_group, write_part

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from torch import nn

    from arrow_quant_v2.runtime.pretrained import Origin

METADATA = "metadata.json"
WEIGHTS = (".parquet", ".safetensors", ".bin", ".pt", ".ckpt")
CHUNK_BYTES = 32 * 2**20  # of a tensor that is not quantized, in one row of the file
GROUP_BYTES = 64 * 2**20  # of a file whose layers lie in one row group: they are in memory at once


def save_weights(module: nn.Module, origin: Origin, target: Path) -> None:
    """Write Parquet files into the folder `target`, with the names that they have where the model came from.

    A file of which no tensor was changed, or cast, is copied. Layers that run packed are written as they were read.

    Raises:
        ConfigurationError: `target` is where the model came from, or holds other weights.
        StoreError: the model's files are gone or damaged, or the disk refuses.
    """
    held = {name: _now(module, place) for name, place in origin.names.items()}
    with StoredModel(origin.folder) as stored:
        _refuse_mixing(target, origin.folder, {path.name for path in stored.files})
        for path in stored.files:
            records = [one for one in stored.entries if one.file == path]
            names = sorted({one.layer_name for one in records})
            if all(_unchanged(stored, name, held.get(name)) for name in names):
                _copy(path, target / path.name)
                continue
            rewritten = (record for name in names for record in _records(stored, name, held.get(name)))
            small = sum(one.stored_bytes for one in records) <= GROUP_BYTES
            write = _write_group if small else write_part
            metadata = {k: v for k, v in stored.file_metadata(path).items() if k not in RESERVED_KEYS}
            write(target / path.name, rewritten, metadata)
    _write_metadata(origin.folder, target)


def _write_group(path: Path, records: Iterator[LayerRecord], metadata: Mapping[str, str]) -> None:
    write_group(path, list(records), metadata)


def _refuse_mixing(target: Path, source: Path, names: set[str]) -> None:
    """Our files are mapped where they lie, and a folder of two models' weights would be neither."""
    if target.exists() and target.samefile(source):
        raise ConfigurationError(f"{target}: the model was loaded from there and is still read; save it elsewhere")
    with explained(target):
        target.mkdir(parents=True, exist_ok=True)
        others = sorted(one.name for one in target.iterdir() if one.suffix in WEIGHTS and one.name not in names)
    if others:
        raise ConfigurationError(f"{target}: holds other weights, {', '.join(others[:3])}; choose an empty folder")


def _copy(source: Path, target: Path) -> None:
    """Copy a file; it appears whole."""
    temporary = target.with_name(target.name + ".tmp")
    with explained(target):
        shutil.copyfile(source, temporary)
        temporary.replace(target)


def _now(module: nn.Module, place: str) -> torch.Tensor | PackedWeight:
    path, _, leaf = place.rpartition(".")
    found: torch.Tensor | PackedWeight = getattr(module.get_submodule(path), leaf)
    return found


def _unchanged(stored: StoredModel, name: str, held: torch.Tensor | PackedWeight | None) -> bool:
    """Whether the file still says what the module holds; tensors without a place in the module are kept."""
    first = stored.chunks(name)[0]
    if held is None or isinstance(held, PackedWeight):
        return True
    payload = stored.read(name)
    if first.layout is not None:
        values = PackedWeight(*payload, dtype=held.dtype).dequantized()  # type: ignore[arg-type]
        return torch.equal(values, held.detach().cpu())
    return bytes(_bytes(held)) == b"".join(one.values.tobytes() for one in payload if isinstance(one, RawTensor))


def _records(stored: StoredModel, name: str, held: torch.Tensor | PackedWeight | None) -> Iterator[LayerRecord]:
    """The rows of one layer: those that are there, or new ones of a tensor that was changed."""
    rows = [stored.record(one) for one in stored.chunks(name)]
    if held is None or isinstance(held, PackedWeight) or _unchanged(stored, name, held):
        yield from rows
        return
    values = _bytes(held)
    payload = RawTensor(name=name, shape=tuple(held.shape), dtype=str(held.dtype).removeprefix("torch."), values=values)
    changed = replace(
        rows[0], method=None, cosine_similarity=None, mse=None, output_error=None, time_aware_quant=None,
        spatial_quant=None, activation_stats=None, decision="kept: saved from a model in memory",
        bits_per_weight=8.0 * held.element_size(), source_checksum=crc32(values, 0),
    )  # fmt: skip
    for chunk, part in enumerate(split(payload, CHUNK_BYTES)):
        yield replace(changed, payload=part, chunk=chunk)


def _bytes(tensor: torch.Tensor) -> Any:
    """The values as uint8 (bytes,), little-endian."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy() if flat.numel() else np.empty(0, np.uint8)


def _write_metadata(source: Path, target: Path) -> None:
    """The metadata.json of the model, or of the pipeline around it, for a folder that is the component alone."""
    for path in (source / METADATA, source.parent / METADATA):
        if path.is_file():
            found = read_json(path) | {"component": ""}
            with explained(target / METADATA):
                (target / METADATA).write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            return

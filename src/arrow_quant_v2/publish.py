"""Finished parts become a model folder: few large files, the source's other files, and what is known of it all.

Knows nothing of how layers were made; writes only inside the work folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from arrow_quant_v2 import __version__
from arrow_quant_v2.decisions import fallback_rates, fallbacks_per_method
from arrow_quant_v2.errors import SourceError
from arrow_quant_v2.sources.files import read_json
from arrow_quant_v2.store.merge import merge_parts
from arrow_quant_v2.store.reader import StoredModel
from arrow_quant_v2.store.schema import CONFIGURATION_KEY, SCHEMA_VERSION, SOURCE_KEY, version_text
from arrow_quant_v2.workfolder import METADATA, explained, is_output

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence
    from pathlib import Path

    from arrow_quant_v2.config import DiffusionQuantConfig, Modality
    from arrow_quant_v2.packed import TensorInfo
    from arrow_quant_v2.plan import LayerPlan
    from arrow_quant_v2.sources.folder import Model
    from arrow_quant_v2.workfolder import WorkFolder

OWN_FILE_BYTES = 4 * 2**20  # a layer as large as this is a file of its own, which costs no second copy of it
SHARED_FILE_BYTES = 32 * 2**20  # of a file of smaller layers
CONFIG = "config.json"
CARD, REPORT, PAGE = "README.md", "report.json", "report.html"  # ours, in every folder that is published
REPORTS = (CARD, REPORT, PAGE)


@dataclass(frozen=True, kw_only=True)
class Description:
    """What is known of a result before any work; it goes into every file."""

    config: DiffusionQuantConfig
    modality: Modality
    component: str
    source_hash: str

    def file_metadata(self) -> dict[str, str]:
        """Key-value metadata of every Parquet file."""
        return {
            CONFIGURATION_KEY: json.dumps(self.config.identity(), sort_keys=True),
            SOURCE_KEY: self.source_hash,
            "program_version": __version__,
            "modality": self.modality,
        }


def source_hash(tensors: Iterable[TensorInfo]) -> str:
    """SHA-256 over name, dtype and shape of every tensor; values are guarded by `source_checksum` per layer."""
    lines = (f"{t.name}\t{t.dtype}\t{list(t.shape)}\n" for t in tensors)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def content_hash(tensors: Iterable[tuple[str, str, tuple[int, ...], int]]) -> str:
    """SHA-256 over (name, dtype, shape, CRC-32 of the values) of every tensor."""
    lines = (f"{name}\t{dtype}\t{list(shape)}\t{checksum}\n" for name, dtype, shape, checksum in tensors)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def has_own_file(plan: LayerPlan) -> bool:
    """Whether the part of this layer becomes a file of the result as it is; others are merged."""
    return plan.stored_bytes >= OWN_FILE_BYTES


def file_groups(plans: Sequence[LayerPlan]) -> list[list[int]]:
    """Which layers share a file, by their numbers: none with a large one, small ones until they fill a file."""
    groups: list[list[int]] = []
    shared: list[int] = []
    size = 0
    for index, plan in enumerate(plans):
        if has_own_file(plan):
            groups.append([index])
            continue
        if not shared or size + plan.stored_bytes > SHARED_FILE_BYTES:
            groups.append(shared := [])
            size = 0
        shared.append(index)
        size += plan.stored_bytes
    return groups


def file_name(number: int, total: int) -> str:
    """Like "weights-00001-of-00003.parquet"."""
    return f"weights-{number:05d}-of-{total:05d}.parquet"


def assemble(folder: WorkFolder, plans: Sequence[LayerPlan], description: Description, model: Model | None) -> None:
    """Put the whole output together in `folder.model`.

    Raises:
        StoreError: the disk refuses.
        SourceError: a file of the source cannot be copied.
    """
    target = folder.fresh_model()
    weights = target / description.component
    with explained(weights):
        weights.mkdir(parents=True, exist_ok=True)
    groups = file_groups(plans)
    for number, group in enumerate(groups, start=1):
        parts = [folder.last(index) for index in group]
        _one_file(parts, weights / file_name(number, len(groups)), description)
    if model is not None:
        for path, name in kept_files(model).items():
            copy_file(model.root / path, target / name)
    _announce(weights / CONFIG, description)
    summary = _summary(weights, plans, description)
    write_json(target / METADATA, summary)


def kept_files(model: Model) -> dict[Path, Path]:
    """The model's files beside its weights, and the name of each in the output: ours give way to none of them.

    A README.md becomes README.original.md. Reports that this program wrote are of the model that was, and left out.
    """
    ours = is_output(model.root)
    taken = set(model.side_files)
    names: dict[Path, Path] = {}
    for path in model.side_files:
        clash = str(path) in REPORTS
        if not (clash and ours):
            names[path] = original_name(path, taken) if clash else path
    return names


def original_name(path: Path, taken: Collection[Path]) -> Path:
    """Under which name a file is kept that has the name of one of ours: "README.md" becomes "README.original.md"."""
    found = path.with_suffix(f".original{path.suffix}")
    return original_name(found, taken) if found in taken else found


def _one_file(parts: Sequence[Path], target: Path, description: Description) -> None:
    if len(parts) > 1:
        merge_parts(parts, target, description.file_metadata())
        return
    with explained(target):
        try:
            os.link(parts[0], target)
        except OSError:  # a file system without links
            shutil.copyfile(parts[0], target)


def copy_file(source: Path, target: Path) -> None:
    """Copy the content of a file, links followed, into a folder that is made if need be.

    Raises:
        SourceError: the file cannot be read.
        StoreError: the disk refuses.
    """
    with explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copyfile(source, target)
        except OSError as problem:
            if problem.filename != str(source) or problem.filename2 is not None:  # both: while writing
                raise
            raise SourceError(
                f"{source}: cannot be copied: {problem.strerror}; the model was changed under the run: restore it"
            ) from problem


def _announce(config: Path, description: Description) -> None:
    """Say in the component's config.json, where it has one, how its weights are stored."""
    if not config.exists():
        return
    content = read_json(config)
    asked = description.config
    content["quantization_config"] = {
        "quant_method": "arrow_quant",
        "schema_version": version_text(SCHEMA_VERSION),
        "bits": asked.bit_width,
        "group_size": asked.group_size,
        "symmetric": asked.symmetric,
        "method": asked.method,
        "modules_to_not_convert": list(asked.keep),
    }
    write_json(config, content)


def write_json(path: Path, content: object) -> None:
    """Write indented JSON.

    Raises:
        StoreError: the disk refuses.
    """
    with explained(path):
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _summary(weights: Path, plans: Sequence[LayerPlan], description: Description) -> dict[str, object]:
    """What metadata.json says; no times, paths or machines, so that equal runs give equal bytes."""
    with StoredModel(weights) as stored:
        entries = [one for one in stored.entries if one.chunk == 0]
        content = content_hash((one.layer_name, one.dtype, one.shape, one.source_checksum) for one in entries)
        cosines = [one.cosine_similarity for one in entries if one.cosine_similarity is not None]
        widths = Counter(one.layout.bits for one in entries if one.layout is not None)
        files = [path.name for path in stored.files]
    decisions = [plan.decision for plan in plans]
    return {
        "format": "arrow_quant",
        "schema_version": version_text(SCHEMA_VERSION),
        "program_version": __version__,
        "modality": description.modality,
        "is_diffusion_model": True,
        "component": description.component,
        "bit_width": description.config.bit_width,
        "configuration": description.config.identity(),
        "calibration": None,
        "source_hash": description.source_hash,
        "source_content_hash": content,
        "weight_files": files,
        "layers": len(entries),
        "quantized_layers": len(cosines),
        "mean_weight_cosine": sum(cosines) / len(cosines) if cosines else None,
        "min_weight_cosine": min(cosines, default=None),
        "kept": {d.layer_name: d.because for d in decisions if d.kind == "kept"},
        "bit_widths": {str(bits): count for bits, count in sorted(widths.items())},
        "fallbacks": {d.layer_name: str(d) for d in decisions if d.kind == "fallback"},
        "fallbacks_per_method": fallbacks_per_method(decisions),
        "fallback_rate_per_method": fallback_rates(decisions),
    }

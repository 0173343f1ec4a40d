"""Stats in a folder: stats.json, and a safetensors file for every input, or for each of its time groups.

    stats.json               whose stats they are, what was shown, and which layers share which input
    00017.safetensors        input 17, all time groups together: H is their stratified sum
    00017-003.safetensors    input 17 in time group 3 alone; only such stats can always be merged

Reads one input at a time. Knows no models and no plans.
"""

from __future__ import annotations

import hashlib
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import BaseModel, Field, JsonValue, StringConstraints
from pydantic import ValidationError as WrongContent
from safetensors import SafetensorError
from safetensors.torch import save_file

from arrow_quant_v2.calibration.observe import weights
from arrow_quant_v2.calibration.stats import MOMENTS, PROBES, InputStats, tensors_by_part
from arrow_quant_v2.errors import ChecksumError, ConfigurationError, SchemaVersionError, SourceError, StoreError
from arrow_quant_v2.sources.files import JSON_LIMIT, ByteFile, parse_object
from arrow_quant_v2.sources.safetensors import SafetensorsSource
from arrow_quant_v2.store.crc32 import crc32
from arrow_quant_v2.time_groups import TimeGroups

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

NAME, FORMAT, VERSION = "stats.json", "arrow_quant_stats", 2
READABLE = (1, 2)  # those of version 1 have no parts
FILE_NAME = r"^[0-9]{5}(-[0-9]{3})?\.safetensors$"  # so that no name leads out of the folder
FLOATS = ("second", "absmax", "sums")
AGAIN = "calibrate again"

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Text = Annotated[str, StringConstraints(min_length=1)]
TensorHeader = tuple[str, tuple[int, ...]]
"""Dtype and shape."""


class KeptFile(BaseModel, frozen=True, extra="forbid", strict=True):
    """One file, and the CRC-32 of its tensors' bytes in the order of their names."""

    name: Annotated[str, StringConstraints(pattern=FILE_NAME)]
    crc32: Count


class KeptInput(BaseModel, frozen=True, extra="forbid", strict=True):
    """The layers that share one input, and where its stats lie: None where no sample of that time group gave any.

    transposed  rows of their weights belong to inputs, not to outputs
    parts       rows of the weight that have inputs of their own, as each expert has; first and the one after the last
    """

    layers: Annotated[tuple[Text, ...], Field(min_length=1)]
    columns: Positive
    channels: Positive
    transposed: bool = False
    parts: tuple[tuple[Count, Positive], ...] = ()
    files: Annotated[tuple[KeptFile | None, ...], Field(min_length=1)]


class KeptSamples(BaseModel, frozen=True, extra="forbid", strict=True):
    """What one calibration showed: `count` samples; `sizes` says how many calls of the model each time group had."""

    origin: str
    identity: Text
    synthetic: bool
    count: Positive
    sizes: tuple[Count, ...]


class Summary(BaseModel, frozen=True, extra="forbid", strict=True):
    """All of stats.json.

    asked          what a calibration must be asked again for these stats to be the answer
    model          names, dtypes and shapes of the tensors, hashed; `model_content` their values too
    apart          each time group has files of its own
    time_groups    edges
    samples        one entry for each calibration that was merged into these stats
    inputs         in the order in which the model uses them
    """

    format: str = FORMAT
    version: int = VERSION
    program_version: str
    asked: dict[str, JsonValue]
    model: Text
    model_content: Text
    component: str
    modality: str
    mask_token: int | None
    apart: bool
    time_groups: tuple[float, ...]
    samples: Annotated[tuple[KeptSamples, ...], Field(min_length=1)]
    inputs: tuple[KeptInput, ...]

    @property
    def count(self) -> int:
        """Samples."""
        return sum(one.count for one in self.samples)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Calls of each time group."""
        return tuple(map(sum, zip(*(one.sizes for one in self.samples), strict=True)))

    @property
    def origin(self) -> str:
        """Like "128 samples of texts.jsonl and 64 samples of more.jsonl"."""
        return " and ".join(f"{one.count} samples of {one.origin}" for one in self.samples)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of all weights whose inputs were seen."""
        return tuple(layer for one in self.inputs for layer in one.layers)


class KeptStats:
    """The stats in a folder, checked as far as can be without reading values; `identity` is that of their content."""

    def __init__(self, folder: Path) -> None:
        """Open the folder.

        Raises:
            StoreError: it holds no stats, or its files are missing, damaged or do not fit together.
            SchemaVersionError: they are newer than this program.
        """
        self.folder = folder
        text = _text(folder)
        self.identity = hashlib.sha256(text).hexdigest()
        self.summary = _summary(text, folder / NAME)
        self.groups = _groups(self.summary, folder / NAME)
        self._weights = weights(self.summary.sizes)
        for entry in self.summary.inputs:
            self._refuse_unfit(entry)

    def read(self, number: int) -> InputStats:
        """The stats of one input, H summed over the time groups so that each has the same say.

        Raises:
            StoreError: values are damaged or not finite.
        """
        entry = self.summary.inputs[number]
        if not self.summary.apart:
            return self.part(number, 0) or self._nothing(entry)
        total = self._nothing(entry)
        for group, weight in enumerate(self._weights):
            alone = self.part(number, group)
            if alone is not None:
                total.place(group, alone, weight)
        return total

    def part(self, number: int, place: int) -> InputStats | None:
        """What one file of an input holds; None where no sample gave any.

        Raises:
            StoreError: values are damaged or not finite.
        """
        entry = self.summary.inputs[number]
        file = entry.files[place]
        if file is None:
            return None
        path = self.folder / file.name
        with _as_store_errors(), closing(SafetensorsSource([path])) as source:
            tensors = {info.name: source.read(info.name).reshape(info.shape) for info in source.tensors}
        if _checksum(tensors) != file.crc32:
            raise ChecksumError(f"{path}: its bytes are not those that were written; {AGAIN}")
        _refuse_not_finite(tensors, path)
        return InputStats.of(entry.layers, tensors, transposed=entry.transposed)

    def _nothing(self, entry: KeptInput) -> InputStats:
        return InputStats(
            entry.layers,
            self.groups.count,
            columns=entry.columns,
            channels=entry.channels,
            transposed=entry.transposed,
        )

    def _refuse_unfit(self, entry: KeptInput) -> None:
        files, groups = (self.groups.count, 1) if self.summary.apart else (1, self.groups.count)
        if len(entry.files) != files:
            raise StoreError(
                f"{self.folder / NAME}: the input of {entry.layers[0]} has {len(entry.files)} files; {files} are"
                f" needed; {AGAIN}"
            )
        for file in entry.files:
            if file is not None:
                _refuse_unfit_tensors(self.folder / file.name, entry, groups)


def is_stats(folder: Path) -> bool:
    """Whether stats were written there, whatever became of them."""
    try:
        return b'"arrow_quant_stats"' in _text(folder)
    except StoreError:
        return False


def write_input(folder: Path, number: int, group: int | None, stats: InputStats) -> KeptFile:
    """Write the stats of one input, or of it in one time group; equal stats give equal bytes.

    Raises:
        StoreError: the disk refuses.
    """
    name = f"{number:05d}.safetensors" if group is None else f"{number:05d}-{group:03d}.safetensors"
    tensors = {key: tensor.contiguous() for key, tensor in stats.tensors().items()}
    try:
        save_file(tensors, folder / name)
    except (OSError, SafetensorError) as problem:
        raise StoreError(
            f"{folder / name} cannot be written: {problem}; give it room and permission, and run again"
        ) from problem
    return KeptFile(name=name, crc32=_checksum(tensors))


def write_summary(folder: Path, summary: Summary) -> None:
    """Write stats.json, which makes a folder one of stats.

    Raises:
        StoreError: the disk refuses.
    """
    try:
        (folder / NAME).write_text(summary.model_dump_json(indent=2) + "\n", encoding="utf-8")
    except OSError as problem:
        raise StoreError(f"{folder / NAME} cannot be written: {problem.strerror or problem}") from problem


def _text(folder: Path) -> bytes:
    with _as_store_errors(), closing(ByteFile(folder / NAME)) as file:
        if file.size > JSON_LIMIT:
            raise StoreError(f"{folder / NAME}: has {file.size:,} bytes; at most {JSON_LIMIT:,} are allowed")
        return file.read(file.size)


def _summary(text: bytes, path: Path) -> Summary:
    with _as_store_errors():
        entries = parse_object(text, str(path))
    if entries.get("format") != FORMAT:
        raise StoreError(f"{path}: its format is {str(entries.get('format'))[:40]!r}; {FORMAT!r} is needed")
    if entries.get("version") not in READABLE:
        raise SchemaVersionError(
            f"{path}: has version {str(entries.get('version'))[:40]}; this program reads"
            f" {' and '.join(map(str, READABLE))}: update it, or {AGAIN}"
        )
    try:
        return Summary.model_validate_json(text)
    except WrongContent as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"]))
        found = repr(first["input"])[:80]
        raise StoreError(f"{path}: {place} is {found}: {first['msg']}; {AGAIN}") from None


def _groups(summary: Summary, path: Path) -> TimeGroups:
    try:
        groups = TimeGroups(edges=summary.time_groups)
    except ConfigurationError as error:
        raise StoreError(f"{path}: {error}; {AGAIN}") from error
    if any(len(one.sizes) != groups.count for one in summary.samples) or not any(summary.sizes):
        raise StoreError(f"{path}: the calls are not counted for each of its {groups.count} time groups; {AGAIN}")
    if len(set(summary.layers)) != len(summary.layers):
        raise StoreError(f"{path}: a layer belongs to two inputs; {AGAIN}")
    return groups


def _refuse_unfit_tensors(path: Path, entry: KeptInput, groups: int) -> None:
    """Refuse a file whose tensors are not those of such an input; reads its header alone."""
    with _as_store_errors(), closing(SafetensorsSource([path])) as source:
        found = tensors_by_part({info.name: (info.dtype, info.shape) for info in source.tensors})
    unknown = [part for part in found if part and part not in entry.parts]
    if unknown:
        raise StoreError(f"{path}: holds rows {unknown[0]}, of which {NAME} knows nothing; {AGAIN}")
    for own in (found.get(None, {}), *(found[part] for part in entry.parts if part in found)):
        _refuse_unfit_part(path, entry, groups, own)


def _refuse_unfit_part(path: Path, entry: KeptInput, groups: int, found: Mapping[str, TensorHeader]) -> None:
    wide, rows = ("float64", (groups, entry.columns)), ("int64", (groups,))
    expected: dict[str, TensorHeader] = {
        "moments": ("float64", (groups, MOMENTS)),
        "absmax": ("float32", (groups, entry.channels)),
        "sums": wide,
        "rows": rows,
        "count": ("int64", (1,)),
        "second": ("float32", (entry.columns, entry.columns)),
    }
    for group in range(groups):
        shape = found.get(f"probes.{group}", ("", ()))[1]
        expected[f"probes.{group}"] = ("float32", (min(shape[0] if shape else 0, PROBES), entry.columns))
    wrong = sorted(key for key in {*found, *expected} if found.get(key) != expected.get(key))
    if wrong:
        raise StoreError(
            f"{path}: tensor {wrong[0]} is {_described(found.get(wrong[0]))}; {_described(expected.get(wrong[0]))} is"
            f" needed for an input of {entry.columns} columns; {AGAIN}"
        )


def _described(tensor: TensorHeader | None) -> str:
    return "nothing" if tensor is None else f"{tensor[0]} {tensor[1]}"


def _refuse_not_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    for own in tensors_by_part(tensors).values():
        for name in FLOATS:
            if not torch.isfinite(own[name].sum(dtype=torch.float64)):
                raise StoreError(f"{path}: tensor {name} holds NaN or infinity; {AGAIN}")


def _checksum(tensors: Mapping[str, Tensor]) -> int:
    total = 0
    for name in sorted(tensors):
        total = crc32(tensors[name].reshape(-1).view(torch.uint8).numpy(), total)
    return total


@contextmanager
def _as_store_errors() -> Iterator[None]:
    """Stats are no source of weights: what cannot be read of them is an error of the store."""
    try:
        yield
    except SourceError as error:
        raise StoreError(f"{error}") from error

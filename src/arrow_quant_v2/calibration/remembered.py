"""What a run that goes on need not make again, in a folder: samples of a model's own trajectory, and what was felt.

    4f5c....safetensors    all calls for one question: tensors as they lie in memory, and what they belong to as JSON
    81c0....-12.safetensors    what outputs felt of call 12 (see felt)

Knows nothing of how samples are made. What is damaged, or was asked otherwise, is as if it were not there.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch

from arrow_quant_v2.calibration import identity, tensor_file
from arrow_quant_v2.calibration.felt import NOWHERE, Felt
from arrow_quant_v2.calibration.sample import Sample, Samples
from arrow_quant_v2.calibration.samples import OWN, gather

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from arrow_quant_v2.calibration.runnable import Runnable
    from arrow_quant_v2.calibration.samples import Asked

PLAIN = (bool, int, float, str, type(None))
CALLS = "calls"
DTYPES = frozenset({
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
})  # fmt: skip


class UnfitError(TypeError):
    """A sample holds something else than tensors, numbers, words, and structures of them."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Memory:
    """Where samples are kept, and what tells the model from others, values included; None: nowhere."""

    folder: Path | None = None
    model: Callable[[], str] = str

    def gather(self, runnable: Runnable, asked: Asked) -> Samples:
        """As calibration.samples.gather; what the model made of itself is kept, or taken from there.

        Raises:
            ConfigurationError: what was given cannot be used.
            SourceError: a file of arrays is damaged.
            QuantizationError: the model cannot be called.
            StoreError: the disk refuses.
        """
        if self.folder is None or asked.callable is not None:
            return gather(runnable, asked)
        found = _read(self._path(self.folder, asked)) if self.folder.exists() else None
        if found is not None:
            return found
        samples = gather(runnable, asked)
        if samples.origin.startswith(OWN):
            with suppress(UnfitError):
                _write(self._path(self.folder, asked), samples)
        return samples

    def felt(self, calls: Sequence[Sample], seed: int) -> Felt:
        """Where it is kept what outputs feel of each of these calls, by directions drawn from this seed."""
        if self.folder is None:
            return NOWHERE
        return Felt(folder=self.folder, key=identity.of_settings(self.model(), identity.of_calls(calls), seed))

    def _path(self, folder: Path, asked: Asked) -> Path:
        question = {one.name: str(getattr(asked, one.name)) for one in fields(asked)}
        key = hashlib.sha256(json.dumps([self.model(), question]).encode()).hexdigest()
        return folder / f"{key}.safetensors"


NO_MEMORY = Memory()


@dataclass
class _Tensors:
    """Tensors on their way to or from a file, each as it lies in memory; one that is given twice stays one."""

    flat: dict[str, torch.Tensor] = field(default_factory=dict)
    known: dict[Any, Any] = field(default_factory=dict)  # id -> entry, or name -> tensor

    def put(self, tensor: torch.Tensor) -> dict[str, Any]:
        if id(tensor) not in self.known:
            self.known[id(tensor)] = self._put(tensor)
        entry: dict[str, Any] = self.known[id(tensor)]
        return entry

    def _put(self, tensor: torch.Tensor) -> dict[str, Any]:
        dense = tensor.detach().clone()
        if dense.dtype not in DTYPES or dense.device.type != "cpu" or dense.layout is not torch.strided:
            raise UnfitError(f"{dense.dtype} on {dense.device}")
        name = str(len(self.flat))
        self.flat[name] = dense.as_strided((dense.numel(),), (1,))
        return {"tensor": name, "shape": list(dense.shape), "strides": list(dense.stride())}

    def take(self, entry: Mapping[str, Any]) -> torch.Tensor:
        name = entry["tensor"]
        if name not in self.known:
            self.known[name] = self.flat[name].as_strided(entry["shape"], entry["strides"])
        tensor: torch.Tensor = self.known[name]
        return tensor


def _write(path: Path, samples: Samples) -> None:
    """Keep them; the file is there whole or not at all.

    Raises:
        UnfitError: they hold what no file can.
        StoreError: the disk refuses.
    """
    tensors = _Tensors()
    calls = [[_entry(one.arguments, tensors), _entry(one.keywords, tensors), one.timestep] for one in samples.calls]
    told = {one.name: getattr(samples, one.name) for one in fields(samples) if one.name != CALLS}
    tensor_file.keep(path, tensors.flat, {CALLS: json.dumps({CALLS: calls} | told)})


def _read(path: Path) -> Samples | None:
    """What was kept there; None where nothing whole is."""
    found = tensor_file.kept(path)
    if found is None:
        return None
    tensors = _Tensors(flat=found[0])
    try:
        told = json.loads(found[1][CALLS])
        calls = [
            Sample(arguments=_value(arguments, tensors), keywords=_value(keywords, tensors), timestep=timestep)
            for arguments, keywords, timestep in told.pop(CALLS)
        ]
        return Samples(**told | {CALLS: tuple(calls), "notes": tuple(told["notes"])})
    except (KeyError, ValueError, TypeError, RuntimeError):
        return None


def _entry(value: object, tensors: _Tensors) -> Any:
    """A value as JSON, its tensors apart."""
    if isinstance(value, torch.Tensor):
        return tensors.put(value)
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"mapping": {key: _entry(one, tensors) for key, one in value.items()}}
    if type(value) in {tuple, list}:
        return {type(value).__name__: [_entry(one, tensors) for one in value]}  # type: ignore[attr-defined]
    if type(value) in PLAIN:
        return {"plain": value}
    raise UnfitError(type(value).__name__)


def _value(entry: Mapping[str, Any], tensors: _Tensors) -> Any:
    if "tensor" in entry:
        return tensors.take(entry)
    ((kind, inside),) = entry.items()
    if kind == "plain":
        return inside
    if kind == "mapping":
        return {key: _value(one, tensors) for key, one in inside.items()}
    return {"tuple": tuple, "list": list}[kind](_value(one, tensors) for one in inside)

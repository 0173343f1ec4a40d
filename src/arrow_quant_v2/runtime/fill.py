"""Puts a stored model into a module: layers that run packed, kept tensors as they are. Does not know how it was built.

Every place of the module gets its tensor and every tensor its place, or nothing is said to be loaded.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from arrow_quant_v2.decisions import Decision
from arrow_quant_v2.engines.devices import reachable
from arrow_quant_v2.errors import ConfigurationError, SourceError
from arrow_quant_v2.kernels.tensors import shared_tensor
from arrow_quant_v2.packed import PackedTensor
from arrow_quant_v2.runtime.clock import Clock
from arrow_quant_v2.runtime.float32 import stays_float32
from arrow_quant_v2.runtime.modules import QuantizedLinear, StaticRanges, can_run_packed, run_packed
from arrow_quant_v2.runtime.packed_weight import EXPERT_AXES, FLOATS, PackedWeight
from arrow_quant_v2.store.record import RawTensor
from arrow_quant_v2.time_groups import TimeGroups

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from arrow_quant_v2.runtime.modules import Activations
    from arrow_quant_v2.runtime.stacks import Stored
    from arrow_quant_v2.store.entries import LayerEntry
    from arrow_quant_v2.store.record import Payload

NAMED = 5  # names in a message
ACTIVATIONS = (None, "dynamic", "static")


@dataclass(frozen=True, kw_only=True)
class Filled:
    """What became of a module.

    packed      places (names of `state_dict()` before it was filled) whose weight stays packed
    decisions   tensors that are stored as codes and were dequantized, and layers that take other activations than asked
    clock       tells the layers the time group; None where no layer asks
    """

    packed: tuple[str, ...]
    decisions: tuple[Decision, ...]
    clock: Clock | None


def fill(
    module: nn.Module,
    stored: Stored,
    names: Mapping[str, str] | None = None,
    *,
    ties: Iterable[tuple[str, str]] = (),
    unused: Collection[str] = (),
    zeros: Collection[str] = (),
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    activations: Activations | None = None,
    mask_token: int | None = None,
) -> Filled:
    """Give a module, on the meta device or not, the tensors of a stored model, checked; its codes stay packed.

    names        name in the file -> name in `state_dict()`; None: they are called alike
    ties         pairs of names in the module that are one tensor where the file holds one of them
    unused       names in the file that have no place, and need none
    zeros        parameters that the file need not hold: they become zeros
    device       where everything goes; buffers that no file holds must be there already, or have values
    dtype        of kept floating tensors and of what is computed from codes alone, where the module's class does not
                 keep them in float32; None: the one most of them have
    activations  "dynamic" or "static": inputs of linear layers are rounded to 8 bits
    mask_token   whose share of `input_ids` tells the time of a masked text model

    Layers of torch that `modules.KINDS` names become the packed ones in place. Embeddings of other classes, and stacks
    of experts (expert, out, in), get a PackedWeight instead of the parameter. All else that is stored as codes is
    dequantized, with a Decision and a warning.

    Raises:
        SourceError: a name is missing, unexpected or doubled, or a shape differs; nothing was changed then.
        StoreError: bytes are missing, or not those that were written.
        ConfigurationError: `activations` or `dtype` is not allowed, or there is no such device.
    """
    places = _places(module, stored, names, unused)
    _tie(module, places, ties)
    _refuse_missing(module, places, stored, zeros)
    _refuse_uncomputed(module, stored)
    _refuse_settings(activations, dtype)
    wanted = dtype or most_common_dtype(stored)
    work = _Filling(module, stored, reachable(device), wanted)
    payloads = stored.read_all()
    for name in sorted(set(places.values())):
        work.put(name, [place for place, source in places.items() if source == name], payloads.pop(name))
    for name in set(zeros) - set(places):
        _put(module, name, nn.Parameter(torch.zeros(_held(module, name).shape, dtype=work.dtype(name), device=device)))
    clock = work.time(activations, mask_token)
    work.run_experts_alone()
    return Filled(packed=tuple(work.packed), decisions=tuple(work.told()), clock=clock)


def most_common_dtype(stored: Stored) -> torch.dtype:
    """The floating dtype that most elements had before they were quantized; float32 where it cannot be computed in."""
    counts: dict[torch.dtype, int] = {}
    for one in stored.entries:
        dtype = getattr(torch, one.dtype)
        if one.chunk == 0 and dtype.is_floating_point:
            counts[dtype] = counts.get(dtype, 0) + one.num_params
    most = max(counts, key=lambda dtype: counts[dtype], default=torch.float32)
    return most if most in FLOATS else torch.float32


# What belongs where


def _places(
    module: nn.Module, stored: Stored, names: Mapping[str, str] | None, unused: Collection[str]
) -> dict[str, str]:
    """Name in the module -> name in the file."""
    state = _tensors(module)
    chosen = {name: name for name in stored.names if name not in unused} if names is None else dict(names)
    if strange := sorted(set(stored.names) - set(chosen) - set(unused)):
        raise _mismatch(module, stored, f"the file also holds {listed(strange)}, which have no place in it")
    if strange := sorted(name for name, place in chosen.items() if place not in state):
        raise _mismatch(module, stored, f"the file also holds {listed(strange)}, which have no place in it")
    if strange := sorted(set(chosen) - set(stored.names)):
        raise _mismatch(module, stored, f"the file lacks {listed(strange)}")
    places: dict[str, str] = {}
    for name, place in chosen.items():
        if place in places:
            raise _mismatch(module, stored, f"both {places[place]} and {name} are for {place}")
        shape = stored.chunks(name)[0].shape
        if shape != tuple(state[place].shape):
            raise _mismatch(module, stored, f"{name} is {shape}, and {place} {tuple(state[place].shape)}")
        places[place] = name
    return places


def _tie(module: nn.Module, places: dict[str, str], ties: Iterable[tuple[str, str]]) -> None:
    """Give tied places the tensor of the one that has its own: those of `ties`, and those that are one parameter."""
    pairs = list(ties)
    first: dict[int, str] = {}
    for name, parameter in _tensors(module).items():
        pairs.append((first.setdefault(id(parameter), name), name))
    for one, other in pairs * 2:  # twice, for a chain of three
        if one in places:
            places.setdefault(other, places[one])
        elif other in places:
            places[one] = places[other]


def _refuse_missing(module: nn.Module, places: Mapping[str, str], stored: Stored, zeros: Collection[str]) -> None:
    state = _tensors(module)
    if missing := sorted(set(state) - set(places) - set(zeros)):
        raise _mismatch(module, stored, f"the file lacks {listed(missing)}")


def _refuse_settings(activations: str | None, dtype: torch.dtype | None) -> None:
    if activations not in ACTIVATIONS:
        raise ConfigurationError(f"activations is {activations!r}; allowed: None, 'dynamic', 'static'")
    if dtype is not None and dtype not in FLOATS:
        raise ConfigurationError(f"dtype is {dtype}; allowed: {', '.join(map(str, FLOATS))}, or None")


def _refuse_uncomputed(module: nn.Module, stored: Stored) -> None:
    held = _tensors(module)
    if uncomputed := [name for name, buffer in module.named_buffers() if buffer.is_meta and name not in held]:
        raise _mismatch(module, stored, f"{listed(uncomputed)} are neither in the file nor computed")


def _mismatch(module: nn.Module, stored: Stored, what: str) -> SourceError:
    return SourceError(
        f"{stored.path}: does not fit {type(module).__name__}: {what}; give the module that was quantized, with the"
        " configuration that lies beside it"
    )


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


# Putting it there


class _Filling:
    """One module being filled."""

    def __init__(self, module: nn.Module, stored: Stored, device: torch.device, dtype: torch.dtype) -> None:
        self._module, self._stored, self._device, self._dtype = module, stored, device, dtype
        self.packed: list[str] = []
        self._decisions: list[Decision] = []
        self._timed: list[tuple[QuantizedLinear, LayerEntry]] = []

    def dtype(self, place: str) -> torch.dtype:
        """Of what stands there."""
        return torch.float32 if stays_float32(self._module, place, self._dtype) else self._dtype

    def put(self, name: str, places: Sequence[str], payload: tuple[Payload, ...]) -> None:
        """One tensor of the file in each of its places."""
        chunks = [chunk for chunk in payload if isinstance(chunk, PackedTensor)]
        if not chunks:
            self._put_values(places, _kept(payload, self._stored.chunks(name)[0].shape))
            return
        packed = PackedWeight(*chunks, dtype=self.dtype(places[0]))
        packed._apply(lambda tensor: tensor.to(self._device))  # noqa: SLF001 - `to` of a PackedWeight gives its values
        plain = [place for place in places if not self._put_packed(place, packed)]
        if plain:
            self._put_values(plain, packed.dequantized())
            self._decisions += [self._dequantized(name, place, packed) for place in plain]

    def _put_packed(self, place: str, packed: PackedWeight) -> bool:
        path, _, leaf = place.rpartition(".")
        owner = self._module.get_submodule(path)
        if leaf == "weight" and can_run_packed(owner):
            layer = run_packed(owner, packed)
            if isinstance(layer, QuantizedLinear):
                self._timed.append((layer, self._stored.chunks(packed.name)[0]))
        elif leaf in owner._modules or not _takes_packed(owner, leaf, packed):  # noqa: SLF001
            return owner._modules.get(leaf) is packed  # noqa: SLF001 - the same layer by another name
        else:
            delattr(owner, leaf)
            setattr(owner, leaf, packed)
        self.packed.append(place)
        return True

    def _put_values(self, places: Sequence[str], values: Tensor) -> None:
        if values.is_floating_point():
            values = values.to(self.dtype(places[0]))
        values = values.to(self._device)
        old = _held(self._module, places[0])
        trained = isinstance(old, nn.Parameter)
        value = nn.Parameter(values, requires_grad=old.requires_grad) if trained else values
        for place in places:
            _put(self._module, place, value)

    def _dequantized(self, name: str, place: str, packed: PackedWeight) -> Decision:
        owner = type(self._module.get_submodule(place.rpartition(".")[0])).__name__
        return Decision(
            layer_name=name,
            kind="fallback",
            asked=f"int{packed.bits}",
            got=str(self.dtype(place)).removeprefix("torch."),
            because=f"{owner} computes with {place} in its own way, so the weight is dequantized in memory",
        )

    def run_experts_alone(self) -> None:
        """Let transformers run one expert after the other: its other ways take a whole stack at once."""
        stacks = any(
            len(part.shape) == EXPERT_AXES for part in self._module.modules() if isinstance(part, PackedWeight)
        )
        choose = getattr(self._module, "set_experts_implementation", None)
        if stacks and choose is not None:
            choose("eager")

    def told(self) -> Iterable[Decision]:
        """The decisions, of which the user is warned."""
        if self._decisions:
            first = self._decisions[0]
            warnings.warn(
                f"{self._stored.path}: {len(self._decisions)} weights are dequantized or run otherwise than asked, the"
                f" first is {first.layer_name}, {first}",
                stacklevel=4,
            )
        return self._decisions

    def time(self, activations: Activations | None, mask_token: int | None) -> Clock | None:
        """Tell linear layers how their inputs are rounded, and which clock they look at."""
        clocks: dict[TimeGroups, Clock] = {}
        for layer, entry in self._timed:
            groups, ranges, biases = _time_groups(entry)
            layer.activations = activations
            if activations == "static" and ranges is None:
                layer.activations = None
                self._decisions.append(_without_ranges(layer.weight.name))
            layer.ranges = ranges if activations == "static" else None
            if groups is not None and (layer.ranges is not None or biases is not None):
                layer.clock = clocks.setdefault(groups, Clock(groups, mask_token))
            if biases is not None:
                layer.corrections = biases.to(self._device)
        for clock in clocks.values():
            self._module.register_forward_pre_hook(clock.starts, with_kwargs=True)
            self._module.register_forward_hook(clock.ends, always_call=True)
        return next(iter(clocks.values()), None)


def _takes_packed(owner: nn.Module, leaf: str, packed: PackedWeight) -> bool:
    """Whether a module that computes in its own way may find codes where its parameter was."""
    rows = packed.codes.shape[0]
    experts = len(packed.shape) == EXPERT_AXES and rows == packed.shape[0] * packed.shape[1] > packed.shape[1]
    table = isinstance(owner, nn.Embedding) and owner.max_norm is None
    return isinstance(getattr(owner, leaf), nn.Parameter) and (experts or table)


def _kept(payload: tuple[Payload, ...], shape: tuple[int, ...]) -> Tensor:
    """The values of an unquantized tensor, in memory of their own."""
    raw = [chunk for chunk in payload if isinstance(chunk, RawTensor)]
    values = torch.cat([shared_tensor(chunk.values) for chunk in raw])
    dtype: torch.dtype = getattr(torch, raw[0].dtype)
    return values.view(dtype).reshape(shape)


def _time_groups(entry: LayerEntry) -> tuple[TimeGroups | None, StaticRanges | None, Tensor | None]:
    """The time groups of a layer, the ranges of its inputs and the corrections of its outputs in them."""
    structure = entry.time_aware_quant or {}
    found = structure.get("time_group_params") or []
    if not found or not structure.get("enabled"):
        return None, None, None
    edges = (*(one["time_range"]["start"] for one in found), found[-1]["time_range"]["end"])
    ranges = StaticRanges(
        scales=tuple(one["scale"] for one in found),
        zero_points=tuple(round(one["zero_point"]) for one in found),
        smoothed=entry.is_smoothed,
    )
    biases = [one["bias_correction"] for one in found]
    corrections = torch.tensor(biases) if all(bias is not None for bias in biases) else None
    return TimeGroups(edges=edges), ranges, corrections


def _without_ranges(name: str) -> Decision:
    return Decision(
        layer_name=name,
        kind="fallback",
        asked="static activations",
        got="activations as they come",
        because="the file holds no ranges of its inputs: it was not calibrated",
    )


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer that a file has to hold, as it is; tied ones under each of their names."""
    return {name: held for name, held in module.state_dict(keep_vars=True).items() if isinstance(held, Tensor)}


def _held(module: nn.Module, name: str) -> Any:
    parent, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(parent), leaf)


def _put(module: nn.Module, name: str, value: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, value)

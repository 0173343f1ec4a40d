"""A transformers folder as a model that can be called; its weights come from our own source. Runs no code of a model.

The module is built without weights, on torch's meta device, and filled from the source: so every tensor of the files is
known by its name in the module, every format that we read works, and each weight lies in memory once.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from arrow_quant_v2.calibration.on_demand import OnDemand
from arrow_quant_v2.calibration.runnable import Runnable
from arrow_quant_v2.errors import ConfigurationError, SourceError
from arrow_quant_v2.sources.files import read_json

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from arrow_quant_v2.config import Modality
    from arrow_quant_v2.sources.base import Source
    from arrow_quant_v2.sources.folder import Model

VOCABULARIES = (
    "tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
UNUSED = re.compile(r"(^|\.)(pooler|seq_relationship)\.")  # heads that say something of a whole sequence
OLD_NAMES = ((".gamma", ".weight"), (".beta", ".bias"))  # of norms, in checkpoints from before 2020
NAMED = 5  # names in a message
UNSET = {torch.float32: -6.0221e23, torch.int64: -(2**62)}  # values that no model computes: still to be set


def open_transformers(
    model: Model, modality: Modality, mask_token: int | None = None, *, on_demand: bool = False
) -> Runnable:
    """The model in eval mode, float32 and without gradients, with its tokenizer where there is one.

    Its class is the first of config.json's `architectures` that transformers has, else the masked language model or
    the base model of its `model_type`, whichever the tensors fit. `names` holds every tensor that has a place in the
    module; the others, such as heads for another task, are left out. A missing pooler is filled with zeros.
    `mask_token` is needed where neither the tokenizer nor config.json (`mask_token_id`) tells it. With `on_demand`
    weights stay on the disk, and come into memory with the part of the model that runs.

    Raises:
        ConfigurationError: transformers is not installed; or `mask_token` is no token of this model.
        SourceError: transformers does not know the model, or its tensors are not those that the class needs.
    """
    built = build_transformers(model)
    module, names = built.module, built.names
    module.config.use_cache = False  # of keys and values of earlier tokens, which nobody asks for
    weights = _fill(module, names, model.source, on_demand=on_demand)
    tokenizer = tokenizer_of(model.folder)
    mask = mask_token_of(module, tokenizer, mask_token)
    return Runnable(
        module=module, modality=modality, names=names, tokenizer=tokenizer, mask_token=mask, on_demand=weights
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Built:
    """A module whose parameters have no values yet, and what is to become of the tensors in the files.

    names   name in the files -> name in the module
    """

    module: Any
    names: dict[str, str]

    @property
    def missing(self) -> list[str]:
        """Parameters that no tensor is for, not even by a tie."""
        return _missing(self.module, self.names)

    @property
    def ties(self) -> list[tuple[str, str]]:
        """Pairs of parameters of which the files need hold only one."""
        return _ties(self.module)

    def set_buffers(self, location: str) -> None:
        """Compute the buffers that no file holds, such as positions.

        Raises:
            SourceError: transformers does not compute one of them.
        """
        _set_buffers(self.module, location, self.names.values())


def build_transformers(model: Model) -> Built:
    """The module on torch's meta device, of the class that config.json and the tensors ask for.

    Raises:
        ConfigurationError: transformers is not installed.
        SourceError: transformers does not know the model.
    """
    transformers = installed_transformers()
    module = _fitting(transformers, _config(transformers, model.folder), model)
    return Built(module=module, names=names_in(module, (info.name for info in model.source.tensors)))


def tied_names(model: Model) -> dict[str, list[str]]:
    """Name in the files -> the module's other names of the same weight, such as a head's, that the files do not hold.

    Reads no values.

    Raises:
        ConfigurationError: transformers is not installed.
        SourceError: transformers does not know the model.
    """
    built = build_transformers(model)
    files = {place: name for name, place in built.names.items()}
    found: dict[str, list[str]] = {}
    for one, other in built.ties:
        for held, tied in ((one, other), (other, one)):
            if held in files and tied not in files:
                found.setdefault(files[held], []).append(tied)
    return found


def installed_transformers() -> Any:
    """The package, imported.

    Raises:
        ConfigurationError: it is not installed.
    """
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise ConfigurationError(
            "transformers is not installed, and a text model cannot be run without it:"
            " pip install 'arrow-quant-v2[models]'"
        ) from error


# Its class


def _config(transformers: Any, folder: Path) -> Any:
    """The configuration, by `model_type`, or by the class named where there is none."""
    entries = read_json(folder / "config.json")
    named = _named_class(transformers, entries)
    reader = named.config_class if named is not None and "model_type" not in entries else transformers.AutoConfig
    try:
        config = reader.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise SourceError(
            f"{folder / 'config.json'}: transformers {transformers.__version__} does not know this model"
            f" ({_first_line(error)}); code that comes with a model is never run: update transformers; or quantize"
            " without calibration, and load it into a module of your own: load(..., into=module)"
        ) from error
    config._attn_implementation = None  # noqa: SLF001 - it may name a kernel on the hub, which would be fetched and run
    return config


def _named_class(transformers: Any, entries: dict[str, Any]) -> Any:
    listed = entries.get("architectures")
    name = listed[0] if isinstance(listed, list) and listed else None
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
        return found if getattr(found, "config_class", None) is not None else None
    return None


def _fitting(transformers: Any, config: Any, model: Model) -> Any:
    """The module, without values, of the class whose parameters the files hold; where several do, the first."""
    named = _named_class(transformers, read_json(model.folder / "config.json"))
    mappings = (transformers.MODEL_FOR_MASKED_LM_MAPPING, transformers.MODEL_MAPPING)
    by_type = (mapping.get(type(config), None) for mapping in mappings)
    classes = [named] if named is not None else [found for found in by_type if isinstance(found, type)]
    if not classes:
        raise SourceError(f"{model.folder}: transformers has no class for {type(config).__name__}")
    files = [info.name for info in model.source.tensors]
    stated = getattr(config, "num_hidden_layers", 0)
    if isinstance(stated, int) and stated > len(files):  # before they are built
        raise SourceError(f"{model.folder}: config.json states {stated} layers; the files hold {len(files)} tensors")
    modules = [_without_values(found, config, model.folder) for found in classes]
    return min(modules, key=lambda module: len(_missing(module, names_in(module, files))))


def _without_values(found: Any, config: Any, folder: Path) -> Any:
    try:
        with torch.random.fork_rng(devices=()), torch.device("meta"):
            return found(config)
    except Exception as error:
        raise SourceError(
            f"{folder / 'config.json'}: {found.__name__} cannot be built from it ({_first_line(error)});"
            " repair it, or quantize without calibration"
        ) from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:300]


# Its tensors


def names_in(module: Any, files: Iterable[str]) -> dict[str, str]:
    """Name in the files -> name in the module, for every tensor that has a place; a name that fits as it is wins."""
    places, waiting = set(module.state_dict()), sorted(files)
    found: dict[str, str] = {}
    for spell in (_as_it_is, _other_spellings):
        for name in waiting:
            place = next((p for p in spell(name, module.base_model_prefix) if p in places), None)
            if place is not None and name not in found:
                found[name] = place
                places.remove(place)
    return found


def _as_it_is(name: str, _: str) -> tuple[str, ...]:
    return (name,)


def _other_spellings(name: str, prefix: str) -> Iterator[str]:
    """With and without the base model's prefix, each with the new name of a norm's parameters."""
    for renamed in (name, *(name.removesuffix(old) + new for old, new in OLD_NAMES if name.endswith(old))):
        yield from (renamed, renamed.removeprefix(f"{prefix}."), f"{prefix}.{renamed}")


def _missing(module: Any, names: dict[str, str]) -> list[str]:
    """Parameters that no tensor of the files is for, not even by a tie."""
    there = set(names.values())
    tied = {name for group in _ties(module) if there.intersection(group) for name in group}
    return [name for name, _ in module.named_parameters(remove_duplicate=False) if name not in there | tied]


def _ties(module: Any) -> list[tuple[str, str]]:
    """Pairs of parameters of which the files need hold only one."""
    return sorted(getattr(module, "all_tied_weights_keys", {}).items())


def _fill(module: Any, names: dict[str, str], source: Source, *, on_demand: bool) -> OnDemand | None:
    """Give every parameter and buffer its values, or, on demand, the buffers alone.

    A tie joins two parameters only where the files hold one of them; where they hold both, both are quantized.
    """
    _refuse_unreadable(module, names, source)
    _set_buffers(module, source.location, names.values())
    missing = _missing(module, names)
    if wrong := [name for name in missing if not UNUSED.search(name)]:
        raise SourceError(
            f"{source.location}: lacks {len(wrong)} of the parameters of {type(module).__name__}: {_listed(wrong)};"
            " config.json and the weights do not belong together, or this version of transformers names them otherwise"
        )
    parameters = {place for place, _ in module.named_parameters(remove_duplicate=False)}
    waiting = {place: name for name, place in names.items() if on_demand and place in parameters}
    now = {place: name for name, place in names.items() if place not in waiting}
    values = {place: _value(source, name, module.get_parameter_or_buffer(place)) for place, name in now.items()}
    zeros = {name: torch.zeros(module.get_parameter(name).shape) for name in missing}
    module.load_state_dict(values | zeros, strict=False, assign=True)
    _tie(module, set(names.values()))
    module.requires_grad_(requires_grad=False).eval()
    return _on_demand(module, waiting, source) if on_demand else None


def _on_demand(module: Any, files: dict[str, str], source: Source) -> OnDemand:
    """The module with its parameters still on the disk; those that are tied have the same tensor there."""
    same = {id(module.get_parameter(place)): name for place, name in files.items()}
    every = module.named_parameters(remove_duplicate=False)
    found = {place: same[id(parameter)] for place, parameter in every if id(parameter) in same}
    shapes = {name: module.get_parameter(place) for place, name in files.items()}
    return OnDemand(module, found | files, lambda name: _value(source, name, shapes[name]))


def _refuse_unreadable(module: Any, names: dict[str, str], source: Source) -> None:
    for info in source.tensors:
        if info.name not in names:
            continue
        expected = tuple(module.get_parameter_or_buffer(names[info.name]).shape)
        if info.shape != expected:
            raise SourceError(
                f"{source.location}: {info.name} is {info.shape}; {type(module).__name__} of config.json needs"
                f" {expected}: the two do not belong together"
            )
        if info.dtype.startswith("float8"):
            raise SourceError(
                f"{source.location}: {info.name} is {info.dtype}, whose scales lie elsewhere; give the model in 16 bits"
            )


def _value(source: Source, name: str, place: torch.Tensor) -> torch.Tensor:
    tensor = source.read(name).reshape(place.shape)
    return tensor.to(torch.float32) if tensor.is_floating_point() else tensor


def _tie(module: Any, there: set[str]) -> None:
    for pair in _ties(module) * 2:  # twice, for a chain of three
        held = [name for name in pair if name in there]
        if len(held) == 1:
            other = pair[0] if held[0] == pair[1] else pair[1]
            _put(module, other, module.get_parameter(held[0]))
            there.add(other)


def _set_buffers(module: Any, location: str, held: Iterable[str]) -> None:
    """Compute the buffers that no file holds, such as positions; parameters are still without values and stay so."""
    theirs = set(held)
    for name, buffer in dict(module.named_buffers()).items():
        _put(module, name, torch.full_like(buffer, UNSET.get(buffer.dtype, 0), device="cpu"))
    for layer in filter(_has_parameters_alone, module.modules()):
        layer._is_hf_initialized = True  # noqa: SLF001 - transformers' own mark: it has nothing to compute there
    with torch.random.fork_rng(devices=()):
        module.initialize_weights()
    for name, buffer in module.named_buffers():
        unset = torch.full_like(buffer, UNSET.get(buffer.dtype, 0))
        if name not in theirs and buffer.dtype in UNSET and buffer.numel() and torch.equal(buffer, unset):
            raise SourceError(
                f"{location}: {name} of {type(module).__name__} is neither in the files nor computed by transformers;"
                " the model cannot be run from these files"
            )


def _has_parameters_alone(layer: torch.nn.Module) -> bool:
    return next(layer.children(), None) is None and next(layer.buffers(), None) is None


def _put(module: Any, name: str, value: torch.Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, value)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


# Its tokens


def tokenizer_of(folder: Path) -> Any:
    """The tokenizer; None where no vocabulary lies in the folder, for then transformers would make one up.

    Raises:
        SourceError: its files are damaged.
    """
    if not any((folder / name).is_file() for name in VOCABULARIES):
        return None
    try:
        return installed_transformers().AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, **_letter_case(folder)
        )
    except Exception as error:
        raise SourceError(
            f"{folder}: its tokenizer cannot be opened ({_first_line(error)}); repair it, or remove its files and give"
            " calibration data as token ids"
        ) from error


def _letter_case(folder: Path) -> dict[str, bool]:
    """Keep capitals where the vocabulary has some and nothing else is said: in small letters they were all unknown."""
    vocabulary = folder / "vocab.txt"
    if (folder / "tokenizer_config.json").exists() or not vocabulary.is_file():
        return {}
    words = vocabulary.read_text(encoding="utf-8", errors="replace").split()
    capitals = any(word != word.lower() for word in words if not word.startswith("["))
    return {"do_lower_case": False} if capitals else {}


def mask_token_of(module: Any, tokenizer: Any, asked: int | None) -> int | None:
    """The id of the hidden token; None where the model gives no logits over its vocabulary, for then nothing is hidden.

    What was asked for counts most, then what the tokenizer says, then config.json.

    Raises:
        ConfigurationError: it is no token of this model.
    """
    name = type(module).__name__
    head = module.get_output_embeddings()
    stated = (asked, getattr(tokenizer, "mask_token_id", None), getattr(module.config, "mask_token_id", None))
    token = next((id_ for id_ in stated if id_ is not None), None)
    if asked is not None and head is None:
        raise ConfigurationError(f"mask_token is {asked}, but {name} gives no logits over tokens; leave it out")
    if token is None or head is None:
        return None
    size = module.get_input_embeddings().num_embeddings
    if not 0 <= token < size:
        raise ConfigurationError(f"mask_token is {token}; {name} has tokens 0 to {size - 1}")
    return int(token)

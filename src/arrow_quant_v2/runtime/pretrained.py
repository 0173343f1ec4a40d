"""What `from_pretrained` of transformers and of diffusers have in common where a folder is ours; imports neither.

Both libraries look for weights in safetensors or pickle files before any quantizer is asked, and a file with such a
name beside our Parquet would be loaded, in part, where we are not imported. So the base class's `from_pretrained` and
`save_pretrained` ask first whether the folder, or the model, is ours; everything else goes on as before.
"""

from __future__ import annotations

import functools
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from arrow_quant_v2.engines.devices import reachable
from arrow_quant_v2.errors import ConfigurationError
from arrow_quant_v2.runtime.modules import KINDS, PackedLayer
from arrow_quant_v2.runtime.packed_weight import PackedWeight
from arrow_quant_v2.sources.files import read_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

METHOD = "arrow_quant"
CONFIG = "config.json"
ORIGIN = "_arrow_quant_origin"  # attribute of a module that was loaded from a folder of ours
PLAIN = {packed: plain for plain, packed in KINDS.items()}
SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")


ABOUT_FILES = frozenset((
    "_commit_hash", "_fast_init", "_from_auto", "_from_pipeline", "adapter_kwargs", "adapter_name", "allow_pickle",
    "cache_dir", "code_revision", "disable_mmap", "force_download", "ignore_mismatched_sizes", "local_files_only",
    "low_cpu_mem_usage", "max_memory", "mirror", "offload_buffers", "offload_folder", "offload_state_dict", "proxies",
    "resume_download", "revision", "subfolder", "token", "tqdm_class", "trust_remote_code", "use_auth_token",
    "use_safetensors", "user_agent", "weights_only",
))  # arguments of from_pretrained on where files are downloaded from and how they are read: ours lie there  # fmt: skip
FOLLOWED = frozenset((
    "attn_implementation", "config", "device_map", "dtype", "generation_config", "output_loading_info",
    "quantization_config", "torch_dtype",
))  # fmt: skip
ELSEWHERE = (
    f"quant_method {METHOD!r}: such a model is a folder with config.json and *.parquet on this disk; download it first"
    " (hf download OWNER/NAME --local-dir DIR), or make it with `arrow-quant quantize`"
)


class Settings:
    """What stands in config.json under `quantization_config`, and `activations`, which `fill` takes.

    The Parquet files themselves tell how each layer is stored. `modules_to_not_convert` was obeyed when the model was
    quantized; what is added to it later is dequantized when it is loaded.
    """

    def __init__(self, **settings: Any) -> None:
        """Take the settings as they are."""
        self.quant_method: Any = METHOD
        self.modules_to_not_convert: list[str] = []
        self.activations: Any = None
        vars(self).update(settings)

    def to_diff_dict(self) -> dict[str, Any]:
        """All of it, for a log."""
        return dict(vars(self))


AnySettings = TypeVar("AnySettings", bound=Settings)


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a module's weights came from: the folder, and name in its files -> name in `state_dict()` before."""

    folder: Path
    names: Mapping[str, str]


def our_folder(name: object, subfolder: object) -> Path | None:
    """The folder that `from_pretrained` is to read, where it lies on this disk and holds our Parquet; else None."""
    if not isinstance(name, str | Path):
        return None
    folder = Path(name, str(subfolder or ""))
    config = folder / CONFIG
    if not config.is_file() or next(folder.glob("*.parquet"), None) is None:
        return None
    stated = read_json(config).get("quantization_config")
    return folder if isinstance(stated, dict) and stated.get("quant_method") == METHOD else None


def wrap_methods(base: type[Any], load: Callable[..., Any], save: Callable[..., Any]) -> None:
    """Let the base class of a library's models ask us first.

    `load` is called with (class, folder, further positional arguments, keyword arguments), `save` with (module, origin,
    folder, keyword arguments).
    """
    theirs, saves = base.from_pretrained.__func__, base.save_pretrained

    @functools.wraps(theirs)
    def from_pretrained(cls: type[Any], *arguments: Any, **keywords: Any) -> Any:
        name = arguments[0] if arguments else keywords.get("pretrained_model_name_or_path")
        folder = our_folder(name, keywords.get("subfolder"))
        if folder is None:
            return theirs(cls, *arguments, **keywords)
        given = {key: value for key, value in keywords.items() if key != "pretrained_model_name_or_path"}
        return load(cls, folder, arguments[1:], given)

    @functools.wraps(saves)
    def save_pretrained(self: nn.Module, save_directory: Any, *arguments: Any, **keywords: Any) -> Any:
        origin = vars(self).get(ORIGIN)
        if origin is None:
            return saves(self, save_directory, *arguments, **keywords)
        return save(self, origin, Path(save_directory), keywords)

    base.from_pretrained = classmethod(from_pretrained)
    base.save_pretrained = save_pretrained


def refuse(given: Mapping[str, Any], names: Iterable[str], folder: Path) -> None:
    """Refuse arguments that mean something and would not be followed.

    Raises:
        ConfigurationError: one of them is given.
    """
    for name in names:
        if given.get(name) not in (None, False, {}):
            raise ConfigurationError(
                f"{folder}: {name}={given[name]!r} cannot be followed for a model that stays packed; leave it out, or"
                " `arrow-quant convert` the model and load that"
            )


def other_arguments(given: Mapping[str, Any], refused: Iterable[str]) -> dict[str, Any]:
    """The arguments for the configuration and the class."""
    known = {*ABOUT_FILES, *FOLLOWED, *refused}
    return {name: value for name, value in given.items() if name not in known}


def settings_of(kind: type[AnySettings], stated: Any, asked: object) -> AnySettings:
    """What config.json says of the quantization, with what the caller asks for.

    Raises:
        ConfigurationError: the caller asks for another quantization.
    """
    if asked is not None and not isinstance(asked, kind):
        raise ConfigurationError(
            f"quantization_config is a {type(asked).__name__}, and the model is quantized by {METHOD}; leave it out"
        )
    settings = kind(**(stated if isinstance(stated, dict) else vars(stated)))
    if isinstance(asked, kind):
        settings.activations = asked.activations
        settings.modules_to_not_convert = [*settings.modules_to_not_convert, *asked.modules_to_not_convert]
    return settings


def asked_dtype(given: Mapping[str, Any]) -> torch.dtype | None:
    """`dtype`, or as it was called before `torch_dtype`; None where neither is given, or "auto".

    Raises:
        ConfigurationError: it is no dtype.
    """
    asked = given.get("dtype") if given.get("dtype") is not None else given.get("torch_dtype")
    if asked is None or asked == "auto":
        return None
    found = getattr(torch, asked, None) if isinstance(asked, str) else asked
    if not isinstance(found, torch.dtype):
        raise ConfigurationError(f"dtype is {asked!r}; allowed: 'auto' or a dtype of torch, one for the whole model")
    return found


@contextmanager
def building(dtype: torch.dtype) -> Iterator[None]:
    """Modules built inside have buffers of this dtype, and leave the random numbers of others alone."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.random.fork_rng(devices=()):
            yield
    finally:
        torch.set_default_dtype(before)


def device_of(device_map: object) -> torch.device:
    """The one device that a `device_map` asks for; with "auto" and its like a GPU where there is one.

    Raises:
        ConfigurationError: it asks for several, or for one that is not there.
    """
    asked = device_map
    if isinstance(asked, dict):
        if set(asked) != {""}:
            raise ConfigurationError(f"device_map is {asked}; a packed model goes to one device: {{'': 'cuda'}}")
        asked = asked[""]
    if asked in SPREAD:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if asked is not None and not isinstance(asked, str | int | torch.device):
        raise ConfigurationError(f"device_map is {asked!r}; allowed: a device such as 'cpu' or 'cuda:0'")
    return reachable("cpu" if asked is None else f"cuda:{asked}" if isinstance(asked, int) else asked)


def unpack(module: nn.Module, places: Iterable[str], patterns: Iterable[str]) -> tuple[str, ...]:
    """Turn packed weights whose name matches into plain ones, tied ones into one; give their names.

    A pattern is what `keep` takes, of whole names, or a part of one between dots, as "lm_head".
    """
    wanted = tuple(patterns)
    chosen = tuple(place for place in places if any(_matches(place, pattern) for pattern in wanted))
    made: dict[int, nn.Parameter] = {}
    for place in chosen:
        path, _, leaf = place.rpartition(".")
        _unpack_one(module.get_submodule(path), leaf, made)
    return chosen


def _matches(place: str, pattern: str) -> bool:
    return fnmatchcase(place, pattern) or f".{pattern}." in f".{place}."


def _unpack_one(owner: nn.Module, leaf: str, made: dict[int, nn.Parameter]) -> None:
    packed = getattr(owner, leaf)
    if not isinstance(packed, PackedWeight):  # the same layer by another name
        return
    if id(packed) not in made:
        made[id(packed)] = nn.Parameter(packed.dequantized(), requires_grad=False)
    delattr(owner, leaf)
    owner.register_parameter(leaf, made[id(packed)])
    if isinstance(owner, PackedLayer):
        owner.__class__ = PLAIN[type(owner)]  # type: ignore[assignment]

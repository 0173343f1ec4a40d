"""`from_pretrained` and `save_pretrained` of transformers for our folders; imported only after transformers.

`AutoModelForMaskedLM.from_pretrained("out/")` gives the library's own class with packed layers. The module is built on
the meta device and filled from Parquet (runtime/fill.py). Why the base class is wrapped: see runtime/pretrained.py.
"""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, Any

import torch
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from arrow_quant_v2.calibration.transformers_model import UNUSED, Built, mask_token_of, names_in, tokenizer_of
from arrow_quant_v2.errors import ConfigurationError, SourceError
from arrow_quant_v2.runtime.fill import fill, listed, most_common_dtype
from arrow_quant_v2.runtime.load import GENERATION, stated_mask_token, unused
from arrow_quant_v2.runtime.pretrained import (
    ELSEWHERE,
    METHOD,
    ORIGIN,
    Origin,
    Settings,
    asked_dtype,
    building,
    device_of,
    other_arguments,
    refuse,
    settings_of,
    unpack,
    wrap_methods,
)
from arrow_quant_v2.runtime.saving import save_weights
from arrow_quant_v2.runtime.stacks import as_loaded
from arrow_quant_v2.store.reader import StoredModel

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

REFUSED = (
    "state_dict",
    "gguf_file",
    "variant",
    "distributed_config",
    "tp_plan",
    "tp_size",
    "device_mesh",
    "key_mapping",
    "fusion_config",
    "kernel_config",
    "use_kernels",
    "from_tf",
    "from_flax",
)


class ArrowQuantConfig(Settings, QuantizationConfigMixin):
    """Stands in the library's table; see Settings."""


class ArrowQuantHfQuantizer(HfQuantizer):
    """Stands in transformers' table; it is asked to load only what is not a folder of ours on this disk."""

    def validate_environment(self, *_: object, **__: object) -> None:
        """Tell how our models are loaded.

        Raises:
            ConfigurationError: always.
        """
        raise ConfigurationError(ELSEWHERE)

    def is_serializable(self) -> bool:
        """Whether it can be saved: as Parquet, by our save_pretrained."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Codes have no gradient; adapters beside them can be trained."""
        return False


def register() -> None:
    """Put ourselves into transformers' tables and before its base class; again does nothing."""
    if METHOD in AUTO_QUANTIZER_MAPPING:
        return
    register_quantization_config(METHOD)(ArrowQuantConfig)
    register_quantizer(METHOD)(ArrowQuantHfQuantizer)
    wrap_methods(PreTrainedModel, load, save)


# Loading


def load(cls: type[Any], folder: Path, arguments: tuple[Any, ...], given: Mapping[str, Any]) -> Any:
    """A module of this class with the weights of our folder: packed, on one device, in eval mode.

    Of `from_pretrained`'s arguments it follows those in FOLLOWED and those of the configuration and the class. `dtype`
    is that of computation and of tensors that are not packed; by default config.json's, else that of the original.

    Raises:
        ConfigurationError: an argument cannot be followed.
        SourceError: the weights are not those of this class and configuration.
        StoreError: the weights are damaged.
    """
    refuse(given, REFUSED, folder)
    config, further = _config(cls, folder, given)
    stated = getattr(config, "quantization_config", None) or {}
    settings = settings_of(ArrowQuantConfig, stated, given.get("quantization_config"))
    with StoredModel(folder) as stored:
        dtype = asked_dtype(given) or asked_dtype({"dtype": config.dtype}) or most_common_dtype(stored)
        with building(dtype), torch.device("meta"):
            module = cls(config, *arguments, **further)
        shown = as_loaded(module, stored)
        built = Built(module=module, names=names_in(module, shown.names))
        missing = _missing(built, folder)
        built.set_buffers(str(folder))
        others = unused(folder, shown, built.names)
        filled = fill(
            module,
            shown,
            built.names,
            ties=built.ties,
            unused=others,
            zeros=missing,
            device=device_of(given.get("device_map")),
            dtype=dtype,
            activations=settings.activations,
            mask_token=_mask_token(module, stored, folder),
        )
    unpack(module, filled.packed, settings.modules_to_not_convert)
    _finish(module, Origin(folder=folder, names=built.names), settings, given)
    if not given.get("output_loading_info"):
        return module
    return module, {"missing_keys": missing, "unexpected_keys": others, "mismatched_keys": [], "error_msgs": []}


def _config(cls: type[Any], folder: Path, given: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The configuration, and the arguments that are left for the class itself."""
    further = other_arguments(given, REFUSED)
    config = given.get("config")
    if isinstance(config, PreTrainedConfig):
        config = copy.deepcopy(config)
    else:
        config, further = cls.config_class.from_pretrained(
            folder if config is None else config, local_files_only=True, return_unused_kwargs=True, **further
        )
    if given.get("attn_implementation") is not None:
        config._attn_implementation = given["attn_implementation"]  # noqa: SLF001 - as the library does it
    return config, further


def _missing(built: Built, folder: Path) -> list[str]:
    """Parameters that become zeros: of a head that says something of a whole sequence, which few files hold."""
    missing = built.missing
    if wrong := [name for name in missing if not UNUSED.search(name)]:
        raise SourceError(
            f"{folder}: lacks {listed(wrong)} of {type(built.module).__name__}; load the class that was quantized, or"
            " `arrow-quant convert` the model and load that"
        )
    if missing:
        warnings.warn(f"{folder}: lacks {listed(missing)}, which are zeros now: do not use them", stacklevel=5)
    return missing


def _mask_token(module: Any, stored: StoredModel, folder: Path) -> int | None:
    """The token whose share tells the time, where a layer depends on it."""
    if not any((one.time_aware_quant or {}).get("enabled") for one in stored.entries):
        return None
    return mask_token_of(module, tokenizer_of(folder), stated_mask_token(stored))


def _finish(module: Any, origin: Origin, settings: ArrowQuantConfig, given: Mapping[str, Any]) -> None:
    """Leave everything as the library leaves it."""
    module.requires_grad_(requires_grad=False).eval()
    module.config.quantization_config = settings
    module.config.name_or_path = str(origin.folder)
    module.quantization_method = METHOD
    module.is_quantized = True
    module.hf_quantizer = ArrowQuantHfQuantizer(settings)
    setattr(module, ORIGIN, origin)
    stated = getattr(module, "generation_config", None)
    if given.get("generation_config") is not None:
        module.generation_config = given["generation_config"]
    elif stated is not None and (origin.folder / GENERATION).is_file():
        module.generation_config = type(stated).from_pretrained(origin.folder, local_files_only=True)


# Saving


def save(module: Any, origin: Origin, folder: Path, given: Mapping[str, Any]) -> None:
    """Write config.json, generation_config.json and Parquet files; layers stay packed as they are.

    Raises:
        ConfigurationError: an argument cannot be followed, or the folder holds other weights.
        StoreError: the folder that the model came from is gone, or the disk refuses.
    """
    refuse(given, ("state_dict", "push_to_hub", "variant", "distributed_checkpoint"), folder)
    save_weights(module, origin, folder)
    module.config.architectures = [type(module).__name__]
    module.config.dtype = str(module.dtype).removeprefix("torch.")
    module.config.save_pretrained(folder)
    if module.can_generate() and getattr(module, "generation_config", None) is not None:
        module.generation_config.save_pretrained(folder)

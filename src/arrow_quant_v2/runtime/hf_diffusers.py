"""`from_pretrained` and `save_pretrained` of diffusers' models for our folders; imported only after diffusers.

`DiffusionPipeline.from_pretrained("out/")` loads its other parts itself, and the quantized one by way of us: the
library's own class, filled from Parquet (runtime/fill.py). Why the base class is wrapped: see runtime/pretrained.py;
besides, diffusers' own quantizers need accelerate, and these need nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin

from arrow_quant_v2.calibration.pipelines import EmptyOnMeta, names_in
from arrow_quant_v2.errors import ConfigurationError, SourceError
from arrow_quant_v2.runtime.fill import fill
from arrow_quant_v2.runtime.load import unused
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
from arrow_quant_v2.store.reader import StoredModel

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

REFUSED = ("variant", "use_flashpack", "flashpack_kwargs", "parallel_config")


class ArrowQuantConfig(Settings, QuantizationConfigMixin):
    """Stands in the library's table; see Settings."""


class ArrowQuantDiffusersQuantizer(DiffusersQuantizer):
    """Stands in diffusers' table; it is asked to load only what is not a folder of ours on this disk."""

    def validate_environment(self, *_: object, **__: object) -> None:
        """Tell how our models are loaded.

        Raises:
            ConfigurationError: always.
        """
        raise ConfigurationError(ELSEWHERE)

    def _process_model_before_weight_loading(self, model: Any, **_: object) -> Any:
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: object) -> Any:
        return model

    @property
    def is_serializable(self) -> bool:
        """Whether it can be saved: as Parquet, by our save_pretrained."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Codes have no gradient; adapters beside them can be trained."""
        return False


def register() -> None:
    """Put ourselves into diffusers' tables and before its base class; again does nothing."""
    if METHOD in AUTO_QUANTIZER_MAPPING:
        return
    AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = ArrowQuantConfig
    AUTO_QUANTIZER_MAPPING[METHOD] = ArrowQuantDiffusersQuantizer
    wrap_methods(ModelMixin, load, save)


def load(cls: type[Any], folder: Path, arguments: tuple[Any, ...], given: Mapping[str, Any]) -> Any:
    """A module of this class with the weights of our folder: packed, on one device, in eval mode.

    Of `from_pretrained`'s arguments it follows those in FOLLOWED and those of the configuration. `dtype` is that of
    computation and of tensors that are not packed; by default float32, as diffusers has it.

    Raises:
        ConfigurationError: an argument cannot be followed.
        SourceError: the weights are not those of this class and configuration.
        StoreError: the weights are damaged.
    """
    refuse(given, (*REFUSED, *(f"argument {i}" for i in range(len(arguments)))), folder)
    config, further = _config(cls, folder, given)
    settings = settings_of(ArrowQuantConfig, config.get("quantization_config", {}), given.get("quantization_config"))
    device, dtype = device_of(given.get("device_map")), asked_dtype(given) or torch.float32
    module = _built(cls, config, further, dtype, folder)
    with StoredModel(folder) as stored:
        names = names_in(module, stored.names)
        filled = fill(
            module,
            stored,
            names,
            unused=(others := unused(folder, stored, names)),
            device=device,
            dtype=dtype,
            activations=settings.activations,
        )
    unpack(module, filled.packed, settings.modules_to_not_convert)
    module.to(device)
    _finish(module, Origin(folder=folder, names=names), settings)
    if not given.get("output_loading_info"):
        return module
    return module, {"missing_keys": [], "unexpected_keys": others, "mismatched_keys": [], "error_msgs": []}


def _config(cls: type[Any], folder: Path, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    further = other_arguments(given, REFUSED)
    config, unused = cls.load_config(folder, local_files_only=True, return_unused_kwargs=True, **further)
    return dict(config), unused


def _built(cls: type[Any], config: dict[str, Any], further: dict[str, Any], dtype: torch.dtype, folder: Path) -> Any:
    """The module without memory for its weights, its other buffers computed, in `dtype` where they follow the model."""
    try:
        with building(dtype), EmptyOnMeta():
            return cls.from_config(config, **further)
    except (TypeError, ValueError, AttributeError, KeyError, IndexError, RuntimeError) as error:
        raise SourceError(
            f"{folder / 'config.json'}: {cls.__name__} cannot be built from it: {type(error).__name__}: {error}"
        ) from error


def _finish(module: Any, origin: Origin, settings: ArrowQuantConfig) -> None:
    """Leave everything as the library leaves it."""
    module.requires_grad_(requires_grad=False).eval()
    module.register_to_config(_name_or_path=str(origin.folder), quantization_config=settings.to_dict())
    module.is_quantized = True
    module.quantization_method = METHOD
    module.hf_quantizer = ArrowQuantDiffusersQuantizer(settings)
    setattr(module, ORIGIN, origin)


def save(module: Any, origin: Origin, folder: Path, given: Mapping[str, Any]) -> None:
    """Write config.json and Parquet files; layers stay packed as they are.

    Raises:
        ConfigurationError: an argument cannot be followed, or the folder holds other weights.
        StoreError: the folder that the model came from is gone, or the disk refuses.
    """
    refuse(given, ("variant", "push_to_hub", "use_flashpack"), folder)
    save_weights(module, origin, folder)
    module.save_config(folder)

"""The front door: every public name, loaded when it is first used, so that importing wakes no torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from arrow_quant_v2.api import ArrowQuantizer, ArrowQuantV2
    from arrow_quant_v2.config import DiffusionQuantConfig
    from arrow_quant_v2.errors import ArrowQuantError, ConfigurationError, QuantizationError, ValidationError
    from arrow_quant_v2.packed import PackedTensor
    from arrow_quant_v2.quantizers.gptq import GPTQCalibrator
    from arrow_quant_v2.quantizers.spatial import SpatialQuantizer
    from arrow_quant_v2.quantizers.time_aware import TimeAwareQuantizer
    from arrow_quant_v2.runtime.clock import timestep
    from arrow_quant_v2.runtime.load import load, load_pipeline

__version__ = "2.0.0.dev0"

_ROOMS = {
    "ArrowQuantV2": "api",
    "ArrowQuantizer": "api",
    "DiffusionQuantConfig": "config",
    "GPTQCalibrator": "quantizers.gptq",
    "PackedTensor": "packed",
    "SpatialQuantizer": "quantizers.spatial",
    "TimeAwareQuantizer": "quantizers.time_aware",
    "ArrowQuantError": "errors",
    "ConfigurationError": "errors",
    "QuantizationError": "errors",
    "ValidationError": "errors",
    "load": "runtime.load",
    "load_pipeline": "runtime.load",
    "timestep": "runtime.clock",
}

__all__ = [
    "ArrowQuantError",
    "ArrowQuantV2",
    "ArrowQuantizer",
    "ConfigurationError",
    "DiffusionQuantConfig",
    "GPTQCalibrator",
    "PackedTensor",
    "QuantizationError",
    "SpatialQuantizer",
    "TimeAwareQuantizer",
    "ValidationError",
    "__version__",
    "load",
    "load_pipeline",
    "timestep",
]


def __getattr__(name: str) -> object:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(importlib.import_module(f"{__name__}.{_ROOMS[name]}"), name)


def __dir__() -> list[str]:
    return __all__


importlib.import_module(f"{__name__}.runtime.registration").follow()  # transformers and diffusers load our folders

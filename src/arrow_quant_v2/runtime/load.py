"""A quantized folder as a model that runs from its packed weights; knows which library builds what.

No code that lies in a folder is run.
"""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from arrow_quant_v2.calibration.pipelines import build_denoiser, installed, names_in
from arrow_quant_v2.calibration.transformers_model import UNUSED, build_transformers, mask_token_of, tokenizer_of
from arrow_quant_v2.calibration.transformers_model import names_in as transformers_names
from arrow_quant_v2.engines.devices import reachable
from arrow_quant_v2.errors import SourceError
from arrow_quant_v2.runtime.fill import fill, listed, most_common_dtype
from arrow_quant_v2.runtime.pretrained import asked_dtype
from arrow_quant_v2.runtime.stacks import as_loaded
from arrow_quant_v2.sources.files import read_json
from arrow_quant_v2.sources.folder import PIPELINE, open_model
from arrow_quant_v2.sources.parquet import ParquetSource
from arrow_quant_v2.store.schema import CONFIGURATION_KEY

if TYPE_CHECKING:
    import os

    from torch import nn

    from arrow_quant_v2.runtime.fill import Filled
    from arrow_quant_v2.runtime.modules import Activations
    from arrow_quant_v2.runtime.stacks import Stored
    from arrow_quant_v2.sources.folder import Model
    from arrow_quant_v2.store.reader import StoredModel

METADATA = "metadata.json"
COMPUTED = re.compile(r"(^|[._])(position_ids|inv_freq|token_type_ids|masked_bias|attn\.bias)$")  # old files hold them
GENERATION = "generation_config.json"


def load(
    path: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str | None = None,
    activations: Activations | None = None,
    *,
    into: nn.Module | None = None,
    component: str | None = None,
) -> nn.Module:
    """A quantized model, in eval mode: its linear, convolution and embedding weights stay packed, mapped from the file.

    path         a folder of transformers, of diffusers, or of a pipeline, of which the denoiser is loaded
    device       where it is to run
    dtype        of everything that is not packed, or its name; None: the one that most of its weights had
    activations  None: inputs as they come; "dynamic": inputs of linear layers are rounded to 8 bits, every group of a
                 row by its own largest value; "static": by the ranges that calibration saw, of the current time group
    into         a module of your own that was quantized, with values or on torch's meta device: it is filled and given
                 back; names have to be the same
    component    of a pipeline; None: the one that was quantized, else its denoiser

    Layers that do not run on packed weights are dequantized, with a warning; the Decisions are the model's attribute
    `arrow_quant_decisions`. The time group is found from the model's own time argument, from the share of masked tokens
    in `input_ids`, or is told by `timestep`.

    Raises:
        SourceError: nothing lies there, its class is unknown or is not installed, or the tensors do not fit it.
        StoreError: a file is missing or damaged; ChecksumError: its bytes are not those that were written;
            SchemaVersionError: it is newer than this program.
        ConfigurationError: a setting is not allowed, there is no such device, or transformers is not installed.
        QuantizationError: diffusers is not installed.
    """
    root = Path(path)
    chosen: dict[str, Any] = {
        "device": reachable(device),
        "dtype": asked_dtype({"dtype": dtype}),
        "activations": activations,
    }
    with open_model(root, component or component_of(root)) as model:
        stored = _stored(model)
        if into is not None:
            module, filled = into, fill(into, stored, **chosen)
        elif _is_diffusers(model):
            module, filled = _diffusers(model, stored, chosen)
        else:
            module, filled = _transformers(model, stored, chosen)
    module.arrow_quant_decisions = filled.decisions  # type: ignore[assignment]
    return module.to(device).eval()


def load_pipeline(
    path: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str | None = None,
    activations: Activations | None = None,
    **components: Any,
) -> Any:
    """A pipeline of diffusers whose denoiser runs packed; `components` replace others, such as `safety_checker=None`.

    The other components are loaded by diffusers, in the denoiser's dtype: by default the one that most of its weights
    had, on a CPU float32 instead of float16, which few of its operators know.

    Raises:
        SourceError: it is no pipeline, or diffusers cannot load it.
        ArrowQuantError: as `load`.
    """
    root = Path(path)
    if not (root / PIPELINE).is_file():
        raise SourceError(f"{root}: is no pipeline (no {PIPELINE}); use load for a model without one")
    diffusers = installed("diffusers")
    with open_model(root, component_of(root)) as model:
        name, usual = model.component, most_common_dtype(_stored(model))
    on_cpu = reachable(device).type == "cpu"
    wanted = asked_dtype({"dtype": dtype}) or (torch.float32 if on_cpu and usual == torch.float16 else usual)
    denoiser = load(root, device, wanted, activations, component=name)
    settings = {_dtype_argument(diffusers): wanted, "local_files_only": True, "trust_remote_code": False}
    try:
        pipeline = diffusers.DiffusionPipeline.from_pretrained(root, **settings, **{name: denoiser} | components)
    except (ValueError, OSError, TypeError, AttributeError, ImportError, KeyError) as error:
        raise SourceError(
            f"{root}: diffusers {diffusers.__version__} cannot load the pipeline around its {name}"
            f" ({type(error).__name__}: {error}); load the {name} alone with load, or give what is missing by its name"
        ) from error
    return pipeline.to(device)


def _dtype_argument(diffusers: Any) -> str:
    """How this version calls the dtype of a pipeline."""
    return "dtype" if hasattr(diffusers.utils.deprecation_utils, "_resolve_dtype") else "torch_dtype"


def component_of(root: Path) -> str | None:
    """The component of a pipeline that was quantized, by its metadata.json; None where there is none."""
    found = read_json(root / METADATA).get("component") if (root / METADATA).is_file() else None
    return found if isinstance(found, str) and found else None


def _stored(model: Model) -> StoredModel:
    if not isinstance(model.source, ParquetSource):
        raise SourceError(f"{model.folder}: is not quantized; quantize it first, or load it with the library it is of")
    return model.source.stored


def _is_diffusers(model: Model) -> bool:
    config = model.folder / "config.json"
    if not config.is_file():
        raise SourceError(
            f"{model.folder}: has no config.json, so its class is unknown; give your own module: into=..."
        )
    return "_class_name" in read_json(config)


def _diffusers(model: Model, stored: StoredModel, chosen: dict[str, Any]) -> tuple[Any, Filled]:
    module = build_denoiser(model)
    names = names_in(module, stored.names)
    return module, fill(module, stored, names, unused=unused(model.folder, stored, names), **chosen)


def _transformers(model: Model, stored: StoredModel, chosen: dict[str, Any]) -> tuple[Any, Filled]:
    built = build_transformers(model)
    module, shown = built.module, as_loaded(built.module, stored)
    built = replace(built, names=transformers_names(module, shown.names))
    built.set_buffers(model.source.location)
    filled = fill(
        module,
        shown,
        built.names,
        ties=built.ties,
        zeros=[name for name in built.missing if UNUSED.search(name)],
        unused=unused(model.folder, shown, built.names),
        mask_token=_mask_token(model, module, stored) if chosen["activations"] == "static" else None,
        **chosen,
    )
    if (model.folder / GENERATION).is_file() and module.can_generate():
        reader = type(module.generation_config)
        module.generation_config = reader.from_pretrained(model.folder, local_files_only=True)
    return module, filled


def unused(folder: Path, stored: Stored, names: dict[str, str]) -> list[str]:
    """Tensors without a place in the class, such as heads for another task; told, unless every model computes them."""
    others = sorted(set(stored.names) - set(names))
    if strange := [name for name in others if not COMPUTED.search(name)]:
        warnings.warn(f"{folder}: {listed(strange)} have no place in the model and are left out", stacklevel=5)
    return others


def _mask_token(model: Model, module: Any, stored: StoredModel) -> int | None:
    """As it was given when the model was quantized, else as the tokenizer or config.json tells."""
    return mask_token_of(module, tokenizer_of(model.folder), stated_mask_token(stored))


def stated_mask_token(stored: StoredModel) -> int | None:
    """The mask token that was given when the model was quantized; None where none was."""
    stated = json.loads(stored.metadata.get(CONFIGURATION_KEY, "{}")).get("mask_token")
    return stated if isinstance(stated, int) else None

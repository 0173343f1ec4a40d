"""Opens the denoiser and the noise schedule of a diffusers folder; does not know what the model is shown.

Only classes of diffusers itself are built, by name. No code that lies in the folder, or that it names, is run.
"""

from __future__ import annotations

import importlib
import re
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from arrow_quant_v2.calibration.runnable import Runnable
from arrow_quant_v2.errors import QuantizationError, SourceError
from arrow_quant_v2.sources.files import read_json
from arrow_quant_v2.sources.folder import PIPELINE, open_model
from arrow_quant_v2.sources.modality import detect_modality

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping
    from pathlib import Path

    from torch import nn

    from arrow_quant_v2.config import Modality
    from arrow_quant_v2.sources.base import Source
    from arrow_quant_v2.sources.folder import Model

# How attention layers were called in the files of the first diffusion models, and are called now.
RENAMED = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
OLD_NAME = re.compile("|".join(map(re.escape, RENAMED)))


def open_pipeline(path: Path | str, component: str | None = None, modality: Modality | None = None) -> Runnable:
    """The denoiser of a diffusers pipeline folder, or of the folder of one diffusers model, ready to be called.

    `component` chooses a part of a pipeline, by default its denoiser; `modality` None is found out. The weights are
    float32, whatever the files hold. The scheduler is None for a model without a pipeline, and where the pipeline's
    is no class that the installed diffusers offers.

    Raises:
        SourceError: the folder is damaged, of an unknown modality, or its model is no class of diffusers.
        QuantizationError: diffusers is not installed.
    """
    with open_model(path, component) as model:
        index = read_json(model.root / PIPELINE) if model.component else {}
        module = build_denoiser(model)
        names = _fill(module, model.source)
        return Runnable(
            module=module.eval().requires_grad_(requires_grad=False),
            modality=modality or detect_modality(model.root, model.component),
            names=names,
            scheduler=_scheduler(model.root, index),
            classes=_classes(index),
        )


def installed(package: str) -> Any:
    """The package, imported.

    Raises:
        QuantizationError: it is not installed; says how to install it.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise QuantizationError(
            f"running a model of {package} needs {package}, which cannot be imported ({error});"
            " install it: pip install diffusers transformers"
        ) from error


class EmptyOnMeta(TorchFunctionMode):
    """torch.empty makes no memory: what layers allocate for weights that a file will bring; all else is computed.

    Under torch.device("meta") the tables of positions, which are in no file, would be lost as well.
    """

    def __torch_function__(
        self,
        function: Callable[..., Any],
        _types: Iterable[type],
        arguments: tuple[Any, ...] = (),
        keywords: Mapping[str, Any] | None = None,
    ) -> Any:
        chosen = dict(keywords or {})
        if function is torch.empty:
            chosen["device"] = "meta"
        return function(*arguments, **chosen)


def build_denoiser(model: Model) -> nn.Module:
    """The module that config.json describes, without memory for its weights, its other buffers computed.

    Raises:
        SourceError: it is no class of diffusers, or cannot be built from its config.
        QuantizationError: diffusers is not installed.
    """
    path = model.folder / "config.json"
    config = read_json(path)
    index = read_json(model.root / PIPELINE) if model.component else {}
    library = (index.get(model.component) or ["diffusers"])[0]
    if library != "diffusers":
        raise SourceError(
            f"{model.root / PIPELINE}: {model.component} is a class of {library!r}; only classes of diffusers"
            " itself are run: give samples by a callable that loads the model, or choose another --component"
        )
    build = _class(config.get("_class_name"), "ModelMixin", str(path))
    with torch.random.fork_rng(devices=[]), EmptyOnMeta():
        try:
            module: nn.Module = build.from_config(config)
        except (TypeError, ValueError, AttributeError, KeyError, IndexError, RuntimeError, ImportError) as error:
            raise SourceError(
                f"{path}: {build.__name__} cannot be built from it: {type(error).__name__}: {error};"
                " repair it, or install the version of diffusers that it was written for"
            ) from error
    module.register_to_config(_name_or_path=str(model.folder))  # type: ignore[operator]
    return module


def _class(name: object, base: str, where: str) -> Any:
    """The class of diffusers that a file names, if it is a `base`; nothing is imported by the name."""
    diffusers = installed("diffusers")
    known = isinstance(name, str) and name in diffusers.__all__
    found = getattr(diffusers, str(name)) if known else None
    if isinstance(found, type) and issubclass(found, getattr(diffusers, base)):
        return found
    raise SourceError(
        f"{where}: _class_name is {name!r}, which is no {base} of diffusers {diffusers.__version__};"
        " upgrade diffusers, or give samples by a callable that loads the model"
    )


def _fill(module: nn.Module, source: Source) -> dict[str, str]:
    """Assign the weights of the source to the module, as float32: name in the files -> name in the module."""
    wanted = module.state_dict()
    shapes = {info.name: tuple(info.shape) for info in source.tensors}
    names = names_in(module, shapes)
    if missing := sorted(set(wanted) - set(names.values())):
        raise SourceError(
            f"{source.location}: lacks {len(missing)} tensors of {type(module).__name__}, the first is {missing[0]};"
            " download the model again"
        )
    for name, parameter in names.items():
        if shapes[name] != tuple(wanted[parameter].shape):
            raise SourceError(
                f"{source.location}: {name} is {shapes[name]}, but config.json asks for"
                f" {tuple(wanted[parameter].shape)}; one of them belongs to another model: download it again"
            )
    weights = {parameter: _read(source, name, shapes[name]) for name, parameter in names.items()}
    module.load_state_dict(weights, assign=True)
    return names


def names_in(module: nn.Module, files: Iterable[str]) -> dict[str, str]:
    """Name in the files -> name in the module, for every tensor that has a place."""
    wanted = module.state_dict()
    return {name: found for name in files if (found := _parameter(name, wanted)) is not None}


def _parameter(name: str, wanted: Collection[str]) -> str | None:
    renamed = OLD_NAME.sub(lambda old: RENAMED[old[0]], name)
    return next((found for found in (name, renamed) if found in wanted), None)


def _read(source: Source, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    values = source.read(name).reshape(shape)
    return values.float() if values.is_floating_point() else values


def _classes(index: Mapping[str, Any]) -> tuple[int, ...]:
    """The numbers of the classes that have names, ascending: a table may have rows that were never trained."""
    named = index.get("id2label")
    return tuple(sorted(int(key) for key in named if str(key).isdecimal())) if isinstance(named, dict) else ()


def _scheduler(root: Path, index: Mapping[str, Any]) -> Any:
    """The pipeline's noise schedule; None where there is none of diffusers."""
    path = root / "scheduler" / "scheduler_config.json"
    entry = index.get("scheduler")
    if not (isinstance(entry, list) and entry[:1] == ["diffusers"] and path.is_file()):
        return None
    config = read_json(path)
    try:
        build = _class(config.get("_class_name"), "SchedulerMixin", str(path))
    except SourceError:  # unknown to this version, or it needs a package that is not installed
        return None
    try:
        return build.from_config(config)
    except (TypeError, ValueError, KeyError, NotImplementedError) as error:
        raise SourceError(f"{path}: {build.__name__} cannot be built from it: {error}; repair the file") from error

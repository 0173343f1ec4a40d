"""The promised Python API: each method is a few lines over the rooms that do the work; knows no mathematics."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from arrow_quant_v2.calibration import chance
from arrow_quant_v2.config import DiffusionQuantConfig, LayerSpec
from arrow_quant_v2.doctor import diagnose
from arrow_quant_v2.errors import ConfigurationError, ValidationError
from arrow_quant_v2.export import export_model
from arrow_quant_v2.one_tensor import GRANULARITIES, Granularity, dequantize_tensor, quantize_tensor
from arrow_quant_v2.orchestrator import Job, quantize_model
from arrow_quant_v2.quantizers import quantizer
from arrow_quant_v2.report.stored import with_measured
from arrow_quant_v2.report.write import known_findings, write_report
from arrow_quant_v2.results import (
    diagnosis_result,
    generation_result,
    inspection_result,
    quantization_result,
    report_result,
    stats_result,
    validation_result,
)
from arrow_quant_v2.runtime.generate import Wish as GenerationWish
from arrow_quant_v2.runtime.generate import generate
from arrow_quant_v2.runtime.generate_arguments import PipelineWish
from arrow_quant_v2.sources.files import read_json
from arrow_quant_v2.sources.folder import open_model
from arrow_quant_v2.sources.modality import detect_modality
from arrow_quant_v2.sources.module import ModuleSource
from arrow_quant_v2.sources.parquet import ParquetSource
from arrow_quant_v2.stats_run import StatsJob, make_stats, merge_stats
from arrow_quant_v2.validation.judge import Heard, Wish, find_out, part
from arrow_quant_v2.workfolder import METADATA

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Sequence

    from arrow_quant_v2.config import Modality
    from arrow_quant_v2.packed import Bits, PackedTensor
    from arrow_quant_v2.preparation import Provider
    from arrow_quant_v2.sources.base import Source
    from arrow_quant_v2.sources.folder import Model
    from arrow_quant_v2.validation.findings import Findings

    PathLike = str | os.PathLike[str]
    Report = Callable[[str, float], object]

MODES = ("diffusion",)


class ArrowQuantV2:
    """Quantizes diffusion models, and says how good the result is."""

    def __init__(self, mode: str = "diffusion") -> None:
        """Choose what kind of model is meant; "diffusion" is the only one.

        Raises:
            ConfigurationError: another mode.
        """
        if mode not in MODES:
            raise ConfigurationError(f"mode is {mode!r}; allowed: {', '.join(MODES)}")
        self.mode = mode

    def quantize_diffusion_model(
        self,
        model_path: PathLike | torch.nn.Module,
        output_path: PathLike,
        config: DiffusionQuantConfig | None = None,
        progress_callback: Report | None = None,
        *,
        calibration: Provider | None = None,
        overwrite: bool = False,
        should_stop: Callable[[], bool] = bool,
    ) -> dict[str, Any]:
        """Quantize a model folder, a weight file or a live module into the new folder `output_path`.

        `calibration` is a function model -> iterator of (inputs, timestep), for models whose inputs nothing else can
        make: inputs are a tensor, a tuple of arguments or a dictionary of keywords. Without it the configuration's
        `calibration_data`, or else the model's own denoising trajectory, is what layers are fitted to.

        Returns `quantized_path, compression_ratio, cosine_similarity` (of the weights: see `metric`),
        `model_size_mb` (10^6 bytes of weight files), `modality, bit_width, quantization_time_s`, and more of ours:
        `bit_widths` (how many layers came out at each width), `accuracy` and `judged_by` (what `min_accuracy` was held
        against), `passed`, `fallbacks_per_method` ... Each fallback is a warning too.
        A run that was killed goes on where it stopped when it is called again with the same arguments.

        Raises:
            ConfigurationError: a setting or the output path is not allowed.
            SourceError: the model cannot be read, or its modality is unknown.
            QuantizationError: a tensor cannot be quantized, or `min_accuracy` is missed even with 8 bits.
            StoreError: the output cannot be written.
            InterruptedRunError: `should_stop`, asked after every layer, said so.
        """
        config = config or DiffusionQuantConfig()
        with _opened(model_path, config) as (source, model):
            job = Job(
                source=source,
                model=model,
                modality=_modality(model, config),
                config=config,
                module=model_path if isinstance(model_path, torch.nn.Module) else None,
                provider=calibration,
                out=Path(output_path),
                overwrite=overwrite,
                should_stop=should_stop,
            )
            outcome = quantize_model(job, progress_callback)
            result = quantization_result(job, outcome)
        if missed := outcome.verdict.missed:
            warnings.warn(
                f"{missed} (min_accuracy {config.min_accuracy}); {_more(config)}",
                stacklevel=2,
            )
        return result

    def calibrate(
        self,
        model_path: PathLike | torch.nn.Module,
        stats_path: PathLike,
        config: DiffusionQuantConfig | None = None,
        progress_callback: Report | None = None,
        *,
        calibration: Provider | None = None,
        compact: bool = False,
        like: PathLike | None = None,
        overwrite: bool = False,
    ) -> dict[str, Any]:
        """Observe what goes into the layers of a model, and keep it in the new folder `stats_path` for `stats=`.

        `calibration` is what it is for `quantize_diffusion_model`. Time groups are kept apart, so that stats can be
        merged, and take that many times the room; `compact` sums them up. `like` names stats whose time groups are
        used. Stats that were made from the very same are not made again.

        Returns `path, layers, inputs, samples, origin, synthetic, time_groups, size_mb, seconds, reused, notes`.

        Raises:
            ConfigurationError: a setting is not allowed, or the output holds something else.
            SourceError: the model cannot be read or run.
            QuantizationError: it cannot be called.
            StoreError: the output cannot be written.
        """
        config = config or DiffusionQuantConfig()
        with _opened(model_path, config) as (source, model):
            job = StatsJob(
                source=source,
                model=model,
                modality=_modality(model, config),
                config=config,
                module=model_path if isinstance(model_path, torch.nn.Module) else None,
                provider=calibration,
                out=Path(stats_path),
                overwrite=overwrite,
                compact=compact,
                like=None if like is None else Path(like),
            )
            return stats_result(make_stats(job, progress_callback))

    def merge_stats(
        self, stats_paths: Sequence[PathLike], output_path: PathLike, *, overwrite: bool = False
    ) -> dict[str, Any]:
        """Add up stats of the same model and settings from different samples; returns what `calibrate` returns.

        Raises:
            ConfigurationError: they do not belong together, or the output holds something else.
            StoreError: one is damaged, or the output cannot be written.
        """
        return stats_result(merge_stats([Path(path) for path in stats_paths], Path(output_path), overwrite=overwrite))

    def validate_quality(
        self,
        original_path: PathLike | torch.nn.Module,
        quantized_path: PathLike,
        *,
        min_accuracy: float | None = None,
        component: str | None = None,
        progress_callback: Report | None = None,
        **more: Any,
    ) -> dict[str, Any]:
        """Compare any two copies of a model: `cosine_similarity, passed, per_layer_accuracy, compression_ratio`.

        Where the original can be run, `cosine_similarity` is that of both models' outputs to held-out inputs, else the
        mean weight cosine of the quantized layers; `metric` says which. The bar is `min_accuracy`, else the one that
        the quantized model was made with, else 0.85. `per_layer_accuracy` are weight cosines. `metrics`, `steps` and
        `notes` hold all else that was found; docs/quality.md explains each figure.

        More keywords: `weights_only`, `samples` (a file of held-out data, or a function as `calibration` of
        `quantize_diffusion_model`), `count`, `seed`, `mask_token`, `modality`, `pairs`, `steps`, and `judge`, the
        folder of a causal language model; `arrow_quant_v2.validation.judge.Wish` says what each is.

        Raises:
            ConfigurationError: `min_accuracy` is not between 0 and 1, or the samples cannot be used.
            ValidationError: they do not hold the same tensors.
            SourceError: one of them cannot be read.
            StoreError: a stored model is damaged.
        """
        wish = _wish(min_accuracy=min_accuracy, component=component, **more)
        return validation_result(self.find_out(original_path, quantized_path, wish, progress_callback))

    def find_out(
        self,
        original_path: PathLike | torch.nn.Module,
        quantized_path: PathLike,
        wish: Wish | None = None,
        progress_callback: Report | None = None,
        heard: Heard | None = None,
    ) -> Findings:
        """What `validate_quality` finds, as records, with the samples that both models made.

        `heard` keeps what the original said: the same one for several quantized models of it, and it is asked once.

        Raises:
            ArrowQuantError: as `validate_quality`.
        """
        original = original_path if isinstance(original_path, torch.nn.Module) else Path(original_path)
        return find_out(original, Path(quantized_path), wish, progress_callback, heard)

    def compare(
        self,
        original_path: PathLike | torch.nn.Module,
        quantized_paths: Sequence[PathLike],
        *,
        progress_callback: Report | None = None,
        **more: Any,
    ) -> dict[str, Any]:
        """Several quantized models side by side, each compared with the same original on the same inputs.

        `more` is what `validate_quality` takes; the seed is the same for all, 1000003 where none is given. Returns
        `original`, `original_mb`, and in `models` for each path what `validate_quality` returns, with `path`.

        Raises:
            ArrowQuantError: as `validate_quality`.
        """
        if not quantized_paths:
            raise ConfigurationError("no quantized models were given; give one or more folders to compare")
        wish = _wish(**({"seed": chance.held_out(0, chance.VALIDATION)} | more))
        count, models, heard = len(quantized_paths), [], Heard()
        for path in quantized_paths:  # before the first is run, which may take minutes
            open_model(Path(path), wish.component or _component_of(Path(path))).close()
        for number, path in enumerate(quantized_paths):
            report = part(progress_callback, number / count, (number + 1) / count)
            found = self.find_out(original_path, path, wish, report, heard)
            models.append({"path": str(path)} | validation_result(found))
        named = isinstance(original_path, torch.nn.Module)
        original = type(original_path).__name__ if named else str(original_path)
        return {"original": original, "original_mb": models[0]["original_mb"], "models": models}

    def quantize(
        self,
        tensors: Mapping[str, torch.Tensor],
        bit_width: Bits = 8,
        *,
        group_size: int | None = 64,
        symmetric: bool = False,
        method: str = "clip",
    ) -> dict[str, PackedTensor]:
        """Quantize tensors in memory, such as LoRA or ControlNet weights; see `ArrowQuantizer` for one of them.

        Raises:
            ConfigurationError: a width, group size or method is not allowed, or `tensors` is no mapping.
            QuantizationError: a tensor cannot be quantized.
        """
        if not isinstance(tensors, Mapping):
            raise ConfigurationError(
                f"tensors is a {type(tensors).__name__}; needed: a mapping of names to tensors, such as a state_dict,"
                " or an ArrowQuantizer for one tensor"
            )
        one = ArrowQuantizer(bit_width, group_size=group_size, symmetric=symmetric, method=method)
        return {name: one.quantize(tensor, name) for name, tensor in tensors.items()}

    def dequantize(self, packed: Mapping[str, PackedTensor]) -> dict[str, torch.Tensor]:
        """The tensors again, in their own shapes and dtypes."""
        return {name: dequantize_tensor(one) for name, one in packed.items()}

    def inspect(self, quantized_path: PathLike) -> dict[str, Any]:
        """Every layer of a quantized model: shape, bits, bits per weight, cosine and decision.

        Raises:
            SourceError: no quantized model lies there.
            StoreError: it is damaged.
        """
        with open_model(Path(quantized_path), _component_of(Path(quantized_path))) as model:
            if not isinstance(model.source, ParquetSource):
                raise ValidationError(
                    f"{quantized_path}: is not quantized by this program; give a folder that quantize wrote"
                )
            return inspection_result(model.folder)

    def report(
        self,
        quantized_path: PathLike,
        original_path: PathLike | None = None,
        *,
        progress_callback: Report | None = None,
        **more: Any,
    ) -> dict[str, Any]:
        """Write report.html, report.json and the model card README.md into a quantized folder.

        They show what an earlier report measured, else what the files tell. With the original both models are compared,
        on outputs wherever it can be run, and make samples from one seed; `more` is what `validate_quality` takes.

        Returns `files, notes` and `figures`, the content of report.json.

        Raises:
            SourceError: no model lies there.
            StoreError: it is damaged, or the disk refuses.
            ValidationError: the original holds other tensors.
        """
        folder = Path(quantized_path)
        findings = known_findings(folder)
        if original_path is not None:
            measured = self.find_out(original_path, folder, _wish(**more), progress_callback)
            findings = with_measured(findings, measured)
        return report_result(findings, write_report(folder, findings, folder.resolve().name))

    def convert(
        self, quantized_path: PathLike, output_path: PathLike, *, progress_callback: Report | None = None
    ) -> dict[str, Any]:
        """Write the dequantized model as safetensors that transformers or diffusers load: `path, files, size_mb`.

        Raises:
            ConfigurationError: the output exists.
            SourceError: no model lies there.
            StoreError: it is damaged, or the output cannot be written.
        """
        with open_model(Path(quantized_path), _component_of(Path(quantized_path))) as model:
            exported = export_model(model, Path(output_path), progress_callback)
        files = [str(path) for path in exported.files]
        return {"path": str(output_path), "files": files, "size_mb": exported.tensor_bytes / 1e6}

    def generate(
        self,
        quantized_path: PathLike,
        prompt: str | int | None = None,
        *,
        seed: int = 0,
        steps: int | None = None,
        length: int | None = None,
        temperature: float | None = None,
        block_length: int | None = None,
        chat: bool = False,
        negative_prompt: str | None = None,
        guidance: float | None = None,
        height: int | None = None,
        width: int | None = None,
        frames: int | None = None,
        fps: float | None = None,
        output_path: PathLike | None = None,
        overwrite: bool = False,
        device: str = "cpu",
        step_callback: Callable[[int, int, str], object] | None = None,
    ) -> dict[str, Any]:
        """Run a quantized model: uncover text behind a prompt, or make a picture, a video or a sound.

        Text has `length` new tokens in `steps` steps, by default one for each, sampled at `temperature` (1; 0 takes the
        likeliest), all of them at once or in blocks of `block_length` from left to right. With `chat` the prompt is a
        user's message in the tokenizer's chat template, and the text is the answer alone.

        Pictures (PNG), videos (WebP, PNG or GIF, by the name) and sounds (WAV) take the pipeline's own number of steps,
        `guidance` (of classifier-free guidance), `height` and `width` in pixels, `frames` and `fps` where nothing is
        said, and go into `output_path`, by default generated.png, .webp or .wav. What a model does not take is refused.
        The same seed gives the same result on the same machine. `step_callback` is called with (step, steps, text so
        far).

        Returns `kind, text, path, tokens, steps, seconds, load_seconds, tokens_per_second, seconds_per_step` and
        `peak_memory_mb` of the process.

        Raises:
            ConfigurationError: an argument does not fit the model, or a package is missing.
            SourceError: no quantized model lies there, or none that makes anything.
            QuantizationError: the model fails.
            StoreError: the model is damaged, or the result cannot be written.
        """
        wish = GenerationWish(
            prompt=_prompt(prompt),
            seed=seed,
            steps=steps,
            length=length,
            temperature=temperature,
            block_length=block_length,
            chat=chat,
            pipeline=PipelineWish(
                negative_prompt=negative_prompt, guidance=guidance, height=height, width=width, frames=frames, fps=fps
            ),
            device=device,
            out=None if output_path is None else Path(output_path),
            overwrite=overwrite,
        )
        return generation_result(generate(Path(quantized_path), wish, step_callback or _untold))

    def doctor(
        self,
        model_path: PathLike | torch.nn.Module,
        config: DiffusionQuantConfig | None = None,
        *,
        disk: PathLike = ".",
    ) -> dict[str, Any]:
        """What `quantize_diffusion_model` would do and need: sizes, memory, disk, skips; no values are read.

        Raises:
            ConfigurationError: a setting is not allowed, or `max_memory` is too little.
            SourceError: the model cannot be read.
        """
        config = config or DiffusionQuantConfig()
        with _opened(model_path, config) as (source, model):
            return diagnosis_result(diagnose(source, model, _modality(model, config), config, Path(disk)))


class ArrowQuantizer:
    """The plain post-training quantizer for one tensor: 2, 4 or 8 bits, symmetric or not."""

    def __init__(
        self,
        bits: Bits = 8,
        *,
        granularity: Granularity = "group",
        group_size: int | None = 64,
        symmetric: bool = False,
        method: str = "rtn",
    ) -> None:
        """Choose the grid: one scale per "tensor", per "channel" (row), or per "group" of a row's columns.

        Raises:
            ConfigurationError: a value is not allowed.
        """
        if granularity not in GRANULARITIES:
            raise ConfigurationError(f"granularity is {granularity!r}; allowed: {', '.join(GRANULARITIES)}")
        size = group_size if granularity == "group" else None
        self.spec = LayerSpec(bits=bits, group_size=size, method=method, symmetric=symmetric)
        quantizer(method)  # one that must see inputs is refused here already
        self.granularity = granularity

    def quantize(self, tensor: torch.Tensor, name: str = "tensor") -> PackedTensor:
        """Codes and parameters of a floating-point tensor of any shape; the first axis holds the channels.

        Raises:
            QuantizationError: it is empty, no floating-point tensor, or holds NaN or infinity.
        """
        return quantize_tensor(tensor, name, self.spec, self.granularity)

    def dequantize(self, packed: PackedTensor) -> torch.Tensor:
        """The tensor again, in its own shape and dtype."""
        return dequantize_tensor(packed)


@contextmanager
def _opened(model: PathLike | torch.nn.Module, config: DiffusionQuantConfig) -> Iterator[tuple[Source, Model | None]]:
    if isinstance(model, torch.nn.Module):
        yield ModuleSource(model), None
        return
    with open_model(Path(model), config.component) as opened:
        yield opened.source, opened


def _modality(model: Model | None, config: DiffusionQuantConfig) -> Modality:
    if config.modality is not None:
        return config.modality
    if model is None:
        raise ConfigurationError("a live module has no files that tell its modality; set modality= in the config")
    return detect_modality(model.root, model.component)


def _component_of(folder: Path) -> str | None:
    """The pipeline component that a quantized folder holds, by its metadata.json; None where there is none."""
    path = folder / METADATA
    found = read_json(path).get("component") if path.is_file() else None
    return found if isinstance(found, str) and found else None


def _untold(_step: int, _steps: int, _text: str) -> None:
    pass


def _wish(**asked: Any) -> Wish:
    """What is to be found out; a file and a function are both called samples.

    Raises:
        ConfigurationError: a keyword is unknown, or its value is not allowed.
    """
    known = {field.name for field in fields(Wish)} - {"provider"}
    if unknown := sorted(set(asked) - known):
        raise ConfigurationError(f"{', '.join(unknown)}: unknown; allowed: {', '.join(sorted(known))}")
    samples = asked.pop("samples", None)
    if callable(samples):
        return Wish(**asked, provider=samples)
    judge = asked.pop("judge", None)
    folder = None if judge is None else Path(judge)
    return Wish(**asked, judge=folder, samples=None if samples is None else Path(samples))


def _prompt(given: object) -> str | None:
    """A prompt in words; the number of a class may be one.

    Raises:
        ConfigurationError: it is neither.
    """
    if given is not None and (isinstance(given, bool) or not isinstance(given, str | int)):
        raise ConfigurationError(f"prompt is {given!r}; allowed: words, the number of a class, or None")
    return None if given is None else str(given)


def _more(config: DiffusionQuantConfig) -> str:
    """What brings a model that missed its bar closer; nothing falls back where a size is promised."""
    if config.has_target:
        return "ask for a larger size, or smaller groups"
    return "use more bits, smaller groups or fallback='layer'"

"""Pictures and sounds that two models make from one seed, in one pipeline, and how far apart they are.

The pipeline is the original's; inside `other` its denoiser has the other model's weights. Knows no text.
"""

from __future__ import annotations

import inspect
import io
import tempfile
import wave
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from arrow_quant_v2.calibration.pipelines import installed
from arrow_quant_v2.calibration.prompts import PROMPTS, quietly
from arrow_quant_v2.errors import ValidationError
from arrow_quant_v2.runtime.generate_pipeline import ending_of, generate_file, refuse_strangers
from arrow_quant_v2.sources.folder import PIPELINE
from arrow_quant_v2.validation.findings import Metric, SamplePair
from arrow_quant_v2.validation.metrics import decibels, log_mel_distance, psnr, ratio, sqnr, squares, ssim

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from contextlib import AbstractContextManager

    from arrow_quant_v2.calibration.runnable import Runnable
    from arrow_quant_v2.calibration.sample import Sample
    from arrow_quant_v2.runtime.spectrogram import Spectrogram

    Other = Callable[[], AbstractContextManager[None]]

HEIGHT, WIDTH = -2, -1
NO_LPIPS = "not measured: it needs the weights of a trained network, which do not come with this program"


def open_original_pipeline(root: Path, component: str, runnable: Runnable) -> Any:
    """The original's pipeline around the denoiser that is open already, everything in float32.

    Raises:
        SourceError: the folder names a class that is none of diffusers or transformers.
        ValidationError: diffusers cannot load the rest of it.
    """
    diffusers = installed("diffusers")
    refuse_strangers(diffusers, root / PIPELINE)
    try:
        with quietly():
            pipeline = diffusers.DiffusionPipeline.from_pretrained(
                root, local_files_only=True, trust_remote_code=False, **{component: runnable.module}
            )
            return pipeline.to(torch.float32)
    except (ValueError, OSError, TypeError, AttributeError, ImportError, KeyError) as error:
        raise ValidationError(
            f"{root}: diffusers {diffusers.__version__} cannot load the pipeline around its {component}"
            f" ({type(error).__name__}: {error})"
        ) from error


def media_pairs(
    pipeline: Any,
    runnable: Runnable,
    other: Other,
    *,
    count: int,
    seed: int,
    steps: int,
    spectrogram: Spectrogram | None = None,
) -> list[SamplePair]:
    """`count` pictures or sounds, each made by both models from one seed in `steps` steps.

    With `spectrogram` the pipeline's pictures are sounds.

    Raises:
        ConfigurationError: the pipeline needs more than a prompt or a class.
        QuantizationError: it fails.
        ValidationError: it gives neither pictures nor sounds that can be written.
    """
    told = _prompts(pipeline, runnable, count)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / f"made{ending_of(runnable.modality)}"

        def made(number: int) -> tuple[str, bytes]:
            asked: dict[str, Any] = {"seed": seed + number, "steps": steps, "spectrogram": spectrogram}
            kind = generate_file(pipeline, told[number], out, told=_untold, **asked).kind
            return kind, out.read_bytes()

        own = [made(number) for number in range(count)]
        with other():
            theirs = [made(number) for number in range(count)]
    return [
        SamplePair(
            kind="audio" if kind == "audio" else "image",
            title=_title(told[number], number),
            seed=seed + number,
            original=original,
            quantized=theirs[number][1],
        )
        for number, (kind, original) in enumerate(own)
    ]


def _prompts(pipeline: Any, runnable: Runnable, count: int) -> list[str | None]:
    """What the pipeline is told: texts, numbers of classes, or nothing."""
    takes = inspect.signature(type(pipeline).__call__).parameters
    if "prompt" in takes:
        known = PROMPTS[runnable.modality]
        return [known[number % len(known)] for number in range(count)]
    return [str(number) if "class_labels" in takes else None for number in range(count)]


def _title(told: str | None, number: int) -> str:
    """The words that were told, or the class."""
    if told is None:
        return f"sample {number + 1}"
    return f"class {told}" if told.isdecimal() else told


def _untold(_step: int, _steps: int, _text: str) -> None:
    pass


def pair_metrics(pairs: Sequence[SamplePair]) -> list[Metric]:
    """PSNR and SSIM of pictures; SNR and log-mel distance of sounds; means over the pairs."""
    pictures = [(_picture(p.original), _picture(p.quantized)) for p in pairs if p.kind == "image"]
    sounds = [(*_sound(p.original), _sound(p.quantized)[0]) for p in pairs if p.kind == "audio"]
    found: list[Metric] = []
    if pictures:
        found.append(_mean("PSNR", (psnr(a, b) for a, b in pictures), "dB"))
        found.append(_mean("SSIM", (ssim(a, b) for a, b in pictures), ""))
        found.append(Metric(name="LPIPS", value=None, better="lower", note=NO_LPIPS))
    if sounds:
        found.append(_mean("SNR", (sqnr(a, b) for a, _, b in sounds), "dB"))
        distances = [log_mel_distance(a, b, rate) for a, rate, b in sounds]
        found.append(Metric(name="log-mel distance", value=sum(distances) / len(distances), unit="dB", better="lower"))
    return found


def _mean(name: str, values: Iterable[float], unit: str) -> Metric:
    """Samples that are equal to the last bit have no finite figure; they are counted in the note."""
    every = list(values)
    finite = [value for value in every if np.isfinite(value)]
    equal = len(every) - len(finite)
    value = sum(finite) / len(finite) if finite else None
    return Metric(name=name, value=value, unit=unit, note=f"{equal} of {len(every)} are equal" if equal else "")


def _picture(content: str | bytes) -> torch.Tensor:
    """(channels, height, width) from 0 to 1."""
    from PIL import Image  # noqa: PLC0415 - diffusers brings it; nothing else here needs it

    with Image.open(io.BytesIO(_bytes(content))) as image:
        values = np.asarray(image.convert("RGB"), dtype=np.float64) / 255.0
    return torch.from_numpy(values).permute(2, 0, 1)


def _sound(content: str | bytes) -> tuple[torch.Tensor, int]:
    """(channels, samples) from -1 to 1, and samples a second."""
    with wave.open(io.BytesIO(_bytes(content))) as file:
        raw = np.frombuffer(file.readframes(file.getnframes()), dtype="<i2").astype(np.float64)
        return torch.from_numpy(raw.reshape(-1, file.getnchannels()).T / 32768.0), file.getframerate()


def _bytes(content: str | bytes) -> bytes:
    if isinstance(content, str):
        raise ValidationError("a text was given for a picture or a sound")
    return content


# Latents, where no whole pipeline is needed


def latent_metrics(own: Sequence[Sample], theirs: Sequence[Sample]) -> list[Metric]:
    """How far both trajectories are apart at their last step, each having gone its own way from the same noise."""
    pairs = [(_state(a), _state(b)) for a, b in zip(own, theirs, strict=True)]
    last = max(range(len(own)), key=lambda i: (abs(own[i].timestep - own[0].timestep), i))
    at = [pairs[i] for i in range(len(own)) if own[i].timestep == own[last].timestep]
    sums = [squares(a, b) for a, b in at]
    error = ratio(sum(d for d, _ in sums), sum(o for _, o in sums))
    note = f"|a - b|^2 / |a|^2 at the last step, {len(at)} trajectories"
    found = decibels(error)
    return [
        Metric(name="latent error", value=error, better="lower", note=note),
        Metric(name="latent SQNR", value=found if np.isfinite(found) else None, unit="dB", note=note),
    ]


def _state(sample: Sample) -> torch.Tensor:
    """The noisy state among the arguments: the first tensor of floating-point numbers with more than one axis."""
    for value in (*sample.arguments, *sample.keywords.values()):
        if isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
            return torch.stack(value)
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim > 1:
            return value
    raise ValidationError("a step of a trajectory holds no latents")

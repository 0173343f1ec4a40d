"""Pictures, videos and sounds from a pipeline of diffusers; knows what it makes, not what it is told.

Only classes of diffusers and transformers are built. Nothing is written before it is whole.
"""

from __future__ import annotations

import importlib
import warnings
import wave
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from arrow_quant_v2.calibration.pipelines import installed
from arrow_quant_v2.calibration.prompts import quietly
from arrow_quant_v2.errors import ConfigurationError, QuantizationError, SourceError
from arrow_quant_v2.runtime.generate_arguments import PipelineWish, arguments, is_of_video, pictures_per_second
from arrow_quant_v2.runtime.load import load_pipeline
from arrow_quant_v2.runtime.video import ENDINGS, as_pictures, write_video
from arrow_quant_v2.sources.files import read_json
from arrow_quant_v2.sources.folder import PIPELINE
from arrow_quant_v2.store.writer import explained

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray
    from typing_extensions import Self

    from arrow_quant_v2.runtime.spectrogram import Spectrogram

    Told = Callable[[int, int, str], object]

LIBRARIES = ("diffusers", "transformers")
RATES = (("vae", "sampling_rate"), ("vocoder", "sampling_rate"), ("unet", "sample_rate"), ("mel", "sample_rate"))
FPS = 16.0  # pictures of a video in a second, where nobody says it: Wan's
NOTHING = PipelineWish()
LOUDEST = 32767  # of 16 bits


@dataclass(frozen=True, kw_only=True)
class GeneratedFile:
    """What was written, and in how many steps of the denoiser."""

    path: Path
    kind: str
    steps: int


def open_whole_pipeline(folder: Path, device: str = "cpu") -> Any:
    """The pipeline with all its parts, the quantized one packed; in the dtype that `load_pipeline` takes.

    Raises:
        ConfigurationError: diffusers is not installed.
        SourceError: the folder names a class that is none of diffusers or transformers, or a part cannot be loaded.
    """
    refuse_strangers(_diffusers(), folder / PIPELINE)
    with quietly():
        return load_pipeline(folder, device)


def refuse_strangers(diffusers: Any, index: Path) -> None:
    """Refuse a pipeline of which a part is to be imported from anywhere else: an import runs code."""
    pipelines = importlib.import_module("diffusers.pipelines")
    entries = read_json(index)
    parts = {name: entry for name, entry in entries.items() if isinstance(entry, list) and entry and entry[0]}
    for name, entry in parts.items():
        if entry[0] not in LIBRARIES and not hasattr(pipelines, str(entry[0])):
            raise SourceError(f"{index}: {name} is {entry}; only classes of {' and '.join(LIBRARIES)} are run")
    if entries.get("_class_name") not in diffusers.__all__:
        raise SourceError(
            f"{index}: {entries.get('_class_name')!r} is no pipeline of diffusers {diffusers.__version__}; upgrade it"
        )


def ending_of(modality: str) -> str:
    """How the name of a result ends: ".png" or ".wav"."""
    return ".wav" if modality == "audio" else ".png"


def endings_of(folder: Path, modality: str) -> tuple[str, ...]:
    """How the name of what a pipeline makes may end, by default with the first.

    Raises:
        ConfigurationError: diffusers is not installed.
        SourceError: as for `open_whole_pipeline`.
    """
    diffusers = _diffusers()
    refuse_strangers(diffusers, folder / PIPELINE)
    video = is_of_video(getattr(diffusers, read_json(folder / PIPELINE)["_class_name"]))
    return tuple(ENDINGS) if video else (ending_of(modality),)


def _diffusers() -> Any:
    try:
        return installed("diffusers")
    except QuantizationError as error:
        raise ConfigurationError(str(error)) from error


def generate_file(
    pipeline: Any,
    prompt: str | None,
    out: Path,
    *,
    seed: int,
    steps: int | None,
    told: Told,
    spectrogram: Spectrogram | None = None,
    wish: PipelineWish = NOTHING,
) -> GeneratedFile:
    """Run the pipeline and write its first picture as PNG, its first video, or its first sound as WAV of 16 bits.

    A video becomes WebP, PNG or GIF, as the name of `out` ends. With `spectrogram` pictures are sounds, and become
    sounds.

    `told` is called with (step, steps, "") after each step of the denoiser.

    Raises:
        ConfigurationError: the pipeline takes no prompt, or needs one or something else; or `out` has a wrong ending.
        QuantizationError: it fails, or gives neither pictures, nor videos, nor sounds.
        StoreError: the disk refuses.
    """
    counted: list[int] = []
    given = arguments(pipeline, prompt, steps, seed, wish)
    pipeline.progress_bar = lambda *given, **named: _Steps(counted, told, *given, **named)
    try:
        output = pipeline(**given)
    except (TypeError, ValueError, AttributeError, KeyError, IndexError, RuntimeError) as error:
        raise QuantizationError(f"{type(pipeline).__name__}: fails: {_first_line(error)}") from error
    kind = _write(pipeline, output, out, spectrogram, wish)
    return GeneratedFile(path=out, kind=kind, steps=len(counted))


class _Steps:
    """Stands in for the progress bar that every pipeline makes around its steps, by iteration or by `update`."""

    def __init__(self, counted: list[int], told: Told, iterable: Any = None, total: int | None = None) -> None:
        self._counted, self._told, self._iterable = counted, told, iterable
        self._total = total if iterable is None else len(iterable)

    def __iter__(self) -> Iterator[Any]:
        for one in self._iterable:
            yield one
            self.update()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, count: int = 1) -> None:
        """Note `count` more steps."""
        self._counted.extend([1] * count)
        self._told(len(self._counted), max(self._total or 0, len(self._counted)), "")


# What it makes


def _write(pipeline: Any, output: Any, out: Path, spectrogram: Spectrogram | None, wish: PipelineWish) -> str:
    """Write the first result under a temporary name, then rename it; give what it is."""
    given = {name: getattr(output, name, None) for name in ("images", "frames", "audios")}
    found = [(name, results[0]) for name, results in given.items() if results is not None and len(results)]
    if not found:
        raise QuantizationError(
            f"{type(pipeline).__name__}: gives {', '.join(output) or 'nothing'}; only pictures, videos and sounds are"
            " written: call it from Python"
        )
    name, first = found[0]
    if name == "frames":
        return _write_frames(pipeline, output, first, out, wish)
    if name == "images" and spectrogram is None:
        _replace(out, lambda path: first.save(path, format="PNG"))
        return "image"
    samples = _samples(first if spectrogram is None else spectrogram.wave(_gray(first)))
    rate = _rate(pipeline) if spectrogram is None else spectrogram.rate
    _replace(out, lambda path: _write_wave(path, samples, rate))
    return "audio"


def _write_frames(pipeline: Any, output: Any, frames: Any, out: Path, wish: PipelineWish) -> str:
    name, fps = type(pipeline).__name__, pictures_per_second(pipeline, wish, FPS)
    if getattr(output, "audio", None) is not None:
        warnings.warn(f"{name}: its sound is not written, for {out.name} has none", stacklevel=4)
    try:
        pictures = as_pictures(frames)
    except (ValueError, TypeError) as error:
        raise QuantizationError(f"{name}: gives frames that are no pictures: {_first_line(error)}") from error
    _replace(out, lambda path: write_video(path, pictures, fps, out.suffix.lower()))
    return "video"


def _replace(out: Path, write: Callable[[Path], object]) -> None:
    temporary = out.with_name(out.name + ".tmp")
    try:
        with explained(out):
            write(temporary)
            temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)


def _gray(picture: Any) -> torch.Tensor:
    """(high, wide) from 0 to 1, of a picture of PIL."""
    return torch.from_numpy(np.asarray(picture.convert("L"), dtype=np.float32) / 255)


def _samples(sound: Any) -> NDArray[np.int16]:
    """Samples (n, channels) of 16 bits, from floats (n,) or (channels, n) within -1 and 1."""
    values = np.atleast_2d(np.asarray(sound.detach().float().cpu() if isinstance(sound, torch.Tensor) else sound))
    samples: NDArray[np.int16] = np.rint(np.clip(np.nan_to_num(values.T), -1.0, 1.0) * LOUDEST).astype("<i2")
    return samples


def _rate(pipeline: Any) -> int:
    for part, name in RATES:
        module = getattr(pipeline, part, None)
        found = getattr(getattr(module, "config", None), name, None) or getattr(module, name, None)
        if found:
            return int(found)
    raise QuantizationError(f"{type(pipeline).__name__}: none of its parts tells the samples per second")


def _write_wave(path: Path, samples: NDArray[np.int16], rate: int) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.ascontiguousarray(samples).tobytes())


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:300]

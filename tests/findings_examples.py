"""Findings made by hand, of any size and as hostile as a model's names can be; pictures and sounds made of numbers."""

from __future__ import annotations

import io
import math
import wave
from dataclasses import replace
from typing import Any

import numpy as np

from arrow_quant_v2.report.spectrogram import png
from arrow_quant_v2.validation.findings import Findings, LayerFinding, Metric, SamplePair, StepFinding

HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror='window.hacked=1'>\"'`|${window.hacked=1}"
GROUPS = ((0.0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0))
RATE = 8_000


def layer(number: int, **changes: Any) -> LayerFinding:
    """A calibrated layer that loses more the later it comes; every fourth fell back to 4 bits."""
    fallen = number % 4 == 3
    width = "int4" if fallen else "int2"
    because = f"{width}: g64 gptq as asked"
    return replace(
        LayerFinding(
            name=f"model.layers.{number}.mlp.weight",
            shape=(64, 128),
            quant_type=width,
            bits_per_weight=4.28 if fallen else 2.28,
            method="gptq",
            decision=f"fallback as int4 instead of int2: cosine 0.8 < 0.85, number {number}" if fallen else because,
            weight_cosine=0.99 - 0.001 * (number % 50),
            weight_mse=1e-5,
            output_cosine=0.98,
            output_error=(0.001 * (1 + number % 7), 0.002, 0.004, math.nan if number == 1 else 0.03),
        ),
        **changes,
    )


def norm(name: str) -> LayerFinding:
    """A layer that was kept as it is."""
    return LayerFinding(
        name=name,
        shape=(64,),
        quant_type="float32",
        bits_per_weight=32.0,
        method=None,
        decision="kept as float32 instead of int2: a bias, norm or other 1-D tensor",
    )


def findings(count: int = 12, **changes: Any) -> Findings:
    """A model of so many quantized layers and one norm, with its steps and everything else."""
    them = (*(layer(number) for number in range(count)), norm("model.norm.weight"))
    made = Findings(
        accuracy=0.9512,
        metric="output cosine",
        min_accuracy=0.9,
        passed=True,
        metrics=(
            Metric(name="output cosine", value=0.9512),
            Metric(name="NLL at 50 % masked", value=0.506, original=0.35, unit="nats", better="lower"),
            Metric(name="PSNR", value=None, unit="dB", note="no pictures were made"),
        ),
        layers=them,
        steps=tuple(
            StepFinding(timestep=t / 10, error=0.002 * 3**t, cosine=1 - 0.001 * t, samples=4) for t in range(5)
        ),
        samples=(text(),),
        time_groups=GROUPS,
        size_bytes=3_000_000,
        original_bytes=30_000_000,
        fallbacks_per_method={"gptq": sum("fallback" in one.decision for one in them)},
        notes=("made by hand",),
        facts={
            "model": "org/model",
            "command": "arrow-quant quantize MODEL OUT --bits 2",
            "settings.yaml": "a: 1\nb: 2\n",
        },
    )
    return replace(made, **changes)


def hostile() -> Findings:
    """Every text that a model or a person can choose, as a script."""
    made = findings()
    return replace(
        made,
        metric=HOSTILE,
        metrics=(Metric(name=HOSTILE, value=1.0, unit=HOSTILE, note=HOSTILE),),
        layers=(
            layer(0, name=HOSTILE, decision=HOSTILE, method=HOSTILE),
            layer(1, quant_type=HOSTILE, name=HOSTILE * 9),
        ),
        samples=(
            SamplePair(kind="text", title=HOSTILE, seed=0, original=HOSTILE, quantized=HOSTILE + " changed"),
            replace(picture(), title=HOSTILE),
            replace(sound(), title=HOSTILE),
        ),
        fallbacks_per_method={HOSTILE: 1},
        notes=(HOSTILE,),
        facts={HOSTILE: HOSTILE, "command": HOSTILE, "settings.yaml": HOSTILE + "\n\n", "modality": HOSTILE},
    )


def text() -> SamplePair:
    return SamplePair(
        kind="text", title="a chain", seed=3, original="E V Q L V E S G G G", quantized="E V Q L L E S G G A"
    )


def picture(size: int = 24) -> SamplePair:
    """A gradient, and the same with a coarser grid of values."""
    ramp = np.linspace(0, 255, size).astype(np.uint8)
    fine = np.stack(
        [np.tile(ramp, (size, 1)), np.tile(ramp[:, None], (1, size)), np.full((size, size), 90, np.uint8)], -1
    )
    return SamplePair(kind="image", title="a gradient", seed=1, original=png(fine), quantized=png(fine // 64 * 64))


def sound() -> SamplePair:
    return SamplePair(kind="audio", title="a tone", seed=2, original=tone(1_000.0), quantized=tone(1_000.0, noise=0.05))


def tone(hertz: float, *, noise: float = 0.0, seconds: float = 0.5, width: int = 2, channels: int = 1) -> bytes:
    """A WAV file of one tone."""
    times = np.arange(int(RATE * seconds)) / RATE
    wavy = 0.5 * np.sin(2 * np.pi * hertz * times) + noise * np.random.default_rng(0).standard_normal(times.size)
    return wav(np.repeat(wavy[:, None], channels, axis=1), width)


def wav(samples: np.ndarray[Any, Any], width: int = 2) -> bytes:
    """(n, channels) from -1 to 1 as PCM of `width` bytes."""
    whole = np.rint(np.clip(samples, -1, 1) * (2 ** (8 * width - 1) - 1)).astype("<i4")
    if width == 1:
        raw = (whole + 128).astype(np.uint8).tobytes()
    else:
        raw = whole.reshape(-1, 1).view(np.uint8)[:, :width].tobytes()
    held = io.BytesIO()
    with wave.open(held, "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(width)
        file.setframerate(RATE)
        file.writeframes(raw)
    return held.getvalue()

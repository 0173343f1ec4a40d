"""What was found out about a quantized model, as records; measures nothing and shows nothing.

Every figure says what it is: a weight's error is never called an output's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

Better = Literal["higher", "lower"]
WEIGHT_METRIC = "weight cosine, mean over quantized layers"
DEFAULT_BAR = 0.85


def finite(value: float | None) -> float | None:
    """The figure as JSON can write it: None where it is NaN or infinite."""
    return value if value is not None and math.isfinite(value) else None


def stated_bar(configuration: object) -> float:
    """The bar in the settings that a quantized model says it was made with, else 0.85."""
    bar = configuration.get("min_accuracy") if isinstance(configuration, dict) else None
    return float(bar) if isinstance(bar, int | float) else DEFAULT_BAR


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One figure of a whole model beside its original.

    name      "output cosine", "NLL at 50 % masked", "PSNR"
    value     the figure; None: it could not be measured, and `note` says why
    original  the same of the original, where it has one of its own, such as an NLL
    unit      "", "nats", "dB"
    better    whether a higher or a lower value is closer to the original
    """

    name: str
    value: float | None
    original: float | None = None
    unit: str = ""
    better: Better = "higher"
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class LayerFinding:
    """One layer: how it is stored, and how close its weight and its outputs are.

    weight_mse     mean of (w - q)^2, in the square of the weights' unit
    output_error   |W x - Q x|^2 / |W x|^2 over calibration inputs in each time group; None: its inputs were not seen,
                   NaN in a group that no sample hit
    output_cosine  between W x and Q x over all of them; None likewise
    """

    name: str
    shape: tuple[int, ...]
    quant_type: str
    bits_per_weight: float
    method: str | None
    decision: str
    weight_cosine: float | None = None
    weight_mse: float | None = None
    output_cosine: float | None = None
    output_error: tuple[float, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class StepFinding:
    """The whole model's outputs at one timestep of the denoising trajectory, both models given the same input.

    error  |original - quantized|^2 / |original|^2 over the samples of this timestep or time group
    """

    timestep: float
    error: float
    cosine: float
    samples: int


@dataclass(frozen=True, kw_only=True, eq=False)
class SamplePair:
    """The same thing made by both models from one seed.

    original, quantized  text as a string; a picture as PNG bytes; sound as WAV bytes
    """

    kind: Literal["text", "image", "audio"]
    title: str
    seed: int
    original: str | bytes
    quantized: str | bytes


@dataclass(frozen=True, kw_only=True, eq=False)
class Findings:
    """All that is known of one quantized model beside its original.

    accuracy    the cosine that `passed` is about, and `metric` says of what: outputs wherever the model can be run
    time_groups (start, end) of each, as layers' output errors are told
    facts       how to make it again: command, versions, hashes, hardware, calibration data
    """

    accuracy: float | None
    metric: str
    min_accuracy: float
    passed: bool
    metrics: tuple[Metric, ...]
    layers: tuple[LayerFinding, ...]
    steps: tuple[StepFinding, ...]
    samples: tuple[SamplePair, ...]
    time_groups: tuple[tuple[float, float], ...]
    size_bytes: int
    original_bytes: int
    fallbacks_per_method: Mapping[str, int]
    notes: tuple[str, ...]
    facts: Mapping[str, str]

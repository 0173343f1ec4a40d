"""Sounds as pictures of their power by pitch and time, and back; knows nothing of models.

What an audio model over mel frames makes is such a picture. Its phases are found by Griffin and Lim's iteration (1984).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from arrow_quant_v2.errors import SourceError
from arrow_quant_v2.sources.files import read_json

if TYPE_CHECKING:
    from pathlib import Path

FILE = "spectrogram.json"
ITERATIONS = 60
MOMENTUM = 0.9  # of the fast Griffin-Lim algorithm (Perraudin, 2013)
DARKEST = 1 / 255  # what is darker is nothing: the last step of a picture of 8 bits
PEAK = 0.9  # loudest sample of a sound that is made


@dataclass(frozen=True, kw_only=True)
class Spectrogram:
    """How a picture (bands, frames) with values from 0 to 1 stands for a sound.

    rate     samples a second
    bands    rows: the lowest pitch is the last; spaced evenly in mel from 0 to rate / 2
    window   samples that a column sees
    size     of the Fourier transform, window included
    hop      samples from one column to the next
    range    decibels from black to white, which is the power 1
    """

    rate: int
    bands: int
    window: int
    size: int
    hop: int
    range: float

    def json(self) -> dict[str, float]:
        """What the file spectrogram.json holds."""
        return asdict(self)

    @cached_property
    def filters(self) -> torch.Tensor:
        """(bands, size // 2 + 1): a triangle for each band, of area 1, the lowest first."""
        most = 2595 * math.log10(1 + self.rate / 2 / 700)
        edges = 700 * (10 ** (torch.linspace(0, most, self.bands + 2) / 2595) - 1)
        bins = torch.linspace(0, self.rate / 2, self.size // 2 + 1)
        low, peak, high = (edges[i : i + self.bands, None] for i in range(3))
        triangles = torch.minimum((bins - low) / (peak - low), (high - bins) / (high - peak)).clamp(min=0)
        return triangles / triangles.sum(dim=1, keepdim=True).clamp(min=1e-9)

    def pictures(self, waves: torch.Tensor) -> torch.Tensor:
        """(n, samples) from -1 to 1 -> (n, bands, samples // hop + 1) from 0 to 1."""
        power = self.filters @ self._transform(waves).abs().square()
        decibels = 10 * power.clamp(min=1e-10).log10()
        return (1 + decibels / self.range).clamp(0, 1).flip(-2)

    def wave(self, picture: torch.Tensor) -> torch.Tensor:
        """(bands, frames) from 0 to 1 -> (samples,), PEAK at its loudest; black is silence."""
        rows = picture.flip(-2)
        power = 10 ** ((rows - 1) * self.range / 10) * (rows > DARKEST)
        found = self._phases(self._spread(power).sqrt())
        return found * (PEAK / found.abs().max().clamp(min=1e-6))

    def _spread(self, power: torch.Tensor) -> torch.Tensor:
        """(size // 2 + 1, frames), never negative, of which the filters make this power: updates of Lee and Seung."""
        filters = self.filters
        found = filters.T @ power
        for _ in range(ITERATIONS):
            found = found * (filters.T @ power) / (filters.T @ (filters @ found)).clamp(min=1e-20)
        return found

    def _phases(self, magnitude: torch.Tensor) -> torch.Tensor:
        draw = torch.Generator().manual_seed(0)
        angles = torch.polar(torch.ones_like(magnitude), 2 * math.pi * torch.rand(magnitude.shape, generator=draw))
        before = torch.zeros_like(angles)
        for _ in range(ITERATIONS):
            rebuilt = self._transform(self._samples(magnitude * angles)[None])[0]
            angles = rebuilt - MOMENTUM / (1 + MOMENTUM) * before
            angles = angles / angles.abs().clamp(min=1e-9)
            before = rebuilt
        return self._samples(magnitude * angles)

    def _transform(self, waves: torch.Tensor) -> torch.Tensor:
        return torch.stft(waves, self.size, self.hop, self.window, self._shape, return_complex=True) / self._gain

    def _samples(self, spectrum: torch.Tensor) -> torch.Tensor:
        return torch.istft(spectrum * self._gain, self.size, self.hop, self.window, self._shape)

    @cached_property
    def _shape(self) -> torch.Tensor:
        return torch.hann_window(self.window)

    @cached_property
    def _gain(self) -> float:
        return float(self._shape.sum()) / 2  # a sine of amplitude 1 has the power 1


def spectrogram_of(folder: Path) -> Spectrogram | None:
    """What the folder's spectrogram.json says; None where there is none.

    Raises:
        SourceError: it is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    found = read_json(path)
    names = Spectrogram.__dataclass_fields__
    wrong = [name for name in names if not isinstance(found.get(name), int | float) or found[name] <= 0]
    if wrong:
        raise SourceError(f"{path}: {', '.join(wrong)} must be positive numbers; copy the file from the original model")
    return Spectrogram(range=float(found["range"]), **{name: int(found[name]) for name in names if name != "range"})

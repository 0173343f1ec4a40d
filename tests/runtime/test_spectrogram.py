"""A picture of a sound's power becomes a sound that looks the same; a file that says nonsense is refused."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

import pytest
import torch

from arrow_quant_v2.errors import SourceError
from arrow_quant_v2.runtime.spectrogram import FILE, PEAK, Spectrogram, spectrogram_of

if TYPE_CHECKING:
    from pathlib import Path

SHOWN = Spectrogram(rate=8000, bands=32, window=320, size=512, hop=128, range=60.0)


def tone(hertz: float, amplitude: float = 1.0) -> torch.Tensor:
    return amplitude * torch.sin(2 * math.pi * hertz / SHOWN.rate * torch.arange(4096))


def band_of(hertz: float) -> int:
    """The row, counted from the top, whose middle is nearest in mel."""
    mel = 2595 * math.log10(1 + hertz / 700)
    most = 2595 * math.log10(1 + SHOWN.rate / 2 / 700)
    return SHOWN.bands - round(mel / most * (SHOWN.bands + 1))


@pytest.mark.parametrize("hertz", [300, 1000, 2500])
def test_a_tone_is_a_bright_line_at_its_pitch(hertz: float) -> None:
    picture = SHOWN.pictures(tone(hertz)[None])[0]
    assert picture.shape == (32, 33)
    assert set(picture[:, 4:-4].argmax(dim=0).tolist()) <= {band_of(hertz) + i for i in (-1, 0, 1)}


def test_ten_decibels_less_are_a_sixth_of_the_range_less() -> None:
    loud, soft = (SHOWN.pictures(tone(1000, amplitude)[None])[0, :, 8:-8].max() for amplitude in (1.0, 10**-0.5))
    assert float(loud - soft) == pytest.approx(1 / 6, abs=1e-3)


def test_a_sound_made_of_a_picture_looks_like_it() -> None:
    glide = torch.sin(2 * math.pi * torch.cumsum(torch.linspace(400, 1600, 4096), 0) / SHOWN.rate)
    picture = SHOWN.pictures((glide * torch.hann_window(4096))[None])[0]
    wave = SHOWN.wave(picture)
    assert len(wave) == 32 * SHOWN.hop
    assert float(wave.abs().max()) == pytest.approx(PEAK)
    again = SHOWN.pictures(wave[None])[0]
    both = torch.stack([picture.flatten(), again.flatten()])
    assert float(torch.corrcoef(both)[0, 1]) > 0.97


def test_the_same_picture_is_always_the_same_sound() -> None:
    picture = SHOWN.pictures(tone(700)[None])[0]
    torch.manual_seed(1)
    first = SHOWN.wave(picture)
    torch.manual_seed(2)
    assert torch.equal(first, SHOWN.wave(picture))


def test_black_is_silence() -> None:
    assert not SHOWN.wave(torch.zeros(32, 32)).any()


def test_a_folder_says_how_its_pictures_sound(tmp_path: Path) -> None:
    assert spectrogram_of(tmp_path) is None
    (tmp_path / FILE).write_text(json.dumps(SHOWN.json()))
    assert spectrogram_of(tmp_path) == SHOWN


@pytest.mark.parametrize(("name", "value"), [("hop", 0), ("bands", "many"), ("range", None)])
def test_a_damaged_file_is_refused_by_the_entry_that_is_wrong(name: str, value: object, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(json.dumps(SHOWN.json() | {name: value}))
    with pytest.raises(SourceError, match=f"{FILE}: {name} must be"):
        spectrogram_of(tmp_path)

"""A sound as a picture."""

import io

import numpy as np
import pytest
from findings_examples import RATE, tone, wav
from PIL import Image

from arrow_quant_v2.errors import ValidationError
from arrow_quant_v2.report.spectrogram import WIDTH, WINDOW, png, spectrogram


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content))).astype(int)


@pytest.mark.parametrize("hertz", [500.0, 1_000.0, 3_000.0])
@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 2])
def test_a_tone_is_brightest_at_its_frequency(hertz: float, width: int, channels: int) -> None:
    picture = pixels(spectrogram(tone(hertz, width=width, channels=channels))).sum(axis=2)
    rows = WINDOW // 2 + 1
    assert picture.shape[0] == rows
    brightest = rows - 1 - int(picture.sum(axis=1).argmax())  # the lowest frequency is at the bottom
    assert abs(brightest * RATE / WINDOW - hertz) <= RATE / WINDOW


def test_silence_and_single_samples_are_pictures_too() -> None:
    for samples in (np.zeros((0, 1)), np.zeros((1, 1)), np.zeros((5_000, 1))):
        assert pixels(spectrogram(wav(samples))).shape[0] == WINDOW // 2 + 1


def test_a_long_sound_is_no_wider() -> None:
    assert pixels(spectrogram(tone(440.0, seconds=60.0))).shape[1] <= WIDTH


@pytest.mark.parametrize("content", [b"", b"RIFF", b"no sound at all, just text", tone(440.0)[:20]])
def test_what_is_no_sound_is_refused(content: bytes) -> None:
    with pytest.raises(ValidationError, match="no WAV file of plain samples"):
        spectrogram(content)


def test_a_png_holds_the_pixels_it_was_given() -> None:
    given = np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8)
    assert np.array_equal(pixels(png(given)), given)

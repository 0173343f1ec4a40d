"""A picture of a sound, made from the bytes of a WAV file; knows no models and writes no files.

S[f, t] = 20 log10 |sum_n w[n] x[n + t hop] exp(-2 pi i f n / N)|, in dB below the loudest, w the Hann window.
"""

from __future__ import annotations

import io
import struct
import wave
import zlib
from typing import TYPE_CHECKING

import numpy as np

from arrow_quant_v2.errors import ValidationError

if TYPE_CHECKING:
    from numpy.typing import NDArray

WINDOW = 512
WIDTH = 720  # columns at most; a longer sound is looked at in fewer places
RANGE = 80.0  # dB that are told apart
# Dark violet to pale yellow, of even lightness, so that it reads in grey and to those who see few colours.
COLOURS = (
    (0, 0, 4), (40, 11, 84), (101, 21, 110), (159, 42, 99),
    (212, 72, 66), (245, 125, 21), (250, 193, 39), (252, 255, 164),
)  # fmt: skip


def spectrogram(sound: bytes) -> bytes:
    """A PNG, time to the right and frequency upward, of the first channel of 8-, 16-, 24- or 32-bit PCM.

    Raises:
        ValidationError: the bytes are no WAV file of plain samples.
    """
    samples = _samples(sound)
    hop = max(WINDOW // 4, -(-len(samples) // WIDTH))
    starts = np.arange(0, max(1, len(samples) - WINDOW + 1), hop)
    padded = np.pad(samples, (0, WINDOW))
    frames = np.stack([padded[start : start + WINDOW] for start in starts]) * np.hanning(WINDOW)
    loudness = 20.0 * np.log10(np.abs(np.fft.rfft(frames, axis=1)).T[::-1] + 1e-9)  # (frequencies, times)
    share = np.clip((loudness - loudness.max()) / RANGE + 1.0, 0.0, 1.0)
    return png(_coloured(share))


def png(pixels: NDArray[np.uint8]) -> bytes:
    """A PNG file of (height, width, 3) bytes of red, green and blue."""
    height, width, _ = pixels.shape
    lines = np.pad(pixels.reshape(height, 3 * width), ((0, 0), (1, 0)))  # each begins with its filter: none
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes(), 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_part(kind, content) for kind, content in parts)


def _part(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _samples(sound: bytes) -> NDArray[np.float64]:
    """The first channel (n,), whole numbers as floats."""
    try:
        with wave.open(io.BytesIO(sound)) as file:
            channels, width = file.getnchannels(), file.getsampwidth()
            raw = np.frombuffer(file.readframes(file.getnframes()), np.uint8)
    except (wave.Error, EOFError) as error:
        raise ValidationError(f"a sound is no WAV file of plain samples: {error}; give PCM of 8 to 32 bits") from error
    raw = raw[: raw.size // (channels * width) * channels * width].reshape(-1, channels, width)[:, 0]
    wide = np.zeros((raw.shape[0], 4), np.uint8)
    wide[:, 4 - width :] = raw
    values = wide.view("<i4")[:, 0].astype(np.float64) / 2.0 ** (8 * (4 - width))
    if width == 1:  # a WAV file of 8 bits has no sign
        values = np.where(values < 0, values + 256.0, values) - 128.0
    return values if values.size else np.zeros(1)


def _coloured(share: NDArray[np.float64]) -> NDArray[np.uint8]:
    places = np.linspace(0.0, 1.0, len(COLOURS))
    channels = [np.interp(share, places, np.array(COLOURS, np.float64)[:, part]) for part in range(3)]
    found: NDArray[np.uint8] = np.rint(np.stack(channels, axis=-1)).astype(np.uint8)
    return found

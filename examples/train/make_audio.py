"""Trains examples/models/audio: spoken digits by class, as pictures of their power. Knows how the voice is made.

The speaker is espeak-ng, whose every digit comes in many tempos and pitches. spectrogram.json beside the model says how
a picture becomes a sound again.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import wave
from typing import TYPE_CHECKING

import numpy as np
import torch
from fetch import DATA, from_debian
from latent import Kind, Pictures, train

from arrow_quant_v2.runtime.spectrogram import FILE, Spectrogram

if TYPE_CHECKING:
    from pathlib import Path

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
RATE, LENGTH = 8000, 4096  # samples a second, and in a clip: half a second
SHOWN = Spectrogram(rate=RATE, bands=32, window=320, size=512, hop=128, range=60.0)
TEMPOS = range(176, 216, 2)  # words a minute
PITCHES = range(42, 59, 2)
QUIET = 0.01  # of the loudest sample: the digit has not begun
LEAD = 160  # samples of silence before it begins
DRIVE = 2.0  # loud samples are pressed together, so that the soft ones are seen
PACKAGES = ("espeak-ng", "libespeak-ng1", "espeak-ng-data", "libpcaudio0", "libsonic0")
KIND = Kind(
    name="audio",
    side=SHOWN.bands,
    layers=4,
    steps=1000,
    coder_steps=500,
    labels=NAMES,
    about={
        "data": "ten digits spoken by espeak-ng 1.51 (voice en-us) in 20 tempos and 9 pitches; every tenth is held out",
        "licence": "espeak-ng is under the GPL 3, what it says is not; the weights are under the Apache License 2.0",
    },
)


def spoken() -> torch.Tensor:
    """(10, tempos * pitches, samples): every clip; kept beside the packages, since speaking takes minutes."""
    kept = DATA / "spoken.npy"
    if not kept.exists():
        folder = from_debian(*PACKAGES)
        clips = [[_clip(folder, name, tempo, pitch) for tempo in TEMPOS for pitch in PITCHES] for name in NAMES]
        np.save(kept, np.array(clips, np.float32))
    return torch.from_numpy(np.load(kept))


def _clip(folder: Path, name: str, tempo: int, pitch: int) -> np.ndarray:
    """Half a second that begins with the digit, at 8 kHz."""
    library = next((folder / "usr" / "lib").glob("*/espeak-ng-data")).parent
    file = folder / "clip.wav"
    command = [folder / "usr/bin/espeak-ng", f"--path={library}", "-v", "en-us", "-s", tempo, "-p", pitch, "-w", file]
    environment = {**os.environ, "LD_LIBRARY_PATH": str(library)}
    done = subprocess.run([*map(str, command), name], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"espeak-ng failed ({done.returncode}): {done.stderr.strip()[:200]}")
    with wave.open(str(file)) as opened:
        rate, samples = opened.getframerate(), np.frombuffer(opened.readframes(opened.getnframes()), "<i2")
    return _cut(_slower(samples.astype(np.float64), rate))


def _slower(samples: np.ndarray, rate: int) -> np.ndarray:
    """The same sound with RATE samples a second: frequencies above RATE / 2 are left out."""
    count = round(len(samples) * RATE / rate)
    return np.fft.irfft(np.fft.rfft(samples)[: count // 2 + 1], count)


def _cut(samples: np.ndarray) -> np.ndarray:
    loud = np.abs(samples) > QUIET * np.abs(samples).max()
    begin = max(0, int(loud.argmax()) - LEAD)
    clip = np.zeros(LENGTH)
    part = samples[begin : begin + LENGTH]
    clip[: len(part)] = part / np.abs(samples).max()
    return np.tanh(DRIVE * clip) / math.tanh(DRIVE)


def pictures() -> Pictures:
    """Every clip as a picture, digit by digit."""
    clips = spoken()
    found = SHOWN.pictures(clips.flatten(0, 1))[..., : KIND.side]
    classes = torch.arange(len(clips))[:, None].expand(clips.shape[:2]).flatten()
    return Pictures(pictures=found[:, None] * 2 - 1, classes=classes)


def main() -> None:
    ask = train(KIND, pictures())
    (ask.out / FILE).write_text(json.dumps(SHOWN.json(), indent=2) + "\n")
    (ask.out / "metadata.json").write_text(json.dumps({"modality": "audio"}) + "\n")


if __name__ == "__main__":
    main()

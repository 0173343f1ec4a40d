"""Says which digit a picture shows or a voice says: whether what a model makes can be recognised. Knows digits alone.

Pictures are judged by a small network, which is sure of something even where there is nothing: it is to be asked for a
digit that it was not told. Voices are compared with the mean of each digit's clips, and that likeness is a number.
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import nn

if TYPE_CHECKING:
    from pathlib import Path

BANDS, WINDOW, HOP, RATE = 24, 256, 128, 8000
FLOOR = 1e-3  # power below which nothing is heard


def picture_judge() -> nn.Sequential:
    """A network of 9,178 weights for pictures (n, 1, 28, 28) from -1 to 1; gives (n, 10)."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 7 * 7, 10),
    )


def heard(waves: torch.Tensor) -> torch.Tensor:
    """Log power (n, bands, frames) of waves (n, samples) at 8 kHz, in bands as the ear has them, for equal loudness."""
    louder = waves / waves.std(dim=-1, keepdim=True).clamp(min=1e-4)
    spectrum = torch.stft(louder, WINDOW, HOP, window=torch.hann_window(WINDOW), return_complex=True).abs().square()
    return (_bands() @ spectrum / WINDOW).clamp(min=FLOOR).log()


@cache
def _bands() -> torch.Tensor:
    """(bands, WINDOW // 2 + 1): triangles, evenly spaced in mel."""
    most = 2595 * math.log10(1 + RATE / 2 / 700)
    edges = 700 * (10 ** (torch.linspace(0, most, BANDS + 2) / 2595) - 1)
    bins = torch.linspace(0, RATE / 2, WINDOW // 2 + 1)
    low, peak, high = (edges[i : i + BANDS, None] for i in range(3))
    return torch.minimum((bins - low) / (peak - low), (high - bins) / (high - peak)).clamp(min=0)


def pictures_say(pictures: torch.Tensor, path: Path) -> torch.Tensor:
    """The digit of each picture (n,); `path` holds the judge's weights."""
    judge = picture_judge().eval()
    judge.load_state_dict({name: weight.float() for name, weight in load_file(path).items()})
    with torch.no_grad():
        return judge(pictures).argmax(dim=1)


def likeness(waves: torch.Tensor, path: Path) -> torch.Tensor:
    """How much each wave sounds like each digit, (n, 10): correlations, from -1 to 1; `path` holds the mean of each."""
    return _even(heard(waves)) @ _even(load_file(path)["means"].float()).T


def _even(frames: torch.Tensor) -> torch.Tensor:
    """Rows (n, bands * frames) of mean 0 and length 1."""
    flat = frames.flatten(1)
    flat = flat - flat.mean(dim=1, keepdim=True)
    return flat / flat.norm(dim=1, keepdim=True)


def keep(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write tensors as float16."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.to(torch.float16).contiguous() for name, tensor in tensors.items()}, path)

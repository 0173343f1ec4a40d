"""Pictures in a row as one animated picture: WebP, PNG (APNG) or GIF. Knows no models.

They need nothing but Pillow, which diffusers brings; every browser plays them, and ffmpeg makes films of PNG and GIF.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

ENDINGS = {".webp": "WEBP", ".png": "PNG", ".gif": "GIF"}
TICK = {".gif": 10}  # milliseconds by which a format counts, where it is not one
HOW: dict[str, dict[str, Any]] = {".webp": {"quality": 90, "method": 4}, ".png": {}, ".gif": {"disposal": 2}}
COLOURS = {1: "L", 3: "RGB", 4: "RGBA"}


def as_pictures(frames: Iterable[Any]) -> list[Any]:
    """Pictures of PIL, from such, from arrays (height, width, colours) or tensors (colours, height, width) of 0 to 1.

    Raises:
        ValueError: there is none, or one has another shape.
    """
    found = [_picture(frame) for frame in frames]
    if not found:
        raise ValueError("there is none")
    return found


def write_video(path: Path, pictures: Sequence[Any], fps: float, ending: str) -> None:
    """Write pictures of PIL to `path` as a video that begins again at its end, whatever the path is called.

    WebP is lossy, PNG is not, GIF has 256 colours.

    Raises:
        OSError: the disk refuses.
    """
    first, *others = pictures
    shown = durations(len(pictures), fps, TICK.get(ending, 1))
    first.save(path, format=ENDINGS[ending], save_all=True, append_images=others, duration=shown, loop=0, **HOW[ending])


def durations(count: int, fps: float, tick: int = 1) -> list[int]:
    """Milliseconds, in whole ticks, for which each picture is shown; together they take as long as they should."""
    edges = [round(number * 1000 / fps / tick) * tick for number in range(count + 1)]
    return [max(later - earlier, tick) for earlier, later in pairwise(edges)]


def _picture(given: Any) -> Any:
    if hasattr(given, "save"):
        return given
    from PIL import Image  # noqa: PLC0415 - where there are pipelines, there is Pillow

    values = given.detach().float().cpu().movedim(0, -1).numpy() if isinstance(given, torch.Tensor) else given
    bytes_ = np.rint(np.clip(np.nan_to_num(np.asarray(values, dtype=np.float32)), 0, 1) * 255).astype(np.uint8)
    shape: Sequence[int] = bytes_.shape
    if len(shape) != len(("height", "width", "colours")) or shape[-1] not in COLOURS:
        raise ValueError(f"a picture is {tuple(shape)}; needed: (height, width, 1, 3 or 4 colours)")
    return Image.fromarray(bytes_[..., 0] if shape[-1] == 1 else bytes_)

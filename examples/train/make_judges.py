"""Makes tests/judges: what tells digits, trained on real ones, and the words and held-out verses that tests read."""

from __future__ import annotations

import re
import sys
from collections import Counter
from typing import TYPE_CHECKING

import make_audio
import make_image
import make_text
import torch
from fetch import ROOT
from judges import heard, keep, likeness, picture_judge, pictures_say
from loop import Course, learn
from torch.nn import functional

if TYPE_CHECKING:
    from torch import nn

OUT = ROOT / "tests" / "judges"
STEPS = 1200
WORDS = 2500
HELD_OUT = ("And I saw a new heaven and a new earth", "For without are dogs")  # from here to there


def _noisy(shown: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """A little noise in a place a little off, so that no judge clings to single points."""
    shifts = [int(torch.randint(-2, 3, (1,), generator=draw)) for _ in range(2)]
    return shown.roll(shifts, (2, 3)) + 0.2 * torch.randn(shown.shape, generator=draw)


def pictures() -> None:
    digits, path = make_image.digits(), OUT / "pictures.safetensors"
    shown, held = digits.part(held_out=False), digits.part(held_out=True)

    def loss_of(model: nn.Module, _: int, draw: torch.Generator) -> torch.Tensor:
        chosen = torch.randint(len(shown.classes), (64,), generator=draw)
        return functional.cross_entropy(model(_noisy(shown.pictures[chosen], draw)), shown.classes[chosen])

    torch.manual_seed(0)
    keep(learn(picture_judge(), Course(steps=STEPS, rate=3e-3), loss_of).model.state_dict(), path)
    right = (pictures_say(held.pictures, path) == held.classes).float().mean()
    sys.stderr.write(f"pictures: {float(right):.4f} of held-out digits are recognised\n")


def voices() -> None:
    clips, path = make_audio.spoken(), OUT / "voices.safetensors"
    keep({"means": torch.stack([heard(digit).mean(dim=0) for digit in clips])}, path)
    alike = likeness(clips.flatten(0, 1), path)
    classes = torch.arange(10)[:, None].expand(clips.shape[:2]).flatten()
    own = alike.gather(1, classes[:, None])[:, 0]
    others = alike.scatter(1, classes[:, None], -1).amax(dim=1)
    right = (alike.argmax(dim=1) == classes).float().mean()
    noise = likeness(torch.randn(100, clips.shape[-1]), path).max()
    sys.stderr.write(
        f"voices: {float(right):.4f} of the clips are recognised; likeness to the own digit {float(own.min()):.3f} to"
        f" {float(own.max()):.3f}, to another {float(others.max()):.3f} at most, of noise {float(noise):.3f}\n"
    )


def words() -> None:
    text = make_text.bible()
    counted = Counter(re.findall(r"[a-z]+", text.lower()))
    common = sorted(word for word, _ in counted.most_common(WORDS))
    (OUT / "words.txt").write_text("\n".join(common) + "\n")
    first, last = (text.index(verse) for verse in HELD_OUT)
    (OUT / "held_out.txt").write_text(text[first:last])


if __name__ == "__main__":
    torch.set_num_threads(1)
    pictures()
    voices()
    words()

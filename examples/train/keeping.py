"""What a training script is asked for, and the card that lies beside the model it made; knows no model."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from loop import Learnt

MODELS = Path(__file__).parents[1] / "models"
CARD = "README.md"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the command line said."""

    name: str
    steps: int
    seed: int
    out: Path


def asked(name: str, steps: int) -> Asked:
    """Parse --steps, --seed, --out and --threads."""
    parser = argparse.ArgumentParser(description=f"Trains examples/models/{name}")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=MODELS / name)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    given.out.mkdir(parents=True, exist_ok=True)
    return Asked(name=name, steps=given.steps, seed=given.seed, out=given.out)


def write_card(ask: Asked, learnt: Learnt, lines: Mapping[str, str], weights: int) -> None:
    """README.md: data, licence, loss, weights, steps, seconds. Samples are put below by samples.py."""
    facts = {
        "weights": f"{weights:,} in float16",
        "trained": f"{ask.steps:,} steps, seed {ask.seed}, {learnt.seconds:,.0f} processor seconds in all threads",
    }
    rows = [f"- {name}: {value}" for name, value in (dict(lines) | facts).items()]
    made = f"Made by `python examples/train/make_{ask.name}.py`."
    (ask.out / CARD).write_text("\n".join([f"# {ask.name}", "", made, "", *rows, ""]), encoding="utf-8")


def weights_of(*models: torch.nn.Module) -> int:
    """How many numbers the models have learnt, or hold."""
    return sum(parameter.numel() for model in models for parameter in model.parameters())

"""Every random choice of calibration, from one seed; torch's global generator is never touched. Knows no models."""

from __future__ import annotations

import hashlib

import torch

VALIDATION, JUDGING, CHOOSING = 1, 2, 3  # who is shown samples that no layer was fitted to; never the same ones
APART = 1_000_003  # further than anybody's own seeds are, with which stats are made and merged
SEEDS = 2**63


def held_out(seed: int, purpose: int) -> int:
    """The seed of samples that are none of those that layers were fitted to with this seed.

    Choosing takes one of several plans and judging chooses layers by what they see, so validation sees something else.
    """
    return (seed + APART * purpose) % SEEDS


def generator(seed: int, *purpose: object) -> torch.Generator:
    """A generator of its own for every purpose, so that one part's choices never move another's."""
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def whole(low: int, high: int, chance: torch.Generator) -> int:
    """A whole number from `low` to `high`, both included."""
    return int(torch.randint(low, high + 1, (), generator=chance))


def stratified(count: int, chance: torch.Generator) -> list[float]:
    """One time in each ((i, i + 1] / count), ascending, in antithetic pairs: times i and count - 1 - i add up to 1.

    Strata as in MDLM's sampler (arXiv 2406.07524), pairs instead of its one shared offset: the mean is 1/2 for every
    seed, and no two neighbours are equally far apart.
    """
    offsets = 1.0 - torch.rand(-(-count // 2), generator=chance, dtype=torch.float64)  # (0, 1]
    below = [(i + u) / count for i, u in enumerate(offsets.tolist()[: count // 2])]
    middle = [0.5] if count % 2 else []
    return [*below, *middle, *(1.0 - time for time in reversed(below))]


def shuffled(count: int, chance: torch.Generator) -> list[int]:
    """0 to count - 1 in random order."""
    order: list[int] = torch.randperm(count, generator=chance).tolist()
    return order


def one_of_every(size: int, count: int, chance: torch.Generator) -> list[bool]:
    """For each of `count` things in a row whether it is chosen: one, at random, of every `size` neighbours."""
    chosen = {start + whole(0, size - 1, chance) for start in range(0, count, size)}
    return [index in chosen for index in range(count)]

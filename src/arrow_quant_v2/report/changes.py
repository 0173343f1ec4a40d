"""Two texts side by side, token by token: which tokens changed. Knows neither models nor markup."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import groupby

LONGEST = 4_000  # tokens that are aligned: the work grows with their square


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A run of text, and whether the other text has something else there."""

    text: str
    changed: bool


@dataclass(frozen=True, kw_only=True)
class Changes:
    """Both texts in pieces; `equal` of the `total` tokens of the longer one are the same in both."""

    original: tuple[Piece, ...]
    quantized: tuple[Piece, ...]
    equal: int
    total: int


def changes(original: str, quantized: str) -> Changes:
    """Compare two texts by their words and marks.

    Texts of equally many tokens, as masked models write them at one seed, are compared place by place; others, and so
    a text into which one word came, are aligned first.
    """
    ours, theirs = _tokens(original), _tokens(quantized)
    same = _same_places(ours, theirs) if len(ours) == len(theirs) else _aligned(ours, theirs)
    left, right = {i for i, _ in same}, {j for _, j in same}
    return Changes(
        original=_pieces(ours, left),
        quantized=_pieces(theirs, right),
        equal=len(same),
        total=max(len(ours), len(theirs)),
    )


def _tokens(text: str) -> list[str]:
    """Words and single marks, each with the space behind it, so that they add up to the text."""
    return re.findall(r"(?:\w+|[^\w\s]|^\s+)\s*", text)


def _same_places(ours: list[str], theirs: list[str]) -> list[tuple[int, int]]:
    return [(i, i) for i, (one, other) in enumerate(zip(ours, theirs, strict=True)) if one.strip() == other.strip()]


def _aligned(ours: list[str], theirs: list[str]) -> list[tuple[int, int]]:
    one, other = ([token.strip() for token in tokens[:LONGEST]] for tokens in (ours, theirs))
    blocks = SequenceMatcher(None, one, other, autojunk=False).get_matching_blocks()
    return [(block.a + k, block.b + k) for block in blocks for k in range(block.size)]


def _pieces(tokens: list[str], same: set[int]) -> tuple[Piece, ...]:
    """Neighbours that share a fate are one piece."""
    runs = groupby(range(len(tokens)), key=lambda place: place not in same)
    return tuple(Piece(text="".join(tokens[i] for i in places), changed=changed) for changed, places in runs)

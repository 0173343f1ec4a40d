"""Sequences of tokens as the states of a masked diffusion model; knows not where they come from.

A state is a sequence of which some tokens are hidden behind the mask token; its time is the masked fraction of the
whole sequence, as LLaDA trains (arXiv 2502.09992). Times are given, and met exactly but for rounding up to a token.
Three states in four hide tokens anywhere behind a visible prefix (a prompt, 0 to 50%: Quant-dLLM, arXiv 2510.03274,
shows a quarter); one is met in semi-autoregressive decoding (LLaDA): blocks on the left are clean, the current one is
partly hidden, those on the right are hidden.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from arrow_quant_v2.calibration import chance
from arrow_quant_v2.calibration.tokens import shown

if TYPE_CHECKING:
    from collections.abc import Sequence

    from arrow_quant_v2.calibration.sample import Sample

LARGEST_PREFIX = 2  # as a divisor: half of what could be hidden
BLOCKWISE = 4  # one in four
BLOCKS = (2, 8)  # blocks in a sequence, fewest and most


def hidden_count(time: float, length: int, maskable: int) -> int:
    """How many of `length` tokens are hidden at this time, of which `maskable` are no special tokens."""
    return min(maskable, max(1, math.ceil(time * length)))


def masked_states(
    sequences: Sequence[torch.Tensor],
    times: Sequence[float],
    *,
    mask: int,
    special: frozenset[int],
    draw: torch.Generator,
) -> list[torch.Tensor]:
    """State i of ids (length,) is sequence i at time i; special tokens are never hidden.

    Times that are neighbours in size share the kinds of states evenly, whatever their order.
    """
    by_size = sorted(range(len(times)), key=times.__getitem__)
    kinds = dict(zip(by_size, chance.one_of_every(BLOCKWISE, len(times), draw), strict=True))
    pairs = enumerate(zip(sequences, times, strict=True))
    return [_masked(ids, time, mask, special, draw, blockwise=kinds[i]) for i, (ids, time) in pairs]


def masked_calls(
    module: torch.nn.Module,
    sequences: Sequence[torch.Tensor],
    count: int,
    *,
    mask: int,
    special: frozenset[int],
    seed: int,
) -> tuple[Sample, ...]:
    """`count` calls with states of the sequences, times stratified over (0, 1]; sequences are used again in turn."""
    draw = chance.generator(seed, "masked text")
    times = chance.stratified(count, draw)
    mixed = [times[i] for i in chance.shuffled(count, draw)]
    repeated = [sequences[i % len(sequences)] for i in range(count)]
    states = masked_states(repeated, mixed, mask=mask, special=special, draw=draw)
    return tuple(shown(module, state, masked_fraction(state, mask)) for state in states)


def masked_fraction(ids: torch.Tensor, mask: int) -> float:
    """The share of mask tokens in a sequence."""
    return int((ids == mask).sum()) / ids.numel()


def maskable(ids: torch.Tensor, special: frozenset[int]) -> torch.Tensor:
    """Positions (n,) of the tokens that are not special, ascending."""
    return torch.isin(ids, torch.tensor(sorted(special), dtype=ids.dtype), invert=True).nonzero()[:, 0]


def _masked(
    ids: torch.Tensor, time: float, mask: int, special: frozenset[int], draw: torch.Generator, *, blockwise: bool
) -> torch.Tensor:
    free = maskable(ids, special)
    count = hidden_count(time, len(ids), len(free))
    hidden = in_blocks(free, count, draw) if blockwise else behind_prefix(free, count, draw)
    state = ids.clone()
    state[hidden] = mask
    return state


def behind_prefix(free: torch.Tensor, count: int, draw: torch.Generator) -> torch.Tensor:
    """`count` positions of `free`, anywhere behind a visible prefix: 0 to 50%, or as long as there is room for."""
    prefix = chance.whole(0, min(len(free) // LARGEST_PREFIX, len(free) - count), draw)
    rest = free[prefix:]
    return rest[torch.randperm(len(rest), generator=draw)[:count]]


def in_blocks(free: torch.Tensor, count: int, draw: torch.Generator) -> torch.Tensor:
    """`count` positions of `free`, hidden from the right in whole blocks, the rest anywhere in the next block."""
    size = -(-len(free) // chance.whole(*BLOCKS, draw))
    whole_blocks = (count - 1) // size * size
    end = len(free) - whole_blocks
    current = free[max(0, end - size) : end]
    partly = current[torch.randperm(len(current), generator=draw)[: count - whole_blocks]]
    return torch.cat([partly, free[end:]])

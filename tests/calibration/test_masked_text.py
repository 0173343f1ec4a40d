"""States of masked text: how much is hidden, where, and what never is."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from arrow_quant_v2.calibration import chance
from arrow_quant_v2.calibration.masked_text import (
    behind_prefix,
    hidden_count,
    in_blocks,
    maskable,
    masked_fraction,
    masked_states,
)

MASK, SPECIAL = 4, frozenset({0, 2, 3, 4})
seeds = st.integers(0, 2**31)
counts = st.integers(1, 200)
times = st.floats(0, 1, exclude_min=True)


@st.composite
def sequences(draw: st.DrawFn) -> torch.Tensor:
    """Ordinary tokens with special ones around them and, rarely, among them."""
    inner = draw(st.lists(st.sampled_from([5, 6, 7, 8, 9, 3]), min_size=0, max_size=60))
    return torch.tensor([2, 5, *inner, 3])


def choice(seed: int) -> torch.Generator:
    return chance.generator(seed, "test")


@given(count=counts, seed=seeds)
def test_every_stratum_of_time_is_met_once(count: int, seed: int) -> None:
    found = chance.stratified(count, choice(seed))
    assert [max(0, -(-time * count // 1) - 1) for time in found] == list(range(count))
    assert all(0 < time <= 1 for time in found)


@given(count=counts, seed=seeds)
def test_times_come_in_pairs_that_add_up_to_one(count: int, seed: int) -> None:
    found = chance.stratified(count, choice(seed))
    assert all(abs(a + b - 1) < 1e-12 for a, b in zip(found, reversed(found), strict=True))


@given(count=counts, size=st.integers(1, 7), seed=seeds)
def test_one_of_every_few_neighbours_is_chosen(count: int, size: int, seed: int) -> None:
    chosen = chance.one_of_every(size, count, choice(seed))
    groups = [chosen[start : start + size] for start in range(0, count, size)]
    assert all(sum(group) == 1 for group in groups if len(group) == size)
    assert len(chosen) == count


@given(ids=sequences(), time=times, seed=seeds, blockwise=st.booleans())
def test_as_much_is_hidden_as_the_time_says(ids: torch.Tensor, time: float, seed: int, blockwise: bool) -> None:
    free = maskable(ids, SPECIAL)
    count = hidden_count(time, len(ids), len(free))
    hidden = (in_blocks if blockwise else behind_prefix)(free, count, choice(seed))
    assert len(set(hidden.tolist())) == count
    assert set(hidden.tolist()) <= set(free.tolist())
    assert count == len(free) or 0 <= count / len(ids) - time < 1 / len(ids) + 1e-9


@given(ids=sequences(), count=counts, seed=seeds)
def test_states_are_the_sequence_with_ordinary_tokens_hidden(ids: torch.Tensor, count: int, seed: int) -> None:
    draw = choice(seed)
    states = masked_states([ids] * count, chance.stratified(count, draw), mask=MASK, special=SPECIAL, draw=draw)
    for state in states:
        changed = state != ids
        assert set(state[changed].tolist()) == {MASK}
        assert not set(ids[changed].tolist()) & SPECIAL
        assert masked_fraction(state, MASK) == int(changed.sum()) / len(ids)
    fractions = [masked_fraction(state, MASK) for state in states]
    assert fractions == sorted(fractions)


@given(ids=sequences(), time=times, seed=seeds)
def test_the_visible_prefix_is_at_most_half(ids: torch.Tensor, time: float, seed: int) -> None:
    free = maskable(ids, SPECIAL)
    everything_behind = behind_prefix(free, len(free) - len(free) // 2, choice(seed))
    assert min(everything_behind.tolist()) <= free[len(free) // 2]


def test_prefixes_of_every_length_up_to_half_are_shown() -> None:
    free = torch.arange(100)
    firsts = [int(behind_prefix(free, 30, choice(seed)).min()) for seed in range(300)]
    assert min(firsts) < 5
    assert 45 <= max(firsts) < 70
    assert 15 < sum(firsts) / len(firsts) < 35


@given(count=st.integers(1, 97), seed=seeds)
def test_blocks_are_hidden_from_the_right(count: int, seed: int) -> None:
    hidden = in_blocks(torch.arange(97), count, choice(seed))
    shown = sorted({*range(97)} - {*hidden.tolist()})
    largest = -(-97 // 2)
    frontier = max(shown, default=0)
    assert {*range(frontier + 1, 97)} <= {*hidden.tolist()}
    assert frontier - min(hidden.tolist()) < largest  # what is partly hidden is one block


def test_a_quarter_of_the_states_is_blockwise_at_every_time() -> None:
    draw = choice(0)
    ids = torch.full((200,), 7)
    found = chance.stratified(400, draw)
    states = masked_states([ids] * 400, found, mask=MASK, special=SPECIAL, draw=draw)
    middle = [state for state, time in zip(states, found, strict=True) if 0.55 < time < 0.65]
    ends = sum(bool((state[-20:] == MASK).all()) for state in middle)
    assert len(middle) == 40
    assert 10 <= ends <= 13  # behind a long prefix almost everything is hidden too


@given(ids=sequences(), seed=seeds)
def test_the_same_seed_hides_the_same(ids: torch.Tensor, seed: int) -> None:
    def states(number: int) -> list[torch.Tensor]:
        draw = choice(number)
        return masked_states([ids] * 9, chance.stratified(9, draw), mask=MASK, special=SPECIAL, draw=draw)

    assert all(torch.equal(a, b) for a, b in zip(states(seed), states(seed), strict=True))


def test_another_seed_hides_others() -> None:
    ids = torch.full((50,), 7)
    first, second = (masked_states([ids], [0.5], mask=MASK, special=SPECIAL, draw=choice(seed))[0] for seed in (1, 2))
    assert not torch.equal(first, second)


def test_order_of_times_does_not_matter_to_how_much_is_hidden() -> None:
    ids = torch.full((10,), 7)
    states = masked_states([ids] * 3, [0.9, 0.1, 0.5], mask=MASK, special=SPECIAL, draw=choice(0))
    assert [masked_fraction(state, MASK) for state in states] == [0.9, 0.1, 0.5]

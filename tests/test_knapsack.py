"""The knapsack: exact on whatever can be tried by hand, never over the budget, and quick on what is large."""

from __future__ import annotations

import itertools
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arrow_quant_v2.knapsack import Choice, cheapest

choices = st.builds(Choice, size=st.integers(0, 40), loss=st.floats(0.0, 10.0).map(lambda x: round(x, 2)))
tables = st.lists(st.lists(choices, min_size=1, max_size=4), min_size=1, max_size=5)


def size(table: list[list[Choice]], chosen: tuple[int, ...]) -> int:
    return sum(item[number].size for item, number in zip(table, chosen, strict=True))


def loss(table: list[list[Choice]], chosen: tuple[int, ...]) -> float:
    return sum(item[number].loss for item, number in zip(table, chosen, strict=True))


@settings(max_examples=400, deadline=None)
@given(table=tables, budget=st.integers(0, 160))
def test_it_finds_what_trying_everything_finds(table: list[list[Choice]], budget: int) -> None:
    every = itertools.product(*(range(len(item)) for item in table))
    fitting = [loss(table, chosen) for chosen in every if size(table, chosen) <= budget]
    found = cheapest(table, budget)
    assert (found is None) == (not fitting)
    if found is not None:
        assert size(table, found) <= budget
        assert loss(table, found) == pytest.approx(min(fitting), rel=1e-9, abs=1e-9)


def widths(count: int, seed: int) -> list[list[Choice]]:
    """Layers as models have them: sizes that differ by a little, losses that fall by about 16 times at each width."""
    draw = random.Random(seed)
    table = []
    for _ in range(count):
        weights, scale = draw.randrange(10_000, 9_000_000), 10 ** draw.uniform(-5, 0)
        sizes = [weights * bits // 8 + draw.randrange(weights // 50) for bits in (2, 4, 8, 16)]
        losses = [scale, scale * draw.uniform(0.02, 0.1), scale * draw.uniform(1e-4, 4e-4), 0.0]
        table.append([Choice(size=s, loss=x) for s, x in zip(sizes, losses, strict=True)])
    return table


@pytest.mark.parametrize("share", [0.01, 0.2, 0.6, 0.99])
def test_hundreds_of_layers_of_all_sizes_take_seconds_and_fill_the_budget(share: float) -> None:
    table = widths(300, seed=round(100 * share))
    least, most = (sum(item[n].size for item in table) for n in (0, 3))
    budget = round(least + share * (most - least))
    started = time.perf_counter()
    found = cheapest(table, budget)
    assert time.perf_counter() - started < 20.0
    assert found is not None
    assert budget * 0.998 <= size(table, found) <= budget


def test_more_room_never_loses_more() -> None:
    table = widths(40, seed=1)
    least, most = (sum(item[n].size for item in table) for n in (0, 3))
    losses = [loss(table, cheapest(table, budget) or ()) for budget in range(least, most, (most - least) // 30)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] / 100


def test_what_cannot_fit_is_said() -> None:
    table = widths(3, seed=0)
    least = sum(item[0].size for item in table)
    assert cheapest(table, least) == (0, 0, 0)
    assert cheapest(table, least - 1) is None

"""Time groups split what was seen of a trajectory into ranges."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arrow_quant_v2.errors import ConfigurationError
from arrow_quant_v2.time_groups import TimeGroups, balanced_groups, uniform_groups

timesteps = st.lists(st.floats(0.0, 1000.0), min_size=1, max_size=50)
counts = st.integers(1, 12)


@given(timesteps, counts)
def test_every_timestep_lies_in_the_range_of_its_group(steps: list[float], count: int) -> None:
    groups = uniform_groups(steps, count)
    assert 1 <= groups.count <= count
    for step in steps:
        start, end = groups.ranges()[groups.group_of(step)]
        assert start <= step <= end


@given(st.integers(1, 12), st.integers(1, 8))
def test_uniform_groups_hold_equally_many_different_steps(count: int, each: int) -> None:
    steps = [80.0 * 0.9**i for i in range(count * each)]  # as noise levels lie: close together at the end
    groups = uniform_groups(steps, count)
    assert [sum(groups.group_of(step) == g for step in steps) for g in range(groups.count)] == [each] * count


def test_a_range_where_much_changes_gets_more_groups() -> None:
    steps = [i / 100 for i in range(100)]
    groups = balanced_groups(steps, [10.0 if step >= 0.9 else 0.1 for step in steps], 5)
    assert sum(edge >= 0.9 for edge in groups.edges) >= 4


def test_what_lies_outside_belongs_to_the_nearest_group() -> None:
    groups = TimeGroups(edges=(0.0, 0.5, 1.0))
    assert [groups.group_of(t) for t in (-3.0, 0.0, 0.49, 0.5, 1.0, 7.0)] == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("edges", [(), (1.0,), (1.0, 1.0), (2.0, 1.0), (0.0, math.inf)])
def test_edges_that_do_not_ascend_are_refused(edges: tuple[float, ...]) -> None:
    with pytest.raises(ConfigurationError, match="ascending"):
        TimeGroups(edges=edges)


def test_nan_is_no_timestep() -> None:
    with pytest.raises(ConfigurationError, match="NaN"):
        TimeGroups(edges=(0.0, 1.0)).group_of(math.nan)


def test_no_timesteps_make_no_groups() -> None:
    with pytest.raises(ConfigurationError, match="none was seen"):
        uniform_groups([], 3)

"""Stats of one input: parts add up to the whole, time groups have the same say, and nothing wrong gets in."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from arrow_quant_v2.calibration.collect import Product, seen
from arrow_quant_v2.calibration.observe import strata
from arrow_quant_v2.calibration.sample import Sample
from arrow_quant_v2.calibration.stats import PROBES, PROBES_PER_CALL, InputStats, Seen, moments_of
from arrow_quant_v2.errors import QuantizationError
from arrow_quant_v2.time_groups import TimeGroups

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

GROUPS, COLUMNS = 3, 5
LAYERS = ("q.weight", "k.weight")


def call(rows: Tensor) -> Seen:
    """What a linear layer is given in one call."""
    return seen(Product(inputs=rows, place=None), seed=0)


def calls(sizes: Iterable[int], seed: int = 0) -> list[Seen]:
    generator = torch.Generator().manual_seed(seed)
    return [call(torch.randn(size, COLUMNS, generator=generator)) for size in sizes]


def stats(seen: Sequence[Seen] = (), groups: Sequence[int] = (), weights: Sequence[float] | None = None) -> InputStats:
    result = InputStats(LAYERS, GROUPS, columns=COLUMNS, channels=COLUMNS)
    if seen:
        result.add(seen, groups, [1.0] * len(seen) if weights is None else weights)
    return result


@settings(deadline=None, max_examples=40)
@given(
    pieces=st.lists(st.tuples(st.integers(1, 90), st.integers(0, GROUPS - 1), st.integers(0, 3)), min_size=1),
    order=st.permutations(range(4)),
)
def test_parts_merged_in_any_order_are_the_whole(pieces: list[tuple[int, int, int]], order: list[int]) -> None:
    """Each piece is (rows, time group, part that it goes to)."""
    inputs, groups = calls(size for size, _, _ in pieces), [group for _, group, _ in pieces]
    weights = [0.5 + group for group in groups]
    whole, merged = stats(inputs, groups, weights), stats()
    for part in order:
        own = [i for i, (_, _, to) in enumerate(pieces) if to == part]
        merged.merge(stats([inputs[i] for i in own], [groups[i] for i in own], [weights[i] for i in own]))
    assert merged.count == whole.count == sum(size for size, _, _ in pieces)
    assert torch.equal(merged.rows, whole.rows)
    assert torch.equal(merged.absmax, whole.absmax)
    assert torch.equal(merged.moments[:, [0, 3, 4]], whole.moments[:, [0, 3, 4]])
    torch.testing.assert_close(merged.moments[:, 1:3], whole.moments[:, 1:3], rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(merged.sums, whole.sums, rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(merged.second.matrix, whole.second.matrix, rtol=1e-5, atol=1e-3)
    for group in range(GROUPS):
        given = torch.cat(
            [one.rows for one, own in zip(inputs, groups, strict=True) if own == group] or [inputs[0].rows[:0]]
        )
        assert len(merged.probes[group]) == len(whole.probes[group]) <= PROBES
        assert all((given == row).all(dim=1).any() for row in merged.probes[group])


@settings(deadline=None, max_examples=60)
@given(values=arrays(np.float32, st.integers(1, 60), elements=st.floats(-(2.0**60), 2.0**60, width=32)))
def test_moments_are_those_of_float64(values: np.ndarray) -> None:
    wide = values.astype(np.float64)
    count, total, squares, low, high = moments_of(torch.from_numpy(values)).tolist()
    assert (count, low, high) == (values.size, wide.min(), wide.max())
    assert total == pytest.approx(math.fsum(wide), rel=1e-12, abs=1e-12 * float(np.abs(wide).sum()))
    assert squares == pytest.approx(math.fsum(wide**2), rel=1e-12)


def test_the_spread_of_numbers_on_paper() -> None:
    one = stats([call(torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0], [-1.0, -2.0, -3.0, -4.0, -5.0]]))], [1])
    assert one.spread() == {
        "mean": [0.0, 0.0, 0.0],
        "std": [0.0, pytest.approx(math.sqrt(11.0)), 0.0],
        "min": [0.0, -5.0, 0.0],
        "max": [0.0, 5.0, 0.0],
    }
    assert one.means.tolist() == [[0.0] * 5] * 3
    twice = stats([call(torch.full((2, COLUMNS), 3.0)), call(torch.full((4, COLUMNS), 6.0))], [2, 2])
    assert twice.means[2].tolist() == [5.0] * 5
    assert (twice.rows.tolist(), twice.count) == ([0, 0, 6], 6)


def test_weights_enter_h_and_nothing_else() -> None:
    plain, weighted = (stats(calls([7]), [0], [weight]) for weight in (1.0, 3.0))
    torch.testing.assert_close(weighted.second.matrix, 3.0 * plain.second.matrix)
    assert torch.equal(weighted.moments, plain.moments)
    assert torch.equal(weighted.sums, plain.sums)
    assert torch.equal(weighted.probes[0], plain.probes[0])


def test_every_time_group_has_the_same_say_however_often_it_was_seen() -> None:
    """30 samples look along the first column, 2 along the second, none along the third."""
    samples = [Sample(timestep=0.0)] * 30 + [Sample(timestep=900.0)] * 2
    parts = strata(samples, TimeGroups(edges=(0.0, 300.0, 600.0, 1000.0)))
    assert parts.groups == (0,) * 30 + (2,) * 2
    assert sum(parts.weights) == pytest.approx(32.0)
    directions = torch.eye(COLUMNS)[[0] * 30 + [1] * 2]
    inputs = [call(row[None]) for row in directions]
    assert stats(inputs, parts.groups).second.matrix.diagonal().tolist() == [30.0, 2.0, 0.0, 0.0, 0.0]
    balanced = stats(inputs, parts.groups, parts.weights)
    assert balanced.second.matrix.diagonal().tolist() == pytest.approx([16.0, 16.0, 0.0, 0.0, 0.0], rel=1e-6)
    assert balanced.count == 32


def test_probes_come_from_many_calls_and_are_few() -> None:
    inputs = [call(torch.full((100, COLUMNS), float(number))) for number in range(20)]
    found = stats(inputs, [1] * 20)
    assert [len(rows) for rows in found.probes] == [0, PROBES, 0]
    numbers, counts = found.probes[1][:, 0].unique(return_counts=True)
    assert numbers.tolist() == [float(number) for number in range(PROBES // PROBES_PER_CALL)]
    assert set(counts.tolist()) == {PROBES_PER_CALL}
    spaced = stats([call(torch.arange(100.0)[:, None].expand(-1, COLUMNS))], [0]).probes[0][:, 0]
    assert spaced.tolist() == [0.0, 14.0, 28.0, 42.0, 56.0, 70.0, 84.0, 99.0]


def test_what_was_stored_comes_back_and_goes_on_by_itself() -> None:
    one = stats(calls([4, 70]), [0, 2], [2.0, 0.5])
    stored = one.tensors()
    other = InputStats.of(LAYERS, stored)
    assert other.tensors().keys() == stored.keys()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in other.tensors().items())
    before = {name: tensor.clone() for name, tensor in stored.items()}
    other.add(calls([9], seed=1), [1], [1.0])
    assert all(torch.equal(tensor, before[name]) for name, tensor in one.tensors().items())
    one.add(calls([9], seed=1), [1], [1.0])
    assert all(torch.equal(tensor, one.tensors()[name]) for name, tensor in other.tensors().items())


@pytest.mark.parametrize("name", ["moments", "absmax", "sums", "rows", "second", "probes.1", "count"])
def test_stored_stats_that_do_not_belong_together_are_refused(name: str) -> None:
    stored = stats(calls([4]), [0]).tensors()
    lacking = {key: tensor for key, tensor in stored.items() if key != name}
    with pytest.raises(QuantizationError, match=rf"stats of q.weight, k.weight lack {name}; calibrate again"):
        InputStats.of(LAYERS, lacking)
    with pytest.raises(
        QuantizationError, match=r"of q.weight, k.weight (do not fit together|lack probes.3); calibrate"
    ):
        InputStats.of(LAYERS, {**stored, name: torch.zeros(7, 7, dtype=stored[name].dtype)})


def other_input(layers: tuple[str, ...] = LAYERS, groups: int = 3, columns: int = 5, channels: int = 5) -> InputStats:
    return InputStats(layers, groups, columns=columns, channels=channels)


@pytest.mark.parametrize(
    "other",
    [
        other_input(("v.weight",)),
        other_input(groups=2),
        other_input(channels=4),
        other_input(columns=45),
        other_input(columns=1),
    ],
    ids=["layers", "groups", "channels", "kernel", "one column"],
)
def test_stats_of_another_input_are_not_merged(other: InputStats) -> None:
    one = stats(calls([4]), [0])
    before = {name: tensor.clone() for name, tensor in one.tensors().items()}
    with pytest.raises(QuantizationError, match=r"cannot be added to those of q.weight, k.weight: .*; merge stats of"):
        one.merge(other)
    assert all(torch.equal(tensor, before[name]) for name, tensor in one.tensors().items())


def with_bad_row_among_many(bad: float) -> Seen:
    """The bad row is none of those that are chosen."""
    rows = torch.ones(4096, COLUMNS)
    chosen = seen(Product(inputs=torch.arange(4096.0)[:, None], place=None), seed=0).rows[:, 0].long()
    rows[next(i for i in range(4096) if i not in set(chosen.tolist()))] = bad
    return call(rows)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            call(torch.full((3, COLUMNS), torch.nan)),
            "the inputs of q.weight, k.weight hold NaN or infinity; leave that",
        ),
        (call(torch.full((3, COLUMNS), -torch.inf)), "hold NaN or infinity"),
        (with_bad_row_among_many(torch.nan), "hold NaN or infinity"),
        (with_bad_row_among_many(torch.inf), "hold NaN or infinity"),
        (call(torch.ones(3, 4)), "have 4 columns of 4 channels; those seen before have 5 of 5: give samples"),
    ],
    ids=["nan", "infinity", "nan not chosen", "infinity not chosen", "columns"],
)
def test_wrong_inputs_are_refused_and_none_of_that_batch_is_added(wrong: Seen, message: str) -> None:
    one = stats(calls([4]), [0])
    before = {name: tensor.clone() for name, tensor in one.tensors().items()}
    with pytest.raises(QuantizationError, match=message):
        one.add([*calls([6]), wrong], [0, 1], [1.0, 1.0])
    assert all(torch.equal(tensor, before[name]) for name, tensor in one.tensors().items())

"""Which layers share a file: every layer lies in one, a large one alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hypothesis import given
from hypothesis import strategies as some

from arrow_quant_v2.publish import OWN_FILE_BYTES, SHARED_FILE_BYTES, file_groups


@dataclass
class Planned:
    """All that `file_groups` asks of a plan."""

    stored_bytes: int


def groups_of(sizes: list[int]) -> list[list[int]]:
    plans: Any = [Planned(size) for size in sizes]
    return file_groups(plans)


@given(some.lists(some.sampled_from([0, 1, OWN_FILE_BYTES - 1, OWN_FILE_BYTES, 100 * 2**20]), max_size=40))
def test_every_layer_lies_in_one_file_and_a_large_one_alone(sizes: list[int]) -> None:
    groups = groups_of(sizes)
    assert sorted(index for group in groups for index in group) == list(range(len(sizes)))
    for group in groups:
        assert group == sorted(group)
        assert len(group) == 1 or sum(sizes[i] for i in group) <= SHARED_FILE_BYTES
        assert len(group) == 1 or max(sizes[i] for i in group) < OWN_FILE_BYTES


def test_small_layers_share_a_file_across_a_large_one() -> None:
    assert groups_of([0, 5, OWN_FILE_BYTES, 5]) == [[0, 1, 3], [2]]
    assert groups_of([]) == []

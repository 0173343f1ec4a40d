"""How far inputs drift from the original model's: which rows are paired, and weights that come back."""

from __future__ import annotations

import pytest
import torch
from small_blocks import random

from arrow_quant_v2.calibration.drift import Drift, Originals
from arrow_quant_v2.calibration.stats import Seen, moments_of
from arrow_quant_v2.errors import QuantizationError


def seen(rows: torch.Tensor) -> Seen:
    return Seen(rows=rows, moments=moments_of(rows), absmax=rows.abs().amax(dim=0))


def drift_of(here: list[list[torch.Tensor]], there: list[list[torch.Tensor]]) -> torch.Tensor | None:
    drift = Drift(Originals({}))
    samples = ([[seen(rows) for rows in sample] for sample in side] for side in (here, there))
    drift.add(*samples, weights=[1.0, 4.0][: len(here)])
    return drift.matrix


def test_it_is_the_weighted_sum_over_all_samples() -> None:
    here = [random(5, 6, seed=1), random(3, 6, seed=2)]
    there = [rows + 0.1 * random(*rows.shape, seed=3) for rows in here]
    expected = sum(w * (b - a).mT @ a for a, b, w in zip(here, there, (1.0, 4.0), strict=True))
    torch.testing.assert_close(drift_of([[x] for x in here], [[x] for x in there]), expected)


def test_a_row_that_is_nowhere_near_is_another_token() -> None:
    here = random(2, 6, seed=1)
    there = torch.stack([1.1 * here[0], -here[1]])
    torch.testing.assert_close(drift_of([[here]], [[there]]), 0.1 * torch.outer(here[0], here[0]))


@pytest.mark.parametrize("there", [[], [random(4, 6, seed=2)], [random(5, 6, seed=2)] * 2])
def test_an_expert_that_is_given_other_tokens_has_no_drift(there: list[torch.Tensor]) -> None:
    assert drift_of([[random(5, 6, seed=1)]], [there]) is None


def test_original_weights_are_there_for_a_while() -> None:
    weights = {"a": random(2, 3, seed=1), "b": random(2, 3, seed=2)}
    first = {name: weight.clone() for name, weight in weights.items()}
    originals = Originals(weights)
    originals.remember(["a"])
    for weight in weights.values():
        weight.fill_(7.0)
    with originals.in_place():
        assert torch.equal(weights["a"], first["a"])
        assert float(weights["b"].mean()) == 7.0
    assert float(weights["a"].mean()) == 7.0
    with pytest.raises(QuantizationError), originals.in_place():
        raise QuantizationError
    assert float(weights["a"].mean()) == 7.0

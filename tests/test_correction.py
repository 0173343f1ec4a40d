"""Weights that make up for what became of their inputs: the least squares that QEP solves."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import normal

from arrow_quant_v2.engines.one_core import cores_at_most
from arrow_quant_v2.quantizers.correction import corrected

ROWS, COLUMNS, TOKENS = 300, 40, 4000


def inputs(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated inputs (tokens, columns) of the original model, and what they became."""
    original = normal(TOKENS, COLUMNS, seed=seed) @ normal(COLUMNS, COLUMNS, seed=77)
    return original, 0.9 * original + 0.1 * normal(TOKENS, COLUMNS, seed=seed + 1) @ normal(COLUMNS, COLUMNS, seed=78)


def moments(original: torch.Tensor, now: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return now.mT @ now, (original - now).mT @ now


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), strength=st.floats(0.1, 1.0))
def test_outputs_come_nearer_to_the_original_ones(seed: int, strength: float) -> None:
    original, now = inputs(seed)
    weight = normal(ROWS, COLUMNS, seed=3)
    (better,) = corrected([weight], *moments(original, now), TOKENS, strength)
    before, after = ((now @ w.mT - original @ weight.mT).square().sum() for w in (weight, better))
    assert after < (1.0 - 0.9 * strength * (2.0 - strength) * 0.5) * before


def test_it_is_the_least_squares_solution_with_damping() -> None:
    original, now = inputs(5)
    hessian, drift = moments(original, now)
    weights = [normal(ROWS, COLUMNS, seed=3), normal(7, COLUMNS, seed=4)]
    damped = hessian.double() + 0.01 * hessian.diagonal().double().mean() * torch.eye(COLUMNS)
    for weight, found in zip(weights, corrected(weights, hessian, drift, TOKENS, 0.5), strict=True):
        expected = weight + 0.5 * weight.double() @ drift.double() @ torch.linalg.inv(damped)
        torch.testing.assert_close(found, expected.float(), rtol=1e-3, atol=1e-3)


def test_inputs_that_did_not_drift_change_nothing() -> None:
    original, _ = inputs(5)
    weight = normal(ROWS, COLUMNS, seed=3)
    (same,) = corrected([weight], *moments(original, original), TOKENS, 0.5)
    assert torch.equal(same, weight)


def test_columns_without_inputs_stay() -> None:
    original, now = inputs(5)
    original[:, 7], now[:, 7] = 0.0, 0.0
    weight = normal(ROWS, COLUMNS, seed=3)
    (found,) = corrected([weight], *moments(original, now), TOKENS, 0.5)
    torch.testing.assert_close(found[:, 7], weight[:, 7])


def test_the_number_of_threads_changes_nothing() -> None:
    found = []
    for threads in (1, 3):
        with cores_at_most(threads):
            found.append(corrected([normal(ROWS, COLUMNS, seed=3)], *moments(*inputs(5)), TOKENS, 0.5)[0])
    assert torch.equal(*found)

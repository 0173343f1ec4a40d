"""Laws of the metrics, for any tensors, and figures that can be checked on paper."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arrow_quant_v2.validation import metrics

quick = settings(deadline=None, max_examples=30)
seeds = st.integers(0, 2**31)
sizes = st.integers(1, 12)


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@quick
@given(seed=seeds, rows=sizes, width=sizes)
def test_a_tensor_is_as_close_to_itself_as_can_be(seed: int, rows: int, width: int) -> None:
    a = drawn(seed, rows, width)
    assert metrics.cosine(a, a) == pytest.approx(1.0)
    assert metrics.relative_error(a, a) == 0.0
    assert metrics.kl_divergence(a, a) == 0.0
    assert metrics.sqnr(a, a) == metrics.psnr(a, a) == math.inf
    assert metrics.agreement(a, a) == metrics.retrieval_agreement(a, a) == 1.0


@quick
@given(seed=seeds, rows=sizes, width=sizes, scale=st.floats(1e-3, 1e3))
def test_a_cosine_sees_no_scale_and_an_error_sees_it(seed: int, rows: int, width: int, scale: float) -> None:
    a, b = drawn(seed, rows, width), drawn(seed + 1, rows, width)
    assert metrics.cosine(a, b * scale) == pytest.approx(metrics.cosine(a, b), abs=1e-12)
    assert metrics.relative_error(a, a * (1 + scale)) == pytest.approx(scale**2)


@quick
@given(seed=seeds, width=sizes, factor=st.floats(1.1, 100.0))
def test_a_difference_ten_times_as_large_is_20_db_less(seed: int, width: int, factor: float) -> None:
    a, noise = drawn(seed, width), drawn(seed + 1, width)
    less = metrics.sqnr(a, a + noise) - metrics.sqnr(a, a + factor * noise)
    assert less == pytest.approx(20 * math.log10(factor), abs=1e-6)


@quick
@given(seed=seeds, rows=sizes, width=st.integers(2, 12), shift=st.floats(-50.0, 50.0))
def test_divergence_is_never_negative_and_sees_no_shift(seed: int, rows: int, width: int, shift: float) -> None:
    a, b = drawn(seed, rows, width), drawn(seed + 1, rows, width)
    assert metrics.kl_divergence(a, b) >= 0.0
    assert metrics.kl_divergence(a, b + shift) == pytest.approx(metrics.kl_divergence(a, b), abs=1e-9)
    assert metrics.kl_divergence(a, a + shift) == pytest.approx(0.0, abs=1e-9)


@quick
@given(seed=seeds, rows=sizes, width=st.integers(2, 12))
def test_a_loss_is_what_torch_says(seed: int, rows: int, width: int) -> None:
    logits, tokens = drawn(seed, rows, width), torch.arange(rows) % width
    assert metrics.nll(logits, tokens) == pytest.approx(float(torch.nn.functional.cross_entropy(logits, tokens)))


@quick
@given(seed=seeds)
def test_likeness_of_pictures_has_two_sides_and_falls_with_noise(seed: int) -> None:
    a, noise = drawn(seed, 3, 16, 16).sigmoid(), drawn(seed + 1, 3, 16, 16)
    near, far = a + 0.01 * noise, a + 0.3 * noise
    assert metrics.ssim(a, a) == pytest.approx(1.0)
    assert metrics.ssim(a, near) == pytest.approx(metrics.ssim(near, a))
    assert 1.0 > metrics.ssim(a, near) > metrics.ssim(a, far)
    assert metrics.psnr(a, near) > metrics.psnr(a, far)


def test_figures_on_paper() -> None:
    assert metrics.cosine(torch.tensor([3.0, 4.0]), torch.tensor([4.0, 3.0])) == pytest.approx(24 / 25)
    assert metrics.relative_error(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 5.0])) == pytest.approx(1 / 25)
    assert metrics.psnr(torch.zeros(3, 4, 4), torch.full((3, 4, 4), 0.1)) == pytest.approx(20.0)
    assert metrics.psnr(torch.zeros(4), torch.full((4,), 25.5), peak=255.0) == pytest.approx(20.0)
    assert metrics.perplexity(metrics.nll(torch.zeros(1, 8), torch.tensor([3]))) == pytest.approx(8.0)
    assert metrics.agreement(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 3, 5])) == 0.75
    p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    assert metrics.kl_divergence(p, q) == pytest.approx(0.5 * math.log(4 / 3))


def test_zeros_are_like_zeros_alone() -> None:
    zero, one = torch.zeros(1, 3), torch.ones(1, 3)
    assert metrics.row_cosines(torch.cat([zero, zero, one]), torch.cat([zero, one, zero])).tolist() == [1.0, 0.0, 0.0]
    assert (metrics.relative_error(zero, zero), metrics.relative_error(zero, one)) == (0.0, math.inf)


def test_sounds_are_as_far_apart_as_they_are_loud_apart() -> None:
    time = torch.arange(8000) / 8000
    tone = drawn(0, 8000) * 0.1 + torch.sin(2 * torch.pi * 440 * time)
    assert metrics.log_mel_distance(tone, tone, 8000) == 0.0
    assert metrics.log_mel_distance(tone, tone / 10, 8000) == pytest.approx(20.0, abs=0.01)
    assert metrics.sqnr(tone, tone * 0.9) == pytest.approx(20.0)
    assert metrics.log_mel_distance(torch.zeros(10), torch.zeros(10), 8000) == 0.0


def test_every_frequency_between_the_ends_is_heard() -> None:
    bands = metrics.mel_bands(44100)
    assert bands.shape == (64, 513)
    assert torch.allclose(bands.sum(dim=0)[1:480], torch.ones(479, dtype=torch.float64))


def test_neighbours_that_change_places_do_not_agree() -> None:
    a = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
    assert metrics.retrieval_agreement(a, a) == 1.0
    assert metrics.retrieval_agreement(a, a[[0, 2, 1, 3]]) == 0.0

"""Inputs smoothed for 8 bits: ranges hold them, rounding costs less, and the file and the runtime agree on them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import normal
from torch import nn

import arrow_quant_v2 as aq
from arrow_quant_v2 import ArrowQuantV2, DiffusionQuantConfig
from arrow_quant_v2.errors import ConfigurationError
from arrow_quant_v2.quantizers.basis import Basis
from arrow_quant_v2.quantizers.smoothing import Ranges, rounding_loss
from arrow_quant_v2.quantizers.time_aware import LEVELS
from arrow_quant_v2.store.reader import StoredModel

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor

CHANNELS = 64


def ranges_of(*groups: Tensor) -> Ranges:
    """What is seen of inputs (rows, channels) of each time group."""
    return Ranges(
        absmax=torch.stack([x.abs().amax(dim=0) for x in groups]),
        low=torch.stack([x.amin() for x in groups]),
        high=torch.stack([x.amax() for x in groups]),
        count=sum(len(x) for x in groups),
    )


def loud(rows: int, seed: int) -> Tensor:
    """Inputs of which a few channels are thirty times as large as the others."""
    x = normal(rows, CHANNELS, seed=seed) * 20
    x[:, ::16] *= 30.0
    return x


@settings(deadline=None)
@given(seed=st.integers(0, 99), spread=st.floats(0, 4), shift=st.floats(-3, 3))
def test_smoothed_inputs_that_were_seen_lie_within_their_range(seed: int, spread: float, shift: float) -> None:
    groups = [normal(600, CHANNELS, seed=seed) * 20 + shift, normal(600, CHANNELS, seed=seed + 1)]
    scale = (spread * normal(CHANNELS, seed=seed) * 20).exp2()
    smoothed = ranges_of(*groups).in_basis(Basis(channels=CHANNELS, equalization=scale))
    for x, low, high in zip(groups, smoothed.low, smoothed.high, strict=True):
        assert (x / scale >= low * (1 + 1e-6)).all()
        assert (x / scale <= high * (1 + 1e-6)).all()


def test_inputs_that_are_never_negative_waste_no_code() -> None:
    scale = normal(CHANNELS).exp2()
    smoothed = ranges_of(loud(600, seed=1).relu()).in_basis(Basis(channels=CHANNELS, equalization=scale))
    assert smoothed.low.tolist() == [0.0]


def test_the_cost_of_rounding_is_what_outputs_lose() -> None:
    x, weight = loud(4000, seed=1), normal(32, CHANNELS)
    ranges = ranges_of(x)
    step = (x.amax() - x.amin()) / LEVELS
    lost = float((((x / step).round() * step - x) @ weight.T).square().sum())
    assert rounding_loss(weight, ranges, Basis(channels=CHANNELS)) == pytest.approx(lost, rel=0.1)


@pytest.mark.parametrize(("rows", "known"), [(8 * CHANNELS, True), (8 * CHANNELS - 1, False)])
def test_few_rows_do_not_tell_how_far_channels_go(rows: int, known: bool) -> None:
    assert ranges_of(loud(rows, seed=1)).tell_channels is known


# From the setting to what runs


class Steps(nn.Module):
    """Two layers; the first one's inputs are loud. The time is what the runtime's clock reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(CHANNELS, 96), nn.Linear(96, 48)
        with torch.no_grad():
            for layer in (self.first, self.second):
                layer.weight.copy_(normal(*layer.weight.shape, seed=layer.in_features))
                layer.bias.zero_()

    def forward(self, x: Tensor, timestep: float) -> Tensor:
        hidden: Tensor = self.second(self.first(x).relu())
        return hidden


def shown(module: nn.Module) -> Iterator[tuple[dict[str, object], float]]:
    for seed in range(16):
        time = (seed + 0.5) / 16
        yield {"x": loud(64, seed), "timestep": time}, time


def quantized(out: Path, *, smoothing: bool) -> Path:
    config = DiffusionQuantConfig(
        bit_width=8, group_size=32, modality="image", num_time_groups=2, min_accuracy=0.0, threads=1,
        activation_smoothing=smoothing, enable_calibration=True,
    )  # fmt: skip
    ArrowQuantV2().quantize_diffusion_model(Steps(), out, config, calibration=shown)
    return out


@torch.no_grad()
def test_smoothed_inputs_lose_less_in_8_bits_and_the_file_says_so(tmp_path: Path) -> None:
    lost = []
    for smoothing in (False, True):
        out = quantized(tmp_path / str(smoothing), smoothing=smoothing)
        model = aq.load(out, into=Steps(), activations="static").eval()
        x = loud(500, seed=77)
        exact = Steps()(x, 0.3)
        lost.append(float((model(x, timestep=0.3) - exact).square().sum() / exact.square().sum()))
        assert StoredModel(out).chunks("first.weight")[0].is_smoothed is smoothing
    assert lost[1] < 0.3 * lost[0]


@pytest.mark.parametrize(
    ("setting", "found"),
    [({"enable_spatial": False}, "enable_spatial is False"), ({"enable_time_aware": False}, "enable_time_aware"),
     ({"enable_calibration": False}, "enable_calibration"), ({"method": "clip"}, "method is 'clip'")],
)  # fmt: skip
def test_smoothing_without_what_it_needs_is_refused(setting: dict[str, Any], found: str) -> None:
    with pytest.raises(ConfigurationError, match=found) as refused:
        DiffusionQuantConfig(**{"enable_calibration": True, "activation_smoothing": True} | setting)
    assert "leave one of them out" in str(refused.value)

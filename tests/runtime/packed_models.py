"""Weights packed in a moment, and folders quantized beside their dequantized twins."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from arrow_quant_v2 import ArrowQuantizer, ArrowQuantV2, DiffusionQuantConfig
from arrow_quant_v2.config import LayerSpec
from arrow_quant_v2.packed import Layout
from arrow_quant_v2.quantizers import quantizer
from arrow_quant_v2.quantizers.basis import Basis

if TYPE_CHECKING:
    from pathlib import Path

    from arrow_quant_v2.packed import PackedTensor


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def packed(
    weight: torch.Tensor,
    bits: Any = 4,
    *,
    grid: Any = "affine",
    rotation: int | None = None,
    equalized: bool = False,
    axis: int = 1,
    name: str = "weight",
) -> PackedTensor:
    """A weight in groups of 32 (grid "row": one a row), coded in a basis of its own where one is asked for."""
    group = None if grid == "row" else 32
    layout = Layout(shape=tuple(weight.shape), bits=bits, quant_axis=axis, group_size=group, grid=grid)
    matrix, channels = weight.reshape(layout.rows, layout.columns), layout.channels or 1
    scales = 0.5 + torch.rand(channels, generator=torch.Generator().manual_seed(5)) if equalized else None
    coded = Basis(channels=channels, rotation=rotation, equalization=scales).weight(matrix).contiguous()
    method = "r2q" if grid == "r2q" else "clip"
    rows = quantizer(method)(coded, LayerSpec(bits=bits, group_size=group, method=method, symmetric=False))
    equalization = None if scales is None else scales.numpy()
    return rows.packed(name, "float32", layout, rotation=rotation, equalization=equalization)


def chunks(whole: PackedTensor, *starts: int) -> list[PackedTensor]:
    """The same tensor as several rows of a file."""
    stops = (*starts[1:], whole.rows)
    return [
        dataclasses.replace(
            whole,
            codes=whole.codes[start:stop],
            scales=whole.scales[start:stop],
            zero_points=None if whole.zero_points is None else whole.zero_points[start:stop],
            row_scales=whole.row_scales[start:stop],
            first_row=start,
        )
        for start, stop in zip(starts, stops, strict=True)
    ]


@dataclass(frozen=True)
class Pair:
    """A quantized folder, and the same dequantized."""

    quantized: Path
    dequantized: Path


def pair(model: Any, folder: Path, **settings: Any) -> Pair:
    """Quantize a folder or module, and convert the result back."""
    asked = {"bit_width": 4, "group_size": 32, "threads": 1} | settings
    both = Pair(folder / "quantized", folder / "dequantized")
    ArrowQuantV2().quantize_diffusion_model(model, both.quantized, DiffusionQuantConfig(**asked))
    ArrowQuantV2().convert(both.quantized, both.dequantized)
    return both


@torch.no_grad()
def distance(found: Any, expected: Any) -> float:
    """|found - expected| / |expected|."""
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def plain_quantizer(bits: Any = 4) -> ArrowQuantizer:
    return ArrowQuantizer(bits=bits, group_size=32)


class Net(nn.Module):
    """Layers of every kind that a file can hold: some run packed, others compute in their own way."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(60, 64, padding_idx=0)
        self.first = nn.Linear(64, 96)
        self.attention = nn.MultiheadAttention(96, 4, batch_first=True)
        self.wave = nn.Conv1d(96, 32, 3, padding=1, padding_mode="circular")
        self.back = nn.ConvTranspose1d(32, 64, 3, padding=1)
        self.norm = nn.BatchNorm1d(64)
        self.head = nn.Linear(64, 60, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.first(self.table(ids))
        x = self.attention(x, x, x, need_weights=False)[0]
        x = self.back(self.wave(x.mT))
        out: torch.Tensor = self.head(self.norm(x).mT)
        return out

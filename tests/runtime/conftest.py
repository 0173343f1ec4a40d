"""Small models, quantized, and what the dequantized folder gives: the same, computed by the library alone."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent))  # for its own modules, which pytest's importlib mode does not find


@pytest.fixture(autouse=True)
def _same_weights_in_any_order() -> None:
    """Layers of torch draw their weights from the global generator."""
    torch.manual_seed(0)

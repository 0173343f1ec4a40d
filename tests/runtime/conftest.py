"""Small models, quantized, and what the dequantized folder gives: the same, computed by the library alone."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))  # for its own modules, which pytest's importlib mode does not find

"""What docs/report.md shows works."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from small_models import save_model

from arrow_quant_v2 import ArrowQuantV2, DiffusionQuantConfig

if TYPE_CHECKING:
    import pytest

PAGE = Path(__file__).parents[2] / "docs" / "report.md"


def test_its_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = save_model(tmp_path / "minilm")
    for bits in (4, 8):
        config = DiffusionQuantConfig(bit_width=bits, group_size=64)
        ArrowQuantV2().quantize_diffusion_model(model, f"minilm-int{bits}", config)
    names: dict[str, object] = {"__name__": "report"}
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 2
    for code in blocks:
        exec(compile(code, str(PAGE), "exec"), names)
    assert "MiniLM in two widths" in (tmp_path / "widths.html").read_text(encoding="utf-8")

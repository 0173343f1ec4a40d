"""What docs/fallback.md shows works."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "fallback.md"


def test_its_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ARROW_QUANT_ENABLE_CALIBRATION", "true")
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    exec(compile(code, str(PAGE), "exec"), {"__name__": "fallback"})
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("2 {4: 2} True output cosine on ")
    assert second == "{'gptq': 2} {'gptq': 1.0} 2"

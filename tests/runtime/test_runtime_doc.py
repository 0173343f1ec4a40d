"""What docs/runtime.md shows works."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packed_models import pair
from small_pipelines import PIPELINES
from text_models import WORDS, save_bert

PAGE = Path(__file__).parents[2] / "docs" / "runtime.md"


@pytest.fixture
def workplace(minilm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {"enable_calibration": True, "calibration_samples": 4, "calibration_tokens": 0, "bit_width": 8}
    masked = save_bert(tmp_path / "masked", "BertForMaskedLM", words=WORDS)
    pair(minilm, tmp_path / "one").quantized.rename(tmp_path / "minilm-int4")
    pair(PIPELINES["ddpm"].save(tmp_path / "pipeline"), tmp_path / "two").quantized.rename(tmp_path / "pipeline-int4")
    pair(masked, tmp_path / "three", **seen).quantized.rename(tmp_path / "masked-int8")
    monkeypatch.chdir(tmp_path)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of what peft asks of transformers
@pytest.mark.filterwarnings("ignore:.*weights are dequantized or run otherwise")  # of lookups in masked-int8
@pytest.mark.filterwarnings("ignore:.*have no place in the model")  # position_ids, or a pooler
@pytest.mark.usefixtures("workplace")
def test_its_python_runs() -> None:
    names: dict[str, object] = {"__name__": "runtime"}
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 6
    for code in blocks:
        exec(compile(code, str(PAGE), "exec"), names)

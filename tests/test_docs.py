"""The documentation works: its site builds without a warning, its Python runs, and it explains messages that exist."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from small_pipelines import PIPELINES
from text_models import WORDS, save_bert

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


@pytest.fixture
def workplace(minilm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(minilm, tmp_path / "minilm")
    save_bert(tmp_path / "masked", "BertForMaskedLM", words=WORDS)
    PIPELINES["ddpm"].save(tmp_path / "pipeline")
    monkeypatch.delenv("ARROW_QUANT_ENABLE_CALIBRATION", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.mark.filterwarnings("ignore:.*below min_accuracy")  # of models with random weights
@pytest.mark.filterwarnings("ignore:.*weights are dequantized or run otherwise")
@pytest.mark.filterwarnings("ignore:.*have no place in the model")
@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize(("page", "count"), [("index.md", 1), ("guide.md", 6), ("extending.md", 3)])
def test_the_python_of_a_page_runs(page: str, count: int) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(blocks) == count
    names: dict[str, object] = {"__name__": "page"}
    for code in blocks:
        exec(compile(code, page, "exec"), names)


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]  # not --quiet
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pages = {path.parent.name or "index" for path in (tmp_path / "site").rglob("index.html")}
    assert {path.stem for path in DOCS.glob("*.md")} - {"index"} <= pages


def test_every_page_is_found_from_the_sites_menu() -> None:
    named = re.findall(r"(\w+\.md)", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert sorted(named) == sorted(path.name for path in DOCS.glob("*.md"))


def test_every_message_that_is_explained_is_one_that_the_program_says() -> None:
    said = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    said = re.sub(r'"\s*f?"', "", said + (ROOT / "CMakeLists.txt").read_text(encoding="utf-8"))  # strings in parts
    rows = re.findall(r"^\| (`.*?) \|", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) > 20
    assert [part for row in rows for part in re.findall("`(.*?)`", row) if part not in said] == []

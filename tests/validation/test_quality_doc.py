"""What docs/quality.md shows works."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

PAGE = Path(__file__).parents[2] / "docs" / "quality.md"
TEXT = PAGE.read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


@pytest.fixture
def workplace(quantized: Callable[[str, int], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(quantized("minilm", 8).original, tmp_path / "minilm")
    for bits in (4, 8):
        shutil.copytree(quantized("minilm", bits).path, tmp_path / f"minilm-int{bits}")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("workplace")
def test_its_python_runs() -> None:
    (code,) = blocks("python")
    exec(compile(code, str(PAGE), "exec"), {"__name__": "quality"})


@pytest.mark.usefixtures("workplace")
def test_its_commands_run(arrow_quant: Callable[..., Any]) -> None:
    lines = [line.removeprefix("$ ") for block in blocks("console") for line in block.splitlines()]
    assert len(lines) == 3
    for line in lines:
        program, *arguments = shlex.split(line)
        assert program == "arrow-quant"
        assert arrow_quant(*arguments).code == 0, line


def test_every_figure_that_is_found_is_explained() -> None:
    names = ("output cosine", "output error", "output SQNR", "NLL at", "NELBO", "KL at masked tokens", "latent error",
             "agreement of decoded tokens", "perplexity under", "embedding cosine", "retrieval agreement", "PSNR",
             "SSIM", "LPIPS", "SNR", "log-mel distance")  # fmt: skip
    assert [name for name in names if f"| {name}" not in TEXT and name not in TEXT] == []

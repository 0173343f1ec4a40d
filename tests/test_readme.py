"""What the README tells a newcomer works: its Python runs, its commands exist and do what it says."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from arrow_quant_v2.cli import app

README = Path(__file__).parents[1] / "README.md"
TEXT = README.read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, minilm: Path) -> Path:
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(minilm, folder / "minilm")
    return folder


def test_its_python_runs(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    assert len(blocks("python")) >= 3
    for code in blocks("python"):
        exec(compile(code, str(README), "exec"), {"__name__": "readme"})


def test_its_commands_run(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    lines = [line.removeprefix("$ ") for block in blocks("console") for line in block.splitlines()]
    assert len(lines) >= 5
    for line in lines:
        program, *arguments = shlex.split(line, comments=True)
        assert program == "arrow-quant"
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, (line, done.output, done.exception)


def test_the_files_it_links_to_are_there() -> None:
    links = re.findall(r"\]\(([\w./-]+)\)", TEXT)
    assert links
    assert [link for link in links if not (README.parent / link).exists()] == []


def test_every_make_target_it_names_exists() -> None:
    targets = re.findall(r"^([\w-]+):", (README.parent / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    named = re.findall(r"`?make ([\w-]+)", TEXT)
    assert named
    assert set(named) <= set(targets)

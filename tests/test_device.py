"""Calibration on a device: what a GPU is given stays there, what is written is the CPU's, and what is missing is told.

Without a GPU a pretended device stands in for it (see pretend_device), in a process of its own.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from small_models import Run, layers, run_python, save_model
from text_models import save_folder, small_module
from torch import nn

from arrow_quant_v2 import ArrowQuantV2, ConfigurationError, DiffusionQuantConfig, QuantizationError
from arrow_quant_v2.calibration.runnable import Runnable
from arrow_quant_v2.calibration.sample import Sample
from arrow_quant_v2.engines.devices import telling_what_is_full
from arrow_quant_v2.validation.outputs import call

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HERE = Path(__file__).parent
FULL = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
MODEL = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
import pretend_device, torch
from pathlib import Path
from torch import nn
from arrow_quant_v2 import ArrowQuantV2, DiffusionQuantConfig
from arrow_quant_v2.sources.parquet import ParquetSource

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(4, 32, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(2))
        self.head = nn.Linear(32, 32)

    def forward(self, x, timestep):
        x = self.stem(x).flatten(2).mT * (1.0 + timestep)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)

def samples(module):
    for number in range(6):
        draw = torch.Generator().manual_seed(number)
        time = number / 6
        yield {{"x": torch.randn(1, 4, 8, 8, generator=draw), "timestep": torch.tensor([time])}}, time

torch.manual_seed(0)
model, found = Model().eval(), []
"""
ON_BOTH = (
    MODEL
    + """
for device in ("cpu", "pretend"):
    out = Path(sys.argv[1]) / device
    config = DiffusionQuantConfig(
        bit_width=2, group_size=32, modality=sys.argv[2], device=device, threads=1, num_time_groups=2,
    )
    ArrowQuantV2(mode="diffusion").quantize_diffusion_model(model, out, config, calibration=samples)
    source = ParquetSource(out)
    found.append({info.name: source.read(info.name) for info in source.tensors})
for name, values in found[0].items():
    far = float((values - found[1][name]).norm() / values.norm())
    print(name, far)
    assert far < float(sys.argv[3]), name
print(sorted(pretend_device.done))
"""
)
FROM_STATS = (
    MODEL
    + """
for device in ("cpu", "pretend"):
    config = DiffusionQuantConfig(
        bit_width=2, group_size=32, modality="image", device=device, threads=1, num_time_groups=2,
    )
    stats, out = Path(sys.argv[1]) / f"{device}-stats", Path(sys.argv[1]) / device
    ArrowQuantV2(mode="diffusion").calibrate(model, stats, config, calibration=samples)
    config = config.model_copy(update={"stats": str(stats)})
    ArrowQuantV2(mode="diffusion").quantize_diffusion_model(model, out, config)
    source = ParquetSource(out)
    found.append({info.name: source.read(info.name) for info in source.tensors})
for name, values in found[0].items():
    far = float((values - found[1][name]).norm() / values.norm())
    print(name, far)
    assert far < 1e-6, name
print(sorted(pretend_device.done))
"""
)


@pytest.mark.parametrize(
    ("modality", "loop"), [("text", "quantize_columns_r2q"), ("image", "quantize_columns")], ids=["r2q", "gptq"]
)
def test_a_device_gives_what_the_cpu_gives_and_meets_no_tensor_of_it(modality: str, loop: str, tmp_path: Path) -> None:
    done = run_python(
        ON_BOTH, tmp_path, modality, 1e-6, timeout=300, ARROW_QUANT_ENABLE_CALIBRATION="true", OMP_NUM_THREADS="1"
    )
    assert not done.code, done.err
    assert f"'arrow_quant::{loop}'" in done.out


def test_stats_kept_on_a_device_are_fitted_there_to_what_the_cpu_gives(tmp_path: Path) -> None:
    done = run_python(FROM_STATS, tmp_path, timeout=300, ARROW_QUANT_ENABLE_CALIBRATION="true", OMP_NUM_THREADS="1")
    assert not done.code, done.err
    assert "'arrow_quant::quantize_columns'" in done.out


def test_a_device_that_is_not_there_is_refused_before_any_work(tmp_path: Path) -> None:
    config = DiffusionQuantConfig(device="tpu", modality="text")
    with pytest.raises(ConfigurationError, match=r"device is 'tpu'.* can work here on cpu"):
        ArrowQuantV2(mode="diffusion").quantize_diffusion_model(nn.Linear(32, 32), tmp_path / "out", config)
    assert not list(tmp_path.iterdir())


def test_a_device_that_is_full_names_the_way_out() -> None:
    with pytest.raises(QuantizationError, match=r"its memory is full.*max_memory"), telling_what_is_full("cuda"):
        raise FULL


class Full(nn.Module):
    """A model whose device has no memory left for what it makes of its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise FULL


class FullWithGradients(Full):
    """A model whose device has room for its outputs, and none for what gradients keep."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            raise FULL
        found: torch.Tensor = self.linear(x)
        return found


def rows(_: nn.Module) -> Iterator[tuple[torch.Tensor, float]]:
    return ((torch.ones(2, 32), number / 6) for number in range(6))


def test_full_memory_is_not_taken_for_a_model_that_cannot_be_called(tmp_path: Path) -> None:
    config = DiffusionQuantConfig(modality="text", enable_calibration=True)
    with pytest.raises(QuantizationError, match=r"its memory is full"):
        ArrowQuantV2(mode="diffusion").quantize_diffusion_model(Full(), tmp_path / "out", config, calibration=rows)


@pytest.mark.filterwarnings("ignore:calibrated on random inputs")
def test_full_memory_is_not_taken_for_random_inputs_that_do_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_folder(tmp_path / "model", small_module("BertModel"))
    config = DiffusionQuantConfig(modality="text", enable_calibration=True)

    def full(*_: Any, **__: Any) -> None:
        raise FULL

    monkeypatch.setattr("torch.nn.functional.embedding", full)
    with pytest.raises(QuantizationError, match=r"its memory is full"):
        ArrowQuantV2(mode="diffusion").quantize_diffusion_model(model, tmp_path / "out", config)


def test_full_memory_is_not_taken_for_a_model_without_gradients(tmp_path: Path) -> None:
    config = DiffusionQuantConfig(modality="text", enable_calibration=True, target_bits=6.0, group_size=32)
    with pytest.raises(QuantizationError, match=r"its memory is full"):
        ArrowQuantV2(mode="diffusion").quantize_diffusion_model(
            FullWithGradients(), tmp_path / "out", config, calibration=rows
        )


def test_full_memory_is_not_taken_for_a_forward_that_fails_when_outputs_are_compared() -> None:
    runnable = Runnable(module=Full(), modality="image", names={})
    with pytest.raises(QuantizationError, match=r"its memory is full"), telling_what_is_full("cuda"):
        call(runnable, Sample(arguments=(torch.ones(2, 32),), timestep=0.5))


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose GPU has 1.5 GB free."""
    monkeypatch.setattr("arrow_quant_v2.engines.devices._accelerators", lambda: ("cuda", 1))
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (1_500_000_000, 2_000_000_000))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "Some GPU")


@pytest.mark.usefixtures("one_gpu")
@pytest.mark.parametrize(
    ("tensors", "told"),
    [(layers(), "fits"), ({"wide.weight": torch.zeros(8, 8000)}, "weights are read from the disk block by block")],
)
def test_the_doctor_says_whether_a_gpu_holds_the_model(
    tensors: dict[str, torch.Tensor], told: str, tmp_path: Path, arrow_quant: Callable[..., Run]
) -> None:
    done = arrow_quant("doctor", save_model(tmp_path / "model", tensors), "--device", "cuda:0")
    assert done.code == 0
    line = done.out.splitlines()[-1]
    assert re.fullmatch(rf"device: cuda:0 Some GPU: \d+ MB needed, 1500 MB free: {told}", line)


@pytest.mark.usefixtures("one_gpu")
def test_the_doctor_names_devices_that_were_not_asked_for(tmp_path: Path, arrow_quant: Callable[..., Run]) -> None:
    done = arrow_quant("doctor", save_model(tmp_path / "model"))
    assert done.out.splitlines()[-1] == "device: cpu; --device can be cuda, cuda:0"


def test_the_doctor_refuses_a_device_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"device is 'warp'.* can work here on cpu"):
        ArrowQuantV2().doctor(save_model(tmp_path / "model"), DiffusionQuantConfig(device="warp"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_quantizes_to_the_same_bytes_each_time(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)).eval()

    def samples(_: nn.Module) -> Iterator[tuple[torch.Tensor, float]]:
        for number in range(6):
            yield torch.randn(16, 64, generator=torch.Generator().manual_seed(number)), number / 6

    found = []
    for name in ("one", "other"):
        config = DiffusionQuantConfig(bit_width=2, group_size=32, device="cuda", modality="text", min_accuracy=0.0)
        ArrowQuantV2(mode="diffusion").quantize_diffusion_model(model, tmp_path / name, config, calibration=samples)
        found.append([path.read_bytes() for path in sorted((tmp_path / name).rglob("*.parquet"))])
    assert found[0] == found[1]

"""Peak memory stays bounded, whatever the model's size, and is known beforehand."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from small_models import run_python, save_model

from arrow_quant_v2 import ArrowQuantV2, ConfigurationError, DiffusionQuantConfig
from arrow_quant_v2 import budget as room
from arrow_quant_v2.budget import LARGEST_SLICE, RESULTS_AHEAD, SMALLEST_SLICE, megabytes, plan_budget
from arrow_quant_v2.packed import TensorInfo
from arrow_quant_v2.plan import plan_model

if TYPE_CHECKING:
    from collections.abc import Iterator

MEGABYTE = 10**6
LARGEST = 32 * 2**20  # weights of the largest tensor
ONE_RUN = """
import json, re, sys
from arrow_quant_v2 import ArrowQuantV2, DiffusionQuantConfig
model, out, settings = sys.argv[1:]
config = DiffusionQuantConfig(**json.loads(settings))
predicted = ArrowQuantV2().doctor(model, config)["predicted_peak_memory_mb"]
result = ArrowQuantV2().quantize_diffusion_model(model, out, config)
status = open("/proc/self/status").read()  # ru_maxrss would count what this process was forked from
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) * 1024 / 1e6
print(json.dumps({"peak": peak, "predicted": predicted, "kept": result["kept_layers"]}))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """About 600 MB of bfloat16: nine tensors of 64 MB, and small ones between them."""
    folder = tmp_path_factory.mktemp("large")
    one = (torch.randn(LARGEST // 64) * 0.02).to(torch.bfloat16).repeat(64).reshape(8192, 4096)
    tensors = {f"layers.{i}.weight": one.roll(i, dims=1) for i in range(9)}
    tensors |= {f"layers.{i}.bias": torch.zeros(4096, dtype=torch.bfloat16) for i in range(9)}
    yield save_model(folder / "model", tensors)
    shutil.rmtree(folder)


def measured(model: Path, out: Path, **settings: object) -> dict[str, Any]:
    done = run_python(ONE_RUN, model, out, json.dumps({"modality": "text", **settings}))
    assert done.code == 0, done.err
    shutil.rmtree(out)
    return json.loads(done.out)


@pytest.mark.parametrize(
    ("settings", "copies"),
    [
        ({"bit_width": 2}, 3.0),
        ({"bit_width": 8, "threads": 16}, 3.0),
        ({"bit_width": 4, "keep": ["layers.3.*"]}, 3.0),  # the largest tensor as it is, and twice more inside Arrow
    ],
    ids=str,
)
def test_the_peak_is_bounded_and_predicted(
    settings: dict[str, object], copies: float, large: Path, tmp_path: Path
) -> None:
    found = measured(large, tmp_path / "out", **settings)
    assert found["peak"] <= copies * 2 * LARGEST / MEGABYTE + 500
    assert 0.6 * found["predicted"] <= found["peak"] <= 1.1 * found["predicted"]


@pytest.fixture(scope="module")
def dream_layer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One transformer layer in Dream-7B's shapes, 466 MB in bfloat16."""
    spec = importlib.util.spec_from_file_location("dream", Path(__file__).parents[1] / "bench" / "dream.py")
    assert spec is not None
    assert spec.loader is not None
    dream = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(dream)
    folder = tmp_path_factory.mktemp("dream")
    block = (torch.randn(2**22) * 0.02).to(torch.bfloat16)
    tensors = {}
    for name, shape in dream.layer_shapes(0).items():
        count = torch.Size(shape).numel()
        tensors[name] = block.repeat(-(-count // len(block)))[:count].reshape(shape)
    yield save_model(folder / "model", tensors)
    shutil.rmtree(folder)


def test_a_layer_of_dream_is_quantized_as_foretold(dream_layer: Path, tmp_path: Path) -> None:
    found = measured(dream_layer, tmp_path / "out", bit_width=2, group_size=64)
    largest = 18944 * 3584 * 2 / MEGABYTE
    assert found["peak"] <= 3 * largest + 500
    config = DiffusionQuantConfig.from_profile("edge", modality="text")
    foretold = ArrowQuantV2().doctor(dream_layer, config)
    result = ArrowQuantV2().quantize_diffusion_model(dream_layer, tmp_path / "out", config)
    assert result["quantized_layers"] == 7
    assert result["bits_per_weight"] == pytest.approx(2.253, abs=0.002)
    assert result["model_size_mb"] == pytest.approx(foretold["predicted_size_mb"], rel=0.01)
    assert result["compression_ratio"] > 7


def budget(config: DiffusionQuantConfig, *shape: int, dtype: str = "bfloat16") -> room.Budget:
    return plan_budget(plan_model([TensorInfo(name="large.weight", shape=shape, dtype=dtype)], config), config)


@pytest.fixture
def resident(monkeypatch: pytest.MonkeyPatch) -> int:
    """A process that takes 300 MB before it starts."""
    monkeypatch.setattr(room, "resident_bytes", lambda: 300 * MEGABYTE)
    return 300 * MEGABYTE


@pytest.mark.usefixtures("resident")
def test_less_memory_means_no_work_ahead_then_smaller_slices_then_fewer_threads() -> None:
    free = budget(DiffusionQuantConfig(threads=4), 32768, 8192)
    assert (free.workers, free.slice_bytes, free.ahead_bytes) == (4, LARGEST_SLICE, RESULTS_AHEAD)
    found = [(4, LARGEST_SLICE, 0), (4, LARGEST_SLICE // 2, 0), (2, SMALLEST_SLICE, 0)]
    peaks = [free.peak_bytes]
    for saved, expected in zip((10, 46, 108), found, strict=True):
        config = DiffusionQuantConfig(threads=4, max_memory=free.peak_bytes - saved * MEGABYTE)
        less = budget(config, 32768, 8192)
        assert (less.workers, less.slice_bytes, less.ahead_bytes) == expected
        peaks.append(less.peak_bytes)
    assert peaks == sorted(peaks, reverse=True)


@pytest.mark.usefixtures("resident")
def test_too_little_memory_is_refused_with_the_number_needed() -> None:
    with pytest.raises(ConfigurationError) as caught:
        budget(DiffusionQuantConfig(max_memory="400MB"), 32768, 8192)
    message = str(caught.value)
    assert message.startswith("max_memory is 400.0 MB; this model needs ")
    assert "because its largest layer is large.weight; allow that much" in message
    needed = message.split("needs ")[1].split(",", maxsplit=1)[0].replace(" ", "")
    assert budget(DiffusionQuantConfig(max_memory=needed), 32768, 8192).workers == 1


def test_too_little_memory_leaves_nothing(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    with pytest.raises(ConfigurationError, match=r"max_memory is 268\.4 MB; this model needs"):
        ArrowQuantV2().quantize_diffusion_model(model, tmp_path / "out", DiffusionQuantConfig(max_memory="256MiB"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.usefixtures("resident")
@pytest.mark.parametrize("cores", [1, 2, 16, 64, 256])
def test_many_cores_need_little_more_memory(cores: int) -> None:
    config = DiffusionQuantConfig(threads=cores)
    largest = 32768 * 8192 * 2
    assert budget(config, 32768, 8192).peak_bytes <= 3 * largest + (500 + 3 * max(0, cores - 64)) * MEGABYTE


@pytest.mark.usefixtures("resident")
def test_small_models_take_little_and_odd_dtypes_more() -> None:
    config = DiffusionQuantConfig(threads=2)
    assert budget(config, 64, 64).peak_bytes < 300 * MEGABYTE + room.LIBRARIES + MEGABYTE
    peaks = [budget(config, 8192, 8192, dtype=dtype).peak_bytes for dtype in ("bfloat16", "float8_e4m3fn")]
    assert peaks[0] < peaks[1]  # fp8 is widened to float32


def test_no_layers_need_no_more_than_the_libraries(resident: int) -> None:
    assert plan_budget((), DiffusionQuantConfig()).peak_bytes == resident + room.LIBRARIES


@pytest.mark.parametrize(("count", "text"), [(512e6, "512.0 MB"), (1.25e9, "1.25 GB"), (999.9e6, "999.9 MB")])
def test_megabytes_are_decimal(count: float, text: str) -> None:
    assert megabytes(count) == text


def test_this_machine_tells_its_memory_and_cores() -> None:
    assert 50 * MEGABYTE < room.resident_bytes() < room.available_bytes() + room.resident_bytes()
    assert room.cores() >= 1

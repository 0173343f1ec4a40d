"""Models that memory cannot hold are calibrated block by block, to the same bytes."""

from __future__ import annotations

import json
import re
import shutil
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

sys.path.append(str(Path(__file__).parents[1]))

from small_models import content_of, run_python
from text_models import save_folder, small_module

from arrow_quant_v2 import ArrowQuantV2, DiffusionQuantConfig, budget, preparation
from arrow_quant_v2.calibration.on_demand import OnDemand
from arrow_quant_v2.errors import SourceError
from arrow_quant_v2.sources.safetensors import SafetensorsSource

if TYPE_CHECKING:
    from collections.abc import Iterator

SETTINGS: dict[str, Any] = {
    "bit_width": 2,
    "group_size": 16,
    "calibration_samples": 8,
    "threads": 2,
    "enable_calibration": True,
}
SETTINGS |= {"calibration_tokens": 0, "min_accuracy": 0.0}
LARGE = "larger than memory: weights are read from disk block by block"
QWEN2 = {"num_key_value_heads": 1, "num_hidden_layers": 3, "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64}
RUN = """
import json, os, re, signal, sys
import transformers
from arrow_quant_v2 import ArrowQuantV2, DiffusionQuantConfig, preparation

def memory(which):
    return int(re.search(which + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024 / 1e6

model, out, settings, layers = sys.argv[1:]
preparation.available_bytes = lambda: 0
transformers.Qwen2ForCausalLM, transformers.BertForMaskedLM
before = memory("VmRSS")
def report(message, _):
    if message.startswith(f"{layers}/") and " calibrated" in message:
        os.kill(os.getpid(), signal.SIGKILL)
config = DiffusionQuantConfig(**json.loads(settings))
result = ArrowQuantV2().quantize_diffusion_model(model, out, config, report)
print(json.dumps({"grown": memory("VmHWM") - before, "notes": result["notes"]}))
"""

api = ArrowQuantV2()


@pytest.fixture(scope="module", params=["untied", "tied", "bert"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tied = request.param == "tied"
    if request.param == "bert":
        module = small_module("BertForMaskedLM", vocab_size=64, hidden_size=32, intermediate_size=64)
    else:
        module = small_module("Qwen2ForCausalLM", tie_word_embeddings=tied, **QWEN2)
    left_out = {"lm_head.weight", "cls.predictions.decoder.weight"} if request.param != "untied" else set()
    tensors = {name: tensor for name, tensor in module.state_dict().items() if name not in left_out}
    return save_folder(tmp_path_factory.mktemp(request.param), module, tensors, mask_token_id=4)


@pytest.fixture(scope="module")
def in_memory(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What becomes of the model where it fits into memory."""
    return quantized(folder, tmp_path_factory.mktemp("out") / "model")[0]


def quantized(folder: Path, out: Path, **settings: Any) -> tuple[dict[str, bytes], dict[str, Any]]:
    result = api.quantize_diffusion_model(folder, out, DiffusionQuantConfig(**SETTINGS | settings))
    return content_of(out), result


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "available_bytes", lambda: 0)


@pytest.mark.usefixtures("no_memory")
@pytest.mark.parametrize("threads", [1, 2])
def test_the_bytes_are_those_of_a_model_in_memory(
    threads: int, folder: Path, in_memory: dict[str, bytes], tmp_path: Path
) -> None:
    content, result = quantized(folder, tmp_path / "out", threads=threads)
    assert content == in_memory
    assert LARGE in result["notes"]
    assert sum("calibrated on" in decision.because for decision in result["decisions"]) > 12


@pytest.mark.usefixtures("no_memory")
@pytest.mark.parametrize("time_groups", ["uniform", "balanced"])
def test_time_groups_are_the_same(
    time_groups: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streamed, _ = quantized(folder, tmp_path / "streamed", time_groups=time_groups)
    monkeypatch.undo()
    assert streamed == quantized(folder, tmp_path / "out", time_groups=time_groups)[0]


def test_little_memory_allowed_is_reason_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_folder(tmp_path / "model", small_module("Qwen2ForCausalLM", **QWEN2), mask_token_id=4)
    monkeypatch.setattr(preparation, "available_bytes", lambda: 2**40)
    monkeypatch.setattr(budget, "ROOM", 4 * 10**9)
    assert LARGE in quantized(folder, tmp_path / "less", max_memory="4GB")[1]["notes"]
    assert LARGE not in quantized(folder, tmp_path / "enough", max_memory="5GB")[1]["notes"]


@pytest.mark.usefixtures("no_memory")
@pytest.mark.parametrize("layers", [2, 9])  # among those of the first input, and in the middle of the model
def test_a_killed_run_goes_on_to_the_same_bytes(
    layers: int, folder: Path, in_memory: dict[str, bytes], tmp_path: Path
) -> None:
    done = run_python(RUN, folder, tmp_path / "out", json.dumps(SETTINGS), layers)
    assert done.code == -signal.SIGKILL, done.err
    assert len(list((tmp_path / "out.partial" / "parts").iterdir())) == layers
    assert quantized(folder, tmp_path / "out")[0] == in_memory


@pytest.mark.usefixtures("no_memory")
def test_a_weight_that_cannot_be_read_any_more_ends_the_run(
    folder: Path, in_memory: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, read = OnDemand.holding, SafetensorsSource.read
    walking = list[bool]()

    def holding(weights: OnDemand, part: Any) -> Any:
        walking.append(True)
        return held(weights, part)

    def damaged(source: SafetensorsSource, name: str, *rest: int) -> torch.Tensor:
        if walking and re.search(r"layers?\.1\.", name):
            raise SourceError(f"{name}: cannot be read: Input/output error")
        return read(source, name, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(OnDemand, "holding", holding)
        patched.setattr(SafetensorsSource, "read", damaged)
        with pytest.raises(SourceError, match=r"layers?\.1\..*: cannot be read: Input/output error"):
            quantized(folder, tmp_path / "out")
    assert list((tmp_path / "out.partial" / "parts").iterdir())
    assert quantized(folder, tmp_path / "out")[0] == in_memory


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """32 blocks of 7.1 million weights: 908 MB in float32, 454 MB in the file."""
    folder = tmp_path_factory.mktemp("deep")
    sizes = {"hidden_size": 768, "intermediate_size": 2304, "num_attention_heads": 12, "num_key_value_heads": 4}
    config = transformers.Qwen2Config(num_hidden_layers=32, vocab_size=512, tie_word_embeddings=False, **sizes)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in transformers.Qwen2ForCausalLM(config).named_parameters()}
    draw = torch.Generator().manual_seed(0)
    values = (torch.randn(2304 * 768, generator=draw) * 0.02).to(torch.bfloat16)
    tensors = {name: values[: shape.numel()].reshape(shape).clone() for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    entries = config.to_dict() | {"architectures": ["Qwen2ForCausalLM"], "mask_token_id": 511}
    (folder / "config.json").write_text(json.dumps(entries))
    yield folder
    shutil.rmtree(folder)


def test_the_peak_is_that_of_a_block(deep: Path, tmp_path: Path) -> None:
    rows = [{"input_ids": list(range(start, start + 32))} for start in range(2)]
    (tmp_path / "tokens.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = {
        "bit_width": 4, "calibration_samples": 2, "calibration_data": str(tmp_path / "tokens.jsonl"), "threads": 2,
        "enable_calibration": True, "calibration_tokens": 0, "modality": "text", "method": "gptq", "min_accuracy": 0.0,
        "keep": ["*.mlp.*", "*.q_proj.*", "*.o_proj.*"],
    }  # fmt: skip
    done = run_python(RUN, deep, tmp_path / "out", json.dumps(settings), 999)
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["notes"] == [LARGE]
    assert found["grown"] < 908 / 2

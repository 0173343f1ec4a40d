"""From nothing to the first output, and the memory that it takes: packed weights beside the original's safetensors.

    python bench/first_output.py [--rounds 3] [--json FILE]

Every run is a process of its own that has imported its libraries already. Memory is measured in another one than time
is, after a tiny model was loaded and run in the same way, so that code of libraries does not count. What a step needs
beside the weights is what the original takes more than its file has bytes. The large model has random weights, of
which neither time nor memory depends.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "tests"))

import torch
from measure import machine, show, write_json
from real_models import packaged
from safetensors.torch import save_file
from transformers import BertConfig, BertForMaskedLM

import arrow_quant_v2 as aq

TIME_BAR, ACTIVATIONS_BAR = 1.3, 1.3
TOKENS = 124
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
TINY = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 64}

ONE = """
import json, re, sys, time, warnings
from pathlib import Path
import torch, transformers
from transformers import AutoModelForMaskedLM, BertForMaskedLM  # which imports what is only named until then
import arrow_quant_v2 as aq

def memory(what):
    return 1024 * int(re.search(what + r":\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1))

packed, tokens, folders = sys.argv[1] == "packed", int(sys.argv[2]), [Path(folder) for folder in sys.argv[3:]]
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
warnings.simplefilter("ignore")
torch.ones(64, 64) @ torch.ones(64, 64)
for folder in folders:
    Path("/proc/self/clear_refs").write_text("5")
    before, started = memory("VmRSS"), time.perf_counter()
    with torch.inference_mode():
        model = aq.load(folder) if packed else BertForMaskedLM.from_pretrained(folder, dtype="auto").eval()
        model(input_ids=torch.full((1, tokens), 5))
print(json.dumps({"seconds": time.perf_counter() - started, "memory": memory("VmHWM") - before}))
"""


def run_one(folder: Path, kind: str, tiny: Path) -> dict[str, float]:
    """Seconds to the first output, and bytes beyond what the libraries take."""
    return {"seconds": run(kind, folder)["seconds"], "memory": run(kind, tiny, folder)["memory"]}


def run(kind: str, *folders: Path) -> dict[str, float]:
    """What the last of these models takes in a process that has run the others."""
    command = [sys.executable, "-c", ONE, kind, str(TOKENS), *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{folders[-1]}: {done.stderr.strip()}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def originals(work: Path) -> dict[str, Path]:
    """A real model, and a large one."""
    shutil.copytree(packaged("antiberty", "trained_models/AntiBERTy_md_smooth"), work / "antiberty")
    BertForMaskedLM(BertConfig(**LARGE)).bfloat16().save_pretrained(work / "bert, 336 M, bfloat16")
    return {path.name: path for path in (work / "antiberty", work / "bert, 336 M, bfloat16")}


def tiny_models(folder: Path) -> dict[str, Path]:
    """A model of the same class that takes next to nothing, by kind."""
    BertForMaskedLM(BertConfig(**TINY)).save_pretrained(folder)
    return {"original": folder, "packed": quantized(folder, 4)}


def in_safetensors(folder: Path) -> Path:
    """The folder, its weights in safetensors: AntiBERTy's come as a checkpoint of torch."""
    checkpoint = folder / "pytorch_model.bin"
    if checkpoint.exists():
        state: dict[str, torch.Tensor] = torch.load(checkpoint, weights_only=True, map_location="cpu")
        save_file(
            {name: value.clone() for name, value in state.items()}, folder / "model.safetensors", {"format": "pt"}
        )
        checkpoint.unlink()
    return folder


def quantized(folder: Path, bits: int) -> Path:
    """From weights alone: how they were chosen changes neither time nor memory."""
    out = folder.with_name(f"{folder.name}-int{bits}")
    config = aq.DiffusionQuantConfig(
        bit_width=bits, group_size=64, method="rtn", enable_calibration=False, min_accuracy=0.0, modality="text"
    )
    aq.ArrowQuantV2().quantize_diffusion_model(folder, out, config)
    return out


def weight_bytes(folder: Path) -> int:
    """Bytes of the files that hold weights."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.suffix in {".safetensors", ".parquet"})


def compared(name: str, original: Path, tiny: dict[str, Path], rounds: int) -> list[dict[str, Any]]:
    """Medians of both, taken in turns, for each width."""
    packed = {bits: quantized(original, bits) for bits in (2, 4, 8)}
    of_original: list[dict[str, float]] = []
    of_packed: dict[int, list[dict[str, float]]] = {bits: [] for bits in packed}
    for _ in range(rounds):
        of_original.append(run_one(original, "original", tiny["original"]))
        for bits, folder in packed.items():
            of_packed[bits].append(run_one(folder, "packed", tiny["packed"]))
    needed = max(0.0, median(of_original, "memory") - weight_bytes(original))
    return [
        {"model": name, "bits": bits}
        | row(of_original, of_packed[bits], weight_bytes(folder) + ACTIVATIONS_BAR * needed)
        for bits, folder in packed.items()
    ]


def row(original: list[dict[str, float]], packed: list[dict[str, float]], allowed: float) -> dict[str, Any]:
    """Figures of one model and width."""
    return {
        "seconds": median(packed, "seconds"),
        "original_seconds": median(original, "seconds"),
        "times": statistics.median(p["seconds"] / o["seconds"] for p, o in zip(packed, original, strict=True)),
        "memory": median(packed, "memory"),
        "original_memory": median(original, "memory"),
        "allowed_memory": allowed,
    }


def median(runs: list[dict[str, float]], what: str) -> float:
    """Of all rounds."""
    return statistics.median(run[what] for run in runs)


def cells(found: dict[str, Any]) -> tuple[str, ...]:
    """One row of the table."""
    return (
        f"{found['model']}, INT{found['bits']}",
        f"{found['original_seconds']:.2f}",
        f"{found['seconds']:.2f}",
        f"{found['times']:.2f} {'pass' if found['times'] <= TIME_BAR else 'miss'} (<= {TIME_BAR})",
        f"{found['original_memory'] / 1e6:.0f}",
        f"{found['memory'] / 1e6:.0f}",
        f"{'pass' if found['memory'] <= found['allowed_memory'] else 'miss'} (<= {found['allowed_memory'] / 1e6:.0f})",
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    ask = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        tiny = tiny_models(Path(name) / "tiny")
        found = [
            one
            for label, folder in originals(Path(name)).items()
            for one in compared(label, in_safetensors(folder), tiny, ask.rounds)
        ]
    columns = ("to the first output", "original, s", "packed, s", "times", "original, MB", "packed, MB", "memory")
    show("In a process of its own", columns, map(cells, found))
    if ask.json:
        write_json(ask.json, {"machine": machine(), "rows": found})


if __name__ == "__main__":
    main()

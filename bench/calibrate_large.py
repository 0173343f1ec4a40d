"""Dream-7B's shapes calibrated to INT2, block by block: peak memory, time per block, and how well it was foretold."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from dream import HEADS, HIDDEN, INTERMEDIATE, KV_HEADS, LAYERS, VOCABULARY
from large import made_elsewhere
from rich.console import Console
from rich.table import Table

MEMORY_BAR = 12 * 10**9
MASK = 151666  # Dream's own
QWEN2 = {  # Dream is shaped as Qwen2.5, which transformers knows
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "mask_token_id": MASK,
}
RUN = """
import json, re, sys, time
from arrow_quant_v2 import ArrowQuantV2, DiffusionQuantConfig

model, out, settings = sys.argv[1:]
told, started = [], time.perf_counter()
report = lambda message, _: told.append((time.perf_counter() - started, message))
config = DiffusionQuantConfig.from_profile("edge", modality="text", **json.loads(settings))
result = ArrowQuantV2().quantize_diffusion_model(model, out, config, report)
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
names = ("quantization_time_s", "bits_per_weight", "notes", "calibration")
print(json.dumps({"told": told, "peak_bytes": peak} | {name: result[name] for name in names}))
"""
KEPT = re.compile(r"\d+ calibrated, (?:model\.)?(layers\.\d+|lm_head)\.")


def write_tokens(path: Path, samples: int, tokens: int) -> None:
    """Sequences of random token ids."""
    draw = torch.Generator().manual_seed(0)
    rows = torch.randint(0, MASK, (samples, tokens), generator=draw).tolist()
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))


def calibrated(model: Path, out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """One run in a process of its own, one torch thread for each core."""
    command = [sys.executable, "-c", RUN, str(model), str(out), json.dumps(settings)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    found: dict[str, Any] = json.loads(subprocess.check_output(command, env=environment).splitlines()[-1])
    return found


def seconds_per_block(told: list[tuple[float, str]]) -> dict[str, float]:
    """From one block's last layer to the next one's; the first begins when the estimate was told."""
    before = next(second for second, message in told if message.startswith("calibrating"))
    ends = {hit[1]: second for second, message in told if (hit := KEPT.match(message))}
    seconds = {}
    for name, end in ends.items():
        seconds[name], before = end - before, end
    return seconds


def figures(run: dict[str, Any]) -> dict[str, Any]:
    """What the run shows."""
    told, blocks = run["told"], seconds_per_block(run["told"])
    layers = [seconds for name, seconds in blocks.items() if name.startswith("layers")]
    start, estimate = next((second, message) for second, message in told if message.startswith("calibrating"))
    whole = run["quantization_time_s"] + (LAYERS - len(layers)) * sum(layers) / len(layers)
    return {
        "peak_bytes": run["peak_bytes"],
        "memory_bar": MEMORY_BAR,
        "seconds": run["quantization_time_s"],
        "seconds_before_the_first_block": start,
        "seconds_per_block": blocks,
        "seconds_of_all_blocks": sum(blocks.values()),
        "told": estimate,
        "seconds_of_28_blocks": whole,
        "bits_per_weight": run["bits_per_weight"],
        "notes": run["notes"],
    }


def show(found: dict[str, Any], shape: str) -> None:
    """Print the table."""
    table = Table(title=f"Dream-7B shapes, INT2, {shape}")
    table.add_column("what")
    table.add_column("found", justify="right")
    table.add_row("peak GB", f"{found['peak_bytes'] / 1e9:.2f} (bar {MEMORY_BAR / 1e9:.0f})")
    table.add_row("before the first block, s", f"{found['seconds_before_the_first_block']:.0f}")
    for name, seconds in found["seconds_per_block"].items():
        table.add_row(f"{name}, s", f"{seconds:.0f}")
    table.add_row("all blocks, s", f"{found['seconds_of_all_blocks']:.0f}")
    table.add_row("foretold", found["told"].rpartition(", ")[2])
    table.add_row("whole run, s", f"{found['seconds']:.0f}")
    table.add_row(f"with {LAYERS} blocks, about min", f"{found['seconds_of_28_blocks'] / 60:.0f}")
    table.add_row("bits per weight", f"{found['bits_per_weight']:.3f}")
    Console(width=100).print(table)


def main() -> None:
    """Write the model, run, report, delete."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("bench/out/calibrate"), help="deleted afterwards")
    parser.add_argument("--blocks", type=int, default=2, help=f"of {LAYERS}; all of them need 20 GB of disk")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256, help="of a sample")
    parser.add_argument("--calibration", type=Path, help="a file of token ids, instead of random ones")
    parser.add_argument("--max-memory", default="12GB")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    shutil.rmtree(given.folder, ignore_errors=True)
    try:
        config = QWEN2 | {"num_hidden_layers": given.blocks}
        made_elsewhere(given.folder / "dream", given.blocks, config)
        tokens = given.folder / "tokens.jsonl"
        write_tokens(tokens, given.samples, given.tokens)
        data = str(given.calibration or tokens)
        settings = {
            "calibration_data": data,
            "calibration_samples": given.samples,
            "max_memory": given.max_memory,
        }
        found = figures(calibrated(given.folder / "dream", given.folder / "out", settings))
    finally:
        shutil.rmtree(given.folder, ignore_errors=True)
    show(found, f"{given.blocks} blocks and the head, {given.samples} samples of {given.tokens} tokens")
    if given.json:
        given.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()

"""Every peer's rounding of real models' weights at 2, 4 and 8 bits, written back dequantized; judges nothing.

Run it with the peers' own Python: .venv-peers/bin/python bench/peers/quality.py --folder bench/out/quality/run
--json FILE. There lie the weights as bench/quality.py --write left them; its --peers judges what comes out. Each peer
runs in a process of its own, so that one that dies costs the cell it was in; what it refuses is told in its own words.
Each cell is noted as soon as it is known, so that a run that was killed goes on behind it.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from memory import PeakMemory
from quantize import raised
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

REFUSALS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
KEPT_BITS = 16  # of a weight that a peer refused
ERROR_CHARACTERS = 200
NOTES = "peers.jsonl"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One way of a peer's at some widths: the options of a function in the module beside this file.

    looks  whether it is given H of each layer; whole: whether it runs the model itself, by `quantize_model`
    """

    peer: str
    package: str
    module: str
    widths: tuple[int, ...]
    label: str = ""
    function: str = "quantize"
    looks: bool = False
    whole: bool = False
    options: dict[str, Any] = field(default_factory=dict)


def settings_of(peer: str, package: str, module: str, *several: tuple[Any, ...], **same: Any) -> Iterator[Setting]:
    """Settings of one peer: label, widths, options."""
    for label, widths, options in several:
        yield Setting(peer=peer, package=package, module=module, label=label, widths=widths, options=options, **same)


SETTINGS: tuple[Setting, ...] = (
    *settings_of(
        "torchao", "torchao", "with_torchao",
        ("g64", (2, 4), {"group_size": 64}),
        ("g32", (2, 4, 8), {"group_size": 32}),
    ),
    *settings_of("torchao", "torchao", "with_torchao", ("as it comes", (4, 8), {}), function="quantize_layer"),
    *settings_of(
        "SDNQ", "sdnq", "with_sdnq",
        ("as it comes", (2, 4, 8), {"group_size": 0}),
        ("g64", (2, 4, 8), {"group_size": 64}),
        ("with SVD", (2, 4, 8), {"group_size": 0, "use_svd": True}),
        ("with codebook", (2, 4), {"group_size": 0, "use_codebook": True}),
    ),
    *settings_of(
        "HQQ", "hqq", "with_hqq",
        ("g64", (2, 4, 8), {"group_size": 64}),
        ("g32", (2, 4, 8), {"group_size": 32}),
        ("g16", (2,), {"group_size": 16}),
        function="quantize_as_stored",
    ),
    *settings_of(
        "optimum-quanto", "optimum-quanto", "with_quanto",
        ("g128", (2, 4), {"group_size": 128}),
        ("g32", (2, 4), {"group_size": 32}),
    ),
    *settings_of("optimum-quanto", "optimum-quanto", "with_quanto", ("rows", (8,), {}), function="quantize_rows"),
    *settings_of(
        "bitsandbytes", "bitsandbytes", "with_bitsandbytes",
        ("nf", (2, 4), {"kind": "nf"}),
        ("nf, double", (4,), {"kind": "nf", "double": True}),
        ("fp", (4,), {"kind": "fp"}),
        ("int8", (8,), {"kind": "int8"}),
    ),
    *settings_of(
        "AutoRound without tuning", "auto-round", "with_autoround",
        ("g32", (2, 4, 8), {"group_size": 32}),
        looks=True,
    ),
    *settings_of("AutoRound", "auto-round", "with_autoround", ("g128, light", (2, 4), {"group_size": 128}), whole=True),
    *settings_of(
        "GPTQModel's GPTQ", "gptqmodel", "with_gptqmodel",
        ("g128", (2, 4, 8), {"group_size": 128}),
        ("g32", (2, 4, 8), {"group_size": 32}),
        ("g32, zeros", (2, 4), {"group_size": 32, "symmetric": False}),
        looks=True,
    ),
    *settings_of("GPTQModel", "gptqmodel", "with_gptqmodel", ("g128", (4,), {"group_size": 128}), whole=True),
    *settings_of(
        "ONNX Runtime", "onnxruntime", "with_onnxruntime",
        ("blocks of 32", (2, 4, 8), {"block": 32}),
        ("blocks of 128", (2, 4, 8), {"block": 128}),
        ("HQQ, blocks of 32", (2, 4, 8), {"block": 32, "algorithm": "hqq"}),
        ("k-quant, blocks of 32", (4,), {"block": 32, "algorithm": "k_quant"}),
    ),
    *settings_of(
        "gguf", "gguf", "with_gguf",
        ("Q2_K", (2,), {"kind": "Q2_K"}),
        ("Q4_0", (4,), {"kind": "Q4_0"}),
        ("Q4_K", (4,), {"kind": "Q4_K"}),
        ("Q8_0", (8,), {"kind": "Q8_0"}),
    ),
    *settings_of(
        "llama.cpp", "xllamacpp", "with_llamacpp",
        ("Q2_K", (2,), {"kind": "Q2_K"}),
        ("Q3_K", (2,), {"kind": "Q3_K"}),
        ("Q4_K", (4,), {"kind": "Q4_K"}),
    ),
    *settings_of(
        "llama.cpp", "xllamacpp", "with_llamacpp",
        ("IQ2_S, imatrix", (2,), {"kind": "IQ2_S"}),
        ("Q2_K, imatrix", (2,), {"kind": "Q2_K"}),
        ("Q3_K, imatrix", (2,), {"kind": "Q3_K"}),
        ("Q4_K, imatrix", (4,), {"kind": "Q4_K"}),
        looks=True,
    ),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Task:
    """One cell: a setting at one width on one model."""

    model: str
    setting: Setting
    bits: int

    @property
    def told(self) -> dict[str, Any]:
        """What names the cell."""
        peer = f"{self.setting.peer} {version(self.setting.package)}"
        return {"model": self.model, "peer": peer, "setting": self.setting.label, "bits": self.bits}

    @property
    def file(self) -> str:
        """Where the restored weights go, beside the folders of the models."""
        words = f"{self.setting.peer} {self.setting.label} {self.bits}"
        return f"restored/{self.model} {words}.safetensors"


def tasks(models: Iterable[str], package: str, widths: Iterable[int]) -> list[Task]:
    """All cells of one package."""
    own = [setting for setting in SETTINGS if setting.package == package]
    return [
        Task(model=model, setting=setting, bits=bits)
        for model in models
        for setting in own
        for bits in setting.widths
        if bits in widths
    ]


@dataclass
class Rounded:
    """What came of one model's weights."""

    restored: dict[str, Tensor]
    bits: int = 0
    seconds: float = 0.0
    refused: int = 0
    failure: str | None = None

    def refuse(self, weight: Tensor, error: Exception) -> None:
        """A weight stays as it was."""
        self.bits += KEPT_BITS * weight.numel()
        self.refused += 1
        self.failure = self.failure or said(error)

    def take(self, name: str, weight: Tensor, restored: Tensor, bits: float) -> None:
        """One weight of a model that was quantized as a whole: what did not change there was not quantized."""
        if torch.equal(weight, restored):
            self.refuse(weight, ValueError(f"{name} was left as it was, without a word"))
            return
        self.restored[name] = restored
        self.bits += round(bits * weight.numel())


def said(error: Exception) -> str:
    """A peer's own words, in one line."""
    return shortened(f"{type(error).__name__}: {error}")


def shortened(words: str) -> str:
    """One line, without the places of files on this machine."""
    return re.sub(r"(/[\w.-]+){2,}", "FILE", " ".join(words.split()))[:ERROR_CHARACTERS]


def rounded(task: Task, folder: Path) -> Rounded:
    """Every weight of one model, one after the other."""
    setting, found = task.setting, Rounded(restored={})
    with (
        safe_open(folder / "weights.safetensors", "pt") as weights,
        safe_open(folder / "products.safetensors", "pt") as h,
    ):
        for name in sorted(weights.keys()):
            given = {"products": h.get_tensor(name)} if setting.looks else {}
            weight = weights.get_tensor(name)
            try:
                one(task, weight, given, found, name)
            except REFUSALS as error:
                found.refuse(weight, error)
    return found


def one(task: Task, weight: Tensor, given: dict[str, Tensor], found: Rounded, name: str) -> None:
    """One weight; only quantizing it is timed."""
    module = import_module(task.setting.module)
    started = time.perf_counter()
    quantized = getattr(module, task.setting.function)(weight, task.bits, **task.setting.options, **given)
    seconds = time.perf_counter() - started
    restored = module.restore(quantized).detach().float().reshape(weight.shape).contiguous().clone()
    found.restored[name] = restored
    found.bits += 8 * sum(tensor.nbytes for tensor in module.stored(quantized))
    found.seconds += seconds


def whole(task: Task, folder: Path) -> Rounded:
    """The model as the peer quantizes it by itself, shown the same texts."""
    module, described = import_module(task.setting.module), json.loads((folder / "model.json").read_text())
    weights = load_file(folder / "weights.safetensors")
    names = {described["places"][name]: name for name in weights}
    if described["folder"] is None:
        raise ValueError("a module of its own in no folder of transformers or diffusers")
    started = time.perf_counter()
    restored, bits = module.quantize_model(described, names, task.bits, **task.setting.options)
    found = Rounded(restored={}, seconds=time.perf_counter() - started)
    for place, name in names.items():
        found.take(name, weights[name], restored[place].detach().float().flatten(1).contiguous(), bits)
    return found


def cell(task: Task, folder: Path) -> dict[str, Any]:
    """Do it, write it, and tell the row of the JSON file."""
    with PeakMemory() as peak:
        found = (whole if task.setting.whole else rounded)(task, folder / task.model)
    if found.restored:
        (folder / task.file).parent.mkdir(exist_ok=True)
        save_file(found.restored, folder / task.file)
    return task.told | {
        "file": task.file if found.restored else None,
        "stored_bits": found.bits,
        "seconds": found.seconds,
        "peak_mb": peak.megabytes,
        "refused": found.refused,
        "failure": found.failure,
    }


def failed(task: Task, words: str) -> dict[str, Any]:
    """The row of a cell that its process did not outlive."""
    return task.told | {"file": None, "stored_bits": 0, "failure": shortened(words)}


def cells(package: str, ask: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All cells of one package; after a death the next process goes on behind the cell that it happened in."""
    todo = tasks(ask.models, package, ask.bits)
    while left := missing(todo, ask.folder):
        stderr, status = run(package, ask)
        for died in missing(left, ask.folder)[:1]:
            note(failed(died, raised(stderr, status)), ask.folder)
    known = noted(ask.folder)
    yield from (known[key_of(task.told)] for task in todo)


def run(package: str, ask: argparse.Namespace) -> tuple[str, int]:
    """A process of its own, which notes its cells."""
    command = [sys.executable, __file__, "--folder", str(ask.folder), "--threads", str(ask.threads)]
    command += ["--models", *ask.models, "--bits", *map(str, ask.bits), "--child", package]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    return done.stderr, done.returncode


def child(package: str, ask: argparse.Namespace) -> None:
    """What `run` runs."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["GPTQMODEL_CPU_WORKERS"] = "2"  # as it comes it makes one on two cores, and asks itself for two
    for task in missing(tasks(ask.models, package, ask.bits), ask.folder):
        note(cell(task, ask.folder), ask.folder)


# What is known already


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """What tells one cell from another."""
    return tuple(row[key] for key in ("model", "peer", "setting", "bits"))


def noted(folder: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Rows of cells that are done."""
    notes = folder / NOTES
    rows = map(json.loads, notes.read_text().splitlines()) if notes.exists() else ()
    return {key_of(row): row for row in rows}


def note(row: dict[str, Any], folder: Path) -> None:
    """Keep one row."""
    with (folder / NOTES).open("a") as file:
        file.write(json.dumps(row) + "\n")


def missing(todo: Iterable[Task], folder: Path) -> list[Task]:
    """Those that are not done yet."""
    known = noted(folder)
    return [task for task in todo if key_of(task.told) not in known]


def line(row: dict[str, Any]) -> str:
    head = f"{row['model']:<10} INT{row['bits']} {row['peer']}, {row['setting']}"
    if row["file"] is None:
        return f"{head}: {row['failure']}"
    left = f", {row['refused']} weights left: {row['failure']}" if row["refused"] else ""
    return f"{head}: {row['seconds']:.1f} s, {row['peak_mb']:.0f} MB{left}"


def asked() -> argparse.Namespace:
    packages = list(dict.fromkeys(setting.package for setting in SETTINGS))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--models", nargs="+", required=False, help="folders in it; all")
    parser.add_argument("--packages", nargs="+", choices=packages, default=packages)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    ask = parser.parse_args()
    ask.models = ask.models or sorted(file.parent.name for file in ask.folder.glob("*/model.json"))
    return ask


def main() -> None:
    ask = asked()
    torch.set_num_threads(ask.threads)
    if ask.child:
        child(ask.child, ask)
        return
    rows = []
    for package in ask.packages:
        for row in cells(package, ask):
            rows.append(row)
            print(line(row), flush=True)
    if ask.json:
        ask.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()

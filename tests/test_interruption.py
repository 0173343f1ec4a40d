"""Runs that are killed, stopped, repeated or misled: what they leave, and how they end."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest
import torch
from small_models import ENVIRONMENT, content_of, layers, run_python, save_model

from arrow_quant_v2 import ArrowQuantV2, ConfigurationError, DiffusionQuantConfig, QuantizationError
from arrow_quant_v2 import budget as budget_room
from arrow_quant_v2 import workfolder as workfolder_room
from arrow_quant_v2.errors import ArrowQuantError, InterruptedRunError, StoreError
from arrow_quant_v2.plan import plan_model
from arrow_quant_v2.sources.folder import open_model
from arrow_quant_v2.store import StoredModel

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

KILLED = """
import importlib, json, os, signal, sys, torch
from arrow_quant_v2 import ArrowQuantV2, DiffusionQuantConfig

ArrowQuantV2().quantize({"w": torch.ones(8, 8)})  # what torch imports late is imported once, not in every child

def kill(*_args, **_more):
    os.kill(os.getpid(), signal.SIGKILL)

def run(model, out, moment, overwrite):
    told = []
    def report(message, _):
        told.append(message)
        if moment == f"layer {len(told)}":
            kill()
    if ":" in moment:  # a function that does not come to its end
        module, name = moment.split(":")
        setattr(importlib.import_module(f"arrow_quant_v2.{module}"), name, kill)
    config = DiffusionQuantConfig(group_size=64, threads=2)
    ArrowQuantV2().quantize_diffusion_model(model, out, config, report, overwrite=overwrite)

for arguments in json.loads(sys.argv[1]):
    child = os.fork()
    if not child:
        run(*arguments)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
PLACES = [
    "store.writer:seal",
    "publish:merge_parts",
    "publish:copy_file",
    "publish:write_json",
    "orchestrator:assemble",
]

api = ArrowQuantV2()


def quantize(model: Path, out: Path, *, overwrite: bool = False, **settings: object) -> dict[str, object]:
    config = DiffusionQuantConfig(**{"group_size": 64, **settings})
    return api.quantize_diffusion_model(model, out, config, overwrite=overwrite)


def kill_runs(*runs: tuple[Path, Path, str, bool]) -> None:
    """Runs of (model, out, moment, overwrite), each killed at its moment: one program, for torch is slow to import."""
    done = run_python(KILLED, json.dumps([[str(model), str(out), *more] for model, out, *more in runs]))
    assert (done.code, done.out.split()) == (0, [str(-signal.SIGKILL)] * len(runs)), done.err


def stopped(model: Path, out: Path, after: int, **settings: object) -> None:
    """A run that was asked to stop after some layers."""
    config = DiffusionQuantConfig(**{"group_size": 64, **settings})
    answers = iter([False] * (after - 1) + [True])
    with pytest.raises(InterruptedRunError, match=rf"stopped after {after} of \d+ layers; they are kept in .*partial"):
        api.quantize_diffusion_model(model, out, config, should_stop=lambda: next(answers))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_model(tmp_path / "model")


@pytest.fixture
def whole(model: Path, tmp_path: Path) -> dict[str, bytes]:
    """What an uninterrupted run gives."""
    quantize(model, tmp_path / "whole")
    return content_of(tmp_path / "whole")


# killed


@pytest.fixture(scope="module")
def graveyard(tmp_path_factory: pytest.TempPathFactory, minilm: Path) -> Path:
    """A small model, what an uninterrupted run makes of it, and what runs left that were killed."""
    folder = tmp_path_factory.mktemp("killed")
    model = save_model(folder / "model")
    quantize(model, folder / "whole")
    quantize(model, folder / "finished", bit_width=8)
    kill_runs(
        *((minilm, folder / "minilm", f"layer {count}", False) for count in (1, 40, 104)),
        *((model, folder / place, place, False) for place in PLACES),
        *((model, folder / "finished", moment, True) for moment in ("layer 3", "publish:copy_file")),
    )
    return folder


def test_a_real_model_killed_several_times_ends_with_the_same_bytes(
    graveyard: Path, quantized: Callable[..., object]
) -> None:
    done = quantized("minilm", 4)
    assert not (graveyard / "minilm").exists()
    assert len(list((graveyard / "minilm.partial" / "parts").iterdir())) == 104
    quantize(done.original, graveyard / "minilm")
    assert content_of(graveyard / "minilm") == content_of(done.path)
    assert not (graveyard / "minilm.partial").exists()


@pytest.mark.parametrize("place", PLACES)
def test_a_run_killed_anywhere_ends_with_the_same_bytes(place: str, graveyard: Path) -> None:
    assert not (graveyard / place).exists()
    assert (graveyard / f"{place}.partial").exists()
    quantize(graveyard / "model", graveyard / place)
    assert content_of(graveyard / place) == content_of(graveyard / "whole")
    assert not (graveyard / f"{place}.partial").exists()


def test_a_killed_run_leaves_the_model_that_it_was_to_replace(graveyard: Path) -> None:
    assert {one["bit_width"] for one in api.inspect(graveyard / "finished")["layers"]} == {8, 32}
    quantize(graveyard / "model", graveyard / "finished", overwrite=True)
    assert content_of(graveyard / "finished") == content_of(graveyard / "whole")


def test_only_what_is_missing_is_made_again(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped(model, tmp_path / "out", after=20)
    made = []
    write = sys.modules["arrow_quant_v2.orchestrator"].write_part
    monkeypatch.setattr(
        "arrow_quant_v2.orchestrator.write_part", lambda path, *more: (made.append(path.stem), write(path, *more))
    )
    quantize(model, tmp_path / "out")
    assert made == [f"{index:05d}" for index in range(20, 24)]


def test_a_damaged_part_is_made_again(model: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    stopped(model, tmp_path / "out", after=10)
    parts = sorted((tmp_path / "out.partial" / "parts").iterdir())
    for part, cut in zip(parts, (0, 10, 5000), strict=False):
        part.write_bytes(part.read_bytes()[:cut])
    content = bytearray(parts[5].read_bytes())
    content[200] ^= 4
    parts[5].write_bytes(content)
    parts[7].unlink()
    quantize(model, tmp_path / "out")
    assert content_of(tmp_path / "out") == whole


def test_a_part_that_is_another_layer_s_is_made_again(model: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    stopped(model, tmp_path / "out", after=10)
    parts = sorted((tmp_path / "out.partial" / "parts").iterdir())
    parts[1].write_bytes(parts[3].read_bytes())
    quantize(model, tmp_path / "out")
    assert content_of(tmp_path / "out") == whole


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_make_no_difference(threads: int, quantized: Callable[..., object], tmp_path: Path) -> None:
    done = quantized("minilm", 2)
    quantize(done.original, tmp_path / "out", bit_width=2, threads=threads)
    assert content_of(tmp_path / "out") == content_of(done.path)


def test_the_memory_allowed_makes_no_difference(
    quantized: Callable[..., object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = quantized("minilm", 4)
    monkeypatch.setattr(budget_room, "resident_bytes", lambda: 300 * 2**20)
    needed = budget_room.plan_budget(budget_plans(done.original), DiffusionQuantConfig(threads=1)).peak_bytes
    quantize(done.original, tmp_path / "out", max_memory=needed - 20 * 2**20, threads=2)
    assert content_of(tmp_path / "out") == content_of(done.path)


def budget_plans(path: Path) -> tuple[object, ...]:
    with open_model(path) as opened:
        return plan_model(opened.source.tensors, DiffusionQuantConfig(group_size=64))


def test_settings_that_do_not_change_the_result_may_change_in_between(
    model: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    stopped(model, tmp_path / "out", after=5, threads=1)
    quantize(model, tmp_path / "out", threads=2, max_memory="8GB", fail_fast=True)
    assert content_of(tmp_path / "out") == whole


# stopped


def test_ctrl_c_says_how_to_go_on_and_that_works(tmp_path: Path, arrow_quant: Callable[..., object]) -> None:
    model, out = save_model(tmp_path / "model", layers(40, 512, 512)), tmp_path / "a name with spaces"
    arguments = ["quantize", str(model), str(out), "--bits", "2"]
    slow = ENVIRONMENT | {"ARROW_QUANT_KERNELS": "reference"}  # the same result, ten times slower
    process = subprocess.Popen(
        [sys.executable, "-m", "arrow_quant_v2", *arguments], env=slow, stderr=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    first = process.stderr.readline()
    process.send_signal(signal.SIGINT)
    said, problems = process.communicate(timeout=60)
    assert process.returncode == 130, problems
    assert "1/80" in first
    assert said == ""
    assert "stopping after this layer; press Ctrl-C again to stop at once" in problems
    assert re.search(r"stopped after \d+ of 80 layers; they are kept in .*a name with spaces.partial", problems)
    (command,) = re.findall(r"^go on with: arrow-quant (.*)$", problems, re.MULTILINE)
    assert shlex.split(command) == arguments
    assert "Traceback" not in problems
    assert not out.exists()

    assert arrow_quant(*shlex.split(command)).code == 0
    api.quantize_diffusion_model(model, tmp_path / "whole", DiffusionQuantConfig(bit_width=2))
    assert content_of(out) == content_of(tmp_path / "whole")


def test_an_interrupt_from_python_leaves_a_run_that_goes_on(
    model: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    def interrupt(message: str, _: float) -> None:
        if message.startswith("9/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        api.quantize_diffusion_model(model, tmp_path / "out", DiffusionQuantConfig(group_size=64), interrupt)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("arrow-quant")]
    quantize(model, tmp_path / "out")
    assert content_of(tmp_path / "out") == whole


def test_being_asked_to_stop_after_the_last_layer_changes_nothing(model: Path, tmp_path: Path) -> None:
    answers = iter([False] * 23 + [True])
    api.quantize_diffusion_model(model, tmp_path / "out", should_stop=lambda: next(answers))
    assert (tmp_path / "out" / "metadata.json").exists()


def test_unfinished_work_is_no_model(model: Path, tmp_path: Path) -> None:
    stopped(model, tmp_path / "out", after=10)
    for place in ("out.partial", "out.partial/parts"):
        with pytest.raises(ArrowQuantError):
            open_model(tmp_path / place)
        with pytest.raises(StoreError):
            StoredModel(tmp_path / place)
    assert list(tmp_path.rglob("*.parquet")) == []


# misled


@pytest.mark.parametrize(
    ("settings", "what"),
    [({"bit_width": 2}, "another configuration"), ({"modality": "code"}, "another configuration and modality")],
)
def test_another_configuration_is_refused(settings: dict[str, object], what: str, model: Path, tmp_path: Path) -> None:
    stopped(model, tmp_path / "out", after=4)
    before = content_of(tmp_path)
    with pytest.raises(ConfigurationError, match=f"out.partial: holds unfinished work on {what}; finish that with"):
        quantize(model, tmp_path / "out", **settings)
    assert content_of(tmp_path) == before


def test_another_model_is_refused(model: Path, tmp_path: Path) -> None:
    stopped(model, tmp_path / "out", after=4)
    other = save_model(tmp_path / "other", layers(13))
    before = content_of(tmp_path)
    with pytest.raises(ConfigurationError, match="holds unfinished work on another model; finish that with"):
        quantize(other, tmp_path / "out")
    assert content_of(tmp_path) == before


def test_a_model_whose_values_changed_is_refused(model: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    stopped(model, tmp_path / "out", after=4)
    before = content_of(tmp_path / "out.partial")
    tensors = layers()
    tensors["layers.01.weight"][5, 5] += 1e-3
    save_model(model, tensors)
    with pytest.raises(
        ConfigurationError, match=r"layers\.01\.weight: has other values .*; restore it, or remove .*out"
    ):
        quantize(model, tmp_path / "out")
    assert content_of(tmp_path / "out.partial") == before
    save_model(model)
    quantize(model, tmp_path / "out")
    assert content_of(tmp_path / "out") == whole


def test_a_second_run_at_once_is_refused(model: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    refused: list[str] = []

    def start_another(_message: str, _fraction: float) -> None:
        with pytest.raises(StoreError) as caught:
            quantize(model, tmp_path / "out")
        refused.append(str(caught.value))

    api.quantize_diffusion_model(model, tmp_path / "out", DiffusionQuantConfig(group_size=64), start_another)
    assert len(refused) == 24
    assert "out.partial: another run is working there; wait for it" in refused[0]
    assert content_of(tmp_path / "out") == whole


def test_work_that_has_no_layer_yet_holds_nobody_back(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial" / "parts").mkdir(parents=True)
    (tmp_path / "out.partial" / "run.json").write_text('{"half')
    (tmp_path / "out.partial" / "parts" / "00000.part.tmp").write_text("cut short")
    quantize(model, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


# what lies there already


def test_a_finished_model_is_replaced_only_when_asked(model: Path, tmp_path: Path) -> None:
    quantize(model, tmp_path / "out", bit_width=8)
    before = content_of(tmp_path)
    with pytest.raises(ConfigurationError, match="is a finished model already; choose another name, or --overwrite"):
        quantize(model, tmp_path / "out")
    assert content_of(tmp_path) == before
    quantize(model, tmp_path / "out", bit_width=2, overwrite=True)
    assert api.inspect(tmp_path / "out")["layers"][1]["bit_width"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_is_not_ours_is_never_replaced(kind: str, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if kind == "folder":
        save_model(out)
    elif kind == "file":
        out.write_text("a thesis")
    else:
        out.symlink_to(tmp_path / "nowhere")
    before = content_of(tmp_path)
    with pytest.raises(ConfigurationError, match="exists and is no quantized model; choose another output folder"):
        quantize(model, out, overwrite=True)
    assert content_of(tmp_path) == before
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("failure", ["stopped", "not finite", "disk"])
def test_a_failed_run_leaves_a_finished_model_alone(
    failure: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize(model, tmp_path / "out")
    before = content_of(tmp_path / "out")
    if failure == "stopped":
        with pytest.raises(InterruptedRunError):
            api.quantize_diffusion_model(model, tmp_path / "out", overwrite=True, should_stop=lambda: True)
    elif failure == "not finite":
        tensors = layers()
        tensors["layers.07.weight"][0, 0] = torch.inf
        save_model(model, tensors)
        with pytest.raises(QuantizationError):
            quantize(model, tmp_path / "out", overwrite=True)
    else:
        refuse_to_name(monkeypatch, tmp_path / "out")
        with pytest.raises(StoreError, match="no room on it"):
            quantize(model, tmp_path / "out", overwrite=True)
    assert content_of(tmp_path / "out") == before


def refuse_to_name(monkeypatch: pytest.MonkeyPatch, out: Path) -> None:
    """Let the rename that finishes a model fail."""
    rename = workfolder_room.Path.rename

    def refused(path: Path, target: Path) -> Path:
        if target == out and path.name == "model":
            raise OSError(28, "no room on it")
        return rename(path, target)

    monkeypatch.setattr(workfolder_room.Path, "rename", refused)


def test_a_replacement_cut_short_between_its_two_renames_is_undone(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize(model, out, bit_width=8)
    before = content_of(out)
    stopped_with = DiffusionQuantConfig(group_size=64)
    with pytest.raises(InterruptedRunError):
        api.quantize_diffusion_model(model, out, stopped_with, overwrite=True, should_stop=lambda: True)
    out.rename(tmp_path / "out.partial" / "old")  # as far as a killed run came
    with pytest.raises(ConfigurationError, match="is a finished model already"):
        quantize(model, out)
    assert content_of(out) == before
    out.rename(tmp_path / "out.partial" / "old")
    quantize(model, out, overwrite=True)
    assert api.inspect(out)["layers"][1]["bit_width"] == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]

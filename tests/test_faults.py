"""Disks that fill up, folders without permission and models that change: one error, no output, and a way on."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from small_models import content_of, save_model

from arrow_quant_v2 import ArrowQuantError, ArrowQuantV2, DiffusionQuantConfig, budget
from arrow_quant_v2.errors import SourceError, StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NOBODY = 65534

api = ArrowQuantV2()


@contextlib.contextmanager
def files_of_at_most(count: int) -> Iterator[None]:
    """The kernel refuses to let any file grow beyond `count` bytes, in the middle of a write, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def without_privileges() -> Iterator[None]:
    """Permissions count, also where the tests are run by root."""
    if os.geteuid():
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def public(tmp_path: Path) -> Iterator[Path]:
    """A folder that everybody may reach, unlike those of pytest."""
    with tempfile.TemporaryDirectory(prefix="arrow-quant-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = save_model(tmp_path / "model")
    (folder / "large.txt").write_text("x" * 400_000)
    return folder


@pytest.fixture
def whole(model: Path, tmp_path: Path) -> dict[str, bytes]:
    """What an undisturbed run gives."""
    api.quantize_diffusion_model(model, tmp_path / "whole")
    return content_of(tmp_path / "whole")


def copy_for_all(model: Path, copy: Path) -> None:
    shutil.copytree(model, copy)
    for path in copy.iterdir():
        path.chmod(0o644)


def refused(kind: type[ArrowQuantError], act: Callable[[], object]) -> str:
    with pytest.raises(ArrowQuantError) as caught:
        act()
    assert type(caught.value) is kind
    return str(caught.value)


@pytest.mark.parametrize(
    ("room", "fails_at"),
    [
        (20, "run.json"),
        (4_000, "00000.part"),  # the first layer
        (40_000, "weights-00001-of-00001.parquet"),  # parts fit, all of them together do not
        (300_000, "large.txt"),  # a file beside the weights
    ],
)
def test_a_full_disk_is_one_error_and_a_later_run_finishes(
    room: int, fails_at: str, model: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    with files_of_at_most(room):
        message = refused(StoreError, lambda: api.quantize_diffusion_model(model, tmp_path / "out"))
    assert "out.partial" in message
    assert fails_at in message or fails_at == "run.json"
    assert "room and permission" in message
    assert not (tmp_path / "out").exists()
    left = {path.name for path in tmp_path.iterdir()} - {"model", "whole"}
    assert left == ({"out.partial"} if room > 10_000 else set())  # without a finished layer there is nothing to keep
    assert ("out.partial, and the same settings go on with it" in message) == (room > 10_000)
    assert not (tmp_path / "out.partial" / "model").exists()  # what was half-written makes room
    api.quantize_diffusion_model(model, tmp_path / "out")
    assert content_of(tmp_path / "out") == whole


def test_a_disk_that_fills_up_later_keeps_what_is_finished(
    model: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    def shrink(message: str, _: float) -> None:
        if message.startswith("11/"):
            limits.enter_context(files_of_at_most(1000))

    with contextlib.ExitStack() as limits:
        refused(StoreError, lambda: api.quantize_diffusion_model(model, tmp_path / "out", progress_callback=shrink))
    assert len(list((tmp_path / "out.partial" / "parts").iterdir())) == 11
    api.quantize_diffusion_model(model, tmp_path / "out")
    assert content_of(tmp_path / "out") == whole


@pytest.mark.parametrize("room", [1000, 100_000])
def test_convert_leaves_nothing_on_a_full_disk(room: int, model: Path, tmp_path: Path) -> None:
    api.quantize_diffusion_model(model, tmp_path / "out")
    with files_of_at_most(room):
        refused(StoreError, lambda: api.convert(tmp_path / "out", tmp_path / "back"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


def test_a_folder_that_may_not_be_written_is_one_error(model: Path, public: Path) -> None:
    copy_for_all(model, public / "model")
    locked = public / "locked"
    locked.mkdir(mode=0o555)
    with without_privileges():
        message = refused(StoreError, lambda: api.quantize_diffusion_model(public / "model", locked / "out"))
        assert "Permission denied; give it room and permission" in message
        refused(StoreError, lambda: api.convert(public / "model", locked / "out"))
    assert list(locked.iterdir()) == []


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "large.txt"])
def test_a_file_that_may_not_be_read_is_one_error_before_the_work(name: str, model: Path, public: Path) -> None:
    copy_for_all(model, public / "model")
    (public / "model" / name).chmod(0)
    heard: list[str] = []
    (public / "place").mkdir()
    (public / "place").chmod(0o777)
    with without_privileges():
        message = refused(
            SourceError,
            lambda: api.quantize_diffusion_model(
                public / "model", public / "place" / "out", progress_callback=lambda said, _: heard.append(said)
            ),
        )
    assert name in message
    assert (heard, list((public / "place").iterdir())) == ([], [])


def test_permission_lost_while_running_is_one_error_and_a_later_run_finishes(model: Path, public: Path) -> None:
    copy_for_all(model, public / "model")
    place = public / "place"
    place.mkdir()
    place.chmod(0o777)

    def lock(message: str, _: float) -> None:
        if message.startswith("5/"):
            (place / "out.partial" / "parts").chmod(0o555)

    with without_privileges():
        refused(
            StoreError,
            lambda: api.quantize_diffusion_model(public / "model", place / "out", progress_callback=lock),
        )
        (place / "out.partial" / "parts").chmod(0o755)
        api.quantize_diffusion_model(public / "model", place / "out")
    assert [path.name for path in place.iterdir()] == ["out"]


@pytest.mark.parametrize("what", ["weights", "file beside"])
def test_a_model_that_changes_under_the_run_is_one_error(
    what: str, model: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "RESULTS_AHEAD", 0)  # or so small a model is read before its third layer is written

    def change(message: str, _: float) -> None:
        if message.startswith("3/") and what == "weights":
            os.truncate(model / "model.safetensors", 100_000)
        if message.startswith("3/") and what != "weights":
            (model / "large.txt").unlink()

    message = refused(
        SourceError, lambda: api.quantize_diffusion_model(model, tmp_path / "out", progress_callback=change)
    )
    assert ("model.safetensors: ends at byte" in message) if what == "weights" else ("large.txt: cannot be" in message)
    assert not (tmp_path / "out").exists()
    save_model(model)
    (model / "large.txt").write_text("x" * 400_000)
    api.quantize_diffusion_model(model, tmp_path / "out")
    assert content_of(tmp_path / "out") == whole


def test_an_output_below_a_file_is_one_error(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(StoreError, lambda: api.quantize_diffusion_model(model, tmp_path / "file" / "out"))


def test_a_name_that_no_disk_takes_is_one_error(model: Path, tmp_path: Path) -> None:
    refused(StoreError, lambda: api.quantize_diffusion_model(model, tmp_path / ("x" * 300)))


def test_a_config_of_a_million_brackets_is_one_clear_error(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    (model / "config.json").write_text("[" * 1_000_000)
    with pytest.raises(SourceError, match=r"config\.json: not valid JSON"):
        ArrowQuantV2().quantize_diffusion_model(model, tmp_path / "out", DiffusionQuantConfig(modality="text"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]

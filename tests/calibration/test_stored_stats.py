"""Stats in a folder: what is written is read again, and what is damaged or hostile is refused in one sentence."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from arrow_quant_v2 import __version__
from arrow_quant_v2.calibration.stats import InputStats, Seen, moments_of
from arrow_quant_v2.calibration.stored_stats import (
    KeptInput,
    KeptSamples,
    KeptStats,
    Summary,
    is_stats,
    write_input,
    write_summary,
)
from arrow_quant_v2.errors import ChecksumError, SchemaVersionError, StoreError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

COLUMNS, GROUPS = 6, 2
LAYERS = ("a.weight", "b.weight")


def seen(seed: int, rows: int = 5) -> Seen:
    x = torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(seed))
    return Seen(rows=x, moments=moments_of(x), absmax=x.abs().amax(dim=0))


def alone(*seeds: int) -> InputStats:
    """What one time group saw."""
    stats = InputStats(LAYERS, 1, columns=COLUMNS, channels=COLUMNS)
    stats.add([seen(seed) for seed in seeds], [0] * len(seeds), [1.0] * len(seeds))
    return stats


def summary(*inputs: KeptInput, apart: bool = True, sizes: tuple[int, ...] = (1, 3)) -> Summary:
    return Summary(
        program_version=__version__,
        asked={"seed": 0},
        model="m",
        model_content="c",
        component="",
        modality="text",
        mask_token=None,
        apart=apart,
        time_groups=(0.0, 0.5, 1.0),
        samples=(KeptSamples(origin="texts", identity="i", synthetic=False, count=4, sizes=sizes),),
        inputs=inputs,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One input in two time groups: one sample of the first, three of the second."""
    files = tuple(write_input(tmp_path, 0, group, alone(*seeds)) for group, seeds in enumerate([(1,), (2, 3, 4)]))
    write_summary(tmp_path, summary(KeptInput(layers=LAYERS, columns=COLUMNS, channels=COLUMNS, files=files)))
    return tmp_path


def test_what_is_written_is_read_again(folder: Path) -> None:
    kept = KeptStats(folder)
    part = kept.part(0, 1)
    assert part is not None
    mine, stored = alone(2, 3, 4).tensors(), part.tensors()
    assert mine.keys() == stored.keys()
    assert all(torch.equal(mine[name], stored[name]) for name in mine)
    assert (kept.summary.count, kept.summary.sizes, kept.summary.origin) == (4, (1, 3), "4 samples of texts")
    assert kept.summary.layers == LAYERS


def test_every_time_group_has_the_same_say(folder: Path) -> None:
    stats = KeptStats(folder).read(0)
    whole = InputStats(LAYERS, GROUPS, columns=COLUMNS, channels=COLUMNS)
    whole.add([seen(seed) for seed in (1, 2, 3, 4)], [0, 1, 1, 1], [4 / 2, 4 / 6, 4 / 6, 4 / 6])
    torch.testing.assert_close(stats.second.matrix, whole.second.matrix, rtol=1e-5, atol=1e-5)
    assert stats.count == whole.count
    assert stats.spread() == whole.spread()
    for name in ("moments", "absmax", "sums", "rows", "probes.0", "probes.1"):
        assert torch.equal(stats.tensors()[name], whole.tensors()[name])


def of_parts(*seen_by: tuple[int, tuple[int, int]]) -> InputStats:
    """What one time group saw of a weight whose rows have inputs of their own."""
    stats = InputStats(LAYERS[:1], 1, columns=COLUMNS, channels=COLUMNS)
    stats.add([replace(seen(seed), part=rows) for seed, rows in seen_by], [0] * len(seen_by), [1.0] * len(seen_by))
    return stats


def written_in_parts(folder: Path, parts: tuple[tuple[int, int], ...]) -> None:
    first, second = of_parts((1, (0, 4))), of_parts((2, (0, 4)), (3, (4, 8)), (4, (4, 8)))
    files = tuple(write_input(folder, 0, group, stats) for group, stats in enumerate([first, second]))
    entry = KeptInput(layers=LAYERS[:1], columns=COLUMNS, channels=COLUMNS, parts=parts, files=files)
    write_summary(folder, summary(entry))


def test_rows_that_have_inputs_of_their_own_are_kept_apart(tmp_path: Path) -> None:
    written_in_parts(tmp_path, ((0, 4), (4, 8)))
    kept = KeptStats(tmp_path).read(0)
    assert {part: own.count for part, own in kept.parts.items()} == {(0, 4): 10, (4, 8): 10}
    only = seen(3).rows.mT @ seen(3).rows + seen(4).rows.mT @ seen(4).rows
    torch.testing.assert_close(kept.parts[4, 8].second.matrix, only * 4 / (2 * 3), rtol=1e-5, atol=1e-5)
    again = KeptStats(tmp_path).read(0)
    again.merge(kept)
    torch.testing.assert_close(again.parts[4, 8].second.matrix, 2 * kept.parts[4, 8].second.matrix)
    assert again.parts[0, 4].count == 20


def test_rows_of_which_the_summary_knows_nothing_are_refused(tmp_path: Path) -> None:
    written_in_parts(tmp_path, ((0, 4),))
    with pytest.raises(StoreError, match=r"holds rows \(4, 8\), of which stats\.json knows nothing"):
        KeptStats(tmp_path)


def test_a_time_group_in_which_nothing_was_seen_is_empty(tmp_path: Path) -> None:
    files = (None, write_input(tmp_path, 0, 1, alone(1)))
    write_summary(tmp_path, summary(KeptInput(layers=LAYERS, columns=COLUMNS, channels=COLUMNS, files=files)))
    kept = KeptStats(tmp_path)
    assert kept.part(0, 0) is None
    assert kept.read(0).spread()["max"][0] == 0.0


def test_the_identity_is_that_of_the_content(folder: Path) -> None:
    before = KeptStats(folder).identity
    text = (folder / "stats.json").read_text()
    (folder / "stats.json").write_text(text.replace('"seed": 0', '"seed": 1'))
    assert KeptStats(folder).identity != before


def test_a_folder_of_something_else_is_no_stats(tmp_path: Path) -> None:
    assert not is_stats(tmp_path)
    (tmp_path / "stats.json").write_text('{"runs": 3}')
    assert not is_stats(tmp_path)
    with pytest.raises(StoreError, match="its format is 'None'; 'arrow_quant_stats' is needed"):
        KeptStats(tmp_path)


# hostile


def changed(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads((folder / "stats.json").read_text())
    change(content)
    (folder / "stats.json").write_text(json.dumps(content))


def file(content: dict[str, Any]) -> dict[str, Any]:
    return content["inputs"][0]["files"][0]


WRONG: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "version": (lambda c: c.update(version=3), "has version 3; this program reads 1 and 2"),
    "format": (lambda c: c.update(format="gguf"), "its format is 'gguf'"),
    "climbs": (lambda c: file(c).update(name="../../secret.safetensors"), "inputs.0.files.0.name is '../../secret"),
    "absolute": (lambda c: file(c).update(name="/etc/passwd"), "inputs.0.files.0.name is '/etc/passwd'"),
    "other name": (lambda c: file(c).update(name="00000-000.safetensors\n"), r"inputs.0.files.0.name is '00000-000"),
    "missing": (lambda c: file(c).update(name="00009.safetensors"), "00009.safetensors: does not exist"),
    "unknown entry": (lambda c: c.update(code="import os"), "code is 'import os'"),
    "no inputs": (lambda c: c.pop("inputs"), "inputs is .*: Field required"),
    "text for a number": (lambda c: c["inputs"][0].update(columns="6"), "inputs.0.columns is '6'"),
    "negative": (lambda c: c["inputs"][0].update(columns=-6), "inputs.0.columns is -6"),
    "too few files": (lambda c: c["inputs"][0]["files"].pop(), "has 1 files; 2 are needed"),
    "no layers": (lambda c: c["inputs"][0].update(layers=[]), "inputs.0.layers is"),
    "twice": (lambda c: c["inputs"].append(c["inputs"][0]), "a layer belongs to two inputs"),
    "edges": (lambda c: c.update(time_groups=[1.0, 0.0, 2.0]), "the edges of time groups are"),
    "counts": (lambda c: c["samples"][0].update(sizes=[1]), "not counted for each of its 2 time groups"),
    "no samples": (lambda c: c["samples"][0].update(sizes=[0, 0]), "not counted for each"),
    "columns": (lambda c: c["inputs"][0].update(columns=7), "tensor probes.0 is float32 .5, 6.; float32 .5, 7. is"),
    "channels": (lambda c: c["inputs"][0].update(channels=3), "tensor absmax is float32 .1, 6.; float32 .1, 3. is"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_entry_is_refused(name: str, folder: Path) -> None:
    change, said = WRONG[name]
    changed(folder, change)
    with pytest.raises(StoreError, match=said) as caught:
        KeptStats(folder)
    assert "\n" not in str(caught.value)


def test_a_newer_version_is_told_as_such(folder: Path) -> None:
    changed(folder, lambda content: content.update(version=3))
    with pytest.raises(SchemaVersionError):
        KeptStats(folder)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_text_that_is_no_object_is_refused(text: bytes, folder: Path) -> None:
    (folder / "stats.json").write_bytes(text)
    with pytest.raises(StoreError, match=r"stats\.json"):
        KeptStats(folder)


@pytest.mark.parametrize("cut", [0, 7, 100, -1])
def test_a_file_that_was_cut_short_is_refused(cut: int, folder: Path) -> None:
    path = folder / "00000-001.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(StoreError, match=r"00000-001\.safetensors: not a valid safetensors file"):
        KeptStats(folder)


def test_a_flipped_bit_is_found_where_it_is_read(folder: Path) -> None:
    path = folder / "00000-001.safetensors"
    content = bytearray(path.read_bytes())
    content[-40] ^= 1
    path.write_bytes(content)
    kept = KeptStats(folder)
    assert kept.part(0, 0) is not None
    with pytest.raises(ChecksumError, match=r"00000-001\.safetensors: its bytes are not those that were written"):
        kept.read(0)


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    [
        ("second", torch.zeros(6, 5), r"tensor second is float32 \(6, 5\); float32 \(6, 6\) is needed"),
        ("second", torch.zeros(6, 6, dtype=torch.float16), r"tensor second is float16 \(6, 6\)"),
        ("probes.0", torch.zeros(65, 6), r"tensor probes.0 is float32 \(65, 6\); float32 \(64, 6\)"),
        ("probes.1", torch.zeros(1, 6), r"tensor probes.1 is float32 \(1, 6\); nothing is needed"),
        ("rows", None, r"tensor rows is nothing; int64 \(1,\) is needed"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(name: str, tensor: torch.Tensor | None, said: str, folder: Path) -> None:
    path = folder / "00000-000.safetensors"
    tensors = load_file(path) | ({} if tensor is None else {name: tensor})
    if tensor is None:
        tensors.pop(name)
    save_file(tensors, path)
    with pytest.raises(StoreError, match=said):
        KeptStats(folder)


@pytest.mark.parametrize("name", ["second", "absmax", "sums"])
def test_values_that_are_not_finite_are_refused(name: str, tmp_path: Path) -> None:
    stats = alone(1)
    stats.tensors()[name].view(-1)[0] = torch.nan
    files = (write_input(tmp_path, 0, 0, stats), None)
    write_summary(tmp_path, summary(KeptInput(layers=LAYERS, columns=COLUMNS, channels=COLUMNS, files=files)))
    with pytest.raises(StoreError, match=f"tensor {name} holds NaN or infinity"):
        KeptStats(tmp_path).read(0)

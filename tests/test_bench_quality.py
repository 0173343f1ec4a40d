"""The table of quality beside peers: who counts as closer, and what is said where a peer wins."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def table(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(BENCH)])
    return importlib.import_module("quality_table")


@pytest.fixture
def cell(table):
    def made(peer, stored, error, **more):
        return table.Cell(
            **{"model": "m", "peer": peer, "setting": "", "bits": 2, "stored": stored, "error": error} | more
        )

    return made


def test_the_rival_is_the_closest_of_ours_that_is_no_larger(table, cell) -> None:
    ours = [cell(table.OURS, 2.1, 0.3), cell(table.OURS, 2.5, 0.2), cell(table.OURS, 3.0, 0.1)]
    assert table.rival(cell("peer", 2.5, 0.9), ours) is ours[1]
    assert table.rival(cell("peer", 2.0, 0.9), ours) is None
    assert table.rival(cell("peer", 9.0, 0.9, model="another"), ours) is None


def test_a_peer_that_is_closer_at_the_same_bits_is_named(table, cell) -> None:
    cells = [cell(table.OURS, 2.5, 0.2), cell("worse", 2.6, 0.4), cell("better", 2.6, 0.1), cell("small", 2.0, 0.9)]
    found = table.verdict("m", 2, cells)
    assert (found.beaten, found.winners, found.smaller) == (1, (cells[2],), (cells[3],))
    assert table.words(found) == ("closer than 1 of 3; not than better .1 (2.60); nothing as small as small .9 (2.00)")


def test_the_closest_peer_stands_beside_ours_with_no_more_bits(table, cell) -> None:
    cells = [
        cell(table.OURS, 2.5, 0.2),
        cell(table.OURS, 4.5, 0.01, bits=4),
        cell("far", 2.6, 0.4),
        cell("near", 2.7, 0.3),
    ]
    found = table.verdict("m", 2, cells)
    assert (found.closest, found.ours) == (cells[3], cells[0])
    assert table.pair(found) == "**.2 (2.50)** / .3 (2.70) near"


def test_a_peer_that_left_weights_or_took_another_widths_bits_is_not_the_closest(table, cell) -> None:
    cells = [
        cell(table.OURS, 2.5, 0.2),
        cell("left", 3.0, 0.1, refused=1),
        cell("bytes", 8.1, 0.1),
        cell("fair", 3.0, 0.4),
    ]
    assert table.verdict("m", 2, cells).closest is cells[3]


def test_a_cell_that_failed_says_why_and_counts_nowhere(table, cell) -> None:
    cells = [cell(table.OURS, 2.5, 0.2), cell("peer", 0.0, None, failure="ValueError: no 2 bits")]
    found = table.verdict("m", 2, cells)
    assert (found.beaten, found.closest) == (0, None)
    assert table.rows_of(2, cells)[1][:2] == ("peer", "ValueError: no 2 bits")


def test_a_tie_is_the_peers(table, cell) -> None:
    cells = [cell(table.OURS, 2.5, 0.2), cell("peer", 2.5, 0.2)]
    assert table.verdict("m", 2, cells).winners == (cells[1],)


def test_tables_of_a_page_are_made_again_between_their_marks(table, cell) -> None:
    cells = [cell(table.OURS, 2.5, 0.2), cell("near", 2.7, 0.3)]
    page = "before\n<!-- quality, in short -->\n| old |\n<!-- end of quality, in short -->\nbehind\n"
    found = table.filled(page, cells)
    assert found.startswith("before\n<!-- quality, in short -->\n\n| output error (bits) |")
    assert found.endswith("near |  |  |\n\n<!-- end of quality, in short -->\nbehind\n")
    assert table.filled(found, cells) == found
    assert table.filled("a page without", cells) == "a page without"


@pytest.fixture
def peers(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(BENCH / "peers")])
    monkeypatch.delitem(sys.modules, "quality", raising=False)  # that of ours has the same name
    found = importlib.import_module("quality")
    monkeypatch.setattr(found, "version", lambda _: "1.0")
    yield found
    sys.modules.pop("quality", None)


def test_peers_go_on_behind_the_cell_that_a_process_died_in(peers, monkeypatch, tmp_path) -> None:
    ask = argparse.Namespace(models=["m"], bits=[2, 4, 8], folder=tmp_path, threads=1)
    todo = peers.tasks(ask.models, "gguf", ask.bits)
    started: list[int] = []

    def one_cell_then_death(package: str, ask: argparse.Namespace) -> tuple[str, int]:
        left = peers.missing(todo, ask.folder)
        started.append(len(left))
        peers.note(peers.failed(left[0], "done"), ask.folder)
        return "MemoryError: too large", 1

    monkeypatch.setattr(peers, "run", one_cell_then_death)
    said = [row["failure"] for row in peers.cells("gguf", ask)]
    assert started == [4, 2]
    assert said == ["done", "exit status 1: MemoryError: too large"] * 2

    assert [row["failure"] for row in peers.cells("gguf", ask)] == said
    assert started == [4, 2]  # nothing was left to do


def test_a_weight_that_a_peer_passed_over_in_a_whole_model_counts_as_left(peers) -> None:
    found = peers.Rounded(restored={})
    found.take("rounded", torch.rand(2, 8), torch.zeros(2, 8), 2.5)
    head = torch.rand(4, 8)
    found.take("head", head, head.clone(), 2.5)
    assert (list(found.restored), found.refused) == (["rounded"], 1)
    assert found.bits == 2.5 * 16 + 16 * 32
    assert found.failure == "ValueError: head was left as it was, without a word"


@pytest.fixture
def speed(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(BENCH)])
    return importlib.import_module("speed_table")


def step(seconds, **more):
    return {"seconds": seconds, "error": 0.25, "load_seconds": 0.5, "peak_mb": 40.4, "file_mb": 9.96} | more


def peer(**more):
    return {"model": "m", "peer": "p (1.0)", "bits": 4, "dtype": "float32", "failure": None} | more


def test_a_step_stands_beside_float32_of_its_own_process(speed) -> None:
    own = {"original float32": step(0.2), "INT4": step(0.1)}
    rows = list(speed.rows_of("m", {"m": own, "peers": [peer(**step(0.4, fp32_seconds=0.3)), peer(model="other")]}))
    assert rows == [
        ("original float32", "200.0", "1.00", ".25", "0.50", "40", "10.0"),
        ("ArrowQuant, INT4", "100.0", "2.00", ".25", "0.50", "40", "10.0"),
        ("p (1.0), INT4, float32", "400.0", "0.75", ".25", "0.50", "40", "10.0"),
    ]


def test_a_peer_that_makes_no_step_or_cannot_be_loaded_says_why(speed) -> None:
    figures = {"m": {"original float32": step(0.2)}, "peers": [peer(failure="no\nkernel")]}
    assert list(speed.rows_of("m", figures))[1] == ("p (1.0), INT4, float32", "no kernel", *[""] * 5)
    assert speed.beginning({"load_failure": "cannot be pickled"}) == ("cannot be pickled", "")


def test_the_part_of_a_page_about_speed_is_made_again_between_its_marks(speed, tmp_path) -> None:
    figures = {"machine": {"cpu": "C", "threads": 2, "torch": "2"}, "m": {"original float32": step(0.2)}, "peers": []}
    (tmp_path / "speed.json").write_text(json.dumps(figures))
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- speed -->\nold\n<!-- end of speed -->\nbehind\n")
    speed.main([str(tmp_path / "speed.json"), "--into", str(page)])
    made = page.read_text()
    assert "| m, one step |" in made
    assert "`make bench`, 2 threads of C, PyTorch 2." in made
    assert "old" not in made
    assert made.startswith("before\n")
    assert made.endswith("<!-- end of speed -->\nbehind\n")
    assert speed.filled(made, figures) == made
    assert speed.filled("no marks", figures) == "no marks"


@pytest.fixture
def recognised(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(BENCH), str(BENCH.parent / "examples" / "train")])
    return importlib.import_module("recognised")


def test_words_that_are_known_are_counted_among_all(recognised) -> None:
    assert recognised.counted(["in", "xq", "in"], frozenset({"in"})) == (2, 3)


def test_shares_are_percent_of_what_each_width_made(recognised) -> None:
    every = {"image": {"original": (200, 200), "INT2": (99, 198)}}
    assert recognised.rows_of(every) == [("image: digits seen, %", "100", "50", "200")]
    page = "a\n<!-- recognised -->\nold\n<!-- end of recognised -->\nb\n"
    assert "| image: digits seen, % | 100 | 50 | 200 |" in recognised.filled(page, every)
    assert "old" not in recognised.filled(page, every)
    assert recognised.filled("no marks", every) == "no marks"

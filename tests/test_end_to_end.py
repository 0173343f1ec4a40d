"""From a real model on the disk to a model that runs: the whole way, as a person goes it."""

from __future__ import annotations

import json
import pydoc_data.topics
from typing import TYPE_CHECKING

import torch
from real_models import minilm_states

import arrow_quant_v2 as aq
from arrow_quant_v2.calibration.transformers_model import open_transformers
from arrow_quant_v2.sources.folder import open_model

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import pytest

HELD_OUT = (
    "The violin was older than the house it was kept in.",
    "Heavy rain is expected in the north until Thursday.",
    "Sorting a list twice gives the same list.",
)


def sentences(count: int) -> list[str]:
    """Paragraphs of Python's manual."""
    text = "\n\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    found = [" ".join(part.split()) for part in text.split("\n\n")]
    return [one for one in found if 60 < len(one) < 240][:: max(1, 600 // count)][:count]


def test_end_to_end_with_fallback(
    minilm: Path, tmp_path: Path, arrow_quant: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """2 bits are not enough for the bar: some layers get more, the bar is met, and all of it is told."""
    monkeypatch.setenv("ARROW_QUANT_ENABLE_CALIBRATION", "true")
    monkeypatch.setenv("ARROW_QUANT_CALIBRATION_TOKENS", "0")
    texts, out, bar = tmp_path / "texts.txt", tmp_path / "out", 0.985
    texts.write_text("\n".join(sentences(24)))
    done = arrow_quant(
        "quantize", minilm, out, "--bits", 2, "--group-size", 64, "--min-accuracy", bar, "--calibration", texts,
        "--samples", 16, "--keep", "*layer.[2-5].*", "--keep", "*embeddings*", "--keep", "pooler*", "--json", "--quiet",
    )  # fmt: skip
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert (result["bit_width"], result["passed"]) == (2, True)
    assert result["judged_by"] == "output cosine on 8 held-out samples of texts.txt"
    assert result["accuracy"] >= bar
    assert set(result["bit_widths"]) == {"2", "4"}
    assert result["bits_per_weight"] < 4.2  # uniform int4 is 4.4
    fallen = [one for one in result["decisions"] if one["kind"] == "fallback"]
    assert len(fallen) == result["bit_widths"]["4"] == result["fallbacks_per_method"]["r2q"]
    assert done.err.count("warning: ") == 1
    assert f"is below {bar}; so {len(fallen)} layers: " in done.err
    stored = {one["layer_name"]: one for one in json.loads(arrow_quant("inspect", out, "--json").out)["layers"]}
    assert {stored[one["layer_name"]]["bit_width"] for one in fallen} == {4}
    assert all(stored[one["layer_name"]]["decision"].startswith("fallback as int4 instead of int2") for one in fallen)
    with open_model(minilm) as model:
        original = open_transformers(model, "text")
    ours, theirs = (minilm_states(one, original.tokenizer, HELD_OUT) for one in (aq.load(out), original.module))
    cosines = torch.nn.functional.cosine_similarity(ours["token cosine"], theirs["token cosine"], dim=1)
    assert float(cosines.mean()) > bar - 0.01

"""The model card: front matter that a hub reads, text that a person reads, and nothing of a model taken for markup."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from findings_examples import HOSTILE, findings, hostile

from arrow_quant_v2.report.card import base_model_of, card, is_ours

THEIRS = "---\nlicense: mit\nlanguage: [en]\ntags: [theirs]\nbase_model: another\n---\n# Their card\n"


def front_matter(text: str) -> dict[str, Any]:
    start, matter, _ = text.split("---\n", 2)
    assert start == ""
    found: dict[str, Any] = yaml.safe_load(matter)
    return found


def test_a_hub_reads_what_the_model_was_made_from_and_what_was_measured() -> None:
    found = front_matter(card(findings(), "org/model", "transformers", None))
    assert (found["base_model"], found["base_model_relation"]) == ("org/model", "quantized")
    assert found["library_name"] == "transformers"
    assert {"quantized", "int2", "int4"} <= set(found["tags"])
    (index,) = found["model-index"]
    (results,) = index["results"]
    assert [(one["type"], one["value"]) for one in results["metrics"]] == [
        ("output-cosine", 0.9512),
        ("nll-at-50-masked", 0.506),
    ]


def test_without_figures_there_is_no_model_index() -> None:
    assert "model-index" not in front_matter(card(findings(metrics=()), "m", "diffusers", None))


def test_licence_and_language_are_those_of_the_original() -> None:
    found = front_matter(card(findings(), "org/model", "transformers", THEIRS))
    assert (found["license"], found["language"], found["base_model"]) == ("mit", ["en"], "org/model")
    assert "theirs" not in found["tags"]


@pytest.mark.parametrize("theirs", ["", "no front matter", "---\n: [\n---\n", "---\n- a list\n---\n", "---\nlicense"])
def test_a_card_without_sound_front_matter_gives_none(theirs: str) -> None:
    assert "license" not in front_matter(card(findings(), "m", "transformers", theirs))


def test_names_of_others_are_no_markup() -> None:
    text = card(hostile(), HOSTILE, "transformers", None)
    body = text.split("---\n", 2)[2]
    assert not re.findall(r"(?<!\\)<(?!!-- arrow-quant)", body)
    assert front_matter(text)["base_model"] == HOSTILE


def test_equal_findings_give_equal_bytes() -> None:
    later = findings(facts=findings().facts | {"made": "another day", "hardware": "another machine"})
    assert card(findings(), "m", "transformers", None) == card(later, "m", "transformers", None)


def test_a_card_is_known_as_ours_until_somebody_takes_its_mark_out() -> None:
    text = card(findings(), "m", "transformers", None)
    assert is_ours(text)
    assert not is_ours(text.replace("<!-- arrow-quant wrote this card", "<!--"))


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("/home/me/minilm", "minilm"),
        ("/cache/models--org--some-model/snapshots/0af3", "org/some-model"),
        ("/cache/models--org--pipeline/snapshots/0af3/unet", "org/pipeline"),
    ],
)
def test_a_model_is_called_as_the_hub_calls_it_and_never_by_its_path(source: str, name: str) -> None:
    assert base_model_of(Path(source)) == name

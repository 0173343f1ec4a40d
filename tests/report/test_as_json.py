"""report.json: the same figures under stable keys, JSON in the strict sense, and enough to make the report again."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, fields, replace
from typing import Any

import pytest
from findings_examples import findings, hostile, picture, sound
from hypothesis import given
from hypothesis import strategies as st

from arrow_quant_v2.errors import StoreError
from arrow_quant_v2.report.as_json import from_json, to_json
from arrow_quant_v2.validation.findings import Findings, StepFinding

WITH_ALL = findings(samples=(*findings().samples, picture(), sound()))
REMOVED_OR_WRONG = [
    *(
        (name, None)
        for name in ("layers", "metrics", "steps", "samples", "time_groups", "size_bytes", "facts", "notes")
    ),
    ("layers", [{"name": "w"}]),
    ("time_groups", [[0.0]]),
    ("samples", [{"kind": "video", "title": "", "seed": 0, "original": "", "quantized": ""}]),
    ("samples", [{"kind": "image", "title": "", "seed": 0, "original": "no base64!", "quantized": ""}]),
    ("facts", [1]),
]


def strict(made: Findings) -> dict[str, Any]:
    """What a reader gets that knows no NaN."""
    found: dict[str, Any] = json.loads(json.dumps(to_json(made), allow_nan=False))
    return found


def comparable(made: Findings) -> str:
    return repr(asdict(made))  # NaN is not equal to itself, its name is


@pytest.mark.parametrize("made", [WITH_ALL, hostile(), findings(0, accuracy=None, steps=(), samples=())])
def test_a_report_can_be_made_again_from_its_json(made: Findings) -> None:
    assert comparable(from_json(strict(made), "report.json")) == comparable(made)


def test_the_keys_are_stable() -> None:
    found = strict(WITH_ALL)
    assert list(found) == [
        "format", "version", "passed", "accuracy", "metric", "min_accuracy", "size_bytes", "original_bytes",
        "compression_ratio", "metrics", "time_groups", "layers", "steps", "samples", "fallbacks_per_method", "notes",
        "facts",
    ]  # fmt: skip
    assert {field.name for field in fields(Findings)} <= set(found)
    assert list(found["layers"][0]) == [
        "name", "shape", "quant_type", "bits_per_weight", "method", "decision", "weight_cosine", "weight_mse",
        "output_cosine", "output_error",
    ]  # fmt: skip


def test_what_is_no_number_is_null() -> None:
    step = StepFinding(timestep=0.5, error=math.inf, cosine=math.nan, samples=0)
    found = strict(findings(steps=(step,), accuracy=math.nan))
    assert found["layers"][1]["output_error"] == [0.002, 0.002, 0.004, None]
    assert (found["steps"][0]["error"], found["steps"][0]["cosine"], found["accuracy"]) == (None, None, None)


@given(st.floats(), st.floats(min_value=0, max_value=1))
def test_any_figure_survives_or_is_null(figure: float, bar: float) -> None:
    again = from_json(strict(findings(accuracy=figure, min_accuracy=bar)), "report.json")
    assert again.accuracy == (figure if math.isfinite(figure) else None)
    assert again.min_accuracy == bar


@pytest.mark.parametrize(("key", "value"), REMOVED_OR_WRONG)
def test_a_damaged_report_is_one_clear_error(key: str, value: object) -> None:
    content = strict(WITH_ALL)
    if value is None:
        del content[key]
    else:
        content[key] = value
    with pytest.raises(StoreError, match=r"^out/report\.json: is damaged \(.+\); remove it, and make it again$"):
        from_json(content, "out/report.json")


@pytest.mark.parametrize("changes", [{"version": 2}, {"format": "another"}])
def test_another_version_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(StoreError, match="is no report of version 1"):
        from_json(strict(findings()) | changes, "report.json")


def test_the_ratio_is_that_of_the_sizes() -> None:
    assert strict(replace(WITH_ALL, size_bytes=250, original_bytes=1000))["compression_ratio"] == 4.0

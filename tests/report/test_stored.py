"""What the files of real models say of them, and how a run can be made again."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from small_pipelines import PIPELINES

from arrow_quant_v2 import ArrowQuantV2, DiffusionQuantConfig
from arrow_quant_v2.errors import StoreError
from arrow_quant_v2.report.facts import hardware, run_facts, versions
from arrow_quant_v2.report.stored import mean_error, stored_findings, with_measured

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline that saw its own trajectory in three time groups."""
    folder = tmp_path_factory.mktemp("calibrated")
    config = DiffusionQuantConfig(
        bit_width=4, group_size=8, enable_calibration=True, calibration_samples=3, num_time_groups=3, min_accuracy=0.5
    )
    ArrowQuantV2().quantize_diffusion_model(PIPELINES["ddpm"].save(folder / "ddpm"), folder / "out", config)
    return folder / "out"


@pytest.mark.parametrize("name", ["minilm", "antiberty"])
def test_a_real_model_is_told_as_its_result_tells_it(name: str, quantized: Callable[..., object]) -> None:
    model = quantized(name, 4)
    found = stored_findings(model.path)
    result = model.result
    assert found.passed == result["passed"]
    assert found.accuracy == result["worst_cosine_similarity"]
    assert found.size_bytes == round(1e6 * result["model_size_mb"])
    assert found.original_bytes / found.size_bytes == pytest.approx(result["compression_ratio"])
    assert [one.name for one in found.layers] == sorted(one.layer_name for one in result["decisions"])
    assert {one.name: one.value for one in found.metrics}["weight cosine"] == pytest.approx(result["cosine_similarity"])
    assert "not run" in found.notes[0]


def test_output_errors_come_with_their_time_groups(calibrated: Path) -> None:
    found = stored_findings(calibrated)
    seen = [one for one in found.layers if one.output_error is not None]
    assert len(seen) > 10
    assert len(found.time_groups) == 3
    assert all(len(one.output_error) == 3 for one in seen)
    assert all(0 < mean_error(one) < 1 for one in seen)
    assert "output error of layers" in {one.name for one in found.metrics}


def test_a_model_that_was_judged_by_its_outputs_says_what_it_was_run_for(calibrated: Path) -> None:
    written = json.loads((calibrated / "report.json").read_text())
    assert written["metric"].startswith("output cosine on ")
    (note,) = (note for note in written["notes"] if "was run for the bar alone" in note)
    assert note.endswith("`arrow-quant report FOLDER --original MODEL` runs both models, and shows that step by step.")


def test_a_few_samples_do_not_hide_the_time_groups_that_calibration_met(calibrated: Path) -> None:
    known = stored_findings(calibrated)
    fewer = tuple(
        one if one.output_error is None else replace(one, output_error=(9.0, math.nan, math.nan))
        for one in known.layers
    )
    assert repr(with_measured(known, replace(known, layers=fewer)).layers) == repr(known.layers)
    alike = tuple(
        one if one.output_error is None else replace(one, output_error=(9.0, 9.0, 9.0)) for one in known.layers
    )
    assert repr(with_measured(known, replace(known, layers=alike)).layers) == repr(alike)


def test_what_was_measured_keeps_how_the_model_was_made(calibrated: Path) -> None:
    known = stored_findings(calibrated, {"command": "arrow-quant quantize MODEL OUT"})
    unseen = tuple(replace(one, output_error=None) for one in known.layers)
    measured = replace(
        known, metric="output cosine", accuracy=0.9, layers=unseen, time_groups=(), facts={"command": "validate"}
    )
    found = with_measured(known, measured)
    assert (found.metric, found.accuracy) == ("output cosine", 0.9)
    assert repr(found.layers) == repr(known.layers)
    assert found.time_groups == known.time_groups
    assert found.facts == known.facts | {"compared by": "validate"}


def test_what_is_said_of_how_the_model_was_made_is_not_said_again(calibrated: Path) -> None:
    known = stored_findings(calibrated, {"hardware": "a processor", "settings.yaml": "bit_width: 2"})
    facts = {
        "program": "arrow-quant-v2 9",
        "hardware": "x86_64",
        "configuration": "{}",
        "tensors of the original": known.facts["hash of the original's names and shapes"],
    }
    found = with_measured(known, replace(known, facts=facts))
    assert found.facts == known.facts | {"compared with": "arrow-quant-v2 9"}


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="holds no"):
        stored_findings(tmp_path)


def test_the_settings_that_are_shown_give_the_same_configuration(tmp_path: Path) -> None:
    config = DiffusionQuantConfig(bit_width=2, group_size=32, keep=("a*", "b"))
    facts = run_facts("org/model", tmp_path / "out", config, 61.0, None)
    assert DiffusionQuantConfig.from_yaml_text(facts["settings.yaml"]) == config
    assert str(tmp_path) not in "".join(facts.values())  # paths are nobody's business
    assert "weights alone" in facts["calibration"]


def test_versions_and_machine_are_told() -> None:
    assert f"torch {torch.__version__}" in versions()
    assert "cores" in hardware()

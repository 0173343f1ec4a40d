"""Several whole plans of one size: the one whose outputs are closest to the original's is kept, also after a kill."""

from __future__ import annotations

import json
import math
import re
import signal
from typing import TYPE_CHECKING, Any

import pytest
from runs_with_a_size import CALIBRATED, KILLED, SMALL
from small_models import content_of, run_python
from text_models import save_folder, small_module

from arrow_quant_v2 import ArrowQuantV2, DiffusionQuantConfig, orchestrator
from arrow_quant_v2.errors import QuantizationError

if TYPE_CHECKING:
    from pathlib import Path

    from arrow_quant_v2.rounds import Pass

pytestmark = pytest.mark.usefixtures("calibrating_without_warnings")
api = ArrowQuantV2()
make_once = orchestrator._one_pass


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    module = small_module("BertForMaskedLM", hidden_size=64, intermediate_size=128, num_hidden_layers=1)
    return save_folder(tmp_path_factory.mktemp("bert"), module, mask_token_id=4)


def losses_told(result: dict[str, Any]) -> dict[str, float]:
    """Way -> what it was found to lose, as the note of a result says."""
    (note,) = (one for one in result["notes"] if "whole plans were judged by" in one)
    return {way: float(lost) for way, lost in re.findall(r"([a-z ]+) ([0-9.e-]+|inf)(?:,|$)", note.rpartition(": ")[2])}


def ways_followed(result: dict[str, Any]) -> set[str]:
    """What the decisions of quantized layers say of the plan that they follow."""
    return {one.because.partition("plans: ")[2].partition(",")[0] for one in result["decisions"] if one.method}


def test_the_plan_that_loses_least_is_kept_and_all_say_so(bert: Path, tmp_path: Path) -> None:
    said: list[str] = []
    result = api.quantize_diffusion_model(
        bert, tmp_path / "out", DiffusionQuantConfig(**SMALL), lambda message, _: said.append(message)
    )
    losses = {way.strip(): lost for way, lost in losses_told(result).items()}
    assert len(losses) > 1
    assert ways_followed(result) == {min(losses, key=lambda way: losses[way])}
    assert result["bits_per_weight"] <= SMALL["target_bits"]
    assert any(re.match(rf"plan 2 of {len(losses)}: ", one) for one in said)
    assert not (tmp_path / "out.partial").exists()


def test_a_run_that_was_killed_between_plans_goes_on_behind_those_that_were_judged(bert: Path, tmp_path: Path) -> None:
    config = DiffusionQuantConfig(**SMALL)
    api.quantize_diffusion_model(bert, tmp_path / "whole", config)
    killed = run_python(
        KILLED, bert, tmp_path / "out", json.dumps(SMALL), r"plan 2 of \d+: ", timeout=300, **CALIBRATED
    )
    assert killed.code == -signal.SIGKILL, killed.err
    said: list[str] = []
    api.quantize_diffusion_model(bert, tmp_path / "out", config, lambda message, _: said.append(message))
    assert not any(one.startswith("plan 1 of") for one in said)
    assert content_of(tmp_path / "out") == content_of(tmp_path / "whole")


@pytest.fixture
def first_plan_fails(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The first plan that is made fails; the numbers of those that were begun."""
    made: list[int] = []

    def first_fails(*given: Any) -> Pass:
        made.append(len(made) + 1)
        if made == [1]:
            raise QuantizationError("no room for the first one")
        return make_once(*given)

    monkeypatch.setattr(orchestrator, "_one_pass", first_fails)
    return made


@pytest.mark.usefixtures("first_plan_fails")
def test_a_plan_that_cannot_be_made_is_left_out_with_a_warning_and_a_note(bert: Path, tmp_path: Path) -> None:
    said = "the plan 'what the outputs lose' was left out, for it could not be made: no room for the first one"
    with pytest.warns(UserWarning, match=said):
        result = api.quantize_diffusion_model(bert, tmp_path / "out", DiffusionQuantConfig(**SMALL))
    assert said in result["notes"]
    assert math.inf in losses_told(result).values()
    assert ways_followed(result).isdisjoint({"what the outputs lose"})


def test_with_fail_fast_the_first_plan_that_cannot_be_made_ends_the_run(
    bert: Path, tmp_path: Path, first_plan_fails: list[int]
) -> None:
    with pytest.raises(QuantizationError, match="no room for the first one"):
        api.quantize_diffusion_model(bert, tmp_path / "out", DiffusionQuantConfig(**SMALL, fail_fast=True))
    assert first_plan_fails == [1]
    assert not (tmp_path / "out").exists()


def test_where_no_plan_can_be_made_the_run_says_why(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Pass:
        raise QuantizationError("no layer can be made")

    monkeypatch.setattr(orchestrator, "_one_pass", fails)
    with pytest.raises(QuantizationError, match="no layer can be made"):
        api.quantize_diffusion_model(bert, tmp_path / "out", DiffusionQuantConfig(**SMALL))
    assert not list(tmp_path.glob("out*"))


def test_one_plan_is_made_at_once_and_judged_by_nobody(bert: Path, tmp_path: Path) -> None:
    result = api.quantize_diffusion_model(bert, tmp_path / "out", DiffusionQuantConfig(**SMALL, whole_plans=1))
    assert not any("whole plans" in note for note in result["notes"])
    assert ways_followed(result) == {""}

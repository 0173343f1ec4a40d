"""The memory that judges and tuning are told to take."""

from __future__ import annotations

from typing import Any

import pytest

from arrow_quant_v2 import DiffusionQuantConfig
from arrow_quant_v2.calibration.given import LONGEST
from arrow_quant_v2.judging import MOST_CALLS
from arrow_quant_v2.judging_memory import AT_WORK, COMPARED, DIVERGED, TUNED, judging_bytes
from arrow_quant_v2.packed import TensorInfo
from arrow_quant_v2.plan import NOTHING_CALIBRATED, likely_calibrated, plan_model
from arrow_quant_v2.validation.outputs import ROOM

TABLE = TensorInfo(name="embed.weight", shape=(1000, 64), dtype="float32")
LAYER = TensorInfo(name="layer.weight", shape=(64, 64), dtype="float32")
HEAD = TensorInfo(name="head.weight", shape=(1000, 64), dtype="float32")


def needed(*infos: TensorInfo, cores: int = 1, tied: Any = (), **settings: Any) -> int:
    """Floats."""
    config = DiffusionQuantConfig(**({"enable_calibration": True} | settings))
    calibrated = likely_calibrated(infos, config, "text", dict(tied))
    return judging_bytes(plan_model(infos, config, calibrated), calibrated, config, cores) // 4


def test_a_bar_needs_the_outputs_of_two_models_and_of_the_calls_at_work() -> None:
    call = LONGEST * 1000
    assert needed(TABLE, LAYER, HEAD) == COMPARED * MOST_CALLS * call + AT_WORK * call
    assert needed(TABLE, LAYER, HEAD, cores=4) == COMPARED * MOST_CALLS * call + 4 * AT_WORK * call


def test_a_tied_head_gives_logits_and_a_model_without_one_states() -> None:
    assert needed(TABLE, LAYER, tied={TABLE.name: ["head.weight"]}) == needed(TABLE, LAYER, HEAD)
    assert needed(TABLE, LAYER) * 1000 == needed(TABLE, LAYER, HEAD) * 64


def test_whole_plans_have_a_judge_of_their_own() -> None:
    more = needed(TABLE, LAYER, HEAD, target_bits=4.0) - needed(TABLE, LAYER, HEAD)
    assert more == (COMPARED + DIVERGED) * MOST_CALLS * LONGEST * 1000
    assert needed(TABLE, LAYER, HEAD, target_bits=4.0, whole_plans=1) == needed(TABLE, LAYER, HEAD)


def test_tuning_needs_what_moves_with_every_weight() -> None:
    weights = 1000 * 64 * 2 + 64 * 64
    assert needed(TABLE, LAYER, HEAD, tuning_steps=1) - needed(TABLE, LAYER, HEAD) > TUNED * weights


def test_of_very_long_outputs_only_some_rows_are_kept() -> None:
    huge = TensorInfo(name="head.weight", shape=(10**6, 64), dtype="float32")
    table = TensorInfo(name="embed.weight", shape=(10**6, 64), dtype="float32")
    assert needed(table, huge) == COMPARED * ROOM + AT_WORK * LONGEST * 10**6


@pytest.mark.parametrize("settings", [{"min_accuracy": 0.0}, {"enable_calibration": False}])
def test_where_nobody_judges_nothing_is_needed(settings: dict[str, Any]) -> None:
    assert needed(TABLE, LAYER, HEAD, **settings) == 0


def test_without_calibration_the_model_is_not_run() -> None:
    config = DiffusionQuantConfig()
    assert judging_bytes(plan_model([LAYER], config), NOTHING_CALIBRATED, config, 1) == 0

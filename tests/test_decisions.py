"""A decision reads as one sentence, cannot change, and is counted by method."""

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arrow_quant_v2.decisions import Decision, fallbacks_per_method

decisions = st.builds(
    Decision,
    layer_name=st.just("up.weight"),
    kind=st.sampled_from(["quantized", "kept", "fallback"]),
    asked=st.sampled_from(["int2", "int4"]),
    got=st.sampled_from(["int2", "int8", "float32"]),
    because=st.just("cosine 0.8 < 0.9"),
    method=st.none() | st.sampled_from(["clip", "rtn"]),
)


def decision(**changes: Any) -> Decision:
    usual: dict[str, Any] = {"layer_name": "up.weight", "kind": "quantized", "asked": "int2", "got": "int2"}
    return Decision(**({"because": "planned", "method": "clip"} | usual | changes))


def test_a_decision_reads_as_a_sentence() -> None:
    assert str(decision()) == "int2: planned"
    kept = decision(kind="kept", got="float32", because="1-D", method=None)
    assert str(kept) == "kept as float32 instead of int2: 1-D"
    fell = decision(kind="fallback", got="int4", because="cosine 0.912 < 0.950")
    assert str(fell) == "fallback as int4 instead of int2: cosine 0.912 < 0.950"


def test_a_decision_is_a_record_that_cannot_change() -> None:
    frozen: Any = decision()
    with pytest.raises(dataclasses.FrozenInstanceError):
        frozen.got = "int8"
    assert decision() == decision()
    assert Decision(**dataclasses.asdict(decision())) == decision()


@settings(deadline=None)
@given(many=st.lists(decisions))
def test_every_fallback_is_counted_once(many: list[Decision]) -> None:
    counted = fallbacks_per_method(many)
    assert sum(counted.values()) == sum(d.kind == "fallback" for d in many)
    assert set(counted) <= {"clip", "rtn", "none"}
    for method, count in counted.items():
        assert count == sum(d.kind == "fallback" and (d.method or "none") == method for d in many)


def test_nothing_fell_back() -> None:
    assert fallbacks_per_method(d for d in [decision()]) == {}

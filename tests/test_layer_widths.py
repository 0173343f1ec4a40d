"""Widths that people ask for by name: which name is stronger, what becomes of them, and what is a slip."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from small_models import Run, layers, save_model

from arrow_quant_v2.api import ArrowQuantV2
from arrow_quant_v2.config import DiffusionQuantConfig
from arrow_quant_v2.errors import ConfigurationError
from arrow_quant_v2.layer_widths import LayerWidth, Overrules
from arrow_quant_v2.packed import TensorInfo
from arrow_quant_v2.plan import Calibrated, LayerPlan, plan_model

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def bits(tensor: str, **said: object) -> int | None:
    found = Overrules(**said).of(tensor)
    return None if found is None else found.bits


def planned(name: str, widths: dict[str, LayerWidth] | None = None, **settings: object) -> LayerPlan:
    info = TensorInfo(name=name, shape=(64, 128), dtype="float16")
    (found,) = plan_model([info], DiffusionQuantConfig(**settings), widths=widths or {})
    return found


def test_a_name_means_a_tensor_or_a_module() -> None:
    widths = (("lm_head", 8), ("blocks.1", 4))
    assert bits("lm_head.weight", widths=widths) == 8
    assert bits("blocks.1.up.weight", widths=widths) == 4
    assert bits("blocks.10.up.weight", widths=widths) is None


def test_patterns_and_regular_expressions() -> None:
    widths = (("*.up.*", 2), ("re:down|out$", 4))
    assert bits("a.up.weight", widths=widths) == 2
    assert bits("a.down.weight", widths=widths) == 4
    assert bits("a.outer", widths=widths) is None


def test_a_whole_name_comes_before_patterns_and_then_the_first_that_fits() -> None:
    widths = (("*", 2), ("re:x", 4), ("x", 8))
    assert bits("x.weight", widths=widths) == 8
    assert bits("ax", widths=widths) == 2


def test_sensitive_layers_have_8_bits_or_are_kept() -> None:
    assert bits("time.weight", patterns=("^time",)) == 8
    assert bits("time.weight", names=("time",), skip=True) == 16
    assert bits("time.weight", names=("time",), widths=(("time", 4),)) == 4
    assert bits("other.weight", names=("time",), patterns=("^time",)) is None


def test_a_layer_gets_its_own_width_and_says_why() -> None:
    found = planned("a.weight", bit_width=2, group_size=64, layer_bit_widths={"a": 4})
    assert found.layout is not None
    assert found.layout.bits == 4
    assert str(found.decision) == "int4: g64 clip as asked, as layer_bit_widths says of 'a'"
    assert (found.decision.asked, found.decision.got) == ("int2", "int4")


def test_16_bits_are_the_layers_own_dtype() -> None:
    found = planned("a.weight", bit_width=2, skip_sensitive_layers=True, sensitive_layer_names=["a"])
    assert found.spec is None
    assert found.stored_bytes == found.tensor.nbytes
    assert str(found.decision) == "kept as float16 instead of int2: sensitive_layer_names 'a' makes it sensitive"


def test_people_overrule_what_was_found_out_and_keep_overrules_both() -> None:
    measured = {"a.weight": LayerWidth(bits=2, because="it loses least")}
    assert planned("a.weight", measured).decision.because.endswith("it loses least")
    assert planned("a.weight", measured).decision.got == "int2"
    assert planned("a.weight", measured, layer_bit_widths={"a": 8}).decision.got == "int8"
    assert planned("a.weight", measured, layer_bit_widths={"a": 8}, keep=["a.*"]).decision.got == "float16"


def test_eight_bits_of_a_text_model_are_calibrated_on_the_affine_grid() -> None:
    info = TensorInfo(name="a.weight", shape=(64, 128), dtype="float32")
    seen = Calibrated(names=frozenset({"a.weight"}), method="r2q")
    for asked, method in (({}, "r2q"), ({"layer_bit_widths": {"a": 8}}, "gptq")):
        (found,) = plan_model([info], DiffusionQuantConfig(bit_width=2, **asked), seen)
        assert found.decision.method == method


def test_a_name_that_no_tensor_has_is_refused_before_any_work(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", layers(2))
    for setting in ({"layer_bit_widths": {"layer.0": 8}}, {"sensitive_layer_names": ["layer.0"]}):
        config = DiffusionQuantConfig(**setting)
        with pytest.raises(ConfigurationError, match=r"'layer\.0' is given a width or called sensitive"):
            ArrowQuantV2().quantize_diffusion_model(model, tmp_path / "out", config)
        with pytest.raises(ConfigurationError, match="no tensor of the model has that name"):
            ArrowQuantV2().doctor(model, config)
    assert not list(tmp_path.glob("out*"))


def test_a_model_of_several_widths_is_stored_as_planned(tmp_path: Path, arrow_quant: Callable[..., Run]) -> None:
    model = save_model(tmp_path / "model", layers(4))
    asked = ("--bits", 2, "--group-size", 32, "--layer-bits", "layers.00=8", "--layer-bits", "*.03.*=16")
    assert arrow_quant("quantize", model, tmp_path / "out", *asked, "-q", "--min-accuracy", 0).code == 0
    found = {x["layer_name"]: x["quant_type"] for x in ArrowQuantV2().inspect(tmp_path / "out")["layers"]}
    weights = [found[f"layers.{number:02d}.weight"] for number in range(4)]
    assert weights == ["int8", "int2", "int2", "float32"]
    report = ArrowQuantV2().validate_quality(model, tmp_path / "out", min_accuracy=0.0)
    cosines = [report["per_layer_accuracy"][f"layers.{number:02d}.weight"] for number in range(4)]
    assert cosines[1] < 0.96 < cosines[0] < 1.0 == cosines[3]


def test_a_width_on_the_command_line_that_is_none_is_refused(tmp_path: Path, arrow_quant: Callable[..., Run]) -> None:
    model = save_model(tmp_path / "model", layers(1))
    for wrong in ("layers.00=3", "layers.00=many"):
        refused = arrow_quant("quantize", model, tmp_path / "out", "--layer-bits", wrong)
        assert refused.code == 2
        assert "layer_bit_widths is" in refused.err
    for wrong in ("layers.00", "=4", "layers.00="):
        refused = arrow_quant("quantize", model, tmp_path / "out", "--layer-bits", wrong)
        assert refused.code == 2
        assert f"{wrong!r} gives no layer a width; write NAME=BITS, such as lm_head=8" in refused.err

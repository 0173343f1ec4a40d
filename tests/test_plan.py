"""Which tensors are quantized, which are kept, and what is said of each."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from small_models import normal, save_model

from arrow_quant_v2.api import ArrowQuantV2
from arrow_quant_v2.config import DiffusionQuantConfig
from arrow_quant_v2.packed import TensorInfo
from arrow_quant_v2.plan import LayerPlan, plan_model, quant_axis
from arrow_quant_v2.store import StoredModel

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def plan(*shape: int, dtype: str = "float32", name: str = "w", **settings: object) -> LayerPlan:
    (found,) = plan_model([TensorInfo(name=name, shape=shape, dtype=dtype)], DiffusionQuantConfig(**settings))
    return found


@pytest.mark.parametrize(
    ("shape", "rows", "columns"),
    [
        ((320, 256), 320, 256),  # linear, embedding
        ((64, 32, 3), 64, 96),  # 1-D convolution
        ((64, 32, 3, 3), 64, 288),
        ((16, 8, 3, 3, 3), 16, 216),
        ((8, 64, 128), 8 * 64, 128),  # experts
        ((2, 64, 31), 2, 64 * 31),  # the longest kernel of a convolution
    ],
)
def test_weights_are_quantized_row_by_row(shape: tuple[int, ...], rows: int, columns: int) -> None:
    found = plan(*shape)
    assert found.layout is not None
    assert (found.layout.rows, found.layout.columns) == (rows, columns)
    assert (found.decision.kind, found.decision.asked, found.decision.got) == ("quantized", "int4", "int4")
    assert found.decision.method == "clip"


def test_only_a_long_last_axis_makes_experts() -> None:
    assert [quant_axis(shape) for shape in [(4, 5), (4, 5, 31), (4, 5, 32), (4, 5, 64, 64)]] == [1, 1, 2, 1]


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        ((4096,), "float32", "a bias, norm or other 1-D tensor"),
        ((), "float32", "a bias, norm or other 1-D tensor"),
        ((31, 33), "float32", "only 1023 elements, fewer than 1024"),
        ((0, 4096), "float32", "only 0 elements, fewer than 1024"),
        ((1, 1024, 64), "float32", "a table that is added, such as one of positions, no weight"),
        ((64, 64), "int64", "int64 values are no weights"),
        ((64, 64), "bool", "bool values are no weights"),
        ((4096, 1), "float32", "int4 with its parameters would not be smaller than float32"),
    ],
)
def test_what_is_no_weight_is_kept_with_a_reason(shape: tuple[int, ...], dtype: str, reason: str) -> None:
    found = plan(*shape, dtype=dtype)
    assert (found.spec, found.layout) == (None, None)
    assert (found.decision.kind, found.decision.got, found.decision.because) == ("kept", dtype, reason)
    assert found.stored_bytes == found.tensor.nbytes


def test_a_weight_that_would_not_shrink_is_kept() -> None:
    kept = plan(256, 256, dtype="float8_e4m3fn", bit_width=8)
    assert kept.decision.because == "int8 with its parameters would not be smaller than float8_e4m3fn"
    assert plan(256, 256, dtype="float8_e4m3fn", bit_width=4).decision.kind == "quantized"


def test_keep_patterns_are_named_in_the_decision() -> None:
    kept = plan(64, 64, name="head.weight", keep=["embed*", "head.*"])
    assert kept.decision.because == "its name matches keep pattern 'head.*'"
    assert plan(64, 64, name="body.weight", keep=["head.*"]).decision.kind == "quantized"


def test_a_ragged_tail_is_noted_and_not_skipped() -> None:
    assert plan(64, 100, group_size=64).decision.because == (
        "g64 clip as asked, the last group of a row has 36 columns"
    )
    assert plan(64, 128, group_size=64).decision.because == "g64 clip as asked"
    assert plan(64, 48, group_size=64).decision.because == "g64 clip as asked"  # one shorter group


def test_the_spec_is_what_was_asked() -> None:
    found = plan(64, 128, bit_width=2, group_size="row", method="rtn", symmetric=True)
    assert str(found.spec) == "int2 row rtn symmetric"
    assert str(found.decision) == "int2: row rtn symmetric as asked"


def test_plans_keep_the_order_given() -> None:
    infos = [TensorInfo(name=name, shape=(64, 64), dtype="float32") for name in "cab"]
    assert [one.tensor.name for one in plan_model(infos, DiffusionQuantConfig())] == ["c", "a", "b"]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_what_is_predicted_is_what_is_stored(bits: int, quantized: Callable[..., object]) -> None:
    model = quantized("minilm", bits)
    with StoredModel(model.path) as stored:
        infos = [one.info for one in stored.entries]
        plans = plan_model(infos, DiffusionQuantConfig(bit_width=bits, group_size=64))
        found = {one.layer_name: (one.stored_bytes, one.bits_per_weight, one.decision) for one in stored.entries}
    assert {p.tensor.name: (p.stored_bytes, p.bits_per_weight, str(p.decision)) for p in plans} == found


@pytest.mark.parametrize("asked", [{"group_size": 32}, {"group_size": 64}, {"group_size": "row"}, {"group_size": 1024}])
@pytest.mark.parametrize("symmetric", [False, True])
def test_odd_shapes_are_stored_as_predicted(tmp_path: Path, asked: dict[str, object], *, symmetric: bool) -> None:
    shapes = {"conv": (33, 7, 3, 3), "ragged": (70, 101), "experts": (3, 11, 65), "scalar": (), "empty": (0, 5)}
    tensors = {name: normal(*shape) for name, shape in shapes.items()}
    config = DiffusionQuantConfig(bit_width=2, symmetric=symmetric, **asked)
    ArrowQuantV2().quantize_diffusion_model(save_model(tmp_path / "model", tensors), tmp_path / "out", config)
    with StoredModel(tmp_path / "out") as stored:
        infos = [one.info for one in stored.entries]
        plans = plan_model(infos, config)
        assert [p.stored_bytes for p in plans] == [one.stored_bytes for one in stored.entries]
        assert [p.bits_per_weight for p in plans] == [one.bits_per_weight for one in stored.entries]
        assert [p.layout for p in plans] == [one.layout for one in stored.entries]


@pytest.mark.parametrize(("size", "grid"), [("row", "row"), (128, "row"), (256, "row"), (64, "affine")])
def test_a_group_as_long_as_the_row_costs_its_scale_alone(size: object, grid: str) -> None:
    found = plan(64, 128, bit_width=2, group_size=size, symmetric=True)
    assert found.layout is not None
    assert found.layout.grid == grid
    assert found.bits_per_weight == 2 + 16 / 128 + (2 * 8 / 128 if grid == "affine" else 0)
    assert plan(64, 128, bit_width=2, group_size=size, method="r2q").layout.grid == "r2q"

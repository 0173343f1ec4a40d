"""Charts: what is in them, and what they leave out."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from findings_examples import HOSTILE, findings, hostile, layer, norm

from arrow_quant_v2.report.charts import (
    Chart,
    _group_means,
    charts,
    compared_time_groups,
    group_labels,
    short_names,
    trajectories,
)

if TYPE_CHECKING:
    from arrow_quant_v2.validation.findings import Findings


def titled(made: Findings) -> dict[str, Chart]:
    return {chart.title: chart for chart in charts(made)}


def test_the_heat_map_holds_every_layer_in_every_group() -> None:
    trace = titled(findings(12))["Output error by layer and time group"].figure["data"][0]
    assert (len(trace["z"]), len(trace["z"][0])) == (12, 4)
    assert trace["z"][2][3] == pytest.approx(math.log10(0.03))
    assert trace["z"][1][3] is None  # no sample hit this group
    assert trace["customdata"][2][3] == ["model.layers.2.mlp.weight", "0.03"]


def test_a_group_that_few_layers_met_has_no_mean() -> None:
    errors = [(0.1, math.nan), (0.1, math.nan), (0.3, 0.001)]
    made = findings(layers=tuple(layer(n, output_error=one) for n, one in enumerate(errors)), time_groups=())
    assert "Output error by time group" in titled(findings(4))
    means = _group_means(made.layers, 2)
    assert means[0] == pytest.approx(0.5 / 3)
    assert math.isnan(means[1])


def test_the_worst_layers_come_first_and_few_of_them() -> None:
    made = findings(200, layers=tuple(layer(n, output_error=(0.001 * n,)) for n in range(200)))
    chart = titled(made)["Layers that lose most: output error"]
    errors = chart.figure["data"][0]["x"]
    assert errors == sorted(errors, reverse=True)
    assert (len(errors), errors[0]) == (30, pytest.approx(0.199))
    assert "model.layers.199.mlp.weight" in chart.spoken


def test_layers_that_were_kept_hide_no_others() -> None:
    exact = replace(norm("kept"), weight_cosine=1.0, output_error=(0.0,) * 4)
    made = findings(layers=(layer(0), exact, layer(2)))
    for chart in charts(made):
        assert "kept" not in json.dumps(chart.figure["data"]).replace("--kept", "")
    theirs = findings(layers=(replace(layer(0), quant_type="float16"), exact))
    assert '"kept"' in json.dumps([chart.figure for chart in charts(theirs)])


def test_without_outputs_weights_are_shown_and_called_so() -> None:
    blind = tuple(replace(layer(n), output_error=None) for n in range(3))
    found = titled(findings(layers=blind))
    assert set(found) == {"Layers that lose most: 1 - weight cosine", "Bits per layer"}
    assert "weights alone" in found["Layers that lose most: 1 - weight cosine"].caption


def test_a_model_of_which_nothing_is_known_has_no_charts() -> None:
    assert charts(findings(layers=(norm("a"),), steps=())) == []
    assert trajectories({"a": findings(steps=())}) == []


def names(chart: Chart) -> list[str]:
    return [line["name"] for line in chart.figure["data"]]


def test_widths_of_one_original_share_their_axes() -> None:
    models = {"int2": findings(4), "int4": findings(4, steps=findings().steps[:3])}
    for made in (compared_time_groups(models), trajectories(models)):
        assert [(chart.title.count("int2"), names(chart)) for chart in made] == [(0, ["int2", "int4"])]


def test_different_originals_and_time_groups_have_no_axis_in_common() -> None:
    """The share of hidden tokens of the one is no noise level of the other."""
    noisy = ((20.0, 40.0), (40.0, 60.0), (60.0, 70.0), (70.0, 80.0))
    models = {"text INT2": findings(4), "maps": findings(9, time_groups=noisy), "text INT4": findings(4)}
    for made in (compared_time_groups(models), trajectories(models)):
        assert [names(chart) for chart in made] == [["text INT2", "text INT4"], ["maps"]]
        assert [chart.title.rpartition(": ")[2] for chart in made] == ["text INT2, text INT4", "maps"]
    groups = compared_time_groups({"int2": findings(4), "otherwise": findings(4, time_groups=noisy)})
    assert [chart.figure["data"][0]["x"][0] for chart in groups] == ["0\u20130.25", "20\u201340"]


def test_time_groups_have_their_ranges_or_their_numbers() -> None:
    assert group_labels(findings())[0] == "0\u20130.25"
    assert group_labels(findings(time_groups=())) == ["group 1", "group 2", "group 3", "group 4"]


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("layer.0.weight", "layer.0"),
        ("bert.encoder.layer.0.attention.self.query.weight", "\u20260.attention.self.query"),
        ("x" * 40, "\u2026" + "x" * 25),
        ("a" * 30 + ".", "\u2026" + "a" * 24 + "."),
    ],
)
def test_names_beside_a_chart_are_short_and_end_as_they_do(name: str, short: str) -> None:
    assert short_names([name]) == [short]


def test_names_that_would_be_alike_keep_their_block() -> None:
    names = [f"transformer_blocks.{n}.norm1.emb.timestep_embedder.linear_1.weight" for n in (0, 11)]
    assert short_names([*names, "proj_out"]) == ["0…linear_1", "11…linear_1", "proj_out"]
    assert short_names(names[:1]) == ["…linear_1"]


def test_no_name_is_markup_in_a_chart() -> None:
    told = json.dumps([chart.figure for chart in charts(hostile())])
    assert HOSTILE[:9] not in told
    assert "<img" not in told


def test_an_error_of_zero_has_a_place_on_the_axis() -> None:
    made = findings(layers=tuple(layer(n, output_error=(0.0, 0.5, 0.1, 0.1)) for n in range(2)))
    for chart in charts(made):
        json.dumps(chart.figure, allow_nan=False)


def test_a_share_of_hidden_tokens_is_explained() -> None:
    hidden = "shares of hidden tokens"
    said = {
        modality: [chart.caption for chart in charts(replace(findings(4), facts={"modality": modality}))]
        for modality in ("text", "image")
    }
    assert sum(hidden in caption for caption in said["text"]) == 2
    assert not any(hidden in caption for caption in said["image"])

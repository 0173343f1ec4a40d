"""Reports in the folders of models: written by quantize and by `arrow-quant report`, and never over another's file."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from findings_examples import findings, picture
from small_models import content_of, save_model

from arrow_quant_v2 import ArrowQuantV2, DiffusionQuantConfig
from arrow_quant_v2.errors import StoreError
from arrow_quant_v2.report import page as page_room
from arrow_quant_v2.report.as_json import from_json
from arrow_quant_v2.report.write import known_findings, write_page, write_report

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

api = ArrowQuantV2()
THEIRS = "---\nlicense: mit\n---\n# Their card\n"


def quantize(model: Path, out: Path, **settings: object) -> dict[str, Any]:
    return api.quantize_diffusion_model(model, out, DiffusionQuantConfig(**{"group_size": 64, **settings}))


def figures(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return found


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = save_model(tmp_path / "model")
    (folder / "README.md").write_text(THEIRS)
    return folder


def test_quantize_leaves_a_report_its_figures_and_a_card(quantized: Callable[..., object]) -> None:
    done = quantized("minilm", 4)
    assert done.result["report"] == str(done.path / "report.html")
    page = (done.path / "report.html").read_text(encoding="utf-8")
    assert f"<h1>{done.path.name}</h1>" in page
    assert len(figures(done.path)["layers"]) == done.result["layers"]
    assert figures(done.path)["facts"]["command"].startswith("arrow-quant quantize MODEL minilm-int4")
    assert "base_model_relation: quantized" in (done.path / "README.md").read_text(encoding="utf-8")


def test_the_originals_card_is_kept_and_comes_back(model: Path, tmp_path: Path) -> None:
    quantize(model, tmp_path / "out")
    assert (tmp_path / "out" / "README.original.md").read_text() == THEIRS
    assert "license: mit" in (tmp_path / "out" / "README.md").read_text()
    quantize(tmp_path / "out", tmp_path / "again", bit_width=8)
    assert (tmp_path / "again" / "README.original.md").read_text() == THEIRS
    api.convert(tmp_path / "again", tmp_path / "plain")
    names = {path.name for path in (tmp_path / "plain").iterdir()}
    assert names == {path.name for path in model.iterdir()}
    assert (tmp_path / "plain" / "README.md").read_text() == THEIRS


def test_a_file_that_has_the_name_of_ours_is_kept_beside_it(model: Path, tmp_path: Path) -> None:
    (model / "report.json").write_text('{"loss": 1}')
    (model / "README.original.md").write_text("an older one")
    quantize(model, tmp_path / "out")
    assert (tmp_path / "out" / "report.original.json").read_text() == '{"loss": 1}'
    assert (tmp_path / "out" / "README.original.md").read_text() == "an older one"
    assert (tmp_path / "out" / "README.original.original.md").read_text() == THEIRS
    assert figures(tmp_path / "out")["format"] == "arrow_quant_report"


def test_equal_runs_differ_in_their_reports_alone(model: Path, tmp_path: Path) -> None:
    quantize(model, tmp_path / "one")
    quantize(model, tmp_path / "two")
    assert content_of(tmp_path / "one") == content_of(tmp_path / "two")
    assert "README.md" in content_of(tmp_path / "one")


def test_the_command_writes_a_report_for_any_stored_folder(
    model: Path, tmp_path: Path, arrow_quant: Callable[..., Any]
) -> None:
    quantize(model, tmp_path / "out")
    for name in ("README.md", "report.html", "report.json"):
        (tmp_path / "out" / name).unlink()
    (tmp_path / "out" / "README.md").write_text("written by hand")
    done = arrow_quant("report", tmp_path / "out")
    assert done.code == 0
    assert done.out.split() == [str(tmp_path / "out" / name) for name in ("report.json", "report.html", "README.md")]
    assert (tmp_path / "out" / "README.original.original.md").read_text() == "written by hand"
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_the_command_compares_with_the_original(model: Path, tmp_path: Path, arrow_quant: Callable[..., Any]) -> None:
    result = quantize(model, tmp_path / "out")
    other = save_model(tmp_path / "other", {name: -weight for name, weight in tensors_of(model).items()})
    done = arrow_quant("report", tmp_path / "out", "--original", model, "--json")
    assert json.loads(done.out)["accuracy"] == pytest.approx(result["cosine_similarity"], abs=1e-6)
    done = arrow_quant("report", tmp_path / "out", "--original", other, "--json")
    assert json.loads(done.out)["accuracy"] < -0.9
    assert json.loads(done.out)["passed"] is False
    assert "Bar missed" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def tensors_of(model: Path) -> dict[str, Any]:
    from safetensors.torch import load_file  # noqa: PLC0415 - here alone

    return load_file(model / "model.safetensors")


def test_a_report_is_made_again_from_what_was_measured(model: Path, tmp_path: Path) -> None:
    quantize(model, tmp_path / "out")
    measured = replace(known_findings(tmp_path / "out"), metric="output cosine", accuracy=0.5, samples=(picture(),))
    write_report(tmp_path / "out", measured, "out")
    api.report(tmp_path / "out")
    again = from_json(figures(tmp_path / "out"), "report.json")
    assert (again.metric, again.accuracy, again.facts) == ("output cosine", 0.5, measured.facts)
    assert again.samples[0].quantized == picture().quantized


def test_a_report_of_other_codes_is_not_believed(model: Path, tmp_path: Path) -> None:
    quantize(model, tmp_path / "two", bit_width=2)
    quantize(model, tmp_path / "eight", bit_width=8)
    shutil.copy(tmp_path / "two" / "report.json", tmp_path / "eight" / "report.json")
    assert {one.quant_type for one in known_findings(tmp_path / "eight").layers} == {"int8", "float32"}


def test_a_damaged_report_is_refused_with_a_way_out(model: Path, tmp_path: Path) -> None:
    quantize(model, tmp_path / "out")
    (tmp_path / "out" / "report.json").write_text(json.dumps(figures(tmp_path / "out") | {"layers": 3}))
    with pytest.raises(StoreError, match=r"report\.json: is damaged .* remove it, and make it again"):
        api.report(tmp_path / "out")


def test_without_the_extra_the_rest_is_written_and_a_note_says_how_to_get_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_room, "NEEDED", ("no_such_plotly",))
    result = quantize(model, tmp_path / "out")
    assert result["report"] == str(tmp_path / "out" / "report.json")
    (note,) = result["notes"]
    assert note == (
        "no report.html: it needs no_such_plotly; pip install 'arrow-quant-v2[report]', then arrow-quant report"
    )
    assert (tmp_path / "out" / "README.md").exists()
    assert not (tmp_path / "out" / "report.html").exists()


def test_a_thousand_layers_make_a_page_that_can_be_sent(tmp_path: Path) -> None:
    write_report(tmp_path, findings(1_000, samples=()), "large")
    assert (tmp_path / "report.html").stat().st_size < 4_000_000
    assert (tmp_path / "report.json").stat().st_size < 1_000_000


def test_one_page_shows_several_models(model: Path, tmp_path: Path) -> None:
    for bits in (2, 8):
        quantize(model, tmp_path / f"int{bits}", bit_width=bits)
    models = {name: known_findings(tmp_path / name) for name in ("int2", "int8")}
    write_page(tmp_path / "both.html", models, "Two widths")
    made = (tmp_path / "both.html").read_text(encoding="utf-8")
    assert (
        made.index(">Two widths<") < made.index("Side by side") < made.index("<h2>int2</h2>") < made.index("int8</h2>")
    )

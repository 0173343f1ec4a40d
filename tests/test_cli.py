"""The `arrow-quant` command as a person meets it: exit codes, tables, progress, and errors without a traceback."""

from __future__ import annotations

import json
import re
import time
from typing import TYPE_CHECKING

import pytest
from rich.console import Console
from small_models import Run, content_of, layers, run_command, run_python, save_model

from arrow_quant_v2 import ArrowQuantV2, DiffusionQuantConfig, __version__, cli_progress
from arrow_quant_v2.cli_progress import fitted, percent, told_progress
from arrow_quant_v2.cli_tables import table_lines

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Command = Callable[..., Run]

WITHOUT_TORCH = """
import sys
from arrow_quant_v2.__main__ import main
try:
    main()
except SystemExit as left:
    sys.stderr.write(f"{left.code} {'torch' in sys.modules}")
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("cli") / "model")


@pytest.fixture(scope="module")
def int4(model: Path) -> Path:
    out = model.parent / "int4"
    ArrowQuantV2().quantize_diffusion_model(model, out, DiffusionQuantConfig(group_size=32))
    return out


def lines(said: str) -> list[str]:
    return [line.rstrip() for line in said.splitlines()]


# the way in


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["quantize", "--help"]])
def test_help_and_version_wake_no_torch(arguments: list[str]) -> None:
    started = time.monotonic()
    code = WITHOUT_TORCH.replace("main()", f"sys.argv[1:] = {arguments}; main()", 1)
    done = run_python(code, COLUMNS="100")
    assert done.err == "0 False"
    assert time.monotonic() - started < 10  # a second, on an idle machine
    assert (__version__ if "--version" in arguments else "Usage: ") in done.out
    for command in (
        ("quantize", "doctor", "inspect", "validate", "compare", "convert") if arguments == ["--help"] else ()
    ):
        assert command in done.out


def test_the_module_is_the_command(model: Path) -> None:
    done = run_command("doctor", model.name, "--json", cwd=model.parent)
    assert done.code == 0, done.err
    assert json.loads(done.out)["modality"] == "text"


def test_no_command_shows_the_help(arrow_quant: Command) -> None:
    assert "Commands" in arrow_quant().out


# every command


def test_quantize_tells_what_it_did(model: Path, tmp_path: Path, arrow_quant: Command) -> None:
    done = arrow_quant("quantize", model, tmp_path / "out", "--bits", 8, "--group-size", "row", "--threads", 1)
    assert done.code == 0
    first, second, third, fourth, verdict, kept, report = lines(done.out)
    assert first.startswith(f"{tmp_path / 'out'}: 0.")
    assert first.endswith("times smaller")
    assert second.startswith("  text, ")
    assert second.endswith(", from the weights alone")
    assert "12 layers at 8.250" in third
    assert "weight cosine 0.9999" in fourth
    assert verdict == "  weight cosine of each layer: bar 0.85 passed"
    assert kept == "  12 kept: a bias, norm or other 1-D tensor"
    assert report == f"  report: {tmp_path / 'out' / 'report.html'}"
    progress = lines(done.err)
    assert re.match(r"  \d% 1/24 layers\.00\.bias", progress[0])
    assert progress[-1] == "100% 24/24 layers.11.weight"


def test_quantize_says_where_nothing_was_quantized(tmp_path: Path, arrow_quant: Command) -> None:
    model = save_model(tmp_path / "model", {"bias": layers()["layers.00.bias"]})
    done = arrow_quant("quantize", model, tmp_path / "out", "--quiet")
    assert (done.code, done.err) == (0, "")
    assert "  nothing was quantized: every tensor is kept as it is" in lines(done.out)


def test_doctor_shows_every_layer_and_the_verdicts(model: Path, arrow_quant: Command) -> None:
    done = arrow_quant("doctor", model, "--profile", "edge")
    header, *rows = lines(done.out)
    assert header.split() == ["layer", "shape", "dtype", "becomes", "bits/weight", "because"]
    assert rows[0].split(None, 5) == [
        "layers.00.bias", "64", "float32", "float32", "32.000", "a bias, norm or other 1-D tensor"
    ]  # fmt: skip
    assert rows[1].split(None, 5)[3:] == [
        "int2", "2.500", "g64 clip as asked, the last group of a row has 32 columns"
    ]  # fmt: skip
    assert (done.code, done.err) == (0, "")
    size, calibration, memory, disk, device = rows[24:]
    assert size.startswith("text: 0.30 MB become 0.")
    assert calibration == "calibration: from the weights alone: calibration is switched off"
    assert memory.startswith("memory: ")
    assert memory.endswith("MB there: fits")
    assert disk.endswith("MB there: fits")
    assert device.startswith("device: cpu")


def test_inspect_shows_a_table(int4: Path, arrow_quant: Command) -> None:
    done = arrow_quant("inspect", int4)
    header, *rows = lines(done.out)
    assert header.split("  ")[0] == "layer"
    for column in ("shape", "bits", "bits/weight", "weight cosine", "decision"):
        assert column in header
    assert len(rows) == 24 + 2
    assert rows[1].startswith("layers.00.weight  64x96  int4     4.667        0.99")
    assert rows[1].endswith("int4: g32 clip as asked")
    assert rows[-2].startswith("24 layers, 74,496 parameters, 0.")
    assert (done.code, done.err) == (0, "")


def test_validate_shows_every_layer_and_the_worst(model: Path, int4: Path, arrow_quant: Command) -> None:
    done = arrow_quant("validate", model, int4, "--quiet")
    verdict, size, why, *rows = lines(done.out)
    assert verdict.startswith("passed: bar 0.85, weight cosine, mean over quantized layers: 0.99")
    assert re.search(r"; least weight cosine 0\.99\d+, layers\.\d\d\.weight$", verdict)
    assert size.endswith(" bits per weight in quantized layers")
    assert why.startswith("  weights only, the model was not run: ")
    table = rows[rows.index("") + 4 :]  # behind the metrics, of which there is one
    assert table[0].split()[:6] == ["worst", "of", "12", "layers", "weight", "cosine"]
    cosines = [float(row.split()[1]) for row in table[1:]]
    assert len(cosines) == 10
    assert cosines == sorted(cosines)
    assert (done.code, done.err) == (0, "")


def test_convert_says_what_it_wrote(int4: Path, tmp_path: Path, arrow_quant: Command) -> None:
    done = arrow_quant("convert", int4, tmp_path / "back", "-q")
    assert (done.code, done.out, done.err) == (0, f"{tmp_path / 'back'}: 0.3 MB in 1 file\n", "")


@pytest.mark.parametrize("command", ["quantize", "doctor", "inspect", "validate", "convert"])
def test_json_is_all_that_stdout_gets(
    command: str, model: Path, int4: Path, tmp_path: Path, arrow_quant: Command
) -> None:
    arguments = {
        "quantize": (model, tmp_path / "out"), "doctor": (model,), "inspect": (int4,), "validate": (model, int4),
        "convert": (int4, tmp_path / "out"),
    }  # fmt: skip
    done = arrow_quant(command, *arguments[command], "--json")
    found = json.loads(done.out)
    keys = {
        "quantize": "compression_ratio", "doctor": "verdict", "inspect": "layers", "validate": "per_layer_accuracy",
        "convert": "files",
    }  # fmt: skip
    assert keys[command] in found
    assert done.code == 0
    assert ("100% " in done.err) is (command in {"quantize", "validate", "convert"})


# settings


def test_an_option_is_stronger_than_the_file(model: Path, tmp_path: Path, arrow_quant: Command) -> None:
    (tmp_path / "settings.yaml").write_text("profile: edge\nkeep: ['layers.00.*']\n")
    base = ("doctor", model, "--config", tmp_path / "settings.yaml", "--json")
    of_file, of_option = (json.loads(arrow_quant(*base, *more).out) for more in ((), ("--bits", "8")))
    assert [found["layers"][3]["got"] for found in (of_file, of_option)] == ["int2", "int8"]
    assert of_option["layers"][1]["because"] == "its name matches keep pattern 'layers.00.*'"


def test_the_environment_counts(model: Path, arrow_quant: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARROW_QUANT_BIT_WIDTH", "2")
    assert json.loads(arrow_quant("doctor", model, "--json").out)["layers"][1]["got"] == "int2"


def test_every_option_reaches_the_work(model: Path, tmp_path: Path, arrow_quant: Command) -> None:
    options = {
        "--bits": 2, "--modality": "code", "--group-size": 32, "--method": "rtn", "--min-accuracy": 0.1,
        "--max-memory": "16GB", "--threads": 1, "--keep": "layers.00.*",
    }  # fmt: skip
    flat = [word for pair in options.items() for word in pair]
    done = arrow_quant("quantize", model, tmp_path / "out", *flat, "--symmetric", "--fail-fast", "--json")
    asked = json.loads((tmp_path / "out" / "metadata.json").read_text())["configuration"]
    assert {"bit_width": 2, "modality": "code", "group_size": 32, "method": "rtn", "symmetric": True}.items() <= (
        asked.items()
    )
    assert (asked["keep"], asked["min_accuracy"]) == (["layers.00.*"], 0.1)
    assert json.loads(done.out)["kept_layers"] == 13


# how it ends


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["quantize", "nowhere", "out"], 1, "error: nowhere: does not exist; give a model folder or file"),
        (["inspect", "MODEL"], 1, "is not quantized by this program; give a folder that quantize wrote"),
        (["quantize", "MODEL", "out", "--bits", "3"], 2, "error: bit_width is 3; allowed: 2, 4 or 8"),
        (["quantize", "MODEL", "out", "--group-size", "-8"], 2, "error: group_size is '-8'; allowed: a multiple of 8"),
        (["quantize", "MODEL", "out", "--threads", "0"], 2, "error: threads is 0; allowed: a whole number from 1"),
        (["quantize", "MODEL", "out", "--max-memory", "lots"], 2, "error: max_memory is 'lots'; allowed: at least"),
        (["quantize", "MODEL", "MODEL"], 2, "lies in the model's own folder or around it"),
        (["quantize", "MODEL", "INT4"], 2, "is a finished model already; choose another name, or --overwrite it"),
        (["convert", "INT4", "MODEL"], 2, "exists; choose another output folder"),
        (["validate", "MODEL", "INT4", "--min-accuracy", "7"], 2, "error: min_accuracy is 7.0; allowed: a number"),
        (["doctor", "MODEL", "--config", "nowhere.yaml"], 2, "error: nowhere.yaml: cannot be read"),
        (["doctor", "MODEL", "--max-memory", "256MiB"], 2, "this model needs"),
        (["doctor", "MODEL", "--component", "unet"], 1, "is no pipeline (no model_index.json)"),
        (["quantize", "MODEL", "out", "--colour"], 2, "No such option"),
        (["quantize", "MODEL"], 2, "Missing argument"),
        (["quantise"], 2, "No such command"),
    ],
)
def test_errors_are_one_message_on_stderr(
    *, arguments: list[str], code: int, message: str, model: Path, int4: Path, arrow_quant: Command,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    before = content_of(model.parent)
    done = arrow_quant(*[{"MODEL": model, "INT4": int4}.get(word, word) for word in arguments])
    assert done.code == code
    assert message in " ".join(done.err.replace("│", " ").split())
    assert (done.out, "Traceback" in done.err) == ("", False)
    assert content_of(model.parent) == before
    assert list(tmp_path.iterdir()) == []


def test_a_missed_bar_is_three(model: Path, tmp_path: Path, arrow_quant: Command) -> None:
    done = arrow_quant(
        "quantize", model, tmp_path / "out", "--bits", "2", "--min-accuracy", "0.99", "--json", "--fallback", "none"
    )
    assert done.code == 3
    assert not json.loads(done.out)["passed"]
    (warning,) = [line for line in lines(done.err) if line.startswith("warning: ")]
    assert "is below 0.99 (min_accuracy 0.99); use more bits, smaller groups or fallback='layer'" in warning

    done = arrow_quant("validate", model, tmp_path / "out")
    assert done.code == 3
    assert lines(done.out)[-1].endswith("below the bar")
    assert done.out.startswith("MISSED: bar 0.99, weight cosine")
    assert arrow_quant("validate", model, tmp_path / "out", "--min-accuracy", "0.8").code == 0

    done = arrow_quant("quantize", model, tmp_path / "other", "--bits", 2, "--min-accuracy", 0.99, "--fail-fast", "-q")
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("error: layers.00.weight: weight cosine 0.9")


@pytest.mark.parametrize(("available", "verdict", "code"), [(10**6, "will not fit", 1), (None, "tight", 0)])
def test_doctor_warns_of_too_little_memory(
    *,
    available: int | None,
    verdict: str,
    code: int,
    model: Path,
    arrow_quant: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    needed = json.loads(arrow_quant("doctor", model, "--json").out)["predicted_peak_memory_mb"] * 1e6
    monkeypatch.setattr("arrow_quant_v2.doctor.available_bytes", lambda: available or int(needed * 1.2))
    done = arrow_quant("doctor", model)
    assert done.code == code
    assert lines(done.out)[-3].endswith(f"MB there: {verdict}")
    assert json.loads(arrow_quant("doctor", model, "--json").out)["verdict"] == verdict


@pytest.mark.parametrize(
    ("command", "hint"), [("validate", "interrupted; nothing was written"), ("quantize", "go on with: arrow-quant")]
)
def test_ctrl_c_at_once_is_130(
    *, command: str, hint: str, model: Path, int4: Path, arrow_quant: Command, monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ArrowQuantV2, "quantize_diffusion_model", interrupted)
    monkeypatch.setattr(ArrowQuantV2, "validate_quality", interrupted)
    done = arrow_quant(command, model, int4 if command == "validate" else tmp_path / "out")
    assert done.code == 130
    assert hint in done.err
    assert (done.out, "Traceback" in done.err) == ("", False)


# tables and progress


ROWS = [("encoder.layer.0.weight", "384x384", "kept as float32 instead of int4: a bias"), ("b", "7", "")]


def test_a_table_that_fits_has_one_line_per_row() -> None:
    found = ["|".join(row) for row in table_lines(("layer", "shape", "because"), ROWS)]
    assert found == [
        "layer                   shape    because",
        "encoder.layer.0.weight  384x384  kept as float32 instead of int4: a bias",
        "b                       7",
    ]


def test_a_narrow_terminal_gets_the_name_on_a_line_of_its_own() -> None:
    found = [line for row in table_lines(("layer", "shape", "because"), ROWS, width=40) for line in row]
    assert found == [
        "layer",
        "  shape    because",
        "encoder.layer.0.weight",
        "  384x384  kept as float32 instead of",
        "           int4: a bias",
        "b",
        "  7",
    ]


@pytest.mark.parametrize("width", [8, 20, 40, 80, 200])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    rows = [("name", "1x2", "many words " * 30), ("name", "3x4", "")]
    for row in table_lines(("layer", "shape", "because"), rows, width):
        assert all(len(line) <= width for line in list(row)[1:])


def test_names_of_others_control_no_terminal() -> None:
    _, (line,) = table_lines(("layer",), [("a\x1b]0;gone\x07b",)])
    assert line == "a\ufffd]0;gone\ufffdb"


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        cli_progress, "Console", lambda **more: Console(**more, force_terminal=True, width=80, height=24)
    )


@pytest.mark.usefixtures("terminal")
def test_a_terminal_gets_a_bar_with_the_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    with told_progress(quiet=False) as report:
        report("52/104 encoder.layer.11.attention.output.LayerNorm.a.very.long.name.bias, about 3 min 20 s left", 0.5)
    drawn = capsys.readouterr().err
    assert " 50%" in drawn
    assert "52/104 \u2026" in drawn
    assert "bias, about 3 min 20 s left" in drawn


@pytest.mark.usefixtures("terminal")
def test_the_bar_is_drawn_during_a_real_run(model: Path, tmp_path: Path, arrow_quant: Command) -> None:
    done = arrow_quant("quantize", model, tmp_path / "out")
    assert "\x1b[" in done.err
    assert "\x1b[" not in done.out


def test_without_a_terminal_a_line_comes_every_five_seconds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(cli_progress.time, "monotonic", lambda: now)
    with told_progress(quiet=False) as report:
        for now in range(12):
            report(f"{now}/12 layer", now / 12)
        report("12/12 layer", 1.0)
    assert lines(capsys.readouterr().err) == [
        "  0% 0/12 layer",
        " 41% 5/12 layer",
        " 83% 10/12 layer",
        "100% 12/12 layer",
    ]


def test_quiet_is_quiet() -> None:
    with told_progress(quiet=True) as report:
        assert report is None


def test_a_long_message_loses_its_middle() -> None:
    assert fitted("3/9 abcdefghij, 5 s left", 24) == "3/9 abcdefghij, 5 s left"
    assert fitted("3/9 abcdefghij, 5 s left", 20) == "3/9 \u2026efghij, 5 s left"[:4] + "\u2026fghij, 5 s left"
    assert fitted("3/9 abcdefghij", 3) == "3/9 abcdefghij"


def test_a_hundred_percent_is_only_told_at_the_end() -> None:
    assert [percent(fraction) for fraction in (0.0, 0.5, 0.9999, 1.0)] == [0, 50, 99, 100]


@pytest.mark.parametrize("verb", ["quantize", "calibrate"])
def test_a_device_that_is_not_there_costs_no_work(verb: str, model: Path, tmp_path: Path, arrow_quant: Command) -> None:
    for device, told in (
        ("tpu9", r"device.*'tpu9'.*cpu, cuda or cuda and a number"),
        ("cuda:99", r"device is 'cuda:99'; torch .* can work here on cpu.*: choose one of them"),
    ):
        done = arrow_quant(verb, model, tmp_path / "out", "--device", device)
        assert done.code == 2
        assert re.search(told, " ".join(done.err.split())), done.err
        assert "Traceback" not in done.err
        assert not list(tmp_path.iterdir())

"""Calibrate once, quantize often: stats are made, kept, merged and used again, and refused where they do not belong."""

from __future__ import annotations

import json
import signal
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from small_models import content_of, run_python
from text_models import SPECIAL, WORDS, save_folder, small_module

from arrow_quant_v2 import ArrowQuantV2, ConfigurationError, DiffusionQuantConfig
from arrow_quant_v2 import stats_run as stats_room
from arrow_quant_v2.calibration.masked_text import masked_calls
from arrow_quant_v2.calibration.stored_stats import KeptStats
from arrow_quant_v2.errors import InterruptedRunError, SourceError, StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

api = ArrowQuantV2()
HELD_OUT = ("A cat sleeps on the warm roof.", "Interest rates rose again this spring.", "He plays the cello badly.")


def settings(**more: Any) -> DiffusionQuantConfig:
    return DiffusionQuantConfig(
        **{"calibration_samples": 12, "calibration_tokens": 0, "num_time_groups": 3, "threads": 1, **more}
    )


def calibrate(model: Path, out: Path, *, calibration: Any = None, **more: Any) -> dict[str, Any]:
    own = {name: more.pop(name) for name in ("like", "compact", "overwrite") if name in more}
    return api.calibrate(model, out, settings(**more), calibration=calibration, **own)


@pytest.fixture(scope="module", autouse=True)
def _calibrated() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ARROW_QUANT_ENABLE_CALIBRATION", "true")
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A masked language model of two blocks whose weights are worth quantizing."""
    folder = tmp_path_factory.mktemp("model") / "bert"
    save_folder(folder, small_module("BertForMaskedLM", hidden_size=48, intermediate_size=80))
    (folder / "vocab.txt").write_text("\n".join([*SPECIAL, *WORDS]) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    return folder


@pytest.fixture(scope="module")
def stats(model: Path) -> Path:
    calibrate(model, model.parent / "stats")
    return model.parent / "stats"


def shows(numbers: range, turned: int = 0) -> Callable[[Any], Iterator[tuple[Any, float]]]:
    """A function that shows these of some calls, which are not spread evenly over time; `turned` changes them."""

    def provider(module: Any) -> Iterator[tuple[Any, float]]:
        draw = torch.Generator().manual_seed(3)
        sequences = [torch.randint(5, 21, (7 + number % 4,), generator=draw) for number in range(16)]
        special = torch.arange(40) < 5
        calls = masked_calls(module, sequences, 16, mask=4, special=special, seed=3)
        for number in numbers:
            call = calls[number]
            shown = {name: tensor.roll(turned, -1) for name, tensor in call.keywords.items()}
            yield shown, call.timestep**2

    return provider


# made


def test_it_tells_what_it_kept(model: Path, tmp_path: Path) -> None:
    done = calibrate(model, tmp_path / "stats")
    assert done["path"] == str(tmp_path / "stats")
    assert (done["samples"], done["origin"]) == (12, "12 samples of the model's own trajectory")
    assert (len(done["time_groups"]), done["reused"], done["synthetic"]) == (3, False, False)
    assert done["layers"] == 14
    assert done["inputs"] == 10
    assert done["seconds"] > 0.0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stats"]
    shared = KeptStats(tmp_path / "stats").summary.inputs[0].layers
    assert [name.rsplit(".", 2)[1] for name in shared] == ["query", "key", "value"]


def test_threads_make_no_difference(model: Path, stats: Path, tmp_path: Path) -> None:
    calibrate(model, tmp_path / "stats", threads=2)
    assert content_of(tmp_path / "stats") == content_of(stats)


def test_a_live_module_and_a_function_will_do(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        module = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.ReLU(), torch.nn.Linear(96, 32))
    config = settings(modality="image", bit_width=2, group_size=32, min_accuracy=0.0)

    def shown(_: Any) -> Iterator[tuple[Any, float]]:
        for step in range(4):
            yield torch.full((5, 64), 0.1 * step + 0.1), float(step)

    done = api.calibrate(module, tmp_path / "stats", config, calibration=shown)
    assert (done["layers"], done["samples"]) == (2, 20)
    result = api.quantize_diffusion_model(module, tmp_path / "out", config.replace(stats=str(tmp_path / "stats")))
    assert result["calibration"]["samples"] == 20


def test_progress_ends_at_the_end(model: Path, tmp_path: Path) -> None:
    told: list[tuple[str, float]] = []
    api.calibrate(model, tmp_path / "stats", settings(), lambda *one: told.append(one))
    assert [fraction for _, fraction in told] == sorted(fraction for _, fraction in told)
    assert told[-1][1] == 1.0
    assert any("observing 14 layers in" in message for message, _ in told)


def test_a_model_that_cannot_be_run_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    save_file({"w.weight": torch.ones(64, 64)}, tmp_path / "model" / "model.safetensors")
    with pytest.raises(SourceError, match=r"has no config\.json"):
        calibrate(tmp_path / "model", tmp_path / "stats", modality="text")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_disk_without_room_is_told_before_the_pass(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        free = 1000

    monkeypatch.setattr(stats_room.shutil, "disk_usage", lambda _: Full)
    with pytest.raises(ConfigurationError, match=r"the stats take . MB, and the disk has 0 MB free; --compact needs"):
        calibrate(model, tmp_path / "stats")
    assert list(tmp_path.iterdir()) == []


# made before


def test_the_same_again_is_there_already(model: Path, stats: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats_room, "prepare", None)
    before = content_of(stats)
    done = calibrate(model, stats)
    assert done["reused"]
    assert done["samples"] == 12
    assert content_of(stats) == before


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"seed": 1}, "another seed"),
        ({"calibration_samples": 5, "num_time_groups": 2}, "another number of samples and time groups"),
        ({"compact": True}, "another way of keeping time groups"),
    ],
)
def test_what_is_not_the_same_is_refused(more: dict[str, Any], what: str, model: Path, stats: Path) -> None:
    before = content_of(stats)
    with pytest.raises(
        ConfigurationError, match=f"holds stats made with {what}; choose another folder, or --overwrite"
    ):
        calibrate(model, stats, **more)
    assert content_of(stats) == before


def test_changed_weights_are_another_model(model: Path, tmp_path: Path) -> None:
    other = copied(model, tmp_path / "other")
    calibrate(other, tmp_path / "stats")
    touched(other)
    with pytest.raises(ConfigurationError, match="holds stats made with another model"):
        calibrate(other, tmp_path / "stats")


def test_other_stats_are_replaced_when_asked(model: Path, stats: Path, tmp_path: Path) -> None:
    calibrate(model, tmp_path / "stats", seed=5)
    calibrate(model, tmp_path / "stats", overwrite=True)
    assert content_of(tmp_path / "stats") == content_of(stats)


def test_damaged_stats_are_told_and_replaced_when_asked(model: Path, tmp_path: Path) -> None:
    calibrate(model, tmp_path / "stats")
    (tmp_path / "stats" / "00000-000.safetensors").unlink()
    with pytest.raises(StoreError, match="does not exist"):
        calibrate(model, tmp_path / "stats")
    assert not calibrate(model, tmp_path / "stats", overwrite=True)["reused"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_not_ours_is_never_replaced(overwrite: bool, model: Path, tmp_path: Path) -> None:
    (tmp_path / "stats").mkdir()
    (tmp_path / "stats" / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigurationError, match="exists and holds no stats"):
        calibrate(model, tmp_path / "stats", overwrite=overwrite)
    assert content_of(tmp_path) == {"stats/thesis.txt": b"years of work"}


# interrupted


@pytest.mark.parametrize(
    ("error", "left_behind"),
    [(KeyboardInterrupt, {"run.json", "parts", "samples"}), (OSError(28, "No space left on device"), set())],
)
def test_an_interruption_leaves_samples_at_most(
    error: Any, left_behind: set[str], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = iter([False, False, True])

    def write(*arguments: Any) -> Any:
        if next(left):
            raise error
        return stats_write(*arguments)

    stats_write = stats_room.write_input
    monkeypatch.setattr(stats_room, "write_input", write)
    with pytest.raises((KeyboardInterrupt, OSError)):
        calibrate(model, tmp_path / "stats")
    assert {path.name for path in tmp_path.glob("*/*")} == left_behind
    assert not (tmp_path / "stats").exists()


KILLED = """
import os, signal, sys
from arrow_quant_v2 import ArrowQuantV2, DiffusionQuantConfig, stats_run

model, out, place = sys.argv[1:]
setattr(stats_run, place, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
config = DiffusionQuantConfig(calibration_samples=12, calibration_tokens=0, num_time_groups=3, threads=1)
ArrowQuantV2().calibrate(model, out, config)
"""


def test_a_killed_run_looks_unfinished_and_the_next_one_is_whole(model: Path, stats: Path, tmp_path: Path) -> None:
    done = run_python(KILLED, model, tmp_path / "stats", "write_summary", OMP_NUM_THREADS="1")
    assert done.code == -signal.SIGKILL, done.err
    assert [path.name for path in tmp_path.iterdir()] == ["stats.partial"]
    assert list(tmp_path.rglob("stats.json")) == []
    calibrate(model, tmp_path / "stats")
    assert content_of(tmp_path) == {f"stats/{name}": content for name, content in content_of(stats).items()}


# merged


def same(one: KeptStats, other: KeptStats) -> None:
    """Equal up to rounding."""
    mine, theirs = one.summary, other.summary
    assert (mine.sizes, mine.time_groups, mine.layers) == (theirs.sizes, theirs.time_groups, theirs.layers)
    for number in range(len(mine.inputs)):
        first, second = one.read(number).tensors(), other.read(number).tensors()
        assert first.keys() == second.keys()
        for name, tensor in first.items():
            scale = tensor.abs().max() if name == "second" else 1.0
            torch.testing.assert_close(tensor / scale, second[name] / scale, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cuts", [(9,), (2, 5, 13)])
def test_merged_stats_are_those_of_all_samples_at_once(cuts: tuple[int, ...], model: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    calibrate(model, whole, calibration=shows(range(16)), calibration_samples=16)
    assert len(set(KeptStats(whole).summary.sizes)) > 1
    edges = [0, *cuts, 16]
    parts = [tmp_path / str(number) for number in range(len(cuts) + 1)]
    for part, start, stop in zip(parts, edges, edges[1:], strict=False):
        calibrate(model, part, calibration=shows(range(start, stop)), like=whole)
    done = api.merge_stats(parts, tmp_path / "merged")
    assert (done["samples"], done["layers"]) == (16, 14)
    same(KeptStats(tmp_path / "merged"), KeptStats(whole))


def test_compact_stats_are_the_same_and_merge_where_their_strata_are_alike(model: Path, tmp_path: Path) -> None:
    for kind, compact in (("apart", False), ("compact", True)):
        one, other = tmp_path / kind, tmp_path / f"{kind}-turned"
        calibrate(model, one, compact=compact, calibration=shows(range(16)))
        calibrate(model, other, compact=compact, calibration=shows(range(16), turned=2), like=one)
        api.merge_stats([one, other], tmp_path / f"{kind}-merged")
    for kind in ("", "-turned", "-merged"):
        same(KeptStats(tmp_path / f"apart{kind}"), KeptStats(tmp_path / f"compact{kind}"))
    small, large = (sum(map(len, content_of(tmp_path / name).values())) for name in ("compact", "apart"))
    assert small < large
    calibrate(model, tmp_path / "few", compact=True, like=tmp_path / "compact", calibration=shows(range(3)))
    with pytest.raises(ConfigurationError, match="summed up with other weights; make them without --compact"):
        api.merge_stats([tmp_path / "compact", tmp_path / "few"], tmp_path / "no")


def test_stats_that_do_not_belong_together_are_refused(model: Path, stats: Path, tmp_path: Path) -> None:
    def refused(other: Path, said: str) -> None:
        with pytest.raises(ConfigurationError, match=said):
            api.merge_stats([stats, other], tmp_path / "merged")
        assert not (tmp_path / "merged").exists()

    refused(stats, "was made from the same samples as .*, which would count twice")
    calibrate(model, tmp_path / "seed", seed=1)
    refused(tmp_path / "seed", "cannot be merged: they have another time groups.*; make them with --like the first")
    calibrate(model, tmp_path / "compact", seed=1, like=stats, compact=True)
    refused(tmp_path / "compact", "another way of keeping time groups")
    other = touched(copied(model, tmp_path / "other"))
    calibrate(other, tmp_path / "other stats", seed=1, like=stats)
    refused(tmp_path / "other stats", "another values of the model's weights")
    with pytest.raises(ConfigurationError, match="two stats or more are needed"):
        api.merge_stats([stats], tmp_path / "merged")


def test_merged_stats_are_there_already_when_asked_again(model: Path, stats: Path, tmp_path: Path) -> None:
    calibrate(model, tmp_path / "more", seed=1, like=stats)
    assert not api.merge_stats([stats, tmp_path / "more"], tmp_path / "merged")["reused"]
    assert api.merge_stats([stats, tmp_path / "more"], tmp_path / "merged")["reused"]
    with pytest.raises(ConfigurationError, match="holds stats made with another merged stats"):
        api.merge_stats([tmp_path / "more", stats], tmp_path / "merged")
    with pytest.raises(ConfigurationError, match="lies in the model's own folder or around it"):
        api.merge_stats([stats, tmp_path / "more"], tmp_path / "more", overwrite=True)


# used


def quantize(model: Path, out: Path, stats: Path, **more: Any) -> dict[str, Any]:
    config = {"bit_width": 2, "group_size": 16, "min_accuracy": 0.0, "stats": str(stats)}
    return api.quantize_diffusion_model(model, out, settings(**(config | more)))


def test_stats_are_used_again_with_the_same_bytes(
    model: Path, stats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("arrow_quant_v2.orchestrator.prepare", None)
    before = content_of(stats)
    result = quantize(model, tmp_path / "first", stats)
    quantize(model, tmp_path / "second", stats)
    assert content_of(tmp_path / "first") == content_of(tmp_path / "second")
    assert content_of(stats) == before
    shown = "stats stats (12 samples of the model's own trajectory)"
    assert (result["calibration"]["origin"], result["calibration"]["stats"]) == (shown, str(stats))
    reasons = {one.layer_name: one.because for one in result["decisions"] if one.kind == "quantized"}
    fitted = {name for name, because in reasons.items() if f"calibrated on {shown}" in because}
    assert fitted == set(KeptStats(stats).summary.layers)
    left = [because for name, because in reasons.items() if name not in fitted]
    assert left
    assert all(because.endswith("not calibrated: the stats hold no inputs of it, or only zeros") for because in left)


def test_layers_that_are_kept_are_left_alone(model: Path, stats: Path, tmp_path: Path) -> None:
    result = quantize(model, tmp_path / "out", stats, keep=("*.query.weight",))
    kept = [one for one in result["decisions"] if one.layer_name.endswith("query.weight")]
    assert {one.kind for one in kept} == {"kept"}


def test_a_run_that_was_stopped_goes_on_with_the_same_stats_only(model: Path, stats: Path, tmp_path: Path) -> None:
    config = settings(bit_width=2, group_size=16, min_accuracy=0.0, stats=str(stats))
    answers = iter([False] * 4 + [True])
    with pytest.raises(InterruptedRunError, match="stopped after 5 of 14 calibrated layers"):
        api.quantize_diffusion_model(model, tmp_path / "out", config, should_stop=lambda: next(answers))
    calibrate(model, tmp_path / "other", seed=1)
    with pytest.raises(ConfigurationError, match="holds unfinished work on another stats"):
        quantize(model, tmp_path / "out", tmp_path / "other")
    quantize(model, tmp_path / "out", stats)
    quantize(model, tmp_path / "whole", stats)
    assert content_of(tmp_path / "out") == content_of(tmp_path / "whole")


def test_stats_of_another_model_are_refused(model: Path, stats: Path, tmp_path: Path) -> None:
    other = touched(copied(model, tmp_path / "other"))
    with pytest.raises(ConfigurationError, match=r"stats of a model with the tensors of .* but other values"):
        quantize(other, tmp_path / "out", stats)
    save_folder(tmp_path / "third", small_module("BertForMaskedLM", hidden_size=64))
    with pytest.raises(ConfigurationError, match="stats of another model than"):
        quantize(tmp_path / "third", tmp_path / "out", stats)
    assert not (tmp_path / "out").exists()


def test_the_doctor_says_what_the_stats_hold(model: Path, stats: Path, tmp_path: Path) -> None:
    own = copied(stats, tmp_path / "stats")
    kept = json.loads((own / "stats.json").read_text())
    left_out = kept["inputs"].pop()
    (own / "stats.json").write_text(json.dumps(kept))
    found = [api.doctor(model, settings(stats=str(one)))["calibrated_layers"] for one in (stats, own)]
    assert found == [14, 14 - len(left_out["layers"])]
    save_folder(tmp_path / "third", small_module("BertForMaskedLM", hidden_size=64))
    with pytest.raises(ConfigurationError, match="stats of another model than"):
        api.doctor(tmp_path / "third", settings(stats=str(stats)))


def test_stats_whose_layers_are_not_the_model_s_are_refused(model: Path, stats: Path, tmp_path: Path) -> None:
    own = copied(stats, tmp_path / "stats")
    text = (own / "stats.json").read_text()
    (own / "stats.json").write_text(text.replace("layer.1.output.dense.weight", "layer.1.attention.output.dense.bias"))
    with pytest.raises(StoreError, match=r"dense\.bias is \(48,\) in the model; its input has 80 channels"):
        quantize(model, tmp_path / "out", own)


@pytest.mark.parametrize(
    "more", [{"calibration_data": "texts.jsonl"}, {"enable_calibration": False}, {"method": "clip"}, {"method": "rtn"}]
)
def test_settings_that_contradict_stats_are_refused(more: dict[str, Any]) -> None:
    (name,) = more
    with pytest.raises(ConfigurationError, match=f"stats is 's' and {name} is .*, which contradict each other"):
        DiffusionQuantConfig(stats="s", **more)


def test_stats_and_a_function_are_refused(model: Path, stats: Path, tmp_path: Path) -> None:
    config = settings(stats=str(stats))
    with pytest.raises(ConfigurationError, match="stats and a calibration function were given"):
        api.quantize_diffusion_model(model, tmp_path / "out", config, calibration=shows(range(2)))
    with pytest.raises(ConfigurationError, match="leave the setting `stats` out"):
        calibrate(model, tmp_path / "new", stats=str(stats))


def test_the_place_of_stats_does_not_decide_the_bytes() -> None:
    assert DiffusionQuantConfig(stats="a").identity() == DiffusionQuantConfig(stats="b").identity()


# the command


def test_the_commands_do_it(
    model: Path, tmp_path: Path, arrow_quant: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARROW_QUANT_CALIBRATION_TOKENS", "0")
    asked = ("--samples", 6, "--threads", 1, "--quiet")
    done = arrow_quant("calibrate", model, tmp_path / "a", *asked)
    assert (done.code, done.err) == (0, "")
    assert "stats of 14 layers, " in done.out
    assert "6 samples of the model's own trajectory, 2 time groups" in done.out
    assert "were there already" in arrow_quant("calibrate", model, tmp_path / "a", *asked).out
    refused = arrow_quant("calibrate", model, tmp_path / "a", *asked, "--seed", 1)
    assert (refused.code, refused.out) == (2, "")
    assert "error: " in refused.err
    assert arrow_quant("calibrate", model, tmp_path / "b", *asked, "--seed", 1, "--like", tmp_path / "a").code == 0
    merged = arrow_quant("merge-stats", tmp_path / "a", tmp_path / "b", tmp_path / "c", "--json")
    assert json.loads(merged.out)["samples"] == 12
    used = arrow_quant("quantize", model, tmp_path / "out", "--stats", tmp_path / "c", "--min-accuracy", 0, "--quiet")
    assert used.code == 0, used.err
    assert "calibrated on stats c (6 samples of the model's own trajectory and 6 samples of" in used.out
    both = arrow_quant("quantize", model, tmp_path / "no", "--stats", tmp_path / "c", "--calibration", "t.jsonl")
    assert both.code == 2
    assert "contradict each other" in both.err


# worth


def test_int2_from_stats_is_closer_than_from_the_weights_alone(minilm: Path, tmp_path: Path) -> None:
    lines = [f"The {noun} {verb} {place}." for noun in NOUNS for verb in VERBS for place in PLACES]
    (tmp_path / "texts.txt").write_text("\n".join(lines))
    config = DiffusionQuantConfig.from_profile("edge", threads=1, min_accuracy=0.0)
    shown = config.replace(calibration_data=str(tmp_path / "texts.txt"))
    api.calibrate(minilm, tmp_path / "stats", shown)
    for name, more in (("stats", {"stats": str(tmp_path / "stats")}), ("alone", {"enable_calibration": False})):
        api.quantize_diffusion_model(minilm, tmp_path / f"q{name}", config.replace(**more))
        api.convert(tmp_path / f"q{name}", tmp_path / name / "model")
    before = embedded(minilm)
    seen, alone = (cosine(before, embedded(tmp_path / name / "model")) for name in ("stats", "alone"))
    assert seen > alone + 0.1, (seen, alone)


NOUNS = ("old fisherman", "young engineer", "quiet river", "new printer", "minister of finance")
VERBS = ("sings about", "is looking for", "was seen near", "cannot be found without")
PLACES = ("the harbour of the small town", "a mountain in winter")


def embedded(folder: Path) -> torch.Tensor:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    module = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        return torch.cat([module(**tokenizer(text, return_tensors="pt")).last_hidden_state[0] for text in HELD_OUT])


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(one, other).mean())


def copied(folder: Path, target: Path) -> Path:
    target.mkdir()
    for name, content in content_of(folder).items():
        (target / name).write_bytes(content)
    return target


def touched(model: Path) -> Path:
    """The same model with one other value."""
    tensors = load_file(model / "model.safetensors")
    next(iter(tensors.values())).view(-1)[3] += 0.5
    save_file(tensors, model / "model.safetensors")
    return model

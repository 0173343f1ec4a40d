"""Laws of the configuration: its defaults, who wins, what it refuses and how it says so."""

import json
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arrow_quant_v2.config import METHODS, MODALITIES, PROFILES, DiffusionQuantConfig, LayerSpec
from arrow_quant_v2.errors import ConfigurationError

DEFAULTS = {
    "bit_width": 4,
    "modality": None,
    "num_time_groups": 10,
    "group_size": 128,
    "enable_time_aware": True,
    "enable_spatial": True,
    "activation_smoothing": False,
    "min_accuracy": 0.85,
    "calibration_samples": 128,
    "calibration_tokens": 32_768,
    "deployment_profile": "local",
    "fallback": "layer",
    "fail_fast": False,
    "method": None,
    "enable_calibration": True,
    "calibration_data": None,
    "stats": None,
    "mask_token": None,
    "enable_importance": True,
    "enable_rotation": True,
    "grid_refits": 2,
    "code_sweeps": 3,
    "error_correction": 0.5,
    "tuning_steps": 0,
    "seed": 0,
    "device": "cpu",
    "time_groups": "uniform",
    "symmetric": False,
    "component": None,
    "max_memory": None,
    "threads": None,
    "keep": (),
    "layer_bit_widths": {},
    "sensitive_layer_names": (),
    "sensitive_layer_patterns": (),
    "skip_sensitive_layers": False,
    "target_bits": None,
    "target_size": None,
    "whole_plans": 5,
}

WRONG: list[tuple[str, Any]] = [
    *[("whole_plans", value) for value in (0, 6, 2.0, "2", None)],
    *[("bit_width", value) for value in (3, 0, 16, "4", 4.0, True, None, [4])],
    *[("modality", value) for value in ("video", "", "TEXT", 1)],
    *[("num_time_groups", value) for value in (0, 101, -1, 5.0, "5", True, None)],
    *[("group_size", value) for value in (0, -8, 7, 12, 65_544, 64.0, "64", "column", True)],
    *[("enable_time_aware", value) for value in (1, 0, "true", None)],
    ("enable_spatial", 1),
    *[("min_accuracy", value) for value in (-0.01, 1.01, float("nan"), float("inf"), "0.9", True, None)],
    *[("calibration_samples", value) for value in (0, 1_000_001, 1.5, False)],
    *[("calibration_tokens", value) for value in (-1, 10**9 + 1, 1.5, True)],
    *[("deployment_profile", value) for value in ("laptop", "EDGE", None, 3, ["edge"])],
    ("fail_fast", "no"),
    ("fallback", "all"),
    ("fallback", None),
    *[("method", value) for value in ("gguf", "", "GPTQ", 2)],
    *[("enable_calibration", value) for value in (1, "yes", None)],
    *[("calibration_data", value) for value in ("", 3, Path("texts.jsonl"))],
    *[("mask_token", value) for value in (-1, 4.0, "[MASK]", True)],
    *[("seed", value) for value in (-1, 2**63, 0.5, "1", True, None)],
    *[("time_groups", value) for value in ("even", 5, None)],
    ("symmetric", 0),
    *[("component", value) for value in ("", ".", "..", "../unet", "a/b", "a\\b", "a\0b", 5)],
    *[("max_memory", value) for value in (0, -1, 2**28 - 1, "255MiB", "4", "GB", "4XB", "-4GB", "", 1e9, True)],
    *[("threads", value) for value in (0, 1025, 2.0, "2", True)],
    *[("keep", value) for value in ("*.bias", ["a", ""], [1], {"a"}, None)],
    *[("layer_bit_widths", value) for value in ({"a": 3}, {"a": "4"}, {"a": 4.0}, {"": 4}, {"re:(": 4}, ["a"], None)],
    *[("sensitive_layer_names", value) for value in ("a", [""], [1], None)],
    *[("sensitive_layer_patterns", value) for value in ("a", ["("], [""], None)],
    ("skip_sensitive_layers", 1),
    *[("target_bits", value) for value in (0.0, -1.0, 64.5, "3", float("nan"), True)],
    *[("target_size", value) for value in (0, -1, "3XB", 1.5, True)],
]


@pytest.fixture(autouse=True, scope="module")
def _no_environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in DEFAULTS:
            patch.delenv(f"ARROW_QUANT_{name.upper()}", raising=False)
        yield


def refused(action: Any, *args: Any, **settings: Any) -> str:
    """The message with which it is refused."""
    with pytest.raises(ConfigurationError) as caught:
        action(*args, **settings)
    assert type(caught.value) is ConfigurationError
    return str(caught.value)


# What it is


def test_defaults_are_the_promised_ones() -> None:
    assert DiffusionQuantConfig().model_dump() == DEFAULTS
    assert DiffusionQuantConfig.from_profile("local") == DiffusionQuantConfig()


@pytest.mark.parametrize(
    ("name", "promised"),
    [("edge", (2, 64, 5, 0.70, 32)), ("local", (4, 128, 10, 0.85, 128)), ("cloud", (8, 128, 20, 0.95, 512))],
)
def test_profiles_are_the_promised_ones(name: str, promised: tuple[float, ...]) -> None:
    got = DiffusionQuantConfig.from_profile(name)
    figures = got.bit_width, got.group_size, got.num_time_groups, got.min_accuracy, got.calibration_samples
    assert figures == promised
    assert got == DiffusionQuantConfig(**PROFILES[name], deployment_profile=got.deployment_profile)


def test_every_setting_says_what_is_allowed_and_is_documented() -> None:
    documented = re.findall(r"^    (\w+) {2,}\S", DiffusionQuantConfig.__doc__ or "", re.MULTILINE)
    assert documented == list(DiffusionQuantConfig.model_fields) == list(DEFAULTS)
    assert all(field.description for field in DiffusionQuantConfig.model_fields.values())


def test_it_is_frozen_hashable_and_survives_pickling() -> None:
    config = DiffusionQuantConfig(keep=("*.bias",))
    assert "threads cannot be set" in refused(setattr, config, "threads", 2)
    assert pickle.loads(pickle.dumps(config)) == config
    assert len({config, DiffusionQuantConfig(keep=("*.bias",))}) == 1
    assert DiffusionQuantConfig.model_validate(config) is config


def test_replace_checks_and_ignores_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    config = DiffusionQuantConfig(threads=2)
    monkeypatch.setenv("ARROW_QUANT_METHOD", "rtn")
    assert config.replace(bit_width=8) == DiffusionQuantConfig(bit_width=8, threads=2, method=None)
    assert refused(config.replace, bit_width=3).startswith("bit_width is 3")


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("4GB", 4 * 10**9),
        ("512MiB", 2**29),
        ("1.5 gib", 3 * 2**29),
        ("300000KB", 3 * 10**8),
        ("2TiB", 2**41),
        ("300000000B", 3 * 10**8),
        (" 256MiB ", 2**28),
    ],
)
def test_memory_is_written_in_units(text: str, count: int) -> None:
    assert DiffusionQuantConfig.from_profile("local", max_memory=text).max_memory == count


def test_row_is_a_group_size_and_a_list_of_names_a_tuple() -> None:
    config = DiffusionQuantConfig.from_profile("local", group_size="row", keep=["a.*", "b"])
    assert config.group_size is None
    assert config.keep == ("a.*", "b")


# Who wins: keyword > environment > YAML > profile > default


def test_keyword_beats_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARROW_QUANT_BIT_WIDTH", "2")
    assert DiffusionQuantConfig(bit_width=8).bit_width == 8
    assert DiffusionQuantConfig.from_profile("cloud", bit_width=4).bit_width == 4
    assert DiffusionQuantConfig.from_yaml_text("threads: 1", bit_width=4).bit_width == 4


def test_keyword_beats_yaml_profile_and_default() -> None:
    assert DiffusionQuantConfig.from_yaml_text("bit_width: 2", bit_width=8).bit_width == 8
    assert DiffusionQuantConfig.from_profile("edge", group_size=32).group_size == 32
    assert DiffusionQuantConfig(group_size=None).group_size is None


def test_environment_beats_yaml_profile_and_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARROW_QUANT_BIT_WIDTH", "8")
    assert DiffusionQuantConfig.from_yaml_text("bit_width: 2").bit_width == 8
    assert DiffusionQuantConfig.from_profile("edge").bit_width == 8
    assert DiffusionQuantConfig().bit_width == 8


def test_yaml_beats_profile_and_default() -> None:
    config = DiffusionQuantConfig.from_yaml_text("profile: edge\nbit_width: 4\nfail_fast: true")
    assert (config.bit_width, config.group_size, config.fail_fast) == (4, 64, True)


def test_profile_beats_default_whoever_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    edge = DiffusionQuantConfig.from_profile("edge")
    assert DiffusionQuantConfig(deployment_profile="edge") == edge
    assert DiffusionQuantConfig.from_yaml_text("profile: edge") == edge
    assert DiffusionQuantConfig.from_yaml_text("deployment_profile: edge") == edge
    assert DiffusionQuantConfig.from_yaml_text("profile: cloud", deployment_profile="edge") == edge
    monkeypatch.setenv("ARROW_QUANT_DEPLOYMENT_PROFILE", "edge")
    assert DiffusionQuantConfig() == edge
    assert DiffusionQuantConfig.from_profile("cloud").bit_width == 8


# The environment


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("BIT_WIDTH", "2", 2),
        ("GROUP_SIZE", "row", None),
        ("GROUP_SIZE", "none", None),
        ("MIN_ACCURACY", "0.5", 0.5),
        ("MIN_ACCURACY", "1", 1.0),
        ("FAIL_FAST", "1", True),
        ("ENABLE_SPATIAL", "False", False),
        ("MODALITY", "audio", "audio"),
        ("COMPONENT", "7", "7"),
        ("COMPONENT", "none", None),
        ("MAX_MEMORY", "4GB", 4 * 10**9),
        ("MAX_MEMORY", "4000000000", 4 * 10**9),
        ("KEEP", "*.bias, lm_head.*,", ("*.bias", "lm_head.*")),
        ("METHOD", "", None),
        ("METHOD", "none", None),
        ("METHOD", "gptq", "gptq"),
        ("ENABLE_CALIBRATION", "off", False),
        ("CALIBRATION_DATA", "7", "7"),
        ("CALIBRATION_DATA", "none", None),
        ("MASK_TOKEN", "4", 4),
        ("SEED", "7", 7),
        ("TIME_GROUPS", "balanced", "balanced"),
        ("LAYER_BIT_WIDTHS", "lm_head=8, re:a=b=16", (("lm_head", 8), ("re:a=b", 16))),
        ("SENSITIVE_LAYER_NAMES", "lm_head, proj", ("lm_head", "proj")),
    ],
)
def test_environment_text_becomes_the_settings_type(
    monkeypatch: pytest.MonkeyPatch, name: str, text: str, value: object
) -> None:
    monkeypatch.setenv(f"ARROW_QUANT_{name}", text)
    assert getattr(DiffusionQuantConfig(), name.lower()) == value


def test_variables_of_the_kernels_room_are_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARROW_QUANT_KERNELS", "reference")
    monkeypatch.setenv("ARROW_QUANT_ISA", "avx2")
    assert DiffusionQuantConfig() == DiffusionQuantConfig.model_validate({})


@pytest.mark.parametrize("text", ["3", "4.0", "true", "nan", "four", "0x4", "9" * 5000])
def test_a_wrong_variable_is_refused_by_its_own_name(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("ARROW_QUANT_BIT_WIDTH", text)
    assert re.match(r"ARROW_QUANT_BIT_WIDTH is .+; allowed: 2, 4 or 8$", refused(DiffusionQuantConfig))
    assert "ARROW_QUANT_BIT_WIDTH" in refused(DiffusionQuantConfig.from_yaml_text, "bit_width: 4")


@pytest.mark.parametrize(
    ("variable", "closest"),
    [("BIT_WIDHT", "BIT_WIDTH"), ("PROFILE", "DEPLOYMENT_PROFILE"), ("KERNEL", "KERNELS"), ("bits", "BIT_WIDTH")],
)
def test_an_unknown_variable_is_refused_with_the_closest(
    monkeypatch: pytest.MonkeyPatch, variable: str, closest: str
) -> None:
    monkeypatch.setenv(f"ARROW_QUANT_{variable}", "2")
    expected = f"unknown setting ARROW_QUANT_{variable.upper()}; did you mean ARROW_QUANT_{closest}?"
    assert refused(DiffusionQuantConfig) == expected


# Refusals


@pytest.mark.parametrize(("name", "value"), WRONG, ids=lambda part: str(part)[:20])
def test_a_wrong_value_is_refused_with_name_value_and_choices(name: str, value: object) -> None:
    allowed = DiffusionQuantConfig.model_fields[name].description
    message = refused(DiffusionQuantConfig, **{name: value})
    assert message == f"{name} is {value!r}; allowed: {allowed}"
    assert refused(DiffusionQuantConfig.from_yaml_text, "symmetric: true", **{name: value}) == message


@pytest.mark.parametrize(
    ("name", "closest"),
    [("bit_widht", "bit_width"), ("bits", "bit_width"), ("profile", "deployment_profile"), ("Threads", "threads")],
)
def test_an_unknown_setting_is_refused_with_the_closest(name: str, closest: str) -> None:
    assert refused(DiffusionQuantConfig, **{name: 2}) == f"unknown setting {name}; did you mean {closest}?"


def test_an_unknown_setting_like_no_other_is_refused_with_all_names() -> None:
    assert refused(DiffusionQuantConfig, zzz=1) == f"unknown setting zzz; known: {', '.join(DEFAULTS)}"


def test_all_problems_are_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARROW_QUANT_THREADS", "0")
    message = refused(DiffusionQuantConfig.from_yaml_text, "min_accuracy: 2\nbits: 4", bit_width=3)
    assert message.splitlines() == [
        "4 settings are wrong:",
        "  - bit_width is 3; allowed: 2, 4 or 8",
        "  - min_accuracy (YAML text, line 1) is 2; allowed: a number from 0 to 1",
        "  - ARROW_QUANT_THREADS is 0; allowed: a whole number from 1 to 1024, or None for all",
        "  - unknown setting bits (YAML text, line 2); did you mean bit_width?",
    ]


def test_a_hostile_value_does_not_flood_the_message() -> None:
    assert len(refused(DiffusionQuantConfig, modality="x" * 10**6)) < 300
    assert len(refused(DiffusionQuantConfig.from_yaml_text, f"? {'x' * 10**5}\n: 1")) < 700
    bomb = "a: &a [x, x, x, x]\n" + "".join(
        f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}]\n" for a, b in zip("abcdefg", "bcdefgh", strict=True)
    )
    assert len(refused(DiffusionQuantConfig.from_yaml_text, bomb + "keep: *h")) < 5000


@pytest.mark.parametrize("given", [3, "edge", None, [("bit_width", 4)]])
def test_what_is_no_mapping_is_refused(given: object) -> None:
    assert "mapping" in refused(DiffusionQuantConfig.model_validate, given)


# YAML


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("", 1, "not nothing"),
        ("# only a comment\n", 1, "not nothing"),
        ("- bit_width\n", 1, "a mapping of settings"),
        ("edge", 1, "a mapping of settings"),
        ("threads: 2\nkeep: [a", 2, "not valid YAML"),
        ("threads: 2\n\tkeep: a", 2, "not valid YAML"),
        ("threads: 2\n---\nthreads: 3", 2, "not valid YAML"),
        ("threads: 2\nmodality: \x07", 2, "not valid YAML"),
        ("threads: !!python/object/apply:os.system [true]", 1, "not valid YAML"),
        ("\nthreads: 2020-13-45", 2, "not valid YAML"),
        ("\nthreads: " + "9" * 5000, 2, "not valid YAML"),
        ("keep: &a [*a]", 1, "not valid YAML"),
        ("? [a]\n: 2", 1, "the name of a setting is text"),
        ("threads: 2\nthreads: 3", 2, "'threads' is given twice"),
        ("profile: edge\ndeployment_profile: edge", 2, "'deployment_profile' is given twice"),
        ("\nbit_width: 3", 2, "is 3; allowed: 2, 4 or 8"),
        ("on: true", 1, "unknown setting on"),
        ("2: 4", 1, "unknown setting 2"),
        ("<<: {bit_width: 2}", 1, "unknown setting <<"),
        ("_env_file: x", 1, "unknown setting _env_file"),
        ("self: 1", 1, "unknown setting self"),
    ],
)
def test_wrong_yaml_is_refused_with_file_and_line(tmp_path: Path, text: str, line: int, reason: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    message = refused(DiffusionQuantConfig.from_yaml, path)
    assert f"{path}, line {line}" in message
    assert reason in message


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    assert refused(DiffusionQuantConfig.from_yaml, tmp_path / "no.yaml").endswith("No such file or directory")
    assert "cannot be read" in refused(DiffusionQuantConfig.from_yaml, tmp_path)
    assert "cannot be read" in refused(DiffusionQuantConfig.from_yaml, "a\0b")
    (tmp_path / "latin.yaml").write_bytes(b"threads: 2\nmodality: \xe9")
    assert refused(DiffusionQuantConfig.from_yaml, tmp_path / "latin.yaml").endswith("line 2: not UTF-8 text")
    (tmp_path / "large.yaml").write_bytes(b"#" * 1_000_001)
    assert "larger than 1000000 bytes" in refused(DiffusionQuantConfig.from_yaml, tmp_path / "large.yaml")
    assert "nested too deeply" in refused(DiffusionQuantConfig.from_yaml_text, "keep:\n" + "- " * 1000)
    assert "cannot be written" in refused(DiffusionQuantConfig().to_yaml, tmp_path / "no" / "out.yaml")


def test_the_yaml_that_is_written_is_frozen(tmp_path: Path) -> None:
    config = DiffusionQuantConfig.from_profile("edge", group_size=None, keep=("*.bias",), max_memory="4GB")
    config = config.replace(layer_bit_widths={"lm_head": 8})
    assert config.to_yaml(tmp_path / "c.yaml") == (
        "bit_width: 2\nmodality: null\nnum_time_groups: 5\ngroup_size: null\nenable_time_aware: true\n"
        "enable_spatial: true\nactivation_smoothing: false\nmin_accuracy: 0.7\ncalibration_samples: 32\n"
        "calibration_tokens: 32768\ndeployment_profile: edge\n"
        "fallback: layer\nfail_fast: false\nmethod: null\nenable_calibration: true\ncalibration_data: null\n"
        "stats: null\nmask_token: null\nenable_importance: true\nenable_rotation: true\n"
        "grid_refits: 2\ncode_sweeps: 3\nerror_correction: 0.5\ntuning_steps: 0\nseed: 0\ndevice: cpu\n"
        "time_groups: uniform\nsymmetric: false\ncomponent: null\nmax_memory: 4000000000\n"
        "threads: null\nkeep:\n- '*.bias'\n"
        "layer_bit_widths:\n  lm_head: 8\nsensitive_layer_names: []\nsensitive_layer_patterns: []\n"
        "skip_sensitive_layers: false\ntarget_bits: null\ntarget_size: null\nwhole_plans: 5\n"
    )
    assert DiffusionQuantConfig.from_yaml(str(tmp_path / "c.yaml")) == config


names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
configs = st.builds(
    DiffusionQuantConfig,
    bit_width=st.sampled_from([2, 4, 8]),
    modality=st.sampled_from([None, *MODALITIES]),
    num_time_groups=st.integers(1, 100),
    group_size=st.none() | st.integers(1, 8192).map(lambda n: 8 * n),
    enable_time_aware=st.booleans(),
    enable_spatial=st.booleans(),
    min_accuracy=st.floats(0, 1),
    calibration_samples=st.integers(1, 1_000_000),
    calibration_tokens=st.integers(0, 10**9),
    deployment_profile=st.sampled_from(list(PROFILES)),
    fallback=st.sampled_from(("layer", "model", "none")),
    fail_fast=st.booleans(),
    method=st.sampled_from([None, *METHODS]),
    enable_calibration=st.booleans(),
    calibration_data=st.none() | names,
    mask_token=st.none() | st.integers(0, 10**6),
    seed=st.integers(0, 2**63 - 1),
    time_groups=st.sampled_from(("uniform", "balanced")),
    symmetric=st.booleans(),
    component=st.none() | names.filter(lambda n: n not in {".", ".."} and not set(n) & set("/\\\0")),
    max_memory=st.none() | st.integers(2**28, 2**60),
    threads=st.none() | st.integers(1, 1024),
    keep=st.lists(names, max_size=3).map(tuple),
    layer_bit_widths=st.dictionaries(names, st.sampled_from((2, 4, 8, 16)), max_size=3),
    sensitive_layer_names=st.lists(names, max_size=3).map(tuple),
    sensitive_layer_patterns=st.lists(names.map(re.escape), max_size=3).map(tuple),
    skip_sensitive_layers=st.booleans(),
)


@settings(max_examples=50, deadline=None)
@given(config=configs)
def test_yaml_gives_back_what_was_written(config: DiffusionQuantConfig) -> None:
    assert DiffusionQuantConfig.from_yaml_text(config.to_yaml()) == config


# Identity


@settings(max_examples=25, deadline=None)
@given(config=configs)
def test_identity_is_json_of_stable_order(config: DiffusionQuantConfig) -> None:
    identity = config.identity()
    assert json.loads(json.dumps(identity)) == identity
    assert list(identity) == sorted(identity)


def test_identity_holds_what_decides_the_bytes_and_nothing_else() -> None:
    config = DiffusionQuantConfig(keep=("b", "a"))
    same = config.replace(threads=3, max_memory="1GB", fail_fast=True, deployment_profile="edge", keep=("a", "b", "a"))
    assert same.identity() == config.identity()
    assert set(config.identity()) == set(DEFAULTS) - {
        "threads",
        "max_memory",
        "fail_fast",
        "deployment_profile",
        "stats",
    }
    for change in (
        {"component": "unet"},
        {"seed": 1},
        {"enable_calibration": False},
        {"mask_token": 4},
        {"layer_bit_widths": {"a": 4}},
    ):
        assert config.replace(**change).identity() != config.identity()


# One tensor


def test_a_spec_reads_like_a_recipe() -> None:
    assert str(LayerSpec(bits=4, group_size=128, method="clip", symmetric=False)) == "int4 g128 clip"
    assert str(LayerSpec(bits=2, group_size=None, method="rtn", symmetric=True)) == "int2 row rtn symmetric"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("bits", value) for value in (3, True, 4.0, None)],
        *[("group_size", value) for value in (0, 12, 65_544, 64.0, "row", True)],
        ("method", "best"),
        ("method", None),
        ("symmetric", 1),
    ],
)
def test_a_wrong_spec_is_refused(name: str, value: object) -> None:
    right: dict[str, Any] = {"bits": 4, "group_size": 64, "method": "clip", "symmetric": False}
    assert refused(LayerSpec, **(right | {name: value})).startswith(f"{name} is {value!r}; allowed: ")


def test_a_spec_tells_all_problems_at_once() -> None:
    assert refused(LayerSpec, bits=3, group_size=3, method="x", symmetric=2).startswith("4 settings are wrong:\n  - b")

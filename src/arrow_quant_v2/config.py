"""What is asked of a model and of one tensor, refused early and in words; knows nothing of tensors or methods."""

import contextlib
import difflib
import json
import os
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, get_args

import pydantic
import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, PlainSerializer, StringConstraints

from arrow_quant_v2.config_fields import (
    GROUP_STEP,
    LARGEST_GROUP,
    GroupSize,
    NamedWidth,
    Pattern,
    Regex,
    amount,
    folder,
    frozen_list,
    frozen_pairs,
    row,
    whole,
)
from arrow_quant_v2.config_text import LONGEST_NAME, Written, text_of, written
from arrow_quant_v2.errors import ConfigurationError
from arrow_quant_v2.layer_widths import Overrules
from arrow_quant_v2.packed import WIDTHS, Bits, Grid

if TYPE_CHECKING:
    from pydantic import ModelWrapValidatorHandler, ValidationInfo
    from typing_extensions import Self

Method: TypeAlias = Literal["clip", "gptq", "r2q", "rtn"]
Modality: TypeAlias = Literal["text", "code", "image", "audio"]
Grouping: TypeAlias = Literal["uniform", "balanced"]
Profile: TypeAlias = Literal["edge", "local", "cloud"]
Fallback: TypeAlias = Literal["layer", "model", "none"]

METHODS: tuple[Method, ...] = get_args(Method)
MODALITIES: tuple[Modality, ...] = get_args(Modality)
_PROFILED = ("bit_width", "group_size", "num_time_groups", "min_accuracy", "calibration_samples")
PROFILES: dict[str, dict[str, Any]] = {
    "edge": dict(zip(_PROFILED, (2, 64, 5, 0.70, 32), strict=True)),
    "local": dict(zip(_PROFILED, (4, 128, 10, 0.85, 128), strict=True)),
    "cloud": dict(zip(_PROFILED, (8, 128, 20, 0.95, 512), strict=True)),
}
PREFIX = "ARROW_QUANT_"
RESERVED = frozenset({"kernels", "isa"})  # ARROW_QUANT_KERNELS and _ISA belong to the kernels room
BREAKS = frozenset("\x85\u2028\u2029\ufeff")  # what YAML readers take for line breaks or marks where it is not escaped
SMALLEST_MEMORY = 256 * 2**20
MOST_BITS = 64  # of a weight in any dtype
LISTS = frozenset({"keep", "sensitive_layer_names", "sensitive_layer_patterns"})
SWITCH = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = LONGEST_NAME
_repr.maxlevel, _repr.maxlist = 2, 4


class DiffusionQuantConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """What is asked of a model; frozen, complete, and refused with a reason before any work.

    A setting is taken from the strongest place that names it:

        explicit keyword  >  ARROW_QUANT_* environment  >  YAML file  >  profile  >  default

    The profile is the base of all others, whoever names it: `deployment_profile="edge"` as a
    keyword, in the environment or in the file (there also `profile: edge`) brings the edge values
    for every setting that is named nowhere else. An environment variable is named after its
    setting, ARROW_QUANT_BIT_WIDTH=2; an empty one counts as unset, `none` is None, `keep` is split
    at commas.

    bit_width             bits per code
    modality              None: found out from the model
    num_time_groups       ranges of timesteps that share activation parameters
    group_size            input columns that share a scale; None or "row": a whole output row
    enable_time_aware     scales per time group
    enable_spatial        equalize channels before rounding
    activation_smoothing  equalize them so that inputs, too, lose less in 8 bits: those rounded by stored ranges
    min_accuracy          the cosine below which a result is refused or retried in more bits
    calibration_samples   samples that calibration looks at
    calibration_tokens    of text that calibration looks at, at least: short sequences are more than calibration_samples
    deployment_profile    where the values not named otherwise come from
    fallback              what gets more bits where the bar is missed: "layer": those that hurt, "model": all of them,
                          "none": nothing, the result says that it misses the bar
    fail_fast             raise at the first layer that misses the bar or cannot be done as asked, never fall back
    method                "r2q": residual grid, "gptq": affine grid, in the column loop where a layer was calibrated;
                          "clip": clip search with refit, "rtn": round to nearest, both from the weights alone;
                          None: r2q for text and code, gptq for image and audio, clip what was not calibrated
    enable_calibration    look at what goes into the layers; False: from the weights alone
    calibration_data      a file of texts, token ids, prompts or inputs; None: the model's own trajectory
    stats                 a folder that calibrate wrote, to fit layers by; the model is not run
    mask_token            id of the token that hides another one; None: the tokenizer or config.json tells
    enable_importance     tokens count by how much the model's outputs feel what becomes of them; False: all alike
    enable_rotation       turn input channels in blocks where that loses less of a layer's outputs
    grid_refits           how often the grid of a group is fitted again to the codes it got
    code_sweeps           how often all groups of a fitted layer are visited again when the last one has its codes
    error_correction      how much of what quantized layers did to its inputs a weight makes up for, 0 (none) to 1
    tuning_steps          of codes, scales and zero points after all, by what the whole model says; 0: none
    seed                  of every random choice of calibration
    device                where the model runs and layers are fitted to their inputs: "cpu", "cuda", "cuda:1"; part of
                          the result, because a GPU rounds otherwise than a CPU
    time_groups           "uniform": equally many steps in each; "balanced": an equal share of the stats' change
    symmetric             no zero points
    component             folder of a pipeline to quantize; None: its denoiser
    max_memory            bytes the whole process may use, also as "4GB" or "512MiB"; None: no limit
    threads               None: as many as the machine offers
    keep                  fnmatch patterns of tensor names that stay in their own dtype
    layer_bit_widths      name of a tensor or module, fnmatch pattern, or "re:" and a regular expression -> 2, 4, 8, or
                          16 for its own dtype; a whole name comes before patterns, then the first that fits
    sensitive_layer_names     names of tensors or modules that have 8 bits, whatever bit_width is
    sensitive_layer_patterns  the same by regular expressions
    skip_sensitive_layers     sensitive layers stay in their own dtype instead
    target_bits           stored bits per weight on the average, for which each layer gets the width, and at 2 or 4 bits
                          groups of group_size or twice the columns, that serve the outputs best; stands in place of
                          bit_width
    target_size           the same by the bytes of all weight files, also as "3GB"
    whole_plans           that are made and judged by outputs at most, to keep the best one, where a size is asked for;
                          1: the one that measuring finds best is made at once

    Raises:
        ConfigurationError: names every wrong or unknown setting, what was found and what is allowed.
    """

    bit_width: Annotated[Bits, BeforeValidator(whole)] = Field(default=4, description="2, 4 or 8")
    modality: Modality | None = Field(default=None, description="text, code, image, audio, or None to detect it")
    num_time_groups: int = Field(default=10, ge=1, le=100, description="a whole number from 1 to 100")
    group_size: Annotated[GroupSize | None, BeforeValidator(row)] = Field(
        default=128,
        description=f"a multiple of 8 from 8 to {LARGEST_GROUP}, or None or 'row' for one group per output row",
    )
    enable_time_aware: bool = Field(default=True, description="True or False")
    enable_spatial: bool = Field(default=True, description="True or False")
    activation_smoothing: bool = Field(default=False, description="True or False")
    min_accuracy: float = Field(default=0.85, ge=0, le=1, description="a number from 0 to 1")
    calibration_samples: int = Field(default=128, ge=1, le=1_000_000, description="a whole number from 1 to 1000000")
    calibration_tokens: int = Field(default=32_768, ge=0, le=10**9, description="a whole number from 0 to 1000000000")
    deployment_profile: Profile = Field(default="local", description="edge, local or cloud")
    fallback: Fallback = Field(default="layer", description="layer, model or none")
    fail_fast: bool = Field(default=False, description="True or False")
    method: Method | None = Field(default=None, description="clip, gptq, r2q or rtn, or None to choose by modality")
    enable_calibration: bool = Field(default=True, description="True or False")
    calibration_data: Annotated[str, StringConstraints(min_length=1)] | None = Field(
        default=None, description="the path of a calibration file, or None for the model's own trajectory"
    )
    stats: Annotated[str, StringConstraints(min_length=1)] | None = Field(
        default=None, description="the path of a folder that calibrate wrote, or None"
    )
    mask_token: int | None = Field(default=None, ge=0, description="the id of a token, 0 or more, or None")
    enable_importance: bool = Field(default=True, description="True or False")
    enable_rotation: bool = Field(default=True, description="True or False")
    grid_refits: int = Field(default=2, ge=0, le=100, description="a whole number from 0 to 100")
    code_sweeps: int = Field(default=3, ge=0, le=100, description="a whole number from 0 to 100")
    error_correction: float = Field(default=0.5, ge=0, le=1, description="a number from 0 to 1")
    tuning_steps: int = Field(default=0, ge=0, le=100_000, description="a whole number from 0 to 100000")
    seed: int = Field(default=0, ge=0, lt=2**63, description="a whole number from 0 to 2^63 - 1")
    device: Annotated[str, StringConstraints(pattern=r"^[a-z]+(:\d+)?$")] = Field(
        default="cpu", description="cpu, cuda or cuda and a number, such as 'cuda:1'"
    )
    time_groups: Grouping = Field(default="uniform", description="uniform or balanced")
    symmetric: bool = Field(default=False, description="True or False")
    component: Annotated[str, AfterValidator(folder)] | None = Field(
        default=None, description="the name of one folder of the pipeline, or None for its denoiser"
    )
    max_memory: Annotated[Annotated[int, Field(ge=SMALLEST_MEMORY)] | None, BeforeValidator(amount)] = Field(
        default=None, description="at least 256 MiB, in bytes or as '4GB' or '512MiB', or None for no limit"
    )
    threads: int | None = Field(
        default=None, ge=1, le=1024, description="a whole number from 1 to 1024, or None for all"
    )
    keep: Annotated[tuple[Pattern, ...], BeforeValidator(frozen_list)] = Field(
        default=(), description="a list of tensor name patterns, such as ['*.bias', 'lm_head.*']"
    )
    layer_bit_widths: Annotated[tuple[NamedWidth, ...], BeforeValidator(frozen_pairs), PlainSerializer(dict)] = Field(
        default=(), description="a mapping of names or patterns to 2, 4, 8 or 16, such as {'lm_head': 8}"
    )
    sensitive_layer_names: Annotated[tuple[Pattern, ...], BeforeValidator(frozen_list)] = Field(
        default=(), description="a list of names of tensors or modules, such as ['lm_head']"
    )
    sensitive_layer_patterns: Annotated[tuple[Regex, ...], BeforeValidator(frozen_list)] = Field(
        default=(), description="a list of regular expressions, such as ['time_embed', 'adaLN']"
    )
    skip_sensitive_layers: bool = Field(default=False, description="True or False")
    target_bits: Annotated[float, Field(gt=0, le=MOST_BITS)] | None = Field(
        default=None, description=f"a number above 0, at most {MOST_BITS}, or None"
    )
    target_size: Annotated[Annotated[int, Field(ge=1)] | None, BeforeValidator(amount)] = Field(
        default=None, description="bytes, also as '3GB' or '800MiB', or None"
    )
    whole_plans: int = Field(default=5, ge=1, le=5, description="a whole number from 1 to 5")

    @pydantic.model_validator(mode="wrap")
    @classmethod
    def _layered(
        cls, given: object, handler: "ModelWrapValidatorHandler[Self]", validation: "ValidationInfo[Written | None]"
    ) -> "Self":
        """Lay profile, file, environment and keywords over each other; turn pydantic's refusal into ours."""
        if isinstance(given, cls):
            return given
        if not isinstance(given, dict):
            raise ConfigurationError(f"a configuration is a mapping of settings, not {_repr.repr(given)}")
        file, environment = validation.context or Written(), _environment()
        settings = {**file.settings, **environment, **given}
        labels = file.labels | {name: PREFIX + name.upper() for name in environment} | {name: name for name in given}
        try:
            config = handler(_profile(settings) | settings)
        except pydantic.ValidationError as error:
            wrong = dict.fromkeys(part["loc"][0] for part in error.errors(include_url=False))
            raise ConfigurationError(_listed(_refusal(n, labels.get(n, n), settings.get(n)) for n in wrong)) from None
        _refuse_contradiction(config)
        _refuse_two_sizes(config, settings)
        _refuse_tuning_unseen(config)
        _refuse_smoothing_alone(config)
        return config

    @classmethod
    def from_profile(cls, name: str, **overrides: Any) -> "Self":
        """The profile "edge", "local" or "cloud", with overrides by keyword."""
        return cls.model_validate(dict(deployment_profile=name, **overrides))

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str], **overrides: Any) -> "Self":
        """The settings in a YAML file of at most 1 MB, with overrides by keyword.

        Raises:
            ConfigurationError: the file cannot be read, is no YAML mapping, or holds a wrong setting.
        """
        return cls.model_validate(overrides, context=written(text_of(path), str(path)))

    @classmethod
    def from_yaml_text(cls, text: str, **overrides: Any) -> "Self":
        """The same from YAML text."""
        return cls.model_validate(overrides, context=written(text, "YAML text"))

    def to_yaml(self, path: str | os.PathLike[str] | None = None) -> str:
        """Every setting as YAML text, written to `path` where one is given.

        Raises:
            ConfigurationError: the file cannot be written.
        """
        settings = self.model_dump(mode="json")
        readable = BREAKS.isdisjoint(json.dumps(settings, ensure_ascii=False))
        text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=readable)
        if path is not None:
            try:
                Path(path).write_text(text, encoding="utf-8")
            except OSError as error:
                raise ConfigurationError(f"{path}: cannot be written: {error.strerror}") from error
        return text

    def replace(self, **changes: Any) -> "Self":
        """The same with some settings changed and all of them checked; the environment has no say."""
        return type(self)(**(self.model_dump() | changes))

    def identity(self) -> dict[str, object]:
        """The settings that decide the bytes of the result, sorted, ready for JSON; resuming is keyed by them.

        The profile is not among them, because the values that it brought are; nor is the place of stats, whose own
        identity counts instead.
        """
        apart = {"deployment_profile", "fail_fast", "max_memory", "threads", "stats"}
        settings = self.model_dump(mode="json", exclude=apart)
        for name in ("keep", "sensitive_layer_names", "sensitive_layer_patterns"):
            settings[name] = sorted(set(settings[name]))
        settings["layer_bit_widths"] = [list(pair) for pair in self.layer_bit_widths]  # their order decides
        return dict(sorted(settings.items()))

    @property
    def has_target(self) -> bool:
        """Whether widths are chosen for a size, not for all layers alike."""
        return self.target_bits is not None or self.target_size is not None

    def equalizes(self, modality: Modality) -> bool:
        """Whether input channels of calibrated layers are equalized where that serves best."""
        return self.activation_smoothing or (self.enable_spatial and modality in {"image", "audio"})

    @property
    def overrules(self) -> Overrules:
        """What is asked of layers by their names."""
        return Overrules(
            widths=self.layer_bit_widths,
            names=self.sensitive_layer_names,
            patterns=self.sensitive_layer_patterns,
            skip=self.skip_sensitive_layers,
        )

    def __setattr__(self, name: str, value: object) -> None:
        raise ConfigurationError(f"{name} cannot be set: a configuration is frozen; use replace({name}=...)")


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """What is asked of one tensor; `group_size` None means one group per row.

    equalize  whether its input channels may be equalized, where the run equalizes any

    Raises:
        ConfigurationError: a value is not allowed.
    """

    bits: Bits
    group_size: int | None
    method: str
    symmetric: bool
    equalize: bool = True

    def __post_init__(self) -> None:
        wrong = [
            f"{name} is {_repr.repr(getattr(self, name))}; allowed: {allowed}"
            for name, fits, allowed in (
                ("bits", type(self.bits) is int and self.bits in WIDTHS, "2, 4 or 8"),
                ("group_size", self._group_fits(), f"a multiple of 8 from 8 to {LARGEST_GROUP}, or None"),
                ("method", self.method in METHODS, " or ".join(METHODS)),
                ("symmetric", isinstance(self.symmetric, bool), "True or False"),
            )
            if not fits
        ]
        if wrong:
            raise ConfigurationError(_listed(wrong))

    @property
    def grid(self) -> Grid:
        """What codes of this method mean."""
        return "r2q" if self.method == "r2q" else "affine"

    def _group_fits(self) -> bool:
        size: object = self.group_size
        return size is None or (type(size) is int and GROUP_STEP <= size <= LARGEST_GROUP and not size % GROUP_STEP)

    def __str__(self) -> str:
        """Like "int4 g128 clip" or "int2 row rtn symmetric"."""
        group = "row" if self.group_size is None else f"g{self.group_size}"
        return f"int{self.bits} {group} {self.method}" + " symmetric" * self.symmetric


# Where settings come from


def _profile(settings: Mapping[str, object]) -> dict[str, object]:
    """The values that the chosen profile brings; none where the choice is wrong, which validation will say."""
    chosen = settings.get("deployment_profile", "local")
    return PROFILES.get(chosen, {}) if isinstance(chosen, str) else {}


def _environment() -> dict[str, object]:
    """The ARROW_QUANT_* variables by setting, in the types that they seem to be; unknown ones too."""
    named = {name[len(PREFIX) :].lower(): text for name, text in sorted(os.environ.items()) if name.startswith(PREFIX)}
    return {name: _from_text(name, text) for name, text in named.items() if text and name not in RESERVED}


def _from_text(name: str, text: str) -> object:
    """What a variable's text means for this setting; text that means nothing stays text and is refused later."""
    known = DiffusionQuantConfig.model_fields.get(name)
    parts = tuple(part.strip() for part in text.split(",") if part.strip())
    if name in LISTS:
        return parts
    if name == "layer_bit_widths":
        return widths_of(parts)
    if known and known.annotation is bool:
        return SWITCH.get(text.lower(), text)
    if text.lower() in {"none", "null"}:
        return None
    return text if name in {"component", "calibration_data", "stats"} else _number(text)


def widths_of(entries: Iterable[str]) -> dict[str, object]:
    """Pattern -> width from entries like "lm_head=8"; a width that is no number is refused later.

    Raises:
        ConfigurationError: an entry is not of that form.
    """
    entries = list(entries)
    for entry in entries:
        if not all(part.strip() for part in entry.rpartition("=")):
            raise ConfigurationError(f"{entry!r} gives no layer a width; write NAME=BITS, such as lm_head=8")
    parts = (entry.rpartition("=") for entry in entries)
    return {name.strip(): _number(bits.strip()) for name, _, bits in parts}


def _number(text: str) -> object:
    with contextlib.suppress(ValueError):
        return int(text)
    with contextlib.suppress(ValueError):
        return float(text)
    return text


# What a refusal says


def _refuse_contradiction(config: "DiffusionQuantConfig") -> None:
    """Refuse settings that say different things about where the inputs of layers are known from."""
    for name, contradicts in (
        ("calibration_data", config.calibration_data is not None),
        ("enable_calibration", not config.enable_calibration),
        ("method", config.method in {"clip", "rtn"}),
    ):
        if contradicts and config.stats is not None:
            raise ConfigurationError(
                f"stats is {_repr.repr(config.stats)} and {name} is {_repr.repr(getattr(config, name))}, which"
                " contradict each other; leave one of them out"
            )


def _refuse_tuning_unseen(config: "DiffusionQuantConfig") -> None:
    """Refuse to tune by what a model says that nothing is shown to."""
    for name, unseen in (
        ("stats", config.stats is not None),
        ("enable_calibration", not config.enable_calibration),
        ("method", config.method in {"clip", "rtn"}),
    ):
        if unseen and config.tuning_steps:
            raise ConfigurationError(
                f"tuning_steps is {config.tuning_steps} and {name} is {_repr.repr(getattr(config, name))}, so the model"
                " is not run; leave one of them out"
            )


def _refuse_smoothing_alone(config: "DiffusionQuantConfig") -> None:
    """Refuse to smooth inputs where channels are not equalized, or nothing holds the ranges of inputs."""
    for name, without in (
        ("enable_spatial", not config.enable_spatial),
        ("enable_time_aware", not config.enable_time_aware),
        ("enable_calibration", not config.enable_calibration),
        ("method", config.method in {"clip", "rtn"}),
    ):
        if without and config.activation_smoothing:
            raise ConfigurationError(
                f"activation_smoothing is True and {name} is {_repr.repr(getattr(config, name))}, which contradict each"
                " other: inputs are smoothed by equalizing their channels, and rounded by ranges that calibration saw;"
                " leave one of them out"
            )


def _refuse_two_sizes(config: "DiffusionQuantConfig", settings: Mapping[str, object]) -> None:
    """Refuse a width for all layers beside a size that decides the width of each, and two such sizes.

    The width that the profile brings is no contradiction: nobody asked for it.
    """
    asked = {name: settings.get(name) for name in ("target_bits", "target_size") if settings.get(name) is not None}
    if asked and config.bit_width != _profile(settings).get("bit_width"):
        asked = {"bit_width": config.bit_width} | asked
    if len(asked) > 1:
        found = " and ".join(f"{name} is {_repr.repr(value)}" for name, value in asked.items())
        raise ConfigurationError(f"{found}, which contradict each other; leave one of them out")


def _refusal(name: str | int, label: str | int, found: object) -> str:
    """One sentence: the setting, where it came from, what was found, what is allowed."""
    known = DiffusionQuantConfig.model_fields.get(str(name))
    if known is None:
        return f"unknown setting {label}; {_hint(str(name), str(label))}"
    return f"{label} is {_repr.repr(found)}; allowed: {known.description}"


def _hint(name: str, label: str) -> str:
    """The closest known name, in the spelling of the place that named it, or all of them."""
    asked, fields = name[:LONGEST_NAME].lower(), list(DiffusionQuantConfig.model_fields)
    asked = "bit_width" if asked == "bits" else asked  # as the command line calls it; target_bits is spelt more alike
    reserved = sorted(RESERVED) if label.startswith(PREFIX) else []
    spelt = {known: PREFIX + known.upper() if reserved else known for known in fields + reserved}
    for names, cutoff in ((reserved, 0.75), (fields, 0.4)):
        for close in difflib.get_close_matches(asked, names, n=1, cutoff=cutoff):
            return f"did you mean {spelt[close]}?"
    return f"known: {', '.join(spelt.values())}"


def _listed(problems: Iterable[str]) -> str:
    first, *others = problems
    return "\n  - ".join([f"{1 + len(others)} settings are wrong:", first, *others]) if others else first

"""Config and tensor list in, one plan per tensor out: the only place that skips or chooses. Reads no values."""

from __future__ import annotations

import math
import re
import warnings
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from arrow_quant_v2.config import LayerSpec
from arrow_quant_v2.config_fields import LARGEST_GROUP
from arrow_quant_v2.decisions import Decision
from arrow_quant_v2.errors import ConfigurationError
from arrow_quant_v2.fallback import wider
from arrow_quant_v2.layer_widths import KEPT, LAYER_WIDTHS, Form, LayerWidth
from arrow_quant_v2.packed import ITEM_BITS, Layout, TensorInfo
from arrow_quant_v2.store.sizes import row_bytes, stored_bytes

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Mapping, Sequence

    from arrow_quant_v2.config import DiffusionQuantConfig, Method, Modality

FLOATS = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
WEIGHTS_ALONE = ("clip", "rtn")
LOOKUP = re.compile(r"(^|[._])(embed|embeddings?|embed_tokens|embed_positions|emb|wte|wpe|shared)(\.weight)?$")
FEWEST_WEIGHTS = 1024  # below this the parameters and the file's own bytes eat what packing saves
RESIDUAL_BELOW = 8  # bits: here the residual grid has too few codes for its second scale
COARSER = 2  # times the columns that a group was asked to have
COARSE: tuple[Literal[2, 4], ...] = (2, 4)  # bits at which parameters of groups are a large part of a layer
LONGEST_KERNEL = 31  # a 3-D weight with a longer last axis is a stack of experts, not a 1-D convolution


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """What will be done with one tensor: quantized as `spec` says, lying as `layout` says, or kept (both None)."""

    tensor: TensorInfo
    decision: Decision
    spec: LayerSpec | None = None
    layout: Layout | None = None

    @property
    def rows_and_bytes(self) -> tuple[int, int]:
        """What the store cuts into chunks: rows of codes, or elements where kept, and the stored bytes of one."""
        if self.layout is None or self.spec is None:
            return self.tensor.numel, ITEM_BITS[self.tensor.dtype] // 8
        return self.layout.rows, row_bytes(self.layout, symmetric=self.spec.symmetric)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the tensor's payload in the store, parameters included."""
        return math.prod(self.rows_and_bytes)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per element, parameters included; 0.0 for a tensor without elements."""
        return 8 * self.stored_bytes / self.tensor.numel if self.tensor.numel else 0.0


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """Which tensors are fitted to what goes into them, and by which method."""

    names: frozenset[str] = frozenset()
    method: Method = "gptq"


NOTHING_CALIBRATED = Calibrated()
NO_WIDTHS: Mapping[str, LayerWidth] = MappingProxyType({})


def calibrated_method(config: DiffusionQuantConfig, modality: Modality) -> Method | None:
    """The method of calibrated layers: as asked, else by modality; None where the method looks at weights alone.

    At 8 bits the residual grid has too few codes for its second scale, and the affine one is closer.
    """
    if config.method in WEIGHTS_ALONE:
        return None
    return config.method or ("r2q" if modality in {"text", "code"} and config.bit_width < RESIDUAL_BELOW else "gptq")


def likely_calibrated(
    tensors: Iterable[TensorInfo],
    config: DiffusionQuantConfig,
    modality: Modality,
    tied: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> Calibrated:
    """What calibration will reach, told from names and shapes, because running the model to see it takes minutes.

    Tables of which rows are looked up see no inputs, unless the model also uses them by another name: `tied` gives the
    other names of a tensor. Heads that no sample needs are taken for calibrated here.
    """
    method = calibrated_method(config, modality)
    if method is None or not config.enable_calibration:
        return NOTHING_CALIBRATED
    used = {info.name: (info.name, *tied.get(info.name, ())) for info in tensors}
    names = (name for name, uses in used.items() if not all(map(LOOKUP.search, uses)))
    return Calibrated(names=frozenset(names), method=method)


def plan_model(
    tensors: Iterable[TensorInfo],
    config: DiffusionQuantConfig,
    calibrated: Calibrated = NOTHING_CALIBRATED,
    widths: Mapping[str, LayerWidth] = NO_WIDTHS,
) -> tuple[LayerPlan, ...]:
    """One plan per tensor, in the order given; those that are not calibrated are quantized from the weights alone.

    `widths` are those of tensors that shall have others than `bit_width`, by name; what the configuration says of a
    layer by its name is stronger.
    """
    return tuple(_plan(tensor, config, calibrated, width_of(tensor.name, config, widths)) for tensor in tensors)


def width_of(name: str, config: DiffusionQuantConfig, widths: Mapping[str, LayerWidth] = NO_WIDTHS) -> LayerWidth:
    """The width that a tensor is asked for, and why: people's word, else what was found out, else bit_width."""
    found = config.overrules.of(name) or widths.get(name)
    return found or LayerWidth(bits=config.bit_width, because="")


def plans_by_form(
    tensors: Sequence[TensorInfo],
    config: DiffusionQuantConfig,
    calibrated: Calibrated = NOTHING_CALIBRATED,
    plain: Container[str] = (),
) -> dict[Form, dict[str, LayerPlan]]:
    """What becomes of each tensor in each form, by name; of one that people named a width for always the same.

    Input channels of those in `plain` are not equalized.
    """
    every = {}
    for form in _forms(config, calibrated):
        widths = {info.name: LayerWidth.of(form, equalize=info.name not in plain) for info in tensors}
        plans = plan_model(tensors, config, calibrated, widths)
        every[form] = {plan.tensor.name: plan for plan in plans}
    return every


def _forms(config: DiffusionQuantConfig, calibrated: Calibrated) -> list[Form]:
    """Every width as asked; and then at 2 and 4 bits what stores fewer parameters, where nobody asked for them by name.

    That is the affine grid where modality alone chose the residual one, and groups of twice as many columns.
    """
    asked, residual = config.group_size, config.method is None and calibrated.method == "r2q"
    coarse = None if asked is None or COARSER * asked > LARGEST_GROUP else COARSER * asked
    found = [Form(bits) for bits in LAYER_WIDTHS]
    found += [Form(bits, affine=True) for bits in COARSE if residual]
    return found + [Form(bits, coarse, residual) for bits in COARSE if coarse]


def forms_apart(plans: Mapping[Form, Mapping[str, LayerPlan]], name: str) -> tuple[Form, ...]:
    """The forms of a layer that are stored in different ways; of those that are not, the first one."""
    found: dict[Layout | None, Form] = {}
    for form, planned in plans.items():
        found.setdefault(planned[name].layout, form)
    return tuple(found.values())


def refuse_unused_names(tensors: Iterable[TensorInfo], config: DiffusionQuantConfig) -> None:
    """Refuse names in the configuration that no tensor of the model has, before any work.

    Of patterns of what is to stay as it is (`keep`) a warning is enough: they may be meant for several models.

    Raises:
        ConfigurationError: there is one; it is a slip, and would be obeyed by nothing.
    """
    known = [info.name for info in tensors]
    for pattern in config.keep:
        if not any(fnmatchcase(name, pattern) for name in known):
            warnings.warn(f"keep pattern {pattern!r} fits no tensor of the model, so it keeps nothing", stacklevel=4)
    for name in config.overrules.unused(known):
        raise ConfigurationError(
            f"{name!r} is given a width or called sensitive, but no tensor of the model has that name or fits it;"
            " `arrow-quant doctor` lists their names"
        )


def _method(tensor: TensorInfo, config: DiffusionQuantConfig, calibrated: Calibrated, width: LayerWidth) -> Method:
    if tensor.name in calibrated.names:
        affine = width.affine or (config.method is None and width.bits >= RESIDUAL_BELOW)
        return "gptq" if affine else calibrated.method
    return config.method if config.method and config.method != "gptq" else "clip"


def _group_size(tensor: TensorInfo, config: DiffusionQuantConfig, width: LayerWidth) -> int | None:
    """As asked where a row has no more columns: larger groups would be the same ones."""
    asked = config.group_size
    columns = math.prod(tensor.shape[quant_axis(tensor.shape) :])
    return asked if asked is None or columns <= asked else width.group_size or asked


def _plan(tensor: TensorInfo, config: DiffusionQuantConfig, calibrated: Calibrated, width: LayerWidth) -> LayerPlan:
    reason, bits = _reason_to_keep(tensor, config), width.bits
    if reason is not None or bits == KEPT:
        return _kept(tensor, f"int{config.bit_width}", reason or width.because)
    method = _method(tensor, config, calibrated, width)
    spec = LayerSpec(
        bits=bits,
        group_size=_group_size(tensor, config, width),
        method=method,
        symmetric=config.symmetric,
        equalize=width.equalize,
    )
    layout = Layout(
        shape=tensor.shape,
        bits=spec.bits,
        quant_axis=quant_axis(tensor.shape),
        group_size=spec.group_size,
    ).on(spec.grid)
    if stored_bytes(layout, symmetric=spec.symmetric) >= tensor.nbytes:
        return _kept(
            tensor, f"int{spec.bits}", f"int{spec.bits} with its parameters would not be smaller than {tensor.dtype}"
        )
    decision = _quantized(tensor, spec, layout, config, width)
    return LayerPlan(tensor=tensor, spec=spec, layout=layout, decision=decision)


def wider_plan(
    plan: LayerPlan, bits: int, config: DiffusionQuantConfig, calibrated: Calibrated = NOTHING_CALIBRATED
) -> LayerPlan | None:
    """The plan of the same tensor at the width behind `bits`; None where there is none that it may have.

    A width that people gave it by name stays, and a tensor is not stored in more bytes than it has.
    """
    more = wider(bits)
    if more is None:
        return None
    width = LayerWidth(bits=more, because="", fallback=True, equalize=plan.spec is None or plan.spec.equalize)
    (wide,) = plan_model([plan.tensor], config, calibrated, {plan.tensor.name: width})
    return wide if wide.spec is not None and wide.spec.bits == more else None


def asked_bits(name: str, config: DiffusionQuantConfig, widths: Mapping[str, LayerWidth] = NO_WIDTHS) -> int:
    """The width that a layer was asked for at first, whatever it has fallen back to."""
    width = width_of(name, config, widths)
    return config.bit_width if width.fallback else width.bits


def kept_plan(plan: LayerPlan, because: str) -> LayerPlan:
    """The same tensor in its own dtype, because nothing else could be done with it."""
    decision = replace(plan.decision, kind="fallback", got=plan.tensor.dtype, because=because, method=None)
    return LayerPlan(tensor=plan.tensor, decision=decision)


def _kept(tensor: TensorInfo, asked: str, reason: str) -> LayerPlan:
    decision = Decision(layer_name=tensor.name, kind="kept", asked=asked, got=tensor.dtype, because=reason)
    return LayerPlan(tensor=tensor, decision=decision)


def _quantized(
    tensor: TensorInfo, spec: LayerSpec, layout: Layout, config: DiffusionQuantConfig, width: LayerWidth
) -> Decision:
    tail = layout.columns % layout.group
    ragged = f", the last group of a row has {tail} columns" if tail else ""
    got, _, rest = str(spec).partition(" ")
    return Decision(
        layer_name=tensor.name,
        kind="fallback" if width.fallback else "quantized",
        asked=got if config.has_target and not width.fallback else f"int{config.bit_width}",
        got=got,
        because=f"{rest}{_asked(width)}{ragged}" + (f", {width.because}" if width.because else ""),
        method=spec.method,
    )


def _asked(width: LayerWidth) -> str:
    """Whether more of a form than its bits was chosen by measuring, as a decision says it."""
    return " as asked" if width.form == Form(width.bits) else " as chosen"


def quant_axis(shape: tuple[int, ...]) -> int:
    """The first axis of the columns: 1 for linear, embedding and convolution weights, 2 for 3-D expert weights."""
    return 2 if len(shape) == 3 and shape[2] > LONGEST_KERNEL else 1  # noqa: PLR2004 - axes of experts


def _reason_to_keep(tensor: TensorInfo, config: DiffusionQuantConfig) -> str | None:
    """Why a tensor stays in its own dtype; None when it is a weight to quantize."""
    pattern = next((p for p in config.keep if fnmatchcase(tensor.name, p)), None)
    if pattern is not None:
        return f"its name matches keep pattern {pattern!r}"
    return reason_not_to_quantize(tensor)


def reason_not_to_quantize(tensor: TensorInfo) -> str | None:
    """Why a tensor is nothing to quantize, whatever is asked; None for a weight."""
    if tensor.dtype not in FLOATS:
        return f"{tensor.dtype} values are no weights"
    if len(tensor.shape) < 2:  # noqa: PLR2004 - a matrix
        return "a bias, norm or other 1-D tensor"
    if quant_axis(tensor.shape) == 2 and tensor.shape[0] == 1:  # noqa: PLR2004 - a stack of experts
        return "a table that is added, such as one of positions, no weight"
    if tensor.numel < FEWEST_WEIGHTS:
        return f"only {tensor.numel} elements, fewer than {FEWEST_WEIGHTS}"
    return None

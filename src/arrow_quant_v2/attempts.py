"""Layers that share an input, fitted as asked, or else in a simpler way; knows no widths, models or files."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from arrow_quant_v2.errors import QuantizationError
from arrow_quant_v2.quantizers.calibrated import Fitted, Weight, fit_together
from arrow_quant_v2.quantizers.parts import fit_in_parts
from arrow_quant_v2.quantizers.result import not_finite

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from arrow_quant_v2.quantizers.calibrated import Freedom, Sight


@dataclass(frozen=True, kw_only=True, eq=False)
class Made:
    """One weight as it was asked for in the end, and what it became."""

    weight: Weight
    fitted: Fitted


@dataclass(frozen=True, kw_only=True, eq=False)
class _Way:
    """One way to fit, and how a decision calls it."""

    weights: Sequence[Weight]
    freedom: Freedom
    name: str


def fit_somehow(
    weights: Sequence[Weight], sight: Sight, freedom: Freedom, *, fail_fast: bool = False
) -> tuple[list[Made], tuple[str, ...]]:
    """The fit as asked, else the first simpler one that can be done; and in words what failed and what came instead.

    Raises:
        QuantizationError: a weight is not finite, which no method mends; or no way can be gone: the error of the first.
    """
    original: QuantizationError | None = None
    fit = fit_together if sight.plain else fit_in_parts
    for way in _ways(weights, freedom):
        try:
            fitted = fit(way.weights, sight, way.freedom)
        except QuantizationError as error:
            refuse_wild(weights)
            original = original or error
            if fail_fast:
                break
            continue
        made = [Made(weight=weight, fitted=one) for weight, one in zip(way.weights, fitted, strict=True)]
        return made, () if original is None else (f"{_strategy(freedom)} failed ({original}), so {way.name}",)
    raise original or QuantizationError("there are no weights to be fitted; this is a bug, please report it")


def refuse_wild(weights: Sequence[Weight]) -> None:
    """Say which weight is not finite, and where.

    Raises:
        QuantizationError: one of them is not.
    """
    for weight in weights:
        if not weight.values.isfinite().all():
            raise not_finite(weight.values, weight.info.name, weight.info.shape)


def _strategy(freedom: Freedom) -> str:
    return "spatial quantization" if freedom.equalize else "the calibrated fit"


def _ways(weights: Sequence[Weight], freedom: Freedom) -> Iterator[_Way]:
    """As asked; then with ever less that could fail."""
    yield _Way(weights=weights, freedom=freedom, name="as asked")
    plain = replace(freedom, equalize=False)
    if freedom.equalize:
        yield _Way(weights=[_per_channel(weight) for weight in weights], freedom=plain, name="per channel")
    unturned = replace(plain, rotate=False)
    if freedom.rotate:
        yield _Way(weights=weights, freedom=unturned, name="with no channels turned")
    if any(weight.spec.method == "r2q" for weight in weights):
        yield _Way(weights=[_affine(weight) for weight in weights], freedom=unturned, name="on the affine grid")


def _per_channel(weight: Weight) -> Weight:
    """The same weight, asked for one group per row."""
    layout = replace(weight.layout, group_size=None).on(weight.spec.grid)
    return replace(weight, layout=layout, spec=replace(weight.spec, group_size=None))


def _affine(weight: Weight) -> Weight:
    """The same weight, asked for on the affine grid."""
    return replace(weight, layout=weight.layout.on("affine"), spec=replace(weight.spec, method="gptq"))

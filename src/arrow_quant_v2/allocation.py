"""Bits spent where they matter: the form of each layer, so that the loss is least within a size. Measures nothing."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Literal, TypeAlias

from arrow_quant_v2.errors import ConfigurationError
from arrow_quant_v2.knapsack import Choice, cheapest
from arrow_quant_v2.layer_widths import Form, LayerWidth
from arrow_quant_v2.plan import NOTHING_CALIBRATED, Calibrated, forms_apart, plan_model, plans_by_form
from arrow_quant_v2.prediction import predicted_weight_bytes
from arrow_quant_v2.store.sizes import equalization_bytes

if TYPE_CHECKING:
    from collections.abc import Container, Mapping, Sequence

    from arrow_quant_v2.config import DiffusionQuantConfig, Modality
    from arrow_quant_v2.packed import TensorInfo
    from arrow_quant_v2.plan import LayerPlan

Told: TypeAlias = Literal["outputs", "inputs", "weights"]

NEAR = 0.9995  # of a target: nearer than this nothing more is tried
TRIES = 16
NARROWEST = Form(2)
COARSE_LOSES = 1.2  # times what groups of the size that is asked for do, about
REASON = (  # as long as any
    "0.0012 % of the model's loss at int2, told from its weights alone, target 999.999 MB"
    "; best of 5 plans: between layers and outputs"
)
MARGIN = 0.06  # of what files hold beside codes and parameters: the prediction is less sure of it
WHY: dict[Told, str] = {
    "outputs": "",
    "inputs": ", told from its own outputs",
    "weights": ", told from its weights alone",
}


@dataclass(frozen=True, kw_only=True)
class LayerLoss:
    """The part of the model's output that a layer loses in each form in which it may be stored.

    told            by what: the model's outputs; or the layer's own outputs, or its weights, each of which is taken to
                    matter as much as those of the layers that outputs tell of do in the middle
    equalized_with  the layers that share its input, itself one of them, where its channels were equalized, which lost
                    least; without room for the scales of all of them they are not
    """

    at: Mapping[Form, float]
    told: Told = "outputs"
    equalized_with: tuple[str, ...] = ()

    @property
    def at_most(self) -> float:
        """What is lost at the smallest width, as asked."""
        return self.at[NARROWEST]


@dataclass(frozen=True, kw_only=True)
class Scope:
    """What bits are spent on: the tensors of a model, and what is known of the run before its layers are."""

    tensors: Sequence[TensorInfo]
    config: DiffusionQuantConfig
    modality: Modality
    component: str
    calibrated: Calibrated = NOTHING_CALIBRATED

    def plans(self, widths: Mapping[str, LayerWidth]) -> tuple[LayerPlan, ...]:
        """One plan for each tensor."""
        return plan_model(self.tensors, self.config, self.calibrated, widths)

    def stored(self, plan: LayerPlan) -> int:
        """The most that a layer takes, parameters included: those that may be equalized are taken to be."""
        may_be = self.config.equalizes(self.modality)
        if plan.layout is None or plan.spec is None or plan.tensor.name not in self.calibrated.names:
            return plan.stored_bytes
        return plan.stored_bytes + (equalization_bytes(plan.layout.channels) if may_be and plan.spec.equalize else 0)

    def files(self, plans: tuple[LayerPlan, ...]) -> int:
        """The most that all weight files take."""
        names = self.calibrated.names
        predicted = predicted_weight_bytes(plans, self.modality, self.config, self.component, names)
        beside = predicted - sum(plan.stored_bytes for plan in plans)
        return sum(map(self.stored, plans)) + math.ceil((1.0 + MARGIN) * beside)


@dataclass(frozen=True, kw_only=True)
class Reach:
    """What is possible: bytes of all weight files, and stored bits per weight of the layers that may be quantized."""

    smallest_bytes: int
    largest_bytes: int
    smallest_bits: float
    largest_bits: float


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """A layer that may be quantized: what can become of it, and the first form that makes it so."""

    name: str
    weights: int
    equalize: bool
    ways: tuple[tuple[Form, LayerPlan], ...]


def reach(scope: Scope) -> Reach:
    """The smallest size, in which no channels are equalized, and the largest, told from shapes."""
    layers = _layers(scope, {info.name for info in scope.tensors})
    sizes = [[scope.stored(plan) for _, plan in layer.ways] for layer in layers]
    weights = max(1, sum(layer.weights for layer in layers))
    small, large = ([size.index(pick(size)) for size in sizes] for pick in (min, max))
    files = [scope.files(scope.plans(_named(layers, chosen, REASON))) for chosen in (small, large)]
    bits = [8 * sum(map(pick, sizes)) / weights for pick in (min, max)]
    return Reach(smallest_bytes=files[0], largest_bytes=files[1], smallest_bits=bits[0], largest_bits=bits[1])


def refuse_unreachable(scope: Scope) -> None:
    """Refuse a target that no choice of widths meets.

    Raises:
        ConfigurationError: says what is possible.
    """
    config, possible = scope.config, reach(scope)
    bits = config.target_bits
    if bits is not None and not possible.smallest_bits <= bits <= possible.largest_bits:
        raise ConfigurationError(
            f"target_bits is {bits:g}; the layers of this model can take {_up(possible.smallest_bits)} to"
            f" {possible.largest_bits:.2f} bits per weight, all counted; {_remedy(bits < possible.largest_bits)}"
        )
    size = config.target_size
    if size is not None and not possible.smallest_bytes <= size <= possible.largest_bytes:
        raise ConfigurationError(
            f"target_size is {_mb(size)}; the weight files of this model can take {_mb(possible.smallest_bytes)} to"
            f" {_mb(possible.largest_bytes)}; {_remedy(size < possible.largest_bytes)}"
        )


def allocate(scope: Scope, losses: Mapping[str, LayerLoss]) -> dict[str, LayerWidth]:
    """The width of every layer of which there is a choice: least loss within the target, by name.

    Raises:
        ConfigurationError: no choice meets the target.
    """
    sets = _sets_of_plain(losses)

    @cache
    def with_plain(number: int) -> dict[str, LayerWidth] | None:
        return _widths(scope, losses, sets[number]) if number < len(sets) else None

    fewest = bisect_left(range(len(sets)), 1, key=lambda number: with_plain(number) is not None)
    widths = with_plain(fewest)
    if widths is None:
        refuse_unreachable(scope)
        raise ConfigurationError(f"no widths meet the target of {_target(scope.config)}; ask for a little more")
    return widths


def _sets_of_plain(losses: Mapping[str, LayerLoss]) -> list[set[str]]:
    """Layers that are not equalized: as measuring found it, then more and more, the least lossy inputs first."""
    sets = [{name for name, one in losses.items() if not one.equalized_with}]
    inputs = {one.equalized_with for one in losses.values() if one.equalized_with}
    for together in sorted(inputs, key=lambda names: (sum(losses[name].at_most for name in names), names)):
        sets.append(sets[-1] | set(together))
    return sets


def _widths(scope: Scope, losses: Mapping[str, LayerLoss], plain: Container[str]) -> dict[str, LayerWidth] | None:
    """The best widths where the layers in `plain` are not equalized; None where none meet the target."""
    layers = _layers(scope, plain)
    table = [_choices(scope, layer, losses) for layer in layers]
    if scope.config.target_bits is None:
        chosen = _within_files(scope, layers, table)
    else:
        chosen = cheapest(table, math.floor(scope.config.target_bits * sum(layer.weights for layer in layers) / 8))
    return None if chosen is None else _told(scope, layers, losses, chosen)


def forethought(scope: Scope) -> dict[str, LayerWidth]:
    """Widths of about the right size before anything is measured, as if all weights mattered alike."""
    even = {
        layer.name: LayerLoss(at={form: layer.weights * _plausible(form) for form, _ in layer.ways})
        for layer in _layers(scope, ())
    }
    return {name: replace(one, because=FORETOLD) for name, one in allocate(scope, even).items()}


def _plausible(form: Form) -> float:
    return (COARSE_LOSES if form.group_size else 1.0) / 4.0**form.bits


FORETOLD = "widths are chosen by measuring"


def _layers(scope: Scope, plain: Container[str]) -> list[_Layer]:
    """What may be quantized, in the order of the tensors; channels of those in `plain` are not equalized."""
    plans = plans_by_form(scope.tensors, scope.config, scope.calibrated, plain)
    found = []
    for info in scope.tensors:
        ways = tuple((form, plans[form][info.name]) for form in forms_apart(plans, info.name))
        if any(plan.layout is not None for _, plan in ways):
            found.append(_Layer(name=info.name, weights=info.numel, equalize=info.name not in plain, ways=ways))
    return found


def _choices(scope: Scope, layer: _Layer, losses: Mapping[str, LayerLoss]) -> list[Choice]:
    at = losses[layer.name].at if layer.name in losses else {}
    return [
        Choice(size=scope.stored(plan), loss=0.0 if plan.layout is None else at.get(form, 0.0))
        for form, plan in layer.ways
    ]


def _within_files(scope: Scope, layers: Sequence[_Layer], table: Sequence[Sequence[Choice]]) -> tuple[int, ...] | None:
    """The choice that fills the files best: what they hold beside layers follows from the choice itself."""
    target = scope.config.target_size or 0
    smallest = tuple(item.index(min(item, key=lambda one: one.size)) for item in table)
    size = scope.files(scope.plans(_named(layers, smallest, REASON)))
    best = (size, smallest) if size <= target else None
    room = target
    for _ in range(TRIES):
        chosen = cheapest(table, room)
        if chosen is None:
            break
        size = scope.files(scope.plans(_named(layers, chosen, REASON)))
        if size <= target and (best is None or size > best[0]):
            best = size, chosen
        if NEAR * target <= size <= target:
            break
        payload = sum(item[number].size for item, number in zip(table, chosen, strict=True))
        room = min(room + target - size, payload - 1) if size > target else room + target - size
    return None if best is None else best[1]


def _named(layers: Sequence[_Layer], chosen: Sequence[int], because: str = "") -> dict[str, LayerWidth]:
    pairs = ((layer, layer.ways[number][0]) for layer, number in zip(layers, chosen, strict=True))
    return {
        layer.name: LayerWidth.of(form, because, equalize=layer.equalize)
        for layer, form in pairs
        if len(layer.ways) > 1
    }


def _told(
    scope: Scope, layers: Sequence[_Layer], losses: Mapping[str, LayerLoss], chosen: Sequence[int]
) -> dict[str, LayerWidth]:
    """The widths, each with the reason."""
    widths = _named(layers, chosen)
    total = sum(losses[name].at_most for name in widths if name in losses) or 1.0
    reasons = {
        name: f"{100 * losses[name].at_most / total:.2g} % of the model's loss at int2{WHY[losses[name].told]}"
        for name in widths
        if name in losses
    }
    target = f"target {_target(scope.config)}"
    return {
        name: replace(one, because=f"{reasons.get(name, 'not measured')}, {target}") for name, one in widths.items()
    }


def _target(config: DiffusionQuantConfig) -> str:
    return f"{config.target_bits:g} bits" if config.target_bits is not None else _mb(config.target_size or 0)


def _mb(count: int) -> str:
    return f"{count / 1e9:.3f} GB" if count >= 10**9 else f"{count / 1e6:.3f} MB"


def _up(bits: float) -> str:
    """Rounded so that what is said can be asked for."""
    return f"{math.ceil(100 * bits) / 100:.2f}"


def _remedy(too_small: bool) -> str:  # noqa: FBT001 - one half of a sentence
    if too_small:
        return "ask for more, use larger groups, or quantize more tensors (see `arrow-quant doctor`)"
    return "it fits already: ask for less, or leave the target out"

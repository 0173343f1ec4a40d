"""Ways to spend the bits of a size, each a whole plan, and what each plan was found to lose; makes and judges none.

The loss of a plan is not the sum of what its layers lose alone: the fewer bits there are, the less so. So beside the
plan that measuring finds best there are others, and outputs decide. Each is the best choice within the same size, by
another table of losses.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Any, TypeAlias

from arrow_quant_v2.allocation import LayerLoss, allocate
from arrow_quant_v2.layer_widths import Form, LayerWidth
from arrow_quant_v2.plan import LOOKUP
from arrow_quant_v2.workfolder import explained, write_whole

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from arrow_quant_v2.allocation import Scope

    Table: TypeAlias = Mapping[str, LayerLoss]

MEASURED = "what the outputs lose"
EARLIEST = 16.0  # times as much as the last layer, where layers get more bits from the first one on: one width's worth
FIRST = 2.0**20  # times as much as the others, for layers that come before all others


@dataclass(frozen=True, kw_only=True)
class WholePlan:
    """The form of every layer of which there was a choice; `lost` of the outputs, None where that is not known.

    failed  why it could not be made, and so loses everything; empty where it could
    """

    way: str
    widths: Mapping[str, LayerWidth]
    lost: float | None = None
    failed: str = ""


@dataclass(frozen=True, kw_only=True)
class Spent:
    """Whole plans within a size, the one that measuring finds best first, and what people should know of them."""

    plans: tuple[WholePlan, ...]
    notes: tuple[str, ...] = ()

    @property
    def best(self) -> int:
        """The number of the plan that loses least; the first where none is known to lose less."""
        losses = [math.inf if plan.lost is None else plan.lost for plan in self.plans]
        return losses.index(min(losses))

    def with_lost(self, number: int, lost: float, failed: str = "") -> Spent:
        """The same, once it is known what one of the plans loses, or why it cannot be made."""
        plans = [replace(one, lost=lost, failed=failed) if n == number else one for n, one in enumerate(self.plans)]
        return replace(self, plans=tuple(plans))


def measured_plan(scope: Scope, measured: Table) -> WholePlan:
    """The plan whose layers lose least, added up.

    Raises:
        ConfigurationError: no choice meets the target.
    """
    return WholePlan(way=MEASURED, widths=allocate(scope, measured))


def whole_plans(scope: Scope, measured: Table, own: Table) -> tuple[WholePlan, ...]:
    """Plans that differ, the measured one first; `own` is what each layer's own outputs lose, all alike.

    Raises:
        ConfigurationError: no choice meets the target.
    """
    first = measured_plan(scope, measured)
    found = {_choice(first): first}
    for way, table in _tables(scope, measured, own).items():
        if len(found) == scope.config.whole_plans:
            break
        plan = WholePlan(way=way, widths=allocate(scope, table))
        found.setdefault(_choice(plan), plan)
    return tuple(_told(plan, first, len(found)) for plan in found.values())


def _choice(plan: WholePlan) -> tuple[tuple[str, Form, bool], ...]:
    return tuple((name, one.form, one.equalize) for name, one in sorted(plan.widths.items()))


def _told(plan: WholePlan, measured: WholePlan, count: int) -> WholePlan:
    """The same plan, whose decisions say what was measured, and why it is this one that they follow."""
    rivals = f"; best of {count} plans: {plan.way}" if count > 1 else ""
    widths = {name: replace(one, because=measured.widths[name].because + rivals) for name, one in plan.widths.items()}
    return replace(plan, widths=widths)


def _tables(scope: Scope, measured: Table, own: Table) -> dict[str, Table]:
    """What each layer is taken to lose in other ways, by their names; in none of them channels are equalized."""
    names = [info.name for info in scope.tensors if info.name in measured]
    plain, alike = ({name: replace(table[name], equalized_with=()) for name in names} for table in (measured, own))
    ends = {*names[:1], *names[-1:], *(name for name in names if LOOKUP.search(name))}
    early = {name: EARLIEST ** (-place / len(names)) for place, name in enumerate(names)}
    even = _even(scope, plain)
    return {
        "no channels equalized": plain,
        "between layers and outputs": {name: _between(plain[name], alike[name]) for name in names},
        "ends and tables first": {name: _times(even[name], FIRST if name in ends else early[name]) for name in names},
        "what each layer loses": alike,
    }


def _even(scope: Scope, measured: Table) -> dict[str, LayerLoss]:
    """The same for each weight: in each form what it loses, beside the narrowest one, in the middle of all layers."""
    shares: dict[Form, list[float]] = {}
    for one in measured.values():
        for form, lost in one.at.items():
            shares.setdefault(form, []).append(lost / one.at_most if one.at_most else 0.0)
    usual = {form: median(found) for form, found in shares.items()}
    sizes = {info.name: info.numel for info in scope.tensors}
    return {
        name: replace(one, at={form: sizes[name] * usual[form] for form in one.at}) for name, one in measured.items()
    }


def _between(one: LayerLoss, other: LayerLoss) -> LayerLoss:
    """The geometric mean of both."""
    return replace(one, at={form: math.sqrt(lost * other.at[form]) for form, lost in one.at.items()})


def _times(loss: LayerLoss, factor: float) -> LayerLoss:
    return replace(loss, at={form: factor * lost for form, lost in loss.at.items()})


# Kept


def kept_plans(path: Path, choose: Callable[[], Spent]) -> Spent:
    """What an earlier run wrote into this file, or else what is chosen now, written for a later one.

    Raises:
        StoreError: the disk refuses.
    """
    with explained(path):
        if path.exists():
            try:
                return _spent(json.loads(path.read_text(encoding="utf-8")))
            except (ValueError, TypeError, AttributeError, KeyError):  # damaged: chosen again
                path.unlink()
    return keep_plans(path, choose())


def keep_plans(path: Path, spent: Spent) -> Spent:
    """The same, written for a later run.

    Raises:
        StoreError: the disk refuses.
    """
    with explained(path):
        write_whole(path, _as_json(spent))
    return spent


def _as_json(spent: Spent) -> str:
    plans = [
        {
            "way": plan.way,
            "lost": plan.lost,
            "failed": plan.failed,
            "widths": {name: [one.form, one.because, one.equalize] for name, one in sorted(plan.widths.items())},
        }
        for plan in spent.plans
    ]
    return json.dumps({"plans": plans, "notes": spent.notes}, indent=1) + "\n"


def _spent(found: Mapping[str, Any]) -> Spent:
    plans = tuple(WholePlan(**one | {"widths": _widths(one["widths"])}) for one in found["plans"])
    if not plans:
        raise ValueError("no plans")
    return Spent(plans=plans, notes=tuple(found["notes"]))


def _widths(found: Mapping[str, Sequence[Any]]) -> dict[str, LayerWidth]:
    return {
        name: LayerWidth.of(Form(*form), because, equalize=equalize)
        for name, (form, because, equalize) in found.items()
    }

"""Whole plans, each made and judged by the outputs of the model that it makes, and the best one kept.

Knows nothing of how a plan is made, or of where it comes from.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from arrow_quant_v2.errors import QuantizationError
from arrow_quant_v2.judging import Parts
from arrow_quant_v2.whole_plans import keep_plans

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from arrow_quant_v2.judging import Judge
    from arrow_quant_v2.layer_widths import LayerWidth
    from arrow_quant_v2.plan import LayerPlan
    from arrow_quant_v2.progress import Progress
    from arrow_quant_v2.sources.base import Source
    from arrow_quant_v2.whole_plans import Spent
    from arrow_quant_v2.workfolder import WorkFolder

    Make = Callable[[WorkFolder, Mapping[str, LayerWidth]], Sequence[LayerPlan]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Trials:
    """What it takes to make whole plans and to judge them; `make` leaves parts in a folder of that plan's own."""

    source: Source
    folder: WorkFolder
    judge: Judge
    progress: Progress
    make: Make

    def best(self, spent: Spent) -> Spent:
        """The same once it is known what each plan loses; the work goes on with what the best one made.

        Each is noted as soon as it is known, so that a run that was killed goes on behind it. A plan that cannot be
        made loses everything; the run itself says why, if it has to follow it.
        """
        heard: dict[int, list[warnings.WarningMessage]] = {}
        for number, plan in enumerate(spent.plans):
            if plan.lost is None:
                self.progress.repeat(len(spent.plans) - number)
                self.progress.tell(f"plan {number + 1} of {len(spent.plans)}: {plan.way}")
                with warnings.catch_warnings(record=True) as heard[number]:
                    lost = self._lost(number, plan.widths)
                spent = keep_plans(self.folder.allocation, spent.with_lost(number, lost))
                self.progress.tell(f"plan {number + 1} of {len(spent.plans)}, {plan.way}, loses {lost:.3g}")
        self.progress.repeat(1)
        self.folder.follow(spent.best)
        for warning in heard.get(spent.best, ()):  # what befell the others befell nobody
            warnings.warn(warning.message, warning.category, stacklevel=2)
        return replace(spent, notes=(*spent.notes, self._told(spent)))

    def _lost(self, number: int, widths: Mapping[str, LayerWidth]) -> float:
        folder = self.folder.for_plan(number)
        try:
            plans = self.make(folder, widths)
        except QuantizationError:
            return math.inf
        else:
            return self.judge.lost(
                Parts(self.source, {plan.tensor.name: folder.part(n) for n, plan in enumerate(plans)})
            )
        finally:
            self.judge.restore(info.name for info in self.source.tensors)

    def _told(self, spent: Spent) -> str:
        losses = ", ".join(f"{plan.way} {plan.lost:.3g}" for plan in spent.plans if plan.lost is not None)
        return f"{len(spent.plans)} whole plans were judged by {self.judge.loss}: {losses}"

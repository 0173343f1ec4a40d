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
    from arrow_quant_v2.whole_plans import Spent, WholePlan
    from arrow_quant_v2.workfolder import WorkFolder

    Make = Callable[[WorkFolder, Mapping[str, LayerWidth]], Sequence[LayerPlan]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Trials:
    """What it takes to make whole plans and to judge them; `make` leaves parts in a folder of that plan's own.

    fail_fast  a plan that cannot be made ends the run
    """

    source: Source
    folder: WorkFolder
    judge: Judge
    progress: Progress
    make: Make
    fail_fast: bool = False

    def best(self, spent: Spent) -> Spent:
        """The same once it is known what each plan loses; the work goes on with what the best one made.

        Each is noted as soon as it is known, so that a run that was killed goes on behind it. A plan that cannot be
        made loses everything, with a warning and a note; the run itself says why, if it has to follow it.

        Raises:
            QuantizationError: a plan cannot be made, and `fail_fast` is asked.
        """
        heard: dict[int, list[warnings.WarningMessage]] = {}
        for number, plan in enumerate(spent.plans):
            if plan.lost is None:
                self.progress.repeat(len(spent.plans) - number)
                self.progress.tell(f"plan {number + 1} of {len(spent.plans)}: {plan.way}")
                with warnings.catch_warnings(record=True) as heard[number]:
                    lost, failed = self._lost(number, plan.widths)
                spent = keep_plans(self.folder.allocation, spent.with_lost(number, lost, failed))
                self.progress.tell(f"plan {number + 1} of {len(spent.plans)}, {plan.way}, loses {lost:.3g}")
        self.progress.repeat(1)
        self.folder.follow(spent.best)
        for warning in heard.get(spent.best, ()):  # what befell the others befell nobody
            warnings.warn(warning.message, warning.category, stacklevel=2)
        skipped = tuple(_skipped(plan) for plan in spent.plans if plan.failed)
        for told in skipped:
            warnings.warn(told, stacklevel=2)
        return replace(spent, notes=(*spent.notes, self._told(spent), *skipped))

    def _lost(self, number: int, widths: Mapping[str, LayerWidth]) -> tuple[float, str]:
        """What a plan loses, and why it could not be made, if it could not."""
        folder = self.folder.for_plan(number)
        try:
            plans = self.make(folder, widths)
        except QuantizationError as error:
            if self.fail_fast:
                raise
            return math.inf, str(error)
        else:
            parts = {plan.tensor.name: folder.part(n) for n, plan in enumerate(plans)}
            return self.judge.lost(Parts(self.source, parts)), ""
        finally:
            self.judge.restore(info.name for info in self.source.tensors)

    def _told(self, spent: Spent) -> str:
        losses = ", ".join(f"{plan.way} {plan.lost:.3g}" for plan in spent.plans if plan.lost is not None)
        return f"{len(spent.plans)} whole plans were judged by {self.judge.loss}: {losses}"


def _skipped(plan: WholePlan) -> str:
    """What people should know of a plan that could not be made."""
    return f"the plan {plan.way!r} was left out, for it could not be made: {plan.failed}"

"""A model quantized again and again, with more bits where it hurts, until it is close enough or no bits are left.

Knows nothing of how one pass over its layers is made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from arrow_quant_v2.errors import BarMissedError
from arrow_quant_v2.fallback import (
    LEAVE_FAIL_FAST,
    REMEDY,
    Verdict,
    told_below,
    verdict_by_layers,
    warn_of_fallback,
    wider,
)
from arrow_quant_v2.judging import Parts, most_worth
from arrow_quant_v2.layer_widths import fallen_back
from arrow_quant_v2.plan import Calibrated, wider_plan
from arrow_quant_v2.promotions import Promotions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from arrow_quant_v2.config import DiffusionQuantConfig, Method
    from arrow_quant_v2.fallback import Bar
    from arrow_quant_v2.judging import Judge
    from arrow_quant_v2.layer_widths import LayerWidth
    from arrow_quant_v2.plan import LayerPlan
    from arrow_quant_v2.sources.base import Source
    from arrow_quant_v2.workfolder import WorkFolder

ROUNDS = 6  # in which single layers are chosen; after them all that have fewest bits get more
MARGIN = 1.1  # of the cosine that is missing: several layers gain a little less than each alone
NAMED = 3  # layers in a warning


@dataclass(frozen=True, kw_only=True)
class Pass:
    """All layers, quantized once.

    plans      as they were followed, in the order of the parts
    names      of the layers that were fitted to their inputs
    order      layers that share an input, in the order of fitting; each may depend on all before it
    judged_by  what every layer's own bar was about
    notes      what a person should know of it
    """

    plans: Sequence[LayerPlan]
    names: frozenset[str]
    order: tuple[tuple[str, ...], ...]
    judged_by: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class Rounds:
    """What a run needs to do a model again; without a judge every layer stands for itself."""

    source: Source
    config: DiffusionQuantConfig
    bar: Bar
    folder: WorkFolder
    judge: Judge | None
    method: Method | None
    tell: Callable[[str], object]

    def until_met(self, one_pass: Callable[[Mapping[str, LayerWidth]], Pass]) -> tuple[Pass, Verdict]:
        """The pass that is kept, and what is said of it; `one_pass` takes widths of layers and leaves their parts.

        Raises:
            BarMissedError: no layer may have more bits, and the bar is missed.
        """
        promoted = Promotions.of(self.folder)
        while True:
            try:
                done = one_pass(promoted.widths)
                verdict, widths = self._judged(done, promoted)
            except BarMissedError as error:
                done, widths = None, self._all_wider(promoted, str(error))
                if not widths:
                    raise
            if done is not None and not widths:
                return done, verdict
            stale = range(len(self.source.tensors)) if done is None else _stale(done, widths)
            promoted = promoted.more(self.folder, widths, stale)
            self._warn(widths)
            if self.judge is not None:
                self.judge.restore(info.name for info in self.source.tensors)

    def _judged(self, done: Pass, promoted: Promotions) -> tuple[Verdict, dict[str, LayerWidth]]:
        """What is said of a pass, and the layers that shall have more bits; none where it is the last one."""
        if self.judge is None:
            return verdict_by_layers((plan.decision for plan in done.plans), done.judged_by), {}
        self.tell(f"judging {self.judge.metric}")
        accuracy = self.judge.accuracy(self._parts(done))
        candidates = self._candidates(done)
        least = self.bar.at(self._narrowest(done, candidates), self.config.bit_width)
        reached = accuracy >= least
        missed = "" if reached else f"{self.judge.metric}: {told_below(accuracy, least)} is below {least:g}"
        verdict = Verdict(judged_by=self.judge.metric, missed=missed, accuracy=accuracy)
        if reached or (self.bar.fallback == "none" and not self.bar.fail_fast):
            return verdict, {}
        self._refuse_end(missed, candidates)
        return verdict, self._wider(done, promoted, candidates, missed, needed=MARGIN * (least - accuracy))

    def _refuse_end(self, missed: str, candidates: Mapping[str, LayerPlan]) -> None:
        if self.bar.fail_fast:
            raise BarMissedError(f"{self.source.location}: {missed}; {LEAVE_FAIL_FAST}")
        if not candidates:
            raise BarMissedError(f"{self.source.location}: {missed}, and no layer may have more bits; {REMEDY}")

    def _candidates(self, done: Pass) -> dict[str, LayerPlan]:
        """The next plan of every layer that may have more bits."""
        fitted = Calibrated(names=done.names, method=self.method) if self.method else Calibrated()
        plans = {p.tensor.name: wider_plan(p, p.spec.bits, self.config, fitted) for p in done.plans if p.spec}
        return {name: plan for name, plan in plans.items() if plan is not None}

    def _narrowest(self, done: Pass, candidates: Mapping[str, LayerPlan]) -> int:
        """The fewest bits among layers that may have more; of all where none may."""
        every = {plan.tensor.name: plan.spec.bits for plan in done.plans if plan.spec is not None}
        return min((every[name] for name in candidates or every), default=self.config.bit_width)

    def _wider(
        self, done: Pass, promoted: Promotions, candidates: Mapping[str, LayerPlan], missed: str, *, needed: float
    ) -> dict[str, LayerWidth]:
        """Widths of the layers that hurt most for their bytes; of all that have fewest bits, where that is asked."""
        now = {plan.tensor.name: plan for plan in done.plans}
        known = [name for name in candidates if self.judge is not None and self.judge.knows(name)]
        if self.bar.fallback == "model" or promoted.rounds >= ROUNDS or self.judge is None or not known:
            low = self._narrowest(done, candidates)
            chosen = {name: missed for name in candidates if _bits(now[name]) == low}
        else:
            self.tell(f"judging which of {len(known)} layers hurt")
            gains = self.judge.gains(self._parts(done), known)
            added = {name: candidates[name].stored_bytes - now[name].stored_bytes for name in known}
            worst = most_worth(gains, added, needed)
            chosen = {name: f"{missed}, of which this layer takes {gains[name]:.2g}" for name in worst}
        return {name: fallen_back(_bits(candidates[name]), because) for name, because in chosen.items()}

    def _all_wider(self, promoted: Promotions, because: str) -> dict[str, LayerWidth]:
        """The whole model at the next width, where that is asked; nothing where there is none."""
        names = [info.name for info in self.source.tensors]
        more = wider(min(promoted.widths[n].bits if n in promoted.widths else self.config.bit_width for n in names))
        if more is None or self.bar.fail_fast or self.bar.fallback != "model":
            return {}
        return {name: fallen_back(more, because) for name in names}

    def _parts(self, done: Pass) -> Parts:
        return Parts(self.source, {p.tensor.name: self.folder.last(n) for n, p in enumerate(done.plans)})

    def _warn(self, widths: Mapping[str, LayerWidth]) -> None:
        some = [f"{name} int{width.bits}" for name, width in list(widths.items())[:NAMED]]
        more = f" and {len(widths) - NAMED} more" if len(widths) > NAMED else ""
        because = next(iter(widths.values())).because.partition(", of which")[0]
        warn_of_fallback(self.source.location, f"{because}; so {len(widths)} layers: {', '.join(some)}{more}")


def _stale(done: Pass, widths: Iterable[str]) -> list[int]:
    """Numbers of the parts that other widths make void: theirs, and of layers fitted with or after a changed one."""
    changed = set(widths)
    first = next((at for at, layers in enumerate(done.order) if changed.intersection(layers)), len(done.order))
    changed.update(layer for layers in done.order[first:] for layer in layers)
    return [number for number, plan in enumerate(done.plans) if plan.tensor.name in changed]


def _bits(plan: LayerPlan) -> int:
    return 0 if plan.spec is None else plan.spec.bits

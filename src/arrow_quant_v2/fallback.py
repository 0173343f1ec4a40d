"""What must be reached at each width, and what follows where it is not: the next width, or an error.

Knows nothing of tensors, of methods, or of how closeness is measured.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

from arrow_quant_v2.decisions import STAYS_BELOW
from arrow_quant_v2.errors import BarMissedError
from arrow_quant_v2.packed import WIDTHS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from arrow_quant_v2.config import DiffusionQuantConfig, Fallback
    from arrow_quant_v2.decisions import Decision
    from arrow_quant_v2.packed import Bits

LEAST: Mapping[int, float] = {4: 0.85, 8: 0.95}  # of a width that was not asked for: more bits have to be worth it
REMEDY = "use smaller groups, more calibration samples or a lower min_accuracy"

LEAVE_FAIL_FAST = f"leave fail_fast out to have more bits where they are needed, or {REMEDY}"


@dataclass(frozen=True, kw_only=True)
class Bar:
    """The cosine that is asked for, and what to do where it is missed."""

    min_accuracy: float = 0.0
    fallback: Fallback = "layer"
    fail_fast: bool = False

    @classmethod
    def of(cls, config: DiffusionQuantConfig) -> Bar:
        """The bar that a configuration sets; within a size that was asked for, nothing gets more bits."""
        fallback = "none" if config.has_target else config.fallback
        return cls(min_accuracy=config.min_accuracy, fallback=fallback, fail_fast=config.fail_fast)

    def at(self, bits: int, asked: int) -> float:
        """What must be reached at a width: `min_accuracy`, and no less than LEAST where another one was asked for."""
        return self.min_accuracy if bits <= asked else max(self.min_accuracy, LEAST.get(bits, 0.0))

    def demands_more(self, name: str, metric: str, cosine: float, bits: int, asked: int) -> bool:
        """Whether a layer must be done again at the next width.

        Raises:
            BarMissedError: it misses its bar, and there is no next width, or it is not for this layer alone to have.
        """
        if cosine >= self.at(bits, asked) or (self.fallback == "none" and not self.fail_fast):
            return False
        if self.fail_fast or self.fallback == "model" or wider(bits) is None:
            raise BarMissedError(f"{name}: {self.missed(metric, cosine, bits, asked)}; {self._remedy(bits)}")
        return True

    def remark(self, metric: str, cosine: float, bits: int, asked: int) -> tuple[str, ...]:
        """What a decision says of a layer that misses its bar and stays as it is."""
        if cosine >= self.at(bits, asked):
            return ()
        return (f"{STAYS_BELOW}{self.missed(metric, cosine, bits, asked)}",)

    def missed(self, metric: str, cosine: float, bits: int, asked: int) -> str:
        """In words."""
        least = self.at(bits, asked)
        return f"{metric} {told_below(cosine, least)} at int{bits} is below {least:g}"

    def _remedy(self, bits: int) -> str:
        if wider(bits) is None:
            return f"{REMEDY}, or keep it as it is (--keep)"
        return LEAVE_FAIL_FAST


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the bar was held against; why it is missed, empty where it is met; and the model's accuracy where one is."""

    judged_by: str
    missed: str = ""
    accuracy: float | None = None


def verdict_by_layers(decisions: Iterable[Decision], judged_by: str) -> Verdict:
    """The verdict where every layer has its own bar."""
    low = next((f"{one.layer_name}: {one.missed}" for one in decisions if one.missed), "")
    return Verdict(judged_by=judged_by, missed=low)


def told_below(cosine: float, least: float) -> str:
    """A cosine that is below a bar, with as many digits as show it."""
    short = f"{cosine:.5g}"
    return short if float(short) < least else repr(cosine)


def wider(bits: int) -> Bits | None:
    """The next width; None behind the widest one."""
    return next((width for width in WIDTHS if width > bits), None)


def warn_of_fallback(name: str, because: str) -> None:
    """Tell at once what the layer's decision will say in the file."""
    warnings.warn(f"{name}: {because}", stacklevel=3)

"""What depends on the timestep: the range of a layer's inputs.

No weight does. Each time group has one static scale and zero point of 8-bit activations, chosen by the current timestep
when the model runs (as TFMQ-DM stores them, Huang et al., 2024, arXiv 2311.16503). Knows no models and no files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from arrow_quant_v2.errors import QuantizationError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from arrow_quant_v2.time_groups import TimeGroups

LEVELS = 255
SMALLEST_SCALE = 2.0**-120


@dataclass(frozen=True, kw_only=True)
class TimeGroupParameters:
    """Activations of one time group: x ~ scale * (code - zero_point), code 0 to 255."""

    start: float
    end: float
    scale: float
    zero_point: float


class TimeAwareQuantizer:
    """Chooses the parameters of a layer's activations for each time group."""

    def __init__(self, groups: TimeGroups) -> None:
        """Take the time groups."""
        self.groups = groups

    def parameters(self, low: Sequence[float], high: Sequence[float]) -> tuple[TimeGroupParameters, ...]:
        """One for each time group, from the least and largest value that its inputs had.

        0.0 always lies on a code, because padding is exact zeros.

        Raises:
            QuantizationError: there are not as many ranges as time groups, or one is not finite.
        """
        if not len(low) == len(high) == self.groups.count:
            raise QuantizationError(f"{len(low)} ranges were seen; there are {self.groups.count} time groups")
        found = []
        for (start, end), least, most in zip(self.groups.ranges(), low, high, strict=True):
            scale, zero = _range(least, most)
            found.append(TimeGroupParameters(start=start, end=end, scale=scale, zero_point=zero))
        return tuple(found)


def _range(low: float, high: float) -> tuple[float, float]:
    low, high = min(low, 0.0), max(high, 0.0)
    if not (low > -torch.inf and high < torch.inf):
        raise QuantizationError(f"activations go from {low} to {high}; finite ranges are needed: calibrate again")
    scale = max((high - low) / LEVELS, SMALLEST_SCALE)
    return scale, float(round(-low / scale))

"""What calibration saw of one input that layers share: per time group its range and spread, over all of them its H.

Stats of parts of the samples add up to the stats of all of them. Knows neither models nor hooks.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import torch

from arrow_quant_v2.calibration.second_moment import SecondMoment
from arrow_quant_v2.errors import QuantizationError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

MOMENTS = 5  # count, sum, sum of squares, least, largest
OWN = ("moments", "absmax", "sums", "rows")
PROBES = 64  # rows of each time group that are kept, to measure errors with
PROBES_PER_CALL = 8
OF_PART = re.compile(r"([0-9]+)-([0-9]+)\.(.+)")
Content = TypeVar("Content")


@dataclass(frozen=True, kw_only=True, eq=False)
class Seen:
    """One input as one call of the model gave it.

    rows     (tokens, columns) float32: tokens, or the places that a kernel visits; at most some thousands of them
    moments  (5,) float64: count, sum, sum of squares, least and largest of all its elements
    absmax   (channels,) float32: largest magnitude in each input channel
    part     the rows of the weight that it meets; None: all of them
    transposed  rows of the weight belong to inputs
    say      (tokens,) float32: how much each of the rows counts in H; None: all alike
    """

    rows: Tensor
    moments: Tensor
    absmax: Tensor
    part: tuple[int, int] | None = None
    transposed: bool = False
    say: Tensor | None = None

    def counted(self, weight: float) -> Tensor:
        """The rows as they go into H, where those of this call have that weight."""
        rows = self.rows if self.say is None else self.rows * self.say.sqrt()[:, None]
        return rows if weight == 1.0 else rows * weight**0.5


class InputStats:
    """The stats of one input: `layers` are the names of the weights that it goes into.

    moments  (groups, 5) float64: count, sum, sum of squares, least and largest in each time group
    absmax   (groups, channels) float32
    sums     (groups, columns) float64: sum of the rows that were seen in each time group
    probes   up to PROBES of those rows for each time group, (rows, columns) float32
    second   H = sum of w x x^T, w the weight of the sample's time group, so that every group has the same say, times
             how much the row counts
    parts    the same of rows of the weight that have inputs of their own, by the first row and the one after the last
    transposed  rows of the weight belong to inputs, not to outputs
    """

    def __init__(
        self,
        layers: tuple[str, ...],
        groups: int,
        *,
        columns: int,
        channels: int,
        transposed: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        """Start with nothing seen."""
        self.layers = layers
        self.moments = torch.zeros(groups, MOMENTS, dtype=torch.float64, device=device)
        self.moments[:, 3], self.moments[:, 4] = torch.inf, -torch.inf
        self.absmax = torch.zeros(groups, channels, device=device)
        self.sums = torch.zeros(groups, columns, dtype=torch.float64, device=device)
        self.rows = torch.zeros(groups, dtype=torch.int64, device=device)
        self.probes = [torch.zeros(0, columns, device=device) for _ in range(groups)]
        self.second = SecondMoment(columns, device)
        self.parts: dict[tuple[int, int], InputStats] = {}
        self.transposed = transposed

    @property
    def count(self) -> int:
        """Rows in H."""
        return self.second.count

    def add(self, seen: Sequence[Seen], groups: Sequence[int], weights: Sequence[float]) -> None:
        """Add what some calls gave, each with its time group and weight.

        Raises:
            QuantizationError: they have other columns than before, or hold NaN or infinity; then none is added.
        """
        for one in seen:
            self._demand(one)
        for one, group in zip(seen, groups, strict=True):
            _add_moments(self.moments[group], one.moments)
            self.absmax[group] = torch.maximum(self.absmax[group], one.absmax)
            self.sums[group] += one.rows.sum(dim=0, dtype=torch.float64)
            self.rows[group] += len(one.rows)
            self._probe(group, _spaced(one.rows, PROBES_PER_CALL))
        self.second.add(torch.cat([one.counted(weight) for one, weight in zip(seen, weights, strict=True)]))
        self.transposed = seen[0].transposed
        for part in dict.fromkeys(one.part for one in seen if one.part is not None):
            mine = [number for number, one in enumerate(seen) if one.part == part]
            alone = [replace(seen[number], part=None) for number in mine]
            self._part(part).add(alone, [groups[n] for n in mine], [weights[n] for n in mine])

    def _part(self, part: tuple[int, int]) -> InputStats:
        if part not in self.parts:
            groups, channels = self.absmax.shape
            self.parts[part] = InputStats(
                self.layers,
                groups,
                columns=self.second.columns,
                channels=channels,
                transposed=self.transposed,
                device=self.absmax.device,
            )
        return self.parts[part]

    def merge(self, other: InputStats) -> None:
        """Add what was seen elsewhere of the same input.

        Raises:
            QuantizationError: it goes into other layers, or has other time groups or columns.
        """
        if (self.layers, self.absmax.shape, self.sums.shape) != (other.layers, other.absmax.shape, other.sums.shape):
            raise QuantizationError(
                f"the stats of {', '.join(other.layers)} cannot be added to those of {', '.join(self.layers)}: they are"
                f" of another input; merge stats of the same model and settings"
            )
        for mine, theirs in zip(self.moments, other.moments, strict=True):
            _add_moments(mine, theirs)
        self.absmax = torch.maximum(self.absmax, other.absmax)
        self.sums += other.sums
        self.rows += other.rows
        for group, rows in enumerate(other.probes):
            self._probe(group, rows)
        self.second.merge(other.second)
        for part, theirs in other.parts.items():
            self._part(part).merge(theirs)

    def place(self, group: int, alone: InputStats, weight: float) -> None:
        """Let one time group be what stats of that group alone saw, whose H counts `weight` times.

        Raises:
            QuantizationError: they have other columns.
        """
        self.second.merge(alone.second, weight)
        self.moments[group], self.absmax[group] = alone.moments[0], alone.absmax[0]
        self.sums[group], self.rows[group] = alone.sums[0], alone.rows[0]
        self.probes[group] = alone.probes[0]
        for part, own in alone.parts.items():
            self._part(part).place(group, own, weight)

    def spread(self) -> dict[str, list[float]]:
        """`mean, std, min, max` of the elements, one entry per time group; a group that saw nothing has zeros."""
        count = self.moments[:, 0]
        mean = self.moments[:, 1] / count.clamp(min=1.0)
        variance = (self.moments[:, 2] / count.clamp(min=1.0) - mean.square()).clamp(min=0.0)
        low, high = (torch.where(count > 0.0, self.moments[:, i], 0.0) for i in (3, 4))
        named = {"mean": mean, "std": variance.sqrt(), "min": low, "max": high}
        return {name: values.tolist() for name, values in named.items()}

    def _demand(self, one: Seen) -> None:
        found, wanted = (one.rows.shape[1], len(one.absmax)), (self.sums.shape[1], self.absmax.shape[1])
        if found != wanted:
            raise QuantizationError(
                f"the inputs of {', '.join(self.layers)} have {found[0]} columns of {found[1]} channels; those seen"
                f" before have {wanted[0]} of {wanted[1]}: give samples that the model treats alike"
            )
        if not one.moments.isfinite().all():
            raise QuantizationError(
                f"the inputs of {', '.join(self.layers)} hold NaN or infinity; leave that sample out"
            )

    def _probe(self, group: int, rows: Tensor) -> None:
        self.probes[group] = torch.cat([self.probes[group], rows])[:PROBES]

    @property
    def means(self) -> Tensor:
        """(groups, columns) float32: the mean row of each time group, zeros where none was seen."""
        return (self.sums / self.rows.clamp(min=1)[:, None]).to(torch.float32)

    def tensors(self) -> dict[str, Tensor]:
        """Everything seen, on the CPU and ready to be stored, parts by names that begin with their rows."""
        own = dict(zip(OWN, (self.moments, self.absmax, self.sums, self.rows), strict=True))
        probes = {f"probes.{group}": rows for group, rows in enumerate(self.probes)}
        found = {**own, "count": torch.tensor([self.second.count]), "second": self.second.matrix, **probes}
        for (first, stop), part in self.parts.items():
            found |= {f"{first}-{stop}.{name}": tensor for name, tensor in part.tensors().items()}
        return {name: tensor.cpu() for name, tensor in found.items()}

    def move_to(self, device: str) -> None:
        """Bring what was stored to where layers are fitted to it."""
        self.moments, self.absmax = self.moments.to(device), self.absmax.to(device)
        self.sums, self.rows = self.sums.to(device), self.rows.to(device)
        self.probes = [rows.to(device) for rows in self.probes]
        self.second = SecondMoment.of(self.second.matrix.to(device), self.second.count)
        for part in self.parts.values():
            part.move_to(device)

    @classmethod
    def of(cls, layers: tuple[str, ...], tensors: Mapping[str, Tensor], *, transposed: bool = False) -> InputStats:
        """The same again from what was stored.

        Raises:
            QuantizationError: the tensors do not belong together.
        """
        by_part = tensors_by_part({name: tensor.clone() for name, tensor in tensors.items()})
        whole = cls._whole(layers, by_part.pop(None, {}), transposed=transposed)
        whole.parts = {part: cls._whole(layers, own, transposed=transposed) for part, own in by_part.items() if part}
        return whole

    @classmethod
    def _whole(cls, layers: tuple[str, ...], own: Mapping[str, Tensor], *, transposed: bool) -> InputStats:
        """Without parts."""
        try:
            groups, channels, columns = len(own["moments"]), own["absmax"].shape[-1], own["second"].shape[-1]
            result = cls(layers, groups, columns=columns, channels=channels, transposed=transposed)
            fit = all(own[name].shape == tensor.shape for name, tensor in result.tensors().items() if "." not in name)
            result.moments, result.absmax, result.sums, result.rows = (own[name] for name in OWN)
            result.probes = [own[f"probes.{group}"] for group in range(groups)]
        except KeyError as error:
            raise QuantizationError(
                f"the stored stats of {', '.join(layers)} lack {error.args[0]}; calibrate again"
            ) from error
        if not fit or any(rows.shape[1:] != (columns,) for rows in result.probes):
            raise QuantizationError(f"the stored stats of {', '.join(layers)} do not fit together; calibrate again")
        result.second = SecondMoment.of(own["second"], int(own["count"]))
        return result


def tensors_by_part(tensors: Mapping[str, Content]) -> dict[tuple[int, int] | None, dict[str, Content]]:
    """What `tensors` gave of each part, by the rows of the part and the names without them; None: of all rows."""
    found: dict[tuple[int, int] | None, dict[str, Content]] = {}
    for name, content in tensors.items():
        rows = OF_PART.fullmatch(name)
        part = (int(rows[1]), int(rows[2])) if rows else None
        found.setdefault(part, {})[rows[3] if rows else name] = content
    return found


def _spaced(rows: Tensor, count: int) -> Tensor:
    """At most `count` of the rows, evenly spaced."""
    return rows if len(rows) <= count else rows[torch.linspace(0, len(rows) - 1, count).long().to(rows.device)]


def moments_of(values: Tensor) -> Tensor:
    """(5,) float64: count, sum, sum of squares, least and largest of all elements of one input."""
    wide = values.to(torch.float64)
    low, high = values.aminmax()
    count = torch.tensor(values.numel(), dtype=torch.float64, device=values.device)
    return torch.stack([count, wide.sum(), wide.square().sum(), low.to(torch.float64), high.to(torch.float64)])


def _add_moments(total: Tensor, more: Tensor) -> None:
    total[:3] += more[:3]
    total[3], total[4] = torch.minimum(total[3], more[3]), torch.maximum(total[4], more[4])

"""How far the inputs of a layer drift from the original model's, because layers before it are quantized already.

The block that is being fitted is run a second time, with its original weights, on what the original blocks before it
gave: so no second model is needed. Fits nothing.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from arrow_quant_v2.engines.one_core import each_on_one_core, tiles

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from torch import Tensor

    from arrow_quant_v2.calibration.stats import Seen


class Originals:
    """Weights of one block as they were before they were fitted, by the module's own names."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        """Know nothing of any weight; `parameters` are those of the model, as they are whenever they are asked for."""
        self._parameters = parameters
        self._values: dict[str, Tensor] = {}

    def remember(self, layers: Iterable[str]) -> None:
        """These weights are about to change."""
        self._values |= {layer: self._parameters[layer].detach().clone() for layer in layers}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The block has its original weights inside, and afterwards those that it had before."""
        now = {layer: self._parameters[layer].detach().clone() for layer in self._values}
        try:
            self._put(self._values)
            yield
        finally:
            self._put(now)

    def _put(self, values: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for layer, value in values.items():
                self._parameters[layer].copy_(value)


class Drift:
    """D = sum of w (x' - x) x^T over inputs x of the quantized model, x' of the original one.

    matrix  float32 (columns, columns); None: nothing was seen
    """

    def __init__(self, originals: Originals) -> None:
        """Start with nothing seen; `originals` are weights of the block that the inputs belong to."""
        self.originals = originals
        self.matrix: Tensor | None = None

    def add(self, here: Sequence[Sequence[Seen]], there: Sequence[Sequence[Seen]], weights: Sequence[float]) -> None:
        """Add what some samples gave: their inputs, the original ones, and the weight of each sample.

        Inputs that are not of the same tokens have no drift: a sample may reach other experts than it did.
        """
        pairs = [
            (one.rows, other.rows, weight if one.say is None else weight * one.say[:, None])
            for mine, theirs, weight in zip(here, there, weights, strict=True)
            if len(mine) == len(theirs)
            for one, other in zip(mine, theirs, strict=True)
            if one.rows.shape == other.rows.shape
        ]
        if not pairs:
            return
        x = torch.cat([rows for rows, _, _ in pairs])
        drift = torch.cat([_drifted(*pair) for pair in pairs])
        if self.matrix is None:
            self.matrix = torch.zeros(x.shape[1], x.shape[1], device=x.device)
        total = self.matrix

        def add(columns: slice) -> None:
            total[:, columns].addmm_(drift.mT, x[:, columns])

        each_on_one_core(add, tiles(x.shape[1]))


def _drifted(rows: Tensor, original: Tensor, weight: float | Tensor) -> Tensor:
    """The rows w (x' - x), w that of all or of each.

    0 where x' is further from x than 0 is: then they are hardly the same token.
    """
    drift = original - rows
    far = drift.square().sum(dim=1) > rows.square().sum(dim=1)
    return drift.mul_(weight).masked_fill_(far[:, None], 0.0)

"""How much a model's outputs feel what becomes of each row of a layer's inputs, told by gradients; fits nothing.

An error dW of a layer costs the outputs, to first order, the mean of (sum_t g_t . dW x_t)^2 (see backwards.py). With
errors of different tokens, and of different rows of dW, taken to have nothing to do with each other, that is in
proportion to tr(dW H dW^T) with H = sum_t |g_t|^2 x_t x_t^T: rows of inputs count by the square of the gradient of
what the layer makes of them (GuidedQuant, Kim et al., 2025, arXiv 2505.07004, which has several such H for a layer;
here layers that share an input share one).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import linear

from arrow_quant_v2.calibration.backwards import AT_ONCE, backwards, in_the_graph
from arrow_quant_v2.calibration.blocks import matrices
from arrow_quant_v2.calibration.collect import Watch, kept_rows
from arrow_quant_v2.calibration.felt import NOWHERE
from arrow_quant_v2.calibration.products import CONVOLUTIONS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor

    from arrow_quant_v2.calibration.felt import Felt
    from arrow_quant_v2.calibration.runnable import Runnable
    from arrow_quant_v2.calibration.sample import Sample

LEAST = 1e-3  # of the mean: no row is of no account, so that H keeps its rank


@dataclass(frozen=True, kw_only=True, eq=False)
class Importance:
    """Name of a weight -> for each call of the model (rows,) float32, those of the inputs' rows, 1 on the average.

    The average is that over all calls for models of masked tokens, for all others that of each call.

    Rows are tokens, or the places that a convolution's kernel visits. Weights of which something else is true (several
    products in a call, rows with inputs of their own) are not in it: all rows of their inputs count alike.
    """

    felt: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)

    def of(self, layers: Sequence[str], call: int, rows: int) -> Tensor | None:
        """How much each of the `rows` that are kept of an input in this call counts for the layers that share it.

        None: all alike.
        """
        known = [self.felt[layer][call] for layer in layers if layer in self.felt]
        if len(known) != len(layers) or any(len(one) != len(known[0]) for one in known):
            return None
        mean = torch.stack(known).mean(dim=0)
        chosen = kept_rows(len(mean), call)
        say = mean if chosen is None else mean[chosen]
        return say.clamp(min=LEAST) if len(say) == rows else None


ALIKE = Importance()


def importance(
    runnable: Runnable,
    samples: Sequence[Sample],
    *,
    seed: int = 0,
    kept: Felt = NOWHERE,
    tell: Callable[[int, int], object] = lambda _done, _known: None,
) -> Importance:
    """That of every linear layer and convolution of the model in these calls.

    `tell` hears of how many calls it is known, and of how many it was from the start, because they were `kept`.

    Raises:
        RuntimeError: the model, or one of its operators, has no gradient, or it cannot be called.
        NotImplementedError: one of its functions has no gradient.
        StoreError: what was felt cannot be kept.
    """
    calls = kept.known(len(samples))
    known, heard, waits = len(calls), bool(calls), False
    tell(known, known)
    for watch in _watched(runnable, samples[known:], seed + known, lambda done: tell(known + done, known)):
        felt = {name: rows[0] for name, rows in watch.felt.items() if len(rows) == 1}
        heard, waits = heard or bool(watch.felt), waits or watch.waits
        if watch.felt:
            kept.keep(len(calls), felt)
        calls.append(felt)
    if waits and not heard:
        raise RuntimeError("no output depends on a weight, or the model runs without gradients")
    everywhere = {name: [call[name] for call in calls] for name in calls[0] if all(name in call for call in calls)}
    relative = _within_calls if runnable.mask_token is None else _relative
    return Importance(felt={name: relative(rows) for name, rows in everywhere.items()})


def _watched(
    runnable: Runnable, samples: Sequence[Sample], seed: int, tell: Callable[[int], object]
) -> Iterator[_Feeling]:
    known = matrices(runnable.module)
    parameters = runnable.parameters([place for place in runnable.names.values() if place in known])
    return backwards(
        runnable,
        samples,
        lambda: _Feeling(parameters),
        seed=seed,
        block_by_block=True,
        at_once=AT_ONCE if runnable.on_demand is None else 1,  # so that one block's weights are in memory
        tell=tell,
    )


def _relative(felt: Sequence[Tensor]) -> list[Tensor]:
    mean = float(torch.cat(list(felt)).mean(dtype=torch.float64))
    return [one / mean if mean > 0.0 else torch.ones_like(one) for one in felt]


def _within_calls(felt: Sequence[Tensor]) -> list[Tensor]:
    """Every call keeps its say: how large the gradient of a random direction is tells more of the time than of rows."""
    return [_relative([one])[0] for one in felt]


class _Feeling(Watch):
    """Sees |g|^2 of each row of what every product with the parameters named gives."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__(parameters, keep=False)
        self._seen: dict[str, list[Tensor]] = {}
        self.waits = False
        """Whether any gradient was to be seen."""

    @property
    def felt(self) -> dict[str, list[Tensor]]:
        """Of each product (rows,), by the names of weights that are multiplied as a whole."""
        whole = self._seen.keys() - self.parted.keys() - self.turned
        return {name: self._seen[name] for name in sorted(whole)}

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Do what was asked, and see its gradient when it is a product with one of the parameters."""
        before = len(self.log)
        result = super().__torch_function__(func, types, args, kwargs or {})
        if len(self.log) > before and torch.is_grad_enabled() and (func is linear or func in CONVOLUTIONS):
            return self._watched(self.log[-1][0], result, -1 if func is linear else -1 - CONVOLUTIONS[func])
        return result

    def _watched(self, name: str, result: Tensor, axis: int) -> Tensor:
        def add(gradient: Tensor) -> None:
            squares = gradient.detach().square().sum(dim=axis).flatten()
            self._seen.setdefault(name, []).append(squares.to("cpu", torch.float32))

        self.waits = True
        return in_the_graph(result, add)

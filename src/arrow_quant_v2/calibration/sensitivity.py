"""How much a model's output changes when weights change a little, told by gradients while the model runs.

To first order what changes in direction r (see calibration/backwards.py), r . dy, is the sum of g_t . (dW x_t) over
tokens t, where g_t is the gradient of r . y with respect to what the layer gives for x_t. Errors of different rows of a
weight have nothing to do with each other, so their squares add up:

    |dy|^2 ~ E sum_rows (sum_t g_t,row (dW_row . x_t))^2

which sees what a row's error does to all tokens together, and needs few calls of the model.
The sum over tokens is also dW_row . G_row, G the gradient with respect to the weight: so it is told where rows have
inputs of their own (experts, groups), and with columns for rows where rows belong to inputs.
Knows nothing of where changes come from.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear

from arrow_quant_v2.calibration.backwards import backwards, in_the_graph
from arrow_quant_v2.calibration.collect import Watch, rows_in
from arrow_quant_v2.calibration.products import CONVOLUTIONS, KINDS, operands
from arrow_quant_v2.calibration.weight_gradient import Again, Pieces, SumsOfPieces, with_gradient

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from arrow_quant_v2.calibration.runnable import Runnable
    from arrow_quant_v2.calibration.sample import Sample


@dataclass(frozen=True, kw_only=True, eq=False)
class Change:
    """Ways in which some rows of a weight may change.

    rows    (n,) int64: their numbers
    errors  (ways, n, *shape of one row) float32: dW of each way
    """

    rows: Tensor
    errors: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Felt:
    """By how much the output feels changes.

    changes  name of a weight that inputs are multiplied with -> (ways,) float64: the part of |y|^2 that each way costs
    tables   name of a weight whose rows are looked up -> (columns,) float64: the part of |y|^2 that errors of 1 in that
             column of all rows cost, which have nothing to do with each other
    """

    changes: dict[str, Tensor] = field(default_factory=dict)
    tables: dict[str, Tensor] = field(default_factory=dict)

    def add(self, other: Felt, weight: float = 1.0) -> None:
        """Add what was felt elsewhere, `weight` times."""
        for mine, theirs in ((self.changes, other.changes), (self.tables, other.tables)):
            for name, felt in theirs.items():
                mine[name] = mine[name] + weight * felt if name in mine else weight * felt


def sensitivity(
    runnable: Runnable,
    samples: Sequence[Sample],
    weights: Sequence[float],
    changes: Mapping[str, Change | Pieces],
    *,
    tables: Sequence[str] = (),
    seed: int = 0,
    tell: Callable[[int], object] = int,
) -> Felt:
    """The mean over all samples, each with its weight; parameters that the output does not depend on are not in it.

    `changes` and `tables` are by the module's own names of its parameters; `tell` hears how many samples are done.

    Raises:
        RuntimeError: the model, or one of its operators, has no gradient, or it cannot be called.
        NotImplementedError: one of its functions has no gradient.
    """
    parameters = runnable.parameters(dict.fromkeys((*changes, *tables)))
    total = Felt()
    seen = backwards(
        runnable,
        samples,
        lambda: Gradients(parameters, changes),
        seed=seed,
        block_by_block=runnable.on_demand is not None,
        tell=tell,
    )
    for weight, gradients in zip(weights, seen, strict=True):
        total.add(gradients.felt(), weight / len(samples))
    if not (total.changes or total.tables):
        raise RuntimeError("no output depends on a weight that is asked about, or the model runs without gradients")
    return total


class Gradients(Watch):
    """Sees the gradient of what each product with the parameters named gives, and of what is looked up in them."""

    def __init__(self, parameters: Mapping[str, Tensor], changes: Mapping[str, Change | Pieces]) -> None:
        """Watch for these parameters, by the names that the products shall have."""
        super().__init__(parameters, keep=False)
        self._changes = {name: change for name, change in changes.items() if isinstance(change, Change)}
        self._pieces = {name: change for name, change in changes.items() if isinstance(change, Pieces)}
        self._sums: dict[str, Tensor] = {}  # (ways, n): sum over tokens of g (dW x)
        self._sums_of: dict[str, SumsOfPieces] = {}  # the same of each piece of each way
        self._tables: dict[str, Tensor] = {}

    def felt(self) -> Felt:
        """What was felt in this call."""
        changes = {}
        for name, sums in self._sums.items():
            whole, probed = len(self._parameters[name]), len(self._changes[name].rows)
            changes[name] = sums.square().sum(dim=1) * (whole / probed)
        changes |= {name: sums.costs() for name, sums in self._sums_of.items()}
        return Felt(changes=changes, tables=self._tables)

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Do what was asked, and see its gradient when it is a product with one of the parameters."""
        before, given = len(self.log), kwargs or {}
        result = super().__torch_function__(func, types, args, given)
        if not torch.is_grad_enabled():
            return result
        if func is embedding:
            name = self._name_of(args[1] if len(args) > 1 else given["weight"])
            return result if name is None else self._looked_up(name, result)
        if len(self.log) > before and (func is linear or func in CONVOLUTIONS):
            name = self.log[-1][0]
            if name in self._changes and name not in self.parted:
                return self._multiplied(name, result, func, args, given)
        if len(self.log) > before and func in KINDS and self.log[-1][0] in self._pieces:
            return self._in_pieces(self.log[-1][0], result, func, args, given)
        return result

    def _in_pieces(
        self, name: str, result: Tensor, func: Callable[..., Any], args: Sequence[Any], given: Mapping[str, Any]
    ) -> Tensor:
        """The result, behind which the gradient of the weight is taken, and let go of at once."""
        x = next(operands(func, args, given)).given
        found = ((one, self._first_row(name, one)) for one in (*args, *given.values()) if isinstance(one, Tensor))
        weight, first = next((one, row) for one, row in found if row is not None)
        turned = not weight.is_contiguous()

        def add(gradient: Tensor) -> None:
            sums = self._sums_of.setdefault(name, SumsOfPieces(self._pieces[name]))
            sums.add(gradient.mT if turned else gradient, first)

        return with_gradient(Again.of(func, args, given, x=x, weight=weight), x, weight, result, add)

    def _first_row(self, name: str, weight: Tensor) -> int | None:
        """Where in the parameter this weight begins, as it lies in memory; None: it is another one."""
        stored = weight if weight.is_contiguous() or weight.ndim < 2 else weight.mT  # noqa: PLR2004 - a matrix
        if self._name_of(stored) == name:
            return 0
        part = rows_in(self._parameters[name], stored)
        return None if part is None else part[0]

    def _multiplied(
        self, name: str, result: Tensor, func: Callable[..., Any], args: Sequence[Any], given: Mapping[str, Any]
    ) -> Tensor:
        """The result as a part of the graph; what the changes give in its place is multiplied with its gradient."""
        change = self._changes[name]
        with torch.no_grad(), torch._C.DisableTorchFunction():  # noqa: SLF001 - the mode itself is not meant
            errors = _with_weight(func, args, given, change.errors.flatten(0, 1))
        axis = -1 if func is linear else -1 - CONVOLUTIONS[func]
        errors = errors.movedim(axis, 0).unflatten(0, change.errors.shape[:2]).flatten(2)  # (ways, n, tokens)

        def add(gradient: Tensor) -> None:
            rows = gradient.detach().movedim(axis, 0).flatten(1)[change.rows]  # (n, tokens)
            sums = (errors * rows).sum(dim=-1, dtype=torch.float64)
            self._sums[name] = self._sums[name] + sums if name in self._sums else sums

        return in_the_graph(result, add)

    def _looked_up(self, name: str, result: Tensor) -> Tensor:
        def add(gradient: Tensor) -> None:
            squares = gradient.detach().flatten(0, -2).square().sum(dim=0, dtype=torch.float64)
            self._tables[name] = self._tables[name] + squares if name in self._tables else squares

        return in_the_graph(result, add)


def _with_weight(func: Callable[..., Any], args: Sequence[Any], given: Mapping[str, Any], weight: Tensor) -> Tensor:
    """The same product with another weight, and without bias."""
    named = dict(zip(("input", "weight", "bias"), args, strict=False)) | {
        key: value for key, value in given.items() if key in {"input", "weight", "bias"}
    }
    rest = {key: value for key, value in given.items() if key not in named}
    result: Tensor = func(named["input"].detach(), weight, None, *args[3:], **rest)
    return result

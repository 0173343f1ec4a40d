"""What each layer loses the model in each form, measured on the model's own outputs; chooses nothing.

Some rows of each weight are quantized as the run itself will do it, on what goes into the layer in one half of the
samples; what their errors do to the outputs is measured on the other half, so that a layer that fits what it saw, and
nothing else, is found out.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace
from statistics import median
from typing import TYPE_CHECKING, TypeAlias

import torch

from arrow_quant_v2.allocation import NARROWEST, LayerLoss
from arrow_quant_v2.calibrated_run import placed, weight_of
from arrow_quant_v2.calibration.blocks import walking
from arrow_quant_v2.calibration.observe import observe_block, strata
from arrow_quant_v2.calibration.sensitivity import Change, Felt, sensitivity
from arrow_quant_v2.calibration.weight_gradient import Piece, Pieces
from arrow_quant_v2.errors import InterruptedRunError, QuantizationError
from arrow_quant_v2.kernels.tensors import dequantized
from arrow_quant_v2.plan import Calibrated, forms_apart, plans_by_form
from arrow_quant_v2.progress import Progress
from arrow_quant_v2.quantizers import quantizer
from arrow_quant_v2.quantizers.calibrated import Weight, fit_together, spaced
from arrow_quant_v2.quantizers.parts import judged_parts, lost_of
from arrow_quant_v2.sequential import sight_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor

    from arrow_quant_v2.calibrated_run import CalibratedRun, FittedRun
    from arrow_quant_v2.calibration.sample import Sample
    from arrow_quant_v2.calibration.stats import InputStats
    from arrow_quant_v2.calibration.stored_stats import KeptStats
    from arrow_quant_v2.config import DiffusionQuantConfig
    from arrow_quant_v2.layer_widths import Form
    from arrow_quant_v2.plan import LayerPlan
    from arrow_quant_v2.quantizers.calibrated import Fitted, Sight
    from arrow_quant_v2.quantizers.parts import Judged
    from arrow_quant_v2.sources.base import Source

    ByForm: TypeAlias = Mapping[Form, Mapping[str, LayerPlan]]

SAMPLES = 32  # calls of the model in each half
PROBED = 2**17  # weights of each layer, as whole rows
FEWEST_ROWS, MOST_ROWS = 16, 64
RUNS, RUN_ROWS = 16, 128  # of a weight whose inputs are not seen: so many times some rows that lie together


@dataclass(frozen=True, kw_only=True)
class Losses:
    """The loss of every layer of which there is a choice, the names of those whose inputs were seen, and notes.

    own  what each layer's own outputs lose, all taken to matter alike
    """

    layers: Mapping[str, LayerLoss]
    own: Mapping[str, LayerLoss] = field(default_factory=dict)
    seen: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()


def measured_losses(run: CalibratedRun) -> Losses:
    """Measure on the model itself, block by block, then by gradients.

    Raises:
        QuantizationError: a weight or an input is not finite, or the model cannot be called.
        InterruptedRunError: the run was asked to stop.
    """
    everything = Calibrated(names=frozenset(info.name for info in run.source.tensors), method=run.method)
    names = placed(run.source, run.prepared.runnable, _open(plans_by_form(run.source.tensors, run.config, everything)))
    fitted, held_out = halves(run.prepared.samples.calls)
    table = _Table(run, names)
    progress = Progress(lambda message, _: run.progress.tell(message), 2 * sum(table.elements.values()))
    progress.tell(f"measuring what {len(names)} layers lose at each width on {len(fitted) + len(held_out)} samples")
    changes = _seen_in_a_walk(run, table, names, fitted, progress)
    others = [name for name in names if name not in changes]
    felt, notes = _felt(run, changes, others, held_out, progress)
    table.note_felt(felt, names)
    table.note_weights()
    return Losses(layers=table.losses(), own=table.own(), seen=frozenset(table.inputs), notes=notes)


def losses_on_stats(run: FittedRun, kept: KeptStats) -> Losses:
    """From stats: how much outputs feel a layer is not known, so each layer's own outputs count alike.

    Raises:
        QuantizationError: a weight is not finite.
        StoreError: the stats are damaged.
    """
    table = _Table(run, {name: name for name in kept.summary.layers})
    progress = Progress(lambda message, _: run.progress.tell(message), sum(table.elements.values()))
    for number, entry in enumerate(kept.summary.inputs):
        layers = [layer for layer in entry.layers if layer in table.open]
        stats = kept.read(number)
        if layers and stats.second.matrix.diagonal().any():
            table.note_inputs(layers, stats)
        progress.advance(sum(table.elements[layer] for layer in layers), ", ".join(layers))
    table.note_weights()
    note = "bits are spent by what each layer's own outputs lose: stats do not tell what the model's outputs lose"
    return Losses(layers=table.losses(), seen=frozenset(table.inputs), notes=(note,))


def losses_of_weights(source: Source, config: DiffusionQuantConfig) -> Losses:
    """From the weights alone: the relative squared error of each counts alike.

    Raises:
        QuantizationError: a weight is not finite.
    """
    plans = plans_by_form(source.tensors, config)
    found = {name: LayerLoss(at=_weight_errors(source, plans, name), told="weights") for name in _open(plans)}
    return Losses(layers=found)


def halves(calls: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """Two sets of calls, spread evenly over all of them; the same one twice where there are too few."""
    some = [calls[int(n)] for n in spaced(len(calls), 2 * SAMPLES)]
    return (some[::2], some[1::2]) if len(some) > 1 else (some, some)


def _open(plans: ByForm) -> set[str]:
    """Names of the layers of which there is a choice: some form quantizes them, and not all do the same."""
    return {name for name in plans[NARROWEST] if len(forms_apart(plans, name)) > 1}


def _seen_in_a_walk(
    run: CalibratedRun, table: _Table, names: Mapping[str, str], calls: Sequence[Sample], progress: Progress
) -> dict[str, Change | Pieces]:
    """Note what is seen of each input, block by block; the errors of some rows, by the module's own names."""
    runnable, parts = run.prepared.runnable, strata(calls, run.prepared.groups)
    changes: dict[str, Change | Pieces] = {}
    watched, scratch = runnable.parameters(names), run.folder.scratch / "losses"
    with walking(runnable.module, calls, watched, scratch, runnable.clock) as walk:
        for number, block in enumerate(walk.blocks):
            with runnable.holding(block.module):
                for layers, stats in observe_block(walk, number, range(len(calls)), parts).items():
                    if stats is not None and stats.second.matrix.diagonal().any():
                        found = table.note_inputs([names[layer] for layer in layers], stats)
                        changes |= {layer: found[names[layer]] for layer in layers if names[layer] in found}
                    progress.advance(sum(table.elements[names[layer]] for layer in layers), block.name)
            walk.forget(number)
            progress.tell(f"{number + 1}/{len(walk.blocks)} {block.name or 'the whole model'} measured")
            if run.should_stop():
                raise InterruptedRunError("stopped before widths were chosen; nothing was kept")
    return changes


def _felt(
    run: CalibratedRun,
    changes: Mapping[str, Change | Pieces],
    tables: list[str],
    calls: Sequence[Sample],
    progress: Progress,
) -> tuple[Felt, tuple[str, ...]]:
    """What the outputs feel; where gradients tell nothing, nothing, and a note that says so."""
    parts, runnable = strata(calls, run.prepared.groups), run.prepared.runnable
    done = 0

    def tell(count: int) -> None:
        nonlocal done
        progress.advance(progress.left * (count - done) // (len(calls) - done), "gradients")
        progress.tell(f"{count}/{len(calls)} gradients measured")
        done = count

    try:
        return sensitivity(runnable, calls, parts.weights, changes, tables=tables, seed=run.config.seed, tell=tell), ()
    except torch.cuda.OutOfMemoryError:  # a RuntimeError too, but the model has gradients
        raise
    except (RuntimeError, NotImplementedError) as error:
        note = f"bits are spent by what each layer's own outputs lose, because gradients tell nothing: {error}"
        warnings.warn(note, stacklevel=2)
        return Felt(), (note,)


class _Table:
    """What is known of every layer in every form, in three units that are made one in the end."""

    def __init__(self, run: FittedRun, names: Mapping[str, str]) -> None:
        """Know nothing; `names` are those of layers whose inputs may be seen, as values."""
        self._run = run
        calibrated = Calibrated(names=frozenset(names.values()), method=run.method)
        self._plans = plans_by_form(run.source.tensors, run.config, calibrated)
        self._alone = plans_by_form(run.source.tensors, run.config, replace(calibrated, names=frozenset()))
        self.open = _open(self._plans)
        self.elements = {name: self._plans[NARROWEST][name].tensor.numel for name in names.values()}
        self.outputs: dict[str, dict[Form, float]] = {}
        self.inputs: dict[str, dict[Form, float]] = {}
        self.weights: dict[str, dict[Form, float]] = {}
        self.equalized: dict[str, tuple[str, ...]] = {}

    def note_inputs(self, layers: Sequence[str], stats: InputStats) -> dict[str, Change | Pieces]:
        """Quantize some rows of layers that share an input in each form, and note what their outputs lose."""
        sight = sight_of(stats)
        asked = {layer: self._in_each_form(layer, stats.absmax.device) for layer in layers}
        if not sight.plain:
            return {layer: self._note_parts(layer, weights, sight) for layer, weights in asked.items()}
        some = [(layer, form, _some_rows(one)) for layer, weights in asked.items() for form, one in weights.items()]
        fitted = self._fitted([weight for _, _, weight in some], sight)
        if any(one.basis.equalization is not None for one in fitted):  # it is one basis for all of them
            self.equalized |= dict.fromkeys(layers, tuple(layers))
        changes: dict[str, Change | Pieces] = {}
        for layer in layers:
            values = next(weight.values for name, _, weight in some if name == layer)
            left = dict.fromkeys(self._apart(layer), torch.zeros_like(values))  # in a form that keeps it
            left |= {form: one.left for (name, form, _), one in zip(some, fitted, strict=True) if name == layer}
            changes[layer] = self._change(layer, values, left, stats)
        return changes

    def _in_each_form(self, layer: str, device: torch.device) -> dict[Form, Weight]:
        """The weight, asked for in each form that quantizes it."""
        plans = {form: self._plans[form][layer] for form in self._apart(layer)}
        coded = next(plan for plan in plans.values() if plan.spec is not None)
        whole = weight_of(self._run.source, coded).to(device)
        return {
            form: Weight(values=whole, info=plan.tensor, layout=plan.layout, spec=plan.spec)
            for form, plan in plans.items()
            if plan.layout is not None and plan.spec is not None
        }

    def _apart(self, layer: str) -> tuple[Form, ...]:
        """Its forms, in the order of all that is noted of them."""
        return forms_apart(self._plans, layer)

    def _note_parts(self, layer: str, weights: Mapping[Form, Weight], sight: Sight) -> Pieces:
        """Each part for its own inputs."""
        freedom = self._run.freedom.quick
        judged = {form: judged_parts(weight, sight, freedom) for form, weight in weights.items()}
        lost = {form: lost_of(judged.get(form, ())) for form in self._apart(layer)}  # nothing in a form that keeps it
        self.inputs[layer] = {form: outputs for form, (outputs, _) in lost.items()}
        self.weights[layer] = {form: size for form, (_, size) in lost.items()}
        pieces = (tuple(_piece(one, sight) for one in judged.get(form, ())) for form in lost)
        columns = next(iter(weights.values())).values.shape[1]
        return Pieces(columns=columns, ways=tuple(pieces))

    def _fitted(self, weights: Sequence[Weight], sight: Sight) -> list[Fitted]:
        freedom = self._run.freedom.quick
        try:
            return fit_together(weights, sight, freedom)
        except QuantizationError:
            if not freedom.equalize:
                raise
            return fit_together(weights, sight, replace(freedom, equalize=False))  # as the run itself will do

    def _change(self, layer: str, values: Tensor, left: Mapping[Form, Tensor], stats: InputStats) -> Change:
        second = stats.second.matrix
        self.inputs[layer] = {form: _relative(one, values, second) for form, one in left.items()}
        self.weights[layer] = {form: _relative(one, values) for form, one in left.items()}
        shape = self._plans[NARROWEST][layer].tensor.shape
        errors = torch.stack(list(left.values())).unflatten(2, shape[1:])
        return Change(rows=spaced(shape[0], len(values)), errors=errors)

    def note_felt(self, felt: Felt, names: Mapping[str, str]) -> None:
        """Note what the model's outputs lose; `names` are those of the files, by those of the module."""
        for place, costs in felt.changes.items():
            self._add(names[place], dict(zip(self._apart(names[place]), costs.tolist(), strict=True)))
        for place, there in felt.tables.items():
            squares = there.cpu()
            errors = {
                form: float((rows.to(torch.float64).square().mean(dim=0) * squares).sum())
                for form, rows in _table_errors(self._run.source, self._followed(names[place]), names[place])
            }
            self._add(names[place], errors)

    def _add(self, name: str, costs: Mapping[Form, float]) -> None:
        """A table that is also multiplied with, such as a tied head, costs both."""
        before = self.outputs.get(name, {})
        self.outputs[name] = {form: cost + before.get(form, 0.0) for form, cost in costs.items()}

    def note_weights(self) -> None:
        """Note the errors of all weights of which nothing else is known."""
        for name in sorted(self.open - set(self.inputs) - set(self.outputs)):
            self.weights[name] = _weight_errors(self._run.source, self._alone, name)

    def losses(self) -> dict[str, LayerLoss]:
        """Each open layer's loss in one unit: what outputs lose, or what they are taken to."""
        by_inputs = _rate(self.outputs, self.inputs)
        by_weights = _rate(self.outputs, self.weights)
        found: dict[str, LayerLoss] = {}
        for name in sorted(self.open):
            scaled = self.equalized.get(name, ())
            if name in self.outputs:
                found[name] = LayerLoss(at=self.outputs[name], equalized_with=scaled)
            elif name in self.inputs:
                found[name] = LayerLoss(at=_times(self.inputs[name], by_inputs), told="inputs", equalized_with=scaled)
            else:
                found[name] = LayerLoss(at=_times(self.weights[name], by_weights), told="weights")
        return found

    def own(self) -> dict[str, LayerLoss]:
        """Each open layer's loss where its own outputs tell all; of those of which none are known its weights do."""
        by_weights = _rate(self.inputs, self.weights)
        found: dict[str, LayerLoss] = {}
        for name in sorted(self.open):
            scaled = self.equalized.get(name, ())
            at = self.inputs[name] if name in self.inputs else _times(self._own_weights(name), by_weights)
            found[name] = LayerLoss(at=at, told="inputs", equalized_with=scaled)
        return found

    def _own_weights(self, name: str) -> dict[Form, float]:
        """Of a table, whose outputs are its rows, nothing but the outputs of the model is known yet."""
        return self.weights.get(name) or _weight_errors(self._run.source, self._alone, name)

    def _followed(self, name: str) -> ByForm:
        """The plans of which the run will follow one: a layer whose inputs are not seen is not fitted to them."""
        return self._plans if name in self.inputs else self._alone


def _piece(judged: Judged, sight: Sight) -> Piece:
    """Its outputs are along the columns where rows belong to inputs."""
    return Piece(
        rows=judged.rows,
        columns=judged.columns,
        errors=judged.left,
        apart=1 if sight.transposed else 0,
        stands=judged.stands,
    )


def _some_rows(weight: Weight) -> Weight:
    """Always the same ones of a layer."""
    return weight.some(min(MOST_ROWS, max(FEWEST_ROWS, PROBED // weight.values.shape[1])))


def _rate(known: Mapping[str, Mapping[Form, float]], other: Mapping[str, Mapping[Form, float]]) -> float:
    """How much one unit is of another, in the middle of the layers that are known in both; 1 where none is."""
    pairs = ((known[name][NARROWEST], other[name][NARROWEST]) for name in known if name in other)
    rates = [one / another for one, another in pairs if one > 0.0 and another > 0.0]
    return median(rates) if rates else 1.0


def _times(errors: Mapping[Form, float], rate: float) -> dict[Form, float]:
    return {form: error * rate for form, error in errors.items()}


def _relative(left: Tensor, values: Tensor, second: Tensor | None = None) -> float:
    """tr(dW H dW^T) / tr(W H W^T), H = 1 where none is given."""
    lost, whole = (
        float(((one if second is None else one @ second) * one).sum(dtype=torch.float64)) for one in (left, values)
    )
    return lost / whole if whole else 0.0


def _weight_errors(source: Source, plans: ByForm, name: str) -> dict[Form, float]:
    """|dW|^2 / |W|^2 of some rows in each form, from the weights alone."""
    values = _some_of(source, _coded(plans, name))
    return {form: _relative(left, values) for form, left in _left_over(values, plans, name)}


def _table_errors(source: Source, plans: ByForm, name: str) -> Iterable[tuple[Form, Tensor]]:
    return _left_over(_some_of(source, _coded(plans, name)), plans, name)


def _left_over(values: Tensor, plans: ByForm, name: str) -> Iterable[tuple[Form, Tensor]]:
    """W - Q of some rows in each form, quantized from the weights alone; 0 in a form that keeps it."""
    for form in forms_apart(plans, name):
        plan = plans[form][name]
        if plan.spec is None or plan.layout is None:
            yield form, torch.zeros_like(values)
            continue
        method = "clip" if plan.spec.method == "gptq" else plan.spec.method
        layout = replace(plan.layout, shape=tuple(values.shape), quant_axis=1)
        rows = quantizer(method)(values, replace(plan.spec, method=method))
        yield form, values - dequantized(rows.packed(name, "float32", layout))


def _coded(plans: ByForm, name: str) -> LayerPlan:
    """A plan that quantizes a layer of which there is a choice."""
    every = [planned[name] for planned in plans.values()]
    return next((plan for plan in every if plan.layout is not None), every[0])


def _some_of(source: Source, plan: LayerPlan) -> Tensor:
    """Some rows of a weight, (rows, columns) float32: runs of rows that lie together, evenly spaced."""
    layout = plan.layout
    columns = plan.tensor.numel // plan.tensor.shape[0] if layout is None else layout.columns
    rows = plan.tensor.numel // columns
    starts = range(1) if rows <= RUNS * RUN_ROWS else [int(n) for n in torch.linspace(0, rows - RUN_ROWS, RUNS).long()]
    length = rows if len(starts) == 1 else RUN_ROWS
    parts = [source.read(plan.tensor.name, at * columns, (at + length) * columns) for at in starts]
    return torch.cat(parts).reshape(-1, columns).to(torch.float32)

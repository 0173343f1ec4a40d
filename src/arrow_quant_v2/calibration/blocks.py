"""A model cut into blocks that run one after the other, and each block run alone on what the blocks before it gave.

The outputs of finished blocks are kept; when the model is called again, a finished block hands out what it gave before
instead of running, and the call ends after the block in question. So any module can be walked through, whatever
happens between its blocks, at the price of one block for each step. Knows nothing of what is done with a block.
"""

from __future__ import annotations

import threading
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from arrow_quant_v2.calibration.collect import EnoughSeen, Watch
from arrow_quant_v2.errors import QuantizationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor

    from arrow_quant_v2.calibration.sample import Sample


@dataclass(frozen=True, kw_only=True, eq=False)
class Block:
    """A part of a model: `inputs` are the groups of weights that share an input, in the order in which they are used.

    `calls` is how often one call of the model runs it, and `uses` how often it multiplies with each of its weights.
    """

    name: str
    module: nn.Module
    inputs: tuple[tuple[str, ...], ...]
    calls: int
    uses: Mapping[str, int]


def candidates(module: nn.Module, watched: frozenset[str], name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The smallest parts that are worth a step of their own: entries of lists of blocks, and what lies beside them."""
    if not _watched_in(module, watched, name):
        return
    if not any(_is_list_of_blocks(part, watched, _joined(name, at)) for at, part in module.named_modules()):
        yield name, module
        return
    for at, child in module.named_children():
        yield from candidates(child, watched, _joined(name, at))


def _joined(name: str, at: str) -> str:
    return ".".join(part for part in (name, at) if part)


def _watched_in(module: nn.Module, watched: frozenset[str], name: str) -> int:
    return sum(_joined(name, at) in watched for at, _ in module.named_parameters(remove_duplicate=False))


def _is_list_of_blocks(part: nn.Module, watched: frozenset[str], name: str) -> bool:
    """Whether some entry has weights of its own kind to be fitted one after the other."""
    if not isinstance(part, nn.ModuleList | nn.Sequential):
        return False
    return any(_watched_in(child, watched, _joined(name, at)) > 1 for at, child in part.named_children())


class Walk:
    """A model on its way through its blocks, for all samples at once.

    Calls of different samples may run in different threads at the same time.
    """

    def __init__(self, module: nn.Module, samples: Sequence[Sample], parameters: Mapping[str, Tensor]) -> None:
        """Find the blocks by one call of the model; the module is changed until `close`.

        Raises:
            QuantizationError: the model cannot be called with the first sample.
        """
        self.module, self.samples, self.parameters = module, samples, parameters
        self._now = threading.local()
        self._given: dict[str, dict[int, list[Any]]] = {}
        self._names = dict(candidates(module, frozenset(parameters)))
        self.blocks = self._found()
        self._order = {block.name: number for number, block in enumerate(self.blocks)}
        for block in self.blocks:
            block.module.forward = self._replaying(block, block.module.forward)

    def close(self) -> None:
        """Give the model its own forwards back."""
        for block in self.blocks:
            vars(block.module).pop("forward", None)

    def watch(self, number: int, layers: Sequence[str], sample: int) -> Watch:
        """Run block `number` on one sample until all products with these layers were seen, and return them."""
        block = self.blocks[number]
        watch = Watch({n: self.parameters[n] for n in layers}, stop=sum(block.uses[n] for n in layers))
        self._run(number, sample, watch)
        return watch

    def finish(self, number: int, sample: int) -> None:
        """Run block `number` on one sample as it is now, and keep what it gives."""
        self._given.setdefault(self.blocks[number].name, {})[sample] = self._run(number, sample, None)

    def _run(self, number: int, sample: int, watch: Watch | None) -> list[Any]:
        """The outputs of one block in one call of the model."""
        now = self._now
        now.target, now.sample, now.watch, now.calls, now.outputs = number, sample, watch, {}, []
        try:
            self._call(self.samples[sample])
        except EnoughSeen:
            pass
        finally:
            now.target = None
        return list(now.outputs)

    def _call(self, sample: Sample) -> None:
        with torch.no_grad():
            self.module(*sample.arguments, **sample.keywords)

    def _replaying(self, block: Block, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A forward that gives what the block gave before, or runs it and ends the call."""
        own = self._order[block.name]

        def replay(*arguments: Any, **keywords: Any) -> Any:
            now = self._now
            target = getattr(now, "target", None)
            if target is None or own > target:
                return forward(*arguments, **keywords)
            call = now.calls[own] = now.calls.get(own, -1) + 1
            if own < target:
                return _copied(self._given[block.name][now.sample][call])
            if now.watch is None:
                now.outputs.append(forward(*arguments, **keywords))
            else:
                with now.watch:
                    now.outputs.append(forward(*arguments, **keywords))
            if call + 1 >= block.calls:
                raise EnoughSeen
            return _copied(now.outputs[-1])

        return replay

    def _found(self) -> tuple[Block, ...]:
        """The blocks in the order in which the first sample meets them, each with its inputs."""
        calls: list[tuple[str, int]] = []  # a block, and the products before it
        ends: dict[str, list[tuple[int, int]]] = {}
        watch = Watch(self.parameters)
        hooks = []

        def before(name: str) -> Callable[..., None]:
            return lambda *_: calls.append((name, len(watch.log)))

        def after(name: str) -> Callable[..., None]:
            return lambda *_: ends.setdefault(name, []).append((_last_start(calls, name), len(watch.log)))

        for name, part in self._names.items():
            hooks += [part.register_forward_pre_hook(before(name)), part.register_forward_hook(after(name))]
        try:
            with watch:
                self._call(self.samples[0])
        except (RuntimeError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            raise QuantizationError(
                f"the model cannot be called with the first calibration sample: {error}; give samples that fit it"
            ) from error
        finally:
            for hook in hooks:
                hook.remove()
        order = dict.fromkeys(name for name, _ in calls)
        return tuple(self._block(name, ends.get(name, []), watch) for name in order)

    def _block(self, name: str, spans: Sequence[tuple[int, int]], watch: Watch) -> Block:
        """What one block multiplies: its log entries, grouped by input in the order of their first use."""
        entries = [entry for start, stop in spans for entry in watch.log[start:stop]]
        return Block(
            name=name,
            module=self._names[name],
            inputs=_sharing(entries),
            calls=len(spans),
            uses=Counter(layer for layer, _ in entries),
        )


def _sharing(entries: Sequence[tuple[str, int]]) -> tuple[tuple[str, ...], ...]:
    """Layers with a product in common belong together, in the order of their first use."""
    groups: list[tuple[dict[str, None], set[int]]] = []
    for layer, product in entries:
        same = [group for group in groups if layer in group[0] or product in group[1]] or [({}, set())]
        first, *others = same
        for layers, products in others:
            first[0].update(layers)
            first[1].update(products)
        first[0][layer] = None
        first[1].add(product)
        groups = [group for group in groups if group not in others]
        if first not in groups:
            groups.append(first)
    return tuple(tuple(layers) for layers, _ in groups)


def _last_start(calls: Sequence[tuple[str, int]], name: str) -> int:
    return next(start for called, start in reversed(calls) if called == name)


def _copied(outputs: Any) -> Any:
    """The same structure with tensors of its own: models may write into what a block gave."""
    return pytree.tree_map(lambda value: value.clone() if isinstance(value, torch.Tensor) else value, outputs)


@contextmanager
def walking(module: nn.Module, samples: Sequence[Sample], parameters: Mapping[str, Tensor]) -> Iterator[Walk]:
    """A walk that gives the model its own forwards back in the end."""
    walk = Walk(module, samples, parameters)
    try:
        yield walk
    finally:
        walk.close()

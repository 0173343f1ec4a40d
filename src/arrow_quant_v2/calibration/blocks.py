"""A model cut into blocks that run one after the other, and each block run alone on what the blocks before it gave.

The outputs of finished blocks are kept; when the model is called again, a finished block hands out what it gave before
instead of running, and the call ends after the block in question. So any module can be walked through, whatever
happens between its blocks, at the price of one block for each step; a block that comes again after a later one has
run is then run anew. Knows nothing of what is done with a block.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from arrow_quant_v2.calibration.collect import EnoughSeen, Uses, Watch
from arrow_quant_v2.calibration.kept import Kept
from arrow_quant_v2.errors import ArrowQuantError, QuantizationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from arrow_quant_v2.calibration.sample import Sample


@dataclass(frozen=True, kw_only=True, eq=False)
class Block:
    """A part of a model: `inputs` are the groups of weights that share an input, in the order in which they are used.

    `calls` is how often one call of the model runs it, `uses` how often it multiplies with each of its weights,
    `seconds` how long that took, `last` the last block that had begun when it was called last, and `users` are the
    blocks that look at its outputs; None: something between blocks does.
    """

    name: str
    module: nn.Module
    inputs: tuple[tuple[str, ...], ...]
    calls: int
    uses: Mapping[str, int]
    seconds: float
    last: int
    users: frozenset[str] | None


def candidates(module: nn.Module, watched: frozenset[str], name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The smallest parts that are worth a step of their own: entries of lists of blocks, and what lies beside them."""
    if not _watched_in(module, watched, name):
        return
    lists = any(_is_list_of_blocks(part, watched, _joined(name, at)) for at, part in module.named_modules())
    if _can_run(module) and not lists:
        yield name, module
        return
    for at, child in module.named_children():
        yield from candidates(child, watched, _joined(name, at))


def _can_run(module: nn.Module) -> bool:
    """Whether it has a forward: a list of modules is never called itself."""
    return getattr(module.forward, "__func__", None) is not nn.Module.forward


def matrices(module: nn.Module) -> frozenset[str]:
    """The parameters by which a module is cut into parts: all but biases, norms and the like."""
    return frozenset(name for name, p in module.named_parameters(remove_duplicate=False) if p.ndim > 1)


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

    Calls of different samples may run in different threads at the same time. Samples are meant by their numbers;
    `beside` gives each a second one, under which the outputs of its blocks are kept apart.
    """

    def __init__(
        self,
        module: nn.Module,
        samples: Sequence[Sample],
        parameters: Mapping[str, Tensor],
        folder: Path | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Find the blocks by one call of the model, timed by `clock`; the module is changed until `close`.

        Outputs that are too much for memory go into files in `folder`; None: where the system keeps such things.

        Raises:
            QuantizationError: there are no samples, or the model cannot be called with the first one.
        """
        if not samples:
            raise QuantizationError("a model is calibrated on what goes into its layers; give one sample or more")
        self.module, self.samples, self.parameters, self._clock = module, samples, parameters, clock
        self.parted: Mapping[str, int] = {}  # by name of a weight, how many parts of its rows were multiplied alone
        self.turned = frozenset[str]()
        self._now = threading.local()
        self._kept = Kept(folder)
        self._names = _once(candidates(module, matrices(module)))
        self.blocks = self._found()
        self._order = {block.name: number for number, block in enumerate(self.blocks)}
        self._forwards = [vars(block.module).get("forward") for block in self.blocks]
        for number, block in enumerate(self.blocks):
            block.module.forward = self._replaying(number, block.module.forward)

    def close(self) -> None:
        """Give the model its own forwards back, and forget what its blocks gave."""
        for block, forward in zip(self.blocks, self._forwards, strict=True):
            vars(block.module).pop("forward", None)
            if forward is not None:
                block.module.forward = forward
        self._kept.close()

    def beside(self, sample: int) -> int:
        """Another number for the same sample: for what blocks give with other weights."""
        return sample + len(self.samples)

    def watch(self, number: int, layers: Sequence[str], sample: int) -> Watch:
        """Run block `number` on one sample until all products with these layers were seen, and return them.

        How often rows of a weight are multiplied, as those of an expert are, may differ between samples.
        """
        block = self.blocks[number]
        stop = None if not self.parted.keys().isdisjoint(layers) else sum(block.uses[n] for n in layers)
        watch = Watch({n: self.parameters[n] for n in layers}, stop)
        self._run(number, sample, watch, keep=False)
        return watch

    def watch_all(self, number: int, sample: int) -> Watch:
        """Run block `number` on one sample as it is, keep what it gives, and return the products with its layers."""
        watch = Watch({name: self.parameters[name] for name in self.blocks[number].uses})
        self._run(number, sample, watch, keep=True)
        return watch

    def finish(self, number: int, sample: int) -> None:
        """Run block `number` on one sample as it is now, and keep what it gives."""
        self._run(number, sample, None, keep=True)

    def forget(self, number: int) -> None:
        """Block `number` is finished for all samples: let go of outputs that no later run looks at.

        Their shapes stay, for the module hands them on.
        """
        for own, block in enumerate(self.blocks[: number + 1]):
            users = None if block.users is None else [self.blocks[self._order[user]] for user in block.users]
            if users is not None and all(user.last <= number for user in users):  # else one may be run anew
                self._kept.empty(own)

    def _run(self, number: int, sample: int, watch: Watch | None, *, keep: bool) -> None:
        """Call the model until block `number` has done what it is run for."""
        now = self._now
        now.target, now.sample, now.watch, now.keep, now.calls = number, sample, watch, keep, Counter[int]()
        try:
            self._call(sample)
        except EnoughSeen:
            pass
        finally:
            now.target = None

    def _call(self, number: int) -> None:
        """Call the model with one sample.

        Raises:
            QuantizationError: that is not possible.
        """
        number %= len(self.samples)
        sample = self.samples[number]
        try:
            with torch.no_grad():
                self.module(*sample.arguments, **sample.keywords)
        except (ArrowQuantError, torch.cuda.OutOfMemoryError):
            raise
        except Exception as error:
            raise QuantizationError(
                f"the model cannot be called with calibration sample {number}: {type(error).__name__}: {error};"
                " give samples that fit it"
            ) from error

    def _replaying(self, own: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A forward that gives what the block gave before, until the block in question has begun to run."""

        def replay(*arguments: Any, **keywords: Any) -> Any:
            now = self._now
            target = getattr(now, "target", None)
            if target is None or own > target:
                return forward(*arguments, **keywords)
            call = now.calls[own]
            now.calls[own] += 1
            if own < target and not now.calls[target]:
                return self._gave(own, call)
            with now.watch if own == target and now.watch else nullcontext():
                outputs = forward(*arguments, **keywords)
            if now.keep:
                self._kept.put((own, now.sample, call), outputs)
            if self._enough():
                raise EnoughSeen
            return outputs

        return replay

    def _gave(self, number: int, call: int) -> Any:
        """What a finished block gave in this call of it."""
        sample = self._now.sample
        try:
            return self._kept.take((number, sample, call))
        except KeyError as error:
            block = self.blocks[number]
            raise QuantizationError(
                f"{block.name}: is called more than {call} times with calibration sample {sample % len(self.samples)},"
                f" but {block.calls} times with the first one; give samples that the model treats alike"
            ) from error

    def _enough(self) -> bool:
        """Whether the call may end: blocks that come again after the one that is finished have run with its outputs."""
        now = self._now
        needed = range(0 if now.keep else now.target, now.target + 1)
        return all(now.calls[number] >= self.blocks[number].calls for number in needed)

    def _found(self) -> tuple[Block, ...]:
        """The blocks in the order in which the first sample meets them, each with its inputs."""
        seen = _FirstCall(self.parameters, self._clock)
        hooks = [hook for name, part in self._names.items() for hook in seen.hooks(name, part)]
        try:
            with seen.uses, seen.watch:
                self._call(0)
        finally:
            for hook in hooks:
                hook.remove()
        self.parted = {name: len(parts) for name, parts in seen.watch.parted.items()}
        self.turned = frozenset(seen.watch.turned)
        blocks: list[Block] = []
        for name, spans in seen.spans.items():
            taken = {layer for block in blocks for layer in block.uses}
            entries = [entry for start, stop in spans for entry in seen.watch.log[start:stop]]
            own = [(layer, product) for layer, product in entries if layer not in taken]
            blocks.append(self._block(name, seen, own))
        return tuple(blocks)

    def _block(self, name: str, seen: _FirstCall, entries: Sequence[tuple[str, int]]) -> Block:
        """What one block multiplies, grouped by input in the order of their first use; not what an earlier one does."""
        return Block(
            name=name,
            module=self._names[name],
            inputs=_sharing(entries),
            calls=len(seen.spans[name]),
            uses=Counter(layer for layer, _ in entries),
            seconds=seen.seconds.get(name, 0.0),
            last=seen.last[name],
            users=seen.uses.users(name),
        )


class _FirstCall:
    """What is seen of the blocks in the call that finds them, in the order in which they begin."""

    def __init__(self, parameters: Mapping[str, Tensor], clock: Callable[[], float]) -> None:
        self.watch, self.uses, self._clock = Watch(parameters, keep=False), Uses(), clock
        self.spans: dict[str, list[tuple[int, int]]] = {}  # of the log, for each of a block's calls
        self.seconds: dict[str, float] = {}
        self.last: dict[str, int] = {}  # the last block that had begun at the last call
        self._begun: dict[str, tuple[int, float]] = {}

    def hooks(self, name: str, part: nn.Module) -> list[Any]:
        """See one block begin and end."""

        def before(*_: Any) -> None:
            self.spans.setdefault(name, [])
            self.last[name] = len(self.spans) - 1
            self.uses.enter(name)
            self._begun[name] = len(self.watch.log), self._clock()

        def after(_module: nn.Module, _arguments: Any, outputs: Any) -> None:
            begun, since = self._begun[name]
            self.spans[name].append((begun, len(self.watch.log)))
            self.seconds[name] = self.seconds.get(name, 0.0) + self._clock() - since
            self.uses.leave(name, outputs)

        return [part.register_forward_pre_hook(before), part.register_forward_hook(after)]


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


def _once(named: Iterable[tuple[str, nn.Module]]) -> dict[str, nn.Module]:
    """A module that has several names keeps the first one."""
    first: dict[nn.Module, str] = {}
    for name, module in named:
        first.setdefault(module, name)
    return {name: module for module, name in first.items()}


@contextmanager
def walking(
    module: nn.Module,
    samples: Sequence[Sample],
    parameters: Mapping[str, Tensor],
    folder: Path | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[Walk]:
    """A walk that gives the model its own forwards back in the end."""
    walk = Walk(module, samples, parameters, folder, clock)
    try:
        yield walk
    finally:
        walk.close()

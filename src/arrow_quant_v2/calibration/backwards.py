"""A model run backwards while it is watched: what its outputs are asked, so that gradients tell what they lose.

For an output y of the model and a random direction r, E (r . dy)^2 = |dy|^2. y is divided by its norm. Where y are
logits of tokens, the direction is that of the logarithm of a probability, for a word that is drawn by those
probabilities: then it is twice the divergence (KL, in nats) of what the model says of a hidden token.
Knows nothing of what is made of gradients.
"""

from __future__ import annotations

import math
import threading
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from arrow_quant_v2.calibration.blocks import candidates, matrices
from arrow_quant_v2.calibration.collect import Watch
from arrow_quant_v2.engines.one_core import each_on_one_core

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import nn

    from arrow_quant_v2.calibration.runnable import Runnable
    from arrow_quant_v2.calibration.sample import Sample

AT_ONCE = 4  # samples whose gradients are in memory together; part of the result, so it never follows the machine
Watching = TypeVar("Watching", bound=Watch)


def backwards(
    runnable: Runnable,
    samples: Sequence[Sample],
    watching: Callable[[], Watching],
    *,
    seed: int,
    block_by_block: bool,
    at_once: int = AT_ONCE,
    tell: Callable[[int], object] = int,
) -> Iterator[Watching]:
    """For each sample in order what watched the model's call with it and the way back; `tell` hears how many are done.

    With `block_by_block` only what goes into each part of the model is remembered, and it runs again for its gradient.

    Raises:
        RuntimeError: the model, or one of its operators, has no gradient, or it cannot be called.
        NotImplementedError: one of its functions has no gradient.
    """
    now = _Now()
    with _remembering(runnable, now) if block_by_block else nullcontext():
        for start in range(0, len(samples), at_once):
            numbers = range(start, min(start + at_once, len(samples)))
            yield from each_on_one_core(lambda n: _of_one(runnable, watching(), samples[n], seed + n, now), numbers)
            tell(numbers.stop)


class _Now(threading.local):
    """What watches the call that this thread makes."""

    watch: Watch | None = None


def _of_one(runnable: Runnable, watch: Watching, sample: Sample, seed: int, now: _Now) -> Watching:
    now.watch = watch
    with torch.enable_grad(), watch:
        output = first_tensor(runnable.module(*sample.arguments, **sample.keywords))
        if output.requires_grad:
            told = _told(output, runnable, sample, torch.Generator().manual_seed(seed))
            torch.autograd.backward(told)
    return watch


def first_tensor(outputs: object) -> Tensor:
    """What a model's answer is, however it wraps it: the first tensor of floats in it.

    Raises:
        RuntimeError: there is none, so nothing can be told by gradients.
    """
    for leaf in tree_leaves(outputs):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            return leaf
    raise RuntimeError("it gives no tensor of floating-point numbers")


def _told(output: Tensor, runnable: Runnable, sample: Sample, draw: torch.Generator) -> Tensor:
    """The scalar whose gradient is taken, divided so that each call of the model has the same say."""
    given = (*sample.arguments, *sample.keywords.values())
    ids = next((value for value in given if _are_tokens(value, output)), None)
    if runnable.mask_token is None or not isinstance(ids, Tensor):
        direction = torch.randn(output.shape, generator=draw)
        size = float(output.detach().norm()) or 1.0
        return (direction * output).sum() / size
    hidden = ids == runnable.mask_token
    logits = output[hidden] if hidden.any() else output.flatten(0, -2)
    words = torch.multinomial(logits.detach().softmax(-1), 1, generator=draw)
    told: Tensor = logits.log_softmax(-1).gather(-1, words).sum() / math.sqrt(len(logits))
    return told


def _are_tokens(value: object, output: Tensor) -> bool:
    """Whether these are ids of the tokens of which the output tells the probabilities."""
    return isinstance(value, Tensor) and not value.is_floating_point() and value.shape == output.shape[:-1]


def in_the_graph(result: Tensor, add: Callable[[Tensor], None]) -> Tensor:
    """The result, whose gradient `add` is given; a copy where nothing before it has a gradient."""
    if not result.requires_grad:
        result = result.detach().requires_grad_().clone()
    result.register_hook(add)
    return result


@contextmanager
def _remembering(runnable: Runnable, now: _Now) -> Iterator[None]:
    with ExitStack() as undo:
        for part in dict(candidates(runnable.module, matrices(runnable.module))).values():
            undo.callback(setattr, part, "forward", part.forward)
            part.forward = _remembered(part, now)
        yield


def _remembered(part: nn.Module, now: _Now) -> Callable[..., Any]:
    forward = part.forward

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[object]]:
        """The first run is watched anyway; the second one happens inside torch, where nothing is unless it is said."""
        return nullcontext(), now.watch or nullcontext()

    def again(*arguments: Any, **keywords: Any) -> Any:
        return checkpoint(
            forward, *arguments, use_reentrant=False, preserve_rng_state=False, context_fn=contexts, **keywords
        )

    return again

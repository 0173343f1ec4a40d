"""A module whose weights lie on disk, and in memory only while the part that they belong to runs.

Each part (see blocks.candidates) is filled when it is called and emptied when it returns, so that a model of any size
can be called with the memory of its largest part; a part that is held is read once, for any number of calls. Parameters
that are not in memory are on torch's meta device. Knows nothing of file formats, nor of what the calls are for.
"""

from __future__ import annotations

import functools
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from arrow_quant_v2.calibration.blocks import candidates, matrices

if TYPE_CHECKING:
    from collections.abc import Callable


class OnDemand:
    """Fills the parts of a module as they are called; calls may run in several threads at the same time.

    A tensor that several parts share is in memory once, as long as one of them needs it. What lies outside of all
    parts is read at once and stays.
    """

    def __init__(self, module: nn.Module, files: Mapping[str, str], read: Callable[[str], Tensor]) -> None:
        """Wrap the parts of a module on the meta device.

        `files` names the tensor of each parameter, and `read` gives that tensor's values in the parameter's shape;
        parameters without a tensor must have their values already.

        Raises:
            SourceError: a tensor outside of all parts cannot be read.
        """
        self.module = module
        self._files, self._read, self._device = dict(files), read, torch.device("cpu")
        self._empty = dict(module.named_parameters(remove_duplicate=False))
        self._loaded: dict[str, nn.Parameter] = {}  # by the tensor's name
        self._users: Counter[str] = Counter()  # parts that a tensor is in memory for
        self._calls: Counter[nn.Module] = Counter()  # reasons for a part to be in memory
        self._lock = threading.RLock()
        self.reading = 0.0  # seconds that reading took so far
        self._parts = {part: self._places(part, name) for name, part in candidates(module, matrices(module))}
        inside = {place for places in self._parts.values() for place in places}
        self._fill([place for place in self._files if place not in inside])
        for part in self._parts:
            part.forward = self._filling(part, part.forward)

    def move_to(self, device: torch.device) -> None:
        """From now on tensors are in that device's memory; those that stay in memory are brought there."""
        self._device = device
        self._loaded = {
            name: nn.Parameter(value.to(device), requires_grad=False) for name, value in self._loaded.items()
        }
        for place, tensor in self._files.items():
            if tensor in self._loaded:
                self._put(place, self._loaded[tensor])

    def parameters(self, names: Iterable[str]) -> Mapping[str, Tensor]:
        """Parameters by name, on the meta device while neither they nor those tied to them are in memory."""
        return _Parameters(self, tuple(names))

    @contextmanager
    def holding(self, part: nn.Module) -> Iterator[None]:
        """Everything in this part of the module is in memory, and what is done to it stays as long.

        Raises:
            SourceError: its tensors cannot be read.
        """
        inside = [one for one in part.modules() if one in self._parts]
        taken = []
        try:
            for one in inside:
                self._take(one)
                taken.append(one)
            yield
        finally:
            for one in taken:
                self._give(one)

    def current(self, place: str) -> Tensor:
        """One parameter as it is now."""
        loaded = self._loaded.get(self._files.get(place, ""))
        return self._empty[place] if loaded is None else loaded

    def _places(self, part: nn.Module, name: str) -> tuple[str, ...]:
        """The parameters of a part that have a tensor, by their names in the whole module."""
        names = (f"{name}.{at}" if name else at for at, _ in part.named_parameters(remove_duplicate=False))
        return tuple(place for place in names if place in self._files)

    def _filling(self, part: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A forward that has its weights."""

        @functools.wraps(forward)
        def filled(*arguments: Any, **keywords: Any) -> Any:
            self._take(part)
            try:
                return forward(*arguments, **keywords)
            finally:
                self._give(part)

        return filled

    def _take(self, part: nn.Module) -> None:
        with self._lock:
            if not self._calls[part]:
                self._fill(self._parts[part])
            self._calls[part] += 1

    def _give(self, part: nn.Module) -> None:
        with self._lock:
            self._calls[part] -= 1
            if not self._calls[part]:
                self._empty_again(self._parts[part])

    def _fill(self, places: Iterable[str]) -> None:
        """Put the values in, or, where one cannot be read, leave everything as it was."""
        done: list[str] = []
        try:
            for place in places:
                tensor = self._files[place]
                if tensor not in self._loaded:
                    self._loaded[tensor] = self._timed(tensor)
                self._users[tensor] += 1
                self._put(place, self._loaded[tensor])
                done.append(place)
        except BaseException:
            self._empty_again(done)
            raise

    def _timed(self, tensor: str) -> nn.Parameter:
        started = time.perf_counter()
        values = nn.Parameter(self._read(tensor).to(self._device), requires_grad=False)
        self.reading += time.perf_counter() - started
        return values

    def _empty_again(self, places: Iterable[str]) -> None:
        for place in places:
            tensor = self._files[place]
            self._put(place, self._empty[place])
            self._users[tensor] -= 1
            if not self._users[tensor]:
                del self._loaded[tensor]

    def _put(self, place: str, value: Tensor) -> None:
        parent, _, leaf = place.rpartition(".")
        setattr(self.module.get_submodule(parent), leaf, value)


class _Parameters(Mapping[str, Tensor]):
    """A live view of some parameters."""

    def __init__(self, weights: OnDemand, names: tuple[str, ...]) -> None:
        self._weights, self._names = weights, dict.fromkeys(names)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._weights.current(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

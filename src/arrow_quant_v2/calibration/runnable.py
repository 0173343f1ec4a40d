"""A model that can be called, and what is known of how to call it; does not know how it was opened."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from contextlib import AbstractContextManager

    from torch import Tensor, nn

    from arrow_quant_v2.calibration.on_demand import OnDemand
    from arrow_quant_v2.config import Modality


@dataclass(frozen=True, kw_only=True, eq=False)
class Runnable:
    """A module in eval mode, called from the CPU wherever it runs, and its companions; None where there is none.

    Its parameters are float32.

    names        name of a weight in the model's files -> name of the module's parameter that holds it
    tokenizer    of transformers: text -> token ids
    mask_token   the id that stands for a hidden token; None: no masked text model
    scheduler    of diffusers: the noise schedule that the model was trained for
    classes      the numbers of the classes that its pipeline names; (): all that it has room for
    on_demand    reads weights when they are needed; None: all of them are in memory
    """

    module: nn.Module
    modality: Modality
    names: dict[str, str]
    tokenizer: Any = None
    mask_token: int | None = None
    scheduler: Any = None
    classes: tuple[int, ...] = ()
    on_demand: OnDemand | None = None

    def parameters(self, names: Iterable[str]) -> Mapping[str, Tensor]:
        """The parameters of these names, as they are whenever they are asked for."""
        if self.on_demand is not None:
            return self.on_demand.parameters(names)
        every = dict(self.module.named_parameters(remove_duplicate=False))
        return {name: every[name] for name in names}

    @property
    def reading(self) -> float:
        """Seconds that went into reading weights for calls so far."""
        return 0.0 if self.on_demand is None else self.on_demand.reading

    def clock(self) -> float:
        """Seconds, of which those that went into reading weights are left out."""
        return time.perf_counter() - self.reading

    def holding(self, part: nn.Module) -> AbstractContextManager[None]:
        """The weights of one part stay in memory, and so does what is done to them."""
        return nullcontext() if self.on_demand is None else self.on_demand.holding(part)

"""A model that can be called, and what is known of how to call it; does not know how it was opened."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from arrow_quant_v2.config import Modality


@dataclass(frozen=True, kw_only=True, eq=False)
class Runnable:
    """A module in eval mode on the CPU, its parameters in float32, and its companions; None where there is none.

    names        name of a weight in the model's files -> name of the module's parameter that holds it
    tokenizer    of transformers: text -> token ids
    mask_token   the id that stands for a hidden token; None: no masked text model
    scheduler    of diffusers: the noise schedule that the model was trained for
    """

    module: nn.Module
    modality: Modality
    names: dict[str, str]
    tokenizer: Any = None
    mask_token: int | None = None
    scheduler: Any = None

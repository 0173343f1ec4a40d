"""Which tensors a class of diffusers or transformers computes with in float32, whatever else is asked; reads no files.

Both libraries say it in attributes of the class and obey them in `from_pretrained`: a class of diffusers by parts of a
name, for every dtype; one of transformers by patterns, `_keep_in_fp32_modules` for float16 alone and
`_keep_in_fp32_modules_strict` for bfloat16 too.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

LOOSE, STRICT = "_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"


def stays_float32(module: nn.Module, name: str, dtype: torch.dtype) -> bool:
    """Whether the tensor of this name in `state_dict()` is float32 in a model of `dtype`."""
    loose, strict = _listed(module, LOOSE), _listed(module, STRICT)
    if not hasattr(module, STRICT):  # of diffusers, or neither
        return not set(loose).isdisjoint(name.split("."))
    patterns = {torch.float16: [*loose, *strict], torch.bfloat16: strict}.get(dtype, [])
    return any(re.search(pattern.replace("*", ".*"), name) for pattern in patterns)


def _listed(module: nn.Module, attribute: str) -> list[str]:
    found: Iterable[str] | str | None = getattr(module, attribute, None)
    return [found] if isinstance(found, str) else list(found or ())

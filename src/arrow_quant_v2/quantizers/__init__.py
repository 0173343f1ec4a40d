"""The methods that choose codes and parameters for one matrix, by name; knows nothing of files or models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from arrow_quant_v2.errors import ConfigurationError
from arrow_quant_v2.quantizers import affine, r2q

if TYPE_CHECKING:
    from collections.abc import Callable

    from arrow_quant_v2.quantizers.result import QuantizedRows

QUANTIZERS: dict[str, Callable[..., QuantizedRows]] = {
    "rtn": affine.round_to_nearest,
    "clip": affine.clip_search,
    "r2q": r2q.residual_refinement,
}


def quantizer(method: str) -> Callable[..., QuantizedRows]:
    """The function of a method: (weight, spec, importance=None) -> QuantizedRows.

    Raises:
        ConfigurationError: no method has that name.
    """
    if method not in QUANTIZERS:
        raise ConfigurationError(f"method is {method!r}; allowed: {', '.join(QUANTIZERS)}")
    return QUANTIZERS[method]

"""What was done with one tensor and why, as data; knows nothing of tensors, files or methods."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable

Kind = Literal["quantized", "kept", "fallback"]
STAYS_BELOW = "stays below its bar: "
WRITTEN = re.compile(r"(?:(kept|fallback) as (\S+) instead of (\S+)|(\S+)): (.*)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Decision:
    """One tensor's fate: what was asked, what it got, and the reason in words.

    `asked` and `got` are widths or dtypes by name ("int2", "float32"); `method` is the quantizer
    that made the result, None where the tensor was kept.
    """

    layer_name: str
    kind: Kind
    asked: str
    got: str
    because: str
    method: str | None = None

    @property
    def missed(self) -> str:
        """By how much the layer is below its bar, in words; empty where it is not."""
        return self.because.partition(STAYS_BELOW)[2]

    def __str__(self) -> str:
        """As it stands in the file's `decision` column."""
        if self.kind == "quantized":
            return f"{self.got}: {self.because}"
        return f"{self.kind} as {self.got} instead of {self.asked}: {self.because}"


def decision_of(layer_name: str, text: str, method: str | None) -> Decision:
    """The decision again from what stands in the file; `str` of it is that text."""
    found = WRITTEN.fullmatch(text)
    if found is None:
        return Decision(layer_name=layer_name, kind="quantized", asked="", got="", because=text, method=method)
    stated, got, asked, width, because = found.groups()
    kind: Kind = "kept" if stated == "kept" else "fallback" if stated else "quantized"
    return Decision(
        layer_name=layer_name,
        kind=kind,
        asked=asked or width,
        got=got or width,
        because=because,
        method=method,
    )


def fallback_rates(decisions: Iterable[Decision]) -> dict[str, float]:
    """Of the layers that ended with each method, the part that fell back, 0 to 1; kept ones are none of them."""
    done = [one for one in decisions if one.method is not None]
    fallen, every = fallbacks_per_method(done), Counter(one.method for one in done)
    return {method: fallen.get(method, 0) / count for method, count in sorted(every.items()) if method is not None}


def fallbacks_per_method(decisions: Iterable[Decision]) -> dict[str, int]:
    """How many layers fell back, by the method that they ended with."""
    return dict(Counter(d.method or "none" for d in decisions if d.kind == "fallback"))

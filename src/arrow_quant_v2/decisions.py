"""What was done with one tensor and why, as data; knows nothing of tensors, files or methods."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable

Kind = Literal["quantized", "kept", "fallback"]


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

    def __str__(self) -> str:
        """As it stands in the file's `decision` column."""
        if self.kind == "quantized":
            return f"{self.got}: {self.because}"
        return f"{self.kind} as {self.got} instead of {self.asked}: {self.because}"


def fallbacks_per_method(decisions: Iterable[Decision]) -> dict[str, int]:
    """How many layers fell back, by the method that they ended with."""
    return dict(Counter(d.method or "none" for d in decisions if d.kind == "fallback"))

"""Which width and form a layer is given, and why; knows nothing of tensors, configurations or losses."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, TypeAlias, get_args

if TYPE_CHECKING:
    from collections.abc import Iterable

Width: TypeAlias = Literal[2, 4, 8, 16]
KEPT: Final = 16  # whatever its own dtype is, 16 bits or others
LAYER_WIDTHS: tuple[Width, ...] = get_args(Width)
SENSITIVE: Width = 8  # of a sensitive layer that is not kept
REGEX = "re:"
Named: TypeAlias = tuple[tuple[str, Width], ...]


class Form(NamedTuple):
    """How a layer may be stored: the bits of a code, 16 for its own dtype; the columns of a group, None: as asked.

    affine: on the affine grid, which has one scale for each group, where otherwise it had the residual one of two.
    """

    bits: Width
    group_size: int | None = None
    affine: bool = False


@dataclass(frozen=True, kw_only=True)
class LayerWidth:
    """The width of one layer, 16 where it is kept in its own dtype, and the reason in words.

    fallback    it is more than what was asked for, because that was not enough
    equalize    there is room for scales of its input channels
    group_size  columns of a group; None: as asked
    affine      on the affine grid, whatever is asked of others
    """

    bits: Width
    because: str
    fallback: bool = False
    equalize: bool = True
    group_size: int | None = None
    affine: bool = False

    @classmethod
    def of(cls, form: Form, because: str = "", *, equalize: bool = True) -> LayerWidth:
        """That of a layer in this form."""
        return cls(because=because, equalize=equalize, **form._asdict())

    @property
    def form(self) -> Form:
        """How the layer is to be stored."""
        return Form(bits=self.bits, group_size=self.group_size, affine=self.affine)


def fallen_back(bits: int, because: str) -> LayerWidth:
    """The width that a layer has instead of one that was not enough.

    Raises:
        ValueError: there is no such width.
    """
    known = {int(width): width for width in LAYER_WIDTHS}
    if bits not in known:
        raise ValueError(f"{bits} bits; allowed are {', '.join(map(str, known))}")
    return LayerWidth(bits=known[bits], because=because, fallback=True)


@dataclass(frozen=True, kw_only=True)
class Overrules:
    """What people say of layers by name; it is stronger than what anything else finds out.

    widths     (name, fnmatch pattern or "re:" and a regular expression, width): the first that fits decides, but a
               whole name comes before any pattern
    names      of sensitive layers
    patterns   regular expressions for names of sensitive layers
    skip       sensitive layers are kept in their own dtype; otherwise they have 8 bits
    """

    widths: Named = ()
    names: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()
    skip: bool = False

    def of(self, tensor: str) -> LayerWidth | None:
        """The width that people want for this tensor; None where they say nothing of it."""
        named = sorted(self.widths, key=lambda entry: not is_named(entry[0], tensor))  # stable: whole names first
        for pattern, bits in named:
            if fits(pattern, tensor):
                return LayerWidth(bits=bits, because=f"as layer_bit_widths says of {pattern!r}")
        sensitive = next((one for one in self._sensitive if fits(one, tensor)), None)
        if sensitive is None:
            return None
        return LayerWidth(bits=KEPT if self.skip else SENSITIVE, because=f"{_said(sensitive)} makes it sensitive")

    def unused(self, tensors: Iterable[str]) -> tuple[str, ...]:
        """Whole names, without patterns, that fit none of these tensors: slips, most likely."""
        known = list(tensors)
        asked = (*(pattern for pattern, _ in self.widths), *self.names)
        return tuple(name for name in asked if not any(fits(name, tensor) for tensor in known))

    @property
    def _sensitive(self) -> tuple[str, ...]:
        return (*self.names, *(REGEX + pattern for pattern in self.patterns))


def is_named(name: str, tensor: str) -> bool:
    """Whether `name` is the tensor's own or that of the module that it belongs to: "lm_head" for lm_head.weight."""
    return tensor == name or tensor.startswith(name + ".")


def fits(pattern: str, tensor: str) -> bool:
    """Whether a name, an fnmatch pattern, or a regular expression after "re:" means this tensor."""
    if pattern.startswith(REGEX):
        return re.search(pattern.removeprefix(REGEX), tensor) is not None
    return is_named(pattern, tensor) or fnmatchcase(tensor, pattern)


def _said(pattern: str) -> str:
    if pattern.startswith(REGEX):
        return f"sensitive_layer_patterns {pattern.removeprefix(REGEX)!r}"
    return f"sensitive_layer_names {pattern!r}"

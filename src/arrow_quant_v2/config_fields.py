"""The types of single settings: what each may be, and how what people write becomes it. Knows no setting by name."""

import re
from typing import Annotated, TypeAlias

from pydantic import AfterValidator, BeforeValidator, Field, StringConstraints

from arrow_quant_v2.layer_widths import REGEX, Width

GROUP_STEP, LARGEST_GROUP = 8, 65_536  # whole bytes of codes at every width
UNITS = {
    "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip


def whole(value: object) -> object:
    """Refuse True and 4.0, which Python holds equal to a whole number."""
    if type(value) is not int:
        raise ValueError("not a whole number")
    return value


def row(value: object) -> object:
    """A whole row is one group."""
    return None if value == "row" else value


def amount(value: object) -> object:
    """A number of bytes from "4GB", "1.5 GiB" or a plain int."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*([kmgt]?i?b)", value.strip(), re.ASCII | re.IGNORECASE)
    if not match or match[2].lower() not in UNITS:
        raise ValueError("not an amount of memory")
    return int(float(match[1]) * UNITS[match[2].lower()])


def frozen_list(value: object) -> object:
    """The same as a tuple, which can be hashed."""
    return tuple(value) if isinstance(value, list) else value


def folder(value: str) -> str:
    """Refuse what could lead out of the pipeline's folder."""
    if value in {"", ".", ".."} or re.search(r"[/\\\x00]", value):
        raise ValueError("not the name of one folder")
    return value


def frozen_pairs(value: object) -> object:
    """The entries of a mapping, in their order: tuples are frozen and can be hashed."""
    return tuple(value.items()) if isinstance(value, dict) else value


def pattern(value: str) -> str:
    """Refuse what says that it is a regular expression, and is none."""
    if value.startswith(REGEX):
        regex(value.removeprefix(REGEX))
    return value


def regex(value: str) -> str:
    """Refuse what is no regular expression."""
    try:
        re.compile(value)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError("not a regular expression") from error
    return value


Pattern: TypeAlias = Annotated[str, StringConstraints(min_length=1)]
Regex: TypeAlias = Annotated[str, StringConstraints(min_length=1), AfterValidator(regex)]
NamedWidth: TypeAlias = tuple[Annotated[Pattern, AfterValidator(pattern)], Annotated[Width, BeforeValidator(whole)]]
GroupSize: TypeAlias = Annotated[int, Field(ge=GROUP_STEP, le=LARGEST_GROUP, multiple_of=GROUP_STEP)]

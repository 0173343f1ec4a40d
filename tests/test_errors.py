"""The exception tree drawn in the docstring is the one that exists."""

import inspect
import re

import pytest

from arrow_quant_v2 import errors


def drawn() -> dict[str, str | None]:
    """Exception to its base, as the docstring draws them."""
    path: list[str] = []
    tree: dict[str, str | None] = {}
    for indent, name in re.findall(r"^([├└│─ ]*)(\w+(?:Error))\b", errors.__doc__ or "", re.MULTILINE):
        path[len(indent) // 4 :] = [name]
        tree[name] = path[-2] if len(path) > 1 else None
    return tree


def defined() -> dict[str, type[Exception]]:
    return dict(inspect.getmembers(errors, inspect.isclass))


def test_the_drawn_tree_is_the_real_tree() -> None:
    real = {name: kind.__base__.__name__ for name, kind in defined().items() if kind.__base__}
    assert {name: base or "Exception" for name, base in drawn().items()} == real


@pytest.mark.parametrize("kind", defined().values(), ids=lambda kind: kind.__name__)
def test_one_base_catches_every_error(kind: type[Exception]) -> None:
    assert kind.__doc__
    with pytest.raises(errors.ArrowQuantError, match="what was found"):
        raise kind("what was found")


def test_the_module_holds_nothing_else() -> None:
    assert {name for name in vars(errors) if not name.startswith("__")} == set(drawn())

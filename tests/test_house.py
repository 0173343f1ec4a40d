"""The rules of the house: who may import whom, and what no source file may hold."""

import ast
import re
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import arrow_quant_v2 as front

HOUSE = Path(front.__file__).parent
FILES = sorted(HOUSE.rglob("*.py"))

# From top to bottom: a room imports only rooms above it.
ORDER = (
    "errors", "knapsack", "decisions", "packed", "layer_widths", "config_fields", "config_text", "config",
    "progress", "time_groups", "kernels", "engines", "store", "sources", "calibration", "runtime", "fallback",
    "plan", "quantizers", "one_tensor", "attempts", "sequential", "layers", "weights_alone", "budget", "workfolder",
    "promotions", "publish", "export", "prediction", "allocation", "whole_plans", "preparation", "validation",
    "judging", "tuning", "judging_memory", "report", "forecast", "calibrated_run", "stats_reuse", "doctor", "stats_run",
    "losses", "trials", "sizing", "tuned_run", "rounds", "orchestrator", "results", "api", "cli_progress", "cli_tables",
    "cli_quality", "cli_results", "cli",
)  # fmt: skip
STRANGERS = {"quantizers", "store"}
FREE = {"__init__", "__main__"}
VAGUE = {"utils", "helpers", "common", "manager"}

Rule = Callable[[ast.Module, str], Iterator[str]]


def room_of(module: str) -> str:
    """The room of "kernels/cpu.py" or "config.py"."""
    return Path(module).parts[0].removesuffix(".py")


def imported(tree: ast.Module, module: str) -> Iterator[tuple[int, str]]:
    """(line, room) of every import from this package, also inside functions and for types alone."""
    here = ("arrow_quant_v2", *Path(module).parts[:-1])
    for node in ast.walk(tree):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        source: tuple[str, ...] = ()
        if isinstance(node, ast.ImportFrom):
            source = here[: len(here) - node.level + 1] if node.level else ()
            source += (node.module,) if node.module else ()
        for parts in (".".join((*source, alias.name)).split(".") for alias in node.names):
            if parts[0] == "arrow_quant_v2" and len(parts) > 1:
                yield node.lineno, front._ROOMS.get(parts[1], parts[1])


def imports_only_from_above(tree: ast.Module, module: str) -> Iterator[str]:
    room = room_of(module)
    for line, other in imported(tree, module):
        if room in FREE or other in {room, "__version__"}:
            continue
        above = ORDER[: ORDER.index(room)] if room in ORDER else ()
        if other not in above or {room, other} == STRANGERS:
            yield f"{line}: {room} may not import {other}"


def has_a_place_in_the_order(_: ast.Module, module: str) -> Iterator[str]:
    if room_of(module) not in {*ORDER, *FREE}:
        yield f"{room_of(module)} has no place in the order of the house"


def has_no_assert(tree: ast.Module, _: str) -> Iterator[str]:
    yield from (f"{node.lineno}: assert" for node in ast.walk(tree) if isinstance(node, ast.Assert))


def has_no_blind_except(tree: ast.Module, _: str) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and not any(isinstance(part, ast.Raise) for part in ast.walk(node)):
            caught = {part.id for part in ast.walk(node.type) if isinstance(part, ast.Name)} if node.type else {""}
            if caught & {"", "Exception", "BaseException"}:
                yield f"{node.lineno}: blind except"


def calls(tree: ast.Module, function: str) -> Iterator[ast.Call]:
    yield from (node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == function)


def prints_only_in_the_cli(tree: ast.Module, module: str) -> Iterator[str]:
    if module != "cli.py":
        yield from (f"{call.lineno}: print" for call in calls(tree, "print"))


def unpickles_nothing(tree: ast.Module, _: str) -> Iterator[str]:
    for call in calls(tree, "torch.load"):
        if not any(key.arg == "weights_only" and ast.unparse(key.value) == "True" for key in call.keywords):
            yield f"{call.lineno}: torch.load without weights_only=True"


def is_named_for_what_it_holds(_: ast.Module, module: str) -> Iterator[str]:
    yield from (f"a module named {part}" for part in Path(module).with_suffix("").parts if part in VAGUE)


def says_what_it_holds(tree: ast.Module, _: str) -> Iterator[str]:
    if not ast.get_docstring(tree):
        yield "no docstring"


def lengths(tree: ast.Module) -> Iterator[int]:
    """Lines of every function's body, without its docstring."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            yield (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def too_long(found: list[int]) -> bool:
    within = sum(length <= 40 for length in found)
    return bool(found) and (statistics.median(found) > 10 or within < 0.95 * len(found))


BROKEN: dict[Rule, list[tuple[str, str]]] = {
    imports_only_from_above: [
        ("packed.py", "import arrow_quant_v2.config"),
        ("kernels/cpu.py", "def f():\n    from arrow_quant_v2.store import reader"),
        ("kernels/cpu.py", "if TYPE_CHECKING:\n    from arrow_quant_v2.quantizers.affine import rtn"),
        ("quantizers/affine.py", "from arrow_quant_v2.store.writer import Writer"),
        ("store/writer.py", "from arrow_quant_v2 import quantizers"),
        ("store/writer.py", "from ..plan import Plan"),
        ("config.py", "from . import api"),
        ("config.py", "from arrow_quant_v2 import ArrowQuantV2"),
        ("attic.py", "from arrow_quant_v2.errors import ArrowQuantError"),
    ],
    has_a_place_in_the_order: [("attic.py", ""), ("attic/box.py", "")],
    has_no_assert: [("api.py", "def f(x):\n    assert x")],
    has_no_blind_except: [
        ("api.py", f"try:\n    f()\nexcept{kind}:\n    pass")
        for kind in ("", " Exception", " BaseException as e", " (OSError, Exception)")
    ],
    prints_only_in_the_cli: [("api.py", "print(1)")],
    unpickles_nothing: [("api.py", "torch.load(p)"), ("api.py", "torch.load(p, weights_only=False)")],
    is_named_for_what_it_holds: [(f"kernels/{name}.py", "") for name in sorted(VAGUE)] + [("utils/x.py", "")],
    says_what_it_holds: [("api.py", "x = 1")],
}
SOUND = [
    ("quantizers/affine.py", "'''Doc.'''\nimport numpy\nfrom arrow_quant_v2.kernels import ops\nfrom . import gptq"),
    (
        "store/reader.py",
        "'''Doc.'''\nfrom arrow_quant_v2 import PackedTensor, __version__\nfrom ..errors import StoreError",
    ),
    ("cli.py", "'''Doc.'''\nfrom arrow_quant_v2 import ArrowQuantV2\nprint(torch.load(p, weights_only=True))"),
    ("api.py", "'''Doc.'''\ntry:\n    f()\nexcept Exception:\n    g()\n    raise\nexcept OSError:\n    pass"),
    ("__main__.py", "'''Doc.'''\nfrom arrow_quant_v2.cli import app"),
]


@pytest.mark.parametrize("rule", BROKEN, ids=lambda rule: rule.__name__)
def test_the_house_keeps(rule: Rule) -> None:
    found = {
        module: problems
        for module in (path.relative_to(HOUSE).as_posix() for path in FILES)
        if (problems := list(rule(ast.parse((HOUSE / module).read_text(encoding="utf-8")), module)))
    }
    assert found == {}


def test_functions_are_short() -> None:
    found = [length for path in FILES for length in lengths(ast.parse(path.read_text(encoding="utf-8")))]
    assert not too_long(found), f"median {statistics.median(found)}, longest {sorted(found)[-10:]}"


@pytest.mark.parametrize(("rule", "module", "source"), [(r, m, s) for r, cases in BROKEN.items() for m, s in cases])
def test_a_broken_rule_is_found(rule: Rule, module: str, source: str) -> None:
    assert list(rule(ast.parse(source), module))


@pytest.mark.parametrize(("module", "source"), SOUND)
def test_sound_source_breaks_no_rule(module: str, source: str) -> None:
    assert [problem for rule in BROKEN for problem in rule(ast.parse(source), module)] == []


def test_a_long_function_is_measured_without_its_docstring() -> None:
    source = "def f():\n    '''One.\n\n    Two.\n    '''\n" + "    x = 1\n" * 11
    assert list(lengths(ast.parse(source))) == [11]
    assert too_long([11])
    assert too_long([1] * 18 + [41, 41])
    assert not too_long([10] * 19 + [41])


def test_the_order_names_no_room_twice() -> None:
    assert len(set(ORDER)) == len(ORDER)


def test_no_test_module_is_imported_by_another() -> None:
    """It would be there twice: an operator of torch that is defined again destroys the one that calls still go to."""
    imports = re.compile(r"^\s*(?:(?:from|import) (?:tests\.)?test_\w+|from tests import .*\btest_\w+)", re.MULTILINE)
    found = {path.name: imports.findall(path.read_text()) for path in Path(__file__).parent.rglob("*.py")}
    assert {name: lines for name, lines in found.items() if lines} == {}

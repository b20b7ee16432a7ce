"""Rooms import one way, in the order of the table in CONTRIBUTING.md; functions stay small."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLACES = ("pai_utils", "workflow", "benchmarks")
MOST_PARAMETERS = 12
MOST_LINES = 90


def named(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


PATHS = {named(p): p for place in PLACES for p in sorted((ROOT / place).rglob("*.py"))}
LIBRARY = [module for module in PATHS if module.startswith("pai_utils.")]
of_library = pytest.mark.parametrize("module", LIBRARY)
of_all = pytest.mark.parametrize("module", PATHS)


def rooms() -> list[str]:
    """The rooms in the order of the table."""
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    table = text.split("| room | holds |")[1].split("\n\n")[0]
    return [
        name.removesuffix(".py").rstrip("/") for name in re.findall(r"^\| `(\S+)`", table, re.M)
    ]


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(PATHS[module].read_text("utf-8"))


def imports(module: str) -> Iterator[tuple[str, str]]:
    """What a module imports of the project: a module, and a name if it is one of that module's."""
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if alias.name in PATHS)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                if f"{node.module}.{alias.name}" in PATHS:
                    yield f"{node.module}.{alias.name}", ""
                elif node.module in PATHS:
                    yield node.module, alias.name


def room(module: str) -> str:
    return module.split(".")[1]


def test_the_map_names_every_room_once() -> None:
    order = rooms()
    assert len(order) == len(set(order))
    assert set(order) == {room(module) for module in LIBRARY}


@of_library
def test_a_module_imports_from_rooms_above_its_own(module: str) -> None:
    order = rooms()
    own = order.index(room(module))
    others = {other for other, _ in imports(module) if other in LIBRARY}
    assert {other for other in others if order.index(room(other)) > own} == set()


def test_nothing_imports_in_a_circle() -> None:
    graph = {module: {other for other, _ in imports(module)} - {module} for module in PATHS}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


@of_all
def test_a_module_takes_no_private_name_of_another(module: str) -> None:
    modules = {other.rpartition(".")[2] for other, name in imports(module) if not name}
    taken = [f"{other}.{name}" for other, name in imports(module) if name.startswith("_")]
    taken += [
        ast.unparse(node)
        for node in ast.walk(tree(module))
        if isinstance(node, ast.Attribute)
        and re.match("_[^_]", node.attr)
        and ast.unparse(node.value).rpartition(".")[2] in modules
    ]
    assert taken == []


@of_library
def test_functions_have_few_parameters_and_lines(module: str) -> None:
    large = []
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            every = node.args
            count = len(every.posonlyargs + every.args + every.kwonlyargs)
            count += bool(every.vararg) + bool(every.kwarg)
            lines = 1 + (node.end_lineno or 0) - node.lineno
            lines -= len((ast.get_docstring(node) or "").splitlines())
            if count > MOST_PARAMETERS or lines > MOST_LINES:
                large.append(f"{node.name}: {count} parameters, {lines} lines")
    assert large == []

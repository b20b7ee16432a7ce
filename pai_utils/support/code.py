"""What the library's code says apart from its docstrings and comments, and what it depends on.

Nothing is imported to find out, so that the workflow can ask at once.
"""

from __future__ import annotations

import ast
import importlib.metadata
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

LIBRARY = "pai_utils"
ROOT = Path(__file__).resolve().parents[2]


def file_of(module: str, root: Path = ROOT) -> Path | None:
    """The file of a module below a folder; ``None`` if there is none."""
    path = root.joinpath(*module.split("."))
    files = path / "__init__.py", path.with_name(path.name + ".py")
    return next((file for file in files if file.is_file()), None)


def version_of(package: str) -> str | None:
    """The installed version; ``None`` if there is none, as of a library run from its folder."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def facts_of(path: Path) -> str:
    """The table of facts that lies beside a module and has its name; empty if there is none."""
    table = path.with_suffix(".toml")
    return table.read_text(encoding="utf-8") if table.is_file() else ""


def syntax(source: str) -> ast.Module:
    """The syntax tree of source code, without docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            node.body = [each for each in node.body if not _is_text(each)]
    return tree


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(getattr(node.value, "value", None), str)


def imported(tree: ast.AST, package: str = "") -> dict[str, set[str]]:
    """Names that code binds by imports, anywhere in it, to the absolute names they may stand for.

    Relative imports begin at ``package``.
    """
    found: dict[str, set[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                name = alias.name if alias.asname else alias.name.partition(".")[0]
                found.setdefault(alias.asname or name, set()).add(name)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, [package if node.level else "", node.module]))
            for alias in node.names:
                found.setdefault(alias.asname or alias.name, set()).add(f"{base}.{alias.name}")
    return found


def closure(modules: Iterable[str]) -> dict[str, str]:
    """Code of modules of the library, and of all that they import, in functions too, by name."""
    found: dict[str, str] = {}
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        if module not in found:
            found[module], below = _module(module)
            waiting += below
    return found


def definition(function: Callable[..., Any]) -> str:
    """Code of the function at the top of its module that holds a nested one."""
    path = file_of(function.__module__)
    tree = syntax(path.read_text(encoding="utf-8") if path else "")
    name = function.__qualname__.partition(".")[0]
    return "".join(ast.dump(node) for node in tree.body if getattr(node, "name", None) == name)


@cache
def _module(module: str) -> tuple[str, frozenset[str]]:
    """Code of a module, and the modules of the library that it imports."""
    path = file_of(module)
    assert path is not None, module
    tree = syntax(path.read_text(encoding="utf-8"))
    names = {name for names in imported(tree).values() for name in names}
    # What is imported from a module is another, or defined there.
    below = {name if file_of(name) else name.rpartition(".")[0] for name in names}
    return ast.dump(tree) + facts_of(path), frozenset(
        name for name in below if name.startswith(f"{LIBRARY}.")
    )

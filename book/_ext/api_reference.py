"""Sphinx extension: what autodoc cannot see of the library by itself.

Annotations name types that are imported for type checkers only; they are imported here, so that
every annotation can be resolved. And the parameters of notebooks are fields of pydantic models,
whose signatures hold their validators: they are listed by name, type and default instead.
"""

import ast
import re
from importlib import import_module
from pathlib import Path
from typing import Any, TypeGuard

from pydantic import BaseModel
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.pycode import ModuleAnalyzer

PACKAGE = "pai_utils"
PAGES = "book/api/"


def import_types(app: Sphinx, env: BuildEnvironment, docnames: list[str]) -> None:
    """Import into each module what it imports under ``if TYPE_CHECKING``.

    Imports take seconds, so only where a page of the reference is among those to read.
    """
    if not any(name.startswith(PAGES) for name in docnames):
        return
    folder = Path(str(import_module(PACKAGE).__file__)).parent
    for path in sorted(folder.rglob("[a-z]*.py")):
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                name = ".".join((PACKAGE, *path.relative_to(folder).with_suffix("").parts))
                code = compile(ast.Module(node.body, []), path, "exec")
                exec(code, vars(import_module(name)))


def tidy_signature(
    app: Sphinx, what: str, name: str, thing: Any, options: Any, signature: str | None, result: Any
) -> tuple[str, Any] | None:
    """Leave out the signature of a pydantic model, and defaults that no Python text stands for."""
    if _is_model(thing):
        return "", None
    if signature is None:
        return None
    return re.sub(r"<function [^,)]*>|<factory>", "...", signature), result


def list_fields(
    app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]
) -> None:
    """Append the fields of a pydantic model to its description, with the comments beside them."""
    if not _is_model(thing):
        return
    for owner in reversed(thing.__mro__):  # what all notebooks have comes first
        if not _is_model(owner) or owner is BaseModel:
            continue
        comments = ModuleAnalyzer.for_module(owner.__module__)
        comments.analyze()
        for field, annotation in owner.__annotations__.items():
            if field not in thing.model_fields:
                continue
            kind = re.sub(r"Annotated\[(.+?), \w+\([^()]*\)\]", r"\1", annotation)
            info = thing.model_fields[field]
            default = "" if info.is_required() else f", by default ``{info.get_default()!r}``"
            comment = " ".join(comments.attr_docs.get((owner.__qualname__, field), [])).strip()
            lines.append(f":param {field}: ``{kind}``{default}{comment and '; ' + comment}")


def skip_fields(
    app: Sphinx, what: str, name: str, thing: Any, skip: bool, options: Any
) -> bool | None:
    """Leave out the attributes that `list_fields` has listed."""
    now = app.env.temp_data
    owner = getattr(import_module(now["autodoc:module"]), now.get("autodoc:class") or "", None)
    return True if _is_model(owner) and name in owner.model_fields else None


def keep_sentences(
    app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]
) -> None:
    """Give an attribute an empty type, so that napoleon takes no words before a colon for it."""
    if what in ("attribute", "data", "property") and lines:
        lines[0] = f": {lines[0]}"


def _is_model(thing: Any) -> TypeGuard[type[BaseModel]]:
    return isinstance(thing, type) and issubclass(thing, BaseModel)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the extension with Sphinx."""
    app.connect("env-before-read-docs", import_types)
    app.connect("autodoc-process-signature", tidy_signature)
    app.connect("autodoc-process-docstring", list_fields)
    app.connect("autodoc-process-docstring", keep_sentences, priority=400)  # before napoleon
    app.connect("autodoc-skip-member", skip_fields)
    return {"version": "1.0", "parallel_read_safe": True, "parallel_write_safe": True}

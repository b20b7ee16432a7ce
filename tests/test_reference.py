"""What the book's reference describes, read from its pages."""

import inspect
import re
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import pai_utils
from pai_utils.scorers import SCORERS

ROOT = Path(__file__).parents[1]
PAGES = {path.stem: path.read_text("utf-8") for path in (ROOT / "book" / "api").glob("*.md")}
DIRECTIVE = re.compile(r"^\.\. auto(?:module|function|class):: (\S+)\n((?: +\S.*\n)*)", re.M)


def resolve(name: str) -> Any:
    """The module, or the object of a module, of this name."""
    try:
        return import_module(name)
    except ModuleNotFoundError:
        module, _, attribute = name.rpartition(".")
        return getattr(import_module(module), attribute)


def option(options: str, name: str) -> list[str] | None:
    """The names that an option of a directive lists; `None` if it has no such option."""
    found = re.search(rf":{name}:((?:[^:]|\n)*)", options)
    return found and re.findall(r"\w+", found[1])


def members(module: ModuleType, options: str) -> Iterator[Any]:
    """What a directive describes of a module: the names it lists, or all public ones."""
    names = option(options, "members")
    if names is not None:
        public = [n for n, v in vars(module).items() if inspect.getmodule(v) is module]
        left_out = option(options, "exclude-members") or []
        for name in names or [name for name in public if not name.startswith("_")]:
            if name not in left_out:
                yield getattr(module, name)


@cache
def described() -> list[Any]:
    things = []
    for page in PAGES.values():
        for name, options in DIRECTIVE.findall(page):
            things.append(resolve(name))
            if isinstance(things[-1], ModuleType):
                things += members(things[-1], options)
    return things


def listed(page: str) -> list[Any]:
    """What the tables of a page name."""
    return [resolve(name) for name in re.findall(r"^   ~(\S+)$", PAGES[page], re.M)]


@pytest.mark.parametrize(
    ("page", "things"),
    [
        ("index", {name: getattr(pai_utils, name) for name in pai_utils.__all__}),
        ("scores", {name: scorer.function for name, scorer in SCORERS.items()}),
    ],
)
def test_the_tables_name_what_is_public_and_pages_describe_it(
    page: str, things: dict[str, Any]
) -> None:
    tables = listed(page)
    for name, thing in things.items():
        assert sum(entry is thing for entry in tables) == 1, name
        assert any(entry is thing for entry in described()), name
    assert len(tables) == len(things)


def test_nothing_is_described_twice() -> None:
    things = [thing for thing in described() if callable(thing)]
    twice = {t.__qualname__ for t in things if sum(other is t for other in things) > 1}
    assert twice == set()


def test_every_page_is_in_the_table_of_contents() -> None:
    contents = (ROOT / "_toc.yml").read_text("utf-8")
    assert [page for page in PAGES if f"book/api/{page}\n" not in contents] == []

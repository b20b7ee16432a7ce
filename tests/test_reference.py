"""What the book's reference describes, read from its pages."""

import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import pai_utils
from pai_utils.scorers import SCORERS

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "book" / "api").glob("*.md"))
DIRECTIVE = re.compile(r"^\.\. auto(?:module|function|class):: (\S+)\n((?: +\S.*\n)*)", re.M)
ENTRY = re.compile(r"^   ~(\S+)$", re.M)


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


def public(module: ModuleType) -> list[str]:
    """Names that autodoc takes for a module's members."""
    return [n for n, v in vars(module).items() if inspect.getmodule(v) is module and n[0] != "_"]


def described() -> Iterator[Any]:
    for page in PAGES:
        for name, options in DIRECTIVE.findall(page.read_text("utf-8")):
            thing = resolve(name)
            yield thing
            members = option(options, "members")
            if isinstance(thing, ModuleType) and members is not None:
                left_out = option(options, "exclude-members") or []
                for member in members or public(thing):
                    if member not in left_out:
                        yield getattr(thing, member)


def listed(page: str) -> list[Any]:
    """What the tables of a page name."""
    return [resolve(n) for n in ENTRY.findall((ROOT / "book" / "api" / page).read_text("utf-8"))]


@pytest.mark.parametrize("name", pai_utils.__all__)
def test_a_public_name_is_in_the_tables_and_on_a_page(name: str) -> None:
    thing = getattr(pai_utils, name)
    assert sum(entry is thing for entry in listed("index.md")) == 1
    assert any(entry is thing for entry in described())


def test_the_tables_name_nothing_that_is_not_public() -> None:
    assert len(listed("index.md")) == len(pai_utils.__all__)


@pytest.mark.parametrize("name", SCORERS)
def test_a_scorer_is_in_the_table_of_scorers_and_on_a_page(name: str) -> None:
    scorer = SCORERS[name].function
    assert any(entry is scorer for entry in listed("scores.md"))
    assert any(entry is scorer for entry in described())


def test_nothing_is_described_twice() -> None:
    things = [thing for thing in described() if callable(thing)]
    twice = {t.__qualname__ for t in things if sum(other is t for other in things) > 1}
    assert twice == set()


def test_every_page_is_in_the_table_of_contents() -> None:
    contents = (ROOT / "_toc.yml").read_text("utf-8")
    assert [page.stem for page in PAGES if f"book/api/{page.stem}\n" not in contents] == []

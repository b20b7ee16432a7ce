"""The examples in the library's docstrings, run in a fresh namespace each."""

import doctest
from importlib import import_module
from pathlib import Path

import pytest

import pai_utils

FOLDER = Path(pai_utils.__file__).parent
# Found by their text, so that collecting the tests imports none of the modules.
EXAMPLES = {
    ".".join(("pai_utils", *path.relative_to(FOLDER).with_suffix("").parts)).removesuffix(
        ".__init__"
    ): path.read_text("utf-8").count(">>> ")
    for path in sorted(FOLDER.rglob("*.py"))
}
MODULES = [name for name, count in EXAMPLES.items() if count]
# Where someone would begin.
STARTS = (
    "load_backbone",
    "Classifier",
    "prunable_parameters",
    "load_task",
    "fit_head",
    "score",
    "make_mask",
    "Mask",
    "prune",
    "select_parameters",
    "evaluate",
    "finetune",
    "save_compressed",
)


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_give_what_they_show(name: str) -> None:
    found = doctest.testmod(import_module(name))
    assert found.failed == 0
    assert found.attempted == EXAMPLES[name], "some are where doctest does not look"


@pytest.mark.parametrize("name", STARTS)
def test_a_name_to_begin_with_has_an_example(name: str) -> None:
    assert ">>> " in (getattr(pai_utils, name).__doc__ or "")

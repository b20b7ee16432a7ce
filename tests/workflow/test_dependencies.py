"""Which code of the library a notebook's result follows from."""

import json
import shutil
from functools import cache
from pathlib import Path

import pytest
from dependencies import Library

ROOT = Path(__file__).parents[2]

LIBRARY = {
    "__init__.py": "import lazy\n__getattr__ = lazy.attach(__name__)\n",
    "__init__.pyi": "from . import plots as plots\nfrom .scores import score as score\n",
    "plots.py": '''
import matplotlib
from pai_utils import common

WIDTH = 3
matplotlib.use("agg")

def curves(table):
    """Draw curves."""
    from pai_utils.common import Base
    return Base, WIDTH

def heatmap(table):
    return table  # a comment
''',
    "common.py": "class Base:\n    size = 1\n\ndef helper(): return 1\n\ndef unused(): return 2\n",
    "scores.py": """
from pai_utils.common import helper
from pai_utils.registry import register

def snip(model): return helper()

@register("extra")
def extra(model): return 4

SCORERS = {"snip": snip}

def score(name): return SCORERS[name]
""",
    "registry.py": "NAMES = {}\ndef register(name): return NAMES.setdefault\n",
    "dynamic.py": """
from importlib import import_module
def load(name): return import_module(f"pai_utils.{name}")
""",
}
CURVES = "import pai_utils as pai\npai.plots.curves(1)\n"
HEATMAP = "from pai_utils.plots import heatmap as draw\ndraw(1)\n"
SCORE = "import pai_utils as pai\npai.score('snip')\n"
HANDED_ON = "from pai_utils import plots\ngetattr(plots, 'curves')\n"
DYNAMIC = "from pai_utils.dynamic import load\nload('plots')\n"
MAGIC = "%matplotlib inline\n"
NOTEBOOKS = (CURVES, HEATMAP, SCORE, HANDED_ON, DYNAMIC, MAGIC, "import numpy as np\nnp.ones(3)\n")
ALL = {DYNAMIC, MAGIC}


@pytest.mark.parametrize(
    ("file", "old", "new", "changed"),
    [
        ("plots.py", "Draw curves.", "Draw something.", set()),
        ("plots.py", "  # a comment", "", set()),
        ("plots.py", "WIDTH = 3", "WIDTH = 4", {CURVES, HANDED_ON} | ALL),
        ("plots.py", "return table", "return 0", {HEATMAP, HANDED_ON} | ALL),
        # Executed wherever the module is imported.
        ("plots.py", "'agg'", "'svg'", {CURVES, HEATMAP, HANDED_ON} | ALL),
        ("common.py", "size = 1", "size = 2", {CURVES, HANDED_ON} | ALL),
        ("common.py", "return 1", "return 0", {SCORE, HANDED_ON} | ALL),
        ("common.py", "return 2", "return 0", {HANDED_ON} | ALL),
        # Scorers are reached by what names them, or by what registers them.
        ("scores.py", "return 4", "return 0", {SCORE} | ALL),
        ("registry.py", "NAMES = {}", "NAMES = dict()", {SCORE} | ALL),
        ("dynamic.py", "{name}", "{name}s", ALL),
    ],
)
def test_a_change_concerns_the_notebooks_that_reach_it(
    tmp_path: Path, file: str, old: str, new: str, changed: set[str]
) -> None:
    folder = tmp_path / "pai_utils"
    folder.mkdir()
    for name, content in LIBRARY.items():
        (folder / name).write_text(content)
    before = {notebook: Library(tmp_path).digest(notebook) for notebook in NOTEBOOKS}
    old, new = old.replace("'", '"'), new.replace("'", '"')
    assert old in LIBRARY[file]
    (folder / file).write_text(LIBRARY[file].replace(old, new))
    after = {notebook: Library(tmp_path).digest(notebook) for notebook in NOTEBOOKS}
    assert {notebook for notebook in NOTEBOOKS if before[notebook] != after[notebook]} == changed


@cache
def sources() -> dict[str, str]:
    """The code of every notebook."""
    found = {}
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = json.loads(path.read_text())["cells"]
        code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        found[path.stem] = "\n".join(code)
    return found


@cache
def digests(root: Path) -> dict[str, str]:
    library = Library(root)
    return {name: library.digest(source) for name, source in sources().items()}


@pytest.mark.parametrize(
    ("file", "old", "new", "concerned"),
    [
        ("plots.py", "sparsity: float", "sparsity: float = 0.5", {"zero_shot_retention"}),
        ("__main__.py", "def doctor(", "def physician(", set()),
        ("scorers/first_order.py", ".abs()", ".square()", set(sources())),
        ("data/datasets.toml", "[", "# changed\n[", set(sources())),
    ],
)
def test_notebooks_of_the_book_follow_from_the_figures_and_scorers_that_they_use(
    tmp_path: Path, file: str, old: str, new: str, concerned: set[str]
) -> None:
    folder = tmp_path / "pai_utils"
    shutil.copytree(ROOT / "pai_utils", folder, ignore=shutil.ignore_patterns("__pycache__"))
    text = (folder / file).read_text()
    assert old in text
    (folder / file).write_text(text.replace(old, new, 1))
    before, after = digests(ROOT), digests(tmp_path)
    assert {name for name in before if before[name] != after[name]} == concerned

"""What a grid may say, and what it is read as."""

import re
from pathlib import Path

import pytest
import yaml
from grids import read_grid

ONE_KEY = "expected the one key 'cells', a mapping with at least one cell"


def one_cell(name: str = "a", **entries: object) -> dict[str, object]:
    return {"cells": {name: {"notebook": "n", "parameters": {}, **entries}}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, ONE_KEY),
        ({"cells": {}}, ONE_KEY),
        ({"cells": ["a"]}, ONE_KEY),
        (["cells"], ONE_KEY),
        (one_cell("a/b"), "cell 'a/b': a name consists of"),
        (one_cell(parameter={}), "cell 'a': expected the keys"),
        (one_cell(parameters=[]), "cell 'a': 'parameters' must map"),
        (one_cell(parameters={"out": "x"}), "cell 'a': 'out' is set by the workflow"),
        (one_cell(over={"b": 1}), "cell 'a': 'over' must map names of parameters to lists"),
        (one_cell("a-{b}", over={"b": [1], "c": [2]}), "cell 'a-{b}': its name lacks {c}"),
        (one_cell("a-{b}", over={"b": ["x:", "x@"]}), "two cells have the name 'a-x_'"),
    ],
)
def test_malformed_grid_is_refused_with_the_place(
    tmp_path: Path, content: object, message: str
) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=re.escape(message)):
        read_grid(path)


def test_a_file_that_is_missing_or_no_yaml_is_refused(tmp_path: Path) -> None:
    (tmp_path / "there.yaml").write_text("cells: [")
    with pytest.raises(ValueError, match="no grid 'gone'; there are: there"):
        read_grid(tmp_path / "gone.yaml")
    with pytest.raises(ValueError, match=r"there\.yaml cannot be read: while parsing"):
        read_grid(tmp_path / "there.yaml")
    (tmp_path / "there.yaml").write_text("cells:\n  a: {}\n  b: {}\n  a: {}\n")
    with pytest.raises(ValueError, match=r"there\.yaml cannot be read: 'a' is there twice, line 2"):
        read_grid(tmp_path / "there.yaml")


def test_a_cell_over_lists_is_one_for_each_combination(tmp_path: Path) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text(
        """
cells:
  n-{task}-{rate}:
    notebook: n
    over: {task: [digits, "folder:my birds"], rate: [1, 2]}
    parameters: {seeds: [0]}
  n-alone: {notebook: n, parameters: {}}
"""
    )
    cells = read_grid(path)
    assert list(cells) == [
        "n-digits-1", "n-digits-2", "n-folder_my_birds-1", "n-folder_my_birds-2", "n-alone"
    ]  # fmt: skip
    assert cells["n-folder_my_birds-2"].parameters == {
        "seeds": [0],
        "task": "folder:my birds",
        "rate": 2,
    }
    assert all(cell.notebook == "n" and cell.name == name for name, cell in cells.items())

"""Grids, and what is wrong with an executed copy."""

import json
from pathlib import Path
from typing import Any

import pytest
from cells import Layout, last_error, problems
from grids import read_grid

ROOT = Path(__file__).resolve().parents[2]
ERROR = {"output_type": "error", "ename": "ValueError", "evalue": "no", "traceback": []}


def _executed(
    path: Path,
    outputs: list[object],
    status: str = "completed",
    exception: bool | None = None,
    reply: str = "shell.execute_reply",
) -> Path:
    cell = {
        "cell_type": "code",
        "source": ["x = 1"],
        "execution_count": 1,
        "outputs": outputs,
        "metadata": {"papermill": {"status": status}, "execution": {reply: "12:00"}},
    }
    notebook = {"cells": [cell], "metadata": {"papermill": {"exception": exception}}}
    path.write_text(json.dumps(notebook))
    return path


def test_error_output_is_a_problem_even_where_the_notebook_allows_it(tmp_path: Path) -> None:
    assert problems(_executed(tmp_path / "a.ipynb", [])) == []
    copy = _executed(tmp_path / "a.ipynb", [ERROR])
    assert problems(copy) == [f"{copy}: ValueError: no"]
    assert last_error(copy) == "ValueError: no"


@pytest.mark.parametrize(
    "state",
    [{"status": "pending"}, {"status": "running"}, {"exception": True}, {"reply": "none"}],
    ids=["pending", "running", "exception", "dead kernel"],
)
def test_copy_that_stopped_early_is_a_problem(tmp_path: Path, state: dict[str, Any]) -> None:
    copy = _executed(tmp_path / "a.ipynb", [], **state)
    assert problems(copy) == [f"{copy}: did not run to its end"]


def test_a_copy_that_is_missing_or_not_of_papermill_is_a_problem(tmp_path: Path) -> None:
    copy = tmp_path / "a.ipynb"
    assert problems(copy) == [f"{copy}: missing"]
    copy.write_text(json.dumps({"cells": [], "metadata": {}}))
    assert problems(copy) == [f"{copy}: was not executed by papermill"]


def test_smoke_has_one_cell_of_the_book_for_each_of_its_notebooks() -> None:
    smoke, book = (read_grid(ROOT / Layout(grid).grid_file) for grid in ("smoke", "book"))
    assert set(smoke) <= set(book)
    notebooks = sorted(cell.notebook for cell in smoke.values())
    assert notebooks == sorted({cell.notebook for cell in book.values()})
    for name, cell in smoke.items():
        assert cell.notebook == book[name].notebook
        assert cell.parameters.get("backbone") == book[name].parameters.get("backbone")

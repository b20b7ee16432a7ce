"""Grids and notebooks agree."""

import ast
from pathlib import Path

import nbformat
import pytest

from pai_utils.grids import Cell, read_grid

ROOT = Path(__file__).resolve().parents[2]
CELLS = [
    pytest.param(cell, id=f"{grid.stem}-{cell.name}")
    for grid in sorted((ROOT / "workflow" / "grids").glob("*.yaml"))
    for cell in read_grid(grid).values()
]


@pytest.mark.parametrize("cell", CELLS)
def test_cell_of_a_grid_sets_parameters_that_its_notebook_has(cell: Cell) -> None:
    notebook = nbformat.read(ROOT / "notebooks" / f"{cell.notebook}.ipynb", as_version=4)
    code = next(entry for entry in notebook.cells if entry.cell_type == "code")
    known = {
        ast.unparse(target)
        for statement in ast.parse(code.source).body
        if isinstance(statement, ast.Assign)
        for target in statement.targets
    }
    assert set(cell.parameters) <= known

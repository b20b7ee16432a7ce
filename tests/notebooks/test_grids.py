"""Grids and notebooks agree."""

import ast
from pathlib import Path

import nbformat
import pytest
from grids import read_grid

ROOT = Path(__file__).resolve().parents[2]


def _parameters(notebook: str) -> set[str]:
    content = nbformat.read(ROOT / "notebooks" / f"{notebook}.ipynb", as_version=4)
    code = next(entry for entry in content.cells if entry.cell_type == "code")
    statements = [each for each in ast.parse(code.source).body if isinstance(each, ast.Assign)]
    return {ast.unparse(target) for each in statements for target in each.targets}


@pytest.mark.parametrize("grid", sorted((ROOT / "workflow/grids").glob("*.yaml")), ids=str)
def test_cells_of_a_grid_set_parameters_that_their_notebooks_have(grid: Path) -> None:
    cells = read_grid(grid).values()
    known = {notebook: _parameters(notebook) for notebook in {cell.notebook for cell in cells}}
    for cell in cells:
        assert set(cell.parameters) <= known[cell.notebook], cell.name

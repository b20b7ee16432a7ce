"""The form that every notebook has, so that papermill, nbval and a reader can rely on it."""

import ast
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pytest
from grids import read_grid

from pai_utils.studies.parameters import read_parameters, schema_of

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "notebooks").glob("*.ipynb"))

pytestmark = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def _read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def _code(path: Path) -> list[Any]:
    return [cell for cell in _read(path).cells if cell.cell_type == "code"]


def test_notebook_is_valid_and_starts_with_a_title(path: Path) -> None:
    notebook = _read(path)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert notebook.cells[0].cell_type == "markdown"
    assert notebook.cells[0].source.startswith("# ")


def test_notebook_is_stored_without_outputs(path: Path) -> None:
    for cell in _code(path):
        assert cell.outputs == []
        assert cell.execution_count is None


def test_first_code_cell_alone_is_the_parameters_cell(path: Path) -> None:
    tagged = ["parameters" in cell.metadata.get("tags", []) for cell in _code(path)]
    assert tagged == [True] + [False] * (len(tagged) - 1)


def test_parameters_are_plain_values_and_name_the_out_folder_and_the_encoder(path: Path) -> None:
    names = []
    for statement in ast.parse(_code(path)[0].source).body:
        assert isinstance(statement, ast.Assign), ast.unparse(statement)
        (target,) = statement.targets
        assert isinstance(target, ast.Name)
        ast.literal_eval(statement.value)
        names.append(target.id)
    assert len(names) == len(set(names))
    assert "out" in names
    loads = any("pai.Suite.load(config" in cell.source for cell in _code(path))
    assert ("backbone" in names) == loads


def test_sizes_that_are_stored_are_those_of_the_schema(path: Path) -> None:
    stored = read_parameters(path, {}).model_dump()
    fields = schema_of(path.stem).model_fields
    numbers = {
        name: field.default
        for name, field in fields.items()
        if not field.is_required() and isinstance(field.default, (int, float, type(None)))
    }
    assert {name: stored[name] for name in numbers} == numbers


def test_second_code_cell_checks_the_parameters_before_anything_else(path: Path) -> None:
    statements = ast.parse(_code(path)[1].source).body
    first = next(s for s in statements if not isinstance(s, ast.Import | ast.ImportFrom))
    assert ast.unparse(first) == "config = study.Parameters.from_notebook(globals())"
    imports = [ast.unparse(s) for s in statements if isinstance(s, ast.ImportFrom)]
    assert f"from pai_utils.studies import {path.stem} as study" in imports


def test_notebook_defines_no_function_and_no_class(path: Path) -> None:
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for cell in _code(path):
        for node in ast.walk(ast.parse(cell.source)):
            assert not isinstance(node, definitions), ast.unparse(node)


def test_claims_are_asserted_on_the_numbers_of_the_run(path: Path) -> None:
    sources = [ast.parse(cell.source) for cell in _code(path)]
    assert any(isinstance(node, ast.Assert) for tree in sources for node in ast.walk(tree))


def test_a_cell_that_shows_a_figure_says_what_it_shows(path: Path) -> None:
    for cell in _code(path):
        if cell.source.splitlines()[-1] == "figure":
            assert len(cell.metadata.mystnb.image.alt) > 40


def test_nbval_runs_the_small_sizes_of_the_grid_of_the_tests_on_another_encoder(path: Path) -> None:
    cells = read_grid(path.parents[1] / "workflow" / "grids" / "smoke.yaml")
    (small,) = (cell.parameters for cell in cells.values() if cell.notebook == path.stem)
    item = SimpleNamespace(path=path, cell=_code(path)[0])
    other = SimpleNamespace(path=path, cell=_code(path)[1])
    conftest = runpy.run_path(str(path.parent / "conftest.py"))
    conftest["pytest_collection_modifyitems"]([item, other, SimpleNamespace(path=path)])
    found: dict[str, Any] = {}
    exec(item.cell.source, found)
    encoder = {"backbone": "efficientnet_lite0"} if "backbone" in small else {}
    expected = read_parameters(path, {**small, **encoder})
    assert schema_of(path.stem).from_notebook(found) == expected
    assert small.get("backbone") != encoder.get("backbone") or not encoder
    assert expected.model_dump()["train_size"] == 60
    assert other.cell.source == _code(path)[1].source

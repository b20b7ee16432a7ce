"""Small sizes for nbval, put below a notebook's own parameters as papermill does.

What is stored is what a person gets; the values are those of the grid of the tests.
"""

from pathlib import Path

import pytest
from grids import read_grid

SMALL = read_grid(Path(__file__).parents[1] / "workflow" / "grids" / "smoke.yaml")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the parameters cell of each notebook end with the small values."""
    for item in items:
        cell = getattr(item, "cell", None)
        if cell is not None and "parameters" in cell.metadata.get("tags", ()):
            name = item.path.stem
            given = SMALL.get(f"{name}-efficientnet_lite0") or SMALL[name]
            lines = [f"{key} = {value!r}" for key, value in given.parameters.items()]
            cell.source = "\n".join([cell.source, *lines])

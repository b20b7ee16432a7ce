"""Small sizes for nbval, put below a notebook's own parameters as papermill does.

What is stored is what a person gets; the values are those of the grid of the tests, which runs the
notebooks on the other encoder.
"""

from pathlib import Path

import pytest
from grids import read_grid

GRID = read_grid(Path(__file__).parents[1] / "workflow" / "grids" / "smoke.yaml")
SMALL = {cell.notebook: cell.parameters for cell in GRID.values()}
ENCODER = "efficientnet_lite0"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the parameters cell of each notebook end with the small values."""
    for item in items:
        cell = getattr(item, "cell", None)
        if cell is not None and "parameters" in cell.metadata.get("tags", ()):
            given = SMALL[item.path.stem]
            if "backbone" in given:
                given = {**given, "backbone": ENCODER}
            lines = [f"{key} = {value!r}" for key, value in given.items()]
            cell.source = "\n".join([cell.source, *lines])

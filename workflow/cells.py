"""The cells of a grid, where each one's files are, and what is wrong with an executed copy.

A *grid* is a file `workflow/grids/<name>.yaml` that lists *cells*: one notebook with one set of
parameters each. A *site* is the folder that Jupyter Book renders.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

BOOK_GRID = "book"
SITE_SOURCES = ("_config.yml", "_toc.yml", "book", "results")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Cell:
    """One notebook with one set of parameters."""

    name: str
    notebook: str
    parameters: Mapping[str, Any]

    @property
    def parameters_json(self) -> str:
        """The parameters as text that is equal when they are."""
        return json.dumps(self.parameters, sort_keys=True)


@dataclass(frozen=True)
class Layout:
    """Where one grid's files are, relative to the folder that holds `notebooks/` and `book/`."""

    grid: str

    @property
    def grid_file(self) -> Path:
        """The grid itself."""
        return Path("workflow/grids") / f"{self.grid}.yaml"

    @property
    def site(self) -> Path:
        """The folder that is rendered: only the grid `book` touches the reader's book."""
        return Path() if self.grid == BOOK_GRID else Path("build") / self.grid

    @property
    def executed(self) -> Path:
        """The folder of executed copies and of what they wrote."""
        return self.site / "book" / "executed"

    @property
    def index(self) -> Path:
        """The page to open."""
        return self.site / "_build" / "html" / "index.html"

    @property
    def logs(self) -> Path:
        """The folder of running and failed copies and of the renderer's log."""
        return Path("build") / "logs" / self.grid


def read_grid(path: Path) -> dict[str, Cell]:
    """Return a grid's cells by name.

    Raises:
        ValueError: The file is missing or is not a grid; the message names what is wrong.
    """
    if not path.is_file():
        names = sorted(p.stem for p in path.parent.glob("*.yaml"))
        raise ValueError(f"there is no grid {path.stem!r}; there are: {', '.join(names)}")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or set(content) != {"cells"} or not content["cells"]:
        raise ValueError(f"{path}: expected the one key 'cells' with at least one cell")
    return {name: _read_cell(path, name, entry) for name, entry in content["cells"].items()}


def _read_cell(path: Path, name: object, entry: object) -> Cell:
    where = f"{path}: cell {name!r}"
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"{where}: a name consists of letters, digits, '_', '-' and '.'")
    if not isinstance(entry, dict) or set(entry) != {"notebook", "parameters"}:
        raise ValueError(f"{where}: expected the keys 'notebook' and 'parameters'")
    notebook, parameters = entry["notebook"], entry["parameters"]
    if not isinstance(parameters, dict):
        raise ValueError(f"{where}: 'parameters' must map names to values")
    if "out" in parameters:
        raise ValueError(f"{where}: 'out' is set by the workflow")
    return Cell(name, notebook, parameters)


def last_error(notebook: Path) -> str | None:
    """Return the last error among a notebook's outputs as `name: message`, or None."""
    errors = _error_outputs(json.loads(notebook.read_text(encoding="utf-8")))
    return errors[-1] if errors else None


def problems(notebook: Path) -> list[str]:
    """Return what keeps an executed copy out of the book; an empty list if nothing does."""
    if not notebook.is_file():
        return [f"{notebook}: missing"]
    content = json.loads(notebook.read_text(encoding="utf-8"))
    record = content["metadata"].get("papermill")
    if record is None:
        return [f"{notebook}: was not executed by papermill"]
    found = [f"{notebook}: {error}" for error in _error_outputs(content)]
    if not found and (record.get("exception") or not all(map(_ran, content["cells"]))):
        found.append(f"{notebook}: did not run to its end")
    return found


def _ran(cell: Mapping[str, Any]) -> bool:
    """Whether a cell of an executed copy is through, as far as it has anything to run."""
    if cell["metadata"].get("papermill", {}).get("status") != "completed":
        return False
    # papermill calls a cell completed even if its kernel died in it; then the reply is missing.
    is_code = cell["cell_type"] == "code" and "".join(cell["source"]).strip()
    return not is_code or "shell.execute_reply" in cell["metadata"].get("execution", {})


def _error_outputs(content: Mapping[str, Any]) -> list[str]:
    return [
        f"{output['ename']}: {output['evalue']}"
        for cell in content["cells"]
        for output in cell.get("outputs", [])
        if output["output_type"] == "error"
    ]

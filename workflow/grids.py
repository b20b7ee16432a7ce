"""Grids of runs: files that list notebooks with their parameters.

A grid is a YAML file whose one key `cells` maps names to *cells*, one notebook with one set of
parameters each. A cell with the key `over` stands for many: one for each combination of the values
it lists, which are added to its parameters and put into its name in the place of `{parameter}`.
"""

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pai_utils.support.written import read_yaml

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Cell:
    """One notebook with one set of parameters."""

    name: str
    notebook: str
    parameters: Mapping[str, Any]


def read_grid(path: Path) -> dict[str, Cell]:
    """Return a grid's cells by name.

    Raises:
        ValueError: The file is missing or is not a grid; the message names what is wrong.
    """
    if not path.is_file():
        names = sorted(p.stem for p in path.parent.glob("*.yaml"))
        raise ValueError(f"there is no grid {path.stem!r}; there are: {', '.join(names)}")
    try:
        content = read_yaml(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    entries = content.get("cells") if isinstance(content, dict) else None
    if not isinstance(entries, dict) or set(content) != {"cells"} or not entries:
        raise ValueError(f"{path}: expected the one key 'cells', a mapping with at least one cell")
    cells: dict[str, Cell] = {}
    for name, entry in entries.items():
        for cell in _read_cells(path, name, entry):
            if cell.name in cells:
                raise ValueError(f"{path}: two cells have the name {cell.name!r}")
            cells[cell.name] = cell
    return cells


def _read_cells(path: Path, name: object, entry: object) -> Iterator[Cell]:
    """The cells that one entry stands for."""
    where = f"{path}: cell {name!r}"
    if not isinstance(entry, dict) or set(entry) - {"over"} != {"notebook", "parameters"}:
        raise ValueError(f"{where}: expected the keys 'notebook' and 'parameters', perhaps 'over'")
    notebook, parameters, over = entry["notebook"], entry["parameters"], entry.get("over", {})
    if not isinstance(parameters, dict):
        raise ValueError(f"{where}: 'parameters' must map names to values")
    if not isinstance(over, dict) or not all(isinstance(v, list) and v for v in over.values()):
        raise ValueError(f"{where}: 'over' must map names of parameters to lists of values")
    if "out" in parameters or "out" in over:
        raise ValueError(f"{where}: 'out' is set by the workflow")
    for values in itertools.product(*over.values()):
        chosen = dict(zip(over, values, strict=True))
        full = str(name)
        for parameter, value in chosen.items():
            # Names of files: a colon, as in "folder:birds", is not allowed everywhere.
            text = re.sub(r"[^A-Za-z0-9_.-]+", "_", str(value))
            if f"{{{parameter}}}" not in full:
                raise ValueError(f"{where}: its name lacks {{{parameter}}}")
            full = full.replace(f"{{{parameter}}}", text)
        if not _NAME.fullmatch(full):
            raise ValueError(f"{where}: a name consists of letters, digits, '_', '-' and '.'")
        yield Cell(full, notebook, {**parameters, **chosen})

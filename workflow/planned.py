"""What a grid comes to: its cells, the code that each depends on, and the resources it takes.

It is worked out once and kept in `build/plans/GRID.json`, so that Snakemake, which every job of a
cluster starts anew, reads a file instead of importing the library.
"""

import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cells import NOTEBOOKS, SITE_SOURCES, Layout
from dependencies import Library
from grids import Cell, read_grid

from pai_utils.support.code import LIBRARY, ROOT
from pai_utils.support.stored import write_atomically

LEAST_MIB = 1500
PLANNED_TFLOPS = 20.0  # that hours are planned with
LEAST_MINUTES = 30
SLACK = 10  # over the estimate, which leaves out decoding and all that is no forward or backward


def read_plan(layout: Layout) -> dict[str, dict[str, Any]]:
    """Return, for each cell, its `notebook`, `parameters`, `code`, and resources.

    Cells whose parameters and code are those of an earlier plan keep their estimates.

    Raises:
        ValueError: The grid is none, or a cell's parameters are refused.
    """
    cells = read_grid(layout.grid_file)
    notebooks = {name: NOTEBOOKS / f"{name}.ipynb" for name in {c.notebook for c in cells.values()}}
    for name, path in notebooks.items():
        if not path.is_file():
            raise ValueError(f"there is no notebook {name!r} in {NOTEBOOKS}")
    scripts = sorted(Path(__file__).parent.glob("*.py"))
    key = digest([layout.grid_file, *notebooks.values(), *code_files(), *scripts])
    old = json.loads(layout.plan.read_text(encoding="utf-8")) if layout.plan.is_file() else {}
    if old.get("key") == key:
        found: dict[str, dict[str, Any]] = old["cells"]
        return found
    library, estimated = Library(Path()), digest([Path(__file__).with_name("estimates.py")])
    codes = {name: _code(library, path) for name, path in notebooks.items()}
    known = old.get("cells", {}) if old.get("estimated") == estimated else {}
    plan = {}
    for name, cell in cells.items():
        entry = {
            "notebook": notebooks[cell.notebook].as_posix(),
            "parameters": json.dumps(cell.parameters, sort_keys=True),
            "code": codes[cell.notebook],
        }
        same = known.get(name, {}).items() >= entry.items()
        plan[name] = known[name] if same else {**entry, **_resources(cell)}
    content = {"key": key, "estimated": estimated, "cells": plan}
    write_atomically(layout.plan, json.dumps(content, indent=1).encode())
    return plan


def _code(library: Library, notebook: Path) -> str:
    """A digest of all that a notebook's result follows from, its parameters aside."""
    text = notebook.read_text(encoding="utf-8")
    source = "\n".join(
        "".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"
    )
    content = f"{text} {library.digest(source)} {digest([Path('requirements.lock')])}"
    return hashlib.sha256(content.encode()).hexdigest()


def read_cell(cell: Cell, tflops: float) -> tuple[str, Any, dict[str, float]]:
    """A cell's name, parameters and estimate.

    Raises:
        ValueError: The parameters are refused; the message names the cell.
    """
    from estimates import estimate

    from pai_utils.studies.parameters import read_parameters

    try:
        config = read_parameters(NOTEBOOKS / f"{cell.notebook}.ipynb", cell.parameters)
        return cell.name, config, estimate(cell.notebook, config, tflops)
    except ValueError as error:
        raise ValueError(f"cell {cell.name!r}: {error}") from error


def _resources(cell: Cell) -> dict[str, float]:
    """An estimate, if the notebook is a study of the library."""
    if not (ROOT / LIBRARY / "studies" / f"{cell.notebook}.py").is_file():
        return {"memory_mib": LEAST_MIB, "hours": 0.0, "score_hours": 0.0}
    found = read_cell(cell, PLANNED_TFLOPS)[2]
    found["memory_mib"] = math.ceil(found["memory_mib"])
    return {key: found[key] for key in ("memory_mib", "hours", "score_hours")}


def code_files() -> list[Path]:
    """The files of the library and of its locked packages."""
    files = (file for end in ("py", "pyi", "toml") for file in Path(LIBRARY).glob(f"**/*.{end}"))
    return [*sorted(files), Path("requirements.lock")]


def digest(paths: Iterable[Path]) -> str:
    """A digest of names and contents of files."""
    found = hashlib.sha256()
    for path in paths:
        if path.is_file():
            found.update(f"{path.as_posix()} ".encode() + path.read_bytes())
    return found.hexdigest()


def pages_digest() -> str:
    """A digest of all that pages are made of beside executed copies, docstrings among it."""
    files = [path for source in SITE_SOURCES for path in sorted(Path(source).glob("**/*"))]
    hidden = {"executed", "__pycache__"}
    return digest(
        [
            *code_files(),
            *map(Path, SITE_SOURCES),
            *(f for f in files if not hidden & set(f.parts) and not f.name.startswith(".")),
        ]
    )


def minutes(hours: float, tflops: float) -> int:
    """Minutes to ask a cluster for, on a device that sustains `tflops`."""
    return LEAST_MINUTES + math.ceil(SLACK * hours * 60 * PLANNED_TFLOPS / tflops)


def processes(hours: float, tflops: float, gpus: int) -> int:
    """How many processes of `torchrun` compute a score: one an hour, up to a computer's GPUs."""
    return max(1, min(math.ceil(hours * PLANNED_TFLOPS / tflops), gpus))

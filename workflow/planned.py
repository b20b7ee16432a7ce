"""What a grid comes to: its cells, what several of them need, and the resources of each.

It is worked out once and kept in `build/plans/GRID.json`, so that Snakemake, which every job of a
cluster starts anew, reads a file instead of importing the library.
"""

import hashlib
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from cells import Layout

from pai_utils.grids import Cell, read_grid
from pai_utils.support.stored import write_atomically

LIBRARY = Path("pai_utils")
NOTEBOOKS = Path("notebooks")
LEAST_MIB = 1500
PLANNED_TFLOPS = 20.0  # that hours are planned with
LEAST_MINUTES = 30
SLACK = 10  # over the estimate, which leaves out decoding and all that is no forward or backward


def library_files() -> list[str]:
    """The files that cells depend on, as the workflow tracks them."""
    return sorted(
        path.as_posix()
        for path in LIBRARY.rglob("*.py")
        if not any(part.startswith((".", "__pycache__")) for part in path.parts)
    )


def read_plan(layout: Layout) -> dict[str, Any]:
    """Return the grid's plan, worked out anew if the grid, a notebook or the library changed.

    Raises:
        ValueError: The grid is none, or a cell's parameters are refused.
    """
    cells = read_grid(layout.grid_file)
    key = _key(layout, cells)
    if layout.plan.is_file():
        found: dict[str, Any] = json.loads(layout.plan.read_text(encoding="utf-8"))
        if found.get("key") == key:
            return found
    plan = {"key": key, **_plan(cells)}
    write_atomically(layout.plan, json.dumps(plan, indent=1).encode())
    return plan


def _key(layout: Layout, cells: dict[str, Cell]) -> str:
    names = {cell.notebook for cell in cells.values()}
    paths = [layout.grid_file, *map(Path, library_files()), Path(__file__)]
    paths += [path for name in sorted(names) if (path := _path(name)).is_file()]
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _plan(cells: dict[str, Cell]) -> dict[str, Any]:
    planned: dict[str, dict[str, Any]] = {
        name: {
            "notebook": cell.notebook,
            "parameters": cell.parameters_json,
            "needs": [],
            "memory_mib": LEAST_MIB,
            "hours": 0.0,
        }
        for name, cell in cells.items()
    }
    checked = {name for name in {cell.notebook for cell in cells.values()} if _has_schema(name)}
    configs = {}
    for name, cell in cells.items():
        if cell.notebook in checked:
            from pai_utils.studies.parameters import read_parameters

            try:
                configs[name] = read_parameters(_path(cell.notebook), cell.parameters)
            except ValueError as error:
                raise ValueError(f"cell {name!r}: {error}") from error
    if not configs:
        return {"cells": planned, "needs": {}}
    from pai_utils.needs import Need, needs
    from pai_utils.planning import plan, plan_need

    for row in plan(configs, tflops=PLANNED_TFLOPS).to_dict("records"):
        planned[row["cell"]] |= {"memory_mib": math.ceil(row["memory_mib"]), "hours": row["hours"]}
    known: dict[Need, Need] = {}  # of equal ones the first, since each makes its name once
    wanted = {
        name: [known.setdefault(need, need).name for need in needs(config)]
        for name, config in configs.items()
    }
    by_name = {need.name: need for need in known}
    counts = Counter(name for listed in wanted.values() for name in listed)
    # What one cell alone needs is its own affair, and gains nothing by a job of its own.
    common = {name for name, count in counts.items() if count > 1}
    waiting = list(common)
    while waiting:
        for need in by_name[waiting.pop()].before:
            if need.name not in common:
                by_name[need.name] = need
                common.add(need.name)
                waiting.append(need.name)
    for name, listed in wanted.items():
        planned[name]["needs"] = sorted(common.intersection(listed))
    return {
        "cells": planned,
        "needs": {
            name: {
                "kind": by_name[name].kind,
                "need": json.dumps(by_name[name].parameters, sort_keys=True),
                "before": sorted({need.name for need in by_name[name].before}),
                **plan_need(by_name[name], tflops=PLANNED_TFLOPS),
            }
            for name in sorted(common)
        },
    }


def _path(notebook: str) -> Path:
    return NOTEBOOKS / f"{notebook}.ipynb"


def _has_schema(notebook: str) -> bool:
    """Whether parameters can be checked: a notebook of another project runs without an estimate."""
    path = _path(notebook)
    return path.is_file() and "from_notebook(globals())" in path.read_text(encoding="utf-8")


def minutes(hours: float, tflops: float) -> int:
    """Minutes to ask a cluster for, on a device that sustains `tflops`."""
    return LEAST_MINUTES + math.ceil(SLACK * hours * 60 * PLANNED_TFLOPS / tflops)


def processes(hours: float, tflops: float, gpus: int) -> int:
    """How many processes of `torchrun` compute a score: one an hour, up to a computer's GPUs."""
    return max(1, min(math.ceil(hours * PLANNED_TFLOPS / tflops), gpus))

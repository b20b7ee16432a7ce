"""What the workflow adds to the notebooks that it runs.

``python -m benchmarks.engine`` writes the table and its record to ``results/benchmarks/engine``.
Notebooks are stubs, but for the grid of thousands of cells, which is planned from real ones.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import yaml
from nbformat.v4 import new_code_cell, new_notebook

from benchmarks.storing import store

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "workflow" / "build.py"
WORK = """\
import time
end = time.process_time() + seconds
while time.process_time() < end:
    pass
"""


def _notebook() -> Any:
    parameters = new_code_cell(
        "seconds = 0\nindex = 0\nout = '.'", metadata={"tags": ["parameters"]}
    )
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return new_notebook(cells=[parameters, new_code_cell(WORK)], metadata={"kernelspec": kernel})


def _project(root: Path, cells: int, seconds: float) -> Path:
    """A folder with a grid of stubs."""
    for folder in ("notebooks", "pai_utils", "workflow/grids"):
        (root / folder).mkdir(parents=True)
    (root / "notebooks" / "stub.ipynb").write_text(nbformat.writes(_notebook()))
    (root / "requirements.lock").write_text("")
    (root / "pai_utils" / "stub.py").write_text("")
    entry = {
        "notebook": "stub",
        "over": {"index": list(range(cells))},
        "parameters": {"seconds": seconds},
    }
    grid = {"cells": {"stub-{index}": entry}}
    (root / "workflow" / "grids" / "stubs.yaml").write_text(yaml.safe_dump(grid))
    return root


def _build(root: Path, grid: str, *options: str) -> tuple[float, float]:
    """Seconds of a build, and the peak memory in GiB of the largest process below this one."""
    command = [sys.executable, str(BUILD), grid, "--target", "executed", *options]
    begin = time.perf_counter()
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    seconds = time.perf_counter() - begin
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20


def overhead(root: Path, cells: int, seconds: float) -> list[dict[str, object]]:
    """Seconds a cell beyond its notebook's own run, and what a second core gives."""
    one, _ = _build(_project(root / "one", cells, seconds), "stubs", "--cores", "1")
    two, _ = _build(_project(root / "two", cells, seconds), "stubs", "--cores", "2")
    copies = (root / "one/build/stubs/book/executed").glob("*.ipynb")
    own = [json.loads(p.read_text())["metadata"]["papermill"]["duration"] for p in copies]
    return [
        {
            "what": f"engine, beyond a notebook's own run ({cells} cells of {seconds:g} s)",
            "value": (one - sum(own)) / cells,
            "unit": "s a cell",
            "promise": "≤ 5",
        },
        {
            "what": f"two cells at once on two cores, over one ({cells} cells)",
            "value": one / two,
            "unit": "×",
            "promise": "≥ 1.7",
        },
    ]


def resuming(root: Path, cells: int) -> dict[str, object]:
    """Seconds until a finished grid is found finished; its files are made, not run."""
    project = _project(root / "many", cells, 0)
    executed = project / "build/stubs/book/executed"
    copy = nbformat.writes(_notebook())
    for index in range(cells):
        (executed / f"stub-{index}").mkdir(parents=True)
        (executed / f"stub-{index}.ipynb").write_text(copy)
    _build(project, "stubs", "--touch")
    seconds, _ = _build(project, "stubs")
    return {
        "what": f"resuming a finished grid of {cells:,} cells",
        "value": seconds,
        "unit": "s",
        "promise": "≤ 20",
    }


def planning(root: Path, cells: int) -> list[dict[str, object]]:
    """Seconds and memory of planning a grid of real notebooks."""
    project = root / "large"
    (project / "workflow/grids").mkdir(parents=True)
    for name in ("notebooks", "pai_utils"):
        (project / name).symlink_to(ROOT / name)
    shutil.copy(ROOT / "requirements.lock", project)
    sources = ["digits", "mnist5k", "photos", "glyphs"]
    samples = list(range(1, cells // 40 + 1))
    entry = {
        "notebook": "zero_shot_retention",
        "over": {
            "backbone": ["efficientnet_lite0", "mobilenetv2"],
            "source": sources,
            "samples": samples,
            "seed": list(range(5)),
        },
        "parameters": {
            "targets": sources,
            "scorers": ["ggn_diag", "magnitude"],
            "train_size": max(samples),
        },
    }
    grid = {"cells": {"retention-{backbone}-{source}-{samples}-{seed}": entry}}
    (project / "workflow/grids/large.yaml").write_text(yaml.safe_dump(grid))
    seconds, memory = _build(project, "large", "--dry-run", "--quiet")
    what = f"planning a grid of {cells // 40 * 40:,} cells"
    return [
        {"what": what, "value": seconds, "unit": "s", "promise": "≤ 60"},
        {"what": what, "value": memory, "unit": "GiB", "promise": "≤ 2"},
    ]


def main() -> None:
    """Measure everything and write the table."""
    parser = argparse.ArgumentParser(description="Cost of the workflow's engine.")
    parser.add_argument("--cells", type=int, default=6, help="that are really run")
    parser.add_argument("--seconds", type=float, default=15.0, help="each")
    parser.add_argument("--finished", type=int, default=500)
    parser.add_argument("--planned", type=int, default=10_000)
    parser.add_argument("--out", type=Path, default=ROOT / "results/benchmarks/engine")
    given = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        rows = planning(root, given.planned)  # first, since a peak hides those of later children
        rows += overhead(root, given.cells, given.seconds)
        rows.append(resuming(root, given.finished))
    store(pd.DataFrame(rows), given.out, "engine")


if __name__ == "__main__":
    main()

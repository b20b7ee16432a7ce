"""Whether everything is right on a GPU, and how fast: ``python -m benchmarks.gpu``.

The most valuable comes first: results beside float64, hidden waits, too little memory, two
processes, then speed beside other packages and 2:4 weights. What is done is written at once, and a
run that was stopped, or that ran out of ``--minutes``, goes on from there. At the end the folder
``--out`` has one table a part, a page and a plot. On a CPU all of it runs small.

It takes torch, timm and this checkout on the path; what else is missing is named in the tables.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns

from benchmarks.gpu import limits, right, speed
from benchmarks.gpu.steps import Settings
from benchmarks.job import public_message
from benchmarks.storing import ROOT, add_entry, fingerprint, read_journal
from pai_utils.models.loading import resolve_device
from pai_utils.runs import surroundings
from pai_utils.support.cache import FOLDER
from pai_utils.support.common import progress
from pai_utils.support.stored import write_atomically

PARTS = {"right": "Right", "limits": "Waits, memory and processes", "speed": "Fast"}


class Journal:
    """Rows of finished steps, one step a line of a file, written as they come."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, list[dict[str, Any]]] = {
            entry["step"]: entry["rows"] for entry in read_journal(path)
        }

    def do(self, key: str, step: Callable[[], list[dict[str, Any]]]) -> None:
        """Run a step that is not done yet; an error is a row as well."""
        if key in self.rows:
            return
        begin, what = time.perf_counter(), key.partition("/")[2]
        try:
            rows = step()
        except ModuleNotFoundError as error:
            rows = [{"what": what, "verdict": "not measured", "note": f"{error.name} is missing"}]
        except Exception as error:
            note = public_message(type(error).__name__, str(error))
            rows = [{"what": what, "verdict": "failed", "note": note}]
        seconds = round(time.perf_counter() - begin, 2)
        self.rows[key] = [row | {"seconds_in_all": seconds} for row in rows]
        add_entry(self.path, {"step": key, "rows": self.rows[key]})

    def table(self, part: str) -> pd.DataFrame:
        """Rows of a part of :data:`PARTS`."""
        own = [rows for key, rows in self.rows.items() if key.partition("/")[0] == part]
        return pd.DataFrame(chain.from_iterable(own))


def report(journal: Journal, out: Path, record: dict[str, Any]) -> None:
    """Write the tables, the page and the plot of what is done so far."""
    tables = {part: journal.table(part) for part in PARTS}
    lines = [f"# {record['device']}", ""]
    for part, title in PARTS.items():
        table = tables[part]
        if table.empty:
            continue
        write_atomically(out / f"{part}.csv", table.to_csv(index=False).encode())
        said = ", ".join(f"{count} {kind}" for kind, count in table.verdict.value_counts().items())
        lines += [f"## {title}", "", f"{said}.", ""]
        without = table[table.verdict == "not measured"]
        if len(without):
            lines += [f"Not measured: {'; '.join(dict.fromkeys(without.note))}.", ""]
        wrong = table[~table.verdict.isin(("right", "measured", "refused", "not measured"))]
        if len(wrong):
            shown = wrong.dropna(axis="columns", how="all")
            lines += ["```text", shown.to_string(index=False), "```", ""]
    if "fb" in tables["speed"]:
        _plot(tables["speed"], out / "speed.png")
        lines += ["![Cost beside other packages](speed.png)", ""]
    write_atomically(out / "page.md", "\n".join(lines).encode())
    write_atomically(out / "record.json", json.dumps(record, indent=2, sort_keys=True).encode())


def _plot(table: pd.DataFrame, path: Path) -> None:
    """Cost in FB by contender, one panel a task and network."""
    rows = table.dropna(subset=["fb"])
    rows = rows.assign(panel=rows.task + ", " + rows.model)
    step = rows.step.fillna("").map(lambda name: f", {name}" if name not in ("", "whole") else "")
    rows["label"] = rows.contender + step + rows.images.map(", {} images".format)
    grid = sns.catplot(
        rows, x="fb", y="label", hue="role", col="panel", col_wrap=3, kind="bar", sharex=False,
        sharey=False, height=2.6, aspect=1.5,
    )  # fmt: skip
    grid.set_titles("{col_name}").set_axis_labels("forward and backward passes", "")
    path.parent.mkdir(parents=True, exist_ok=True)
    grid.savefig(path, dpi=120)
    plt.close(grid.figure)


def main() -> None:
    """Run what the command line asks for, and say what fell short."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu to run it small")
    parser.add_argument("--minutes", type=float, default=10.0, help="after which no step begins")
    parser.add_argument("--out", type=Path, help="default: results/benchmarks/gpu")
    given = parser.parse_args()
    os.environ.pop(FOLDER, None)  # nothing is read that an earlier run has kept
    try:
        settings = Settings(resolve_device(given.device), given.device == "cpu")
    except ValueError as error:
        parser.error(f"{error}; --device cpu runs everything small")
    kind = settings.device.type
    out = given.out or ROOT / ("results" if kind == "cuda" else "build") / "benchmarks" / "gpu"
    journal = Journal(out / f"steps-{fingerprint(settings)}.jsonl")
    record = surroundings(given.device, speed.PACKAGES)
    steps = [*chain(right.steps(settings), limits.steps(settings), speed.steps(settings))]
    gc.freeze()  # timing collects garbage before each call, and need not go through the packages
    end = time.monotonic() + 60 * given.minutes
    left = 0
    try:
        for key, step in progress(steps, "steps", len(steps)):
            if key in journal.rows or time.monotonic() <= end:
                journal.do(key, step)
            else:
                left += 1
    finally:
        report(journal, out, record)
    print(out / "page.md")
    if left:
        print(f"{left} of {len(steps)} steps are left: the same command goes on with them")


if __name__ == "__main__":
    main()

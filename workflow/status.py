"""What ran, when, how long, and what failed: `status.py GRID` writes a row for each cell.

It is read off the records and the attempts of the cells, and is a page of the book; of a grid that
failed it lies beside the logs.
"""

import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

from attempts import Attempt, read_attempts
from cells import KERNEL_DIED, Layout, commit_of
from grids import read_grid

from pai_utils.support.stored import write_atomically

COLUMNS = (
    "cell",
    "state",
    "started, UTC",
    "minutes",
    "memory, MiB",
    "device",
    "commit",
    "starts",
    "what failed",
)


def status(layout: Layout, *, over: bool = False) -> list[dict[str, Any]]:
    """Return one row a cell of the grid, in its order, with keys of `COLUMNS`.

    Args:
        layout: of the grid.
        over: whether nothing of it runs any more.
    """
    cells = read_grid(layout.grid_file)
    attempts = read_attempts(layout.attempts, cells, over=over)
    return [_row(layout, cell, attempts[cell]) for cell in cells]


def _row(layout: Layout, cell: str, attempts: list[Attempt]) -> dict[str, Any]:
    finished = (layout.executed / f"{cell}.ipynb").is_file()
    last = attempts[-1] if attempts else None
    state = "finished" if finished else last.outcome if last else "not started"
    row: dict[str, Any] = {"cell": cell, "state": state, "starts": len(attempts)}
    if last is not None:
        row |= {
            "started, UTC": f"{last.started:%Y-%m-%d %H:%M}",
            "minutes": None if last.seconds is None else round(last.seconds / 60, 1),
            "device": last.host if not finished else "",
        }
    path = layout.executed / cell / "record.json"
    if finished and path.is_file():
        record = json.loads(path.read_text(encoding="utf-8"))
        row |= {
            "memory, MiB": record.get("peak_memory_mib"),
            "device": record.get("device", ""),
            "commit": commit_of(record),
        }
    row["what failed"] = "; ".join(
        f"{this.started:%H:%M} {this.outcome}: {_in_short(this)}"
        for this in attempts
        if this.outcome in ("failed", "killed", "stopped")
    )
    return row


def _in_short(this: Attempt, most: int = 120) -> str:
    error = this.error
    if not error and this.outcome == "killed":
        error = "its process is gone"
    text = " ".join((error or KERNEL_DIED).split())
    return text if len(text) <= most else text[: most - 1] + "…"


def write_status(layout: Layout, path: Path | None = None, *, over: bool = False) -> Path:
    """Write the table, beside the logs unless told where, and return its path."""
    path = layout.logs / "status.csv" if path is None else path
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(status(layout, over=over))
    write_atomically(path, text.getvalue().encode())
    return path


if __name__ == "__main__":
    print(write_status(Layout(sys.argv[1])))

"""What ran, when, how long, and what failed: `status.py GRID` writes a row for each cell.

It is read off the records and the attempts of the cells, and is a page of the book; of a grid that
failed it lies beside the logs.
"""

import csv
import io
import json
import sys
from datetime import datetime
from pathlib import Path

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


def write_status(layout: Layout, path: Path | None = None, *, over: bool = False) -> Path:
    """Write the table, a row for each cell of the grid in its order, and return its path.

    Args:
        layout: of the grid.
        path: to write; by default beside the logs.
        over: whether nothing of it runs any more.
    """
    path = layout.logs / "status.csv" if path is None else path
    attempts = read_attempts(layout.attempts, read_grid(layout.grid_file), over=over)
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(_row(layout, cell, starts) for cell, starts in attempts.items())
    write_atomically(path, text.getvalue().encode())
    return path


def _row(layout: Layout, cell: str, attempts: list[Attempt]) -> dict[str, object]:
    finished = (layout.executed / f"{cell}.ipynb").is_file()
    last: Attempt = attempts[-1] if attempts else {"outcome": "not started"}
    state = "finished" if finished else last["outcome"]
    row: dict[str, object] = {"cell": cell, "state": state, "starts": len(attempts)}
    if attempts:
        row["started, UTC"] = f"{datetime.fromisoformat(last['started']):%Y-%m-%d %H:%M}"
        row["minutes"] = round(last["seconds"] / 60, 1) if "seconds" in last else None
        row["device"] = "" if finished else last["host"]
    path = layout.executed / cell / "record.json"
    if finished and path.is_file():
        record = json.loads(path.read_text(encoding="utf-8"))
        row["memory, MiB"] = record.get("peak_memory_mib")
        row["device"] = record.get("device", "")
        row["commit"] = commit_of(record)
    failed = [each for each in attempts if each["outcome"] in ("failed", "killed", "stopped")]
    row["what failed"] = "; ".join(
        f"{datetime.fromisoformat(each['started']):%H:%M} {each['outcome']}: {_in_short(each)}"
        for each in failed
    )
    return row


def _in_short(this: Attempt, most: int = 120) -> str:
    gone = "its process is gone" if this["outcome"] == "killed" else KERNEL_DIED
    text = " ".join((this.get("error") or gone).split())
    return text if len(text) <= most else text[: most - 1] + "…"


if __name__ == "__main__":
    print(write_status(Layout(sys.argv[1])))

"""Where the files of a grid's cells are, and what is wrong with an executed copy.

A *site* is the folder that Jupyter Book renders.
"""

import json
import os
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

BOOK_GRID = "book"
NOTEBOOKS = Path("notebooks")
CACHE = Path("build/cache")  # of what several cells need
KERNEL_DIED = "its kernel died or was stopped; was there enough memory?"
SITE_SOURCES = ("_config.yml", "_toc.yml", "book", "results")


class Layout:
    """Where one grid's files are, relative to the folder that holds `notebooks/` and `book/`."""

    def __init__(self, grid: str) -> None:
        self.grid = grid
        self.grid_file = Path("workflow/grids") / f"{grid}.yaml"
        # Only the grid `book` touches the reader's book.
        self.site = Path() if grid == BOOK_GRID else Path("build") / grid
        self.executed = self.site / "book" / "executed"  # copies, and what they wrote
        self.status = self.executed / "status.csv"  # what ran, for the book
        self.index = self.site / "_build" / "html" / "index.html"  # the page to open
        self.logs = Path("build") / "logs" / grid  # also of running and failed copies
        self.attempts = self.logs / "attempts"  # what came of every start of a cell
        self.scores = self.logs / "scores"  # of cells whose scores are a job of their own
        self.plan = Path("build") / "plans" / f"{grid}.json"


def commit_of(record: Mapping[str, Any]) -> str:
    """Return the commit that a run's record names, in short, and whether there was more."""
    commit = record.get("commit")
    if not commit:
        return ""
    return str(commit)[:10] + ("" if record.get("clean") else ", changed")


def use_cache() -> None:
    """Let this process and its children keep what they compute where others find it."""
    os.environ.setdefault("PAI_CACHE", str(CACHE.resolve()))


def with_device(parameters: Mapping[str, Any], device: str | None) -> dict[str, Any]:
    """Return parameters with a device in the place of `auto`, if there is one."""
    chosen = device if device and parameters.get("device", "auto") == "auto" else None
    return {**parameters, **({"device": chosen} if chosen else {})}


def stop_with_parent() -> None:
    """End this process when its parent dies, so that nothing writes after the workflow."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGINT)
        # An interrupt can get lost in a callback. A kernel ends by itself without its parent.
        time.sleep(10)
        os._exit(128 + signal.SIGINT)

    threading.Thread(target=watch, daemon=True).start()


def last_error(notebook: Path) -> str | None:
    """Return the last error among a notebook's outputs as `name: message`, or None."""
    try:
        errors = _error_outputs(json.loads(notebook.read_text(encoding="utf-8")))
    except ValueError:  # it never began
        return None
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

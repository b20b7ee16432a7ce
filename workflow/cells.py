"""Where the files of a grid's cells are, and what is wrong with an executed copy.

A *grid* is a file `workflow/grids/<name>.yaml` (see `pai_utils.grids`). A *site* is the folder that
Jupyter Book renders.
"""

import json
import os
import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BOOK_GRID = "book"
KERNEL_DIED = "its kernel died or was stopped; was there enough memory?"
SITE_SOURCES = ("_config.yml", "_toc.yml", "book", "results")


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
    def status(self) -> Path:
        """The table of what ran, for the book."""
        return self.executed / "status.csv"

    @property
    def index(self) -> Path:
        """The page to open."""
        return self.site / "_build" / "html" / "index.html"

    @property
    def logs(self) -> Path:
        """The folder of running and failed copies and of the renderer's log."""
        return Path("build") / "logs" / self.grid

    @property
    def attempts(self) -> Path:
        """The folder that says of every start of a cell what came of it."""
        return self.logs / "attempts"

    @property
    def plan(self) -> Path:
        """The file of `planned.py`."""
        return Path("build") / "plans" / f"{self.grid}.json"

    @property
    def library(self) -> Path:
        """The file of checksums of all that cells depend on beside their notebook."""
        return Path("build") / "plans" / f"{self.grid}.library"

    @property
    def shared(self) -> Path:
        """The folder of what several cells need."""
        return Path("build") / "shared" / self.grid


def commit_of(record: Mapping[str, Any]) -> str:
    """Return the commit that a run's record names, in short, and whether there was more."""
    commit = record.get("commit")
    if not commit:
        return ""
    return str(commit)[:10] + ("" if record.get("clean") else ", changed")


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

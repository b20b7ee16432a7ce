"""What came of every start of a cell, kept when the cell's process is not there any more.

A start adds a line to the file `ATTEMPTS/CELL.jsonl`, and another when it ends. One whose process
was killed has no second line; whoever reads it sees that the process is gone, or that a later start
began.
"""

import json
import os
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

Attempt = dict[str, Any]
"""`started, host, process, outcome`; once it ended also `seconds` and `error`."""


@contextmanager
def attempt(folder: Path, cell: str) -> Iterator[Attempt]:
    """Record an attempt; the caller sets its `outcome` and `error`; an exception is a failure."""
    begin = time.monotonic()
    path = folder / f"{cell}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    started = datetime.now(UTC).isoformat()
    this = {"started": started, "host": socket.gethostname(), "process": os.getpid()}
    _add(path, {**this, "outcome": "running"})
    end: Attempt = {"error": ""}
    try:
        yield end
    except BaseException as error:
        end["outcome"] = "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
        end["error"] = end["error"] or f"{type(error).__name__}: {error}".strip(": ")
        raise
    finally:
        end["seconds"] = round(time.monotonic() - begin, 1)
        # A full disk is what may have ended the cell; its own error matters more.
        with suppress(OSError):
            _add(path, {**this, **end})


def _add(path: Path, entry: Attempt) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def read_attempts(
    folder: Path, cells: Iterable[str], *, over: bool = False
) -> dict[str, list[Attempt]]:
    """Return each cell's attempts, the earliest first; those whose process is gone are killed.

    Args:
        folder: of all attempts.
        cells: to look for.
        over: whether nothing runs any more, wherever it was started.
    """
    found: dict[str, list[Attempt]] = {}
    for cell in cells:
        path = folder / f"{cell}.jsonl"
        attempts: dict[tuple[str, int], Attempt] = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            with suppress(ValueError):  # half a line, of a full disk
                this = json.loads(line)
                attempts[this["started"], this["process"]] = this
        found[cell] = list(attempts.values())
        for this in found[cell]:
            if this["outcome"] == "running":
                alive = not over and this is found[cell][-1] and _lives(this)
                this["outcome"] = "running" if alive else "killed"
    return found


def _lives(this: Attempt) -> bool:
    """Whether the process is there, as far as one can see from this computer."""
    if this["host"] != socket.gethostname():
        return True
    try:
        os.kill(this["process"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True

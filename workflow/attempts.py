"""What came of every start of a cell, kept when the cell's process is not there any more.

Each start writes a file `ATTEMPTS/CELL/TIME.json`, again when it ends. One whose process was killed
stays `running`; whoever reads it sees that the process is gone, or that a later attempt began.
"""

import json
import os
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, Self

from pai_utils.support.stored import write_atomically

Outcome = Literal["running", "finished", "failed", "stopped", "killed"]


@dataclass
class Attempt:
    """One start of a cell."""

    cell: str
    started: datetime
    host: str
    process: int
    outcome: Outcome = "running"
    seconds: float | None = None  # None: it never said
    error: str = ""

    def write(self, path: Path) -> None:
        """Write it, all of it or nothing."""
        content = {**asdict(self), "started": self.started.isoformat()}
        write_atomically(path, json.dumps(content).encode())

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what was written."""
        content = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**content, "started": datetime.fromisoformat(content["started"])})


@contextmanager
def attempt(folder: Path, cell: str) -> Iterator[Attempt]:
    """Record an attempt; the caller sets its `outcome` and `error`; an exception is a failure."""
    begin = time.monotonic()
    this = Attempt(
        cell=cell, started=datetime.now(UTC), host=socket.gethostname(), process=os.getpid()
    )
    path = folder / cell / f"{this.started:%Y%m%dT%H%M%S.%fZ}.json"
    this.write(path)
    try:
        yield this
    except BaseException as error:
        this.outcome = "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
        this.error = this.error or f"{type(error).__name__}: {error}".strip(": ")
        raise
    finally:
        this.seconds = round(time.monotonic() - begin, 1)
        # A full disk is what may have ended the cell; its own error matters more.
        with suppress(OSError):
            this.write(path)


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
        attempts = [Attempt.read(path) for path in sorted((folder / cell).glob("*.json"))]
        for this in attempts:
            if this.outcome == "running" and (over or this is not attempts[-1] or not _lives(this)):
                this.outcome = "killed"
        found[cell] = attempts
    return found


def _lives(this: Attempt) -> bool:
    """Whether the process is there, as far as one can see from this computer."""
    if this.host != socket.gethostname():
        return True
    try:
        os.kill(this.process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True

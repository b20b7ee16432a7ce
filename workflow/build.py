"""Build a book: `python workflow/build.py GRID` runs a grid's cells and renders their site.

Call it in the folder that holds `notebooks/`, `pai_utils/` and `book/`. Options after the grid's
name that this command does not know go to Snakemake, such as `--cores 4` or `--forceall`.
"""

import argparse
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TextIO

from cells import BOOK_GRID, Layout, last_error

from pai_utils.grids import read_grid

HERE = Path(__file__).resolve().parent
TARGETS = ("rendered", "executed")


def hold_lock(path: Path) -> TextIO:
    """Return an open lock file, free again when this process and Snakemake have ended.

    Raises:
        ValueError: Another run holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.open("w", encoding="utf-8")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise ValueError("this grid is being run already; wait for that run or stop it") from None
    return lock


def snakemake(target: str, grid: str, profile: Path, options: list[str], lock: TextIO) -> int:
    """Run Snakemake and return its exit status.

    Raises:
        KeyboardInterrupt: The run was stopped; Snakemake has ended.
    """
    command = [sys.executable, "-m", "snakemake", target]
    command += ["--snakefile", str(HERE / "Snakefile"), "--profile", str(profile)]
    command += ["--config", f"grid={grid}", "--logger", "book"]
    # Snakemake's own lock outlives a killed run; this command's ends with it.
    command += ["--nolock", *options]
    path = os.pathsep.join(filter(None, [str(HERE / "plugins"), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path}
    # A group of its own, so that one signal stops Snakemake together with its cells.
    process = subprocess.Popen(command, env=environment, pass_fds=[lock.fileno()], process_group=0)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return process.wait()
    except KeyboardInterrupt:
        os.killpg(process.pid, signal.SIGINT)
        process.wait()
        raise


def failures(layout: Layout) -> list[str]:
    """Return two lines for each cell that failed: its error and where to read it."""
    lines = []
    for name in read_grid(layout.grid_file):
        log = layout.logs / f"{name}.ipynb"
        if (layout.executed / f"{name}.ipynb").exists() or not log.exists():
            continue
        error = last_error(log) or "its kernel died or was stopped; was there enough memory?"
        lines += [f"{name}: {error}", f"  read it as far as it ran: {log}"]
    return lines


def build(target: str, layout: Layout, profile: Path, options: list[str]) -> int:
    """Bring a target up to date, say what came of it, and return the exit status."""
    read_grid(layout.grid_file)
    with hold_lock(Path(".snakemake") / f"{layout.grid}.lock") as lock:
        before = _age(layout.index)
        status = snakemake(target, layout.grid, profile, options, lock)
    if status != 0:
        print(*failures(layout), f"{layout.grid}: failed", sep="\n", file=sys.stderr)
        return 1
    what = "book" if layout.grid == BOOK_GRID else f"{layout.grid} book"
    if target == "executed":
        print(f"Every cell is executed: {layout.executed}")
    elif _age(layout.index) == before:
        print(f"Nothing to do: the {what} is up to date at {layout.index.resolve().as_uri()}")
    else:
        print(f"Open the {what}: {layout.index.resolve().as_uri()}")
    return 0


def _age(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None


def main() -> int:
    """Build what the command line names."""
    parser = argparse.ArgumentParser(description="Run a grid's cells and render their book.")
    parser.add_argument("grid", help="the name of a file in workflow/grids")
    parser.add_argument("--target", choices=TARGETS, default=TARGETS[0])
    parser.add_argument("--profile", type=Path, default=HERE / "profiles" / "local")
    arguments, options = parser.parse_known_args()
    try:
        return build(arguments.target, Layout(arguments.grid), arguments.profile, options)
    except ValueError as error:
        print(f"{arguments.grid}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{arguments.grid}: stopped; the next run keeps what is finished", file=sys.stderr)
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())

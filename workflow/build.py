"""Build a book: `python workflow/build.py GRID` runs a grid's cells and renders their site.

Call it in the folder that holds `notebooks/`, `pai_utils/` and `book/`. Options after the grid's
name that this command does not know go to Snakemake, such as `--cores 4` or `--forceall`.
"""

import argparse
import fcntl
import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

from attempts import read_attempts
from cells import BOOK_GRID, KERNEL_DIED, Layout, last_error
from machine import gpus, memory_mib
from planned import read_plan
from status import write_status

from pai_utils.support.written import read_yaml

HERE = Path(__file__).resolve().parent
ENGINES = Path(sys.prefix) / "cluster"
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


def settings(profile: Path, given: list[str]) -> list[str]:
    """Return Snakemake's options for a profile, the computer, and values `name=value` given.

    Raises:
        ValueError: There is no such profile.
    """
    path = profile / "config.yaml"
    if not path.is_file():
        names = sorted(p.name for p in profile.parent.glob("*") if p.is_dir())
        raise ValueError(f"there is no profile {profile.name!r}; there are: {', '.join(names)}")
    content = read_yaml(path.read_text(encoding="utf-8"))
    # Options of a command take the place of a profile's, so its values are said again.
    values = dict(entry.split("=", 1) for entry in content.get("config", []))
    limits = {}
    if content.get("executor", "local") != "local":
        _require_engine(content["executor"])
    else:
        count = len(gpus())
        most = memory_mib() * 9 // 10
        limits = {"mem_mb": most, "gpu": count}
        found = {"most_mib": most, "gpus": count, "tflops": 20 if count else 0.1}
        values = {**found, **({"gpu": 1, "hold_gpus": 1} if count else {}), **values}
    for entry in given:
        name, separator, value = entry.partition("=")
        if not separator:
            raise ValueError(f"--config takes NAME=VALUE, not {entry!r}")
        values[name] = value
    listed = [f"{name}={value}" for name, value in values.items()]
    options = ["--profile", str(profile), "--config", *listed]
    if limits:
        options += ["--resources", *(f"{name}={value}" for name, value in limits.items())]
    return options


def _require_engine(name: str) -> None:
    """Refuse a profile whose engine is not installed, after a look where `make cluster` puts it."""
    if ENGINES.is_dir():
        sys.path.append(str(ENGINES))
    if importlib.util.find_spec(f"snakemake_executor_plugin_{name.replace('-', '_')}") is None:
        raise ValueError(
            f"the engine {name!r} is not installed: run `make cluster`, or "
            "pip install 'pai-utils[cluster]'"
        )


def snakemake(target: str, configured: list[str], options: list[str], lock: TextIO) -> int:
    """Run Snakemake and return its exit status.

    Raises:
        KeyboardInterrupt: The run was stopped; Snakemake has ended.
    """
    command = [sys.executable, "-m", "snakemake", target]
    command += ["--snakefile", str(HERE / "Snakefile"), *configured, "--logger", "book"]
    # Snakemake's own lock outlives a killed run; this command's ends with it.
    command += ["--nolock", *options]
    places = [str(HERE / "plugins"), os.environ.get("PYTHONPATH")]
    if str(ENGINES) in sys.path:
        places.append(str(ENGINES))
    path = os.pathsep.join(filter(None, places))
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


def failures(layout: Layout, cells: Iterable[str]) -> list[str]:
    """Return two lines for each cell that failed: its error, and where to read more."""
    lines = []
    for name, attempts in read_attempts(layout.attempts, cells, over=True).items():
        log, scores = layout.logs / f"{name}.ipynb", layout.scores / f"{name}.log"
        if (layout.executed / f"{name}.ipynb").exists():
            continue
        if attempts:
            error = attempts[-1].get("error") or (log.is_file() and last_error(log)) or KERNEL_DIED
            lines += [f"{name}: {error}", f"  read it as far as it ran: {log}"]
        elif scores.exists():
            text = scores.read_text(encoding="utf-8", errors="replace").strip() or KERNEL_DIED
            lines += [f"{name}: {text.splitlines()[-1]}", f"  read it: {scores}"]
    return lines


def build(target: str, layout: Layout, configured: list[str], options: list[str]) -> int:
    """Bring a target up to date, say what came of it, and return the exit status."""
    cells = read_plan(layout)
    with hold_lock(Path(".snakemake") / f"{layout.grid}.lock") as lock:
        before = _age(layout.index)
        if {"-n", "--dry-run", "--dryrun"} & set(options):
            status = snakemake(target, configured, options, lock)
            print(f"Nothing was run: {len(cells)} cells are planned")
            return status
        try:
            status = snakemake(target, configured, options, lock)
        finally:
            table = write_status(layout, over=True)
    if status != 0:
        print(*failures(layout, cells), f"{layout.grid}: failed", sep="\n", file=sys.stderr)
        print(f"What ran and what failed: {table}", file=sys.stderr)
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
    parser.add_argument(
        "--profile",
        type=lambda name: HERE / "profiles" / name if "/" not in name else Path(name),
        default="local",
        help="local, slurm, kubernetes, or the path of a folder",
    )
    parser.add_argument(
        "--config",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="what a profile sets under `config`, such as gpu=0 or tflops=50",
    )
    arguments, options = parser.parse_known_args()
    try:
        configured = settings(arguments.profile, [f"grid={arguments.grid}", *arguments.config])
        return build(arguments.target, Layout(arguments.grid), configured, options)
    except (ValueError, FileNotFoundError) as error:  # of a grid, of a folder of images
        print(f"{arguments.grid}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{arguments.grid}: stopped; the next run keeps what is finished", file=sys.stderr)
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())

"""Render a site: `render.py SITE --executed COPY... --log FILE`.

Run in the folder that holds the book's sources. A site elsewhere gets a copy of them first, so
that rendering it leaves the reader's book alone. Every warning is an error.
"""

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

from cells import SITE_SOURCES, problems


def stage(site: Path) -> None:
    """Make the site's copy of the book's sources equal to the sources; keep its executed copies.

    Raises:
        ValueError: The sources are not in the current folder.
    """
    for source in map(Path, SITE_SOURCES[:3]):
        if not source.exists():
            raise ValueError(f"{source} is missing: this is not the folder of the book's sources")
    for source in map(Path, SITE_SOURCES):
        if source.is_file():
            shutil.copyfile(source, site / source)
        elif source.is_dir():
            _mirror(source, site / source)


def _mirror(source: Path, target: Path) -> None:
    for entry in target.iterdir() if target.is_dir() else ():
        if entry.name == "executed":
            continue
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    ignore = shutil.ignore_patterns("executed", "__pycache__", ".*")
    shutil.copytree(source, target, ignore=ignore, dirs_exist_ok=True)


def render(site: Path, log: Path) -> bool:
    """Render the site from nothing, with the renderer's output in `log`; True if it succeeded."""
    # An incremental build is silent about warnings in pages it does not read again.
    for folder in ("html", ".doctrees"):
        shutil.rmtree(site / "_build" / folder, ignore_errors=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    program = Path(sys.executable).with_name("jupyter-book")
    command = [str(program), "build", str(site), "-n", "-W", "--keep-going"]
    with log.open("wb") as stream:
        return subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT).returncode == 0


def complaints(log: Path) -> list[str]:
    """Return the lines of the renderer's output that say what is wrong, or its last lines."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", log.read_text(encoding="utf-8", errors="replace"))
    lines = [line for line in text.splitlines() if line.strip()]
    found = [line for line in lines if re.search(r"\b(WARNING|ERROR|CRITICAL|Error)\b", line)]
    return list(dict.fromkeys(found)) or lines[-20:]


def main() -> int:
    """Render the site that the command line names; 0 if it has no problem."""
    parser = argparse.ArgumentParser(description="Render a site.")
    parser.add_argument("site", type=Path)
    parser.add_argument("--executed", type=Path, nargs="+", required=True)
    parser.add_argument("--log", type=Path, required=True)
    arguments = parser.parse_args()

    found = [line for copy in arguments.executed for line in problems(copy)]
    if found:
        print("These executed copies cannot be in the book:", *found, sep="\n  ", file=sys.stderr)
        return 1
    if arguments.site.resolve() != Path.cwd():
        stage(arguments.site)
    if not render(arguments.site, arguments.log):
        lines = complaints(arguments.log)
        print(f"Rendering failed, see {arguments.log}:", *lines, sep="\n  ", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

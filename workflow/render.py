"""Render a site: `render.py SITE --executed COPY... --log FILE`.

Run in the folder that holds the book's sources. A site elsewhere gets a copy of them first, so
that rendering it leaves the reader's book alone. Every warning is an error. A *draft* renders again
only the pages that changed, in a site of its own.
"""

import argparse
import filecmp
import re
import shutil
import subprocess
import sys
from pathlib import Path

from cells import SITE_SOURCES, problems

# What the renderer has read; what it had read when it last had no warning; a part of that, while
# it is copied or removed.
READ = (".doctrees", ".doctrees-clean", ".doctrees-part")
_, CLEAN, PART = READ


def stage(site: Path, executed: Path | None = None) -> None:
    """Make the site's copy of the book's sources equal to the sources.

    Args:
        site: The site's folder. What is equal there already keeps its date.
        executed: The folder of executed copies to show; None: those that the site has.

    Raises:
        ValueError: The sources are not in the current folder.
    """
    for source in map(Path, SITE_SOURCES[:3]):
        if not source.exists():
            raise ValueError(f"{source} is missing: this is not the folder of the book's sources")
    for source in map(Path, SITE_SOURCES):
        if source.is_dir():
            _mirror(source, site / source)
        elif source.exists():
            _copy(source, site / source)
    if executed is not None:
        link = site / "book" / "executed"
        link.unlink(missing_ok=True)
        link.symlink_to(executed.resolve(), target_is_directory=True)


def _mirror(source: Path, target: Path) -> None:
    wanted = [
        path
        for path in source.iterdir()
        if path.name not in ("executed", "__pycache__") and not path.name.startswith(".")
    ]
    kinds = {path.name: path.is_dir() for path in wanted}
    for entry in target.iterdir() if target.is_dir() else ():
        if entry.name == "executed" or kinds.get(entry.name) == entry.is_dir():
            continue
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    for path in wanted:
        if path.is_dir():
            _mirror(path, target / path.name)
        else:
            _copy(path, target / path.name)


def _copy(source: Path, target: Path) -> None:
    if not (target.exists() and filecmp.cmp(source, target, shallow=False)):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)


def render(site: Path, log: Path, *, draft: bool = False) -> bool:
    """Render the site with the renderer's output in `log`; True if it succeeded.

    Args:
        site: The site's folder.
        log: The file to write.
        draft: Whether to keep pages that did not change since the last draft without a warning.
            Their menus keep the titles that other pages had then, and the numbers of other runs.
    """
    build = site / "_build"
    # An incremental build is silent about warnings in pages it does not read again.
    if not draft or _concerns_every_page(site):
        for name in ("html", *READ):
            shutil.rmtree(build / name, ignore_errors=True)
    if draft:
        _begin_draft(build)
    log.parent.mkdir(parents=True, exist_ok=True)
    program = Path(sys.executable).with_name("jupyter-book")
    command = [str(program), "build", str(site), "-n", "-W", "--keep-going"]
    with log.open("wb") as stream:
        done = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT).returncode == 0
    if draft and done:
        (build / CLEAN).rename(build / PART)
    return done


def _concerns_every_page(site: Path) -> bool:
    """Whether the settings, the contents or the extensions changed since the pages were read."""
    environment = site / "_build" / ".doctrees" / "environment.pickle"
    sources = [site / "_config.yml", site / "_toc.yml", *site.glob("book/_ext/*.py")]
    return not environment.exists() or any(
        path.stat().st_mtime >= environment.stat().st_mtime for path in sources
    )


def _begin_draft(build: Path) -> None:
    """Go back to what was read without a warning, and keep it until this draft has none either."""
    read, clean, part = (build / name for name in READ)
    if clean.exists():
        shutil.rmtree(read, ignore_errors=True)
        clean.rename(read)
    shutil.rmtree(part, ignore_errors=True)
    read.mkdir(parents=True, exist_ok=True)
    shutil.copytree(read, part)
    part.rename(clean)


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
    parser.add_argument("--draft", action="store_true", help="only the pages that changed")
    arguments = parser.parse_args()

    found = [line for copy in arguments.executed for line in problems(copy)]
    if found:
        print("These executed copies cannot be in the book:", *found, sep="\n  ", file=sys.stderr)
        return 1
    if arguments.draft:
        stage(arguments.site, arguments.executed[0].parent)
    elif arguments.site.resolve() != Path.cwd():
        stage(arguments.site)
    if not render(arguments.site, arguments.log, draft=arguments.draft):
        lines = complaints(arguments.log)
        print(f"Rendering failed, see {arguments.log}:", *lines, sep="\n  ", file=sys.stderr)
        return 1
    if arguments.draft:
        print(f"Open the draft: {(arguments.site / '_build/html/index.html').resolve().as_uri()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

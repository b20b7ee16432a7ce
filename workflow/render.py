"""Render the site of a grid: `render.py GRID [--draft]`.

Run in the folder that holds the book's sources. A site elsewhere gets a copy of them first, so
that rendering it leaves the reader's book alone. Every warning is an error. A *draft* renders again
only the pages that changed, in a site of its own.
"""

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

from cells import SITE_SOURCES, Layout, problems
from grids import read_grid
from status import write_status

DRAFT = Path("build/draft")


def stage(site: Path, executed: Path | None = None) -> None:
    """Make the site's copy of the book's sources equal to the sources, their dates included.

    Args:
        site: The site's folder.
        executed: The folder of executed copies to show; None: those that the site has.

    Raises:
        ValueError: The sources are not in the current folder.
    """
    for source in map(Path, SITE_SOURCES[:3]):
        if not source.exists():
            raise ValueError(f"{source} is missing: this is not the folder of the book's sources")
    site.mkdir(parents=True, exist_ok=True)
    for old in [*site.glob("book/*"), *site.glob("results")]:
        if old.is_dir() and not old.is_symlink() and old.name != "executed":
            shutil.rmtree(old)
        elif old.name != "executed" or executed is not None:
            old.unlink()
    for source in map(Path, SITE_SOURCES):
        if source.is_dir():
            hidden = shutil.ignore_patterns("executed", "__pycache__", ".*")
            shutil.copytree(source, site / source, ignore=hidden, dirs_exist_ok=True)
        elif source.exists():
            shutil.copy2(source, site / source)
    if executed is not None:
        (site / "book/executed").symlink_to(executed.resolve(), target_is_directory=True)


def lend_copies(site: Path, cells: Collection[str]) -> None:
    """Let pages of cells that the grid lacks show another cell of the same notebook.

    The grid of the tests runs each notebook once, and the book has a page of it for each encoder.

    Args:
        site: The site's folder.
        cells: The names of the grid's cells.
    """
    executed = site / "book" / "executed"
    for page in re.findall(r"book/executed/(\S+)", (site / "_toc.yml").read_text("utf-8")):
        notebook = page.partition("-")[0]
        lenders = [cell for cell in cells if cell.partition("-")[0] == notebook]
        if page in cells or not lenders:
            continue
        for end in ("", ".ipynb"):
            link = executed / f"{page}{end}"
            link.unlink(missing_ok=True)
            link.symlink_to(f"{lenders[0]}{end}")


def render(site: Path, log: Path, *, draft: bool = False) -> list[str]:
    """Render the site with the renderer's output in `log`, and return its complaints.

    Args:
        site: The site's folder.
        log: The file to write.
        draft: Whether to keep pages that did not change since they were rendered. Their menus keep
            the titles that other pages had then, and the numbers of other runs.
    """
    build = site / "_build"
    if not draft or _concerns_every_page(site):
        shutil.rmtree(build / "html", ignore_errors=True)
        shutil.rmtree(build / ".doctrees", ignore_errors=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    program = Path(sys.executable).with_name("jupyter-book")
    command = [str(program), "build", str(site), "-n", "-W", "--keep-going"]
    with log.open("wb") as stream:
        if subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT).returncode == 0:
            return []
    found = complaints(log)
    # An incremental build is silent about warnings in pages that it does not read again.
    for line in found:
        page = Path(line.partition(":")[0])
        if page.is_relative_to(site.absolute()):
            read = build / ".doctrees" / page.relative_to(site.absolute())
            read.with_suffix(".doctree").unlink(missing_ok=True)
        else:
            shutil.rmtree(build / ".doctrees", ignore_errors=True)
    return found


def _concerns_every_page(site: Path) -> bool:
    """Whether the settings, the contents or the extensions changed since the pages were read."""
    environment = site / "_build" / ".doctrees" / "environment.pickle"
    sources = [site / "_config.yml", site / "_toc.yml", *site.glob("book/_ext/*.py")]
    return not environment.exists() or any(
        path.stat().st_mtime >= environment.stat().st_mtime for path in sources
    )


def complaints(log: Path) -> list[str]:
    """Return the lines of the renderer's output that say what is wrong, or its last lines."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", log.read_text(encoding="utf-8", errors="replace"))
    lines = [line for line in text.splitlines() if line.strip()]
    found = [line for line in lines if re.search(r"\b(WARNING|ERROR|CRITICAL|Error)\b", line)]
    return list(dict.fromkeys(found)) or lines[-20:]


def main() -> int:
    """Render the site that the command line names; 0 if it has no problem."""
    parser = argparse.ArgumentParser(description="Render the site of a grid.")
    parser.add_argument("grid", help="the name of a file in workflow/grids")
    parser.add_argument("--draft", action="store_true", help="only the pages that changed")
    arguments = parser.parse_args()

    layout = Layout(arguments.grid)
    cells = read_grid(layout.grid_file)
    copies = [layout.executed / f"{cell}.ipynb" for cell in cells]
    found = [line for copy in copies for line in problems(copy)]
    if found:
        print("These executed copies cannot be in the book:", *found, sep="\n  ", file=sys.stderr)
        return 1
    write_status(layout, layout.status)
    site, log = layout.site, layout.logs / "render.log"
    if arguments.draft:
        site, log = DRAFT, layout.logs / "draft.log"
        stage(site, layout.executed)
    elif site != Path():
        stage(site)
        lend_copies(site, cells)
    found = render(site, log, draft=arguments.draft)
    if found:
        print(f"Rendering failed, see {log}:", *found, sep="\n  ", file=sys.stderr)
        return 1
    if arguments.draft:
        print(f"Open the draft: {(site / '_build/html/index.html').resolve().as_uri()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Small projects with trivial notebooks, built by the real command."""

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

BUILD = Path(__file__).resolve().parents[2] / "workflow" / "build.py"
KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}

# Each cell leaves a mark of its own run, so that a test sees whether it ran again.
SOURCE = """\
import os, pathlib, time, uuid
import stub_library
if divisor is None:
    os.kill(os.getpid(), 9)
quotient = 1 / divisor
time.sleep(seconds)
(pathlib.Path(out) / "run.txt").write_text(uuid.uuid4().hex)
print(os.environ["OMP_NUM_THREADS"], "thread")
print("sees GPU", os.environ.get("CUDA_VISIBLE_DEVICES"), "as", device)
if lose:
    pathlib.Path(lose).write_text("")
(pathlib.Path(out) / "bulk").write_bytes(b"x" * bulk)
"""


RECORD = {
    "notebook": "n", "parameters": {}, "started": "2026-01-02T03:04:05+00:00",
    "seconds": 90.0, "peak_memory_mib": 700, "device": "cpu", "threads": 1,
    "platform": "Linux", "python": "3.11", "versions": {}, "commit": "0123456789abcdef",
    "clean": True, "outputs": {},
}  # fmt: skip


def store_record(folder: Path, **entries: object) -> None:
    """Put the record of a run into a folder; of its entries, those given are others."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "record.json").write_text(json.dumps({**RECORD, **entries}))


class Project:
    """A folder that `build.py` takes for the repository."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def create(self, grid: str, cells: dict[str, dict[str, object]]) -> "Project":
        """Write the sources of a book with one page for each cell."""
        for folder in ("notebooks", "pai_utils", "workflow/grids", "book"):
            (self.root / folder).mkdir(parents=True)
        (self.root / "notebooks" / "divide.ipynb").write_text(nbformat.writes(_notebook()))
        (self.root / "pai_utils" / "stub_library.py").write_text("answer = 42\n")
        (self.root / "requirements.lock").write_text("")
        (self.root / "book" / "index.md").write_text("# Divisions\n")
        config = {
            "title": "Divisions",
            "only_build_toc_files": True,
            "execute": {"execute_notebooks": "off"},
        }
        pages = [{"file": f"book/executed/{name}"} for name in cells]
        contents = {"format": "jb-book", "root": "book/index", "chapters": pages}
        (self.root / "_config.yml").write_text(yaml.safe_dump(config))
        (self.root / "_toc.yml").write_text(yaml.safe_dump(contents))
        self.write_grid(grid, cells)
        return self

    def write_grid(self, grid: str, cells: dict[str, dict[str, object]]) -> None:
        entries = {name: {"notebook": "divide", "parameters": p} for name, p in cells.items()}
        path = self.root / "workflow" / "grids" / f"{grid}.yaml"
        path.write_text(yaml.safe_dump({"cells": entries}))

    def copy(self, root: Path) -> "Project":
        shutil.copytree(self.root, root)
        return Project(root)

    @property
    def environment(self) -> dict[str, str]:
        path = os.pathsep.join(filter(None, [str(self.root / "bin"), os.environ["PATH"]]))
        return {**os.environ, "PYTHONPATH": str(self.root / "pai_utils"), "PATH": path}

    def give_gpus(self, count: int) -> Path:
        """Let a driver's program report so many GPUs: those in the file that is returned."""
        listed = self.root / "gpus.txt"
        listed.write_text("".join(f"{index}\n" for index in range(count)))
        program = self.root / "bin" / "nvidia-smi"
        program.parent.mkdir()
        program.write_text(f"#!/bin/sh\ncat '{listed}'\n")
        program.chmod(0o755)
        return listed

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, str(BUILD), *arguments]

    def build(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments),
            cwd=self.root,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
        )

    @property
    def progress(self) -> Path:
        """What a started run shows."""
        return self.root / "progress.txt"

    def start(self, *arguments: str) -> "subprocess.Popen[bytes]":
        with self.progress.open("wb") as stream:
            return subprocess.Popen(
                self.command(*arguments), cwd=self.root, env=self.environment, stderr=stream
            )

    def is_running(self, cell: str) -> bool:
        log = self.root / "build/logs/book" / f"{cell}.ipynb"
        return log.exists() and '"running"' in log.read_text()

    def attempts(self, cell: str) -> list[dict[str, Any]]:
        """Return what was recorded of every start of a cell."""
        paths = sorted((self.root / "build/logs/book/attempts" / cell).glob("*.json"))
        return [json.loads(path.read_text()) for path in paths]

    def status(self) -> dict[str, dict[str, str]]:
        """Return the rows of what ran and what failed, by cell."""
        with (self.root / "build/logs/book/status.csv").open(newline="") as file:
            return {row["cell"]: row for row in csv.DictReader(file)}

    def marks(self, executed: str = "book/executed") -> dict[str, str]:
        """Return what the last run of each published cell wrote."""
        folder = self.root / executed
        return {
            copy.stem: (folder / copy.stem / "run.txt").read_text()
            for copy in folder.glob("*.ipynb")
        }

    def files(self) -> set[str]:
        """Return every file but Snakemake's and compiled ones."""
        paths = (path.relative_to(self.root) for path in self.root.rglob("*") if path.is_file())
        left_out = {".snakemake", "__pycache__"}
        return {path.as_posix() for path in paths if not left_out & set(path.parts)}


def _notebook() -> Any:
    defaults = "divisor = 1\nseconds = 0\ndevice = 'auto'\nlose = ''\nbulk = 0\nout = '.'"
    cells = [
        new_markdown_cell("# One division"),
        new_code_cell(defaults, metadata={"tags": ["parameters"]}),
        new_code_cell(SOURCE),
    ]
    return new_notebook(cells=cells, metadata={"kernelspec": KERNEL})


@pytest.fixture
def new_project(tmp_path: Path) -> Callable[..., Project]:
    def create(cells: dict[str, dict[str, object]], grid: str = "book") -> Project:
        return Project(tmp_path / "project").create(grid, cells)

    return create


@pytest.fixture(scope="session")
def _rendered(tmp_path_factory: pytest.TempPathFactory) -> Project:
    cells: dict[str, dict[str, object]] = {"half": {"divisor": 2}, "third": {"divisor": 3}}
    project = Project(tmp_path_factory.mktemp("rendered") / "project").create("book", cells)
    result = project.build("book")
    assert result.returncode == 0, result.stderr
    return project


@pytest.fixture
def rendered(_rendered: Project, tmp_path: Path) -> Project:
    """A copy of a project whose book is up to date: the cells `half` and `third`."""
    return _rendered.copy(tmp_path / "project")

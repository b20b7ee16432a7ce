"""A small project with trivial notebooks and a library of its own, for the real command."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "workflow" / "build.py"
KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}

# Each cell leaves a mark of its own run, so that a test sees whether it ran again.
SOURCE = """\
import os, pathlib, time, uuid
from pai_utils import stub
if divisor is None:
    os.kill(os.getpid(), 9)
quotient = stub.{function}(divisor)
time.sleep(seconds)
(pathlib.Path(out) / "run.txt").write_text(uuid.uuid4().hex)
print(os.environ["OMP_NUM_THREADS"], "thread")
print("keeps in", os.environ["PAI_CACHE"])
print("sees GPU", os.environ.get("CUDA_VISIBLE_DEVICES"), "as", device)
"""
LIBRARY = '''
def divide(divisor):
    """Divide one."""
    return 1 / divisor

def negate(divisor):
    """Divide minus one."""
    return -1 / divisor
'''
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

    def __init__(self, root: Path, grid: str = "book") -> None:
        self.root = root
        self.grid = grid
        self.site = root if grid == "book" else root / "build" / grid
        self.logs = root / "build/logs" / grid
        self.index = self.site / "_build/html/index.html"

    def create(self, cells: dict[str, dict[str, object]]) -> "Project":
        """Write the sources of a book with one page for each cell."""
        for folder in ("notebooks", "pai_utils", "workflow/grids", "book"):
            (self.root / folder).mkdir(parents=True)
        for function in ("divide", "negate"):
            notebook = _notebook(SOURCE.format(function=function))
            (self.root / f"notebooks/{function}.ipynb").write_text(nbformat.writes(notebook))
        (self.root / "pai_utils/__init__.py").write_text("")
        (self.root / "pai_utils/stub.py").write_text(LIBRARY)
        (self.root / "pai_utils/support").symlink_to(ROOT / "pai_utils/support")
        (self.root / "requirements.lock").write_text("")
        (self.root / "book/index.md").write_text("# Divisions\n")
        config = {
            "title": "Divisions",
            "only_build_toc_files": True,
            "execute": {"execute_notebooks": "off"},
        }
        pages = [{"file": f"book/executed/{name}"} for name in cells]
        contents = {"format": "jb-book", "root": "book/index", "chapters": pages}
        (self.root / "_config.yml").write_text(yaml.safe_dump(config))
        (self.root / "_toc.yml").write_text(yaml.safe_dump(contents))
        self.write_grid(cells)
        return self

    def write_grid(self, cells: dict[str, dict[str, object]]) -> None:
        """Write the grid; a cell's notebook is `divide` unless its parameters say another."""
        entries = {
            name: {
                "notebook": given.get("notebook", "divide"),
                "parameters": {key: value for key, value in given.items() if key != "notebook"},
            }
            for name, given in cells.items()
        }
        path = self.root / "workflow/grids" / f"{self.grid}.yaml"
        path.write_text(yaml.safe_dump({"cells": entries}))

    def copy(self, root: Path) -> "Project":
        shutil.copytree(self.root, root, symlinks=True)
        return Project(root, self.grid)

    def edit(self, path: str, old: str, new: str) -> None:
        """Replace text in a source."""
        text = (self.root / path).read_text()
        assert old in text
        (self.root / path).write_text(text.replace(old, new))

    @property
    def environment(self) -> dict[str, str]:
        path = os.pathsep.join([str(self.root / "bin"), os.environ["PATH"]])
        return {**os.environ, "PYTHONPATH": str(self.root), "PATH": path}

    def give_gpus(self, count: int) -> None:
        """Let a driver's program report so many GPUs."""
        program = self.root / "bin" / "nvidia-smi"
        program.parent.mkdir()
        program.write_text(f"#!/bin/sh\nseq 0 {count - 1}\n")
        program.chmod(0o755)

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, str(BUILD), self.grid, *arguments]

    def build(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments),
            cwd=self.root,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def execute(self, *arguments: str) -> None:
        """Bring all cells up to date."""
        result = self.build("--target", "executed", *arguments)
        assert result.returncode == 0, result.stderr

    @property
    def progress(self) -> Path:
        """What a started run shows."""
        return self.root / "progress.txt"

    def start(self, *arguments: str) -> "subprocess.Popen[bytes]":
        with self.progress.open("wb") as stream:
            return subprocess.Popen(
                self.command("--target", "executed", *arguments),
                cwd=self.root,
                env=self.environment,
                stderr=stream,
            )

    def is_running(self, cell: str) -> bool:
        log = self.logs / f"{cell}.ipynb"
        return log.exists() and '"running"' in log.read_text()

    def process(self, cell: str) -> int:
        """The process of a cell's last start."""
        lines = (self.logs / "attempts" / f"{cell}.jsonl").read_text().splitlines()
        process: int = json.loads(lines[-1])["process"]
        return process

    def status(self) -> dict[str, dict[str, str]]:
        """The rows of what ran and what failed, by cell."""
        with (self.logs / "status.csv").open(newline="") as file:
            return {row["cell"]: row for row in csv.DictReader(file)}

    def marks(self) -> dict[str, str]:
        """What the last run of each published cell wrote."""
        folder = self.site / "book/executed"
        return {
            copy.stem: (folder / copy.stem / "run.txt").read_text()
            for copy in folder.glob("*.ipynb")
        }

    def files(self) -> set[str]:
        """Every file but Snakemake's and compiled ones."""
        paths = (path.relative_to(self.root) for path in self.root.rglob("*") if path.is_file())
        left_out = {".snakemake", "__pycache__"}
        return {path.as_posix() for path in paths if not left_out & set(path.parts)}


def _notebook(source: str) -> Any:
    defaults = "divisor = 1\nseconds = 0\ndevice = 'auto'\nout = '.'"
    cells = [
        new_markdown_cell("# One division"),
        new_code_cell(defaults, metadata={"tags": ["parameters"]}),
        new_code_cell(source),
    ]
    return new_notebook(cells=cells, metadata={"kernelspec": KERNEL})


@pytest.fixture(scope="session")
def _rendered(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = Project(tmp_path_factory.mktemp("rendered") / "project").create(
        {
            "half": {"divisor": 2},
            "third": {"divisor": 3, "notebook": "negate"},
            "fifth": {"divisor": 5},
        }
    )
    result = project.build()
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"Open the book: {project.index.as_uri()}\n"
    return project


@pytest.fixture
def rendered(_rendered: Project, tmp_path: Path) -> Project:
    """A copy, in another folder, of a project whose book is up to date."""
    return _rendered.copy(tmp_path / "project")

"""The command that runs a grid and renders its book."""

import fcntl
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from build import main
from cells import Layout
from planned import read_plan

from tests.workflow.conftest import Project

pytestmark = [pytest.mark.engine, pytest.mark.xdist_group("engine")]


@pytest.fixture
def new_project(tmp_path: Path) -> Callable[..., Project]:
    return lambda cells, grid="book": Project(tmp_path / "project", grid).create(cells)


class TestOfARenderedBook:
    """What a second call does, depending on what changed."""

    def test_new_dates_and_another_folder_re_run_nothing(self, rendered: Project) -> None:
        marks = rendered.marks()
        for folder in ("notebooks", "pai_utils", "book", "workflow/grids"):
            for path in (rendered.root / folder).glob("*.*"):
                path.touch()
        begin = os.times()
        result = rendered.build()
        address = rendered.index.as_uri()
        assert result.stdout == f"Nothing to do: the book is up to date at {address}\n"
        assert rendered.marks() == marks
        # Processor time, because the promise of 10 s is for a computer that does nothing else.
        end = os.times()
        spent = (
            end.children_user + end.children_system - begin.children_user - begin.children_system
        )
        assert spent < 10

    def test_changed_docstrings_and_pages_are_rendered_and_run_no_cell(
        self, rendered: Project
    ) -> None:
        before = rendered.marks()
        rendered.edit("pai_utils/stub.py", "Divide one.", "Return one over the divisor.")
        rendered.edit("book/index.md", "Divisions", "Quotients")
        result = rendered.build()
        assert result.stdout.startswith("Open the book: file://"), result.stderr
        assert rendered.marks() == before
        assert "Quotients" in (rendered.root / "_build/html/book/index.html").read_text()

    def test_a_change_re_runs_the_cells_that_depend_on_it(self, rendered: Project) -> None:
        before = rendered.marks()
        rendered.edit("pai_utils/stub.py", "return -1", "return -2")
        rendered.edit("workflow/grids/book.yaml", "divisor: 5", "divisor: 5.5")
        rendered.execute()
        after = rendered.marks()
        assert {cell for cell in before if before[cell] != after[cell]} == {"third", "fifth"}

    def test_cells_have_one_thread_a_cache_in_common_and_no_place_of_their_own(
        self, rendered: Project
    ) -> None:
        copies = [
            (rendered.root / f"book/executed/{n}.ipynb").read_text() for n in rendered.marks()
        ]
        kept = {re.findall(r"keeps in ([^\\]+)", copy)[-1] for copy in copies}
        assert len(kept) == 1
        assert kept.pop().endswith("build/cache")
        for copy in copies:
            assert "1 thread" in copy
            assert 'out = \\"book/executed/' in copy


def test_failed_killed_and_stopped_cells_let_others_go_on_and_the_next_run_resumes(
    new_project: Callable[..., Project], monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = {"seconds": 60}
    cells = {"dead": {"divisor": None}, "killed": slow, "long": {}, "one": {}, "stopped": slow}
    project = new_project({**cells, "zero": {"divisor": 0}}, "smoke")
    before = project.files()
    # A cell whose score takes hours gets several GPUs for it; this notebook has no score.
    monkeypatch.chdir(project.root)
    layout = Layout("smoke")
    read_plan(layout)
    plan = json.loads(layout.plan.read_text())
    plan["cells"]["long"]["score_hours"] = 5
    layout.plan.write_text(json.dumps(plan))
    with project.start("--cores", "6", "--config", "gpus=2", "tflops=20") as process:
        _wait_until(lambda: project.is_running("killed") and project.is_running("stopped"))
        os.kill(project.process("killed"), signal.SIGKILL)
        os.kill(project.process("stopped"), signal.SIGTERM)  # as a cluster ends jobs
    assert process.returncode == 1
    shown = project.progress.read_text()
    assert "Traceback" not in shown
    for line in (
        "FAILED    zero",
        "zero: ZeroDivisionError: division by zero",
        "read it as far as it ran: build/logs/smoke/zero.ipynb",
        "dead: its kernel died or was stopped",
        "read it: build/logs/smoke/scores/long.log",
        "What ran and what failed: build/logs/smoke/status.csv",
    ):
        assert line in shown
    rows = project.status()
    assert {cell: row["state"] for cell, row in rows.items()} == {
        "dead": "failed",
        "killed": "killed",
        "long": "not started",
        "one": "finished",
        "stopped": "stopped",
        "zero": "failed",
    }
    assert "ZeroDivisionError: division by zero" in rows["zero"]["what failed"]
    assert "quotient = " in (project.logs / "zero.ipynb").read_text()
    marks = project.marks()
    assert set(marks) == {"one"}
    assert not (project.site / "book/executed/zero").exists()
    # The reader's book is another.
    assert {path.split("/")[0] for path in project.files() - before} == {"build", "progress.txt"}

    project.write_grid({cell: {} for cell in rows})
    project.execute("--cores", "6")
    assert set(project.marks()) == set(rows)
    assert project.marks()["one"] == marks["one"]
    row = project.status()["killed"]
    assert (row["state"], row["starts"]) == ("finished", "2")
    assert "killed: its process is gone" in row["what failed"]


def test_cells_end_with_snakemake_and_the_next_run_resumes(
    new_project: Callable[..., Project],
) -> None:
    project = new_project({"quick": {}, "slow": {"seconds": 60}})
    with project.start("--cores", "2") as process:
        _wait_until(lambda: "finished  quick" in project.progress.read_text())
        _wait_until(lambda: project.is_running("slow"))
        snakemake, *cell = _descendants(process.pid)
        assert cell
        os.kill(snakemake, signal.SIGKILL)
    assert process.returncode == 1
    _wait_until(lambda: not set(_parents()) & set(cell))
    mark = project.marks()["quick"]
    assert set(project.marks()) == {"quick"}

    project.write_grid({"quick": {}, "slow": {"seconds": 0}})
    project.execute()
    assert set(project.marks()) == {"quick", "slow"}
    assert project.marks()["quick"] == mark


def test_cells_are_spread_over_the_gpus_of_a_computer(new_project: Callable[..., Project]) -> None:
    cells = {f"cell{index}": {"seconds": 2} for index in range(4)}
    project = new_project(cells)
    project.give_gpus(2)
    project.execute("--cores", "4")
    seen = []
    for name in cells:
        copy = (project.root / f"book/executed/{name}.ipynb").read_text()
        seen += re.findall(r"sees GPU (\w+) as (\w+)", copy)
    assert len(seen) == 4  # whose turn is next depends on when each is done
    assert set(seen) == {("0", "cuda"), ("1", "cuda")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bok"], "there is no grid 'bok'; there are: book"),
        (
            ["book", "--profile", "slrum"],
            "there is no profile 'slrum'; there are: kubernetes, local, slurm",
        ),
        (["book", "--config", "gpu"], "--config takes NAME=VALUE, not 'gpu'"),
        (["book"], "this grid is being run already"),
    ],
)
def test_what_cannot_be_run_is_refused(
    new_project: Callable[..., Project],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    project = new_project({"half": {"divisor": 2}})
    monkeypatch.chdir(project.root)
    monkeypatch.setattr("sys.argv", ["build.py", *arguments])
    Path(".snakemake").mkdir()
    with Path(".snakemake/book.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main() == 1
    assert message in capsys.readouterr().err


def _wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.1)


def _parents() -> dict[int, int]:
    """The parent of each process that is no zombie."""
    command = ["ps", "-A", "-o", "pid=,ppid=,stat="]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    rows = [line.split() for line in lines]
    return {int(pid): int(parent) for pid, parent, state in rows if not state.startswith("Z")}


def _descendants(ancestor: int) -> list[int]:
    """The processes below one, parents before children."""
    parents = _parents()
    found = [ancestor]
    for process in found:
        found.extend(pid for pid, parent in parents.items() if parent == process)
    return found[1:]

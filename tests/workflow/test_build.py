"""The command that runs a grid and renders its book."""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from safetensors.torch import save

from tests.workflow.conftest import BUILD, Project

NewProject = Callable[..., Project]


def test_first_run_says_where_to_open_the_book_and_second_does_nothing(rendered: Project) -> None:
    index = rendered.root / "_build" / "html" / "index.html"
    marks = rendered.marks()
    begin = os.times()
    result = rendered.build("book")
    assert result.returncode == 0
    assert result.stdout == f"Nothing to do: the book is up to date at {index.as_uri()}\n"
    assert rendered.marks() == marks
    # Processor time, because the promise of 10 s is for a computer that does nothing else.
    end = os.times()
    spent = end.children_user + end.children_system - begin.children_user - begin.children_system
    assert spent < 10


def test_moved_and_touched_sources_re_run_nothing(rendered: Project) -> None:
    # `rendered` is already a copy in another folder; now every source looks new.
    for folder in ("notebooks", "pai_utils", "book", "workflow/grids"):
        for path in (rendered.root / folder).glob("*.*"):
            path.touch()
    assert "Nothing to do" in rendered.build("book").stdout


def test_changed_parameter_re_runs_only_its_cell(rendered: Project) -> None:
    before = rendered.marks()
    rendered.write_grid("book", {"half": {"divisor": 2}, "third": {"divisor": 3.5}})
    result = rendered.build("book", "--target", "executed")
    assert result.returncode == 0, result.stderr
    after = rendered.marks()
    assert after["half"] == before["half"]
    assert after["third"] != before["third"]


def test_changed_line_of_the_library_re_runs_the_cells(rendered: Project) -> None:
    before = rendered.marks()
    (rendered.root / "pai_utils" / "stub_library.py").write_text("answer = 43\n")
    result = rendered.build("book", "--target", "executed")
    assert result.returncode == 0, result.stderr
    after = rendered.marks()
    assert set(after) == {"half", "third"}
    assert all(after[name] != before[name] for name in after)


def test_changed_page_renders_again_without_running_a_cell(rendered: Project) -> None:
    before = rendered.marks()
    (rendered.root / "book" / "index.md").write_text("# Quotients\n")
    result = rendered.build("book")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("Open the book: file://")
    assert rendered.marks() == before
    assert "Quotients" in (rendered.root / "_build/html/book/index.html").read_text()


def test_warning_of_the_renderer_fails_the_build_and_is_shown(rendered: Project) -> None:
    (rendered.root / "book" / "index.md").write_text("# Quotients\n\n[gone](nowhere.md)\n")
    result = rendered.build("book")
    assert result.returncode == 1
    assert "nowhere.md" in result.stderr
    assert "build/logs/book/render.log" in result.stderr
    assert not (rendered.root / "_build/html/index.html").exists()


def test_executed_copy_with_an_error_is_not_rendered(rendered: Project) -> None:
    copy = rendered.root / "book/executed/half.ipynb"
    notebook = json.loads(copy.read_text())
    error = {"output_type": "error", "ename": "KeyError", "evalue": "'x'", "traceback": []}
    notebook["cells"][-1]["outputs"].append(error)
    copy.write_text(json.dumps(notebook))
    result = rendered.build("book", "--allowed-rules", "render", "--forcerun", "render")
    assert result.returncode == 1
    assert "book/executed/half.ipynb: KeyError: 'x'" in result.stderr


def test_failed_cell_fails_the_command_stays_readable_and_lets_others_go_on(
    new_project: NewProject,
) -> None:
    project = new_project({"dead": {"divisor": None}, "one": {}, "two": {}, "zero": {"divisor": 0}})
    result = project.build("book")
    assert result.returncode == 1
    assert "FAILED    zero" in result.stderr
    assert "FAILED    dead" in result.stderr
    assert "dead: its kernel died or was stopped" in result.stderr
    assert "Traceback" not in result.stderr
    assert "zero: ZeroDivisionError: division by zero" in result.stderr
    assert "build/logs/book/zero.ipynb" in result.stderr
    assert set(project.marks()) == {"one", "two"}
    assert not (project.root / "book/executed/zero").exists()
    assert not (project.root / "_build").exists()
    failed = (project.root / "build/logs/book/zero.ipynb").read_text()
    assert "ZeroDivisionError" in failed
    assert "quotient = 1 / divisor" in failed


def test_cell_gets_one_thread_and_a_relative_out_folder(rendered: Project) -> None:
    copy = (rendered.root / "book/executed/half.ipynb").read_text()
    assert "1 thread" in copy
    assert 'out = \\"book/executed/half\\"' in copy
    assert str(rendered.root) not in copy


def test_grid_other_than_book_leaves_the_readers_book_alone(new_project: NewProject) -> None:
    project = new_project({"half": {"divisor": 2}}, grid="smoke")
    before = project.files()
    result = project.build("smoke", "--target", "executed")
    assert result.returncode == 0, result.stderr
    assert {path.split("/")[0] for path in project.files() - before} == {"build"}
    assert set(project.marks("build/smoke/book/executed")) == {"half"}


def test_killed_run_leaves_no_half_written_copy_and_the_next_one_resumes(
    new_project: NewProject,
) -> None:
    project = new_project({"quick": {}, "slow": {"seconds": 60}})
    with project.start("book", "--target", "executed", "--cores", "2") as process:
        _wait_until(lambda: "finished  quick" in project.progress.read_text())
        _wait_until(lambda: project.is_running("slow"))
        for pid in (process.pid, *_descendants(process.pid)):
            os.kill(pid, signal.SIGKILL)
    mark = project.marks()["quick"]
    assert set(project.marks()) == {"quick"}

    project.write_grid("book", {"quick": {}, "slow": {"seconds": 0}})
    result = project.build("book", "--target", "executed")
    assert result.returncode == 0, result.stderr
    assert set(project.marks()) == {"quick", "slow"}
    assert project.marks()["quick"] == mark


def test_cell_ends_when_snakemake_alone_is_killed(new_project: NewProject) -> None:
    project = new_project({"slow": {"seconds": 60}})
    with project.start("book", "--target", "executed") as process:
        _wait_until(lambda: project.is_running("slow"))
        snakemake, *cell = _descendants(process.pid)
        assert cell
        os.kill(snakemake, signal.SIGKILL)
    assert process.returncode == 1
    _wait_until(lambda: not _living() & set(cell))
    assert project.marks() == {}


def test_killed_papermill_fails_its_cell_alone_and_the_next_run_resumes(
    new_project: NewProject,
) -> None:
    project = new_project({"quick": {}, "slow": {"seconds": 60}})
    with project.start("book", "--target", "executed", "--cores", "2") as process:
        _wait_until(lambda: project.is_running("slow"))
        (attempt,) = project.attempts("slow")
        os.kill(attempt["process"], signal.SIGKILL)
    assert process.returncode == 1
    assert "FAILED    slow" in project.progress.read_text()
    mark = project.marks()["quick"]
    row = project.status()["slow"]
    assert (row["state"], row["starts"]) == ("killed", "1")

    project.write_grid("book", {"quick": {}, "slow": {"seconds": 0}})
    result = project.build("book", "--target", "executed")
    assert result.returncode == 0, result.stderr
    assert project.marks()["quick"] == mark
    row = project.status()["slow"]
    assert (row["state"], row["starts"]) == ("finished", "2")
    assert "killed: its process is gone" in row["what failed"]


def test_killed_kernel_fails_its_cell_alone_and_the_next_run_resumes(
    new_project: NewProject,
) -> None:
    project = new_project({"one": {}, "dead": {"divisor": None}})
    assert project.build("book", "--target", "executed").returncode == 1
    mark = project.marks()["one"]
    row = project.status()["dead"]
    assert row["state"] == "failed"
    assert "its kernel died" in row["what failed"]
    project.write_grid("book", {"one": {}, "dead": {"divisor": 2}})
    result = project.build("book", "--target", "executed")
    assert result.returncode == 0, result.stderr
    assert project.marks()["one"] == mark
    assert set(project.marks()) == {"one", "dead"}


def test_grid_that_grows_leaves_finished_cells_alone(rendered: Project) -> None:
    before = rendered.marks()
    cells: dict[str, dict[str, object]] = {
        "half": {"divisor": 2},
        "third": {"divisor": 3},
        "fourth": {"divisor": 4},
    }
    rendered.write_grid("book", cells)
    # What the new cell has in common with the others is made after they finished.
    plan = read_plan_of(rendered)
    need = {"kind": "scores", "need": "{}", "before": [], "hours": 0, "memory_mib": 1500}
    plan["needs"] = {"common": need}
    for cell in plan["cells"].values():
        cell["needs"] = ["common"]
    (rendered.root / "build/plans/book.json").write_text(json.dumps(plan))
    made = rendered.root / "build/shared/book/scores/common.safetensors"
    made.parent.mkdir(parents=True)
    made.write_bytes(save({"w": torch.ones(1)}))
    result = rendered.build("book", "--target", "executed")
    assert result.returncode == 0, result.stderr
    after = rendered.marks()
    assert set(after) == set(cells)
    assert all(after[name] == before[name] for name in before)


def test_stopped_cell_says_so(new_project: NewProject) -> None:
    project = new_project({"slow": {"seconds": 60}})
    with project.start("book", "--target", "executed") as process:
        _wait_until(lambda: project.is_running("slow"))
        (attempt,) = project.attempts("slow")
        os.kill(attempt["process"], signal.SIGTERM)  # as a cluster ends jobs
    assert process.returncode == 1
    assert project.status()["slow"]["state"] == "stopped"


def test_status_is_written_of_a_grid_that_failed(new_project: NewProject) -> None:
    project = new_project({"one": {}, "zero": {"divisor": 0}})
    result = project.build("book", "--target", "executed")
    assert "What ran and what failed: build/logs/book/status.csv" in result.stderr
    rows = project.status()
    assert {cell: row["state"] for cell, row in rows.items()} == {
        "one": "finished",
        "zero": "failed",
    }
    assert "ZeroDivisionError: division by zero" in rows["zero"]["what failed"]
    assert float(rows["one"]["minutes"]) >= 0


def test_full_disk_fails_cells_and_nothing_half_written_is_read(new_project: NewProject) -> None:
    project = new_project({"first": {}, "large": {"bulk": 30 * 2**20}})
    disk, kept = project.root.parent / "disk", project.root.parent / "kept"
    disk.mkdir()
    mounted = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mount = f"mount -t tmpfs -o size=24m none '{disk}'"
    possible = shutil.which("unshare") and not subprocess.run([*mounted, mount]).returncode
    if not possible:
        pytest.skip("a small disk cannot be mounted here")
    there = f"cp -a '{project.root}' '{disk}/project' && cd '{disk}/project'"
    script = f"{mount} && {there} && \"$@\"; status=$?; cp -a . '{kept}'; exit $status"
    result = subprocess.run(
        [*mounted, script, "sh", *project.command("book", "--target", "executed", "--cores", "1")],
        env=project.environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 1
    assert "No space left on device" in result.stderr
    full = Project(kept)
    mark = full.marks()["first"]
    assert set(full.marks()) == {"first"}

    result = full.build("book", "--target", "executed")  # where there is room
    assert result.returncode == 0, result.stderr
    assert set(full.marks()) == {"first", "large"}
    assert full.marks()["first"] == mark


def test_cells_are_spread_over_the_gpus_of_a_computer(new_project: NewProject) -> None:
    cells = {f"cell{index}": {"seconds": 3} for index in range(4)}
    project = new_project(cells)
    project.give_gpus(2)
    result = project.build("book", "--target", "executed", "--cores", "4")
    assert result.returncode == 0, result.stderr
    seen = []
    for name in cells:
        copy = (project.root / f"book/executed/{name}.ipynb").read_text()
        (text,) = re.findall(r"sees GPU (\w+) as (\w+)", copy)
        seen.append(text)
    assert sorted(seen) == [("0", "cuda"), ("0", "cuda"), ("1", "cuda"), ("1", "cuda")]


def test_lost_gpu_fails_what_comes_after_and_the_next_run_resumes(new_project: NewProject) -> None:
    project = new_project({"first": {}, "second": {}, "third": {}})
    listed = project.give_gpus(1)
    project.write_grid("book", {"first": {"lose": str(listed)}, "second": {}, "third": {}})
    result = project.build("book", "--target", "executed")
    assert result.returncode == 1
    assert set(project.marks()) == {"first"}
    assert "1 GPUs were to be used and 0 are there: was one lost?" in result.stderr
    mark = project.marks()["first"]

    listed.write_text("0\n")
    result = project.build("book", "--target", "executed")
    assert result.returncode == 0, result.stderr
    assert set(project.marks()) == {"first", "second", "third"}
    assert project.marks()["first"] == mark


def test_unknown_profile_is_refused_with_the_known_ones(rendered: Project) -> None:
    result = rendered.build("book", "--profile", "slrum")
    assert result.returncode == 1
    assert "there is no profile 'slrum'; there are: kubernetes, local, slurm" in result.stderr


def test_second_run_of_a_grid_at_the_same_time_is_refused(rendered: Project) -> None:
    with (rendered.root / ".snakemake" / "book.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = rendered.build("book")
    assert result.returncode == 1
    assert "this grid is being run already" in result.stderr


def test_unknown_grid_is_refused_with_the_known_ones(rendered: Project) -> None:
    result = rendered.build("bok")
    assert result.returncode == 1
    assert "there is no grid 'bok'; there are: book" in result.stderr


def read_plan_of(project: Project) -> dict[str, Any]:
    """The plan of the grid as it now is, as the build would make it."""
    code = "import json; from cells import Layout; from planned import read_plan; "
    code += "print(json.dumps(read_plan(Layout('book'))))"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=project.root,
        env={**project.environment, "PYTHONPATH": str(BUILD.parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    return cast(dict[str, Any], json.loads(result.stdout))


def _wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.1)


def _parents() -> dict[int, int]:
    """Return the parent of each process that is no zombie."""
    command = ["ps", "-A", "-o", "pid=,ppid=,stat="]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    rows = [line.split() for line in lines]
    return {int(pid): int(parent) for pid, parent, state in rows if not state.startswith("Z")}


def _living() -> set[int]:
    return set(_parents())


def _descendants(ancestor: int) -> list[int]:
    """Return the processes below one, parents before children."""
    parents = _parents()
    found = [ancestor]
    for process in found:
        found.extend(pid for pid, parent in parents.items() if parent == process)
    return found[1:]

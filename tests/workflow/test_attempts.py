"""What is recorded of every start of a cell."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from attempts import attempt, read_attempts


def test_an_attempt_says_how_it_ended(tmp_path: Path) -> None:
    with attempt(tmp_path, "a") as this:
        (path,) = (tmp_path / "a").iterdir()
        assert json.loads(path.read_text())["outcome"] == "running"
        this.outcome = "finished"
    (read,) = read_attempts(tmp_path, ["a"])["a"]
    assert (read.outcome, read.host, read.process) == (
        "finished",
        socket.gethostname(),
        os.getpid(),
    )
    assert read.seconds is not None
    assert read.seconds >= 0


@pytest.mark.parametrize(
    ("error", "outcome"), [(OSError("no room"), "failed"), (KeyboardInterrupt(), "stopped")]
)
def test_an_exception_ends_it_and_goes_on(
    tmp_path: Path, error: BaseException, outcome: str
) -> None:
    with pytest.raises(type(error)), attempt(tmp_path, "a"):
        raise error
    (read,) = read_attempts(tmp_path, ["a"])["a"]
    assert read.outcome == outcome
    assert read.error == f"{type(error).__name__}: {error}".strip(": ")


def test_one_that_never_said_was_killed_unless_its_process_is_there(tmp_path: Path) -> None:
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom attempts import attempt\n"
        "with attempt(Path(sys.argv[1]), 'a'):\n    os.kill(os.getpid(), 9)"
    )
    path = os.pathsep.join(map(str, sys.path))
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env={**os.environ, "PYTHONPATH": path}
    )
    with attempt(tmp_path, "a"):
        first, second = read_attempts(tmp_path, ["a"])["a"]
    assert (first.outcome, first.seconds) == ("killed", None)
    assert second.outcome == "running"


def test_one_on_another_computer_is_running_until_all_is_over(tmp_path: Path) -> None:
    with attempt(tmp_path, "a") as this:
        this.host = "elsewhere"
        this.outcome = "running"
    assert read_attempts(tmp_path, ["a"])["a"][0].outcome == "running"
    assert read_attempts(tmp_path, ["a"], over=True)["a"][0].outcome == "killed"


def test_cells_that_never_started_have_none(tmp_path: Path) -> None:
    assert read_attempts(tmp_path, ["a", "b"]) == {"a": [], "b": []}

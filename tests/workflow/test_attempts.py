"""What is recorded of every start of a cell."""

import os
import socket
from pathlib import Path

from attempts import attempt, read_attempts


def test_one_that_never_said_was_killed_unless_its_process_may_be_there(tmp_path: Path) -> None:
    with attempt(tmp_path, "a"):
        path = tmp_path / "a.jsonl"
        line = path.read_text()

    def outcomes(*lines: str, over: bool = False) -> list[str]:
        path.write_text("".join(lines))
        return [each["outcome"] for each in read_attempts(tmp_path, ["a"], over=over)["a"]]

    gone = line.replace(f'"process": {os.getpid()}', '"process": 999999999')
    elsewhere = line.replace(socket.gethostname(), "elsewhere")
    assert outcomes(line) == outcomes(elsewhere) == ["running"]
    assert outcomes(line, over=True) == outcomes(gone) == ["killed"]
    assert outcomes(gone, line, '{"started": half') == ["killed", "running"]

"""The command for a GPU, which runs small on the CPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import right
from benchmarks.gpu.steps import SMALL
from benchmarks.problems import Problem

# Those that the parts about speed take too; all are compared where there is a GPU.
NETWORKS = ("tiny resnet", "tiny vit")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gpu")
    with pytest.MonkeyPatch.context() as patch:
        for name in {*SMALL} - {*NETWORKS}:
            patch.delitem(SMALL, name)
        patch.setattr(sys, "argv", ["gpu", "--device", "cpu", "--out", str(out)])
        gpu.main()
    return out


def test_the_whole_command_runs_small(folder: Path) -> None:
    tables = {part: pd.read_csv(folder / f"{part}.csv") for part in gpu.PARTS}
    verdicts = {part: set(table.verdict) for part, table in tables.items()}
    assert verdicts["right"] == {"right", "refused"}
    assert verdicts["limits"] == {"right", "not measured"}
    assert set(tables["right"].network) == set(NETWORKS)
    ours = tables["speed"][tables["speed"].role == "ours"]
    assert set(ours.verdict) == {"measured", "not measured"}
    assert (ours.fb.dropna() > 0).all()
    assert (folder / "speed.png").stat().st_size > 0
    assert "## Right" in (folder / "page.md").read_text()
    assert json.loads((folder / "record.json").read_text())["versions"]["torch"]


def test_what_is_done_is_not_done_again(folder: Path) -> None:
    (path,) = folder.glob("steps-*.jsonl")
    journal = gpu.Journal(path)
    before = dict(journal.rows)
    journal.do(next(iter(before)), lambda: pytest.fail("it was done"))
    assert journal.rows == before


def test_an_error_is_a_row_that_names_it(tmp_path: Path) -> None:
    journal = gpu.Journal(tmp_path / "steps.jsonl")
    journal.do("right/a network/a result", lambda: [dict[str, Any]()["missing"]])
    (row,) = gpu.Journal(tmp_path / "steps.jsonl").rows["right/a network/a result"]
    assert (row["verdict"], row["what"]) == ("failed", "a network/a result")
    assert row["note"] == "KeyError: 'missing'"


def test_a_wrong_result_is_called_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(given: Problem) -> right.Result:
        off = given.images.dtype == torch.float32  # what the device computes
        return {name: p.detach() + 0.1 * off for name, p in given.parameters.items()}

    monkeypatch.setitem(right.RESULTS, "weights", shifted)
    (row,) = right.compared("tiny resnet", "weights", torch.device("cpu"))
    assert row["verdict"] == "wrong"
    assert row["error"] > 0.05


@pytest.mark.cuda
@pytest.mark.parametrize("network", SMALL)
def test_a_gpu_gives_what_the_cpu_gives(network: str) -> None:
    for what in right.RESULTS:
        for row in right.compared(network, what, torch.device("cuda")):
            assert row["verdict"] in ("right", "refused"), row

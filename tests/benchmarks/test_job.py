import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.job import Job, execute, relative_error, run
from benchmarks.results import Row, table
from benchmarks.run import Finished, measure, plan
from tests.benchmarks.fakes import TASKS

REGISTRY = "tests.benchmarks.fakes"
JOB = Job("contender", "gradient", "tiny", images=4, threads=1, budget=0.1, unit_memory=2**20)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    job = replace(JOB, references=str(tmp_path))
    assert run(replace(job, kind="reference"), TASKS) == []
    return job


def row_of(job: Job, contender: str) -> Row:
    (row,) = run(replace(job, contender=contender), TASKS)
    assert isinstance(row, Row)
    return row


@pytest.mark.parametrize(
    ("contender", "status", "role", "error", "message"),
    [
        ("right", "ok", "ours", 0.0, ""),
        ("wrong", "wrong", "peer", 0.1, "relative error 1.0e-01, above 0.001"),
        ("estimate", "ok", "ours", 0.1, ""),
        ("forgetful", "wrong", "ours", math.nan, "no value for '3.weight'"),
    ],
)
def test_a_contender_is_reported_right_or_wrong_and_timed(
    contender: str, status: str, role: str, error: float, message: str, job: Job
) -> None:
    row = row_of(job, contender)
    assert (row.status, row.message, row.role, row.step) == (status, message, role, "whole")
    assert row.error == pytest.approx(error, rel=1e-4, abs=1e-6, nan_ok=True)
    assert 0 < row.fb_low <= row.fb <= row.fb_high
    assert row.memory == pytest.approx(row.memory_mib)  # the unit was said to take one MiB


def test_each_layout_of_the_unit_is_measured_and_the_fastest_comes_first() -> None:
    rows = run(replace(JOB, kind="unit"), TASKS)
    assert all(isinstance(row, Row) and row.fb > 0 and row.memory >= 1 for row in rows)
    seconds = [row.seconds for row in rows if isinstance(row, Row)]
    assert len(seconds) == 3
    assert seconds == sorted(seconds)


def test_fresh_processes_measure_what_was_planned_and_show_failures(tmp_path: Path) -> None:
    jobs = plan(TASKS, ["/right", "/raising"], "cpu")
    assert [job.contender for job in jobs] == ["right", "raising"]
    kept = tmp_path / "finished.jsonl"
    outcome = measure(TASKS, jobs, JOB, 60, finished=Finished(kept), registry=REGISTRY)
    assert [row.task for row in outcome.rows] == ["unit"] * 3 + ["gradient"] * 2
    right, raising = outcome.rows[3:]
    assert right.status == "ok"
    assert right.memory > 0
    assert raising.status == "failed"
    assert raising.message == "ArithmeticError: no rule for …"
    assert math.isnan(raising.fb)
    # A second run finds everything done, even without the registry.
    again = measure(TASKS, jobs, JOB, 60, finished=Finished(kept), registry="no.such.module")
    assert table(again.rows).equals(table(outcome.rows))


def test_a_job_cut_short_is_done_again(tmp_path: Path) -> None:
    kept = tmp_path / "finished.jsonl"
    done = {"job": "contender/a/b/c", "task": "a", "seconds": 2.0, "result": "no"}
    kept.write_text(json.dumps(done) + "\n" + json.dumps(done | {"job": "contender/a/b/d"})[:-9])
    finished = Finished(kept)
    assert finished.holds(Job("contender", "a", "b", "c"))
    assert not finished.holds(Job("contender", "a", "b", "d"))
    assert finished.seconds == {"a": 2.0}


def test_a_contender_beyond_the_time_limit_has_failed(job: Job) -> None:
    assert execute(replace(job, contender="slow"), 0.5, REGISTRY) == "not finished after 0.5 s"


def test_the_error_is_relative_over_all_tensors() -> None:
    reference = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}
    found = {"a": torch.tensor([3.0]), "b": torch.tensor([4.5])}
    assert relative_error(found, reference) == pytest.approx(0.1)
    with pytest.raises(ValueError, match=r"shape \(2,\) for 'a', which is \(1,\)"):
        relative_error(found | {"a": torch.zeros(2)}, reference)

"""A contender is right, wrong, or an estimate, and says so."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.job import Job, run
from benchmarks.problems import Problem
from benchmarks.results import Row
from benchmarks.tasks import Contender, Steps, Task


def tiny(count: int) -> Problem:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16 * 16, 5)
    ).eval()
    images, labels = torch.randn(count, 3, 16, 16), torch.randint(0, 5, (count,))
    return Problem(model, images, labels, ["0.weight", "3.weight"])


def _gradient(problem: Problem, factor: float = 1.0) -> Steps:
    def whole() -> dict[str, torch.Tensor]:
        gradients = torch.autograd.grad(problem.loss, list(problem.parameters.values()))
        return {n: g * factor for n, g in zip(problem.names, gradients, strict=True)}

    return {"whole": whole}


def _forgetful(problem: Problem) -> Steps:
    steps = _gradient(problem)
    return {"whole": lambda: {"0.weight": steps["whole"]()["0.weight"]}}


RIGHT: Contender[Problem] = Contender(_gradient, "gradient", ours=True, reference="gradient")
TASKS: dict[str, Task[Any]] = {
    "gradient": Task(
        {
            "right": RIGHT,
            "wrong": replace(RIGHT, prepare=lambda p: _gradient(p, 1.1), ours=False),
            "estimate": replace(RIGHT, prepare=lambda p: _gradient(p, 1.1), estimate=True),
            "forgetful": replace(RIGHT, prepare=_forgetful),
        },
        {"tiny": tiny},
        {"gradient": lambda problem: _gradient(problem)["whole"]()},
        tolerance=1e-3,
    )
}


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
    contender: str, status: str, role: str, error: float, message: str, tmp_path: Path
) -> None:
    job = Job("contender", "gradient", "tiny", images=4, threads=1, budget=0.1, unit_memory=2**20)
    job = replace(job, references=str(tmp_path))
    assert run(replace(job, kind="reference"), TASKS) == []
    (row,) = run(replace(job, contender=contender), TASKS)
    assert isinstance(row, Row)
    assert (row.status, row.message, row.role, row.step) == (status, message, role, "whole")
    assert row.error == pytest.approx(error, rel=1e-4, abs=1e-6, nan_ok=True)
    assert 0 < row.fb_low <= row.fb <= row.fb_high
    assert row.memory == pytest.approx(row.memory_mib)  # the unit was said to take one MiB

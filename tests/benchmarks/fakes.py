"""A registry of one task, whose contenders are right, wrong, random, too slow, or raise."""

import time
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from benchmarks.problems import Problem
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


def _raising(problem: Problem) -> Steps:
    def whole() -> dict[str, torch.Tensor]:
        raise ArithmeticError("no rule for /opt/somebody/layers.py\nand a second line")

    return {"whole": whole}


def _slow(problem: Problem) -> Steps:
    time.sleep(60)
    return {}


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
            "raising": replace(RIGHT, prepare=_raising),
            "slow": replace(RIGHT, prepare=_slow),
        },
        {"tiny": tiny},
        {"gradient": lambda problem: _gradient(problem)["whole"]()},
        tolerance=1e-3,
    )
}

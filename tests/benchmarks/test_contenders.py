"""Every contender's value in float64 on a tiny network: the adapters compute what they say."""

import importlib.metadata
import tomllib
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from torch import nn

from benchmarks.job import relative_error
from benchmarks.problems import Problem
from benchmarks.registry import TASKS
from tests.cases import Images


def tiny() -> Problem:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, stride=2, padding=1),
        nn.Sigmoid(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    )
    data = Images(10)
    model.double().eval()
    return Problem(model, data.images, data.labels, ["0.weight", "3.weight", "7.weight"])


COMPARED = [
    (task, name)
    for task in ("diagonal", "product", "eigenpairs")
    for name, contender in TASKS[task].contenders.items()
    if contender.reference is not None and not contender.estimate
]


# Peers' warnings are their own: deprecated hooks, graphs that keep gradients alive.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("task", "name"), COMPARED)
def test_a_contender_computes_what_its_reference_does(task: str, name: str) -> None:
    contender = TASKS[task].contenders[name]
    if contender.package is not None:
        try:
            importlib.metadata.version(contender.package)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"{contender.package} is in the bench extra, which is not installed")
    assert contender.reference is not None
    reference = TASKS[task].references[contender.reference](tiny())
    tolerance = 1e-10 if contender.package is None else 1e-8
    for layout in contender.layouts:
        for step, call in contender.prepare(tiny().in_layout(layout)).items():
            found, exact = call(), reference
            if task == "eigenpairs":
                # Power iteration is slow on the smaller ones, which lie close together.
                found, exact = ({"leading": v["eigenvalues"][:3]} for v in (found, reference))
                tolerance = 1e-2
            assert relative_error(found, exact) <= tolerance, (layout, step)


def test_every_package_of_the_bench_extra_is_measured() -> None:
    project = Path(__file__).parents[2] / "pyproject.toml"
    extras = tomllib.loads(project.read_text("utf-8"))["project"]["optional-dependencies"]
    measured = {c.package for task in TASKS.values() for c in task.contenders.values()}
    assert measured - {None} == {Requirement(text).name for text in extras["bench"]}

"""The tasks, in the order of the page."""

from __future__ import annotations

from functools import partial
from typing import Any

from benchmarks.contenders import blocks, diagonals, inputs, masks, products, spectra
from benchmarks.problems import NETWORKS, Network, Problem, build
from benchmarks.tasks import Task

# Ten classes and small images, so that a reference in float64 takes a minute.
_SMALL = Network("resnet18", 64, (("zero_init_last", False),))


def _problem(network: Network, classes: int, count: int) -> Problem:
    return build(network, count, classes=classes)


def _layer(outputs: int, size: int, count: int) -> inputs.Layer:
    return inputs.draw(outputs, size)


_PROBLEMS = {name: partial(_problem, network, 1000) for name, network in NETWORKS.items()}

# A ReLU or max-pooling whose inputs lie within float32's rounding of each other may switch, and
# the gradients of its sample with it: right results, a plain double backward's too, differ from
# float64 by up to 2e-2 on a deep network. Another quantity differs by tens of percent.
TOLERANCE = 5e-2

TASKS: dict[str, Task[Any]] = {
    "diagonal": Task(diagonals.CONTENDERS, _PROBLEMS, diagonals.REFERENCES, TOLERANCE),
    "product": Task(products.CONTENDERS, _PROBLEMS, products.REFERENCES, TOLERANCE),
    "eigenpairs": Task(
        spectra.CONTENDERS,
        {"resnet18 at 64 px": partial(_problem, _SMALL, 10)},
        spectra.REFERENCES,
        TOLERANCE,
    ),
    "blocks": Task(
        blocks.CONTENDERS,
        {
            "an eighth of resnet50's largest layer": lambda _: blocks.draw(2304),
            "resnet50's largest layer": lambda _: blocks.draw(18432),
        },
        blocks.REFERENCES,
        tolerance=1e-3,
        in_units=False,
    ),
    "inputs": Task(
        inputs.CONTENDERS,
        {name: partial(_layer, *shape) for name, shape in inputs.SHAPES.items()},
        inputs.REFERENCES,
        tolerance=1e-3,
        in_units=False,
    ),
    "mask": Task(
        masks.CONTENDERS,
        {"vit_base": lambda _: masks.vit_base()},
        masks.REFERENCES,
        tolerance=0.0,
        in_units=False,
    ),
}

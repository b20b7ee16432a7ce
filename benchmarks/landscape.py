"""What planes and eigenpairs cost over the evaluations and products that they are made of.

``python -m benchmarks.landscape`` writes the table and its record to
``results/benchmarks/landscape``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

import pai_utils as pai
from benchmarks.measuring import in_turns, keep_freed_memory
from benchmarks.storing import store
from pai_utils.curvature.products import HessianOperator, Operator
from pai_utils.curvature.spectra import top_eigenpairs
from pai_utils.evaluation import evaluate_heads
from pai_utils.landscape import losses_on_plane, plane_through
from pai_utils.support.common import device_of
from pai_utils.support.sampling import Draw

ROOT = Path(__file__).parents[1]
TASKS = ("mnist5k", "digits")


def measure_plane(points: int, images: int, *, budget: float) -> dict[str, object]:
    """A plane of two tasks on EfficientNet-Lite0, beside bare evaluations of every point."""
    backbone = pai.load_backbone("efficientnet_lite0", image_size=64)
    tasks = {
        name: pai.load_task(name, backbone.transform, train_size=200, test_size=images)
        for name in TASKS
    }
    heads = pai.make_heads(backbone, tasks)
    tests = {name: task.test for name, task in tasks.items()}
    others = {f"{s:.0%}": pai.prune(backbone, None, "magnitude", s).model for s in (0.2, 0.4)}
    plane = plane_through(backbone, others)

    def grid() -> None:
        losses_on_plane(backbone, plane, heads, tests, points=points, margin=0.1)

    def bare() -> None:
        for _ in range(points**2):
            evaluate_heads(backbone, heads, tests)

    timing = in_turns(grid, bare, device_of(backbone), budget=budget)
    low, high = timing.spread
    return {
        "what": f"plane of {points} × {points}, {len(TASKS)} tasks of {images} images",
        "over": f"{len(TASKS) * points**2} bare evaluations",
        "ratio": timing.multiple,
        "low": low,
        "high": high,
        "turns": len(timing.seconds),
    }


class _Timed:
    """An operator that counts the seconds of its products."""

    def __init__(self, operator: Operator) -> None:
        self.operator = operator
        self.seconds: list[float] = []

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        return self.operator.parameters

    def __call__(self, vector: Mapping[str, Tensor]) -> dict[str, Tensor]:
        start = time.perf_counter()
        product = self.operator(vector)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - start)
        return product


def measure_eigenpairs(count: int, images: int, products: int) -> dict[str, object]:
    """The top eigenpairs of ViT-S/14, beside their own Hessian products."""
    backbone = pai.load_backbone("vit_small_saliency", image_size=56)
    task = pai.load_task("mnist5k", backbone.transform, train_size=200, test_size=100)
    model = pai.Classifier(backbone, pai.fit_head(backbone, task))
    names = pai.prunable_parameters(model)
    operator = _Timed(HessianOperator(model, names, task.train, Draw(images)))
    start = time.perf_counter()
    found = top_eigenpairs(operator, count, products=products, tolerance=0)
    ratio = (time.perf_counter() - start) / sum(operator.seconds)
    return {
        "what": f"top {count} eigenpairs of ViT-S/14 on {images} images",
        "over": f"its {found.products} Hessian products",
        "ratio": ratio,
        "low": ratio,
        "high": ratio,
        "turns": 1,
    }


def main() -> None:
    """Measure both and write the table."""
    parser = argparse.ArgumentParser(description="Cost of planes and eigenpairs.")
    parser.add_argument("--budget", type=float, default=600.0, help="seconds for the planes")
    parser.add_argument("--points", type=int, default=5, help="of a side of the plane")
    parser.add_argument("--images", type=int, default=500, help="a task of the plane")
    parser.add_argument("--products", type=int, default=30, help="for the eigenpairs")
    parser.add_argument("--out", type=Path, default=ROOT / "results/benchmarks/landscape")
    given = parser.parse_args()
    keep_freed_memory()
    rows = [
        measure_plane(given.points, given.images, budget=given.budget),
        measure_eigenpairs(10, 64, given.products),
    ]
    store(pd.DataFrame(rows), given.out, "landscape")


if __name__ == "__main__":
    main()

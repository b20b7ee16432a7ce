"""Images a second that evaluation takes, beside a bare loop of forwards on tensors in memory.

``python -m benchmarks.throughput`` writes the table and its record to
``results/benchmarks/throughput``. The bare loop's batches are normalised floats that lie in memory
already, in the layout in which the encoder is fastest; `pai.evaluate` starts from uint8.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median

import pandas as pd
import torch

import pai_utils as pai
from benchmarks.measuring import in_turns, keep_freed_memory
from benchmarks.storing import store
from pai_utils.data.tasks import Task
from pai_utils.support.common import device_of

ROOT = Path(__file__).parents[1]
CASES = {"efficientnet_lite0": (64, 1500), "vit_small_saliency": (84, 300)}  # pixels, images
BATCH_SIZE = 128


def measure(name: str, image_size: int, images: int, *, budget: float) -> dict[str, object]:
    """Time one encoder both ways, in turns."""
    backbone = pai.load_backbone(name, image_size=image_size)
    task: Task = pai.load_task("mnist5k", backbone.transform, train_size=200, test_size=images)
    model = pai.Classifier(backbone, pai.fit_head(backbone, task))
    device = device_of(model)
    batches = [task.test.batch(rows, device)[0] for rows in torch.arange(images).split(BATCH_SIZE)]

    def bare() -> None:
        with torch.inference_mode():
            for batch in batches:
                model(batch)

    def ours() -> None:
        pai.evaluate(model, task.test, batch_size=BATCH_SIZE)

    bare()
    ours()
    timing = in_turns(ours, bare, device, budget=budget)
    low, high = timing.spread
    return {
        "backbone": name,
        "image_size": image_size,
        "images": images,
        "evaluate_per_second": images / median(timing.seconds),
        "bare_per_second": images / median(timing.unit),
        "ratio": 1 / timing.multiple,
        "low": 1 / high,
        "high": 1 / low,
        "turns": len(timing.seconds),
    }


def main() -> None:
    """Measure all cases and write the table."""
    parser = argparse.ArgumentParser(description="Throughput of evaluation beside a bare loop.")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds a case")
    parser.add_argument("--out", type=Path, default=ROOT / "results/benchmarks/throughput")
    given = parser.parse_args()
    keep_freed_memory()
    rows = [measure(name, *case, budget=given.budget) for name, case in CASES.items()]
    store(pd.DataFrame(rows), given.out, "throughput", batch_size=BATCH_SIZE)


if __name__ == "__main__":
    main()

"""What repairs without training cost, in forward and backward passes of the same images (FB).

``python -m benchmarks.repairs`` writes the table and its record to ``results/benchmarks/repairs``.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from statistics import median

import pandas as pd
import torch
from torch.nn import functional as F

import pai_utils as pai
from benchmarks.measuring import in_turns, keep_freed_memory
from benchmarks.storing import store
from pai_utils.repair.methods import Repair, repair_
from pai_utils.support.common import device_of

ROOT = Path(__file__).parents[1]
BACKBONES = {"efficientnet_lite0": 64, "vit_small_saliency": 56}  # pixels
REPAIRS = ("moments", "layerwise", "layerwise+moments", "obs")
SPARSITY = 0.7


def measure(name: str, image_size: int, images: int, *, budget: float) -> list[dict[str, object]]:
    """Time every repair of one encoder, pruned by magnitude, in turns with FB."""
    backbone = pai.load_backbone(name, image_size=image_size)
    task = pai.load_task("mnist5k", backbone.transform, train_size=images, test_size=100)
    model = pai.Classifier(backbone, pai.fit_head(backbone, task)).eval()
    device = device_of(model)
    batch, labels = task.train.batch(torch.arange(images), device)
    mask = pai.make_mask(pai.score("magnitude", model), SPARSITY)

    def unit() -> None:
        for x, y in zip(batch.split(64), labels.split(64), strict=True):
            F.cross_entropy(model(x), y).backward()
        model.zero_grad(set_to_none=True)

    rows: list[dict[str, object]] = []
    for repair in REPAIRS:
        pruned = copy.deepcopy(model)

        def step(repair: str = repair, pruned: torch.nn.Module = pruned) -> None:
            pruned.load_state_dict(model.state_dict())
            mask.apply_(pruned)
            repair_(pruned, model, mask, task.train, Repair(repair, samples=None))

        timing = in_turns(step, unit, device, budget=budget)
        low, high = timing.spread
        rows.append(
            {
                "backbone": name,
                "repair": repair,
                "images": images,
                "FB": timing.multiple,
                "low": low,
                "high": high,
                "seconds": median(timing.seconds),
                "turns": len(timing.seconds),
            }
        )
    return rows


def main() -> None:
    """Measure both encoders and write the table."""
    parser = argparse.ArgumentParser(description="Cost of repairs in forward-backward passes.")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds a repair")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--out", type=Path, default=ROOT / "results/benchmarks/repairs")
    given = parser.parse_args()
    keep_freed_memory()
    table = pd.DataFrame(
        row
        for name, size in BACKBONES.items()
        for row in measure(name, size, given.images, budget=given.budget)
    )
    store(table, given.out, "repairs", sparsity=SPARSITY)


if __name__ == "__main__":
    main()

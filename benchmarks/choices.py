"""How strongly to damp a repair: the choice that a source allows, without a task that is held out.

``PAI_DATA_ROOT=... python -m benchmarks.choices`` repairs masks with several strengths of damping
and writes table and record to ``results/benchmarks/choices``. What counts is how far the features
of altered images of the source's validation part are from the dense encoder's. About a quarter of
an hour on one core.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pandas as pd

import pai_utils as pai
from benchmarks.storing import ROOT, store
from pai_utils.data.mixtures import load_mixture
from pai_utils.heads import features, make_heads
from pai_utils.pruning import Recipe
from pai_utils.support.common import progress
from pai_utils.support.sampling import Draw

ENCODERS = {"efficientnet_lite0": 64, "vit_small_saliency": 56}  # pixels
TASKS = ("MNIST", "folder:cifar10-jpeg")
AROUND = "+{}:altered+photographs+contours"
DAMPINGS = (0.03, 0.1, 0.3, 1.0)
REPAIR = {"samples": 500, "float32": True}
SPARSITY = 0.7


def measure(name: str, image_size: int, draw: Draw) -> Iterator[dict[str, object]]:
    """The features' error, over their variance, of each source, strength and task altered."""
    encoder = pai.load_backbone(name, image_size)
    load = partial(pai.load_task, transform=encoder.transform, train_size=800, test_size=250)
    tasks = {task: load(task) for task in TASKS}
    suite = pai.Suite(encoder, tasks, make_heads(encoder, tasks))
    for task in TASKS:
        altered = f"{task}:altered"
        unseen = load_mixture(altered, {task: tasks[task].validation}, encoder.transform, seed=1)
        dense, _ = features(encoder, unseen)
        for images in (task, task + AROUND.format(task)):
            source, recipe = suite.source(images), Recipe("feature_ggn_diag", SPARSITY)
            scores = suite.score(recipe, source, draw)
            for damping in DAMPINGS:
                options = {**REPAIR, "damping": damping}
                recipe = Recipe(
                    "feature_ggn_diag", SPARSITY, repair="layerwise+moments", repair_options=options
                )
                pruned, _ = suite.prune(recipe, source, draw, scores=scores)
                lost = (features(pruned, unseen)[0] - dense).square().sum()
                error = float(lost / (dense - dense.mean(0)).square().sum())
                place = {"encoder": name, "source": images, "damping": damping}
                yield {**place, "error": error}


def main() -> None:
    """Measure both encoders and write the table."""
    rows = [
        row
        for name, size in progress(ENCODERS.items(), "encoders", len(ENCODERS))
        for row in measure(name, size, Draw(256, 64, 0))
    ]
    store(pd.DataFrame(rows), ROOT / "results/benchmarks/choices", "choices", sparsity=SPARSITY)


if __name__ == "__main__":
    main()

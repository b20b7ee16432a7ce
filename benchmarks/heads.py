"""How far retention depends on the images that heads were fitted on, which no interval holds.

``PAI_DATA_ROOT=... python -m benchmarks.heads`` fits every head of a stored run again on training
images drawn with replacement, and writes the mean retention under each draw, and its record, to
``results/benchmarks/heads``; about ten minutes on one core.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import pandas as pd
import torch
from torch import nn

import pai_utils as pai
from benchmarks.storing import ROOT, store
from pai_utils.data.mixtures import is_held_out
from pai_utils.evaluation import retention
from pai_utils.heads import features
from pai_utils.pruning import Recipe
from pai_utils.runs import read_record
from pai_utils.studies.zero_shot_retention import Parameters
from pai_utils.support.common import progress

RUN = "transfer/zero_shot_retention-efficientnet_lite0"
SCORER, SPARSITIES, DRAWS = "feature_ggn_diag", (0.3, 0.5), 10


def redrawn(suite: pai.Suite, seed: int) -> dict[str, nn.Linear]:
    """Heads fitted on as many training images as before, drawn with replacement."""
    generator = torch.Generator().manual_seed(seed)
    heads = {}
    for name, task in suite.tasks.items():
        count = len(task.train)
        drawn = task.train.subset(torch.randint(count, (count,), generator=generator))
        heads[name] = pai.fit_head(suite.encoder, replace(task, train=drawn))
    return heads


def accuracies(
    suite: pai.Suite, encoder: nn.Module, heads: Mapping[int, Mapping[str, nn.Linear]]
) -> dict[tuple[str, int], float]:
    """Test accuracy by task and draw of heads."""
    found = {}
    for name, data in suite.tests.items():
        values, labels = features(encoder, data)
        for draw, by_task in heads.items():
            right = by_task[name](values).argmax(1) == labels
            found[name, draw] = float(right.double().mean())
    return found


def measure() -> Iterator[dict[str, object]]:
    """The mean retention on held-out tasks by source, sparsity and draw of heads."""
    config = Parameters(**read_record(ROOT / "results" / RUN).parameters)
    suite = pai.Suite.load(config)
    numbers = progress(range(DRAWS), "heads", DRAWS)
    heads = {number: redrawn(suite, number) for number in numbers}
    dense = accuracies(suite, suite.encoder, heads)
    for name in progress(config.sources, "sources", len(config.sources)):
        source = suite.source(name)
        scores = suite.score(Recipe(SCORER), source, config.draw)
        unseen = [task for task in suite.tasks if is_held_out(task, name)]
        for sparsity in SPARSITIES:
            recipe = Recipe(SCORER, sparsity)
            pruned, _ = suite.prune(recipe, source, config.draw, scores=scores)
            left = accuracies(suite, pruned, heads)
            for draw in heads:
                kept = [
                    retention(left[task, draw], dense[task, draw], suite.tasks[task].chance)
                    for task in unseen
                ]
                mean = sum(kept) / len(kept)
                yield {"source": name, "sparsity": sparsity, "heads": draw, "retention": mean}


def main() -> None:
    """Measure, and store."""
    table = pd.DataFrame(measure())
    store(table, ROOT / "results/benchmarks/heads", "heads", scorer=SCORER, run=RUN)


if __name__ == "__main__":
    main()

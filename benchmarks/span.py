"""How much of a task the images of a source span: what may decide which task a mask keeps.

``PAI_DATA_ROOT=... python -m benchmarks.span`` takes the encoder, sources and tasks of stored runs
and writes table and record to ``results/benchmarks/span``; some minutes on one core.
"""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd
import torch
from torch import Tensor

import pai_utils as pai
from benchmarks.storing import ROOT, store
from pai_utils.curvature.diagonals import output_diagonal
from pai_utils.data.images import ImageDataset
from pai_utils.data.mixtures import is_held_out
from pai_utils.heads import features
from pai_utils.runs import read_record
from pai_utils.studies.zero_shot_retention import Parameters
from pai_utils.support.common import progress

RUNS = (
    "sources/zero_shot_retention-efficientnet_lite0",
    "transfer/zero_shot_retention-efficientnet_lite0",
    "transfer/zero_shot_retention-vit_small_saliency",
)
IMAGES = 500
RIDGE = 0.1  # over the mean variance of a feature


def outside(source: Tensor, target: Tensor) -> float:
    """The share of the variance of features ``[N, d]`` of a target that those of a source miss.

    With covariances S and T and λ the ridge, λ tr((S + λI)⁻¹ T) / tr T: what is left of T after a
    ridge regression on the directions in which the source varies.
    """
    s, t = (torch.cov(values.double().T, correction=0) for values in (source, target))
    ridge = RIDGE * s.diagonal().mean() * torch.eye(len(s), dtype=s.dtype)
    left = torch.linalg.solve(s + ridge, ridge @ t)
    return float(left.trace() / t.trace())


def measure(run: str) -> Iterator[dict[str, object]]:
    """One row a source and held-out task of a stored run."""
    config = Parameters(**read_record(ROOT / "results" / run).parameters)
    suite = pai.Suite.load(config)
    names = pai.prunable_parameters(suite.encoder)
    squares = torch.cat([suite.encoder.get_parameter(n).detach().flatten() for n in names]).square()

    def seen(images: ImageDataset) -> tuple[Tensor, Tensor]:
        some = images.subset(range(min(IMAGES, len(images))))
        diagonal = output_diagonal(suite.encoder, names, some, config.draw.at_most(len(some)))
        scores = squares * torch.cat([diagonal[name].flatten() for name in names])
        return features(suite.encoder, some)[0], scores.double()

    targets = {name: seen(task.test) for name, task in suite.tasks.items()}
    for source in progress(config.sources, "sources", len(config.sources)):
        own, scores = seen(suite.source(source, seed=config.seeds[0]).images)
        for target, (others, theirs) in targets.items():
            if is_held_out(target, source):
                alike = torch.corrcoef(torch.stack([scores, theirs]).sqrt())[0, 1]
                place = {"run": run, "source": source, "target": target}
                yield {**place, "outside": outside(own, others), "alike": float(alike)}


def main() -> None:
    """Measure, and store."""
    table = pd.DataFrame(row for run in RUNS for row in measure(run))
    store(table, ROOT / "results/benchmarks/span", "span", ridge=RIDGE, images=IMAGES)


if __name__ == "__main__":
    main()

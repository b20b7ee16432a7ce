"""The study of all scorers side by side: what they cost, remove, share, and leave."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence, Sized
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pai_utils.evaluation import dense_rows, estimate, judged_rows
from pai_utils.masks import Mask
from pai_utils.models.encoders import prunable_parameters
from pai_utils.pruning import Recipe
from pai_utils.studies.parameters import (
    ScorerName,
    ScorerOptions,
    Seeds,
    SeveralSources,
    Sparsity,
    combine,
)
from pai_utils.studies.suite import Suite, SweepMask, sweep
from pai_utils.support.common import clock, device_of, undisturbed
from pai_utils.support.sampling import Draw, Samples, batches

_MOST_SCORES = 200_000  # of a distribution that are kept: enough for its histogram


class Parameters(SeveralSources):
    """Parameters of the notebook ``scorer_atlas``."""

    scorers: list[ScorerName] = Field(min_length=2)
    sparsities: list[Sparsity] = Field(min_length=1)
    seeds: Seeds
    options: ScorerOptions = Field(default={})  #: scorers' own keywords

    @property
    def middle(self) -> float:
        """The sparsity at which masks are compared."""
        return sorted(self.sparsities)[len(self.sparsities) // 2]

    @property
    def recipes(self) -> list[Recipe]:
        """How masks are made: by every scorer, to every sparsity."""
        return combine(self.scorers, self.sparsities, options=self.options)


def run(suite: Suite, config: Parameters) -> tuple[pd.DataFrame, Atlas]:
    """The accuracies of a :func:`~pai_utils.studies.suite.sweep`, and its masks."""
    atlas, seeds = Atlas(config.middle), config.seeds
    table = sweep(suite, config.sources, config.recipes, config.draw, seeds=seeds, observe=atlas)
    return table, atlas


class Atlas:
    """Collects the masks of a sweep, which is given it as ``observe``.

    Masks are kept at one sparsity alone, at a byte a weight: of every source with the first seed,
    and of the first source with every seed.
    """

    def __init__(self, sparsity: float) -> None:
        self.sparsity = sparsity
        self.masks: dict[tuple[str, str, int], Mask] = {}  # by scorer, source and seed
        self.distributions: dict[str, Tensor] = {}  # scores of the first mask of each scorer
        self._first: dict[str, tuple[str, int]] = {}  # source and seed met first, by scorer
        self._seconds: dict[tuple[str, str, int], float] = {}
        self._layers: list[dict[str, Any]] = []

    def __call__(self, step: SweepMask) -> None:
        """Take one mask."""
        scorer, sparsity = step.recipe.scorer, step.recipe.sparsity
        source, seed = self._first.setdefault(scorer, (step.source, step.seed))
        key = (scorer, step.source, step.seed)
        self._seconds[key] = step.scores.seconds
        if scorer not in self.distributions:
            flat = torch.cat([values.detach().flatten() for values in step.scores.values()])
            self.distributions[scorer] = flat[:: -(-len(flat) // _MOST_SCORES)].cpu()
        place = {"scorer": scorer, "source": step.source, "seed": step.seed, "sparsity": sparsity}
        self._layers += [
            {**place, "layer": layer.removeprefix("backbone.encoder."), "layer_sparsity": share}
            for layer, share in step.mask.layer_sparsity.items()
        ]
        if sparsity == self.sparsity and (step.source == source or step.seed == seed):
            self.masks[key] = step.mask

    @property
    def layers(self) -> pd.DataFrame:
        """Columns ``scorer, source, seed, sparsity, layer, layer_sparsity``, in order of depth."""
        return pd.DataFrame(self._layers)

    def lost_layers(self) -> pd.DataFrame:
        """Columns ``scorer, sparsity``, layers ``lost``, and ``most_pruned`` of a layer: means."""
        masks = self.layers.groupby(["scorer", "sparsity", "source", "seed"], sort=False)
        each = masks.layer_sparsity.agg(lost=lambda s: int((s == 1).sum()), most_pruned="max")
        return each.groupby(["scorer", "sparsity"], sort=False).mean().reset_index()

    def costs(self, unit: float) -> pd.DataFrame:
        """Columns ``scorer, seconds, fb``: means over a scorer's runs, in seconds and in units."""
        seconds = pd.Series(self._seconds, name="seconds").rename_axis(["scorer", "source", "seed"])
        means = seconds.groupby("scorer", sort=False).mean().reset_index()
        return means.assign(fb=means.seconds / unit)

    def between_scorers(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Overlap of each pair of scorers, and the overlap by chance: means over the sources.

        A scorer that looks at no data is compared with every source's masks.
        """
        first: dict[str, dict[str, Mask]] = defaultdict(dict)
        for (scorer, source, seed), mask in self.masks.items():
            if seed == self._first[scorer][1]:
                first[scorer][source] = mask
        names = list(first)
        overlap, chance = (pd.DataFrame(1.0, index=names, columns=names) for _ in range(2))
        for one, other in itertools.combinations(names, 2):
            both = itertools.product(first[one].items(), first[other].items())
            pairs = [(mine, its) for (a, mine), (b, its) in both if a == b or "none" in (a, b)]
            for table, value in zip((overlap, chance), _mean_overlap(pairs), strict=True):
                table.loc[one, other] = table.loc[other, one] = value
        return overlap, chance

    def between_draws(self) -> pd.DataFrame:
        """Columns ``scorer, between, overlap, chance, pairs``, means over pairs of masks.

        Masks differ between ``"sources"`` with the same seed, and between ``"seeds"`` on the same
        source: for reasons of sampling alone. Scorers with a single mask have no row.
        """
        rows = []
        for scorer in self._first:
            own = [(key, mask) for key, mask in self.masks.items() if key[0] == scorer]
            both = list(itertools.combinations(own, 2))
            for between, same in (("sources", 2), ("seeds", 1)):
                if pairs := [(m, o) for (a, m), (b, o) in both if a[same] == b[same]]:
                    rows.append([scorer, between, *_mean_overlap(pairs), len(pairs)])
        return pd.DataFrame(rows, columns=["scorer", "between", "overlap", "chance", "pairs"])


def _mean_overlap(pairs: Sequence[tuple[Mask, Mask]]) -> tuple[float, float]:
    """The overlap of pairs of masks, and that by chance."""
    found = np.mean([one.overlap(other) for one, other in pairs])
    chance = np.mean([one.expected_overlap(other) for one, other in pairs])
    return float(found), float(chance)


def accuracy_left(table: pd.DataFrame, sources: Sequence[str]) -> pd.DataFrame:
    """What masks leave of the accuracy on their sources and on held-out tasks.

    Columns ``scorer, sparsity, retention, low, high, accuracy, count, seeds, tasks`` (``"source"``
    or ``"held-out"``): means over the sources, with their 95 % intervals.
    """
    dense, rows = dense_rows(table), []
    for tasks, own in (("source", True), ("held-out", False)):
        judged = judged_rows(table[table.scorer != "dense"], sources, own=own)
        for (scorer, sparsity), group in judged.groupby(["scorer", "sparsity"], sort=False):
            found = estimate(group, dense)
            counts = group.groupby(["source", "target"])["count"].first().sum()
            place = [scorer, sparsity, found.value, *found.interval(), group.accuracy.mean()]
            rows.append([*place, counts, group.seed.nunique(), tasks])
    columns = ["scorer", "sparsity", "retention", "low", "high", "accuracy", "count", "seeds"]
    return pd.DataFrame(rows, columns=[*columns, "tasks"])


def forward_backward_seconds(model: nn.Module, data: Samples, draw: Draw) -> float:
    """Seconds of one forward and backward of the mean loss: the unit in which scores are priced.

    The faster of two, with gradients for the prunable weights, as plain training has them.
    """
    indices, device = draw.at_most(len(cast(Sized, data))).indices(data), device_of(model)
    names = set(prunable_parameters(model))
    found = []
    with undisturbed(model), torch.enable_grad():
        for name, weight in model.named_parameters():
            weight.requires_grad_(name in names)
        for _ in range(2):
            begin = clock(device)
            for images, labels in batches(data, draw.batch_size, device, indices):
                F.cross_entropy(model(images), labels).backward()
            found.append(clock(device) - begin)
    return min(found)

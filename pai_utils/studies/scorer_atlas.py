"""Masks of many scorers side by side: what they cost, remove, share, and leave of the accuracy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Self

import numpy as np
import pandas as pd
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from pai_utils.evaluation import held_out_retention
from pai_utils.masks import Mask
from pai_utils.models.encoders import prunable_parameters
from pai_utils.scorers import SCORERS
from pai_utils.studies.parameters import EncoderParameters, ScorerName, Sparsity, TaskName
from pai_utils.studies.sweeps import SweepMask
from pai_utils.support.common import clock, device_of, undisturbed, unknown_name
from pai_utils.support.sampling import Samples, batches, draw_samples

_MOST_SCORES = 200_000  # of a distribution that are kept: enough for its histogram


class Atlas:
    """Collects the masks of a sweep; hand it to :func:`~pai_utils.studies.sweeps.retention_sweep`.

    Masks are kept at one sparsity: of every source with the first seed, and of the first source
    with every seed. A kept mask takes one byte a weight.

    Args:
        sparsity: the one at which masks are compared.
    """

    def __init__(self, sparsity: float) -> None:
        self.sparsity = sparsity
        self.masks: dict[tuple[str, str, int], Mask] = {}  # scorer, source, seed
        self.distributions: dict[str, Tensor] = {}  # scores of the first mask of each scorer
        self._first: dict[str, tuple[str, int]] = {}  # source and seed met first, by scorer
        self._seconds: dict[tuple[str, str, int], float] = {}
        self._layers: list[dict[str, Any]] = []

    def __call__(self, step: SweepMask) -> None:
        """Take one mask."""
        key = (step.scorer, step.source, step.seed)
        first = self._first.setdefault(step.scorer, (step.source, step.seed))
        self._seconds[key] = step.scores.seconds
        if step.scorer not in self.distributions:
            flat = torch.cat([values.detach().flatten() for values in step.scores.values()])
            self.distributions[step.scorer] = flat[:: -(-len(flat) // _MOST_SCORES)].cpu()
        self._layers += [
            {
                "scorer": step.scorer,
                "source": step.source,
                "seed": step.seed,
                "sparsity": step.sparsity,
                "layer": layer.removeprefix("encoder."),
                "layer_sparsity": share,
            }
            for layer, share in step.mask.layer_sparsity.items()
        ]
        if step.sparsity == self.sparsity and (step.source == first[0] or step.seed == first[1]):
            self.masks[key] = step.mask

    @property
    def layers(self) -> pd.DataFrame:
        """Columns ``scorer, source, seed, sparsity, layer, layer_sparsity``, in order of depth."""
        return pd.DataFrame(self._layers)

    def lost_layers(self) -> pd.DataFrame:
        """Columns ``scorer, sparsity, lost, most_pruned``, means over masks.

        ``lost`` counts layers without any weight, ``most_pruned`` is the highest layer sparsity.
        """
        masks = self.layers.groupby(["scorer", "sparsity", "source", "seed"], sort=False)
        each = masks.layer_sparsity.agg(lost=lambda share: int((share == 1).sum()), most="max")
        means = each.groupby(["scorer", "sparsity"], sort=False).mean().reset_index()
        return means.rename(columns={"most": "most_pruned"})

    def costs(self, unit: float) -> pd.DataFrame:
        """Columns ``scorer, seconds, fb``: means over a scorer's runs.

        Args:
            unit: seconds of one forward and backward over as many samples.
        """
        table = pd.DataFrame(
            [{"scorer": scorer, "seconds": s} for (scorer, _, _), s in self._seconds.items()]
        )
        means = table.groupby("scorer", sort=False).seconds.mean().reset_index()
        return means.assign(fb=means.seconds / unit)

    def between_scorers(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Overlap of each pair of scorers, and the overlap by chance, both square.

        Means over the sources, each with its first seed; a scorer that looks at no data is
        compared with every source's masks.
        """
        first: dict[str, list[Mask]] = {}
        for (scorer, _, seed), mask in self.masks.items():
            if seed == self._first[scorer][1]:
                first.setdefault(scorer, []).append(mask)
        names = list(first)
        overlap, chance = (pd.DataFrame(1.0, index=names, columns=names) for _ in range(2))
        for i, one in enumerate(names):
            for other in names[i + 1 :]:
                pairs = _matched(first[one], first[other])
                values = _means(pairs)
                overlap.loc[one, other] = overlap.loc[other, one] = values[0]
                chance.loc[one, other] = chance.loc[other, one] = values[1]
        return overlap, chance

    def between_draws(self) -> pd.DataFrame:
        """Columns ``scorer, between, overlap, chance, pairs``, means over pairs of masks.

        ``between`` is ``"sources"`` (the same seed) or ``"seeds"`` (the same source, other samples
        and draws): the second says how far apart masks are for reasons of sampling alone. Scorers
        with a single mask have no row.
        """
        rows = []
        for scorer, (source, seed) in self._first.items():
            own = {key[1:]: mask for key, mask in self.masks.items() if key[0] == scorer}
            groups = {
                "sources": [mask for key, mask in own.items() if key[1] == seed],
                "seeds": [mask for key, mask in own.items() if key[0] == source],
            }
            for between, masks in groups.items():
                pairs = [(a, b) for i, a in enumerate(masks) for b in masks[i + 1 :]]
                if pairs:
                    overlap, chance = _means(pairs)
                    rows.append(
                        {
                            "scorer": scorer,
                            "between": between,
                            "overlap": overlap,
                            "chance": chance,
                            "pairs": len(pairs),
                        }
                    )
        return pd.DataFrame(rows, columns=["scorer", "between", "overlap", "chance", "pairs"])


def _matched(one: list[Mask], other: list[Mask]) -> list[tuple[Mask, Mask]]:
    """Masks of the same source; a scorer's only mask goes with each of the other's."""
    if len(one) == 1 or len(other) == 1:
        return [(a, b) for a in one for b in other]
    return list(zip(one, other, strict=True))


def _means(pairs: Iterable[tuple[Mask, Mask]]) -> tuple[float, float]:
    values = np.array([[a.overlap(b), a.expected_overlap(b)] for a, b in pairs])
    overlap, chance = values.mean(0).tolist()
    return overlap, chance


def accuracy_left(table: pd.DataFrame, sources: Sequence[str]) -> pd.DataFrame:
    """What masks leave of the source's own and of held-out tasks' accuracy.

    Args:
        table: as from :func:`~pai_utils.studies.sweeps.retention_sweep`.
        sources: the tasks that masks were computed on.

    Returns:
        One row a scorer, sparsity and ``tasks`` (``"source"`` or ``"held-out"``), means over the
        sources: ``retention, low, high`` (means of the sources' 95 % bootstrap intervals over
        test items and seeds), ``accuracy, count, seeds``.
    """
    parts = []
    for tasks, own in (("source", True), ("held-out", False)):
        rows = held_out_retention(table, sources, own=own)
        groups = rows[rows.sparsity > 0].groupby(["scorer", "sparsity"], sort=False)
        means = groups[["retention", "low", "high", "accuracy"]].mean()
        means["count"], means["seeds"] = groups["count"].sum(), groups.seeds.min()
        parts.append(means.reset_index().assign(tasks=tasks))
    return pd.concat(parts, ignore_index=True)


def summary_table(left: pd.DataFrame, costs: pd.DataFrame) -> pd.DataFrame:
    """One line a scorer, to be read: retention with its interval at each sparsity, and the cost.

    Args:
        left: as from :func:`accuracy_left`.
        costs: as from :meth:`Atlas.costs`.

    Returns:
        Text in the columns ``scorer``, ``held-out 30 %`` and so on, ``source 30 %`` and so on, and
        ``cost (FB)``; the best retention on held-out tasks at the middle sparsity comes first.
    """
    sparsities = sorted(set(left.sparsity))
    middle = sparsities[len(sparsities) // 2]
    held_out = left[(left.tasks == "held-out") & (left.sparsity == middle)]
    order = held_out.sort_values("retention", ascending=False).scorer
    rows = {(r.scorer, r.tasks, r.sparsity): r for r in left.itertuples()}
    prices = costs.set_index("scorer").fb
    table = []
    for scorer in order:
        line = {"scorer": scorer}
        for tasks in ("held-out", "source"):
            for sparsity in sparsities:
                row: Any = rows[scorer, tasks, sparsity]
                # Adding zero turns "-0.00" into "0.00".
                values = [round(float(v), 2) + 0.0 for v in (row.retention, row.low, row.high)]
                line[f"{tasks} {sparsity:.0%}"] = "{:.2f} ({:.2f} to {:.2f})".format(*values)
        table.append(line | {"cost (FB)": f"{prices[scorer]:.2g}"})
    return pd.DataFrame(table)


def forward_backward_seconds(
    model: nn.Module,
    data: Samples,
    *,
    samples: int | None = 256,
    batch_size: int = 64,
    seed: int = 0,
    repeats: int = 2,
) -> float:
    """Seconds of one forward and backward of the mean loss: the unit in which scores are priced.

    The fastest of ``repeats``, with gradients for the prunable weights, as plain training has
    them; arguments otherwise as in :func:`~pai_utils.scorers.score`.

    Raises:
        ValueError: as `draw_samples`, or for fewer repeats than one.
    """
    if repeats < 1:
        raise ValueError(f"repeats={repeats}: at least one is needed")
    indices = draw_samples(data, samples, seed)
    names = set(prunable_parameters(model))
    weights: Mapping[str, nn.Parameter] = dict(model.named_parameters())
    found = []
    with undisturbed(model), torch.enable_grad():
        for name, weight in weights.items():
            weight.requires_grad_(name in names)
        for _ in range(repeats):
            begin = clock(device_of(model))
            for images, labels in batches(data, batch_size, device_of(model), indices):
                F.cross_entropy(model(images), labels).backward()
            found.append(clock(device_of(model)) - begin)
    return min(found)


class Parameters(EncoderParameters):
    """Parameters of the notebook ``scorer_atlas``."""

    sources: list[TaskName] = Field(min_length=2)
    scorers: list[ScorerName] = Field(min_length=2)
    sparsities: list[Sparsity] = Field(min_length=1)
    seeds: list[Annotated[int, Field(ge=0)]] = Field(min_length=1)
    options: dict[ScorerName, dict[str, Any]] = Field(
        default={}
    )  #: a scorer's own keywords, or its samples

    @model_validator(mode="after")
    def _known_options(self) -> Self:
        for scorer, options in self.options.items():
            if scorer not in self.scorers:
                raise unknown_name("scorer of options", scorer, self.scorers)
            valid = [*SCORERS[scorer].options, "samples", "batch_size"]
            for option in options:
                if option not in valid:
                    raise unknown_name(f"option of {scorer}", option, valid)
        return self

"""The study of zero-shot retention: its parameters, its sweeps and its tables."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Self, cast

import pandas as pd
from pydantic import Field, field_validator, model_validator

from pai_utils.data.mixtures import IMAGE_SETS, is_held_out, task_of
from pai_utils.evaluation import dense_rows, estimate, judged_rows, verdicts
from pai_utils.heads import HEADS
from pai_utils.pruning import Recipe
from pai_utils.studies.parameters import (
    Masks,
    Repair,
    ScorerName,
    ScorerOptions,
    Seeds,
    TaskName,
    check_sources,
    checked,
    one_of,
)
from pai_utils.studies.suite import Suite, sweep
from pai_utils.support.sampling import PRECISIONS


class Parameters(Masks):
    """Parameters of the notebook ``zero_shot_retention``."""

    #: One or several, as of `pai_utils.data.mixtures`.
    source: Annotated[str | list[str], checked(check_sources)]
    targets: list[TaskName] = Field(min_length=1)
    scorers: list[ScorerName] = Field(min_length=1)  #: the first is the one claims are about
    seeds: Seeds
    repairs: list[Repair] = Field(default=["none"], min_length=1)
    options: ScorerOptions = Field(default={})  #: scorers' own keywords
    heads: Annotated[str, one_of("kind of head", HEADS)] = "linear"  #: or "text", of class names
    #: Of the forwards that measure accuracy.
    precision: Annotated[str, one_of("precision", PRECISIONS)] = "float32"

    @field_validator("repairs")
    @classmethod
    def _plain_masks_too(cls, repairs: list[str]) -> list[str]:
        if "none" not in repairs:
            raise ValueError("masks without repair are what others are seen beside; add none")
        return repairs

    @model_validator(mode="after")
    def _unseen_tasks(self) -> Self:
        for source in self.sources:
            if not any(is_held_out(task, source) for task in self.tasks):
                raise ValueError(f"the only target is the source {source}; add an unseen task")
        return self

    @property
    def sources(self) -> list[str]:
        """The sources, always as a list."""
        return [self.source] if isinstance(self.source, str) else self.source

    @property
    def tasks(self) -> list[str]:
        """Tasks among the sources, and targets, each once, in that order."""
        parts = [part for source in self.sources for part in source.split("+")]
        seen = [task_of(part) for part in parts if part not in IMAGE_SETS]
        return list(dict.fromkeys([*seen, *self.targets]))

    @property
    def recipes(self) -> list[Recipe]:
        """How masks are made: by every scorer, to every sparsity, with every repair."""
        return self.combined(self.scorers, self.repairs, options=self.options)


def run(suite: Suite, config: Parameters, *, plain: bool = False) -> pd.DataFrame:
    """A :func:`~pai_utils.studies.suite.sweep` over all sources, recipes and seeds.

    A plain one has the first scorer and seed alone, in one round and without repair.
    """
    recipes, seeds, precision = config.recipes, config.seeds, config.precision
    if plain:
        first = [r for r in recipes if r.scorer == config.scorers[0] and r.repair == "none"]
        recipes, seeds = [replace(recipe, rounds=1) for recipe in first], seeds[:1]
    return sweep(suite, config.sources, recipes, config.draw, seeds=seeds, precision=precision)


def retention_verdict(
    table: pd.DataFrame, sources: Sequence[str], scorer: str, *, threshold: float = 0.9
) -> pd.DataFrame:
    """Whether held-out tasks keep a fraction ``threshold`` of their accuracy above chance.

    The table is as from :func:`run`. Columns ``sparsity, retention, low, high`` (of the mean over
    all sources), ``over`` (what the interval is about), ``worst`` (the lowest source), ``verdict``,
    corrected for the number of sparsities (:func:`~pai_utils.evaluation.verdicts`).
    """
    dense, rows = dense_rows(table), judged_rows(table, sources)
    estimates, found = [], []
    for sparsity, group in rows[rows.scorer == scorer].groupby("sparsity"):
        mean = estimate(group, dense)
        worst = min(estimate(own, dense).value for _, own in group.groupby("source"))
        estimates.append(mean)
        found.append([sparsity, mean.value, *mean.interval(), mean.over, worst])
    columns = ["sparsity", "retention", "low", "high", "over", "worst"]
    return pd.DataFrame(found, columns=columns).assign(verdict=verdicts(estimates, threshold))


def sparsity_kept(summary: pd.DataFrame, *, threshold: float = 0.9) -> pd.DataFrame:
    """The sparsity up to which retention stays at ``threshold``, for each pair of tasks and scorer.

    It is where the line through the points of ``summary`` (a table of
    :func:`~pai_utils.evaluation.summarise_retention`) first crosses the threshold, from a
    retention of 1 at sparsity 0; else the highest sparsity, and ``crossed`` is false. Columns
    ``source, target, scorer, sparsity, low, high, crossed``, the bounds by those of the retention.
    """
    rows = []
    keys, curves = ["source", "target", "scorer"], ["retention", "low", "high"]
    for key, group in summary[summary.scorer != "dense"].groupby(keys, sort=False):
        line = group.sort_values("sparsity")
        found = [_first_crossing(line.sparsity, line[curve], threshold) for curve in curves]
        rows.append((*cast(tuple[Any, ...], key), *found, (line.retention < threshold).any()))
    return pd.DataFrame(rows, columns=[*keys, "sparsity", "low", "high", "crossed"])


def _first_crossing(sparsities: pd.Series, values: pd.Series, threshold: float) -> float:
    points = zip([0.0, *sparsities], [1.0, *values], strict=True)
    for (before, above), (after, kept) in itertools.pairwise(points):
        if kept < threshold:
            return float(before + (above - threshold) / (above - kept) * (after - before))
    return float(sparsities.iloc[-1])

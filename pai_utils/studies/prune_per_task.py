"""The study of masks of single tasks: its parameters and its masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
from pydantic import Field, field_validator

from pai_utils.evaluation import summarise_retention
from pai_utils.masks import describe_weights
from pai_utils.pruning import Recipe
from pai_utils.scorers import SCORERS, find_scorer
from pai_utils.studies.parameters import ScorerName, SeveralSources, Sparsity, combine
from pai_utils.studies.suite import Suite, SweepMask, sweep


class Parameters(SeveralSources):
    """Parameters of the notebook ``prune_per_task``."""

    scorers: list[ScorerName] = Field(min_length=1)
    sparsity: Sparsity

    @field_validator("scorers")
    @classmethod
    def _one_needs_data(cls, scorers: list[str]) -> list[str]:
        if not any(find_scorer(name).needs_data for name in scorers):
            valid = ", ".join(name for name, scorer in SCORERS.items() if scorer.needs_data)
            raise ValueError(f"none of {', '.join(scorers)} looks at a task; add one of: {valid}")
        return scorers

    @property
    def recipes(self) -> list[Recipe]:
        """How masks are made: by every scorer."""
        return combine(self.scorers, [self.sparsity])


def run(suite: Suite, config: Parameters) -> tuple[list[SweepMask], pd.DataFrame]:
    """A mask of every scorer and task, and what it leaves of the task that it looked at.

    The table is as from :func:`~pai_utils.evaluation.summarise_retention`; masks that looked at no
    task have a row for each.
    """
    made: list[SweepMask] = []
    table = sweep(suite, config.sources, config.recipes, config.draw, observe=made.append)
    model = suite.classifier(config.sources[0])
    for each in made:
        each.mask.metadata.update(describe_weights(model, each.mask))
    own = (table.source == "none") | (table.source == table.target)
    return made, summarise_retention(table[own])


def summary_table(made: Sequence[SweepMask], retained: pd.DataFrame) -> pd.DataFrame:
    """One row a mask: what it removes, and what it leaves of its own tasks, in the mean."""
    means = retained.groupby(["scorer", "source"])[["dense_accuracy", "accuracy", "retention"]]
    left: Any = means.mean().rename(columns={"dense_accuracy": "dense accuracy"}).to_dict("index")
    return pd.DataFrame(
        {
            "scorer": each.recipe.scorer,
            "source": each.source,
            **left[each.recipe.scorer, each.source],
            "scores exactly zero": sum(int((v == 0).sum()) for v in each.scores.values())
            / each.mask.total,
            "sparsity": each.mask.sparsity,
            "layers": len(each.mask),
            "layers above 99 % sparse": sum(s > 0.99 for s in each.mask.layer_sparsity.values()),
            "layers lost": len(each.mask.empty_layers),
        }
        for each in made
    )

"""The study of masks of single tasks: its parameters and its masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
from pydantic import Field, field_validator

from pai_utils.evaluation import Evaluation, evaluate, summarise_retention
from pai_utils.masks import Mask, describe_weights
from pai_utils.models.encoders import Classifier
from pai_utils.pruning import Recipe
from pai_utils.scorers import SCORERS, Scores, find_scorer
from pai_utils.studies.parameters import ScorerName, SeveralSources, Sparsity
from pai_utils.studies.suite import Suite


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


@dataclass(frozen=True)
class TaskMask:
    """A mask of one task, and what is left of the accuracy on it."""

    scorer: str
    task: str  #: the first one for a scorer that looks at none
    scores: Scores
    mask: Mask  #: of a classifier
    left: Evaluation

    @property
    def source(self) -> str:
        """The task, or ``"none"`` for a scorer that looks at none."""
        return self.task if find_scorer(self.scorer).needs_data else "none"


def run(suite: Suite, config: Parameters) -> list[TaskMask]:
    """A mask of every scorer and task, evaluated on that task."""
    made = []
    for scorer in config.scorers:
        recipe = Recipe(scorer, config.sparsity)
        for name in config.sources if find_scorer(scorer).needs_data else config.sources[:1]:
            source = suite.source(name, seed=config.seed)
            scores = suite.score(recipe, source, config.draw)
            encoder, mask = suite.prune(recipe, source, config.draw, scores=scores)
            mask.metadata.update(describe_weights(suite.classifier(name), mask))
            left = evaluate(Classifier(encoder, suite.heads[name]), suite.tests[name])
            made.append(TaskMask(scorer, name, scores, mask, left))
    return made


def summary_table(made: Sequence[TaskMask], dense: Mapping[str, Evaluation]) -> pd.DataFrame:
    """One row a mask: what it removes, and the accuracy with and without it."""
    return pd.DataFrame(
        {
            "scorer": each.scorer,
            "source": each.task,
            "dense accuracy": dense[each.task].accuracy,
            "accuracy": each.left.accuracy,
            "from": each.left.interval[0],
            "to": each.left.interval[1],
            "scores exactly zero": sum(int((v == 0).sum()) for v in each.scores.values())
            / each.mask.total,
            "sparsity": each.mask.sparsity,
            "layers": len(each.mask),
            "layers above 99 % sparse": sum(s > 0.99 for s in each.mask.layer_sparsity.values()),
            "layers lost": len(each.mask.empty_layers),
        }
        for each in made
    )


def retained(
    made: Sequence[TaskMask], suite: Suite, config: Parameters, dense: Mapping[str, Evaluation]
) -> pd.DataFrame:
    """What masks leave of their own tasks (:func:`~pai_utils.evaluation.summarise_retention`)."""
    rows = suite.rows(dense)
    for each in made:
        place = {"source": each.source, "scorer": each.scorer, "seed": config.seed}
        rows += suite.rows({each.task: each.left}, sparsity=config.sparsity, **place)
    return summarise_retention(pd.DataFrame(rows))

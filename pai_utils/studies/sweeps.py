"""Prune by every source and recipe, evaluate on every task."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import pandas as pd

from pai_utils.data.mixtures import IMAGE_SETS, source_parts
from pai_utils.evaluation import Evaluation
from pai_utils.masks import Mask
from pai_utils.models.encoders import Backbone
from pai_utils.pruning import Recipe
from pai_utils.repair.methods import parse_repair
from pai_utils.scorers import SCORERS, Scores
from pai_utils.studies.suite import Source, Suite
from pai_utils.support.common import progress
from pai_utils.support.sampling import Draw


@dataclass(frozen=True)
class SweepMask:
    """One mask of a :func:`sweep`, and what made it."""

    recipe: Recipe
    source: str  #: "none" where nothing looked at data
    seed: int
    scores: Scores  #: of the dense encoder, by which the first round prunes
    mask: Mask  #: of a classifier


def sweep(
    suite: Suite,
    sources: Sequence[str],
    recipes: Sequence[Recipe],
    draw: Draw,
    *,
    seeds: Sequence[int] | None = None,
    draws: Mapping[str, Draw] | None = None,
    precision: str = "float32",
    observe: Callable[[SweepMask], None] | None = None,
) -> pd.DataFrame:
    """Prune on every source, evaluate on every task with its frozen head.

    A mask depends on no data but the source's (:mod:`pai_utils.data.mixtures`), of tasks on their
    training part. Recipes that begin with the same scores stand next to each other and share them,
    computed once a source and seed. A scorer that looks at no data runs once, under the source
    ``"none"``, but its masks are repaired on every source; one that draws nothing runs with the
    first seed alone. Some scorers may have ``draws`` of their own. The ``precision`` is that of
    the forwards that measure accuracy, as in :func:`~pai_utils.evaluation.evaluate`. ``observe``
    is given every mask before it is evaluated.

    Returns:
        One row a source, recipe, seed and target, and the dense rows (scorer ``"dense"``, sparsity
        0): columns ``target, source, scorer, sparsity, seed, accuracy, loss, count, chance,
        correct`` (the last one ``[count]`` bool). The scorer is the recipe's
        :attr:`~pai_utils.pruning.Recipe.label`.

    Raises:
        ValueError: for a recipe that cannot be followed, an unknown source or precision, or a
            recipe that needs a head or labels with a source that has no task.
    """
    for recipe in recipes:
        recipe.check()
        for source in sources:
            if all(part in IMAGE_SETS for part in source_parts(source, suite.tasks)):
                _check_needs_no_task(recipe, source)
    seeds = [draw.seed] if seeds is None else seeds
    alike = itertools.groupby(recipes, lambda r: (r.scorer, r.options, r.include, r.exclude))
    groups = [list(group) for _, group in alike]
    cells = [
        (group, source, seed)
        for group in groups
        for source in (sources if SCORERS[group[0].scorer].needs_data else ["none"])
        for seed in (seeds if SCORERS[group[0].scorer].seeded else seeds[:1])
    ]

    @cache
    def loaded(name: str, seed: int) -> Source | None:
        return None if name == "none" else suite.source(name, seed=seed)

    def evaluated(encoder: Backbone) -> dict[str, Evaluation]:
        return suite.evaluate(encoder, batch_size=draw.batch_size, precision=precision)

    table = suite.rows(evaluated(suite.encoder))
    for group, source, seed in progress(cells, "retention", total=len(cells)):
        drawn = replace((draws or {}).get(group[0].scorer, draw), seed=seed)
        scores = suite.score(group[0], loaded(source, seed), drawn)
        for recipe in group:
            blind_repair = source == "none" and recipe.repair != "none"
            for place in sources if blind_repair else [source]:
                encoder, mask = suite.prune(recipe, loaded(place, seed), drawn, scores=scores)
                if observe is not None:
                    observe(SweepMask(recipe, place, seed, scores, mask))
                made = {"source": place, "scorer": recipe.label, "sparsity": recipe.sparsity}
                table += suite.rows(evaluated(encoder), **made, seed=seed)
    return pd.DataFrame(table)


def _check_needs_no_task(recipe: Recipe, source: str) -> None:
    scorer = SCORERS[recipe.scorer]
    if scorer.needs_data and scorer.needs_head:
        raise ValueError(
            f"scorer {recipe.scorer!r} needs a task's head, and source {source!r} has none; "
            "use feature_ggn_diag, or add a task to the source with a +"
        )
    if "obs" in parse_repair(recipe.repair):
        raise ValueError(
            f"repair 'obs' needs labels, and source {source!r} has none; add a task to the source "
            "with a +"
        )

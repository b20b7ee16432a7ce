"""The study of one's own images: choose by their validation part, and say what others lose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated

import pandas as pd
from pydantic import Field

from pai_utils.evaluation import summarise_retention
from pai_utils.export import FORMATS
from pai_utils.masks import Mask, describe_weights
from pai_utils.models.encoders import Backbone, Classifier
from pai_utils.pruning import Recipe
from pai_utils.scorers import shuffled
from pai_utils.studies.parameters import Positive, Rate, RepairedMasks, ScorerName, one_of
from pai_utils.studies.suite import Suite, sweep


class Parameters(RepairedMasks):
    """Parameters of the notebook ``prune_your_own``."""

    scorers: list[ScorerName] = Field(min_length=1)
    tolerance: Annotated[float, Field(ge=0, lt=1)] = 0.05  #: of the accuracy above chance
    finetune_steps: Annotated[int, Field(ge=0)] = 0
    learning_rate: Rate = 1e-5
    finetune_batch_size: Positive = 32
    formats: list[Annotated[str, one_of("format", FORMATS)]] = Field(
        default=list(FORMATS), min_length=1
    )

    @property
    def recipes(self) -> list[Recipe]:
        """The candidates."""
        return self.combined(self.scorers, [self.repair])


def compare_candidates(suite: Suite, config: Parameters) -> pd.DataFrame:
    """Retention on the source's validation part, of every scorer and sparsity; no test is read.

    Columns ``scorer, sparsity, accuracy, retention, low, high, dense_accuracy, chance, count``.
    """
    name = config.source
    blind = replace(suite.tasks[name], test=suite.tasks[name].validation)
    own = Suite(suite.encoder, {name: blind}, {name: suite.heads[name]})
    summary = summarise_retention(sweep(own, [config.pool], config.recipes, config.draw))
    summary = summary[summary.scorer != "dense"].drop(columns=["source", "target", "seeds"])
    if summary.retention.isna().any():
        dense, chance = summary.dense_accuracy.iloc[0], summary.chance.iloc[0]
        raise ValueError(
            f"on the validation part of {name} the dense encoder is right for {dense:.3f} of the "
            f"images and a constant guess for {chance:.3f}: there is nothing to retain"
        )
    plain = {recipe.label: recipe.scorer for recipe in config.recipes}
    return summary.assign(scorer=summary.scorer.map(plain)).reset_index(drop=True)


def choose(candidates: pd.DataFrame, tolerance: float) -> pd.Series:
    """The row of the highest sparsity that keeps ``1 - tolerance``; of several, what keeps most.

    Choosing among many candidates flatters its retention.
    """
    kept = candidates[candidates.retention >= 1 - tolerance]
    if kept.empty:
        best = candidates.sort_values("retention", ascending=False, kind="stable").iloc[0]
        raise ValueError(
            f"no candidate keeps {1 - tolerance:.3f} of the accuracy above chance; "
            f"{best.scorer} at sparsity {best.sparsity:g} keeps {best.retention:.3f}: add lower "
            "sparsities, another repair or more images, or raise the tolerance"
        )
    return kept.sort_values(["sparsity", "retention"], ascending=False, kind="stable").iloc[0]


def prune_as_chosen(
    choice: pd.Series, suite: Suite, config: Parameters
) -> tuple[dict[str, Classifier], Mask]:
    """The source's classifier ``"pruned"`` as chosen and perhaps ``"fine-tuned"``, and its mask."""
    dense = suite.classifier(config.source)
    encoder, mask = _prune(suite, config, choice.scorer, choice.sparsity)
    mask.metadata.update(describe_weights(dense, mask))
    stages = {"pruned": Classifier(encoder, dense.head)}
    if config.finetune_steps:
        steps, rate, size = config.finetune_steps, config.learning_rate, config.finetune_batch_size
        how = {"steps": steps, "learning_rate": rate, "batch_size": size, "seed": config.seed}
        stages["fine-tuned"] = suite.fine_tuned(encoder, config.source, mask, **how)
    return stages, mask


def compare_stages(
    stages: Mapping[str, Classifier], suite: Suite, config: Parameters, choice: pd.Series
) -> pd.DataFrame:
    """Retention after each stage, on every task's test part, with a column ``stage``.

    The last stage, ``"shuffled"``, is a control: each layer loses as many weights as in
    ``"pruned"``, but drawn at random, and is repaired in the same way.
    """
    control, _ = _prune(suite, config, shuffled(choice.scorer), choice.sparsity)
    rows = []
    encoders = {stage: model.backbone for stage, model in stages.items()}
    for stage, encoder in {**encoders, "shuffled": control}.items():
        scorer = shuffled(choice.scorer) if stage == "shuffled" else choice.scorer
        made = {"source": config.pool, "scorer": scorer, "sparsity": choice.sparsity}
        found = suite.evaluate(encoder, batch_size=config.batch_size)
        rows += suite.rows(found, stage=stage, **made)
    return suite.summarise_stages(pd.DataFrame(rows), suite.evaluate(batch_size=config.batch_size))


def _prune(suite: Suite, config: Parameters, scorer: str, sparsity: float) -> tuple[Backbone, Mask]:
    pool = suite.source(config.pool, seed=config.seed)
    recipe = replace(config.recipes[0], scorer=scorer, sparsity=sparsity)
    return suite.prune(recipe, pool, config.draw)

"""The study of what fine-tuning recovers: its parameters, its runs and its tables."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
from pydantic import Field, field_validator
from torch import nn

from pai_utils.curvature.diagonals import output_diagonal
from pai_utils.data.images import ImageDataset
from pai_utils.evaluation import Evaluation, estimate, evaluate_heads, retention
from pai_utils.finetuning import OPTIMISERS, SCHEDULES, FeaturePenalty, Penalty, finetune
from pai_utils.heads import features, make_heads
from pai_utils.masks import Mask
from pai_utils.models.encoders import Backbone, Classifier, prunable_parameters
from pai_utils.pruning import Recipe
from pai_utils.scorers import find_scorer, shuffled
from pai_utils.studies.parameters import Positive, Rate, RepairedMasks, ScorerName, Seeds, one_of
from pai_utils.studies.suite import Suite
from pai_utils.support.common import NonFiniteError, copied, logger, progress
from pai_utils.support.sampling import Draw

_SETTINGS = ["start", "sparsity", "penalty", "learning_rate"]  # of a run, as columns
STARTS = ("pruned", "repaired", "shuffled", "dense")
"""What is fine-tuned: pruned by the scorer, also repaired, by a layer-wise shuffle of its mask, or
not pruned."""
PENALTIES = ("none", "unweighted", "source", "pool", "features")
"""What holds fine-tuning: nothing; a pull to the dense weights, all alike (L2-SP) or by the
features' curvature on images of the source or of a mixture; or a pull to the dense features on the
mixture."""


class Parameters(RepairedMasks):
    """Parameters of the notebook ``finetune_recovery``, whose start ``repaired`` has the repair."""

    scorer: ScorerName
    starts: list[Annotated[str, one_of("start", STARTS)]] = Field(min_length=1)
    #: Strengths λ, of runs from the first start at the first sparsity; elsewhere there is none.
    penalties: dict[Annotated[str, one_of("penalty", PENALTIES)], Annotated[float, Field(ge=0)]] = (
        Field(default={"none": 0.0})
    )
    optimiser: Annotated[str, one_of("optimiser", OPTIMISERS)] = "sgd"
    schedule: Annotated[str, one_of("schedule", SCHEDULES)] = "constant"  #: of the rate
    learning_rates: list[Rate] = Field(min_length=1)
    steps: list[Annotated[int, Field(ge=0)]] = Field(min_length=2)  #: when tasks are evaluated
    seeds: Seeds
    finetune_batch_size: Positive = 32

    @field_validator("penalties")
    @classmethod
    def _plain_too(cls, penalties: dict[str, float]) -> dict[str, float]:
        if "none" not in penalties:
            raise ValueError("runs without a penalty are what others are seen beside; add none")
        return {"none": 0.0, **penalties}  # first, whatever order a file gave

    @property
    def recipes(self) -> list[Recipe]:
        """How masks are made, of every start that has one, at every sparsity."""
        starts = [start for start in self.starts if start != "dense"]
        return [self.recipe(start, s) for start in starts for s in self.sparsities]

    def recipe(self, start: str, sparsity: float) -> Recipe:
        """How the mask of a start is made."""
        scorer = shuffled(self.scorer) if start == "shuffled" else self.scorer
        repair = self.repair if start == "repaired" else "none"
        return replace(self.combined([scorer], [repair])[0], sparsity=sparsity)


def run(suite: Suite, config: Parameters) -> pd.DataFrame:
    """Fine-tune from every start, at every sparsity and with every seed; the dense one once a seed.

    Heads stay frozen; at the last step new ones are fitted too. A run that diverges ends with its
    last finite rows.

    Returns:
        Columns ``penalty, learning_rate, step, target, split, head ("frozen" or "refitted"), seed,
        accuracy, loss, count, chance, correct, start, sparsity``; the split is ``"test"``, and for
        the source with its frozen head also ``"validation"``, to choose a rate by.
    """
    rows = []
    common: dict[str, Any] = {"optimiser": config.optimiser, "schedule": config.schedule}
    common |= {"steps": max(config.steps), "batch_size": config.finetune_batch_size}
    for seed in config.seeds:
        pool, draw = suite.source(config.pool, seed=seed), replace(config.draw, seed=seed)
        images = {"source": suite.tasks[config.source].train, "pool": pool.images}
        for sparsity, start in itertools.product(config.sparsities, config.starts):
            encoder, mask = suite.encoder, None
            if start != "dense":
                encoder, mask = suite.prune(config.recipe(start, sparsity), pool, draw)
            elif sparsity != config.sparsities[0]:
                continue
            first = (start, sparsity) == (config.starts[0], config.sparsities[0])
            strengths = config.penalties if first else {"none": 0.0}
            penalties = {
                name: make_penalty(name, strength, suite.encoder, images, draw)
                for name, strength in strengths.items()
            }
            runs = list(itertools.product(penalties.items(), config.learning_rates))
            for (label, penalty), rate in progress(runs, "fine-tuning", len(runs)):
                how = {"penalty": penalty, "learning_rate": rate, "seed": seed, **common}
                found = _fine_tune(suite, config, encoder, mask, how)
                tuned = {"penalty": label, "learning_rate": rate}
                begun = {"start": start, "sparsity": 0.0 if mask is None else sparsity}
                rows += [{**tuned, **row, **begun} for row in found]
    if not any(row["step"] == max(config.steps) for row in rows):
        raise ValueError("no fine-tuning came to its last step; try smaller learning rates")
    return pd.DataFrame(rows)


def _fine_tune(
    suite: Suite, config: Parameters, encoder: Backbone, mask: Mask | None, how: Mapping[str, Any]
) -> list[dict[str, object]]:
    """Fine-tune a copy of an encoder on the source; the rows of what was evaluated on the way."""
    rows: list[dict[str, object]] = []
    task = suite.tasks[config.source]
    tuned = Classifier(copied(encoder), suite.heads[config.source])

    def record(step: int, heads: Mapping[str, nn.Linear], split: str = "test") -> None:
        data = suite.tests if split == "test" else {config.source: task.validation}
        head = "frozen" if heads is suite.heads else "refitted"
        for target, result in evaluate_heads(tuned.backbone, heads, data).items():
            place = {"step": step, "target": target, "split": split, "head": head}
            rows.append({**place, "seed": how["seed"], **result.row(suite.tasks[target].chance)})

    def watch(step: int) -> None:
        if step in config.steps:
            record(step, suite.heads)
            record(step, suite.heads, "validation")

    try:
        finetune(tuned, task.train, mask, on_step=watch, **how)
    except NonFiniteError as error:
        logger.warning("fine-tuning ends early: %s", error)
        return rows
    record(how["steps"], make_heads(tuned.backbone, suite.tasks))
    return rows


def make_penalty(
    name: str, strength: float, encoder: Backbone, images: Mapping[str, ImageDataset], draw: Draw
) -> Penalty | FeaturePenalty | None:
    """A penalty that holds prunable weights, or features, to those of the dense encoder.

    ``name`` is one of :data:`PENALTIES`; ``images`` are those of ``"source"`` and ``"pool"``. A
    curvature (:func:`~pai_utils.curvature.diagonals.output_diagonal`) is divided by its mean over
    all weights, so that one strength means as much pull on average with it as without.
    """
    if name == "none":
        return None
    if name == "features":
        held = features(encoder, images["pool"], batch_size=draw.batch_size)[0]
        return FeaturePenalty(images["pool"], held, strength)
    weights = {n: encoder.get_parameter(n).detach() for n in prunable_parameters(encoder)}
    anchor = {f"backbone.{n}": weight for n, weight in weights.items()}
    if name == "unweighted":
        return Penalty(anchor, strength)
    data = images[name]
    diagonal = output_diagonal(encoder, list(weights), data, draw.at_most(len(data)))
    mean = float(torch.cat([values.flatten() for values in diagonal.values()]).double().mean())
    return Penalty(anchor, strength, {f"backbone.{n}": v / mean for n, v in diagonal.items()})


def recovery_results(
    recovery: pd.DataFrame, suite: Suite, dense: Mapping[str, Evaluation], config: Parameters
) -> pd.DataFrame:
    """Retention with frozen heads before (at step 0) and after fine-tuning, for ``results.csv``.

    The column ``stage`` names the start and what it was fine-tuned by.
    """
    frozen = recovery[(recovery["split"] == "test") & (recovery["head"] == "frozen")]
    ends = frozen[frozen.step == max(config.steps)]
    begun = frozen[frozen.step == 0].drop_duplicates(["start", "sparsity", "seed", "target"])
    how = ends.penalty + ", " + ends.learning_rate.map("{:g}".format)
    tuned = ends.assign(stage=ends.start + ", fine-tuned (" + how + ")")
    rows = pd.concat([tuned, begun.assign(stage=begun.start)])
    looks = find_scorer(config.scorer).needs_data
    blind = {"dense"} if looks else {"dense", "pruned", "shuffled"}
    rows["source"] = [config.pool if start not in blind else "none" for start in rows.start]
    scorers = {"shuffled": shuffled(config.scorer), "dense": "none"}
    rows["scorer"] = [scorers.get(start, config.scorer) for start in rows.start]
    return suite.summarise_stages(rows, dense)


def recovery_gains(recovery: pd.DataFrame, source: str, dense: Mapping[str, float]) -> pd.DataFrame:
    """Gain in accuracy over a fine-tuning :func:`run`, with frozen heads, averaged over seeds.

    Columns ``start, sparsity, penalty, learning_rate, seeds`` (how many came to the last step;
    others are left out), ``validation`` (the source's validation accuracy then) and, for each part
    ``source`` and ``held_out`` (the mean over other tasks), ``<part>, <part>_gain, <part>_low,
    <part>_high``, in accuracy with intervals over test images and seeds, and ``<part>_retention,
    <part>_retention_before``.
    """
    frozen = recovery[recovery["head"] == "frozen"]
    gains = []
    for values, run in frozen.groupby(_SETTINGS, sort=False):
        reached = run.groupby("seed").step.transform("max")
        run = run[reached == reached.max()]  # a seed that diverged has no end to compare
        first, last = run.step.min(), run.step.max()
        row: dict[str, object] = dict(zip(_SETTINGS, values, strict=True))
        row["seeds"] = run.seed.nunique()
        row["validation"] = run[(run.step == last) & (run.split == "validation")].accuracy.mean()
        chance = run.groupby("target").chance.first()
        ends = run[(run.split == "test") & run.step.isin([first, last])]
        ends = ends.assign(source=source, sign=np.where(ends.step == last, 1.0, -1.0))
        for part, seen in {"source": True, "held_out": False}.items():
            tested = ends[(ends.target == source) == seen]
            gain = estimate(tested)
            means: Any = tested.groupby(["step", "target"]).accuracy.mean()
            row |= {part: means[last].mean(), f"{part}_gain": gain.value}
            row[f"{part}_low"], row[f"{part}_high"] = gain.interval()
            for suffix, step in (("", last), ("_before", first)):
                kept = [retention(a, dense[t], chance[t]) for t, a in means[step].items()]
                row[f"{part}_retention{suffix}"] = float(np.mean(kept))
        gains.append(row)
    return pd.DataFrame(gains)


def chosen_on_validation(gains: pd.DataFrame) -> pd.DataFrame:
    """Of each start, sparsity and penalty, the gains at the rate that validates best."""
    best = gains.groupby(_SETTINGS[:3], sort=False).validation.idxmax()
    return gains.loc[best].reset_index(drop=True)

"""The study of what fine-tuning recovers: parameters, sweep and tables."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence, Sized
from functools import cache
from typing import Annotated, Any, cast

import numpy as np
import pandas as pd
import torch
from pydantic import Field, field_validator
from torch import nn

from pai_utils.curvature.diagonals import output_diagonal
from pai_utils.data.tasks import Task
from pai_utils.evaluation import (
    Evaluation,
    evaluate_heads,
    gain_replicates,
    interval,
    retention,
    summarise_retention,
)
from pai_utils.finetuning import OPTIMISERS, SCHEDULES, FeaturePenalty, Penalty, finetune
from pai_utils.heads import features, fit_head
from pai_utils.masks import Mask
from pai_utils.models.encoders import Backbone, Classifier, prunable_parameters
from pai_utils.scorers import SCORERS
from pai_utils.studies.parameters import (
    Positive,
    Rate,
    RepairedMasks,
    ScorerName,
    Strength,
    one_of,
)
from pai_utils.studies.suite import Source, load_source, prune_source
from pai_utils.support.common import NonFiniteError, logger, progress, unknown_name
from pai_utils.support.sampling import Draw, Samples

_SETTINGS = ("start", "sparsity", "penalty", "learning_rate")  # of a run, as columns


def recovery_sweep(
    model: Classifier,
    mask: Mask | None,
    tasks: Mapping[str, Task],
    heads: Mapping[str, nn.Linear],
    source: str,
    *,
    learning_rates: Sequence[float],
    at_steps: Sequence[int],
    batch_size: int = 64,
    optimiser: str = "sgd",
    schedule: str = "constant",
    seed: int = 0,
    refit: bool = True,
    penalties: Mapping[str, Penalty | FeaturePenalty | None] | None = None,
) -> pd.DataFrame:
    """Fine-tune copies of a pruned classifier on the source, watching every task.

    Args:
        model: the pruned (or, with ``mask=None``, dense) classifier of the source; untouched.
        mask: its mask.
        tasks: source and held-out tasks; only the source's training split is trained on.
        heads: the frozen heads, fitted on the dense encoder.
        source: name of the source task.
        learning_rates: one run each.
        at_steps: numbers of updates after which all tasks are evaluated; the largest ends a run.
        batch_size: samples an update.
        optimiser: a key of :data:`OPTIMISERS`.
        schedule: a key of :data:`SCHEDULES`.
        seed: seed of the order of samples.
        refit: also fit new heads on the encoder at the last step, which tells lost features
            (a new head does not help) from drifted ones (it does).
        penalties: by name, one run each beside every learning rate; by default ``"none"`` alone.

    Returns:
        Columns ``penalty, learning_rate, step, target, split, head ("frozen" or "refitted"),
        accuracy, loss, count, chance, seed, correct``; the split is ``"test"``, and for the source
        with its frozen head also ``"validation"``, to choose a rate by. A run that diverges ends
        with its last finite rows.
    """
    tests = {name: task.test for name, task in tasks.items()}
    table: list[dict[str, object]] = []
    settings = list(itertools.product((penalties or {"none": None}).items(), learning_rates))
    for (label, penalty), rate in progress(settings, "fine-tuning", total=len(settings)):
        tuned = copy.deepcopy(model)
        backbone = tuned.backbone

        def record(
            step: int,
            kind: str,
            used: Mapping[str, nn.Linear],
            data: Mapping[str, Samples] = tests,
            split: str = "test",
            label: str = label,
            rate: float = rate,
            backbone: nn.Module = backbone,
        ) -> None:
            for target, result in evaluate_heads(backbone, used, data).items():
                table.append(
                    {
                        "penalty": label,
                        "learning_rate": rate,
                        "step": step,
                        "target": target,
                        "split": split,
                        "head": kind,
                        "seed": seed,
                        **result.row(tasks[target].chance),
                    }
                )

        def watch(step: int, record: Callable[..., None] = record) -> None:
            if step in at_steps:
                record(step, "frozen", heads)
                record(step, "frozen", heads, {source: tasks[source].validation}, "validation")

        try:
            finetune(
                tuned,
                tasks[source].train,
                mask,
                steps=max(at_steps),
                learning_rate=rate,
                batch_size=batch_size,
                optimiser=optimiser,
                schedule=schedule,
                seed=seed,
                penalty=penalty,
                on_step=watch,
            )
        except NonFiniteError as error:
            logger.warning("fine-tuning ends early: %s", error)
            continue
        if refit:
            refitted = {name: fit_head(backbone, task) for name, task in tasks.items()}
            record(max(at_steps), "refitted", refitted)
    return pd.DataFrame(table)


def recovery_study(
    encoder: Backbone,
    tasks: Mapping[str, Task],
    heads: Mapping[str, nn.Linear],
    source: str,
    *,
    starts: Sequence[str],
    sparsities: Sequence[float],
    seeds: Sequence[int],
    scorer: str,
    scope: str = "global",
    rounds: int = 1,
    prune_by: str | None = None,
    repair: str = "layerwise+moments",
    repair_options: Mapping[str, Any] | None = None,
    penalties: Mapping[str, float] | None = None,
    samples: int | None = 256,
    batch_size: int = 64,
    **sweep: Any,
) -> pd.DataFrame:
    """Recovery from several starts, at several sparsities and seeds.

    Args:
        encoder: the dense one; left as it was.
        tasks: by name, the source among them.
        heads: a frozen head for each.
        source: the task fine-tuned on.
        starts: keys of :data:`STARTS`.
        sparsities: of each start but ``"dense"``, which is run once a seed.
        seeds: of images, scores, repairs and the order of fine-tuning.
        scorer: of all starts but ``"random"``.
        scope: as in :func:`~pai_utils.masks.make_mask`.
        rounds: of every mask, as in :func:`~pai_utils.pruning.prune`.
        prune_by: images for scores, repairs and the penalties of a mixture
            (:mod:`pai_utils.data.mixtures`); by default the source's own.
        repair: of the start ``"repaired"``.
        repair_options: keywords of :func:`~pai_utils.repair.methods.repair_`.
        penalties: strengths as in :func:`make_penalties`, on the first start and the first
            sparsity; elsewhere there is none.
        samples: images a score, at most all.
        batch_size: images a forward.
        sweep: keywords of :func:`recovery_sweep`; its batch size is ``finetune_batch_size``.

    Returns:
        The rows of :func:`recovery_sweep` with columns ``start`` and ``sparsity``.

    Raises:
        ValueError: for an unknown start or penalty, and as :func:`~pai_utils.pruning.prune`.
    """
    for start in starts:
        if start not in STARTS:
            raise unknown_name("start", start, STARTS)
    held = prunable_parameters(encoder)
    sweep["batch_size"] = sweep.pop("finetune_batch_size", 64)
    plain = {"none": 0.0}
    parts = []

    @cache
    def pool_of(seed: int) -> Source:
        return load_source(prune_by or source, encoder, tasks, heads, seed=seed)

    for seed, sparsity, start in itertools.product(seeds, sparsities, starts):
        if start == "dense" and sparsity != sparsities[0]:
            continue
        pool = pool_of(seed)
        begun, mask = encoder, None
        if start != "dense":
            pruned = prune_source(
                "random" if start == "random" else scorer,
                Classifier(encoder, pool.head or heads[source]),  # whose images these are
                pool,
                sparsity,
                scope=scope,
                rounds=rounds,
                repair=repair if start == "repaired" else "none",
                repair_options=repair_options,
                samples=None if samples is None else min(samples, len(pool.images)),
                batch_size=batch_size,
                seed=seed,
            )
            begun, mask = cast(Classifier, pruned.model).backbone, pruned.mask
        first = start == starts[0] and sparsity == sparsities[0]
        table = recovery_sweep(
            Classifier(begun, heads[source]),
            mask,
            tasks,
            heads,
            source,
            seed=seed,
            penalties=make_penalties(
                encoder,
                held,
                penalties if penalties and first else plain,
                tasks[source].train,
                pool.images,
                samples=samples,
                batch_size=batch_size,
                seed=seed,
            ),
            **sweep,
        )
        parts.append(table.assign(start=start, sparsity=0.0 if start == "dense" else sparsity))
    return pd.concat(parts, ignore_index=True)


STARTS = {
    "pruned": "by a scorer",
    "repaired": "also repaired",
    "random": "pruned at random",
    "dense": "not pruned",
}
"""What is fine-tuned, by name."""
PENALTIES = {
    "none": "cross-entropy alone",
    "unweighted": "towards the dense weights, all alike (L2-SP)",
    "source": "towards the dense weights, by the features' curvature on the source's images",
    "pool": "the same, by their curvature on a mixture of images",
    "features": "towards the dense features, on the mixture's images",
}
"""What fine-tuning is held by, by name."""


def make_penalties(
    encoder: Backbone,
    names: Sequence[str],
    strengths: Mapping[str, float],
    source: Samples,
    pool: Samples,
    *,
    samples: int | None = 256,
    batch_size: int = 64,
    seed: int = 0,
) -> dict[str, Penalty | FeaturePenalty | None]:
    """Penalties that hold a classifier's encoder to the dense one, for a comparison.

    Each curvature is the diagonal of the features' Gauss-Newton matrix
    (:func:`~pai_utils.curvature.diagonals.output_diagonal`), divided by its mean over all weights,
    so that one strength means as much pull on average with it as without.

    Args:
        encoder: the dense one.
        names: of its parameters to hold, where weights are held.
        strengths: λ of each, by a key of :data:`PENALTIES`; of ``"none"`` it is not looked at.
        source: images of the source task.
        pool: images of a mixture.
        samples: images a curvature; at most all. Features are held on all of the pool.
        batch_size: images a forward.
        seed: of their draw.

    Returns:
        By name; parameters are named as in a :class:`~pai_utils.models.encoders.Classifier`.

    Raises:
        ValueError: for an unknown penalty.
    """
    anchor = {f"backbone.{name}": encoder.get_parameter(name).detach().clone() for name in names}

    def make(penalty: str, strength: float) -> Penalty | FeaturePenalty | None:
        if penalty == "none":
            return None
        if penalty == "unweighted":
            return Penalty(anchor, strength)
        if penalty == "features":
            return FeaturePenalty(pool, features(encoder, pool, batch_size=batch_size)[0], strength)
        if penalty not in PENALTIES:
            raise unknown_name("penalty", penalty, PENALTIES)
        data = source if penalty == "source" else pool
        count = len(cast(Sized, data))
        diagonal = output_diagonal(
            encoder,
            names,
            data,
            Draw(count if samples is None else min(samples, count), batch_size, seed),
        )
        mean = float(torch.cat([values.flatten() for values in diagonal.values()]).double().mean())
        curvature = {f"backbone.{name}": values / mean for name, values in diagonal.items()}
        return Penalty(anchor, strength, curvature)

    return {penalty: make(penalty, strength) for penalty, strength in strengths.items()}


def recovery_results(
    recovery: pd.DataFrame, dense: Mapping[str, Evaluation], source: str, scorer: str, *, steps: int
) -> pd.DataFrame:
    """Retention with frozen heads before and after fine-tuning, as rows of ``results.csv``.

    Args:
        recovery: as from :func:`recovery_study`.
        dense: each task's accuracy before pruning.
        source: what masks were computed on.
        scorer: by which, where the start says no other.
        steps: of a whole run; one that diverged has no row of its end. Before fine-tuning is step
            0, where it was evaluated.

    Returns:
        As :func:`~pai_utils.evaluation.summarise_retention`, with ``stage`` for the start and
        what it was fine-tuned by.

    Raises:
        ValueError: if there is neither step 0 nor the last one.
    """
    frozen = recovery[(recovery["split"] == "test") & (recovery["head"] == "frozen")]
    chances = frozen.groupby("target").chance.first()
    references = [
        {"source": "none", "target": t, "scorer": "dense", "sparsity": 0.0, "seed": 0}
        | dense[t].row(float(chances[t]))
        for t in chances.index
    ]
    by = ["start", "penalty", "learning_rate"]
    parts = []
    for key, group in frozen[frozen.step == steps].groupby(by, sort=False):
        parts.append((str(key[0]), f"{key[0]}, fine-tuned ({key[1]}, {key[2]:g})", group))
    begun = frozen[frozen.step == 0].drop_duplicates(["start", "sparsity", "seed", "target"])
    for start, group in begun.groupby("start", sort=False):
        parts.append((str(start), str(start), group))
    if not parts:
        raise ValueError(f"recovery was evaluated neither at step 0 nor at step {steps}")
    tables = []
    for start, stage, group in parts:
        rows = group.assign(
            scorer={"random": "random", "dense": "none"}.get(start, scorer),
            source=source if start == "repaired" or _looks(start, scorer) else "none",
        )
        summary = summarise_retention(pd.concat([pd.DataFrame(references), rows]))
        tables.append(summary[summary.scorer != "dense"].assign(stage=stage))
    return pd.concat(tables, ignore_index=True)


def _looks(start: str, scorer: str) -> bool:
    """Whether the masks of a start look at images."""
    return start in ("pruned", "repaired") and SCORERS[scorer].needs_data


def recovery_gains(
    recovery: pd.DataFrame,
    source: str,
    *,
    dense: Mapping[str, float] | None = None,
    level: float = 0.95,
) -> pd.DataFrame:
    """Gain in accuracy over a fine-tuning run, with frozen heads, on source and held-out tasks.

    Args:
        recovery: as from :func:`recovery_sweep`, perhaps of several starts, sparsities or seeds,
            told apart by columns ``start`` and ``sparsity``; seeds are averaged.
        source: the task fine-tuned on.
        dense: accuracy of the dense encoder by task, for the retentions.
        level: coverage of the bootstrap intervals, over test items for the seeds that were run.

    Returns:
        One row a start, sparsity, penalty and learning rate, with these, ``seeds`` (how many came
        to the last step; others are left out of all that follows), ``validation`` (the
        source's validation accuracy at the last step, which chooses a rate without a look at any
        test) and, for ``source`` and ``held_out`` (mean over the other tasks), the columns
        ``<part>, <part>_gain, <part>_low, <part>_high``, in accuracy, and with ``dense``
        ``<part>_retention`` at the last step and ``<part>_retention_before``.
    """
    if recovery.empty:
        raise ValueError("no fine-tuning came to an evaluation; try smaller learning rates")
    frozen = recovery[recovery["head"] == "frozen"]
    keys = [key for key in _SETTINGS if key in frozen]
    gains = []
    for values, run in frozen.groupby(keys, sort=False):
        reached = run.groupby("seed").step.transform("max")
        run = run[reached == reached.max()]  # a seed that diverged has no end to compare
        first = run[run.step == run.step.min()]
        last = run[run.step == run.step.max()]
        row: dict[str, object] = dict(zip(keys, values, strict=True))
        row["seeds"] = run.seed.nunique()
        row["validation"] = last[last.split == "validation"].accuracy.mean()
        before, after = (part[part.split == "test"] for part in (first, last))
        others = [target for target in dict.fromkeys(before.target) if target != source]
        for part, targets in {"source": [source], "held_out": others}.items():
            old, new = (
                # Over seeds: the share of them that are right on an item.
                [np.mean(np.stack(list(table[table.target == t].correct)), 0) for t in targets]
                for table in (before, after)
            )
            low, high = interval(gain_replicates(old, new), level)
            start, end = (float(np.mean([right.mean() for right in side])) for side in (old, new))
            row |= {part: end, f"{part}_gain": end - start}
            row |= {f"{part}_low": low, f"{part}_high": high}
            if dense is not None:
                chance = before.groupby("target").chance.first()
                for suffix, side in (("", new), ("_before", old)):
                    kept = [
                        retention(float(right.mean()), dense[t], float(chance[t]))
                        for t, right in zip(targets, side, strict=True)
                    ]
                    row[f"{part}_retention{suffix}"] = float(np.mean(kept))
        gains.append(row)
    return pd.DataFrame(gains)


def chosen_on_validation(gains: pd.DataFrame) -> pd.DataFrame:
    """Of each start, sparsity and penalty the rate at which the source validates best.

    Args:
        gains: as from :func:`recovery_gains`.

    Returns:
        The rows of ``gains`` with these rates.
    """
    keys = [key for key in _SETTINGS if key in gains and key != "learning_rate"]
    return gains.loc[gains.groupby(keys, sort=False).validation.idxmax()].reset_index(drop=True)


Start = Annotated[str, one_of("start", STARTS)]
PenaltyName = Annotated[str, one_of("penalty", PENALTIES)]


class Parameters(RepairedMasks):
    """Parameters of the notebook ``finetune_recovery``, whose start ``repaired`` has the repair."""

    scorer: ScorerName
    starts: list[Start] = Field(min_length=1)
    penalties: dict[PenaltyName, Strength] = Field(default={"none": 0.0})  #: with their strengths
    optimiser: Annotated[str, one_of("optimiser", OPTIMISERS)] = "sgd"
    schedule: Annotated[str, one_of("schedule", SCHEDULES)] = "constant"  #: of the rate
    learning_rates: list[Rate] = Field(min_length=1)
    steps: list[Annotated[int, Field(ge=0)]] = Field(min_length=2)  #: when tasks are evaluated
    seeds: list[Annotated[int, Field(ge=0)]] = Field(min_length=1)
    finetune_batch_size: Positive = 32

    @field_validator("penalties")
    @classmethod
    def _plain_too(cls, penalties: dict[str, float]) -> dict[str, float]:
        if "none" not in penalties:
            raise ValueError("runs without a penalty are what others are seen beside; add none")
        return {"none": 0.0, **penalties}  # first, whatever order a file gave

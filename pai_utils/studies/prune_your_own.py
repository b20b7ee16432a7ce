"""Choose how to prune one task's encoder by its validation part, and say what others lose by it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Self, cast

import pandas as pd
from pydantic import Field, model_validator
from torch import nn

from pai_utils.data.tasks import Task
from pai_utils.evaluation import evaluate_heads, summarise_retention
from pai_utils.export import FORMATS
from pai_utils.models.encoders import Backbone, Classifier
from pai_utils.pruning import Pruned
from pai_utils.studies.parameters import Positive, Rate, RepairedMasks, ScorerName, one_of
from pai_utils.studies.suite import load_source, prune_source
from pai_utils.studies.sweeps import retention_sweep


@dataclass(frozen=True)
class Choice:
    """A scorer and a sparsity, and the retention on the validation part that spoke for them.

    Attributes:
        low: lower end of the 95 % interval of the retention over validation images.
        high: its upper end.
        tried: among how many candidates it was chosen; the more, the more flattering is its
            retention, and the more does the test part matter.
    """

    scorer: str
    sparsity: float
    retention: float
    low: float
    high: float
    tried: int


def validation_sweep(
    encoder: Backbone,
    name: str,
    task: Task,
    head: nn.Linear,
    *,
    scorers: Sequence[str],
    sparsities: Sequence[float],
    prune_by: str | None = None,
    repair: str = "none",
    seed: int = 0,
    **sweep: Any,
) -> pd.DataFrame:
    """Retention on the validation part of a task, of every scorer and sparsity.

    The test part is not touched.

    Args:
        encoder: the dense one; left as it is.
        name: of the task in ``prune_by``.
        task: whose training part masks and repairs look at.
        head: frozen, fitted on the dense encoder.
        scorers: candidates.
        sparsities: candidates.
        prune_by: images for scores and repairs, as a source is named; by default the task's.
        repair: what is done to the surviving weights of every candidate.
        seed: of the draws.
        sweep: other keywords of :func:`~pai_utils.studies.sweeps.retention_sweep`.

    Returns:
        One row a scorer and sparsity, with ``scorer, sparsity, accuracy, retention, low, high,
        dense_accuracy, chance, count``.

    Raises:
        ValueError: as there, or if the dense encoder is not above chance.
    """
    table = retention_sweep(
        encoder,
        {name: replace(task, test=task.validation)},
        {name: head},
        [prune_by or name],
        scorers=scorers,
        sparsities=sparsities,
        seeds=[seed],
        repairs=[repair],
        **sweep,
    )
    summary = summarise_retention(table)
    summary = summary[summary.scorer != "dense"].drop(columns=["source", "target", "seeds"])
    if summary.retention.isna().any():
        dense, chance = summary.dense_accuracy.iloc[0], summary.chance.iloc[0]
        raise ValueError(
            f"on the validation part of {name} the dense encoder is right for {dense:.3f} of the "
            f"images and a constant guess for {chance:.3f}: there is nothing to retain"
        )
    plain = {f"{scorer} + {repair}": scorer for scorer in scorers}
    return summary.assign(scorer=summary.scorer.replace(plain)).reset_index(drop=True)


def choose(candidates: pd.DataFrame, tolerance: float) -> Choice:
    """The highest sparsity that keeps at least ``1 - tolerance``; of several, what keeps most.

    Args:
        candidates: as from :func:`validation_sweep`.
        tolerance: fraction of the dense accuracy above chance that may be lost.

    Raises:
        ValueError: for a tolerance outside 0 to 1, without candidates, or if no candidate keeps
            enough, with the one that keeps most.
    """
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance={tolerance} must be a fraction, at least 0 and less than 1")
    if candidates.empty:
        raise ValueError("there is no candidate to choose from")
    kept = candidates[candidates.retention >= 1 - tolerance]
    if kept.empty:
        best = candidates.sort_values("retention", ascending=False, kind="stable").iloc[0]
        raise ValueError(
            f"no candidate keeps {1 - tolerance:.3f} of the accuracy above chance; "
            f"{best.scorer} at sparsity {best.sparsity:g} keeps {best.retention:.3f}: add lower "
            "sparsities, another repair or more images, or raise the tolerance"
        )
    best = kept.sort_values(["sparsity", "retention"], ascending=False, kind="stable").iloc[0]
    return Choice(
        scorer=str(best.scorer),
        sparsity=float(best.sparsity),
        retention=float(best.retention),
        low=float(best.low),
        high=float(best.high),
        tried=len(candidates),
    )


def prune_as_chosen(
    choice: Choice,
    encoder: Backbone,
    name: str,
    task: Task,
    head: nn.Linear,
    *,
    prune_by: str | None = None,
    repair: str = "none",
    samples: int | None = 256,
    seed: int = 0,
    **keywords: Any,
) -> Pruned:
    """The candidate that was chosen, made again: its mask, and its repaired weights.

    Args:
        choice: as from :func:`choose`.
        encoder: the dense one; left as it is.
        name: of the task in ``prune_by``.
        task: as in :func:`validation_sweep`.
        head: as there.
        prune_by: as there.
        repair: as there.
        samples: images a score; ``None`` for all.
        seed: as there.
        keywords: others of :func:`~pai_utils.pruning.prune`.

    Returns:
        The pruned encoder with ``head``, whatever head the scores were computed with.
    """
    pool = load_source(prune_by or name, encoder, {name: task}, {name: head}, seed=seed)
    model = Classifier(encoder, pool.head or head)
    pruned = prune_source(
        choice.scorer,
        model,
        pool,
        choice.sparsity,
        repair=repair,
        samples=None if samples is None else min(samples, len(pool.images)),
        seed=seed,
        **keywords,
    )
    repaired = cast(Classifier, pruned.model).backbone
    return replace(pruned, model=Classifier(repaired, head))


def compare_stages(
    stages: Mapping[str, Backbone],
    tasks: Mapping[str, Task],
    heads: Mapping[str, nn.Linear],
    choice: Choice,
    *,
    source: str,
    batch_size: int = 64,
) -> pd.DataFrame:
    """Test accuracy of one encoder after each stage of its pruning, on every task.

    Args:
        stages: encoders by name, the dense one first.
        tasks: by name.
        heads: a frozen head for each.
        choice: what the stages have in common.
        source: what the mask was computed on.
        batch_size: images a forward.

    Returns:
        One row a stage but the first, and task, with ``stage`` and the columns of
        :func:`~pai_utils.evaluation.summarise_retention`.
    """
    tests = {name: task.test for name, task in tasks.items()}
    found = {
        stage: evaluate_heads(encoder, heads, tests, batch_size=batch_size)
        for stage, encoder in stages.items()
    }
    dense, *others = found
    reference = [
        {"target": name, "source": "none", "scorer": "dense", "sparsity": 0.0, "seed": 0}
        | result.row(tasks[name].chance)
        for name, result in found[dense].items()
    ]
    made = {"source": source, "scorer": choice.scorer, "sparsity": choice.sparsity, "seed": 0}
    parts = []
    for stage in others:
        rows = [
            {"target": name, **made, **result.row(tasks[name].chance)}
            for name, result in found[stage].items()
        ]
        summary = summarise_retention(pd.DataFrame([*reference, *rows]))
        parts.append(summary[summary.scorer != "dense"].assign(stage=stage))
    return pd.concat(parts, ignore_index=True)


class Parameters(RepairedMasks):
    """Parameters of the notebook ``prune_your_own``."""

    scorers: list[ScorerName] = Field(min_length=1)
    tolerance: Annotated[float, Field(ge=0, le=1)] = 0.05  #: of the accuracy above chance
    finetune_steps: Annotated[int, Field(ge=0)] = 0
    learning_rate: Rate = 1e-5
    finetune_batch_size: Positive = 32
    formats: list[Annotated[str, one_of("format", FORMATS)]] = Field(
        default=list(FORMATS), min_length=1
    )

    @model_validator(mode="after")
    def _something_unseen(self) -> Self:
        if self.tasks == [self.source]:
            raise ValueError(f"the only target is the source {self.source}; add an unseen task")
        return self

"""The study of the loss landscape: parameters, sweep and tables."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Self, cast

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import Field, field_validator, model_validator
from torch import nn

from pai_utils.curvature.products import HessianOperator
from pai_utils.curvature.spectra import spectral_density
from pai_utils.data.mixtures import is_held_out
from pai_utils.data.tasks import Task
from pai_utils.evaluation import interval, summarise_retention
from pai_utils.finetuning import finetune
from pai_utils.heads import fit_head
from pai_utils.landscape import (
    PREDICTORS,
    Direction,
    Values,
    predicted_and_measured,
    pruning_direction,
    spearman,
    task_alignment,
    task_curvature,
)
from pai_utils.masks import Mask
from pai_utils.models.encoders import Backbone, Classifier, prunable_parameters
from pai_utils.studies.parameters import (
    COMPARISONS,
    Fraction,
    OneSource,
    Positive,
    Rate,
    Repair,
    RepairOption,
    ScorerName,
    Sparsity,
    one_of,
)
from pai_utils.studies.sweeps import SweepMask, retention_sweep
from pai_utils.support.common import progress
from pai_utils.support.sampling import Draw, Samples


@dataclass(frozen=True)
class Study:
    """What :func:`study` finds for one encoder."""

    losses: pd.DataFrame
    """Of :func:`predicted_and_measured`, with ``source, scorer, sparsity, target``."""
    cells: pd.DataFrame
    """One row a source, scorer, sparsity and target, with the full step's predictions beside
    ``accuracy, retention, dense_accuracy, held_out``, the source mask's overlap with the target's
    own (``mask_overlap, mask_chance, mask_overlap_excess``), and the columns of ``alignment``."""
    alignment: pd.DataFrame
    """Of :func:`task_alignment`."""
    eigenvalues: pd.DataFrame
    """``task, rank, eigenvalue, residual, converged``."""
    retention: pd.DataFrame
    """Of :func:`~pai_utils.evaluation.summarise_retention`."""


def study(
    backbone: Backbone,
    tasks: Mapping[str, Task],
    heads: Mapping[str, nn.Linear],
    *,
    scorers: Sequence[str] = ("ggn_diag", "magnitude"),
    sparsities: Sequence[float] = (0.2, 0.4),
    fractions: Sequence[float] = (0.25, 0.5, 1.0),
    samples: int | None = 64,
    batch_size: int = 64,
    block_size: int = 64,
    eigenvectors: int = 5,
    products: int = 30,
    seed: int = 0,
) -> Study:
    """Predict and measure what each task's mask does to each task, and how alike the tasks are.

    Every task is a source in its turn. Predictions and losses are on training images, accuracies
    on test images. Scores and predictions of a task use the same draw of images and labels, so that
    what is predicted for a mask's own task is what its score has minimised. Needs memory for two
    copies of the prunable weights for each mask, and for each task's eigenvectors.

    Args:
        backbone: the dense encoder, left as it was.
        tasks: by name, at least two.
        heads: a head for each.
        scorers: keys of :data:`~pai_utils.scorers.SCORERS`.
        sparsities: of the masks.
        fractions: of the pruning step; must hold the full one, 1.
        samples: images a score, loss and curvature.
        batch_size: images a forward.
        block_size: weights a block of the Gauss-Newton matrix.
        eigenvectors: of each task's, to compare.
        products: most products to take for them.
        seed: of all draws.

    Raises:
        ValueError: for fewer than two tasks, fractions without 1, more eigenvectors than
            products, or as the functions it calls.
    """
    if len(tasks) < 2:
        raise ValueError("at least two tasks are needed to compare")
    if 1 not in fractions:
        raise ValueError(f"fractions={list(fractions)} must hold 1, the full step")
    if eigenvectors > products:
        raise ValueError(f"eigenvectors={eigenvectors} need as many products; got {products}")
    masks: dict[tuple[str, str, float], Mask] = {}

    def observe(step: SweepMask) -> None:
        masks[step.source, step.scorer, step.sparsity] = step.mask

    table = retention_sweep(
        backbone,
        tasks,
        heads,
        list(tasks),
        scorers=scorers,
        sparsities=sparsities,
        seeds=[seed],
        samples=samples,
        batch_size=batch_size,
        observe=observe,
    )
    kept = summarise_retention(table)
    settings = {"samples": samples, "batch_size": batch_size, "seed": seed}
    models = {name: Classifier(backbone, heads[name]) for name in tasks}
    directions: dict[str, Direction] = {}
    keys = {}
    for key, mask in masks.items():
        name = " ".join(map(str, key))
        keys[name] = key
        step = pruning_direction(backbone, mask)
        directions[name] = {f"backbone.{part}": values for part, values in step.items()}
    losses = []
    for target, model in progress(models.items(), "tasks", len(models)):
        found = predicted_and_measured(
            model, directions, tasks[target].train,
            fractions=fractions, block_size=block_size, **settings,  # type: ignore[arg-type]
        )  # fmt: skip
        named = pd.DataFrame(
            [keys[name] for name in found.direction], columns=["source", "scorer", "sparsity"]
        )
        losses.append(named.assign(target=target).join(found.drop(columns="direction")))
    curvatures = {
        name: task_curvature(
            model, tasks[name].train,
            eigenvectors=eigenvectors, products=products, **settings,  # type: ignore[arg-type]
        )
        for name, model in models.items()
    }  # fmt: skip
    (model, *_) = models.values()
    parameters = dict(model.named_parameters())
    alignment = task_alignment(
        curvatures, {name: parameters[name] for name in prunable_parameters(model)}
    )
    eigenvalues = pd.DataFrame(
        {
            "task": task,
            "rank": rank,
            "eigenvalue": float(value),
            "residual": float(residual),
            "converged": curvature.eigenpairs.converged,
        }
        for task, curvature in curvatures.items()
        for rank, (value, residual) in enumerate(
            zip(curvature.eigenpairs.values, curvature.eigenpairs.residuals, strict=True), 1
        )
    )
    everything = pd.concat(losses, ignore_index=True)
    cells = _cells(everything, kept, masks, alignment)
    return Study(everything, cells, alignment, eigenvalues, kept)


def _cells(
    losses: pd.DataFrame,
    kept: pd.DataFrame,
    masks: Mapping[tuple[str, str, float], Mask],
    alignment: pd.DataFrame,
) -> pd.DataFrame:
    """The full step's predictions beside what was kept and how alike the tasks are."""
    keys = ["source", "scorer", "sparsity", "target"]
    overlaps = []
    for (source, scorer, sparsity), mask in masks.items():
        for target in dict.fromkeys(losses.target):
            own = masks.get((target, scorer, sparsity))
            if own is None or target == source:
                continue
            overlap, chance = mask.overlap(own), mask.expected_overlap(own)
            overlaps.append(
                {
                    "source": source,
                    "scorer": scorer,
                    "sparsity": sparsity,
                    "target": target,
                    "mask_overlap": overlap,
                    "mask_chance": chance,
                    "mask_overlap_excess": overlap - chance,
                }
            )
    columns = [*keys, "mask_overlap", "mask_chance", "mask_overlap_excess"]
    cells = losses[losses.fraction == 1].drop(columns="fraction")
    cells = cells.merge(
        kept[[*keys, "accuracy", "retention", "low", "high", "dense_accuracy"]], on=keys
    )
    cells = cells.merge(pd.DataFrame(overlaps, columns=columns), on=keys, how="left")
    cells = cells.merge(alignment, on=["source", "target"], how="left")
    cells["held_out"] = [
        is_held_out(target, source)
        for target, source in zip(cells.target, cells.source, strict=True)
    ]
    return cells


def transfer_correlations(
    cells: pd.DataFrame,
    *,
    predictors: Collection[str] = PREDICTORS,
    level: float = 0.95,
    replicates: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Spearman correlation of each predictor with retention on held-out tasks.

    Intervals are from a bootstrap over pairs of source and target, which carry what their scorers
    and sparsities have in common. Pooled over scorers and sparsities, a correlation says mostly
    that both fall with sparsity; ``within`` compares only cells of one scorer and sparsity, that
    is, pairs of tasks (the mean over such groups, weighted by their cells).

    Args:
        cells: of one or more :class:`Study`, with a column for each predictor.
        predictors: columns to try.
        level: of the intervals.
        replicates: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        One row a predictor, with ``predictor, pooled, pooled_low, pooled_high, within,
        within_low, within_high, cells, pairs``; not a number where there are fewer than three
        cells.
    """
    held = cells[cells.held_out]
    rows = []
    for predictor in predictors:
        known = held[held[predictor].notna() & held.retention.notna()]
        values, kept = known[predictor].to_numpy(), known.retention.to_numpy()
        alike = known.groupby(["scorer", "sparsity"]).ngroup().to_numpy()
        of_pair = known.groupby(["source", "target"]).ngroup().to_numpy()
        pairs = len(set(of_pair))
        random = np.random.default_rng(seed)
        # How often each pair is drawn, and with it all of its cells.
        drawn = random.multinomial(
            pairs, np.full(max(pairs, 1), 1 / max(pairs, 1)), size=replicates
        )
        row: dict[str, object] = {"predictor": predictor}
        for kind, groups in {"pooled": np.zeros_like(alike), "within": alike}.items():
            row[kind] = float(_within(values, kept, groups, np.ones((1, len(values))))[0])
            found = _within(values, kept, groups, drawn[:, of_pair].astype(float))
            row[f"{kind}_low"], row[f"{kind}_high"] = (
                interval(found, level)
                if pairs > 1 and not math.isnan(cast(float, row[kind]))
                else (math.nan, math.nan)
            )
        rows.append(row | {"cells": len(known), "pairs": pairs})
    return pd.DataFrame(rows)


def _within(
    values: Values, kept: Values, groups: NDArray[np.integer[Any]], counts: Values
) -> Values:
    """Mean rank correlation within groups, weighted by their sizes, for each row of counts."""
    total, weight = np.zeros((2, len(counts)))
    for group in np.unique(groups):
        chosen = groups == group
        found = spearman(values[chosen], kept[chosen], counts[:, chosen])
        size = np.where(np.isnan(found), 0, counts[:, chosen].sum(1))
        total, weight = total + np.nan_to_num(found) * size, weight + size
    mean: Values = np.full(len(counts), math.nan)
    np.divide(total, weight, out=mean, where=weight > 0)
    return mean


QUANTITIES = {
    "retention": "retention on the held-out task",
    "measured": "loss increase (nats)",
    "left_out": "error of the quadratic model, as a share",
    **dict(list(PREDICTORS.items())[-4:]),  # of masks and of curvatures
}
"""What :func:`compared` sets side by side, and how a figure calls it."""


def compared(studies: Mapping[str, Study], scorer: str, sparsity: float) -> pd.DataFrame:
    """The same quantities for several weights of one architecture, pair by pair of tasks.

    Args:
        studies: by the weights' name.
        scorer: the one compared.
        sparsity: the one compared.

    Returns:
        One row a set of weights, quantity (the values of :data:`QUANTITIES`) and held-out pair,
        with ``weights, quantity, pair, value``. The error of the quadratic model is that between
        ``measured`` and predicted increase over the larger of both.
    """
    rows = []
    for weights, found in studies.items():
        cells = found.cells
        chosen = cells[cells.held_out & (cells.scorer == scorer) & (cells.sparsity == sparsity)]
        scale = pd.concat([chosen.measured.abs(), chosen.taylor.abs()], axis=1).max(axis=1)
        chosen = chosen.assign(left_out=(chosen.measured - chosen.taylor).abs() / scale)
        rows += [
            {
                "weights": weights,
                "quantity": label,
                "pair": f"{cell.source} → {cell.target}",
                "value": float(getattr(cell, quantity)),
            }
            for cell in chosen.itertuples()
            for quantity, label in QUANTITIES.items()
        ]
    return pd.DataFrame(rows)


def briefly_trained(
    backbone: Backbone,
    task: Task,
    *,
    steps: int = 30,
    learning_rate: float = 1e-3,
    batch_size: int = 32,
    seed: int = 0,
) -> Backbone:
    """A copy of the encoder after a short training on one task, under a head fitted before.

    The training is that of :func:`~pai_utils.finetuning.finetune` with Adam and a falling rate;
    BatchNorm keeps the statistics it was given.

    Args:
        backbone: left as it was.
        task: what to train on.
        steps: updates.
        learning_rate: of the first.
        batch_size: images an update.
        seed: of the order of images.
    """
    trained = copy.deepcopy(backbone)
    model = Classifier(trained, fit_head(trained, task))
    finetune(
        model, task.train,
        steps=steps, learning_rate=learning_rate, batch_size=batch_size, seed=seed,
        optimiser="adam", schedule="linear",
    )  # fmt: skip
    return trained


def spectra(
    models: Mapping[str, nn.Module],
    data: Samples,
    *,
    probes: int = 2,
    steps: int = 20,
    samples: int | None = 64,
    batch_size: int = 64,
    seed: int = 0,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Spectrum of the Hessian of the mean cross-entropy for several weights of one network.

    Stochastic Lanczos quadrature (:func:`~pai_utils.curvature.spectra.spectral_density`) over the
    prunable weights, pruned ones among them: ``probes`` times ``steps`` Hessian products for each
    model. The same probes give the trace as the mean of P Σ w θ, with its standard error over
    probes, and the extreme Ritz values, which bound the largest and smallest eigenvalue from
    inside.

    Args:
        models: by name.
        data: labelled samples, the same for all.
        probes: random start vectors.
        steps: Lanczos steps of each.
        samples: size of the seeded draw; ``None`` for all.
        batch_size: samples a forward.
        seed: of the draw and of the start vectors.

    Returns:
        ``name, largest, smallest, trace, trace_standard_error``, one row a model, and
        ``name, eigenvalue, density``, many rows a model.
    """
    summary, found = [], {}
    for name, model in progress(models.items(), "spectra", len(models)):
        names = prunable_parameters(model)
        operator = HessianOperator(model, names, data, Draw(samples, batch_size, seed))
        found[name] = here = spectral_density(operator, probes=probes, steps=steps, seed=seed)
        size = sum(values.numel() for values in operator.parameters.values())
        traces = size * (here.weights * here.nodes).sum(1)
        summary.append(
            {
                "name": name,
                "largest": float(here.nodes.max()),
                "smallest": float(here.nodes.min()),
                "trace": float(traces.mean()),
                "trace_standard_error": float(traces.std() / probes**0.5)
                if probes > 1
                else math.nan,
            }
        )
    # One kernel for all, so that a line is wide where its spectrum is.
    width = max(density.width for density in found.values())
    densities = []
    for name, density in found.items():
        smooth = density.smoothed(width)
        densities.append(
            pd.DataFrame({"name": name, "eigenvalue": smooth.grid, "density": smooth.density})
        )
    return pd.DataFrame(summary), pd.concat(densities, ignore_index=True)


def barriers(path: pd.DataFrame) -> pd.DataFrame:
    """How far the loss rises on a line above the line between its ends' losses.

    Source: Frankle et al. (2020), "Linear mode connectivity and the lottery ticket hypothesis".

    Args:
        path: as from :func:`losses_on_path`.

    Returns:
        One row a segment and task, with ``segment, task, start, end, barrier``, in nats;
        ``barrier`` is at least zero, and not a number where the loss at an end is not finite.
    """
    rows = []
    for task, line in path.groupby("task", sort=False):
        for number, segment in enumerate(dict.fromkeys(line.segment)):
            own = line[(line.position >= number) & (line.position <= number + 1)]
            start, end = own.loss.iloc[0], own.loss.iloc[-1]
            straight = start + (own.position - number) * (end - start)
            rows.append(
                {
                    "segment": segment,
                    "task": task,
                    "start": start,
                    "end": end,
                    "barrier": max(0.0, float((own.loss - straight).max()))
                    if math.isfinite(start) and math.isfinite(end)
                    else math.nan,
                }
            )
    return pd.DataFrame(rows).sort_values(["segment", "task"], kind="stable", ignore_index=True)


class Parameters(OneSource):
    """Parameters of the notebook ``landscape_analysis``."""

    scorers: list[ScorerName] = Field(min_length=1)  #: the first one is looked at closely
    sparsities: list[Sparsity] = Field(min_length=1)  #: as is the last
    fractions: list[Fraction] = Field(min_length=2)  #: of the pruning step
    block_size: Positive = 64  #: weights a block of the Gauss-Newton matrix
    eigenvectors: Positive = 5  #: of each task's, to compare
    products: Positive = 30  #: most to take for them
    # Weights of the same architecture to set beside the encoder's, and how the last are trained.
    comparisons: list[Annotated[str, one_of("comparison", COMPARISONS)]] = Field(default=[])
    brief_steps: Positive = 30
    brief_learning_rate: Rate = 1e-3
    spectrum_samples: Positive | None = 64  #: images a Hessian product; None: all
    probes: Annotated[int, Field(ge=2)] = 2
    lanczos_steps: Positive = 20
    repair: Repair = "moments"
    repair_options: dict[RepairOption, bool | float | int] = Field(default={})
    finetune_steps: Positive = 10
    learning_rate: Rate = 1e-5
    path_points: Positive = 4  #: of each line
    plane_points: Annotated[int, Field(ge=2)] = 9  #: of a side
    plane_images: Positive | None = 60  #: a task; None: all test images

    @field_validator("fractions")
    @classmethod
    def _whole_step(cls, fractions: list[float]) -> list[float]:
        if 1 not in fractions:
            raise ValueError("the full step is what is compared with accuracies; add 1.0")
        return fractions

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.eigenvectors > self.products:
            raise ValueError(
                f"{self.eigenvectors} eigenvectors need as many products; got {self.products}"
            )
        if len(self.tasks) < 2:
            raise ValueError(f"the only target is the source {self.source}; add an unseen task")
        return self

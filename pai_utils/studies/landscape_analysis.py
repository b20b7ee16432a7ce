"""The study of the loss landscape: its parameters, its measurements and its tables."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from typing import Annotated, Self, cast

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import Field, model_validator
from scipy.stats import t
from torch import nn

from pai_utils.curvature.diagonals import ggn_diagonal
from pai_utils.curvature.products import GGNOperator, HessianOperator
from pai_utils.curvature.spectra import spectral_density, top_eigenpairs
from pai_utils.data.mixtures import is_held_out
from pai_utils.evaluation import summarise_retention
from pai_utils.landscape import predicted_and_measured, pruning_direction, task_alignment
from pai_utils.masks import Mask
from pai_utils.models.encoders import Classifier, prunable_parameters
from pai_utils.pruning import Recipe
from pai_utils.studies.parameters import (
    Fraction,
    OneSource,
    Positive,
    Rate,
    Repair,
    RepairOptions,
    ScorerName,
    Sparsity,
    combine,
    one_of,
)
from pai_utils.studies.suite import Suite, SweepMask, sweep
from pai_utils.support.common import progress
from pai_utils.support.sampling import Samples

Values = NDArray[np.float64]
COMPARISONS = ("random", "trained")  #: not trained at all, or briefly on the source
PARTS = {
    "within blocks": ("blocks", "diagonal"),
    "within layers": ("tensors", "blocks"),
    "between layers": ("ggn", "tensors"),
    "indefinite part": ("hessian", "ggn"),
    "gradient": ("taylor", "hessian"),
    "higher order": ("measured", "taylor"),
}
"""What the diagonal drops of the measured increase: each the difference of two predictions."""
PREDICTORS = {
    "measured": "measured increase",
    "taylor": "gᵀδ + ½ δᵀHδ",
    "hessian": "½ δᵀHδ",
    "ggn": "½ δᵀGδ",
    "tensors": "½ δᵀ layers(G) δ",
    "blocks": "½ δᵀ blocks(G) δ",
    "diagonal": "½ δᵀ diag(G) δ",
    "mask_overlap_excess": "overlap of masks above chance",
    "eigenspace_overlap": "overlap of top eigenspaces",
    "rank_correlation": "rank correlation of diagonals",
    "weighted_correlation": "weighted correlation of diagonals",
}
"""What may tell which mask will transfer: columns of :attr:`Landscape.cells`, and their labels."""
QUANTITIES = {
    "retention": "retention on the held-out task",
    "measured": "loss increase (nats)",
    "left_out": "error of the quadratic model, as a share",
    **dict(list(PREDICTORS.items())[-4:]),  # of masks and of curvatures
}
"""What :func:`compared` sets side by side, and its labels."""


class Parameters(OneSource):
    """Parameters of the notebook ``landscape_analysis``."""

    samples: Positive | None = 64  #: images a score, a loss and a product
    scorers: list[ScorerName] = Field(min_length=1)  #: the first one is looked at closely
    sparsities: list[Sparsity] = Field(min_length=1)  #: as is the last
    fractions: list[Fraction] = Field(min_length=2)  #: of the pruning step
    block_size: Positive = 64  #: weights a block of the Gauss-Newton matrix
    eigenvectors: Positive = 5  #: of each task's, to compare
    products: Positive = 30  #: most to take for them
    #: Weights to set beside the encoder's.
    comparisons: list[Annotated[str, one_of("comparison", COMPARISONS)]] = Field(default=[])
    brief_steps: Positive = 30
    brief_learning_rate: Rate = 1e-3
    spectrum_samples: Positive | None = 64  #: images a Hessian product; None: all
    probes: Annotated[int, Field(ge=2)] = 2
    lanczos_steps: Positive = 20
    repair: Repair = "moments"
    repair_options: RepairOptions = Field(default={})
    finetune_steps: Positive = 10
    learning_rate: Rate = 1e-5
    path_points: Positive = 4  #: of each line
    plane_points: Annotated[int, Field(ge=2)] = 9  #: of a side
    plane_images: Positive | None = 60  #: a task; None: all test images

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if 1 not in self.fractions:
            raise ValueError("fractions lack the full step, where accuracy is measured; add 1.0")
        if self.eigenvectors > self.products:
            raise ValueError(
                f"{self.eigenvectors} eigenvectors need as many products; got {self.products}"
            )
        return self

    @property
    def recipes(self) -> list[Recipe]:
        """How masks are made: by every scorer, to every sparsity."""
        return combine(self.scorers, self.sparsities)

    @property
    def close(self) -> Recipe:
        """The one that is looked at closely."""
        return Recipe(self.scorers[0], self.sparsities[-1])


@dataclass(frozen=True)
class Landscape:
    """What :func:`measure` finds for one encoder."""

    losses: pd.DataFrame  #: of `predicted_and_measured`, with ``source, scorer, sparsity, target``
    cells: pd.DataFrame  #: their full step beside accuracy, retention, overlaps and ``alignment``
    alignment: pd.DataFrame  #: of :func:`~pai_utils.landscape.task_alignment`
    eigenvalues: pd.DataFrame  #: ``task, rank, eigenvalue, residual, converged``
    retention: pd.DataFrame  #: of :func:`~pai_utils.evaluation.summarise_retention`


def measure(
    suite: Suite, config: Parameters, recipes: Sequence[Recipe], fractions: Sequence[float]
) -> Landscape:
    """Predict and measure what each task's mask does to each task, and how alike the tasks are.

    Losses are on training images, those that scores look at; accuracies are on test images. Needs
    memory for two copies of the prunable weights for each mask, and for each task's eigenvectors.
    """
    made: list[SweepMask] = []
    draw = config.draw.at_most(min(len(task.train) for task in suite.tasks.values()))
    kept = summarise_retention(sweep(suite, list(suite.tasks), recipes, draw, observe=made.append))
    masks = {(each.source, each.recipe.scorer, each.recipe.sparsity): each.mask for each in made}
    dense = suite.classifier(config.source)
    directions = {str(i): pruning_direction(dense, mask) for i, mask in enumerate(masks.values())}
    places = pd.DataFrame(list(masks), columns=["source", "scorer", "sparsity"])
    weights = {name: dense.get_parameter(name) for name in prunable_parameters(dense)}
    parts, diagonals, eigenpairs, rows = [], {}, {}, []
    for target, task in progress(suite.tasks.items(), "tasks", len(suite.tasks)):
        model = suite.classifier(target)
        found = predicted_and_measured(
            model, directions, task.train, draw, fractions=fractions, block_size=config.block_size
        )
        place = places.loc[found.direction.astype(int)].reset_index(drop=True)
        parts.append(place.assign(target=target).join(found.drop(columns="direction")))
        diagonals[target] = ggn_diagonal(model, list(weights), task.train, draw)
        operator = GGNOperator(model, list(weights), task.train, draw)
        # Angles are good to the residual over the gap to the next eigenvalue, which is not known.
        eigenpairs[target] = pairs = top_eigenpairs(
            operator, config.eigenvectors, products=config.products, tolerance=1e-2, seed=draw.seed
        )
        values = zip(pairs.values.tolist(), pairs.residuals.tolist(), strict=True)
        rows += [(target, rank, *pair, pairs.converged) for rank, pair in enumerate(values, 1)]
    losses = pd.concat(parts, ignore_index=True)
    alignment = task_alignment(diagonals, eigenpairs, weights)
    columns = ["task", "rank", "eigenvalue", "residual", "converged"]
    cells = _cells(losses, kept, masks, alignment)
    return Landscape(losses, cells, alignment, pd.DataFrame(rows, columns=columns), kept)


def _cells(
    losses: pd.DataFrame,
    kept: pd.DataFrame,
    masks: Mapping[tuple[str, str, float], Mask],
    alignment: pd.DataFrame,
) -> pd.DataFrame:
    """The full step's predictions beside what was kept and how alike the tasks are."""
    keys = ["source", "scorer", "sparsity", "target"]
    accuracies = kept[[*keys, "accuracy", "retention", "low", "high", "dense_accuracy"]]
    cells = losses[losses.fraction == 1].drop(columns="fraction").merge(accuracies, on=keys)
    places = list(cells[keys].itertuples(index=False, name=None))
    pairs = [(masks[s, name, at], masks.get((t, name, at))) for s, name, at, t in places]
    for column, measure in (("overlap", Mask.overlap), ("chance", Mask.expected_overlap)):
        cells[f"mask_{column}"] = [
            math.nan if own is None or own is mask else measure(mask, own) for mask, own in pairs
        ]
    cells["mask_overlap_excess"] = cells.mask_overlap - cells.mask_chance
    cells = cells.merge(alignment, on=["source", "target"], how="left")
    return cells.assign(held_out=[is_held_out(target, source) for source, *_, target in places])


def measure_others(suite: Suite, config: Parameters) -> dict[str, Landscape]:
    """The same for other weights of the architecture, with heads of their own, by one recipe."""
    found = {}
    for name in config.comparisons:
        other = suite.untrained(seed=config.seed, batch_size=config.batch_size)
        if name == "trained":
            steps, rate = config.brief_steps, config.brief_learning_rate
            how = {"steps": steps, "learning_rate": rate, "batch_size": 32, "seed": config.seed}
            trained = other.fine_tuned(other.encoder, config.source, None, **how)
            other = other.with_encoder(trained.backbone, config.batch_size)
        found[name] = measure(other, config, [config.close], [1.0])
    return found


def networks(suite: Suite, config: Parameters) -> dict[str, Classifier]:
    """The source's classifier: dense, pruned, repaired, and fine-tuned from the pruned one."""
    recipe, source, draw = config.close, suite.source(config.source), config.draw
    scores = suite.score(recipe, source, draw)
    pruned, mask = suite.prune(recipe, source, draw, scores=scores)
    mending = replace(recipe, repair=config.repair, repair_options=config.repair_options)
    repaired, _ = suite.prune(mending, source, draw, scores=scores)
    encoders = {"dense": suite.encoder, "pruned": pruned, "repaired": repaired}
    models = {n: Classifier(e, suite.heads[config.source]) for n, e in encoders.items()}
    steps, rate, size = config.finetune_steps, config.learning_rate, config.batch_size
    how = {"steps": steps, "learning_rate": rate, "batch_size": size, "seed": config.seed}
    models["fine-tuned"] = suite.fine_tuned(pruned, config.source, mask, **how)
    return models


def error_parts(table: pd.DataFrame) -> pd.DataFrame:
    """What the diagonal drops of the measured increase, part by part (:data:`PARTS`).

    For each row of :func:`~pai_utils.landscape.predicted_and_measured` its parts, as ``part`` and
    ``nats``. The first is the diagonal; all add up to what was measured.
    """
    known = table.columns.drop(["gradient", *set(itertools.chain(*PARTS.values()))])
    parts = table.assign(**{p: table[more] - table[less] for p, (more, less) in PARTS.items()})
    return parts.melt([*known], ["diagonal", *PARTS], var_name="part", value_name="nats")


def rank_agreement(table: pd.DataFrame) -> pd.DataFrame:
    """Spearman correlation of predicted and measured loss increases at the full step.

    Columns ``prediction, correlation, count``; not a number for fewer than three cells.
    """
    full = table[table.fraction == table.fraction.max()]
    predictions = ["gradient", "taylor", "hessian", "ggn", "tensors", "blocks", "diagonal"]
    found = full[[*predictions, "measured"]].corr("spearman", min_periods=3).measured[predictions]
    return pd.DataFrame({"prediction": predictions, "correlation": [*found], "count": len(full)})


def transfer_correlations(
    cells: pd.DataFrame, predictors: Sequence[str] = (*PREDICTORS,)
) -> pd.DataFrame:
    """Spearman correlation of each predictor with retention on held-out tasks.

    Intervals (95 %) are from a jackknife that leaves out one task at a time, as source and target,
    since pairs share tasks; they are too wide where pairs differ more than tasks. A ``pooled``
    correlation says mostly that both fall with sparsity; ``within`` compares cells of one scorer
    and sparsity (the mean, weighted by a group's cells). Columns ``predictor, pooled, pooled_low,
    pooled_high, within, within_low, within_high, cells, pairs``; not a number for too few.
    """
    held = cells[cells.held_out]
    rows = []
    for predictor in predictors:
        known = held.dropna(subset=[predictor, "retention"])
        tasks = known.target.unique()
        row: dict[str, object] = {"predictor": predictor}
        for kind, keys in {"pooled": ["held_out"], "within": ["scorer", "sparsity"]}.items():
            whole = _mean_spearman(known, predictor, keys)
            fewer = (known[(known.source != each) & (known.target != each)] for each in tasks)
            left = [_mean_spearman(part, predictor, keys) for part in fewer]
            degrees = len(left) - 1 if len(left) > 2 else math.nan  # of two, nobody can tell
            half = float(t.isf(0.025, degrees)) * np.std(left or [0]) * math.sqrt(degrees)
            low, high = max(whole - half, -1), min(whole + half, 1)
            row |= {kind: whole, f"{kind}_low": low, f"{kind}_high": high}
        pairs = known.groupby(["source", "target"]).ngroups
        rows.append(row | {"cells": len(known), "pairs": pairs})
    return pd.DataFrame(rows)


def _mean_spearman(cells: pd.DataFrame, predictor: str, keys: list[str]) -> float:
    """The rank correlation with retention within groups, the mean weighted by their sizes."""
    if cells.empty:
        return math.nan
    groups = cells.groupby(keys)[[predictor, "retention"]]
    found = groups.corr("spearman", min_periods=3).retention.xs(predictor, level=-1).dropna()
    return float(np.average(found, weights=groups.size()[found.index])) if len(found) else math.nan


def compared(studies: Mapping[str, Landscape], recipe: Recipe) -> pd.DataFrame:
    """The same quantities for several weights of one architecture, pair by pair of tasks.

    Columns ``weights, quantity`` (a value of :data:`QUANTITIES`), ``pair, value``. The quadratic
    model's error is a share of the larger of the measured and the predicted increase.
    """
    rows = []
    for weights, found in studies.items():
        cells = found.cells
        made = (cells.scorer == recipe.scorer) & (cells.sparsity == recipe.sparsity)
        chosen = cells[cells.held_out & made]
        scale = chosen[["measured", "taylor"]].abs().max(axis=1)
        error = (chosen.measured - chosen.taylor).abs() / scale
        for cell in chosen.assign(left_out=error).to_dict("records"):
            pair = f"{cell['source']} → {cell['target']}"
            rows += [(weights, label, pair, cell[name]) for name, label in QUANTITIES.items()]
    return pd.DataFrame(rows, columns=["weights", "quantity", "pair", "value"])


def spectra(
    models: Mapping[str, nn.Module], data: Samples, config: Parameters
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Spectrum of the Hessian of the mean cross-entropy for several weights of one network.

    By :func:`~pai_utils.curvature.spectra.spectral_density` over the prunable weights, pruned ones
    among them. Two tables: ``name, largest, smallest`` (Ritz values, which bound the eigenvalues
    from inside), ``trace, trace_standard_error`` (over probes); and ``name, eigenvalue, density``.
    """
    summary, found = [], {}
    draw = replace(config.draw, samples=config.spectrum_samples)
    draw, probes, steps = draw.at_most(len(cast(Sized, data))), config.probes, config.lanczos_steps
    for name, model in progress(models.items(), "spectra", len(models)):
        operator = HessianOperator(model, prunable_parameters(model), data, draw)
        here = found[name] = spectral_density(operator, probes=probes, steps=steps, seed=draw.seed)
        size = sum(values.numel() for values in operator.parameters.values())
        traces = size * (here.weights * here.nodes).sum(1)
        values = (here.nodes.max(), here.nodes.min(), traces.mean(), traces.std() / probes**0.5)
        summary.append([name, *map(float, values)])
    # One kernel for all, so that a line is wide where its spectrum is.
    width = max(density.width for density in found.values())
    smooth = {name: density.smoothed(width) for name, density in found.items()}
    densities = [
        pd.DataFrame({"name": name, "eigenvalue": each.grid, "density": each.density})
        for name, each in smooth.items()
    ]
    columns = ["name", "largest", "smallest", "trace", "trace_standard_error"]
    return pd.DataFrame(summary, columns=columns), pd.concat(densities, ignore_index=True)


def barriers(path: pd.DataFrame) -> pd.DataFrame:
    """How far the loss rises on a line above the line between its ends' losses.

    Columns ``segment, task, start, end, barrier``, in nats; the barrier is at least zero, and not a
    number where the loss at an end is not finite. Source: Frankle et al. (2020), "Linear mode
    connectivity and the lottery ticket hypothesis".
    """
    rows = []
    for task, line in path.groupby("task", sort=False):
        for number, segment in enumerate(line.segment.unique()):
            own = line[line.position.between(number, number + 1)]
            start, end = own.loss.iloc[[0, -1]]
            rise = (own.loss - start - (own.position - number) * (end - start)).max()
            barrier = max(0.0, rise) if math.isfinite(start) and math.isfinite(end) else math.nan
            rows.append([segment, task, start, end, barrier])
    table = pd.DataFrame(rows, columns=["segment", "task", "start", "end", "barrier"])
    return table.sort_values(["segment", "task"], kind="stable", ignore_index=True)

"""The loss around the pre-trained weights: what the quadratic model predicts, what is measured.

Pruning moves the weights by δ = (m − 1) ⊙ θ₀. To second order ::

    L(θ₀ + αδ) − L(θ₀) ≈ α gᵀδ + ½ α² δᵀHδ,

and replacing H by the Gauss-Newton matrix G, or by parts of G, drops what the scores drop.

The module compares prediction and measurement (:func:`predicted_and_measured`), the curvature of
tasks (:func:`task_alignment`), and both with the accuracy that is kept (:func:`study`,
:func:`transfer_correlations`); it walks along straight lines (:func:`losses_on_path`) and over
planes of weights (:func:`losses_on_plane`).
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pai_utils.backbones import Backbone, Classifier, prunable_parameters
from pai_utils.curvature.diagonals import ggn_diagonal
from pai_utils.curvature.partial import partial_terms
from pai_utils.curvature.products import (
    GGNOperator,
    HessianOperator,
    check_directions,
    directional_terms,
    inner_product,
)
from pai_utils.curvature.spectra import Eigenpairs, spectral_density, top_eigenpairs
from pai_utils.evaluation import (
    SweepMask,
    evaluate,
    evaluate_heads,
    interval,
    retention_sweep,
    summarise_retention,
)
from pai_utils.execution import NonFiniteError, Samples, draw_samples, progress
from pai_utils.finetuning import finetune
from pai_utils.heads import fit_head
from pai_utils.masks import Mask
from pai_utils.sources import is_held_out
from pai_utils.tasks import Task

Direction = Mapping[str, Tensor]
"""A step in weight space, as one tensor a parameter name, of the parameter's shape."""

T = TypeVar("T")
_Values = NDArray[np.float64]

PARTS = {
    "within blocks": ("blocks", "diagonal"),
    "within layers": ("tensors", "blocks"),
    "between layers": ("ggn", "tensors"),
    "indefinite part": ("hessian", "ggn"),
    "gradient": ("taylor", "hessian"),
    "higher order": ("measured", "taylor"),
}
"""What a score with the diagonal alone drops of the measured increase, each the difference of two
columns of :func:`predicted_and_measured`; with the diagonal they add up to what is measured."""

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
"""What may tell which mask will transfer, by column of :attr:`Study.cells`, and its label."""


# Prediction and measurement


def pruning_direction(model: nn.Module, mask: Mask) -> dict[str, Tensor]:
    """δ = (m − 1) ⊙ θ: the step from the dense to the pruned weights.

    Args:
        model: the dense model.
        mask: what is pruned.

    Returns:
        One tensor a name of the mask, of the parameter's shape.

    Raises:
        ValueError: for a mask of another architecture.
    """
    mask._check(parameters := dict(model.named_parameters()))
    return {
        name: parameters[name].detach().masked_fill(entry.to(parameters[name].device), 0).neg()
        for name, entry in mask.items()
    }


def predicted_and_measured(
    model: nn.Module,
    directions: Mapping[str, Direction],
    data: Samples,
    *,
    fractions: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
    samples: int | None = 128,
    batch_size: int = 64,
    seed: int = 0,
    block_size: int = 64,
    draws: int = 1,
) -> pd.DataFrame:
    """Loss increase along directions: predicted by quadratic models and measured.

    All quantities are over the same samples. Those with gradient, Hessian and Gauss-Newton matrix
    are exact up to rounding; the diagonal, blocks and tensors of the latter are Monte Carlo
    estimates with ``draws`` labels a sample, the same ones for all three
    (:func:`~pai_utils.curvature.partial.partial_terms`): noisy where the model is sure of its
    labels, and low for a direction that a score chose by the same labels, as ``ggn_diag`` does
    with the same seed and samples. Costs about five forward and backward passes, two for each
    direction, and one forward for each direction and fraction.

    Args:
        model: the dense model, left as it was.
        directions: by name, each a δ, as from :func:`pruning_direction`.
        data: labelled samples.
        fractions: values of α.
        samples: size of the seeded draw; ``None`` for all.
        batch_size: samples a forward.
        seed: seed of the draw and of the labels.
        block_size: weights a block.
        draws: labels a sample.

    Returns:
        One row a direction and α, with ``direction, fraction, diagonal, blocks, tensors, ggn,
        hessian, gradient, taylor, measured, dense_loss, count``, in nats: ½ α² δᵀAδ for the
        diagonal, the blocks and the whole tensors of G, for G and for H; α gᵀδ; gradient and
        Hessian together; and the measured difference.
    """
    settings = {"samples": samples, "batch_size": batch_size, "seed": seed}
    steps = list(directions.values())
    exact = directional_terms(model, steps, data, **settings)  # type: ignore[arg-type]
    partial = partial_terms(
        model, steps, data,
        block_size=block_size, draws=draws, **settings,  # type: ignore[arg-type]
    )  # fmt: skip
    drawn = torch.utils.data.Subset(data, draw_samples(data, samples, seed).tolist())
    rows = []
    for name, terms, parts in zip(directions, exact, partial, strict=True):
        losses = losses_along(model, directions[name], drawn, fractions, batch_size=batch_size)
        for alpha, loss in zip(fractions, losses, strict=True):
            half = alpha**2 / 2
            rows.append(
                {
                    "direction": name,
                    "fraction": alpha,
                    "diagonal": half * parts.diagonal,
                    "blocks": half * parts.blocks,
                    "tensors": half * parts.tensors,
                    "ggn": half * terms.ggn,
                    "hessian": half * terms.hessian,
                    "gradient": alpha * terms.gradient,
                    "taylor": alpha * terms.gradient + half * terms.hessian,
                    "measured": loss - terms.loss,
                    "dense_loss": terms.loss,
                    "count": terms.count,
                }
            )
    return pd.DataFrame(rows)


def losses_along(
    model: nn.Module,
    direction: Direction,
    data: Samples,
    fractions: Sequence[float],
    *,
    batch_size: int = 64,
) -> list[float]:
    """Mean loss at θ + αδ for every α; the weights return bit for bit.

    Args:
        model: images to logits, in evaluation mode for each loss.
        direction: δ, one tensor a parameter name.
        data: labelled samples; all of them are looked at.
        fractions: values of α.
        batch_size: samples a forward.

    Returns:
        The mean cross-entropy of each, in nats.

    Raises:
        ValueError: if the direction does not fit the model or a loss is not finite.

    Examples:
        >>> import torch
        >>> from pai_utils.landscape import losses_along
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3, 2, bias=False))
        >>> model[1].weight.data = torch.zeros(2, 3)
        >>> images = torch.eye(3).view(3, 3, 1, 1)  # three images of one pixel
        >>> data = torch.utils.data.TensorDataset(images, torch.tensor([0, 1, 0]))
        >>> towards = {"1.weight": torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])}
        >>> [round(loss, 3) for loss in losses_along(model, towards, data, [0, 1, 2])]
        [0.693, 0.313, 0.127]
    """
    return _at_each(
        model,
        [direction],
        [[alpha] for alpha in fractions],
        lambda: evaluate(model, data, batch_size=batch_size).loss,
    )


def error_parts(table: pd.DataFrame) -> pd.DataFrame:
    """What the diagonal drops of the measured increase, part by part (:data:`PARTS`).

    Args:
        table: rows of :func:`predicted_and_measured`.

    Returns:
        For each row the parts in its place, ``part`` and ``nats``; the first is the diagonal
        itself, and all of a row's add up to what was measured.
    """
    known = [c for c in table.columns if c not in {*itertools.chain(*PARTS.values()), "gradient"}]
    differences = {
        "diagonal": table.diagonal,
        **{part: table[more] - table[less] for part, (more, less) in PARTS.items()},
    }
    return pd.concat(
        [table[known].assign(part=part, nats=nats) for part, nats in differences.items()],
        ignore_index=True,
    )


def rank_agreement(table: pd.DataFrame) -> pd.DataFrame:
    """Spearman rank correlation between predicted and measured loss increases at the full step.

    Args:
        table: rows of :func:`predicted_and_measured` for several directions or tasks.

    Returns:
        One row a prediction, with ``prediction, correlation, count``; the correlation is not a
        number for fewer than three rows.
    """
    full = table[table.fraction == table.fraction.max()]
    predictions = ("gradient", "taylor", "hessian", "ggn", "tensors", "blocks", "diagonal")
    return pd.DataFrame(
        {
            "prediction": name,
            "correlation": float(_spearman(full[name].to_numpy(), full.measured.to_numpy())[0]),
            "count": len(full),
        }
        for name in predictions
    )


# Alignment of tasks


@dataclass(frozen=True)
class TaskCurvature:
    """Curvature of one task's loss at the encoder's weights."""

    diagonal: Mapping[str, Tensor]
    """Of the GGN, by parameter name."""
    eigenpairs: Eigenpairs
    """The largest ones of the GGN, of the same parameters."""


def task_curvature(
    model: nn.Module,
    data: Samples,
    *,
    eigenvectors: int = 5,
    products: int = 30,
    samples: int | None = 64,
    batch_size: int = 64,
    seed: int = 0,
) -> TaskCurvature:
    """Diagonal (one drawn label a sample) and top eigenpairs of a task's GGN.

    Costs a forward and two backwards for the diagonal, and about four passes a product.

    Args:
        model: images to logits; left as it was.
        data: labelled samples.
        eigenvectors: how many pairs.
        products: most products to take for them; see ``eigenpairs.converged``.
        samples: size of the seeded draw; ``None`` for all.
        batch_size: samples a forward.
        seed: of the draw, of the labels and of the start vector.
    """
    settings = {"samples": samples, "batch_size": batch_size, "seed": seed}
    names = prunable_parameters(model)
    diagonal = ggn_diagonal(model, names, data, **settings)  # type: ignore[arg-type]
    operator = GGNOperator(model, names, data, **settings)  # type: ignore[arg-type]
    # Angles are good to the residual over the gap to the next eigenvalue, which is not known.
    pairs = top_eigenpairs(operator, eigenvectors, products=products, tolerance=1e-2, seed=seed)
    return TaskCurvature(diagonal, pairs)


def principal_angles(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> Tensor:
    """Principal angles between two subspaces of weights, in radians, the smallest first.

    Small angles come from sines and large ones from cosines, each where it keeps its digits.
    Exact to the rounding of the vectors; costs kl inner products of all weights in float64, and a
    QR decomposition of the smaller set.

    Sources: Björck & Golub (1973), "Numerical methods for computing angles between linear
    subspaces"; between tops of Hessians: Gur-Ari et al. (2018), "Gradient descent happens in a
    tiny subspace".

    Args:
        left: orthonormal vectors ``[k, *shape]`` by name, as
            :class:`~pai_utils.curvature.spectra.Eigenpairs` holds them.
        right: ``[l, *shape]``, of the same names.

    Returns:
        ``[min(k, l)]``, float64.

    Raises:
        ValueError: if names or shapes differ.

    Examples:
        >>> import torch
        >>> from pai_utils.landscape import principal_angles
        >>> left = {"weight": torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])}
        >>> right = {"weight": torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])}
        >>> principal_angles(left, right).rad2deg()
        tensor([ 0., 90.], dtype=torch.float64)
    """
    if set(left) != set(right) or any(left[n].shape[1:] != right[n].shape[1:] for n in left):
        raise ValueError("the vectors are of different parameters")
    if len(next(iter(left.values()))) < len(next(iter(right.values()))):
        return principal_angles(right, left)

    cross = cast(
        Tensor,
        sum(left[n].flatten(1).double() @ right[n].flatten(1).double().T for n in left),
    )
    # Of the part of the right vectors that the left ones do not span only the triangular factor is
    # kept: it has the same singular values, and a Gram matrix would lose half of their digits.
    factor = cross.new_zeros(0, cross.shape[1])
    for name in left:
        rest = right[name].flatten(1).double() - cross.T @ left[name].flatten(1).double()
        factor = torch.linalg.qr(torch.cat([factor, rest.T]), mode="r").R
    sines = torch.linalg.svdvals(factor).flip(0).clamp(0, 1)
    cosines = torch.linalg.svdvals(cross).clamp(0, 1)
    return torch.where(cosines.square() > 0.5, sines.asin(), cosines.acos())


def task_alignment(
    curvatures: Mapping[str, TaskCurvature], weights: Mapping[str, Tensor]
) -> pd.DataFrame:
    """How alike the curvature of tasks is, pair by pair.

    Costs a sort of all weights for each task, and the inner products of
    :func:`principal_angles` for each pair.

    Args:
        curvatures: by task.
        weights: of the encoder, by the curvatures' names.

    Returns:
        One row an ordered pair of different tasks, with ``source, target, eigenspace_overlap``
        (mean squared cosine of the principal angles), ``chance`` (that of random subspaces, the
        larger number of eigenvectors over that of weights), ``smallest_angle, largest_angle``
        (degrees), ``rank_correlation`` (Spearman, of the diagonals) and ``weighted_correlation``
        (Pearson, of the diagonals, each weight counted by its square: what pruning sees).

    Raises:
        ValueError: if curvatures and weights are of different parameters.
    """
    names = list(weights)
    if any(set(curvature.diagonal) != set(names) for curvature in curvatures.values()):
        raise ValueError("the curvatures and weights are of different parameters")

    def flat(tensors: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([tensors[name].detach().flatten().cpu() for name in names])

    importance = flat(weights).double().square()
    diagonals = {task: flat(curvature.diagonal) for task, curvature in curvatures.items()}
    weighted = {task: _standardised(d, importance) for task, d in diagonals.items()}
    ranked = {task: _standardised(_ranks(d)) for task, d in diagonals.items()}
    rows = []
    for one, other in itertools.combinations(curvatures, 2):
        pairs = curvatures[one].eigenpairs, curvatures[other].eigenpairs
        angles = principal_angles(pairs[0].vectors, pairs[1].vectors)
        row = {
            "eigenspace_overlap": float(angles.cos().square().mean()),
            "chance": max(len(pair.values) for pair in pairs) / len(importance),
            "smallest_angle": math.degrees(float(angles.min())),
            "largest_angle": math.degrees(float(angles.max())),
            "rank_correlation": float(torch.dot(ranked[one], ranked[other])),
            "weighted_correlation": float(torch.dot(weighted[one], weighted[other])),
        }
        rows += [{"source": a, "target": b} | row for a, b in ((one, other), (other, one))]
    return pd.DataFrame(rows)


def _ranks(values: Tensor) -> Tensor:
    """Ranks in float64; equal values share the mean of theirs. A quarter of scipy's time."""
    ordered, places = _sorted(values)
    _, counts = ordered.unique_consecutive(return_counts=True)
    middle = counts.cumsum(0).double() - (counts.double() - 1) / 2
    ranks = torch.empty_like(values, dtype=torch.float64)
    ranks[places] = middle.repeat_interleave(counts)
    return ranks


def _sorted(values: Tensor) -> tuple[Tensor, Tensor]:
    """As ``values.sort()`` on the CPU; numbers of 32 bits in a third of its time."""
    if values.dtype != torch.float32:
        return values.sort()
    # Bits in an order that is that of the numbers, and the places behind them: one plain sort.
    bits = (values.numpy() + np.float32(0)).view(np.uint32)  # -0 becomes 0
    bits ^= np.where(bits >> 31 == 1, np.uint32(2**32 - 1), np.uint32(2**31))
    keys = bits.astype(np.uint64) << np.uint64(32)
    keys |= np.arange(len(bits), dtype=np.uint64)
    keys.sort()
    places = torch.from_numpy((keys & np.uint64(2**32 - 1)).astype(np.int64))
    return values[places], places


def _standardised(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """Numbers in float64 whose inner product with others of the kind is a Pearson correlation.

    Not numbers where the values do not vary.
    """
    values = values.double()
    varies = bool((values != values[0]).any())
    if weights is None:
        values = values - values.mean()
    else:
        share = weights / weights.sum()
        values = (values - torch.dot(share, values)).mul_(share.sqrt_())
    norm = torch.linalg.vector_norm(values)
    return values.div_(norm if varies else math.nan)


def _spearman(one: _Values, other: _Values, counts: _Values | None = None) -> _Values:
    """Rank correlation ``[R]`` of samples in which value i comes ``counts[r, i]`` times.

    Not a number for fewer than three different ones of the values, or where one does not vary.
    """
    counts = np.ones((1, len(one))) if counts is None else counts
    size = counts.sum(1)
    share = counts / np.maximum(size, 1)[:, None]
    a, b = (
        # Of value i: how many lie below it, and half of its equals.
        counts @ ((v[:, None] < v) + (v[:, None] == v) / 2)
        for v in (one, other)
    )
    a, b = (ranks - (share * ranks).sum(1, keepdims=True) for ranks in (a, b))
    scale = np.sqrt((share * a**2).sum(1) * (share * b**2).sum(1))
    known = ((counts > 0).sum(1) >= 3) & (scale > 0)  # copies are no further values
    found: _Values = np.full(len(counts), math.nan)
    np.divide((share * a * b).sum(1), scale, out=found, where=known)
    return found


# Both, and what is kept


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
    values: _Values, kept: _Values, groups: NDArray[np.integer[Any]], counts: _Values
) -> _Values:
    """Mean rank correlation within groups, weighted by their sizes, for each row of counts."""
    total, weight = np.zeros((2, len(counts)))
    for group in np.unique(groups):
        chosen = groups == group
        found = _spearman(values[chosen], kept[chosen], counts[:, chosen])
        size = np.where(np.isnan(found), 0, counts[:, chosen].sum(1))
        total, weight = total + np.nan_to_num(found) * size, weight + size
    mean: _Values = np.full(len(counts), math.nan)
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


# Spectra


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
        operator = HessianOperator(
            model, names, data, samples=samples, batch_size=batch_size, seed=seed
        )
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


# Paths and planes


def difference(start: nn.Module, end: nn.Module) -> dict[str, Tensor]:
    """The step from one network's parameters to another's, of all that differ.

    Raises:
        ValueError: if they have other parameters or buffers that differ, which no straight line
            through parameters joins.
    """
    there = dict(end.named_parameters())
    here = dict(start.named_parameters())
    if {n: p.shape for n, p in here.items()} != {n: p.shape for n, p in there.items()}:
        raise ValueError("the two networks have different parameters")
    buffers, others = dict(start.named_buffers()), dict(end.named_buffers())
    for name in buffers | others:
        if name not in buffers or name not in others or not buffers[name].equal(others[name]):
            raise ValueError(f"buffer {name!r} differs: a path through weights does not lead there")
    return {
        name: there[name].detach() - value.detach()
        for name, value in here.items()
        if not torch.equal(there[name], value)
    }


def losses_on_path(
    stations: Mapping[str, Backbone],
    heads: Mapping[str, nn.Linear],
    data: Mapping[str, Samples],
    *,
    points: int = 5,
    batch_size: int = 128,
) -> pd.DataFrame:
    """Loss and accuracy along the straight lines from station to station.

    Costs a forward over all data for each point; the stations' weights stay as they are.

    Args:
        stations: encoders by name, in order.
        heads: a frozen head for each task.
        data: labelled images by task.
        points: steps of a line; its ends are on the path as well.
        batch_size: images a forward.

    Returns:
        One row a point and task, with ``position`` (0 at the first station, 1 at the second, …),
        ``segment`` ("dense → pruned"), ``task, loss, accuracy, count``. A point between two
        segments comes once, with the first. Where a loss is not finite it is infinite, and the
        accuracy not a number.

    Raises:
        ValueError: for fewer than two stations, fewer points than one, or as :func:`difference`.
    """
    if len(stations) < 2 or points < 1:
        raise ValueError(
            f"a path needs two stations and a point, got {len(stations)} and points={points}"
        )
    names = list(stations)
    origin = copy.deepcopy(stations[names[0]])
    directions = [difference(origin, stations[name]) for name in names[1:]]
    positions = [step / points for step in range(points * (len(names) - 1) + 1)]
    # Hat functions: each station has weight one at its own position and none at the others.
    coordinates = [
        [max(0.0, 1 - abs(position - place)) for place in range(1, len(names))]
        for position in positions
    ]
    table = _losses_over(origin, directions, coordinates, heads, data, batch_size)
    place = table.point.map(dict(enumerate(positions)))
    segment = (place.map(math.ceil) - 1).clip(0)
    return table.drop(columns="point").assign(
        position=place, segment=[f"{names[s]} → {names[s + 1]}" for s in segment]
    )


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


@dataclass(frozen=True)
class Plane:
    """A plane of weights: origin + x · first + y · second."""

    directions: tuple[Direction, Direction]
    points: Mapping[str, tuple[float, float]]
    """Networks that lie on it, by name."""
    unit: str
    """What x and y count."""


def plane_through(
    origin: nn.Module, others: Mapping[str, nn.Module], *, name: str = "dense"
) -> Plane:
    """The plane through three networks' weights.

    The first direction leads to the first of the others and the second is perpendicular to it
    (Gram–Schmidt, as Garipov et al. 2018, "Loss surfaces, mode connectivity, and fast ensembling
    of DNNs"); both have norm one, so that distances on the plane are distances of weights.

    Args:
        origin: the network at (0, 0).
        others: two more, by name.
        name: of the origin.

    Raises:
        ValueError: if there are not two others, the three lie on a line, or as
            :func:`difference`.
    """
    if len(others) != 2:
        raise ValueError(f"a plane goes through three networks; got {len(others)} beside {name!r}")
    steps = [difference(origin, other) for other in others.values()]
    zeros = {n: torch.zeros_like(p) for n, p in origin.named_parameters()}
    u, v = ({n: step.get(n, zeros[n]) for n in steps[0] | steps[1]} for step in steps)
    length = float(inner_product(u, u)) ** 0.5 if u else 0.0
    if length == 0:
        raise ValueError(f"{next(iter(others))!r} has the weights of {name!r}: no plane")
    u = {n: part / length for n, part in u.items()}
    along = float(inner_product(u, v))
    v = {n: part - along * u[n] for n, part in v.items()}
    height = float(inner_product(v, v)) ** 0.5
    if height <= 1e-6 * max(length, abs(along)):
        raise ValueError(f"{name!r} and {', '.join(map(repr, others))} lie on one line: no plane")
    v = {n: part / height for n, part in v.items()}
    first, second = others
    return Plane((u, v), {name: (0, 0), first: (length, 0), second: (along, height)}, "distance")


def random_plane(model: nn.Module, mask: Mask | None = None, *, seed: int = 0) -> Plane:
    """A plane through a network along two Gaussian directions, normalised filter by filter.

    Each output channel of a direction has the norm of the weights' channel, so that one unit moves
    every filter as far as it is long whatever scale its layer has; only weights that could be
    pruned move, and pruned ones stay (Li et al. 2018, "Visualizing the loss landscape of neural
    nets").

    Args:
        model: the network at (0, 0).
        mask: whose pruned entries stay zero.
        seed: of the directions, the same on every device.

    Raises:
        ValueError: for a mask of another architecture.
    """
    parameters = dict(model.named_parameters())
    if mask is not None:
        mask._check(parameters)
    generator = torch.Generator().manual_seed(seed)
    directions = []
    for _ in range(2):
        direction = {}
        for name in prunable_parameters(model):
            weight = parameters[name].detach()
            drawn = torch.randn(weight.shape, generator=generator).to(weight)
            if mask is not None and name in mask:
                drawn.masked_fill_(~mask[name].to(weight.device), 0)
            norms = [values.flatten(1).norm(dim=1) for values in (weight, drawn)]
            scale = torch.where(norms[1] > 0, norms[0] / norms[1].clamp_min(1e-30), 0)
            direction[name] = drawn * scale.view(-1, *[1] * (weight.dim() - 1))
        directions.append(direction)
    return Plane((directions[0], directions[1]), {"weights": (0, 0)}, "filter norms")


def losses_on_plane(
    backbone: Backbone,
    plane: Plane,
    heads: Mapping[str, nn.Linear],
    data: Mapping[str, Samples],
    *,
    points: int = 21,
    margin: float = 0.3,
    batch_size: int = 128,
) -> pd.DataFrame:
    """Loss and accuracy of every task on a grid over the plane.

    Costs ``points²`` forwards over all data; the weights return bit for bit.

    Args:
        backbone: the network at (0, 0), left as it was.
        plane: as from :func:`plane_through` or :func:`random_plane`.
        heads: a frozen head for each task.
        data: labelled images by task.
        points: of a side of the grid, at least two.
        margin: how far the grid reaches beyond the plane's points, over their extent; around a
            single point, in the plane's units.
        batch_size: images a forward.

    Returns:
        One row a point and task, with ``x, y, task, loss, accuracy, count``. Where a loss is not
        finite it is infinite, and the accuracy not a number.

    Raises:
        ValueError: for fewer points than two, or a margin that is negative or leaves no extent.
    """
    if points < 2:
        raise ValueError(f"points={points}: a side of the grid needs at least two")
    places = np.array(list(plane.points.values()), dtype=float)
    low, high = places.min(0), places.max(0)
    extent = high - low
    reach = margin * np.where(extent > 0, extent, 1)
    if margin < 0 or ((extent + reach) == 0).any():
        raise ValueError(f"margin={margin} must be positive around a single point, never negative")
    x, y = (np.linspace(low[i] - reach[i], high[i] + reach[i], points, dtype=float) for i in (0, 1))
    coordinates = list(itertools.product(x.tolist(), y.tolist()))
    table = _losses_over(backbone, plane.directions, coordinates, heads, data, batch_size)
    at = [coordinates[point] for point in table.point]
    return table.drop(columns="point").assign(x=[p[0] for p in at], y=[p[1] for p in at])


def _losses_over(
    backbone: Backbone,
    directions: Sequence[Direction],
    coordinates: Sequence[Sequence[float]],
    heads: Mapping[str, nn.Linear],
    data: Mapping[str, Samples],
    batch_size: int,
) -> pd.DataFrame:
    """Columns ``point`` (the number of the coordinates), ``task, loss, accuracy, count``."""

    def measure() -> list[dict[str, object]]:
        rows: list[dict[str, object]] = []
        for task, samples in data.items():
            try:
                found = evaluate_heads(backbone, heads, {task: samples}, batch_size=batch_size)
                loss, accuracy = found[task].loss, found[task].accuracy
            except NonFiniteError:
                loss, accuracy = math.inf, math.nan
            rows.append({"task": task, "loss": loss, "accuracy": accuracy, "count": len(samples)})  # type: ignore[arg-type]
        return rows

    found = _at_each(backbone, directions, coordinates, measure)
    return pd.DataFrame({"point": point} | row for point, rows in enumerate(found) for row in rows)


def _at_each(
    model: nn.Module,
    directions: Sequence[Direction],
    coordinates: Sequence[Sequence[float]],
    compute: Callable[[], T],
) -> list[T]:
    """What ``compute`` gives with the weights at θ + Σ c_k δ_k for each row of coordinates.

    The weights return bit for bit, also after an error.
    """
    for direction in directions:
        check_directions(model, [direction])
    moved = dict.fromkeys(itertools.chain(*directions))
    parameters = {n: p for n, p in model.named_parameters() if n in moved}
    origin = {name: p.detach().clone() for name, p in parameters.items()}
    results = []
    try:
        for row in progress(coordinates, "points of the landscape", len(coordinates)):
            with torch.no_grad():
                for name, start in origin.items():
                    parameters[name].copy_(start)
                    for share, direction in zip(row, directions, strict=True):
                        if share and name in direction:
                            parameters[name].add_(direction[name], alpha=share)
            results.append(compute())
    finally:
        with torch.no_grad():
            for name, start in origin.items():
                parameters[name].copy_(start)
    return results

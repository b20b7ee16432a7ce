"""The loss around the pre-trained weights: what the quadratic model predicts, what is measured.

Pruning moves the weights by δ = (m − 1) ⊙ θ₀. To second order ::

    L(θ₀ + αδ) − L(θ₀) ≈ α gᵀδ + ½ α² δᵀHδ,

and replacing H by the Gauss-Newton matrix G, or by parts of G, drops what the scores drop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, combinations, product
from typing import TypeVar

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor, nn

from pai_utils.curvature.products import check_directions, directional_terms, inner_product
from pai_utils.curvature.quadratic import partial_terms
from pai_utils.curvature.spectra import Eigenpairs
from pai_utils.evaluation import evaluate, evaluate_heads
from pai_utils.masks import Mask
from pai_utils.models.encoders import Backbone
from pai_utils.support.common import NonFiniteError, copied, forget, progress
from pai_utils.support.contract import count_items, unwrapped
from pai_utils.support.sampling import Draw, Samples

Direction = Mapping[str, Tensor]  #: a step of the weights, by parameter name
_RANKED = 2**20  # weights that a rank correlation takes at most: it is good to a thousandth
T = TypeVar("T")


def pruning_direction(model: nn.Module, mask: Mask) -> dict[str, Tensor]:
    """δ = (m − 1) ⊙ θ: the step from a model's dense weights to the pruned ones."""
    mask.check(model, strict=False)
    model = unwrapped(model)
    weights = {name: model.get_parameter(name).detach() for name in mask}
    return {n: w.masked_fill(mask[n].to(w.device), 0).neg() for n, w in weights.items()}


def predicted_and_measured(
    model: nn.Module,
    directions: Mapping[str, Direction],
    data: Samples,
    draw: Draw,
    *,
    fractions: Sequence[float],
    block_size: int = 64,
    draws: int = 1,
) -> pd.DataFrame:
    """Loss increase along directions: predicted by quadratic models, and measured.

    ``directions`` are δ by name, as from :func:`pruning_direction`, and ``fractions`` values of α.
    All quantities are over the same samples. The terms of the gradient, H and G are exact; those of
    the diagonal, blocks and tensors of G are Monte Carlo estimates with ``draws`` labels a sample
    (:func:`~pai_utils.curvature.quadratic.partial_terms`). These are noisy where the model is sure
    of its labels, and too low along a direction that a score chose by the same labels, as
    ``ggn_diag`` does with the same draw.

    Returns:
        One row a direction and α, with ``direction, fraction``; ½ α² δᵀAδ for ``diagonal, blocks,
        tensors`` of G, for ``ggn`` and for ``hessian``; ``gradient``, α gᵀδ; ``taylor``, gradient
        and Hessian together; the ``measured`` difference; ``dense_loss`` and ``count``. All but
        the last in nats.

    Raises:
        ValueError: if a direction does not fit the model, or a loss is not finite.
    """
    steps = list(directions.values())
    exact = directional_terms(model, steps, data, draw)
    partial = partial_terms(model, steps, data, draw, block_size=block_size, draws=draws)
    drawn = torch.utils.data.Subset(data, draw.indices(data).tolist())

    def measure() -> float:
        return evaluate(model, drawn, batch_size=draw.batch_size).loss

    places = [[alpha] for alpha in fractions]
    losses = [loss for step in steps for loss in _at_each(model, [step], places, measure)]
    terms = pd.DataFrame(exact).join(pd.DataFrame(partial).drop(columns="count"))
    terms.insert(0, "direction", list(directions))
    table = terms.merge(pd.DataFrame({"fraction": fractions}), how="cross")
    quadratic = ["diagonal", "blocks", "tensors", "ggn", "hessian"]
    table[quadratic] = table[quadratic].mul(table.fraction**2 / 2, axis=0)
    table["gradient"] *= table.fraction
    table["taylor"] = table.gradient + table.hessian
    table["measured"] = losses - table.loss
    table = table.rename(columns={"loss": "dense_loss"})
    order = ["direction", "fraction", *quadratic, "gradient", "taylor", "measured"]
    return table[[*order, "dense_loss", "count"]]


def task_alignment(
    diagonals: Mapping[str, Direction],
    eigenpairs: Mapping[str, Eigenpairs],
    weights: Mapping[str, Tensor],
) -> pd.DataFrame:
    """How alike the Gauss-Newton matrices of tasks are, pair by pair.

    For each task it takes the diagonal of its matrix and the largest eigenpairs, by parameter.

    Returns:
        One row an ordered pair of different tasks, with ``source, target, eigenspace_overlap``
        (mean squared cosine of the principal angles between top eigenspaces, as Gur-Ari et al.
        2018, "Gradient descent happens in a tiny subspace"), ``chance`` (that of random
        subspaces), ``rank_correlation`` (Spearman, of the diagonals, over a million weights drawn
        at random where there are more) and ``weighted_correlation`` (Pearson, of the diagonals,
        each weight counted by its square).
    """

    def flat(tensors: Mapping[str, Tensor]) -> NDArray[np.float64]:
        parts = [tensors[name].detach().flatten().cpu() for name in weights]
        return np.asarray(torch.cat(parts).double())

    importance = np.square(flat(weights))
    values = {task: flat(diagonal) for task, diagonal in diagonals.items()}
    total, drawn = len(importance), np.arange(len(importance))
    if total > _RANKED:  # sorting tens of millions takes longer than the curvature
        drawn = np.random.default_rng(0).choice(drawn, _RANKED, replace=False, shuffle=False)
    ranks = {task: rankdata(each[drawn]) for task, each in values.items()}
    rows = []
    for one, other in combinations(diagonals, 2):
        left, right = eigenpairs[one].vectors, eigenpairs[other].vectors
        inner = [left[n].flatten(1).double() @ right[n].flatten(1).double().T for n in weights]
        products = torch.stack(inner).sum(0)  # their singular values are the cosines
        row = {
            "eigenspace_overlap": float(products.square().sum()) / min(products.shape),
            "chance": max(products.shape) / total,
            "rank_correlation": _correlation(ranks[one], ranks[other]),
            "weighted_correlation": _correlation(values[one], values[other], importance),
        }
        rows += [{"source": a, "target": b} | row for a, b in ((one, other), (other, one))]
    return pd.DataFrame(rows)


def _correlation(
    one: NDArray[np.float64], other: NDArray[np.float64], weights: NDArray[np.float64] | None = None
) -> float:
    """Pearson correlation; not a number where the values do not vary."""
    if not (np.ptp(one) and np.ptp(other)):
        return math.nan
    (first, shared), (_, second) = np.cov(one, other, aweights=weights)
    return float(shared / math.sqrt(first * second))


def difference(start: nn.Module, end: nn.Module) -> dict[str, Tensor]:
    """The step from one network's parameters to another's, of all that differ.

    Raises:
        ValueError: for other parameters, or buffers that differ: no line of weights joins them.
    """
    here, there = dict(start.named_parameters()), dict(end.named_parameters())
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
    """Loss and accuracy of every task along the straight lines from station to station.

    ``stations`` are encoders by name, in order, and a line has ``points`` steps.

    Returns:
        One row a point and task, with ``position`` (0 at the first station, 1 at the second, …),
        ``segment`` ("dense → pruned"), ``task, loss, accuracy, count``. A point between two
        segments comes once, with the first. A loss that is not finite is infinite here, with an
        accuracy that is not a number.

    Raises:
        ValueError: for fewer stations than two or points than one, or as :func:`difference`.
    """
    if len(stations) < 2 or points < 1:
        raise ValueError(
            f"a path needs two stations and a point, got {len(stations)} and points={points}"
        )
    names, (first, *others) = list(stations), stations.values()
    origin = copied(first)
    directions = [difference(origin, station) for station in others]
    positions = np.arange(points * len(others) + 1) / points
    # Each station has weight one at its own position and none at the others.
    coordinates = np.maximum(0, 1 - abs(positions[:, None] - np.arange(1, len(names))))
    table = _losses_over(origin, directions, coordinates.tolist(), heads, data, batch_size)
    table["position"] = positions[table.pop("point")]
    starts = np.maximum(np.ceil(table.position).astype(int) - 1, 0)
    return table.assign(segment=[f"{names[s]} → {names[s + 1]}" for s in starts])


@dataclass(frozen=True)
class Plane:
    """A plane of weights: origin + x · first + y · second."""

    directions: tuple[Direction, Direction]
    points: Mapping[str, tuple[float, float]]  #: networks that lie on it, by name


def plane_through(origin: nn.Module, others: Mapping[str, nn.Module]) -> Plane:
    """The plane through the weights of the dense network, at (0, 0), and of two others.

    The first direction leads to the first of the others, and the second is perpendicular to it
    (Garipov et al. 2018, "Loss surfaces, mode connectivity, and fast ensembling of DNNs"). Both
    have norm one, so that distances on the plane are distances of weights.

    Raises:
        ValueError: if the three lie on one line, or as :func:`difference`.
    """
    first, second = others
    steps = [difference(origin, other) for other in others.values()]
    zeros = {n: torch.zeros_like(p) for n, p in origin.named_parameters()}
    u, v = ({n: step.get(n, zeros[n]) for n in steps[0] | steps[1]} for step in steps)
    length = float(inner_product(u, u)) ** 0.5 if u else 0.0
    if length == 0:
        raise ValueError(f"{first!r} has the dense weights: no plane")
    u = {n: part / length for n, part in u.items()}
    along = float(inner_product(u, v))
    v = {n: part - along * u[n] for n, part in v.items()}
    height = float(inner_product(v, v)) ** 0.5
    if height <= 1e-6 * max(length, abs(along)):
        raise ValueError(f"the dense network, {first!r} and {second!r} lie on one line: no plane")
    v = {n: part / height for n, part in v.items()}
    points = {"dense": (0.0, 0.0), first: (length, 0.0), second: (along, height)}
    return Plane((u, v), points)


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

    A side of the grid has ``points`` points. It reaches beyond the plane's own by ``margin``, a
    share of their extent. The weights of ``backbone``, the network at (0, 0), return bit for bit.

    Returns:
        One row a point and task, with ``task, loss, accuracy, count`` as in :func:`losses_on_path`,
        and ``x, y``.
    """
    places = np.array(list(plane.points.values()))
    low, high = places.min(0), places.max(0)
    reach = margin * (high - low)
    sides = np.linspace(low - reach, high + reach, points).T
    coordinates = np.array(list(product(*sides)))
    table = _losses_over(backbone, plane.directions, coordinates.tolist(), heads, data, batch_size)
    table[["x", "y"]] = coordinates[table.pop("point")]
    return table


def _losses_over(
    backbone: Backbone,
    directions: Sequence[Direction],
    coordinates: Sequence[Sequence[float]],
    heads: Mapping[str, nn.Linear],
    data: Mapping[str, Samples],
    batch_size: int,
) -> pd.DataFrame:
    """Columns ``point`` (the number of the coordinates), ``task, loss, accuracy, count``."""

    def measure() -> list[tuple[str, float, float, int]]:
        rows = []
        for task, samples in data.items():
            loss, accuracy = math.inf, math.nan
            with suppress(NonFiniteError):
                found = evaluate_heads(backbone, heads, {task: samples}, batch_size=batch_size)
                loss, accuracy = found[task].loss, found[task].accuracy
            rows.append((task, loss, accuracy, count_items(samples)))
        return rows

    found = _at_each(backbone, directions, coordinates, measure)
    rows = [(point, *row) for point, measured in enumerate(found) for row in measured]
    return pd.DataFrame(rows, columns=["point", "task", "loss", "accuracy", "count"])


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
    parameters = dict(unwrapped(model).named_parameters())
    origin = {n: parameters[n].detach().clone() for n in dict.fromkeys(chain(*directions))}
    results = []

    @torch.no_grad()
    def move(row: Sequence[float]) -> None:
        for name, start in origin.items():
            parameters[name].copy_(start)
            for share, direction in zip(row, directions, strict=True):
                if share and name in direction:
                    parameters[name].add_(direction[name], alpha=share)
        forget(model)

    try:
        for row in progress(coordinates, "points of the landscape", len(coordinates)):
            move(row)
            results.append(compute())
    finally:
        move([0.0] * len(directions))
    return results

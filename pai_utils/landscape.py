"""The loss around the pre-trained weights: what the quadratic model predicts, what is measured.

Pruning moves the weights by δ = (m − 1) ⊙ θ₀. To second order ::

    L(θ₀ + αδ) − L(θ₀) ≈ α gᵀδ + ½ α² δᵀHδ,

and replacing H by the Gauss-Newton matrix G, or by parts of G, drops what the scores drop.

The module compares prediction and measurement (:func:`predicted_and_measured`) and the curvature
of tasks (:func:`task_alignment`); it walks along straight lines (:func:`losses_on_path`) and over
planes of weights (:func:`losses_on_plane`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence, Sized
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, combinations, product
from typing import TypeVar, cast

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor, nn

from pai_utils.curvature.products import (
    check_directions,
    directional_terms,
    inner_product,
)
from pai_utils.curvature.quadratic import partial_terms
from pai_utils.curvature.spectra import Eigenpairs
from pai_utils.evaluation import evaluate, evaluate_heads
from pai_utils.masks import Mask
from pai_utils.models.encoders import Backbone, prunable_parameters
from pai_utils.support.common import NonFiniteError, progress
from pai_utils.support.sampling import Draw, Samples

Direction = Mapping[str, Tensor]
"""A step in weight space, as one tensor a parameter name, of the parameter's shape."""
T = TypeVar("T")


def pruning_direction(model: nn.Module, mask: Mask) -> dict[str, Tensor]:
    """δ = (m − 1) ⊙ θ: the step from the dense weights of a model to the pruned ones.

    Raises:
        ValueError: for a mask of another architecture.
    """
    mask.check(model, strict=False)
    parameters = dict(model.named_parameters())
    return {
        name: parameters[name].detach().masked_fill(entry.to(parameters[name].device), 0).neg()
        for name, entry in mask.items()
    }


def predicted_and_measured(
    model: nn.Module,
    directions: Mapping[str, Direction],
    data: Samples,
    draw: Draw,
    *,
    fractions: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
    block_size: int = 64,
    draws: int = 1,
) -> pd.DataFrame:
    """Loss increase along directions: predicted by quadratic models and measured.

    All quantities are over the same samples. Those with the gradient, H and G are exact up to
    rounding. Those with the diagonal, blocks and whole tensors of G are Monte Carlo estimates with
    ``draws`` labels a sample, the same ones for all three
    (:func:`~pai_utils.curvature.quadratic.partial_terms`). They are noisy where the model is sure
    of its labels, and too low for a direction that a score chose by the same labels, as
    ``ggn_diag`` does with the same draw. Costs about five forward and backward passes, two for
    each direction, and one forward for each direction and fraction.

    Args:
        model: the dense model, left as it was.
        directions: δ by name, as from :func:`pruning_direction`.
        data: labelled samples.
        draw: of them, and of the labels.
        fractions: values of α.
        block_size: weights a block.
        draws: labels a sample.

    Returns:
        One row a direction and α, with ``direction, fraction``; ½ α² δᵀAδ for ``diagonal, blocks,
        tensors`` of G, for ``ggn`` and for ``hessian``; ``gradient``, α gᵀδ; ``taylor``, gradient
        and Hessian together; the ``measured`` difference; ``dense_loss`` and ``count``. All but
        the last in nats.
    """
    steps = list(directions.values())
    exact = directional_terms(model, steps, data, draw)
    partial = partial_terms(model, steps, data, draw, block_size=block_size, draws=draws)
    drawn = torch.utils.data.Subset(data, draw.indices(data).tolist())
    rows = []
    for name, terms, parts in zip(directions, exact, partial, strict=True):
        losses = losses_along(model, directions[name], drawn, fractions, batch_size=draw.batch_size)
        for alpha, loss in zip(fractions, losses, strict=True):
            half = alpha**2 / 2
            gradient, hessian = alpha * terms.gradient, half * terms.hessian
            quadratic = {
                "diagonal": half * parts.diagonal,
                "blocks": half * parts.blocks,
                "tensors": half * parts.tensors,
                "ggn": half * terms.ggn,
                "hessian": hessian,
            }
            rows.append(
                {"direction": name, "fraction": alpha, **quadratic, "gradient": gradient}
                | {"taylor": gradient + hessian, "measured": loss - terms.loss}
                | {"dense_loss": terms.loss, "count": terms.count}
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
        direction: δ.
        data: labelled samples; all of them are used.
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
    places = [[alpha] for alpha in fractions]
    return _at_each(
        model, [direction], places, lambda: evaluate(model, data, batch_size=batch_size).loss
    )


def principal_angles(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> Tensor:
    """Principal angles between two subspaces of weights, in radians, the smallest first.

    They come from their cosines, so that half of the digits of an angle near zero are lost. Costs
    kl inner products of all weights in float64. Between tops of Hessians: Gur-Ari et al. (2018),
    "Gradient descent happens in a tiny subspace".

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
    cosines = torch.stack(
        [left[n].flatten(1).double() @ right[n].flatten(1).double().T for n in left]
    ).sum(0)
    angles: Tensor = torch.linalg.svdvals(cosines).clamp(0, 1).acos()
    return angles


def task_alignment(
    diagonals: Mapping[str, Direction],
    eigenpairs: Mapping[str, Eigenpairs],
    weights: Mapping[str, Tensor],
) -> pd.DataFrame:
    """How alike the Gauss-Newton matrices of tasks are, pair by pair.

    Costs a sort of all weights for each task, and for each pair the inner products of
    :func:`principal_angles` and two correlations.

    Args:
        diagonals: of each task's matrix, by parameter.
        eigenpairs: the largest ones of each.
        weights: of the encoder.

    Returns:
        One row an ordered pair of different tasks, with ``source, target, eigenspace_overlap``
        (mean squared cosine of the principal angles), ``chance`` (that of random subspaces, the
        larger number of eigenvectors over that of weights), ``smallest_angle, largest_angle``
        (degrees), ``rank_correlation`` (Spearman, of the diagonals) and ``weighted_correlation``
        (Pearson, of the diagonals, each weight counted by its square: what pruning sees).

    Raises:
        ValueError: if they are of different parameters.
    """
    if any(set(diagonal) != set(weights) for diagonal in diagonals.values()):
        raise ValueError("the diagonals and the weights are of different parameters")

    def flat(tensors: Mapping[str, Tensor]) -> NDArray[np.float64]:
        parts = [tensors[name].detach().flatten().cpu() for name in weights]
        return np.asarray(torch.cat(parts).double())

    importance = np.square(flat(weights))
    values = {task: flat(diagonal) for task, diagonal in diagonals.items()}
    ranks = {task: rankdata(each) for task, each in values.items()}
    rows = []
    for one, other in combinations(diagonals, 2):
        pairs = eigenpairs[one], eigenpairs[other]
        angles = principal_angles(pairs[0].vectors, pairs[1].vectors)
        row = {
            "eigenspace_overlap": float(angles.cos().square().mean()),
            "chance": max(len(pair.values) for pair in pairs) / len(importance),
            "smallest_angle": math.degrees(float(angles.min())),
            "largest_angle": math.degrees(float(angles.max())),
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
        ValueError: if they have other parameters or buffers that differ, which no straight line
            through parameters joins.
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
    """Loss and accuracy along the straight lines from station to station.

    Costs a forward over all data for each point; the stations' weights stay as they are.

    Args:
        stations: encoders by name, in order.
        heads: a frozen head for each task.
        data: labelled images by task.
        points: steps of a line.
        batch_size: images a forward.

    Returns:
        One row a point and task, with ``position`` (0 at the first station, 1 at the second, …),
        ``segment`` ("dense → pruned"), ``task, loss, accuracy, count``. A point between two
        segments comes once, with the first. A loss that is not finite is infinite here, with an
        accuracy that is not a number.

    Raises:
        ValueError: for fewer than two stations, fewer points than one, or as :func:`difference`.
    """
    if len(stations) < 2 or points < 1:
        raise ValueError(
            f"a path needs two stations and a point, got {len(stations)} and points={points}"
        )
    names, (first, *others) = list(stations), stations.values()
    origin = copy.deepcopy(first)
    directions = [difference(origin, station) for station in others]
    positions = np.arange(points * len(others) + 1) / points
    # Each station has weight one at its own position and none at the others.
    coordinates = [
        [max(0.0, 1 - abs(position - place)) for place in range(1, len(names))]
        for position in positions.tolist()
    ]
    table = _losses_over(origin, directions, coordinates, heads, data, batch_size)
    table["position"] = positions[table.pop("point")]
    starts = np.maximum(np.ceil(table.position).astype(int) - 1, 0)
    return table.assign(segment=[f"{names[s]} → {names[s + 1]}" for s in starts])


@dataclass(frozen=True)
class Plane:
    """A plane of weights: origin + x · first + y · second."""

    directions: tuple[Direction, Direction]
    points: Mapping[str, tuple[float, float]]  #: networks that lie on it, by name
    unit: str  #: of x and y


def plane_through(
    origin: nn.Module, others: Mapping[str, nn.Module], *, name: str = "dense"
) -> Plane:
    """The plane through three networks' weights.

    The first direction leads from the origin to the first of the others, and the second is
    perpendicular to it (Gram–Schmidt, as Garipov et al. 2018, "Loss surfaces, mode connectivity,
    and fast ensembling of DNNs"). Both have norm one, so that distances on the plane are distances
    of weights.

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

    Each output channel of a direction has the norm of that channel's weights, so that one unit
    moves every filter as far as it is long, at whatever scale its layer is (Li et al. 2018,
    "Visualizing the loss landscape of neural nets"). Only prunable weights move.

    Args:
        model: the network at (0, 0).
        mask: whose pruned entries stay zero.
        seed: of the directions, the same on every device.

    Raises:
        ValueError: for a mask of another architecture.
    """
    parameters = dict(model.named_parameters())
    if mask is not None:
        mask.check(model, strict=False)
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
        margin: how far the grid reaches beyond the plane's points, as a share of their extent;
            around a single point, in the plane's units.
        batch_size: images a forward.

    Returns:
        One row a point and task, with ``task, loss, accuracy, count`` as in :func:`losses_on_path`,
        and ``x, y``.

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
            rows.append((task, loss, accuracy, len(cast(Sized, samples))))
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
    parameters = dict(model.named_parameters())
    origin = {n: parameters[n].detach().clone() for n in dict.fromkeys(chain(*directions))}
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

"""Diagonal and trace of a matrix that is known by its products, with their standard errors.

With a Rademacher vector v (independent signs, each +1 or −1 with probability ½) ::

    E[v ⊙ Av] = diag A,   Var[(v ⊙ Av)_i] = Σ_{j≠i} A_ij²
    E[vᵀAv]   = tr A,     Var[vᵀAv] = 2 Σ_i Σ_{j≠i} A_ij²      (A symmetric)

so both are exact for a diagonal A. Mean and variance are updated probe by probe (Welford 1962);
no matrix of probes exists. The signs are drawn on the CPU: one seed means the same probes on every
device.

Sources: Hutchinson (1990), "A stochastic estimator of the trace of the influence matrix"; Bekas,
Kokiopoulou & Saad (2007), "An estimator for the diagonal of a matrix".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pai_utils.curvature.products import Operator, Vector, inner_product
from pai_utils.support.common import NonFiniteError, progress


@dataclass(frozen=True)
class DiagonalEstimate:
    """Diagonal of a matrix over named parameters."""

    diagonal: dict[str, Tensor]  #: of each parameter's shape
    standard_error: dict[str, Tensor]  #: of each entry of ``diagonal``
    relative_error: float  #: ‖standard_error‖ / ‖diagonal‖ over all entries
    probes: int
    converged: bool  #: relative_error is at most the tolerance


@dataclass(frozen=True)
class TraceEstimate:
    """Trace of a matrix over named parameters."""

    trace: float
    standard_error: float
    probes: int
    converged: bool  #: standard_error is at most the tolerance times the absolute trace


def hutchinson_diagonal(
    operator: Operator, *, probes: int = 64, tolerance: float = 0.1, seed: int = 0
) -> DiagonalEstimate:
    """Diagonal by Rademacher probes, until it is accurate enough or the probes are used up.

    After n probes with entrywise sample variance s_i² (divisor n − 1), the standard error of the
    entry i is s_i / √n, and the relative standard error is √(Σ_i s_i²/n) / √(Σ_i mean_i²), over
    all entries of all parameters (0 where both are zero). The estimate stops at the first n ≥ 2
    with a relative standard error of at most ``tolerance``.

    Costs one product a probe, and memory for three vectors beside the product's.

    Args:
        operator: the matrix.
        probes: most products to take, at least two.
        tolerance: relative standard error to stop at; 0 takes all probes, unless the error is
            zero.
        seed: seed of the signs.

    Raises:
        ValueError: if ``probes`` is below two, ``tolerance`` is negative or a product not finite.
    """
    _check(probes, tolerance)

    def entries(signs: Vector, product: Vector) -> dict[str, Tensor]:
        return {name: values * signs[name] for name, values in product.items()}

    for n, mean, squares in _moments(operator, entries, probes, seed, "diagonal"):
        # One look a probe, which also decides whether another follows.
        spreads = torch.stack([values.double().sum() for values in squares.values()])
        size, spread = torch.stack([inner_product(mean, mean), spreads.sum()]).tolist()
        relative = math.inf if n == 1 else math.sqrt(spread / (n * (n - 1)) / (size or 1))
        if relative <= tolerance:
            break
    error = {name: (s / (n * (n - 1))).sqrt_() for name, s in squares.items()}
    return DiagonalEstimate(mean, error, relative, n, relative <= tolerance)


def hutchinson_trace(
    operator: Operator, *, probes: int = 64, tolerance: float = 0.01, seed: int = 0
) -> TraceEstimate:
    """Trace by Rademacher probes, until it is accurate enough or the probes are used up.

    Stops at the first n ≥ 8 with a standard error of at most ``tolerance`` times the absolute
    trace. (The standard error of fewer numbers is itself too uncertain to stop by.)

    Args:
        operator: the matrix.
        probes: most products to take, at least two.
        tolerance: standard error to stop at, relative to the estimated trace.
        seed: seed of the signs.

    Raises:
        ValueError: if ``probes`` is below two, ``tolerance`` is negative or a product not finite.

    Examples:
        >>> import torch
        >>> from pai_utils.curvature.hutchinson import hutchinson_trace
        >>> from pai_utils.curvature.products import GGNOperator
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3, 2, bias=False))
        >>> model[1].weight.data = torch.zeros(2, 3)
        >>> images = torch.eye(3).view(3, 3, 1, 1)  # three images of one pixel
        >>> data = torch.utils.data.TensorDataset(images, torch.tensor([0, 1, 0]))
        >>> estimate = hutchinson_trace(GGNOperator(model, ["1.weight"], data), probes=200)
        >>> abs(estimate.trace - 0.5) < 4 * estimate.standard_error
        True
    """
    _check(probes, tolerance)

    def form(signs: Vector, product: Vector) -> dict[str, Tensor]:
        return {"trace": inner_product(signs, product)}

    for n, means, squares in _moments(operator, form, probes, seed, "trace"):
        mean, square = float(means["trace"]), float(squares["trace"])
        error = math.inf if n == 1 else math.sqrt(square / (n * (n - 1)))
        converged = error <= tolerance * abs(mean)
        if n >= 8 and converged:
            break
    return TraceEstimate(mean, error, n, converged)


def rademacher(parameters: Vector, generator: torch.Generator) -> dict[str, Tensor]:
    """Random signs of the parameters' shapes, type and device, drawn on the CPU."""
    return {
        name: torch.empty(values.shape, dtype=torch.int8)
        .random_(0, 2, generator=generator)
        .to(values)
        .mul_(2)
        .sub_(1)
        for name, values in parameters.items()
    }


def _moments(
    operator: Operator,
    measure: Callable[[Vector, Vector], dict[str, Tensor]],
    probes: int,
    seed: int,
    title: str,
) -> Iterator[tuple[int, dict[str, Tensor], dict[str, Tensor]]]:
    """After each probe: their number, the mean of what is measured, and Σ (value − mean)²."""
    generator = torch.Generator().manual_seed(seed)
    mean: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}
    for n in progress(range(1, probes + 1), f"{title}, one product a probe", probes):
        signs = rademacher(operator.parameters, generator)
        for name, value in measure(signs, operator(signs)).items():
            before = value - mean.setdefault(name, torch.zeros_like(value))
            mean[name] += before / n
            squares.setdefault(name, torch.zeros_like(value)).addcmul_(before, value - mean[name])
        if not all(math.isfinite(values.sum()) for values in mean.values()):
            raise NonFiniteError(f"the product with probe {n} is not finite")
        yield n, mean, squares


def _check(probes: int, tolerance: float) -> None:
    if probes < 2:
        raise ValueError(f"probes={probes}: a standard error needs at least two")
    if not tolerance >= 0:
        raise ValueError(f"tolerance={tolerance}: must be zero or above")

"""Diagonal of a matrix that is known by its products, with its standard error.

With a Rademacher vector v (independent signs, each +1 or −1 with probability ½) ::

    E[v ⊙ Av] = diag A,   Var[(v ⊙ Av)_i] = Σ_{j≠i} A_ij²

so that it is exact for a diagonal A. Mean and variance are updated probe by probe (Welford 1962).

Sources: Hutchinson (1990), "A stochastic estimator of the trace of the influence matrix"; Bekas,
Kokiopoulou & Saad (2007), "An estimator for the diagonal of a matrix".
"""

from __future__ import annotations

import math
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


def hutchinson_diagonal(
    operator: Operator, *, probes: int = 64, tolerance: float = 0.1, seed: int = 0
) -> DiagonalEstimate:
    """Diagonal by Rademacher probes, until it is accurate enough or the probes are used up.

    After n probes with entrywise sample variance s_i², the standard error of entry i is s_i / √n.
    The estimate stops at the first n ≥ 2 with a relative standard error √(Σ_i s_i²/n) / √(Σ_i
    mean_i²), over all entries of all parameters, of at most ``tolerance``. Costs one product a
    probe.

    Raises:
        ValueError: if ``probes`` is below two, ``tolerance`` is negative or a product not finite.
    """
    if probes < 2:
        raise ValueError(f"probes={probes}: a standard error needs at least two")
    if not tolerance >= 0:
        raise ValueError(f"tolerance={tolerance}: must be zero or above")
    generator = torch.Generator().manual_seed(seed)
    mean = {name: torch.zeros_like(values) for name, values in operator.parameters.items()}
    squares = {name: torch.zeros_like(values) for name, values in mean.items()}
    for n in progress(range(1, probes + 1), "diagonal, one product a probe", probes):
        signs = rademacher(operator.parameters, generator)
        product = operator(signs)
        for name, average in mean.items():
            value = product[name] * signs[name]
            before = value - average
            average += before / n
            squares[name].addcmul_(before, value - average)
        # One look a probe, which also decides whether another follows.
        spread = torch.stack([values.double().sum() for values in squares.values()]).sum()
        size, spread = torch.stack([inner_product(mean, mean), spread]).tolist()
        if not math.isfinite(size):
            raise NonFiniteError(f"the product with probe {n} is not finite")
        relative = math.inf if n == 1 else math.sqrt(spread / (n * (n - 1)) / (size or 1))
        if relative <= tolerance:
            break
    error = {name: (s / (n * (n - 1))).sqrt_() for name, s in squares.items()}
    return DiagonalEstimate(mean, error, relative, n, relative <= tolerance)


def rademacher(parameters: Vector, generator: torch.Generator) -> dict[str, Tensor]:
    """Random signs of the parameters' shapes, type and device, drawn on the CPU."""
    return {
        name: torch.randint(2, p.shape, generator=generator, dtype=torch.int8).to(p) * 2 - 1
        for name, p in parameters.items()
    }

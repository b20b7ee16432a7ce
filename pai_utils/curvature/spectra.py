"""Extreme eigenpairs and spectral density of a symmetric matrix that is known by its products.

Lanczos: from a start vector q_1, each product Aq_j is made orthogonal to all earlier vectors, so
that A Q_m = Q_m T_m + β_m q_{m+1} e_mᵀ with Q_m [P, m] orthonormal and T_m [m, m] tridiagonal. An
eigenpair (θ, s) of T_m gives the Ritz pair (θ, Q_m s), whose residual is ``β_m |s_m|``.

Density (stochastic Lanczos quadrature): for random signs v of norm √P, the eigenvalues of T_m with
weights s_1² are the nodes of a Gauss quadrature of the spectrum as v weighs it; its mean over v is
the spectrum.

Sources: Lanczos (1950); Golub & Meurant (2010), "Matrices, moments and quadrature"; Lin, Saad &
Yang (2016), "Approximating spectral densities of large matrices"; Ghorbani, Krishnan & Xiao
(2019), "An investigation into neural net optimization via Hessian eigenvalue density".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pai_utils.curvature.products import Operator, flat_product, split_vector
from pai_utils.support.common import NonFiniteError, at_least_single, check_names, progress

_ORDERS: dict[str, Callable[[Tensor], Tensor]] = {
    "largest": lambda values: values,
    "smallest": lambda values: -values,
    "magnitude": lambda values: values.abs(),
}
_MOST_POINTS = 10**6
_FINEST = 1e-10  # width over the eigenvalues that a grid in float64 resolves


@dataclass(frozen=True)
class Eigenpairs:
    """Extreme eigenpairs of a matrix over named parameters."""

    values: Tensor  #: λ [k], float64 on the CPU, the most extreme first
    vectors: dict[str, Tensor]  #: ``[k, *shape]``; over all names of unit norm and orthogonal
    residuals: Tensor  #: ‖Av − λv‖ [k], up to rounding of the products
    products: int
    converged: bool  #: all residuals are within the tolerance


@dataclass(frozen=True)
class SpectralDensity:
    """Density of eigenvalues, smoothed by a Gaussian kernel."""

    grid: Tensor  #: [points], evenly spaced, float64 on the CPU
    density: Tensor  #: [points]; integrates to one over the grid
    nodes: Tensor  #: quadrature nodes [probes, steps]
    weights: Tensor  #: [probes, steps]; each row sums to one
    width: float  #: standard deviation of the kernel, in units of eigenvalues

    def smoothed(self, width: float) -> SpectralDensity:
        """The same quadrature with another kernel, such as a common one for several matrices."""
        return _smoothed(self.nodes, self.weights, width)


def top_eigenpairs(
    operator: Operator,
    count: int = 10,
    *,
    order: str = "largest",
    tolerance: float = 1e-3,
    products: int = 100,
    seed: int = 0,
) -> Eigenpairs:
    """The ``count`` most extreme eigenpairs by Lanczos with full re-orthogonalisation.

    ``order`` is ``"largest"``, ``"smallest"`` or ``"magnitude"``. Stops as soon as every wanted
    residual is at most ``tolerance`` times the largest eigenvalue in magnitude seen so far, or
    after ``products`` products; a basis of as many vectors is kept. The error of an eigenvalue is
    at most its residual, and of the order of its square over the gap where eigenvalues are well
    apart. Of an eigenvalue that comes several times, copies may be missed, as with every Krylov
    method from one vector.

    Raises:
        ValueError: if ``count`` is below one or above ``products`` or the matrix's size, ``order``
            is unknown, ``tolerance`` is negative, or a product is not finite.

    Examples:
        >>> import torch
        >>> from pai_utils.curvature.products import GGNOperator
        >>> from pai_utils.curvature.spectra import top_eigenpairs
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3, 2, bias=False))
        >>> model[1].weight.data = torch.zeros(2, 3)
        >>> images = torch.diag(torch.tensor([1.0, 2.0, 3.0])).view(3, 3, 1, 1)
        >>> data = torch.utils.data.TensorDataset(images, torch.tensor([0, 1, 0]))
        >>> pairs = top_eigenpairs(GGNOperator(model, ["1.weight"], data), count=2)
        >>> [round(value, 4) for value in pairs.values.tolist()]  # n²/6 of the n-th pixel
        [1.5, 0.6667]
    """
    check_names("order", [order], _ORDERS)
    named = operator.parameters
    size = sum(values.numel() for values in named.values())
    if not 1 <= count <= min(size, products):
        raise ValueError(
            f"count={count}: must be at least 1 and at most products={products} and the "
            f"{size} weights"
        )
    if not tolerance >= 0:
        raise ValueError(f"tolerance={tolerance}: must be zero or above")
    # Signs, as for the density, can be orthogonal to an eigenvector of few weights.
    normal = partial(torch.randn, generator=torch.Generator().manual_seed(seed))
    for basis, tridiagonal, beta in _lanczos(operator, normal, min(products, size)):
        if len(basis) < count:
            continue
        theta, s = torch.linalg.eigh(tridiagonal)
        chosen = _ORDERS[order](theta).argsort(descending=True)[:count]
        residuals = beta * s[-1, chosen].abs()
        converged = bool((residuals <= tolerance * theta.abs().max()).all())
        if converged:
            break
    vectors = split_vector(s[:, chosen].T.to(basis) @ basis, named)
    return Eigenpairs(theta[chosen], vectors, residuals, len(basis), converged)


def spectral_density(
    operator: Operator,
    *,
    probes: int = 8,
    steps: int = 40,
    width: float | None = None,
    seed: int = 0,
) -> SpectralDensity:
    """Density of the eigenvalues by stochastic Lanczos quadrature.

    Costs ``probes`` start vectors times ``steps`` products, and memory for ``steps`` vectors. The
    kernel's standard deviation ``width`` is in units of eigenvalues; ``None`` takes one hundredth
    of the range of the nodes, or of the eigenvalue where there is one to the products' rounding.

    Raises:
        ValueError: if ``probes`` or ``steps`` is below one, ``width`` is not above zero or too
            small for the range of the spectrum, or a product is not finite.
    """
    for name, value in {"probes": probes, "steps": steps}.items():
        if value < 1:
            raise ValueError(f"{name}={value}: at least one is needed")
    if width is not None:
        _check_width(width)
    named = operator.parameters
    steps = min(steps, sum(values.numel() for values in named.values()))
    generator = torch.Generator().manual_seed(seed)

    def signs(shape: torch.Size) -> Tensor:
        return 2 * torch.randint(2, shape, generator=generator, dtype=torch.int8) - 1

    nodes, weights = (torch.zeros(probes, steps, dtype=torch.float64) for _ in range(2))
    for probe in range(probes):
        for _, tridiagonal, beta in _lanczos(operator, signs, steps):
            theta, s = torch.linalg.eigh(tridiagonal)
            if beta == 0:
                break  # the start vector lies in an invariant subspace: the quadrature is exact
        nodes[probe, : len(theta)], weights[probe, : len(theta)] = theta, s[0].square()
        nodes[probe, len(theta) :] = theta[-1]
    if width is None:
        rounding = max(torch.finfo(values.dtype).eps for values in named.values())
        spread, scale = float(nodes.max() - nodes.min()), float(nodes.abs().max())
        apart = spread > 100 * max(rounding, _FINEST) * scale
        width = (spread if apart else scale) / 100 or 0.01
    return _smoothed(nodes, weights, width)


def _check_width(width: float) -> None:
    if not 0 < width < math.inf:
        raise ValueError(f"width={width}: the kernel's standard deviation must be above zero")


def _smoothed(nodes: Tensor, weights: Tensor, width: float) -> SpectralDensity:
    _check_width(width)
    low, high = float(nodes.min()), float(nodes.max())
    # A step of a quarter of the width makes the trapezoidal rule exact to rounding, and less than
    # 1e-15 of a Gaussian lies beyond eight widths.
    least = max(4 * (high - low) / (_MOST_POINTS - 65), _FINEST * max(abs(low), abs(high)))
    if width < least:
        raise ValueError(
            f"width={width} is too small for eigenvalues from {low:g} to {high:g}; it must be at "
            f"least {least:g}"
        )
    points = math.ceil((high - low) / width * 4) + 65
    grid = torch.linspace(low - 8 * width, high + 8 * width, points, dtype=torch.float64)
    density = torch.zeros_like(grid)
    for node, weight in zip(nodes.flatten(), weights.flatten() / len(nodes), strict=True):
        density += weight * torch.exp(-((grid - node) / width).square() / 2)
    density /= width * math.sqrt(2 * math.pi)
    return SpectralDensity(grid, density, nodes, weights, width)


def _lanczos(
    operator: Operator, draw: Callable[[torch.Size], Tensor], steps: int
) -> Iterator[tuple[Tensor, Tensor, float]]:
    """After m steps Q_mᵀ ``[m, P]``, T_m ``[m, m]``, and β_m: 0 where they span an invariant space.

    There it goes on from a new random vector.
    """

    def start() -> Tensor:
        named = operator.parameters.values()
        flat = torch.cat([draw(values.shape).to(values).flatten() for values in named])
        flat = flat.to(at_least_single(flat))
        return flat.div_(flat.norm())

    q = start()
    basis = q.new_empty(steps, len(q))
    tridiagonal = torch.zeros(steps + 1, steps + 1, dtype=torch.float64)
    tiny = 100 * torch.finfo(q.dtype).eps
    scale = 0.0
    for m in progress(range(1, steps + 1), "Lanczos steps", steps):
        basis[m - 1] = q
        image = flat_product(operator, q).to(q)
        alpha = float(q @ image)
        if not math.isfinite(alpha):
            raise NonFiniteError(f"the product of Lanczos step {m} is not finite")
        # First against the two vectors that have a part in it, then against all for the rounding.
        image.add_(q, alpha=-alpha)
        if m > 1:
            image.add_(basis[m - 2], alpha=-float(tridiagonal[m - 1, m - 2]))
        beta = _orthogonalise_(image, basis[:m])
        scale = max(scale, abs(alpha), beta)
        if beta <= tiny * scale:
            beta = 0.0
        tridiagonal[m - 1, m - 1] = alpha
        yield basis[:m], tridiagonal[:m, :m], beta
        tridiagonal[m - 1, m] = tridiagonal[m, m - 1] = beta
        if beta == 0 and m < steps:
            image = start()
            beta = _orthogonalise_(image, basis[:m])
        q = image.div_(beta)


def _orthogonalise_(vector: Tensor, basis: Tensor) -> float:
    """Remove the basis's part from ``vector`` in place, and return the norm that is left.

    Classical Gram–Schmidt, repeated while cancellation leaves less than half of the norm (Daniel
    et al. 1976), twice at most: a remainder of the size of rounding has no direction of its own.
    """
    before = float(vector.norm())
    for _ in range(3):
        vector.addmv_(basis.T, basis @ vector, alpha=-1)
        after = float(vector.norm())
        if after > before / 2:
            break
        before = after
    return after

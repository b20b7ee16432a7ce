import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pai_utils.curvature.products import HessianOperator
from pai_utils.curvature.spectra import (
    Eigenpairs,
    spectral_density,
    top_eigenpairs,
)
from pai_utils.support.common import NonFiniteError
from tests.cases import Case, hessian_of
from tests.matrices import MatrixOperator, symmetric


def rows(pairs: Eigenpairs) -> Tensor:
    """Eigenvectors as a matrix ``[k, P]``."""
    return torch.cat([vectors.flatten(1) for vectors in pairs.vectors.values()], 1)


def test_eigenpairs_of_the_hessian_equal_those_of_the_dense_matrix(case: Case) -> None:
    operator = HessianOperator(case.model, case.names, case.data)
    pairs = top_eigenpairs(operator, 3, tolerance=1e-10, products=1000)
    dense = hessian_of(case, case.names)
    exact = torch.linalg.eigvalsh(dense).flip(0)[:3]
    scale = torch.linalg.eigvalsh(dense).abs().max()
    assert pairs.converged
    torch.testing.assert_close(pairs.values, exact, rtol=1e-8, atol=float(1e-12 * scale))
    vectors = rows(pairs)
    true = (vectors @ dense - pairs.values[:, None] * vectors).norm(dim=1)
    assert (true <= 1e-9 * scale).all()


ORDERS: dict[str, Callable[[Tensor], Tensor]] = {
    "largest": torch.clone,
    "smallest": torch.neg,
    "magnitude": torch.abs,
}


@pytest.mark.parametrize("order", ORDERS)
def test_order_chooses_the_end_of_the_spectrum(order: str) -> None:
    matrix = symmetric(60)
    pairs = top_eigenpairs(MatrixOperator(matrix), 5, order=order, tolerance=1e-9)
    values, vectors = torch.linalg.eigh(matrix)
    chosen = ORDERS[order](values).argsort(descending=True)[:5]
    torch.testing.assert_close(pairs.values, values[chosen], rtol=1e-8, atol=0)
    overlap = (rows(pairs) @ vectors[:, chosen]).abs()
    torch.testing.assert_close(overlap, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-7)
    assert {name: v.shape for name, v in pairs.vectors.items()} == {"a": (5, 2, 3), "b": (5, 54)}


def test_stated_residuals_are_the_true_ones() -> None:
    matrix = symmetric(200)
    pairs = top_eigenpairs(MatrixOperator(matrix), 4, tolerance=1e-3)
    vectors = rows(pairs)
    true = (vectors @ matrix - pairs.values[:, None] * vectors).norm(dim=1)
    torch.testing.assert_close(pairs.residuals, true, rtol=1e-6, atol=1e-12)
    assert pairs.converged
    assert (true <= 1e-3 * pairs.values.abs().max() * (1 + 1e-6)).all()


def test_iteration_stops_at_the_tolerance_or_the_last_product() -> None:
    matrix = symmetric(200)
    loose, tight = (MatrixOperator(matrix) for _ in range(2))
    few = top_eigenpairs(loose, 4, tolerance=1e-1)
    many = top_eigenpairs(tight, 4, tolerance=1e-6)
    assert few.products == len(loose.seen) < many.products == len(tight.seen) < 100
    stopped = top_eigenpairs(MatrixOperator(matrix), 4, tolerance=1e-6, products=10)
    assert (stopped.products, stopped.converged) == (10, False)
    assert (stopped.residuals > 1e-6 * stopped.values.abs().max()).any()


def test_basis_stays_orthogonal_where_plain_lanczos_loses_it() -> None:
    # Converged pairs come back as copies unless the basis is re-orthogonalised.
    values = torch.cat([torch.logspace(3, 0, 10), torch.linspace(-1e-3, 1e-3, 190)]).double()
    operator = MatrixOperator(symmetric(200, values))
    pairs = top_eigenpairs(operator, 10, tolerance=1e-12)
    exact = values.sort(descending=True).values[:10]
    torch.testing.assert_close(pairs.values, exact, rtol=1e-8, atol=0)
    operator.seen.clear()
    spectral_density(operator, probes=1, steps=120, width=1.0)
    directions = torch.stack(operator.seen)
    product = directions @ directions.T
    assert (product - torch.eye(120, dtype=torch.float64)).abs().max() <= 1e-13


def test_invariant_subspaces_and_repeated_eigenvalues_are_no_trouble() -> None:
    for matrix in (
        torch.eye(12, dtype=torch.float64),
        torch.zeros(12, 12, dtype=torch.float64),
        symmetric(12, torch.tensor([3.0] + [0.0] * 11, dtype=torch.float64)),
    ):
        pairs = top_eigenpairs(MatrixOperator(matrix), 12, tolerance=1e-10)
        exact = torch.linalg.eigvalsh(matrix).flip(0)
        torch.testing.assert_close(pairs.values, exact, rtol=1e-12, atol=1e-12)
        vectors = rows(pairs)
        identity = torch.eye(12, dtype=torch.float64)
        torch.testing.assert_close(vectors @ vectors.T, identity, rtol=0, atol=1e-12)


def test_an_eigenvector_of_two_weights_is_found_from_every_start() -> None:
    matrix = torch.zeros(12, 12, dtype=torch.float64)
    matrix[:2, :2] = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])  # equal signs are orthogonal to it
    found = [top_eigenpairs(MatrixOperator(matrix), 1, seed=seed).values for seed in range(8)]
    torch.testing.assert_close(torch.cat(found), torch.full((8,), 2.0, dtype=torch.float64))


def gaussian_mixture(grid: Tensor, values: Tensor, width: float) -> Tensor:
    exponents = ((grid[:, None] - values) / width).square() / 2
    return exponents.neg().exp().mean(1) / (width * math.sqrt(2 * math.pi))


def test_density_is_exact_for_each_probe_when_eigenvectors_are_axes() -> None:
    # A vector of signs then has the same weight on every eigenvector.
    values = torch.linspace(-1, 3, 40, dtype=torch.float64)
    found = spectral_density(MatrixOperator(values.diag()), probes=1, steps=40, width=0.1)
    expected = gaussian_mixture(found.grid, values, 0.1)
    assert (found.density - expected).abs().max() <= 1e-9


@pytest.mark.parametrize("width", [None, 0.01, 1.0, 100.0])
def test_density_integrates_to_one(width: float | None) -> None:
    found = spectral_density(MatrixOperator(symmetric(50)), probes=3, steps=20, width=width)
    assert abs(float(torch.trapezoid(found.density, found.grid)) - 1) <= 1e-6
    torch.testing.assert_close(found.weights.sum(1), torch.ones(3, dtype=torch.float64))
    assert found.grid.shape == found.density.shape
    assert found.nodes.shape == (3, 20)


def test_density_of_one_repeated_eigenvalue_is_one_peak() -> None:
    for value in (0.0, -2.0, 3.0):
        matrix = value * torch.eye(12, dtype=torch.float64)
        found = spectral_density(MatrixOperator(matrix), probes=2, steps=5)
        assert found.grid[found.density.argmax()] == pytest.approx(value, abs=1e-12)
        assert abs(float(torch.trapezoid(found.density, found.grid)) - 1) <= 1e-6


def test_bad_settings_and_products_are_refused() -> None:
    operator = MatrixOperator(symmetric(12))
    with pytest.raises(ValueError, match="unknown order 'large'; did you mean 'largest'"):
        top_eigenpairs(operator, 2, order="large")
    for count, products in ((0, 100), (13, 100), (6, 5)):
        with pytest.raises(ValueError, match=f"count={count}"):
            top_eigenpairs(operator, count, products=products)
    with pytest.raises(ValueError, match="tolerance=-1"):
        top_eigenpairs(operator, 2, tolerance=-1)
    with pytest.raises(ValueError, match="probes=0"):
        spectral_density(operator, probes=0)
    with pytest.raises(ValueError, match="steps=0"):
        spectral_density(operator, steps=0)
    with pytest.raises(ValueError, match="width=0"):
        spectral_density(operator, width=0)
    with pytest.raises(ValueError, match="width=-1"):
        spectral_density(operator).smoothed(-1)
    with pytest.raises(ValueError, match="width=1e-09 is too small"):
        spectral_density(operator, width=1e-9)
    with pytest.raises(ValueError, match=r"width=1e-11 is too small.*at least 2e-10"):
        spectral_density(MatrixOperator(2 * torch.eye(12, dtype=torch.float64)), width=1e-11)
    broken = MatrixOperator(torch.full((12, 12), torch.nan))
    with pytest.raises(NonFiniteError, match="Lanczos step 1 is not finite"):
        top_eigenpairs(broken, 2)

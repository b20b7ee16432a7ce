import pytest
import torch

from pai_utils.curvature.hutchinson import hutchinson_diagonal
from pai_utils.curvature.products import HessianOperator
from pai_utils.support.common import NonFiniteError
from tests.cases import build, dense_hessian, flattened
from tests.matrices import MatrixOperator, symmetric


@pytest.mark.parametrize("scale", [0, 1])
def test_diagonal_is_exact_for_a_diagonal_matrix(scale: int) -> None:
    diagonal = scale * torch.linspace(-2, 3, 12, dtype=torch.float64)
    estimate = hutchinson_diagonal(MatrixOperator(diagonal.diag()), tolerance=0)
    assert torch.equal(flattened(estimate.diagonal), diagonal)
    assert not flattened(estimate.standard_error).any()
    assert (estimate.probes, estimate.relative_error, estimate.converged) == (2, 0, True)


@pytest.mark.parametrize("name", ["conv", "eval BatchNorm", "LayerNorm", "unused weight"])
def test_diagonal_of_the_hessian_lies_within_four_standard_errors(name: str) -> None:
    case = build(name)
    operator = HessianOperator(case.model, case.names, case.data)
    estimate = hutchinson_diagonal(operator, probes=200, tolerance=0)
    exact = dense_hessian(case.model, case.names, case.data).diagonal()
    distance = (flattened(estimate.diagonal) - exact).abs()
    # Rounding, for entries that every probe gives exactly.
    assert (distance <= 4 * flattened(estimate.standard_error) + 1e-12).all()
    assert {n: v.shape for n, v in estimate.diagonal.items()} == {
        n: v.shape for n, v in operator.parameters.items()
    }


def test_standard_error_is_the_spread_over_seeds() -> None:
    matrix = symmetric(12)
    runs = [
        hutchinson_diagonal(MatrixOperator(matrix), probes=16, tolerance=0, seed=seed)
        for seed in range(400)
    ]
    estimates = torch.stack([flattened(run.diagonal) for run in runs])
    variances = torch.stack([flattened(run.standard_error).square() for run in runs]).mean(0)
    # The variance of one probe is the sum of the squares off the diagonal.
    expected = (matrix.square().sum(1) - matrix.diagonal().square()) / 16
    assert ((variances / expected - 1).abs() <= 0.15).all()
    assert ((estimates.var(0) / expected - 1).abs() <= 0.3).all()
    assert ((estimates.mean(0) - matrix.diagonal()).abs() <= 4 * (expected / 400).sqrt()).all()


def test_probes_stop_at_the_tolerance() -> None:
    matrix = symmetric(12) + 5 * torch.eye(12, dtype=torch.float64)
    errors = [
        hutchinson_diagonal(MatrixOperator(matrix), probes=n, tolerance=0).relative_error
        for n in range(2, 40)
    ]
    first = next(n for n, error in enumerate(errors, 2) if error <= 0.1)
    assert 2 < first < 39
    operator = MatrixOperator(matrix)
    estimate = hutchinson_diagonal(operator, probes=100, tolerance=0.1)
    assert estimate.probes == len(operator.seen) == first
    assert estimate.converged
    few = hutchinson_diagonal(MatrixOperator(matrix), probes=2, tolerance=1e-9)
    assert (few.probes, few.converged) == (2, False)


def test_bad_settings_and_products_are_refused() -> None:
    operator = MatrixOperator(symmetric(12))
    with pytest.raises(ValueError, match="probes=1: a standard error needs at least two"):
        hutchinson_diagonal(operator, probes=1)
    for tolerance in (-0.1, float("nan")):
        with pytest.raises(ValueError, match=f"tolerance={tolerance}"):
            hutchinson_diagonal(operator, tolerance=tolerance)
    with pytest.raises(NonFiniteError, match="probe 1 is not finite"):
        hutchinson_diagonal(MatrixOperator(torch.full((12, 12), torch.nan)))

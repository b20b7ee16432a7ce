import logging

import pytest
import torch

import pai_utils as pai
from pai_utils.curvature.hutchinson import hutchinson_diagonal
from pai_utils.curvature.products import HessianOperator
from pai_utils.support.sampling import Draw
from tests.cases import Case, build, dense_hessian, flattened


def dense_scores(case: Case, names: list[str]) -> torch.Tensor:
    parameters = dict(case.model.named_parameters())
    weights = torch.cat([parameters[name].detach().flatten() for name in names])
    return weights.square() / 2 * dense_hessian(case.model, names, case.data).diagonal()


def test_score_is_half_the_squared_weight_times_the_hessians_diagonal() -> None:
    case = build("LayerNorm")
    scores = pai.score("hessian_diag", case.model, case.data, samples=None, probes=300, tolerance=0)
    exact = dense_scores(case, list(scores))
    error = flattened(scores.standard_error)
    assert (error > 0).any()
    assert ((flattened(dict(scores)) - exact).abs() <= 4 * error + 1e-12).all()


def test_standard_error_is_half_the_squared_weight_times_the_diagonals() -> None:
    case = build("conv")
    scores = pai.score("hessian_diag", case.model, case.data, samples=8, probes=5, seed=3)
    names = list(scores)
    operator = HessianOperator(case.model, names, case.data, Draw(8, seed=3))
    estimate = hutchinson_diagonal(operator, probes=5, seed=3)
    for name in names:
        half = case.model.get_parameter(name).detach().square() / 2
        assert torch.equal(scores[name], half * estimate.diagonal[name])
        assert torch.equal(scores.standard_error[name], half * estimate.standard_error[name])


def test_scores_have_the_hessians_sign() -> None:
    case = build("LayerNorm")
    scores = pai.score("hessian_diag", case.model, case.data, samples=None, probes=300, tolerance=0)
    exact = dense_scores(case, list(scores))
    sure = exact.abs() > 4 * flattened(scores.standard_error)
    assert (exact[sure] < 0).any()
    assert torch.equal(flattened(dict(scores))[sure].sign(), exact[sure].sign())


def test_scorers_without_an_estimate_state_no_error() -> None:
    case = build("conv")
    assert pai.score("ggn_diag", case.model, case.data, samples=8).standard_error == {}


def test_accuracy_reached_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    case = build("conv")
    with caplog.at_level(logging.INFO, logger="pai_utils"):
        pai.score("hessian_diag", case.model, case.data, samples=8, probes=2, tolerance=1e-9)
        pai.score("hessian_diag", case.model, case.data, samples=8, probes=50, tolerance=10)
    short, enough = caplog.messages
    assert "after 2 probes, above the tolerance 1e-09" in short
    assert enough.endswith("after 2 probes")

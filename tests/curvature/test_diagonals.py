from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pai_utils.curvature.diagonals import (
    fisher_diagonal,
    ggn_diagonal,
    is_piecewise_linear,
    output_diagonal,
)
from pai_utils.curvature.products import split_vector
from pai_utils.support.sampling import Draw
from tests.cases import (
    Case,
    Head,
    Images,
    Layers,
    build,
    dense_fisher_diagonal,
    dense_ggn_diagonal,
    dense_hessian,
    dense_output_diagonal,
    fingerprint,
    flattened,
    largest_error,
    logits_of,
    relative_error,
)

DIAGONALS: dict[str, Callable[..., dict[str, Tensor]]] = {
    "fisher": fisher_diagonal,
    "mc": ggn_diagonal,
    "exact": partial(ggn_diagonal, estimator="exact"),
    "outputs": output_diagonal,
    "outputs, exact": partial(output_diagonal, estimator="exact"),
}


EXACT = {
    "fisher": dense_fisher_diagonal,
    "exact": dense_ggn_diagonal,
    "outputs, exact": dense_output_diagonal,
}


@pytest.mark.parametrize("kind", EXACT)
def test_exact_diagonals_equal_the_dense_ones(case: Case, kind: str) -> None:
    expected = EXACT[kind](case)
    before = fingerprint(case.model)
    for batch_size in (4, 64):
        found = DIAGONALS[kind](case.model, case.names, case.data, Draw(None, batch_size))
        assert fingerprint(case.model) == before
        assert largest_error(found, expected) <= 1e-10


def repeated(
    diagonal: Callable[..., dict[str, Tensor]], case: Case, count: int, **options: Any
) -> Tensor:
    """Estimates with as many seeds, ``[count, P]``."""
    batch_size = 4 if options.get("estimator") == "batch" else 64
    draws = (Draw(None, batch_size, seed) for seed in range(count))
    found = (diagonal(case.model, case.names, case.data, draw, **options) for draw in draws)
    return torch.stack([flattened(each) for each in found])


def test_output_diagonal_is_the_hessian_of_the_squared_change() -> None:
    case = build("linear over vectors")
    before = logits_of(case.model, case.data.images)
    weights = {name: case.model.get_parameter(name).detach() for name in case.names}

    def change(flat: Tensor) -> Tensor:
        replaced = split_vector(flat, weights)
        after = torch.func.functional_call(case.model.eval(), replaced, (case.data.images,))
        loss: Tensor = 0.5 * (after - before).square().sum(1).mean()
        return loss

    dense = torch.autograd.functional.hessian(change, flattened(weights))
    found = output_diagonal(case.model, case.names, case.data, estimator="exact")
    assert relative_error(flattened(found), dense.diagonal()) <= 1e-10


@pytest.mark.parametrize("diagonal", [ggn_diagonal, output_diagonal])
@pytest.mark.parametrize("name", ["conv", "linear over vectors", "nn.MultiheadAttention"])
def test_monte_carlo_is_unbiased(name: str, diagonal: Callable[..., dict[str, Tensor]]) -> None:
    case = build(name)
    exact = flattened(diagonal(case.model, case.names, case.data, estimator="exact"))
    repeats = repeated(diagonal, case, 100)
    # The sum over all weights, and every weight on its own (hundreds of them: the largest
    # deviation of so many is near 3 standard errors, and of a few correlated ones above 4).
    total, expected = repeats.sum(1), exact.sum()
    assert abs(total.mean() - expected) <= 4 * total.std() / len(total) ** 0.5
    # Random signs leave no error where one output alone depends on a weight: v² is 1.
    error, spread = (repeats.mean(0) - exact).abs(), repeats.std(0)
    certain = spread <= 1e-12 * exact.max()
    assert float(error[certain].sum()) <= 1e-12 * float(exact.sum())
    deviation = error[~certain] / (spread[~certain] / len(repeats) ** 0.5)
    assert len(deviation) >= len(exact) / 2
    assert (deviation <= 4).double().mean() >= 0.99
    assert float((deviation**2).mean()) < 2


@pytest.mark.parametrize("name", ["conv", "linear over vectors", "nn.MultiheadAttention"])
def test_the_square_of_a_batch_gradient_is_unbiased(name: str) -> None:
    case = build(name)
    exact = flattened(ggn_diagonal(case.model, case.names, case.data, estimator="exact"))
    repeats = repeated(ggn_diagonal, case, 200, estimator="batch")
    # One vector is squared a batch, so that the entries' errors go together: the sum of all, and
    # of each fifth of them.
    for entries in [slice(None), *(slice(k, None, 5) for k in range(5))]:
        total, expected = repeats[:, entries].sum(1), exact[entries].sum()
        assert abs(total.mean() - expected) <= 4 * total.std() / len(total) ** 0.5


@pytest.mark.parametrize("diagonal", [ggn_diagonal, output_diagonal])
def test_more_draws_a_sample_lower_the_variance_as_they_should(
    diagonal: Callable[..., dict[str, Tensor]],
) -> None:
    case = build("linear over vectors")

    def variance(draws: int) -> float:
        return float(repeated(diagonal, case, 60, draws=draws).var(0).sum())

    assert 0.5 <= 8 * variance(8) / variance(1) <= 2


@pytest.mark.parametrize("name", ["ReLU, max-pool and BatchNorm", "GELU"])
def test_hessian_and_ggn_share_their_diagonal_on_piecewise_linear_networks(name: str) -> None:
    torch.manual_seed(0)
    piecewise = build("eval BatchNorm").model
    assert isinstance(piecewise, nn.Sequential)
    piecewise[1] = nn.ReLU()
    model = nn.Sequential(*piecewise[:4], nn.MaxPool2d(2), *piecewise[4:])
    if name == "GELU":
        model[1] = nn.GELU()
    case = Case(model, [n for n, p in model.named_parameters() if p.dim() > 1], Images())
    hessian = dense_hessian(model, case.names, case.data).diagonal()
    ggn = flattened(ggn_diagonal(model, case.names, case.data, estimator="exact"))
    error = relative_error(ggn, hessian)
    assert error > 1e-3 if name == "GELU" else error <= 1e-10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draw": Draw(11)}, "samples=11 but the dataset holds 10"),
        (
            {"estimator": "montecarlo"},
            "unknown estimator 'montecarlo'.* Choose from: mc, exact, batch",
        ),
        ({"draws": 0}, "draws=0"),
    ],
)
def test_impossible_settings_are_refused(options: dict[str, int], message: str) -> None:
    case = build("linear over vectors")
    with pytest.raises(ValueError, match=r"estimator 'batch'.*mc, exact"):
        output_diagonal(case.model, case.names, case.data, estimator="batch")
    with pytest.raises(ValueError, match=message):
        ggn_diagonal(case.model, case.names, case.data, **options)  # type: ignore[arg-type]


def test_the_gradient_of_a_batch_of_one_is_the_samples_own(case: Case) -> None:
    each = ggn_diagonal(case.model, case.names, case.data, Draw(None, seed=3))
    singly = ggn_diagonal(case.model, case.names, case.data, Draw(None, 1, 3), estimator="batch")
    before = fingerprint(case.model)
    assert largest_error(singly, each) <= 1e-10
    assert fingerprint(case.model) == before


@pytest.mark.parametrize(
    ("name", "names", "expected"),
    [
        ("eval BatchNorm", ["4.weight"], True),  # what follows the weight decides
        ("eval BatchNorm", ["0.weight", "4.weight"], False),  # GELU
        ("max-pool", ["3.weight"], True),
        ("in-place activation", ["0.weight"], False),
        ("LayerNorm", ["0.patches.weight"], False),
        ("fused attention", ["1.qkv.weight"], False),
        ("fused attention", ["1.proj.weight"], True),
        ("shared weight", ["1.linear.weight"], False),
        ("unused weight", ["1.unused.weight"], True),
    ],
)
def test_piecewise_linear_in_each_weight_is_told_from_bent(
    name: str, names: list[str], expected: bool
) -> None:
    case = build(name)
    before = fingerprint(case.model)
    assert is_piecewise_linear(case.model, names, case.data.images[:2]) is expected
    assert fingerprint(case.model) == before


def test_a_gate_that_the_weight_itself_drives_is_bent() -> None:
    # Squeeze and excitation: with ReLU a product of two piecewise linear functions of the weight.
    def gate(layers: Any, x: Tensor) -> Tensor:
        y: Tensor = layers.conv(x)
        return y * y.mean((2, 3), keepdim=True).clamp(0, 6)

    gated = Layers(gate, conv=nn.Conv2d(3, 4, 3))
    model = nn.Sequential(gated, Head(4)).double()
    assert not is_piecewise_linear(model, ["0.conv.weight"], Images().images[:2])

import copy

import pytest
import torch
from torch import nn

import pai_utils as pai
from pai_utils.curvature.diagonals import ggn_diagonal
from pai_utils.curvature.products import directional_terms
from pai_utils.landscape import losses_along, predicted_and_measured, pruning_direction
from tests.cases import Case, Images, build, fingerprint, tiny_classifier, tiny_task


def small_direction(case: Case) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    parameters = dict(case.model.named_parameters())
    return {
        name: torch.randn(parameters[name].shape, generator=generator, dtype=torch.float64)
        for name in case.names
    }


def test_the_pruning_direction_leads_from_the_dense_to_the_pruned_weights() -> None:
    model = tiny_classifier()
    pruned = pai.prune(model, None, "magnitude", 0.5)
    for name, step in pruning_direction(model, pruned.mask).items():
        weight = model.get_parameter(name).detach()
        assert torch.equal(weight + step, pruned.model.get_parameter(name))
        assert torch.equal(step[pruned.mask[name]], torch.zeros(int(pruned.mask[name].sum())))
    with pytest.raises(ValueError, match="another architecture"):
        pruning_direction(model, pai.Mask({"other": torch.ones(2)}))


def test_losses_along_are_those_of_the_moved_model(case: Case) -> None:
    direction = small_direction(case)
    before = fingerprint(case.model)
    losses = losses_along(case.model, direction, case.data, [0.0, 0.5, 1.0], batch_size=4)
    assert fingerprint(case.model) == before
    moved = copy.deepcopy(case.model)
    with torch.no_grad():
        for name, step in direction.items():
            moved.get_parameter(name).add_(step)
    assert losses[0] == pai.evaluate(case.model, case.data, batch_size=4).loss
    assert losses[2] == pytest.approx(pai.evaluate(moved, case.data).loss, rel=1e-12)


def test_an_error_on_the_way_restores_the_weights_bit_for_bit() -> None:
    case = build("conv")
    before = fingerprint(case.model)
    direction = {"0.weight": torch.full((4, 3, 3, 3), 1e308, dtype=torch.float64)}
    with pytest.raises(ValueError, match="loss on 10 samples is"):
        losses_along(case.model, direction, case.data, [0.0, 10.0])
    assert fingerprint(case.model) == before
    with pytest.raises(ValueError, match=r"'0\.wieght' \(1,\) is no parameter"):
        losses_along(case.model, {"0.wieght": torch.ones(1)}, case.data, [1.0])


@pytest.mark.parametrize("name", ["conv", "fused attention", "linear over tokens"])
def test_the_quadratic_prediction_is_wrong_by_third_order_only(name: str) -> None:
    case = build(name)
    table = predicted_and_measured(
        case.model, small_direction(case), case.data, fractions=[1e-4, 2e-4], samples=None
    )
    second = (table.measured - table.hessian).abs()
    first = (table.measured - table.gradient).abs()
    assert second[1] / second[0] == pytest.approx(8, rel=0.2)
    assert first[1] / first[0] == pytest.approx(4, rel=0.2)
    assert second[0] < 1e-2 * first[0]


def test_columns_are_the_terms_of_their_definitions() -> None:
    case = build("linear over vectors")
    direction = small_direction(case)
    before = fingerprint(case.model)
    table = predicted_and_measured(
        case.model, direction, case.data, fractions=[0.25, 1.0], samples=6, batch_size=4, seed=2
    )
    assert fingerprint(case.model) == before
    assert list(table.columns) == [
        "fraction", "gradient", "hessian", "ggn", "diagonal", "measured", "dense_loss", "count"
    ]  # fmt: skip
    rows = torch.randperm(10, generator=torch.Generator().manual_seed(2))[:6]
    drawn = Images(6)
    drawn.images, drawn.labels = case.data.batch(rows)
    terms = directional_terms(case.model, direction, drawn)
    diagonal = ggn_diagonal(case.model, case.names, drawn, seed=2)
    own = sum(float((diagonal[n] * d**2).sum()) for n, d in direction.items())
    for row in table.to_dict("records"):
        a = row["fraction"]
        assert row["gradient"] == pytest.approx(a * terms.gradient)
        assert row["hessian"] == pytest.approx(a * terms.gradient + a**2 * terms.hessian / 2)
        assert row["ggn"] == pytest.approx(a**2 * terms.ggn / 2)
        assert row["diagonal"] == pytest.approx(a**2 * own / 2)
        assert row["dense_loss"] == pytest.approx(terms.loss)
        assert row["count"] == 6
        (loss,) = losses_along(case.model, direction, drawn, [a])
        assert row["measured"] == pytest.approx(loss - terms.loss)


def test_at_a_minimum_of_a_linear_model_hessian_ggn_and_loss_agree() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3, bias=False)).double()
    data = Images(40, classes=3, side=2)
    optimiser = torch.optim.LBFGS(
        model.parameters(), max_iter=500, tolerance_grad=1e-13, tolerance_change=0,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(model(data.images), data.labels)
        loss.backward()
        return loss

    for _ in range(3):  # a line search may end early; a restart goes on
        optimiser.step(closure)
    model.zero_grad()
    step = {"1.weight": 1e-3 * torch.randn(3, 12, dtype=torch.float64)}
    row = predicted_and_measured(model, step, data, fractions=[1.0], samples=None).iloc[0]
    assert abs(row.gradient) < 1e-6 * row.ggn
    assert row.hessian == pytest.approx(row.ggn, rel=1e-4)
    assert row.measured == pytest.approx(row.ggn, rel=1e-2)


def test_a_classifier_in_float32_measures_what_evaluation_says() -> None:
    model, data = tiny_classifier(), tiny_task().train
    pruned = pai.prune(model, None, "magnitude", 0.7)
    table = predicted_and_measured(
        model, pruning_direction(model, pruned.mask), data, fractions=[1.0], samples=None
    )
    expected = pai.evaluate(pruned.model, data).loss - pai.evaluate(model, data).loss
    assert table.measured[0] == pytest.approx(expected, abs=1e-6)

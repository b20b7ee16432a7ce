import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pai_utils as pai
from pai_utils.curvature.diagonals import fisher_diagonal, ggn_diagonal, output_diagonal
from pai_utils.curvature.products import directional_terms
from tests.cases import (
    CASES,
    Case,
    Images,
    build,
    fingerprint,
    logits_of,
    relative_error,
    tiny_classifier,
    tiny_task,
)

PRUNED = ["backbone.encoder.0.weight", "backbone.encoder.3.weight"]


@pytest.mark.parametrize("name", pai.SCORERS)
def test_every_scorer_scores_the_encoders_weights_and_says_what_it_leaves_out(name: str) -> None:
    model = tiny_classifier()
    scores = pai.score(name, model, tiny_task().train, samples=8)
    parameters = dict(model.named_parameters())
    assert list(scores) == PRUNED
    assert all(scores[n].shape == parameters[n].shape for n in PRUNED)
    assert scores.scorer == name
    assert scores.left_out == [
        "backbone.encoder.1.weight",
        "backbone.encoder.1.bias",
        "backbone.encoder.3.bias",
        "head.weight",
        "head.bias",
    ]


@pytest.mark.parametrize("name", pai.SCORERS)
def test_the_parameters_that_are_named_are_scored_and_all_others_left_out(name: str) -> None:
    model, data = tiny_classifier(), tiny_task().train
    names = ["head.weight", PRUNED[1], "backbone.encoder.3.bias"]
    scores = pai.score(name, model, data, names=[*names, PRUNED[1]], samples=8)
    assert list(scores) == names
    parameters = dict(model.named_parameters())
    assert all(scores[n].shape == parameters[n].shape for n in names)
    assert scores.left_out == [n for n in parameters if n not in names]
    whole = pai.score(name, model, data, samples=8)
    (alone,) = pai.score(name, model, data, names=[PRUNED[1]], samples=8).values()
    if name in ("random", "grasp", "ntk_sap", "hessian_diag"):
        assert not torch.equal(alone, whole[PRUNED[1]])
    else:
        torch.testing.assert_close(alone, whole[PRUNED[1]])


def test_names_that_are_not_there_are_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown parameter 'head\.wait'; did you mean 'head"):
        pai.score("magnitude", tiny_classifier(), names=["head.bias", "head.wait"])
    with pytest.raises(ValueError, match="names is empty"):
        pai.score("magnitude", tiny_classifier(), names=[])


@pytest.mark.parametrize(
    "name", ["random", "magnitude", "fisher_diag", "ggn_diag", "feature_ggn_diag"]
)
def test_scores_of_a_positive_semi_definite_curvature_are_not_negative(name: str) -> None:
    scores = pai.score(name, tiny_classifier(), tiny_task().train, samples=8)
    assert all(bool((scores[n] >= 0).all()) for n in PRUNED)


@pytest.mark.parametrize("name", pai.SCORERS)
@pytest.mark.parametrize("training", [False, True])
def test_every_scorer_leaves_the_model_as_it_was(name: str, training: bool) -> None:
    model = tiny_classifier().train(training)
    weight = model.get_parameter(PRUNED[0])
    weight.grad = torch.ones_like(weight)
    model.backbone.encoder[1].train(not training)  # type: ignore[index]
    before = fingerprint(model)
    state = torch.get_rng_state()
    scores = pai.score(name, model, tiny_task().train, samples=8, batch_size=3)
    assert fingerprint(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    again = pai.score(name, model.eval(), tiny_task().train, samples=8, batch_size=3)
    assert all(torch.equal(scores[n], again[n]) for n in PRUNED)


@pytest.mark.parametrize("name", pai.SCORERS)
def test_no_score_depends_on_the_batches(name: str) -> None:
    model, data = tiny_classifier(), tiny_task().train
    whole, parts = (pai.score(name, model, data, samples=10, batch_size=b) for b in (64, 3))
    assert all(relative_error(parts[n], whole[n]) <= 1e-6 for n in PRUNED)


@pytest.mark.parametrize("name", CASES)
def test_every_scorer_scores_every_way_of_using_a_weight(name: str) -> None:
    case = build(name)
    for scorer in pai.SCORERS:
        if name == "weight in a custom function" and scorer in ("synflow", "px"):
            continue  # refused
        scores = pai.score(scorer, case.model, case.data, samples=None)
        assert list(scores) == pai.prunable_parameters(case.model)
        assert set(scores) | set(scores.left_out) == {n for n, _ in case.model.named_parameters()}


def test_saliency_is_half_the_squared_weight_times_the_diagonal() -> None:
    case = build("fused attention")
    parameters = dict(case.model.named_parameters())
    diagonals = {
        "fisher_diag": fisher_diagonal(case.model, case.names, case.data),
        "ggn_diag": ggn_diagonal(case.model, case.names, case.data),
        "feature_ggn_diag": output_diagonal(case.model, case.names, case.data),
    }
    for scorer, diagonal in diagonals.items():
        scores = pai.score(scorer, case.model, case.data, samples=None)
        for name in case.names:
            expected = parameters[name].detach().square() / 2 * diagonal[name]
            assert relative_error(scores[name], expected) <= 1e-14


def test_the_score_of_features_knows_no_head_and_no_label() -> None:
    model, task = tiny_classifier(), tiny_task()
    scores = pai.score("feature_ggn_diag", model, task.train, samples=8)
    encoder = pai.score("feature_ggn_diag", model.backbone, task.train, samples=8)
    assert list(scores) == [f"backbone.{name}" for name in encoder]
    assert all(torch.equal(scores[f"backbone.{n}"], values) for n, values in encoder.items())
    named = pai.score("feature_ggn_diag", model, task.train, names=["head.weight"], samples=8)
    assert not named["head.weight"].any()


def test_saliency_is_the_increase_of_the_quadratic_loss_when_one_weight_goes() -> None:
    # The quadratic loss ½ δᵀGδ is computed from the tangent alone: J_n δ by finite differences of
    # nothing, since the layer looked at is linear in its weights.
    case = build("linear over vectors")
    name = "5.out.weight"
    scores = pai.score("ggn_diag", case.model, case.data, samples=None, estimator="exact")
    weight = case.model.get_parameter(name)
    dense = logits_of(case.model, case.data.images)
    p = dense.softmax(1)
    for row in range(weight.shape[0]):
        for column in range(weight.shape[1]):
            kept = weight[row, column].item()
            with torch.no_grad():
                weight[row, column] = 0
                tangent = logits_of(case.model, case.data.images) - dense
                weight[row, column] = kept
            increase = ((p * tangent**2).sum(1) - (p * tangent).sum(1) ** 2).mean() / 2
            assert relative_error(scores[name][row, column], increase) <= 1e-10


def test_saliency_of_inner_weights_is_the_increase_of_the_quadratic_loss() -> None:
    case = build("conv")
    scores = pai.score("ggn_diag", case.model, case.data, samples=None, estimator="exact")
    for name in case.names:
        weight = case.model.get_parameter(name)
        for index in (0, weight.numel() // 2, weight.numel() - 1):
            step = torch.zeros_like(weight).flatten()
            step[index] = -weight.detach().flatten()[index]
            direction = {name: step.view_as(weight)}
            (terms,) = directional_terms(case.model, [direction], case.data)
            assert float(scores[name].flatten()[index]) == pytest.approx(terms.ggn / 2, rel=1e-10)


def test_the_closed_form_of_a_linear_model() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).double()
    data = Images(9, classes=3, side=2)
    x, p = data.images.flatten(1), logits_of(model, data.images).softmax(1)
    weight = model.get_parameter("1.weight").detach()
    ggn = torch.einsum("nc,ni->ci", p * (1 - p), x**2) / 9
    fisher = torch.einsum("nc,ni->ci", (p - F.one_hot(data.labels, 3)) ** 2, x**2) / 9
    found = pai.score("ggn_diag", model, data, samples=None, estimator="exact")["1.weight"]
    assert relative_error(found, weight**2 * ggn / 2) <= 1e-12
    found = pai.score("fisher_diag", model, data, samples=None)["1.weight"]
    assert relative_error(found, weight**2 * fisher / 2) <= 1e-12


def test_magnitude_is_the_absolute_value_and_a_copy() -> None:
    model = tiny_classifier()
    scores = pai.score("magnitude", model)
    for name in PRUNED:
        assert torch.equal(scores[name], model.get_parameter(name).detach().abs())
        assert scores[name].data_ptr() != model.get_parameter(name).data_ptr()


def test_random_is_uniform_and_set_by_its_seed() -> None:
    model = nn.Sequential(nn.Linear(200, 200))
    first, again, other = (pai.score("random", model, seed=s)["0.weight"] for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert 0 <= float(first.min()) < float(first.max()) < 1
    error = (1 / 12 / first.numel()) ** 0.5
    assert abs(float(first.mean()) - 0.5) <= 4 * error


def test_one_seed_draws_one_set_of_samples_and_labels() -> None:
    model, data = tiny_classifier(), tiny_task().train
    first, again, other = (
        pai.score("ggn_diag", model, data, samples=8, seed=s)[PRUNED[0]] for s in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ggn_dig", {}, "unknown scorer 'ggn_dig'; did you mean 'ggn_diag'.*magnitude"),
        ("ggn_diag", {"estimater": "mc"}, "no option 'estimater'; its options are: estimator, dra"),
        ("magnitude", {"draws": 2}, "'magnitude' has no option 'draws'; its options are: none"),
        ("ggn_diag", {"estimator": "all"}, "unknown estimator 'all'"),
        ("ggn_diag", {"samples": 0}, "samples=0"),
        ("ggn_diag", {"samples": 31}, "samples=31 but the dataset holds 30"),
        ("fisher_diag", {"samples": None, "batch_size": 0}, "batch_size=0"),
    ],
)
def test_a_misspelling_is_told_with_the_choices(
    name: str, options: dict[str, int | str | None], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pai.score(name, tiny_classifier(), tiny_task().train, **options)  # type: ignore[arg-type]


def test_missing_data_and_models_without_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="'fisher_diag' needs data"):
        pai.score("fisher_diag", tiny_classifier())
    with pytest.raises(ValueError, match="no convolution or linear weight"):
        pai.score("magnitude", nn.Sequential(nn.BatchNorm2d(3), nn.Flatten()))


@pytest.mark.parametrize("name", ["ggn_diag", "fisher_diag"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_named(name: str, value: float) -> None:
    model = tiny_classifier()
    with torch.no_grad():
        model.get_parameter(PRUNED[1])[0, 0, 0, 0] = value
    with pytest.raises(ValueError, match=rf"weights of '{PRUNED[1]}' are not finite"):
        pai.score(name, model, tiny_task().train, samples=4)


def test_images_that_are_not_finite_are_refused() -> None:
    case = build("conv")
    case.data.images[3, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"scores for '0\.weight'.*images"):
        pai.score("ggn_diag", case.model, case.data, samples=None)


def test_labels_beyond_the_head_are_refused() -> None:
    with pytest.raises(ValueError, match="label 2 but the model's classes are 0 to 1"):
        pai.score("fisher_diag", tiny_classifier(2), tiny_task().train, samples=None)


def test_a_scored_tensor_is_no_alias_of_another(case: Case) -> None:
    scores = pai.score("fisher_diag", case.model, case.data, samples=None)
    pointers: list[int] = [t.data_ptr() for t in scores.values() if isinstance(t, Tensor)]
    assert len(set(pointers)) == len(scores)

import pytest
import torch
from torch import nn

import pai_utils as pai
from pai_utils.support.sampling import Draw
from tests.cases import (
    CASES,
    Layers,
    Limited,
    build,
    relative_error,
    tiny_classifier,
    tiny_task,
)

PRUNED = ["backbone.encoder.0.weight", "backbone.encoder.3.weight"]


@pytest.mark.parametrize("name", pai.SCORERS)
def test_the_encoders_weights_or_those_named_are_scored_and_all_others_left_out(name: str) -> None:
    model, data = tiny_classifier(), tiny_task().train
    names = ["head.weight", PRUNED[1], "backbone.encoder.3.bias"]
    if name in ("wanda", "obs_inputs"):  # of weights alone
        names.pop()
    scores = pai.score(name, model, data, names=[*names, PRUNED[1]], samples=8)
    assert list(scores) == names
    parameters = dict(model.named_parameters())
    assert all(scores[n].shape == parameters[n].shape for n in names)
    assert scores.left_out == [n for n in parameters if n not in names]
    whole = pai.score(name, model, data, samples=8)
    assert list(whole) == PRUNED
    assert whole.scorer == name
    (alone,) = pai.score(name, model, data, names=[PRUNED[1]], samples=8).values()
    if name in ("random", "grasp", "ntk_sap"):
        assert not torch.equal(alone, whole[PRUNED[1]])
    else:
        torch.testing.assert_close(alone, whole[PRUNED[1]])


def test_names_that_are_not_there_are_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown parameter 'head\.wait'; did you mean 'head"):
        pai.score("magnitude", tiny_classifier(), names=["head.bias", "head.wait"])
    with pytest.raises(ValueError, match="names is empty"):
        pai.score("magnitude", tiny_classifier(), names=[])


@pytest.mark.parametrize("name", pai.SCORERS)
def test_scores_depend_on_no_mode_and_draw_nothing_from_the_global_state(name: str) -> None:
    model = tiny_classifier().train()
    state = torch.get_rng_state()
    scores = pai.score(name, model, tiny_task().train, samples=8, batch_size=3)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        again = pai.score(name, model.eval(), tiny_task().train, samples=8, batch_size=3)
    assert all(torch.equal(scores[n], again[n]) for n in PRUNED)


@pytest.mark.parametrize("name", pai.SCORERS)
def test_no_score_depends_on_the_batches_or_on_the_memory_there_is(name: str) -> None:
    inner, data = tiny_classifier(), tiny_task().train
    model = Layers(lambda m, x: m.model(x), model=inner)
    names = [f"model.{n}" for n in PRUNED]
    whole, parts, limited = (
        pai.score(name, each, data, names=names, samples=10, batch_size=size)
        for each, size in ((model, 64), (model, 3), (Limited(inner, 3), 64))
    )
    # An inverse enlarges the rounding of float32 sums.
    limit = 1e-5 if name == "obs_inputs" else 1e-6
    for n in names:
        assert relative_error(parts[n], whole[n]) <= limit
        assert relative_error(limited[n], whole[n]) <= limit


@pytest.mark.parametrize("name", CASES)
def test_every_scorer_scores_every_way_of_using_a_weight(name: str) -> None:
    case = build(name)
    for scorer in pai.SCORERS:
        if name == "weight in a custom function" and scorer in ("synflow", "px"):
            continue  # refused
        if scorer in ("hessian_diag", "wanda", "obs_inputs"):
            continue  # refused where logits bend in a weight, or where a weight is no layer's
        scores = pai.score(scorer, case.model, case.data, samples=None)
        assert list(scores) == pai.prunable_parameters(case.model)
        assert set(scores) | set(scores.left_out) == {n for n, _ in case.model.named_parameters()}


@pytest.mark.parametrize("name", pai.SCORERS)
def test_a_seed_draws_its_samples_and_labels_and_others_are_not_looked_at(name: str) -> None:
    model, data = tiny_classifier(), tiny_task().train
    drawn = data.subset(Draw(8, seed=1).indices(data))
    found, alone, other = (
        pai.score(name, model, each, samples=samples, seed=seed)[PRUNED[0]]
        for each, samples, seed in ((data, 8, 1), (drawn, None, 1), (data, 8, 2))
    )
    assert torch.equal(found, alone)
    # The bound of px looks at no image where the last layer is dense.
    assert torch.equal(found, other) == (name in ("magnitude", "lamp", "synflow", "px"))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ggn_dig", {}, "unknown scorer 'ggn_dig'; did you mean 'ggn_diag'.*magnitude"),
        ("ggn_diag", {"estimater": "mc"}, "no option 'estimater'; its options are: estimator, dra"),
        ("magnitude", {"draws": 2}, "'magnitude' has no option 'draws'; its options are: none"),
        ("ggn_diag", {"samples": 0}, "samples=0"),
        ("block_fisher", {"blocksize": 3}, "options are: block_size, damping, estimator, memory_b"),
        ("feature_ggn_diag", {"damping": float("nan")}, "damping=nan must be zero or a finite"),
        ("ggn_diag", {"damping": "much"}, "damping='much' must be zero or a finite"),
        ("ntk_sap", {"samples": 4, "epsilon": 0.0}, r"epsilon=0\.0"),
        ("ntk_sap", {"samples": 4, "perturbations": 0}, "perturbations=0"),
        ("px", {"estimator": "exact"}, "unknown estimator 'exact'.* Choose from: bound, gated"),
        ("synflow", {"image_size": 0}, "image_size=0"),
    ],
)
def test_an_impossible_option_is_told_with_the_choices(
    name: str, options: dict[str, float | str | None], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pai.score(name, tiny_classifier(), tiny_task().train, **options)  # type: ignore[arg-type]


def test_missing_data_and_models_without_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="'fisher_diag' needs data"):
        pai.score("fisher_diag", tiny_classifier())
    with pytest.raises(ValueError, match="no convolution or linear weight"):
        pai.score("magnitude", nn.Sequential(nn.BatchNorm2d(3), nn.Flatten()))


@pytest.mark.parametrize("name", ["ggn_diag", "fisher_diag", "block_fisher"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_named(name: str, value: float) -> None:
    model = tiny_classifier()
    with torch.no_grad():
        model.get_parameter(PRUNED[1])[0, 0, 0, 0] = value
    with pytest.raises(ValueError, match=rf"weights of '{PRUNED[1]}' are not finite"):
        pai.score(name, model, tiny_task().train, samples=4)


@pytest.mark.parametrize("name", ["ggn_diag", "block_fisher", "wanda", "obs_inputs"])
def test_images_that_are_not_finite_are_refused(name: str) -> None:
    case = build("conv")
    case.data.images[3, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"scores for '0\.weight'.*images"):
        pai.score(name, case.model, case.data, samples=None)


@pytest.mark.parametrize("name", ["fisher_diag", "block_fisher", "snip", "grasp"])
def test_labels_beyond_the_head_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="label 2 but the model's classes are 0 to 1"):
        pai.score(name, tiny_classifier(2), tiny_task().train, samples=None)


def test_scores_of_a_model_carry_its_weights() -> None:
    model = tiny_classifier()
    scores = pai.score("magnitude", model)
    assert all(torch.equal(scores.weights[n].abs(), scores[n]) for n in PRUNED)

import logging
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import pai_utils as pai
from pai_utils.curvature.blocks import DAMPING
from tests.cases import (
    BatchNorm,
    Case,
    Head,
    Images,
    build,
    dense_hessian,
    fingerprint,
    flattened,
    logits_of,
    relative_error,
    tiny_classifier,
    tiny_task,
)

SECOND_ORDER: dict[str, dict[str, Any]] = {
    "fisher_diag": {},
    "ggn_diag": {},
    "feature_ggn_diag": {},
    "block_fisher": {"block_size": 16},
}
# Small, of the blocks of their families.
ENCODERS: dict[str, dict[str, Any]] = {
    # Random weights whose last normalisation is zero would have blocks without gradients.
    "test_resnet": {"zero_init_last": False},
    "test_vit": {"img_size": 32, "patch_size": 8},
    "test_efficientnet": {},
}


def test_channels_last_weights_get_the_same_scores() -> None:
    case = build("strided conv")
    expected = pai.score("block_fisher", case.model, case.data, samples=None, block_size=8)
    model = case.model.to(memory_format=torch.channels_last)
    found = pai.score("block_fisher", model, case.data, samples=None, block_size=8)
    for name in expected:
        assert relative_error(found[name], expected[name]) <= 1e-10


def dense_scores(case: Case, names: list[str]) -> torch.Tensor:
    parameters = dict(case.model.named_parameters())
    weights = torch.cat([parameters[name].detach().flatten() for name in names])
    return weights.square() / 2 * dense_hessian(case.model, names, case.data).diagonal()


def test_the_hessians_diagonal_is_exact_where_the_network_is_piecewise_linear() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = nn.ReLU6(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3, groups=2), BatchNorm(4), nn.ReLU()
        model = nn.Sequential(nn.Conv2d(3, 4, 3), BatchNorm(4), *layers, Head(4)).double()
    case = Case(model, [], Images())
    scores = pai.score("hessian_diag", case.model, case.data, samples=None, damping=0.0)
    assert relative_error(flattened(scores), dense_scores(case, list(scores))) <= 1e-10


@pytest.mark.parametrize("name", ["LayerNorm", "fused attention", "shared weight"])
def test_a_hessian_diagonal_without_an_exact_form_is_refused(name: str) -> None:
    case = build(name)
    with pytest.raises(ValueError, match=r"hessian_diag: the logits bend .* take 'ggn_diag'"):
        pai.score("hessian_diag", case.model, case.data, samples=None)


@pytest.mark.parametrize("scorer", [*SECOND_ORDER, "hessian_diag"])
def test_a_unit_that_is_off_on_every_image_does_not_go_first(scorer: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU6(), Head(4)).double()
    norm: Any = model[1]
    # Its inputs keep unit 0 far below zero; without its weights, the shift alone is far above.
    model.get_parameter("0.bias").data[0] = -50.0
    norm.running_mean[0], norm.bias.data[0] = -10.0, 4.0
    data = Images(20)
    model.eval()
    assert not model[:3](data.images)[:, 0].any()

    def order(**options: Any) -> torch.Tensor:
        scores = pai.score(scorer, model, data, samples=None, names=["0.weight"], **options)
        return scores["0.weight"].flatten(1).mean(1)

    assert order()[0] > 0.02 * order()[1:].mean()
    if scorer != "block_fisher":  # whose matrices always need a damping
        assert order(damping=0.0)[0] == 0
    pruned = pai.prune(model, data, scorer, sparsity=0.25, samples=None, include="0")
    assert pruned.mask["0.weight"][0].any()


def test_the_score_of_features_knows_no_head_and_no_label() -> None:
    model, task = tiny_classifier(), tiny_task()
    scores = pai.score("feature_ggn_diag", model, task.train, samples=8)
    encoder = pai.score("feature_ggn_diag", model.backbone, task.train, samples=8)
    assert list(scores) == [f"backbone.{name}" for name in encoder]
    assert all(torch.equal(scores[f"backbone.{n}"], values) for n, values in encoder.items())
    named = pai.score("feature_ggn_diag", model, task.train, names=["head.weight"], samples=8)
    assert not named["head.weight"].any()


def test_the_closed_form_of_the_diagonals_of_a_linear_model() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).double()
    data = Images(9, classes=3, side=2)
    x, p = data.images.flatten(1), logits_of(model, data.images).softmax(1)
    weight = model.get_parameter("1.weight").detach()
    ggn = torch.einsum("nc,ni->ci", p * (1 - p), x**2) / 9
    fisher = torch.einsum("nc,ni->ci", (p - F.one_hot(data.labels, 3)) ** 2, x**2) / 9
    exact = {"estimator": "exact", "samples": None}
    found = {"ggn_diag": exact, "fisher_diag": {"samples": None}}
    for scorer, diagonal in (("ggn_diag", ggn), ("fisher_diag", fisher)):
        for options in ({"damping": 0.0}, {}, {"damping": 3.0}):
            ridge = options.get("damping", DAMPING) * diagonal.mean()
            scores = pai.score(scorer, model, data, **found[scorer], **options)["1.weight"]  # type: ignore[arg-type]
            assert relative_error(scores, weight**2 * (diagonal + ridge) / 2) <= 1e-12


@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_second_order_score_of_a_whole_encoder(
    encoder: str, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = timm.create_model(encoder, num_classes=4, **ENCODERS[encoder]).double()
    data = Images(2, side=32)
    names = pai.prunable_parameters(model)
    before = fingerprint(model)
    for scorer, options in SECOND_ORDER.items():
        with caplog.at_level(logging.INFO, "pai_utils"):
            scores = pai.score(scorer, model, data, samples=None, **options)
        assert list(scores) == names, scorer
        assert flattened(scores).any(), scorer
        if scorer in ("fisher_diag", "ggn_diag", "feature_ggn_diag"):
            # One backward a sample, through plain autograd.
            each = pai.score(scorer, model, data, samples=None, batch_size=1)
            assert relative_error(flattened(scores), flattened(each)) <= 1e-10, scorer
        assert (flattened(scores) >= 0).all(), scorer
    assert "one backward a sample" not in caplog.text
    assert fingerprint(model) == before

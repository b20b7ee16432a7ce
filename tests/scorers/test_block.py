import logging

import pytest
import torch
from torch import nn

import pai_utils as pai
from pai_utils.curvature.blocks import fisher_blocks
from pai_utils.support.sampling import Draw
from tests.cases import Images, build, logits_of, relative_error, tiny_classifier, tiny_task


@pytest.mark.parametrize("name", ["grouped conv", "fused attention", "nn.MultiheadAttention"])
def test_scores_are_the_saliencies_of_the_blocks(name: str) -> None:
    case = build(name)
    names = pai.prunable_parameters(case.model)
    options = {"block_size": 5, "damping": 0.1, "estimator": "mc"}
    scores = pai.score("block_fisher", case.model, case.data, samples=8, seed=3, **options)  # type: ignore[arg-type]
    for blocks in fisher_blocks(case.model, names, case.data, Draw(8, seed=3), **options):  # type: ignore[arg-type]
        weight = case.model.get_parameter(blocks.name).detach()
        expected = blocks.saliency(weight.flatten()).view_as(weight)
        assert torch.equal(scores[blocks.name], expected)


@pytest.mark.parametrize("estimator", ["empirical", "mc"])
def test_blocks_of_one_weight_order_them_as_the_diagonal_does(estimator: str) -> None:
    model, data = tiny_classifier(), tiny_task().train
    diagonal = {"empirical": "fisher_diag", "mc": "ggn_diag"}[estimator]
    expected = pai.score(diagonal, model, data, samples=20)
    found = pai.score(
        "block_fisher", model, data, samples=20, block_size=1, damping=1e-10, estimator=estimator
    )
    for name in expected:
        assert relative_error(found[name], expected[name]) <= 1e-6


def test_the_closed_form_of_a_linear_model_with_one_output_a_block() -> None:
    # Blocks of 12 weights are the rows of the layer: F_c = 1/m Σ (p − e_y)_c² x xᵀ + λI.
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).double()
    data = Images(20, classes=3, side=2)
    x, p = data.images.flatten(1), logits_of(model, data.images).softmax(1)
    residual = p - torch.nn.functional.one_hot(data.labels, 3)
    weight = model.get_parameter("1.weight").detach()
    found = pai.score("block_fisher", model, data, samples=None, block_size=12)["1.weight"]
    for row in range(3):
        matrix = torch.einsum("n,ni,nj->ij", residual[:, row] ** 2, x, x) / 20
        matrix += 1e-2 * matrix.diagonal().mean() * torch.eye(12, dtype=torch.float64)
        expected = weight[row] ** 2 / (2 * torch.linalg.inv(matrix).diagonal())
        assert relative_error(found[row], expected) <= 1e-10


def test_weights_that_follow_make_the_removed_one_cheaper_than_the_diagonal_says() -> None:
    case = build("conv")
    options = {"samples": None, "damping": 1e-3}
    one = pai.score("block_fisher", case.model, case.data, block_size=1, **options)  # type: ignore[arg-type]
    all_ = pai.score("block_fisher", case.model, case.data, block_size=36, **options)  # type: ignore[arg-type]
    # [F⁻¹]_ii ≥ 1 / F_ii; the damping of a block differs by at most a factor of its mean.
    cheaper = torch.cat([(all_[n] < one[n]).flatten() for n in one])
    assert cheaper.double().mean() > 0.95


def test_channels_last_weights_get_the_same_scores() -> None:
    case = build("strided conv")
    expected = pai.score("block_fisher", case.model, case.data, samples=None, block_size=8)
    model = case.model.to(memory_format=torch.channels_last)
    found = pai.score("block_fisher", model, case.data, samples=None, block_size=8)
    for name in expected:
        assert relative_error(found[name], expected[name]) <= 1e-10


def test_half_precision_weights_get_finite_float32_scores() -> None:
    case = build("linear over tokens")
    case.data.images = case.data.images.bfloat16()
    expected = pai.score(
        "block_fisher", case.model.float(), _float(case.data), samples=None, block_size=8
    )
    found = pai.score("block_fisher", case.model.bfloat16(), case.data, samples=None, block_size=8)
    for name in expected:
        assert found[name].dtype == torch.float32
        assert relative_error(found[name], expected[name]) <= 0.1


def _float(data: Images) -> Images:
    copied = Images(len(data), dtype=torch.float32)
    copied.images, copied.labels = data.images.float(), data.labels
    return copied


def test_passes_over_the_data_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    model, data = tiny_classifier(), tiny_task().train
    with caplog.at_level(logging.INFO, "pai_utils"):
        pai.score("block_fisher", model, data, samples=8, block_size=4)
        pai.score("block_fisher", model, data, samples=8, block_size=4, memory_budget=8192)
    assert "Fisher blocks of 648 weights within 4.00 GiB: 1 pass over 8 samples" in caplog.messages
    assert any("4 passes over 8 samples" in message for message in caplog.messages)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_named(value: float) -> None:
    model = tiny_classifier()
    name = "backbone.encoder.3.weight"
    with torch.no_grad():
        model.get_parameter(name)[0, 0, 0, 0] = value
    for block_size in (2, 64):
        with pytest.raises(ValueError, match=rf"weights of '{name}' are not finite"):
            pai.score("block_fisher", model, tiny_task().train, samples=4, block_size=block_size)


def test_images_that_are_not_finite_are_refused() -> None:
    case = build("conv")
    case.data.images[3, 0, 0, 0] = torch.nan
    for block_size in (2, 64):
        with pytest.raises(ValueError, match=r"scores for '0\.weight'.*images"):
            pai.score("block_fisher", case.model, case.data, samples=None, block_size=block_size)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocksize": 3}, "no option 'blocksize'; its options are: block_size, damping, estim"),
        ({"block_size": 0}, "block_size=0"),
        ({"damping": 0.0}, r"damping=0\.0"),
        ({"estimator": "exact"}, "unknown estimator 'exact'.*empirical, mc"),
        ({"memory_budget": 10}, "memory_budget=10 is too small"),
    ],
)
def test_bad_options_are_refused(options: dict[str, float | str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pai.score("block_fisher", tiny_classifier(), tiny_task().train, samples=8, **options)  # type: ignore[arg-type]


def test_labels_beyond_the_head_are_refused() -> None:
    with pytest.raises(ValueError, match="label 2 but the model's classes are 0 to 1"):
        pai.score("block_fisher", tiny_classifier(2), tiny_task().train, samples=None)

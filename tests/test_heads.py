from typing import Any

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import pai_utils as pai
from pai_utils.heads import features
from pai_utils.models.encoders import Backbone
from tests.cases import Layers, fingerprint, tiny_backbone, tiny_dataset, tiny_task


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("inverse_penalty", [0.01, 1.0])
def test_the_folded_head_is_scikit_learns_own_pipeline(
    classes: int, inverse_penalty: float
) -> None:
    backbone, task = tiny_backbone(), tiny_task(classes=classes, train=60, test=40)
    head = pai.fit_head(backbone, task, inverse_penalty=inverse_penalty)
    values, labels = features(backbone, task.train)
    pipeline = make_pipeline(
        StandardScaler(), LogisticRegression(C=inverse_penalty, max_iter=2000)
    ).fit(values.double().numpy(), labels.numpy())
    unseen, _ = features(backbone, task.test)
    expected = torch.from_numpy(pipeline.predict_proba(unseen.double().numpy()))
    found = head(unseen).softmax(1)
    assert float((found - expected).abs().max()) <= 1e-4
    assert head.in_features == 6
    assert head.out_features == classes


def test_the_head_is_frozen_and_the_encoder_as_it_was() -> None:
    backbone = tiny_backbone().train()
    weight = backbone.get_parameter("encoder.0.weight")
    weight.grad = torch.ones_like(weight)
    before = fingerprint(backbone)
    head = pai.fit_head(backbone, tiny_task())
    assert fingerprint(backbone) == before
    assert not any(p.requires_grad for p in head.parameters())
    assert not head.training
    assert head.weight.dtype == torch.float32


def test_a_head_uses_the_training_part_and_nothing_else() -> None:
    backbone = tiny_backbone()
    poisoned = tiny_task(train=60, test=40)
    for part in (poisoned.validation, poisoned.test):
        part.images.fill_(255)
        part.labels.fill_(99)
    head = pai.fit_head(backbone, tiny_task(train=60, test=40))
    other = pai.fit_head(backbone, poisoned)
    assert torch.equal(head.weight, other.weight)
    assert torch.equal(head.bias, other.bias)


def test_a_feature_that_hardly_varies_is_not_blown_up() -> None:
    def constant(_: Any, images: torch.Tensor) -> torch.Tensor:
        """The second feature is a bias plus the last bit, as after a layer pruned to nothing."""
        value = images.mean((1, 2, 3))
        noise = 6e-8 * (torch.sin(1e4 * value) > 0)
        return torch.stack([value, 0.3 + noise, torch.zeros_like(value)], 1)

    tiny = tiny_backbone()
    known: Any = {"transform": tiny.transform, "provenance": tiny.provenance}
    backbone = Backbone(Layers(constant), name="constant", feature_dim=3, **known)
    head = pai.fit_head(backbone, tiny_task())
    assert float(head.weight.abs().max()) < 1e3


def test_what_no_head_can_be_fitted_on_is_an_error() -> None:
    broken = tiny_backbone()
    with torch.no_grad():
        broken.get_parameter("encoder.3.weight").fill_(torch.inf)
    with pytest.raises(ValueError, match="features of task 'spots' are not finite"):
        pai.fit_head(broken, tiny_task())
    with pytest.raises(
        ValueError, match=r"the train part of task 'spots' has no sample of class 'c'.*train_size"
    ):
        pai.fit_head(tiny_backbone(), tiny_task(train=2))


def test_features_come_in_order_whatever_the_batches() -> None:
    backbone, data = tiny_backbone(), tiny_dataset(11, 3, 0)
    expected = backbone(data.batch(torch.arange(11))[0]).detach()
    for size in (1, 4, 64):
        values, labels = features(backbone, data, batch_size=size)
        assert torch.allclose(values, expected, atol=1e-6)
        assert torch.equal(labels, data.labels)
        assert not values.is_inference()

"""Every second-order scorer on whole encoders of timm, and on a packaged one."""

import logging
from typing import Any

import pytest
import timm
from torch import nn

import pai_utils as pai
from tests.cases import Images, fingerprint, flattened, relative_error

SECOND_ORDER: dict[str, dict[str, Any]] = {
    "fisher_diag": {},
    "ggn_diag": {},
    "feature_ggn_diag": {},
    "block_fisher": {"block_size": 16},
    "hessian_diag": {"probes": 2},
}
ENCODERS = [
    "resnet50",
    "vit_small_patch16_224",
    "convnext_tiny",
    "tf_efficientnet_lite0",
    "vit_small_saliency",
]


def _model(name: str) -> tuple[nn.Module, Images]:
    side = 28 if name == "vit_small_saliency" else 32
    data = Images(2, side=side)
    if name == "vit_small_saliency":
        backbone = pai.load_backbone(name, image_size=side, device="cpu")
        return pai.Classifier(backbone, nn.Linear(backbone.feature_dim, 4)).double(), data
    options: dict[str, Any] = {}
    if name == "resnet50":
        options["zero_init_last"] = False  # else random weights have blocks without gradients
    if name == "vit_small_patch16_224":
        options["img_size"] = side
    return timm.create_model(name, num_classes=4, **options).double(), data


@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_second_order_score_of_a_whole_encoder(
    encoder: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, data = _model(encoder)
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
        if scorer == "hessian_diag":
            assert list(scores.standard_error) == names
        else:
            assert (flattened(scores) >= 0).all(), scorer
    assert "one backward a sample" not in caplog.text
    assert fingerprint(model) == before

from collections.abc import Callable

import pytest
import torch
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.std_conv import ScaledStdConv2dSame, StdConv2d
from torch import Tensor, nn
from torch.nn.utils import prune

from pai_utils.models.encoders import (
    Backbone,
    Classifier,
    check_masks_hold,
    image_shape,
    prunable_parameters,
)
from pai_utils.models.loading import load_backbone
from tests.cases import fingerprint


@pytest.fixture(scope="module")
def tiny() -> Backbone:
    return load_backbone("timm:test_resnet", image_size=32, pretrained=False, device="cpu")


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 32, 32), r"\[N, 3, 32, 32\], got torch.float32 \[3, 32, 32\]"),
        (torch.zeros(1, 1, 32, 32), r"float32 \[1, 1, 32, 32\]"),
        (torch.zeros(1, 3, 32, 31), r"float32 \[1, 3, 32, 31\]"),
        (
            torch.zeros(1, 3, 32, 32, dtype=torch.uint8),
            "takes normalised float .* torch.uint8",
        ),
    ],
)
def test_images_of_another_shape_or_type_are_refused(
    images: Tensor, message: str, tiny: Backbone
) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(images)


def test_the_classifier_is_its_head_after_its_backbone(tiny: Backbone) -> None:
    head = nn.Linear(tiny.feature_dim, 5)
    model = Classifier(tiny, head)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(images), head(tiny(images)))
    assert not any(p.requires_grad for p in model.head.parameters())
    assert all(p.requires_grad for p in model.backbone.parameters())
    assert not any(module.training for module in model.modules())


def test_a_wrapped_model_takes_the_images_of_the_one_inside(tiny: Backbone) -> None:
    model = Classifier(tiny, nn.Linear(tiny.feature_dim, 5))
    assert image_shape(nn.DataParallel(model)) == [3, 32, 32]


def test_a_head_for_other_features_is_refused(tiny: Backbone) -> None:
    with pytest.raises(ValueError, match=f"takes 3 features .* gives {tiny.feature_dim}"):
        Classifier(tiny, nn.Linear(3, 5))


@pytest.mark.parametrize("name", ["efficientnet_lite0", "vit_small_saliency"])
def test_prunable_weights_of_an_encoder_are_all_its_convolutions_and_linear_layers(
    name: str,
) -> None:
    backbone = load_backbone(name, pretrained=False, device="cpu")
    names = prunable_parameters(backbone)
    # In these architectures exactly the matrices and kernels: no bias, norm or embedding.
    assert names == [n for n, value in backbone.named_parameters() if value.ndim in (2, 4)]
    assert len(names) == 49
    model = Classifier(backbone, nn.Linear(backbone.feature_dim, 3))
    assert prunable_parameters(model) == [f"backbone.{name}" for name in names]


def test_prunable_weights_of_any_module_include_every_layer_type() -> None:
    model = nn.ModuleDict(
        {
            "embedding": nn.Embedding(4, 8),
            "conv": nn.Conv1d(3, 8, 3),
            "up": nn.ConvTranspose3d(8, 3, 2),
            "norm": nn.LayerNorm(8),
            "attention": nn.MultiheadAttention(8, 2),
            "cross": nn.MultiheadAttention(8, 2, kdim=4, vdim=6),
            "head": nn.Linear(8, 2),
        }
    )
    assert prunable_parameters(model) == [
        "conv.weight",
        "up.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "cross.q_proj_weight",
        "cross.k_proj_weight",
        "cross.v_proj_weight",
        "cross.out_proj.weight",
        "head.weight",
    ]
    assert prunable_parameters(nn.Linear(2, 2)) == ["weight"]
    assert prunable_parameters(nn.ReLU()) == []


def test_a_shared_weight_is_listed_once() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    assert prunable_parameters(nn.Sequential(first, second)) == ["0.weight"]


@pytest.mark.parametrize(
    "compute",
    [
        lambda layer: nn.utils.parametrizations.weight_norm(layer),
        lambda layer: nn.utils.parametrizations.orthogonal(layer),
        lambda layer: nn.utils.spectral_norm(layer),
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    ],
)
def test_a_weight_that_is_computed_is_refused_unless_it_is_left_out(
    compute: Callable[[nn.Module], nn.Module],
) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), compute(nn.Linear(4, 4)))
    for chosen in ({}, {"include": "2"}, {"exclude": "0"}):
        with pytest.raises(ValueError, match=r"'2\.weight' is computed.*prune\.remove"):
            prunable_parameters(model, **chosen)
    assert prunable_parameters(model, include="0") == ["0.weight"]
    assert prunable_parameters(model, exclude="2") == ["0.weight"]


class Standardised(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        standardised = weight - weight.mean((1, 2, 3), keepdim=True)
        return super()._conv_forward(input, standardised, bias)  # type: ignore[no-any-return]


class Adapted(nn.Linear):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.up, self.down = (nn.Parameter(torch.randn(n, 1)) for n in (outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight + self.up @ self.down.mT, self.bias)


class Masked(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        quantised = weight.round(decimals=2).tril()
        return super()._conv_forward(input, quantised, bias)  # type: ignore[no-any-return]


class Guided(nn.Linear):
    def forward(self, x: Tensor, guide: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x * guide)


@pytest.mark.parametrize(
    ("layer", "holds"),
    [
        (StdConv2d(4, 4, 3, padding=1), False),
        (ScaledStdConv2dSame(4, 8, 1, stride=2, bias=False), False),
        (Standardised(4, 8, 3, groups=2, padding="same", padding_mode="circular"), False),
        (Adapted(4, 3).half(), False),
        (Conv2dSame(4, 8, 3, stride=2), True),
        (Masked(4, 8, (1, 3), dilation=2), True),
        (Guided(4, 4), True),
        (nn.ConvTranspose2d(4, 8, 2), True),
    ],
)
def test_a_mask_must_hold_in_the_weight_that_a_layer_applies(layer: nn.Module, holds: bool) -> None:
    model = nn.Sequential(layer)
    before = fingerprint(model)
    if holds:
        check_masks_hold(model, ["0.weight"])
    else:
        with pytest.raises(ValueError, match=rf"'0\.weight': what {type(layer).__name__} applies"):
            check_masks_hold(model, ["0.weight"])
    assert fingerprint(model) == before

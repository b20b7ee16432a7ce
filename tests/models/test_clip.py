"""CLIP's towers: a tiny model of open_clip's own kind, its files, and heads of class names."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import pai_utils as pai
from pai_utils.models import clip
from pai_utils.models.encoders import Backbone
from pai_utils.models.loading import load_backbone

open_clip = pytest.importorskip("open_clip", reason="the extra clip is not installed")

CONFIG = {
    "embed_dim": 12,
    "vision_cfg": {
        "image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8
    },
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}  # fmt: skip
NAMES = ("red square", "blue circle", "green star")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A tiny model in open_clip's registry, and a file of its weights."""
    folder = tmp_path_factory.mktemp("clip")
    (folder / "tiny.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(folder / "tiny.json")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = open_clip.create_model("tiny", pretrained=None)
    path = folder / "tiny.safetensors"
    save_file({n: v.contiguous() for n, v in model.state_dict().items()}, path)
    yield path
    open_clip.factory._MODEL_CONFIGS.pop("tiny")
    open_clip.factory._MODEL_CONFIG_PATHS.remove(folder / "tiny.json")


@pytest.fixture
def backbone(weights: Path) -> Backbone:
    return load_backbone(f"clip:tiny@{weights}", device="cpu")


def test_logits_are_the_whole_models_scaled_similarities(backbone: Backbone, weights: Path) -> None:
    head = pai.zero_shot_head(backbone, NAMES, ["a {}."])
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    whole: Any = open_clip.create_model("tiny", pretrained=str(weights)).eval()
    texts = open_clip.get_tokenizer("tiny")([f"a {name}." for name in NAMES])
    with torch.no_grad():
        image, text, scale = whole(images, texts)[:3]
        expected = scale * image @ text.T
        torch.testing.assert_close(pai.Classifier(backbone, head)(images), expected)
    assert not any(p.requires_grad for p in head.parameters())


def test_the_last_matrix_of_a_transformer_is_a_weight_like_others(
    backbone: Backbone, weights: Path
) -> None:
    whole: Any = open_clip.create_model("tiny", pretrained=str(weights)).eval()
    name = "encoder.proj.weight"
    torch.testing.assert_close(backbone.get_parameter(name), whole.visual.proj.T)
    assert name in pai.prunable_parameters(backbone)
    assert "encoder.visual.proj" not in backbone.state_dict()
    model = pai.Classifier(backbone, torch.nn.Linear(12, 3))
    images, labels = torch.randn(3, 3, 32, 32), torch.arange(3)
    data: Any = torch.utils.data.TensorDataset(images, labels)
    found = pai.score("fisher_diag", model, data, samples=None, damping=0.0)[f"backbone.{name}"]
    weight, expected = model.get_parameter(f"backbone.{name}"), torch.zeros(12, 64)
    for image, label in zip(images, labels, strict=True):
        loss = torch.nn.functional.cross_entropy(model(image[None]), label[None])
        expected += torch.autograd.grad(loss, weight)[0] ** 2 / 3
    torch.testing.assert_close(found, weight.detach() ** 2 * expected / 2)
    pruned = pai.prune(model, data, "magnitude", 0.5, samples=None, repair="layerwise+moments")
    assert 0 < pruned.mask.layer_sparsity[f"backbone.{name}"] < 1


def test_a_tower_that_gives_its_tokens_too_is_read_by_what_it_pools(tmp_path: Path) -> None:
    pooler = {"attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 2}
    vision = {**CONFIG["vision_cfg"], **pooler, "output_tokens": True}  # type: ignore[dict-item]
    text = {**CONFIG["text_cfg"], "embed_cls": True, "output_tokens": True}  # type: ignore[dict-item]
    multimodal = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    config = {
        "embed_dim": 12, "vision_cfg": vision, "text_cfg": text,
        "multimodal_cfg": {**multimodal, "attn_pooler_heads": 2}, "custom_text": True,
    }  # fmt: skip
    (tmp_path / "coca_tiny.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "coca_tiny.json")
    try:
        found = load_backbone("clip:coca_tiny", pretrained=False, device="cpu")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            whole: Any = open_clip.create_model("coca_tiny", pretrained=None).eval()
    finally:
        open_clip.factory._MODEL_CONFIGS.pop("coca_tiny")
        open_clip.factory._MODEL_CONFIG_PATHS.remove(tmp_path / "coca_tiny.json")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(found(images), whole.encode_image(images))


def test_the_tower_says_what_it_is_and_what_its_images_need(
    backbone: Backbone, weights: Path
) -> None:
    assert backbone.feature_dim == 12
    assert backbone.image_size == 32
    assert backbone.transform.mean == pytest.approx(open_clip.OPENAI_DATASET_MEAN)
    assert backbone.provenance.source == f"CLIP tiny through open_clip; {weights.name}"
    assert backbone.provenance.checksum is not None
    assert backbone(torch.zeros(2, 3, 32, 32)).norm(dim=1).tolist() == pytest.approx([1, 1])
    # Weights of attention, and of no embedding.
    assert "encoder.visual.transformer.resblocks.0.attn.in_proj_weight" in (
        pai.prunable_parameters(backbone)
    )


def test_another_size_of_images_interpolates_positions(weights: Path) -> None:
    larger = load_backbone(f"clip:tiny@{weights}", image_size=48, device="cpu")
    assert larger.image_size == 48
    assert larger(torch.zeros(1, 3, 48, 48)).shape == (1, 12)
    with pytest.raises(ValueError, match="image_size 44 is not a multiple of the patch size 8"):
        load_backbone(f"clip:tiny@{weights}", image_size=44, device="cpu")


@pytest.mark.usefixtures("weights")
def test_random_weights_follow_the_seed_and_have_no_text() -> None:
    one, same, other = (
        load_backbone("clip:tiny", pretrained=False, seed=seed, device="cpu").state_dict()
        for seed in (0, 0, 1)
    )
    name = "encoder.visual.conv1.weight"
    assert torch.equal(one[name], same[name])
    assert not torch.equal(one[name], other[name])
    with pytest.raises(ValueError, match="no text tower"):
        pai.zero_shot_head(load_backbone("clip:tiny", pretrained=False, device="cpu"), NAMES)


def test_the_tower_can_be_scored_and_pruned_with_its_head_of_names(
    backbone: Backbone, tmp_path: Path
) -> None:
    for name, colour in zip(NAMES, ("red", "blue", "green"), strict=True):
        (tmp_path / name).mkdir()
        for side in range(10, 20):
            Image.new("RGB", (side, side), colour).save(tmp_path / name / f"{side}.png")
    task = pai.load_task(f"folder:{tmp_path}", backbone.transform)
    heads = pai.make_heads(backbone, {"mine": task}, "text")
    pruned = pai.prune(
        pai.Classifier(backbone, heads["mine"]), task.train, sparsity=0.5, samples=6, batch_size=3
    )
    assert pruned.mask.sparsity == pytest.approx(0.5, abs=1e-4)
    assert pai.evaluate(pruned.model, task.test).count == len(task.test)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("clip:ViT-B-99@openai", "unknown CLIP model 'ViT-B-99'; did you mean 'ViT-B"),
        ("clip:ViT-B-32@openay", "unknown weights in clip:ViT-B-32@openay: 'openay';"),
        ("clip:ViT-B-32", "unknown weights in clip:ViT-B-32: ''"),
    ],
)
def test_unknown_models_and_weights_are_named(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_backbone(name)


def test_absent_weights_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    message = r"clip:ViT-B-32@openai are not on this computer.* download=True.*hub:timm/vit_b"
    with pytest.raises(FileNotFoundError, match=message):
        load_backbone("clip:ViT-B-32@openai", download=False)


def test_text_that_another_package_reads_is_named_and_fetched_only_when_asked_for(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("PAI_DOWNLOAD", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"cannot be loaded: Please `pip install transformers`"):
        load_backbone("clip:coca_roberta-ViT-B-32", pretrained=False)
    config = {**CONFIG, "text_cfg": {"hf_tokenizer_name": "someone/tokens"}}
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: config)
    with pytest.raises(ModuleNotFoundError, match=r"clip:tiny@.* reads text.*install transformers"):
        pai.zero_shot_head(backbone, NAMES)
    monkeypatch.setattr(clip, "package_folder", lambda *package: None)
    with pytest.raises(FileNotFoundError, match=r"download=True.* fetch hub:someone/tokens/"):
        pai.zero_shot_head(backbone, NAMES)
    with pytest.raises(ConnectionError, match=r"hub:someone/tokens/\S+ could not be fetched"):
        pai.zero_shot_head(backbone, NAMES, download=True)


def test_a_file_that_is_cut_of_another_model_or_of_other_objects_is_refused(
    weights: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"clip:ViT-S-32-alt@.* cannot be loaded from"):
        load_backbone(f"clip:ViT-S-32-alt@{weights}")
    cut, objects = tmp_path / "cut.safetensors", tmp_path / "objects.pt"
    cut.write_bytes(weights.read_bytes()[:-100])
    torch.save({"state_dict": {}, "folder": tmp_path}, objects)  # to unpickle one may run code
    for path in (cut, objects):
        with pytest.raises(ValueError, match=rf"cannot be loaded from .*{path.name}: "):
            load_backbone(f"clip:tiny@{path}")


@pytest.mark.parametrize(
    ("names", "templates", "message"),
    [
        ([], ["a {}."], "class names must be given and differ"),
        (["cat", "cat"], ["a {}."], "class names must be given and differ"),
        (["cat", "dog"], [], "templates need"),
        (["cat", "dog"], ["a cat."], "templates need"),
    ],
)
def test_heads_of_no_or_the_same_names_are_refused(
    backbone: Backbone, names: list[str], templates: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pai.zero_shot_head(backbone, names, templates)


def test_other_encoders_have_no_text_and_without_open_clip_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = load_backbone("timm:test_resnet", image_size=32, pretrained=False, device="cpu")
    with pytest.raises(ValueError, match="timm:test_resnet has no text tower"):
        pai.zero_shot_head(other, NAMES)
    with pytest.raises(ValueError, match=r"unknown kind of head 'texts'; did you mean 'text'"):
        pai.make_heads(other, {}, "texts")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"install pai-utils\[clip\]"):
        load_backbone("clip:ViT-B-32@openai")

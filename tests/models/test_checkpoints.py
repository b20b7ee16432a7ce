"""Files of weights: the layouts they are published in, their checks, and fetching them."""

from __future__ import annotations

import argparse
import dataclasses
import http.client
import logging
import pickle
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import huggingface_hub.constants
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet

from pai_utils.data.images import ImageTransform
from pai_utils.models.checkpoints import check_digest, obtain_weights, read_checkpoint, weights_root
from pai_utils.models.encoders import Backbone
from pai_utils.models.loading import load_backbone
from pai_utils.models.published import PRESETS
from pai_utils.support.stored import digest_of

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
VIT, RESNET = "test_vit", "test_resnet"
ONE = torch.ones(1)
State = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test finds the weights, or follows the wishes, of the person who runs it."""
    monkeypatch.setenv("PAI_WEIGHTS_ROOT", str(tmp_path / "weights"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("PAI_DOWNLOAD", raising=False)


def state_of(architecture: str, classes: int = 0) -> State:
    model: nn.Module = timm.create_model(architecture, num_classes=classes)
    return {name: value.clone() for name, value in model.state_dict().items()}


def under(prefix: str, state: Mapping[str, Tensor]) -> State:
    return {prefix + name: value for name, value in state.items()}


def without(prefix: str, state: Mapping[str, Tensor]) -> State:
    return {name: value for name, value in state.items() if not name.startswith(prefix)}


def noise(state: Mapping[str, Tensor]) -> State:
    """Other values of the same names, as a second network of a training file."""
    return {name: torch.ones_like(value) for name, value in state.items()}


def saved(content: Any, path: Path, *, zipped: bool = True) -> Path:
    """Save as PyTorch does today, as it did before 1.6 (when MoCo's files were made), or safely."""
    if path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def loaded(path: Path, architecture: str = RESNET, **options: Any) -> Backbone:
    options = {"image_size": 32, "device": "cpu", **options}
    return load_backbone(f"file:{path}@{architecture}", **options)


def holds(backbone: Backbone, state: Mapping[str, Tensor]) -> bool:
    found = backbone.encoder.state_dict()
    return found.keys() == state.keys() and all(torch.equal(found[n], state[n]) for n in state)


def mocov2(encoder: State) -> dict[str, Any]:
    """A training file of MoCo v2: two encoders, each with a projection head, and the queue."""
    head = {"fc.0.weight": torch.ones(8, 8), "fc.0.bias": torch.ones(8)}
    return {
        "epoch": 800,
        "arch": "resnet50",
        "state_dict": under("module.encoder_q.", encoder | head)
        | under("module.encoder_k.", noise(encoder) | head)
        | {"module.queue": torch.ones(4, 16), "module.queue_ptr": torch.zeros(1).long()},
        "optimizer": {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": []},
    }


def dino(encoder: State, teacher: str = "") -> dict[str, Any]:
    """A training file of DINO, with the arguments that its command line parsed."""
    head = {"head.mlp.0.weight": torch.ones(8, 8), "head.last_layer.weight_v": torch.ones(9, 4)}
    return {
        "student": under("module.", under("backbone.", noise(encoder)) | head),
        "teacher": under(teacher, under("backbone.", encoder) | head),
        "epoch": 100,
        "args": argparse.Namespace(arch="vit_small", lr=0.0005, local_crops_scale=(0.05, 0.4)),
        "fp16_scaler": {"scale": 65536.0, "growth_interval": 2000},
    }


# --- layouts ---


@pytest.mark.parametrize("zipped", [True, False])
def test_mocos_query_encoder_is_taken_and_what_is_left_out_is_reported_and_logged(
    zipped: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = state_of(RESNET)
    path = saved(mocov2(encoder), tmp_path / "moco.pth.tar", zipped=zipped)
    with caplog.at_level(logging.INFO, logger="pai_utils"):
        backbone = loaded(path)
    assert holds(backbone, encoder)
    assert backbone.checkpoint == caplog.messages[0]
    assert backbone.checkpoint.startswith(
        "moco.pth.tar is a training file of MoCo, whose query encoder is taken; left out: 2 the "
        f"head's: fc.0.weight, fc.0.bias; {3 + len(encoder) + 2 + 2} other: epoch, arch, optimizer"
    )


@pytest.mark.parametrize(("architecture", "teacher"), [(VIT, ""), (RESNET, "module.")])
def test_dinos_teacher_is_taken_from_a_training_file_without_its_head(
    architecture: str, teacher: str, tmp_path: Path
) -> None:
    # The teacher is wrapped as the student is if the network has BatchNorm, otherwise it is bare.
    encoder = state_of(architecture)
    if architecture == VIT:
        encoder["pos_embed"] = encoder["pos_embed"][:, : 1 + 4].clone()
    backbone = loaded(saved(dino(encoder, teacher), tmp_path / "checkpoint.pth"), architecture)
    assert holds(backbone, encoder)
    assert backbone.checkpoint == (
        "checkpoint.pth is a training file of DINO, whose teacher is taken; left out: 6 other: "
        "student, epoch, args, fp16_scaler, head.mlp.0.weight and 1 more"
    )


@pytest.mark.parametrize(
    ("wrap", "file", "layout"),
    [
        (dict, "model.safetensors", "a plain state dict"),
        (dict, "model.pth", "a plain state dict"),
        (lambda state: {"state_dict": state}, "model.pt", "a state dict under state_dict"),
        (lambda state: {"model": state, "epoch": 3}, "model.pth.tar", "a state dict under model"),
        (lambda s: under("module.", s), "model.pth", "a plain state dict, of a wrapped model"),
        (
            lambda state: {"state_dict": under("_orig_mod.", state)},
            "model.pth",
            "a state dict under state_dict, of a wrapped model",
        ),
    ],
)
def test_a_state_dict_loads_without_its_classifier(
    wrap: Callable[[State], object], file: str, layout: str, tmp_path: Path
) -> None:
    state = state_of(VIT, classes=3)
    backbone = loaded(saved(wrap(state), tmp_path / file), VIT, image_size=None)
    assert holds(backbone, without("head.", state))
    assert backbone.checkpoint is not None
    assert backbone.checkpoint.startswith(f"{file} is {layout}; left out: 2 the head's: head.")
    assert backbone.provenance.source == f"local file; {file}"
    assert backbone.provenance.checksum == f"sha256:{digest_of(tmp_path / file)}"
    assert backbone.provenance.licence == "unknown"


def test_torchvisions_resnet_gives_the_same_features_in_timms(tmp_path: Path) -> None:
    theirs = ResNet(Bottleneck, [2, 2, 2, 2], num_classes=5).eval()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight)
            module.running_mean = torch.rand(module.num_features)
    path = saved(theirs.state_dict(), tmp_path / "resnet26-00000000.pth")
    backbone = loaded(path, "resnet26")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(theirs.fc(backbone(images)), theirs(images))


def test_a_file_from_before_batchnorm_counted_batches_loads(tmp_path: Path) -> None:
    state = state_of(RESNET, classes=3)
    old = {n: v for n, v in state.items() if not n.endswith("num_batches_tracked")}
    assert len(old) < len(state)
    path = saved(old, tmp_path / "resnet50-19c8e357.pth", zipped=False)
    assert holds(loaded(path), without("fc.", state))


def test_a_checkpoint_made_at_another_size_has_its_positions_interpolated(tmp_path: Path) -> None:
    state = state_of(VIT)
    path = saved(state, tmp_path / "model.safetensors")
    assert holds(loaded(path, VIT, image_size=None), state)
    positions = loaded(path, VIT, image_size=64).encoder.get_parameter("pos_embed")
    assert positions.shape == (1, 1 + 16, state["pos_embed"].shape[2])
    assert torch.equal(positions[:, 0], state["pos_embed"][:, 0])


# --- files that do not fit ---


@pytest.mark.parametrize(
    ("content", "messages"),
    [
        (
            lambda: dino(state_of(VIT)),
            ["model.pth does not fit test_resnet: ", "missing: conv1.0.weight, ", " more; ",
             "unexpected: cls_token, pos_embed, patch_embed.proj.weight, "],
        ),
        (
            lambda: without("conv1.0.weight", state_of(RESNET))
            | {"head.weight": torch.ones(3, 4), "bn1.weight": torch.ones(7)},
            ["1 missing: conv1.0.weight; ", "1 unexpected: head.weight; ", "bn1.weight [7] ",
             "instead of [32]"],
        ),
        (lambda: {"model": {"encoder_q.b": ONE, "x": ONE}}, ["1 unexpected: b"]),
        (lambda: state_of(RESNET) | {"bn1.weight": torch.full((32,), torch.nan)},
         ["holds weights that are not finite: bn1.weight"]),
        (dict, ["model.pth holds no state dict"]),
        (lambda: {"epoch": 3}, ["holds an entry that is not a named tensor: epoch"]),
        (lambda: {"best": np.float64(0.7)},
         ["objects other than tensors (numpy", "ask its publisher for a file of the state dict"]),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit_is_refused_with_what_differs(
    content: Callable[[], object], messages: list[str], tmp_path: Path
) -> None:
    path = saved(content(), tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"model\.pth") as caught:
        loaded(path)
    for message in messages:
        assert message in str(caught.value)
    assert len(str(caught.value)) < 800


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_hidden_in_a_file_never_runs(zipped: bool, tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", tmp_path / "checkpoint.pth"
    content = dino(state_of(RESNET))
    loaded(saved(content, path, zipped=zipped))
    # That arguments are allowed does not outlive the load.
    assert argparse.Namespace not in torch.serialization.get_safe_globals()
    content["args"].output_dir = Payload(marker)
    for harmful in (content, {"fc.weight": Payload(marker)}):
        saved(harmful, path, zipped=zipped)
        with pytest.raises(ValueError, match=r"checkpoint\.pth.*objects other than tensors"):
            loaded(path)
    path.write_bytes(pickle.dumps(Payload(marker), protocol=2))
    with pytest.raises(ValueError, match=r"checkpoint\.pth"):
        loaded(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("file", "zipped"), [("m.safetensors", True), ("m.pth", True), ("m.pth", False)]
)
def test_a_truncated_file_is_refused_by_name(file: str, zipped: bool, tmp_path: Path) -> None:
    path = saved(state_of(RESNET), tmp_path / file, zipped=zipped)
    content = path.read_bytes()
    for end in (0, 100, len(content) // 3, -8):
        path.write_bytes(content[:end])
        with pytest.raises(ValueError, match=path.name):
            loaded(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("zipped", [True, False])
def test_altered_bytes_end_in_a_value_error_that_names_the_file_or_in_tensors(
    zipped: bool, tmp_path: Path
) -> None:
    state = {"conv.weight": torch.randn(2, 3), "bn.num_batches_tracked": torch.tensor(3)}
    path = saved(mocov2(state), tmp_path / "moco.pth", zipped=zipped)
    content, refused = path.read_bytes(), 0
    draw = random.Random(0)
    for _ in range(200):
        altered = bytearray(content)
        for _ in range(draw.choice([1, 4])):
            altered[draw.randrange(len(altered))] ^= 1 << draw.randrange(8)
        path.write_bytes(altered)
        try:
            read_checkpoint(path)
        except ValueError as error:
            assert str(error).startswith("moco.pth ")  # noqa: PT017
            refused += 1
    assert refused > 100
    if zipped:  # a bit of a tensor, which has a checksum
        path.write_bytes(content.replace(state["conv.weight"].numpy().tobytes(), b"\0" * 24))
        with pytest.raises(ValueError, match=r"moco\.pth is truncated or damaged: the CRC"):
            read_checkpoint(path)


def test_a_file_name_must_be_complete_and_exist(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match="write file:<path>@<timm model>"):
        load_backbone(f"file:{tmp_path / 'model.bin'}")
    with pytest.raises(FileNotFoundError, match="there is no checkpoint at"):
        loaded(tmp_path / "absent.pth")
    with pytest.raises(ValueError, match=r"model\.bin is damaged"):
        loaded(tmp_path / "model.bin")
    with pytest.raises(ValueError, match=r"unknown backbone.*did you mean"):
        loaded(saved(state_of(RESNET), tmp_path / "model.pth"), "test_resnett")


# --- digests ---


def test_a_digest_is_compared_by_as_many_digits_as_are_known(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    # The examples of FIPS 180-2 and RFC 1321.
    assert digest_of(path).startswith("ba7816bf8f01cfea414140de5dae2223")
    for right in ("ba7816bf", "sha256:BA7816BF8F01", f"sha256:{digest_of(path)}", "md5:900150983c"):
        check_digest(path, right, "")
    for wrong in ("ba7816be", "md5:900150983d", "md5:ba7816bf", "sha256:", ""):
        with pytest.raises(ValueError, match=r"file is damaged or not the expected.*; do this"):
            check_digest(path, wrong, "do this")


# --- presets ---


@pytest.mark.parametrize(
    ("name", "recorded"),
    [
        ("resnet50.in1k", "resnet50.tv_in1k"),
        ("vit_small.dino", "vit_small_patch16_224.dino"),
        ("vit_base.dino", "vit_base_patch16_224.dino"),
        ("vit_small.in1k", "vit_small_patch16_224.augreg_in1k"),
    ],
)
def test_a_presets_facts_are_those_that_timm_records_for_the_same_weights(
    name: str, recorded: str
) -> None:
    config: Any = timm.get_pretrained_cfg(recorded)
    preset = PRESETS[name]
    assert preset.transform == ImageTransform(
        config.input_size[-1], config.mean, config.std, config.interpolation
    )
    assert preset.licence.lower() == config.license
    assert preset.addresses[0] in (config.url, f"hub:{config.hf_hub_id}/model.safetensors")


def small(name: str, **options: Any) -> Backbone:
    return load_backbone(name, image_size=32, device="cpu", **options)


def test_a_preset_that_is_absent_says_the_folder_the_address_and_how_to_fetch_it(
    tmp_path: Path,
) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        small("resnet50.mocov2")
    text = str(caught.value)
    assert f"weights of resnet50.mocov2 are not on this computer, neither in {tmp_path}" in text
    assert "pass download=True, or set PAI_DOWNLOAD=1, to fetch https://dl.fbaipublicf" in text
    assert "moco_v2_800ep_pretrain.pth.tar" in text
    assert not (tmp_path / "weights").exists()


@pytest.mark.parametrize("asked", ["argument", "environment"])
def test_a_preset_is_fetched_when_asked_checked_and_kept(
    asked: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    name, encoder = "resnet50.mocov2", state_of(RESNET)
    source = saved(mocov2(encoder), tmp_path / "moco_v2_800ep_pretrain.pth.tar", zipped=False)
    digest, address = f"md5:{digest_of(source, 'md5')[:8]}", source.as_uri()
    offered = dataclasses.replace(PRESETS[name], addresses=(address,), digest=digest)
    monkeypatch.setitem(PRESETS, name, dataclasses.replace(offered, architecture=RESNET))
    if asked == "environment":
        monkeypatch.setenv("PAI_DOWNLOAD", "1")
    backbone = small(name, download=True if asked == "argument" else None)
    assert holds(backbone, encoder)
    (kept,) = (tmp_path / "weights").iterdir()
    assert kept.name == source.name
    assert kept.read_bytes() == source.read_bytes()
    assert backbone.name == name
    assert backbone.transform == ImageTransform(32, *IMAGENET, "bilinear")
    assert backbone.provenance.checksum == f"sha256:{digest_of(source)}"
    assert backbone.provenance.licence == "CC-BY-NC-4.0"
    assert backbone.provenance.source.startswith("ResNet-50, MoCo v2 on ImageNet-1k")
    assert backbone.provenance.source.endswith(f"{kept.name} from {source.as_uri()}")
    source.unlink()
    assert holds(small(name, download=False), encoder)


def test_a_kept_file_with_a_flipped_bit_is_caught_by_its_digest(tmp_path: Path) -> None:
    source = saved({"weight": ONE}, tmp_path / "model.pth")
    digest = digest_of(source)[:8]
    kept = obtain_weights("weights", source.as_uri(), download=True, digest=digest)
    altered = bytes([kept.read_bytes()[0] ^ 1]) + kept.read_bytes()[1:]
    kept.write_bytes(altered)
    with pytest.raises(ValueError, match=r"model\.pth is damaged.*remove .* and fetch it again"):
        obtain_weights("weights", source.as_uri(), download=True, digest=digest)
    assert kept.read_bytes() == altered


def test_a_download_that_is_not_the_published_file_leaves_nothing_behind(tmp_path: Path) -> None:
    file = saved({"weight": ONE}, tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"model\.pth is damaged.*was not kept; fetch it again"):
        obtain_weights("weights", file.as_uri(), download=True, digest="00000000")
    bodies = [saved(state_of(RESNET), file, zipped=zipped).read_bytes() for zipped in (True, False)]
    # A connection that is cut ends like a complete one; a proxy may answer with a page of its own.
    for body in (*(body[:-1000] for body in bodies), b"<!doctype html><title>Sign in</title>"):
        file.write_bytes(body)
        with pytest.raises(ValueError, match=r"model\.pth"):
            obtain_weights("the weights of x", file.as_uri(), download=True)
    file.unlink()
    with pytest.raises(ConnectionError, match=r"model\.pth could not be fetched"):
        obtain_weights("the weights of x", file.as_uri(), download=True)
    assert list((tmp_path / "weights").iterdir()) == []


# --- the hub ---


def test_weights_that_timm_publishes_are_read_from_the_hubs_cache(tmp_path: Path) -> None:
    name, state = VIT, state_of(VIT, classes=1000)
    with pytest.raises(FileNotFoundError, match=r"download=True.*hub:timm/test_vit\.r160_in1k/"):
        load_backbone(name)
    place = tmp_path / "hub/models--timm--test_vit.r160_in1k"  # as the hub's client keeps it
    for folder in ("refs", "snapshots/c0ffee"):
        (place / folder).mkdir(parents=True)
    (place / "refs/main").write_text("c0ffee")
    path = saved(state, place / "snapshots/c0ffee/model.safetensors")
    backbone = load_backbone(name, device="cpu")
    assert holds(backbone, without("head.", state))
    assert backbone.image_size == 160
    assert backbone.provenance.checksum == f"sha256:{digest_of(path)}"
    assert backbone.provenance.licence == "apache-2.0"
    assert backbone.provenance.source.endswith("from hub:timm/test_vit.r160_in1k/model.safetensors")
    assert load_backbone(name, image_size=64).encoder.get_parameter("pos_embed").shape[1] == 17
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"test_vit cannot be loaded from .*model\.safetensors"):
        load_backbone(name)


@pytest.mark.parametrize("name", ["vit_small.in1k", "timm:test_resnet"])
def test_an_unreachable_hub_says_what_to_do_instead(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"nor in the hub's cache; pass download="):
        load_backbone(name)
    with pytest.raises(ConnectionError, match=r"file:<path>@<timm model>.*pretrained=False"):
        load_backbone(name, download=True)


def test_where_one_address_breaks_off_or_ends_short_the_next_is_tried(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = saved({"weight": torch.ones(2)}, tmp_path / "model.safetensors")
    short = tmp_path / "short.safetensors"
    short.write_bytes(path.read_bytes()[:-4])
    download = Mock(side_effect=[http.client.IncompleteRead(b""), str(path)])
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    for first in ("hub:someone/model/model.safetensors", short.as_uri()):
        addresses = first, "hub:someone/model/pytorch_model.bin"
        assert obtain_weights("weights", *addresses, download=True) == path
        download.side_effect = [str(path)]


# --- settings ---


def test_the_folder_of_weights_is_the_one_asked_for_or_torchvisions(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PAI_WEIGHTS_ROOT", "~/mine")
    assert weights_root() == tmp_path / "mine"
    monkeypatch.setenv("PAI_WEIGHTS_ROOT", "")
    assert weights_root() == tmp_path / "torch" / "hub" / "checkpoints"

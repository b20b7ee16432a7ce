"""Files of weights: the layouts they are published in, their checks, and fetching them."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import http.server
import logging
import random
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet

from pai_utils.data.images import ImageTransform
from pai_utils.models.checkpoints import (
    CheckpointReport,
    check_digest,
    fetch,
    read_checkpoint,
    sha256_of,
    weights_root,
)
from pai_utils.models.encoders import Backbone
from pai_utils.models.loading import load_backbone
from pai_utils.models.published import PRESETS
from pai_utils.support.common import may_download

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
VIT, RESNET = "test_vit", "test_resnet"
State = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test sees the weights, or the wishes, of the person who runs it."""
    monkeypatch.setenv("PAI_WEIGHTS_ROOT", str(tmp_path / "weights"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("PAI_DOWNLOAD", raising=False)


def state_of(architecture: str, classes: int = 0) -> State:
    model: nn.Module = timm.create_model(architecture, num_classes=classes)
    return {name: value.clone() for name, value in model.state_dict().items()}


def under(prefix: str, state: Mapping[str, Tensor]) -> State:
    return {prefix + name: value for name, value in state.items()}


def noise(state: Mapping[str, Tensor]) -> State:
    """Other values of the same names, as a second network of a training file."""
    return {name: torch.ones_like(value) for name, value in state.items()}


def saved(content: object, path: Path, *, zipped: bool = True) -> Path:
    """Save as PyTorch does today, or as it did before 1.6, when MoCo's files were made."""
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def loaded(path: Path, architecture: str) -> Backbone:
    return load_backbone(f"file:{path}@{architecture}", image_size=32, device="cpu")


def report_of(backbone: Backbone) -> CheckpointReport:
    assert backbone.checkpoint is not None
    return backbone.checkpoint


def holds(backbone: Backbone, state: Mapping[str, Tensor]) -> bool:
    found = backbone.encoder.state_dict()
    return found.keys() == state.keys() and all(torch.equal(found[n], state[n]) for n in state)


def mocov2(encoder: State) -> dict[str, Any]:
    """A training file of MoCo v2: two encoders, each with a projection head, and the queue."""
    head = {"fc.0.weight": torch.ones(8, 8), "fc.0.bias": torch.ones(8)}
    head |= {"fc.2.weight": torch.ones(4, 8), "fc.2.bias": torch.ones(4)}
    return {
        "epoch": 800,
        "arch": "resnet50",
        "state_dict": under("module.encoder_q.", encoder | head)
        | under("module.encoder_k.", noise(encoder) | head)
        | {"module.queue": torch.ones(4, 16), "module.queue_ptr": torch.zeros(1).long()},
        "optimizer": optimizer_state(),
    }


def dino(encoder: State, student: str, teacher: str) -> dict[str, Any]:
    """A training file of DINO, with the arguments that its command line parsed."""
    head = {"head.mlp.0.weight": torch.ones(8, 8), "head.last_layer.weight_v": torch.ones(9, 4)}
    return {
        "student": under(student, under("backbone.", noise(encoder)) | head),
        "teacher": under(teacher, under("backbone.", encoder) | head),
        "optimizer": optimizer_state(),
        "epoch": 100,
        "args": argparse.Namespace(arch="vit_small", lr=0.0005, local_crops_scale=(0.05, 0.4)),
        "dino_loss": {"center": torch.zeros(1, 9)},
        "fp16_scaler": {"scale": 65536.0, "growth_interval": 2000},
    }


def optimizer_state() -> dict[str, Any]:
    layer = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


# --- layouts ---


@pytest.mark.parametrize("zipped", [True, False])
def test_mocos_query_encoder_is_taken_without_its_projection_head_queue_and_key_encoder(
    zipped: bool, tmp_path: Path
) -> None:
    encoder = state_of(RESNET)
    path = saved(mocov2(encoder), tmp_path / "moco_v2_800ep_pretrain.pth.tar", zipped=zipped)
    backbone = loaded(path, RESNET)
    assert holds(backbone, encoder)
    report = report_of(backbone)
    assert report.layout == "a training file of MoCo, whose query encoder is taken"
    assert report.head == ("fc.0.weight", "fc.0.bias", "fc.2.weight", "fc.2.bias")
    assert report.other[:3] == ("epoch", "arch", "optimizer")
    assert {"queue", "queue_ptr", "encoder_k.fc.0.bias"} < set(report.other)
    assert len(report.other) == 3 + len(encoder) + 4 + 2


@pytest.mark.parametrize("teacher", ["", "module."])
@pytest.mark.parametrize("architecture", [VIT, RESNET])
def test_dinos_teacher_is_taken_from_a_training_file_without_its_head(
    architecture: str, teacher: str, tmp_path: Path
) -> None:
    # The teacher is wrapped as the student is if the network has BatchNorm, otherwise it is bare.
    encoder = state_of(architecture)
    if architecture == VIT:
        encoder["pos_embed"] = encoder["pos_embed"][:, : 1 + 4].clone()
    path = saved(dino(encoder, "module.", teacher), tmp_path / "checkpoint.pth")
    backbone = loaded(path, architecture)
    assert holds(backbone, encoder)
    report = report_of(backbone)
    assert report.layout == "a training file of DINO, whose teacher is taken"
    assert report.head == ("head.mlp.0.weight", "head.last_layer.weight_v")
    assert set(report.other) == {
        "student", "optimizer", "epoch", "args", "dino_loss", "fp16_scaler"
    }  # fmt: skip


def test_dinos_backbone_file_holds_bare_names_and_no_head(tmp_path: Path) -> None:
    encoder = state_of(RESNET)
    backbone = loaded(saved(encoder, tmp_path / "dino_resnet50_pretrain.pth"), RESNET)
    assert holds(backbone, encoder)
    assert report_of(backbone) == CheckpointReport(
        "dino_resnet50_pretrain.pth", "a plain state dict", (), ()
    )


def test_timm_names_the_tensors_of_a_vision_transformer_as_dinos_code_does() -> None:
    layers = ["norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"]
    modules = ["patch_embed.proj", *(f"blocks.{i}.{x}" for i in range(12) for x in layers), "norm"]
    expected = ["cls_token", "pos_embed"]
    expected += [f"{module}.{kind}" for module in modules for kind in ("weight", "bias")]
    for name in ("vit_small.dino", "vit_base.dino"):
        assert list(state_of(PRESETS[name].architecture)) == expected


@pytest.mark.parametrize(
    ("wrap", "layout"),
    [
        (lambda state: {"state_dict": state}, "a state dict under state_dict"),
        (lambda state: {"model": state, "epoch": 3}, "a state dict under model"),
        (lambda state: under("module.", state), "a plain state dict, of DataParallel"),
        (
            lambda state: {"state_dict": under("module.", state)},
            "a state dict under state_dict, of DataParallel",
        ),
    ],
)
@pytest.mark.parametrize("ending", [".pth", ".pt", ".pth.tar"])
def test_a_wrapped_state_dict_loads_without_its_classifier(
    wrap: Callable[[State], object], layout: str, ending: str, tmp_path: Path
) -> None:
    state = state_of(VIT, classes=3)
    path = saved(wrap(state), tmp_path / f"model{ending}")
    backbone = load_backbone(f"file:{path}@{VIT}", device="cpu")
    assert holds(backbone, {n: v for n, v in state.items() if not n.startswith("head.")})
    assert report_of(backbone).layout == layout
    assert report_of(backbone).head == ("head.weight", "head.bias")


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
        logits = theirs.fc(backbone(images))
        torch.testing.assert_close(logits, theirs(images))
    assert report_of(backbone).head == ("fc.weight", "fc.bias")


def test_a_file_from_before_batchnorm_counted_batches_loads(tmp_path: Path) -> None:
    state = state_of(RESNET, classes=3)
    old = {n: v for n, v in state.items() if not n.endswith("num_batches_tracked")}
    assert len(old) < len(state)
    backbone = loaded(saved(old, tmp_path / "resnet50-19c8e357.pth", zipped=False), RESNET)
    assert holds(backbone, {n: v for n, v in state.items() if not n.startswith("fc.")})


def test_safetensors_hold_the_same_layouts(tmp_path: Path) -> None:
    encoder = state_of(RESNET)
    path = tmp_path / "moco.safetensors"
    state = mocov2(encoder)["state_dict"]
    save_file({name: value.clone() for name, value in state.items()}, path)
    assert holds(loaded(path, RESNET), encoder)


def test_what_was_left_out_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = saved(mocov2(state_of(RESNET)), tmp_path / "moco.pth.tar")
    with caplog.at_level(logging.INFO, logger="pai_utils"):
        report = report_of(loaded(path, RESNET))
    assert caplog.messages == [str(report)]
    assert str(report).startswith(
        "moco.pth.tar is a training file of MoCo, whose query encoder is taken; left out: 4 the "
        "head's: fc.0.weight, fc.0.bias, fc.2.weight, fc.2.bias; "
    )
    assert str(CheckpointReport("a.pth", "a plain state dict", (), ())) == (
        "a.pth is a plain state dict; left out: nothing"
    )


# --- files that do not fit ---


def test_a_training_file_of_another_architecture_is_refused_with_names(tmp_path: Path) -> None:
    path = saved(dino(state_of(VIT), "module.", ""), tmp_path / "checkpoint.pth")
    with pytest.raises(ValueError, match=r"checkpoint\.pth does not fit test_resnet") as caught:
        loaded(path, RESNET)
    assert "missing: conv1.0.weight, " in str(caught.value)
    assert "unexpected: cls_token, pos_embed, patch_embed.proj.weight, " in str(caught.value)
    path = saved(mocov2(state_of(RESNET)), tmp_path / "moco.pth.tar")
    with pytest.raises(ValueError, match=r"does not fit test_vit: \d+ missing: cls_token, pos_"):
        loaded(path, VIT)


def test_a_name_that_belongs_to_no_part_of_a_training_file_is_refused(tmp_path: Path) -> None:
    content = mocov2(state_of(RESNET))
    content["state_dict"]["module.conv1.0.weight"] = torch.ones(1)
    path = saved(content, tmp_path / "moco.pth")
    with pytest.raises(ValueError, match=r"1 unexpected names beside encoder_q\.\*: conv1\.0\.we"):
        loaded(path, RESNET)
    content = dino(state_of(RESNET), "module.", "")
    content["teacher"]["predictor.weight"] = torch.ones(1)
    path = saved(content, tmp_path / "dino.pth")
    with pytest.raises(ValueError, match=r"1 unexpected names beside backbone\.\*: predictor\.w"):
        loaded(path, RESNET)


def test_a_head_under_another_name_is_refused(tmp_path: Path) -> None:
    state = state_of(RESNET) | {"head.weight": torch.ones(3, 4)}
    with pytest.raises(ValueError, match=r"does not fit test_resnet: 1 unexpected: head\.weight"):
        loaded(saved(state, tmp_path / "model.pth"), RESNET)


def test_an_object_beside_the_tensors_is_named_and_not_built(tmp_path: Path) -> None:
    content = {"state_dict": state_of(RESNET), "best": np.float64(0.7)}
    path = saved(content, tmp_path / "model.pth")
    with pytest.raises(ValueError, match="objects other than tensors") as caught:
        loaded(path, RESNET)
    assert "multiarray.scalar), which are not loaded" in str(caught.value)
    assert "ask its publisher for a file of the state dict alone" in str(caught.value)


def test_allowing_arguments_does_not_outlive_the_load(tmp_path: Path) -> None:
    path = saved(dino(state_of(RESNET), "module.", ""), tmp_path / "checkpoint.pth")
    loaded(path, RESNET)
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_hidden_among_a_training_files_arguments_never_runs(
    zipped: bool, tmp_path: Path
) -> None:
    marker = tmp_path / "marker"
    content = dino(state_of(RESNET), "module.", "")
    content["args"].output_dir = Payload(marker)
    path = saved(content, tmp_path / "checkpoint.pth", zipped=zipped)
    with pytest.raises(ValueError, match=r"checkpoint\.pth.*objects other than tensors"):
        loaded(path, RESNET)
    assert not marker.exists()


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9, 0.999])
def test_a_truncated_file_from_before_the_zip_format_is_refused(
    share: float, tmp_path: Path
) -> None:
    path = saved(mocov2(state_of(RESNET)), tmp_path / "moco.pth.tar", zipped=False)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"moco\.pth\.tar"):
        loaded(path, RESNET)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("zipped", [True, False])
def test_altered_bytes_end_in_a_value_error_that_names_the_file_or_in_tensors(
    zipped: bool, tmp_path: Path
) -> None:
    state = {"conv.weight": torch.randn(2, 3), "bn.num_batches_tracked": torch.tensor(3)}
    path = saved(mocov2(state), tmp_path / "moco.pth", zipped=zipped)
    content, refused = path.read_bytes(), 0
    draw = random.Random(0)
    for _ in range(400):
        altered = bytearray(content)
        for _ in range(draw.choice([1, 4])):
            altered[draw.randrange(len(altered))] ^= 1 << draw.randrange(8)
        path.write_bytes(altered)
        try:
            read_checkpoint(path)
        except ValueError as error:
            assert str(error).startswith("moco.pth ")  # noqa: PT017
            refused += 1
    assert refused > 200


# --- digests ---


def test_a_digest_is_compared_by_as_many_digits_as_are_known(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    # The examples of FIPS 180-2 and RFC 1321.
    assert sha256_of(path).startswith("ba7816bf8f01cfea414140de5dae2223")
    for right in ("ba7816bf", "sha256:BA7816BF8F01", f"sha256:{sha256_of(path)}", "md5:900150983c"):
        check_digest(path, right, "")
    for wrong in ("ba7816be", "md5:900150983d", "md5:ba7816bf", "sha256:", ""):
        with pytest.raises(
            ValueError, match=r"file is damaged or not the expected file.*; do this"
        ):
            check_digest(path, wrong, "do this")


# --- presets ---


def test_presets_name_the_encoders_of_the_paper() -> None:
    assert list(PRESETS) == [
        "resnet50.in1k", "resnet50.mocov2", "resnet50.dino",
        "vit_small.dino", "vit_base.dino", "vit_small.in1k",
    ]  # fmt: skip
    assert {n for n, preset in PRESETS.items() if preset.transform.mean != IMAGENET[0]} == {
        "vit_small.in1k"
    }
    assert all(timm.is_model(preset.architecture) for preset in PRESETS.values())


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
    assert preset.address in (config.url, f"hub:{config.hf_hub_id}")


@pytest.fixture
def publish(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Path]:
    """Let a small file of some layout be what a preset's publisher offers."""

    def offer(name: str, content: object, digest: str = "", architecture: str = RESNET) -> Path:
        folder = tmp_path / "publisher"
        folder.mkdir(exist_ok=True)
        path = saved(content, folder / PRESETS[name].file, zipped=False)
        algorithm, _, digits = digest.partition(":")
        if algorithm and not digits:
            digest = f"{algorithm}:{hashlib.new(algorithm, path.read_bytes()).hexdigest()[:8]}"
        small = dataclasses.replace(
            PRESETS[name],
            architecture=architecture,
            address=path.as_uri(),
            digest=digest or None,
        )
        monkeypatch.setitem(PRESETS, name, small)
        return path

    return offer


def small(name: str, **options: Any) -> Backbone:
    return load_backbone(name, image_size=32, device="cpu", **options)


def test_a_preset_that_is_absent_says_the_command_and_the_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        small("resnet50.mocov2")
    text = str(caught.value)
    assert f"(moco_v2_800ep_pretrain.pth.tar) are not in {tmp_path / 'weights'}; " in text
    assert (
        "download=True, or run PAI_DOWNLOAD=1 python -c "
        "\"import pai_utils; pai_utils.load_backbone('resnet50.mocov2')\"" in text
    )
    assert "from https://dl.fbaipublicfiles.com/moco/" in text
    assert not (tmp_path / "weights").exists()


@pytest.mark.parametrize("asked", ["argument", "environment"])
def test_a_preset_is_fetched_when_asked_checked_and_kept(
    asked: str,
    publish: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    encoder = state_of(RESNET)
    source = publish("resnet50.mocov2", mocov2(encoder), "md5")
    monkeypatch.setenv("PAI_PROGRESS", "0")
    if asked == "environment":
        monkeypatch.setenv("PAI_DOWNLOAD", "1")
    backbone = small("resnet50.mocov2", download=True if asked == "argument" else None)
    assert holds(backbone, encoder)
    assert capfd.readouterr().err == ""
    kept = tmp_path / "weights" / "moco_v2_800ep_pretrain.pth.tar"
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]
    assert kept.read_bytes() == source.read_bytes()
    assert backbone.name == "resnet50.mocov2"
    assert backbone.transform == ImageTransform(32, *IMAGENET, "bilinear")
    assert backbone.provenance.checksum == f"sha256:{sha256_of(source)}"
    assert backbone.provenance.licence == "CC-BY-NC-4.0"
    assert backbone.provenance.source.startswith("ResNet-50, MoCo v2 on ImageNet-1k")
    assert backbone.provenance.source.endswith(f"{kept.name} from {source.as_uri()}")
    source.unlink()
    assert holds(small("resnet50.mocov2", download=False), encoder)


@pytest.mark.parametrize("digest", ["md5", "sha256"])
def test_a_flipped_bit_is_caught_by_the_published_digest(
    digest: str, publish: Callable[..., Path], tmp_path: Path
) -> None:
    publish("resnet50.in1k", state_of(RESNET, classes=3), digest)
    small("resnet50.in1k", download=True)
    kept = tmp_path / "weights" / "resnet50-0676ba61.pth"
    content = bytearray(kept.read_bytes())
    content[len(content) // 2] ^= 1
    kept.write_bytes(content)
    with pytest.raises(ValueError, match=r"0676ba61\.pth is damaged.*remove it from .*weights and"):
        small("resnet50.in1k", download=True)
    assert kept.read_bytes() == content


def test_a_preset_without_a_published_digest_is_held_to_a_given_one(
    publish: Callable[..., Path],
) -> None:
    publish("resnet50.dino", state_of(RESNET))
    found = small("resnet50.dino", download=True).provenance.checksum
    assert small("resnet50.dino", checksum=found).provenance.checksum == found
    with pytest.raises(ValueError, match=r"dino_resnet50_pretrain\.pth is damaged or not the exp"):
        small("resnet50.dino", checksum="0" * 64)
    with pytest.raises(ValueError, match="checksum is for local checkpoints"):
        small("resnet50.dino", checksum=found, pretrained=False)


def test_a_download_that_is_not_the_published_file_leaves_nothing_behind(
    publish: Callable[..., Path], tmp_path: Path
) -> None:
    publish("resnet50.in1k", state_of(RESNET), "sha256:00000000")
    with pytest.raises(ValueError, match=r"0676ba61\.pth is damaged.*was not kept; fetch it again"):
        small("resnet50.in1k", download=True)
    assert list((tmp_path / "weights").iterdir()) == []


class Server(http.server.BaseHTTPRequestHandler):
    """Announces a whole file and sends a part of it, then cuts the connection."""

    body: bytes
    sent: int

    def do_GET(self) -> None:
        if self.path != "/model.pth":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body[: self.sent])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[http.server.ThreadingHTTPServer]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_connection_that_is_cut_leaves_nothing_behind_even_without_a_published_digest(
    zipped: bool,
    server: http.server.ThreadingHTTPServer,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    path, kept = tmp_path / "whole.pth", tmp_path / "weights" / "model.pth"
    body = saved(state_of(RESNET), path, zipped=zipped).read_bytes()
    monkeypatch.setattr(Server, "body", body, raising=False)
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(Server, "sent", len(body) - 1000, raising=False)
    with pytest.raises((ValueError, ConnectionError), match=r"model\.pth"):
        fetch(f"{address}/model.pth", kept, None)
    assert list(kept.parent.iterdir()) == []
    with pytest.raises(ConnectionError, match=r"other\.pth could not be fetched .*404"):
        fetch(f"{address}/other.pth", kept, None)
    assert list(kept.parent.iterdir()) == []
    monkeypatch.setattr(Server, "sent", len(body))
    fetch(f"{address}/model.pth", kept, None)
    assert kept.read_bytes() == body


def test_a_web_page_in_place_of_weights_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("<!doctype html><title>Sign in</title>")
    with pytest.raises(ValueError, match=r"model\.pth"):
        fetch(page.as_uri(), tmp_path / "weights" / "model.pth", None)
    assert list((tmp_path / "weights").iterdir()) == []


def test_a_presets_file_of_another_architecture_is_refused_with_names(
    publish: Callable[..., Path],
) -> None:
    publish("vit_small.dino", state_of(RESNET), architecture=VIT)
    with pytest.raises(
        ValueError, match=r"deitsmall16_pretrain\.pth does not fit test_vit: .*cls_"
    ):
        small("vit_small.dino", download=True)


def test_a_preset_at_random_weights_needs_no_file() -> None:
    backbone = load_backbone("resnet50.dino", image_size=32, pretrained=False, device="cpu")
    assert backbone.provenance.source == "random initialisation of resnet50, seed 0"
    assert backbone.transform == ImageTransform(32, *IMAGENET, "bicubic")
    assert backbone.checkpoint is None


def test_a_misspelled_preset_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'resnet50\.moco'; did you mean 'resnet50\.mocov2'\?"):
        load_backbone("resnet50.moco")
    with pytest.raises(ValueError, match=r"did you mean 'resnet50\.tv_in1k'\?"):
        load_backbone("timm:resnet50.tv_in1", pretrained=False)


# --- the hub ---


@pytest.fixture
def in_hub_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> State:
    """`vit_small.in1k`, tiny, laid out as the hub's client keeps it."""
    name = "vit_small.in1k"
    tiny = dataclasses.replace(PRESETS[name], architecture=VIT)
    monkeypatch.setitem(PRESETS, name, tiny)
    model = tmp_path / "hub" / "models--timm--vit_small_patch16_224.augreg_in1k"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("c0ffee")
    snapshot = model / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    state = state_of(VIT, classes=3)
    save_file(state, snapshot / "model.safetensors")
    return state


def test_a_hub_preset_is_read_from_the_hubs_cache_without_the_network(
    in_hub_cache: State,
) -> None:
    backbone = load_backbone("vit_small.in1k", image_size=160, device="cpu", download=False)
    assert holds(backbone, {n: v for n, v in in_hub_cache.items() if not n.startswith("head.")})
    assert backbone.transform.mean == (0.5, 0.5, 0.5)
    path = PRESETS["vit_small.in1k"].path
    assert path is not None
    assert backbone.provenance.checksum == f"sha256:{sha256_of(path)}"
    assert "model.safetensors from hub:timm/vit_small_patch16" in backbone.provenance.source


def test_a_hub_preset_that_is_absent_says_so_and_asks_the_hub_only_on_request(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"safetensors\) are not in .*hub; pass download="):
        load_backbone("vit_small.in1k")
    with pytest.raises(ConnectionError, match=r"load it as file:<path>@vit_small_patch16_224$"):
        load_backbone("vit_small.in1k", download=True)


# --- settings ---


def test_the_folder_of_weights_is_the_one_asked_for_or_torchvisions(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert weights_root() == tmp_path / "weights"
    monkeypatch.setenv("PAI_WEIGHTS_ROOT", "~/mine")
    assert weights_root() == tmp_path / "mine"
    for unset in ("", None):
        if unset is None:
            monkeypatch.delenv("PAI_WEIGHTS_ROOT")
        else:
            monkeypatch.setenv("PAI_WEIGHTS_ROOT", unset)
        assert weights_root() == tmp_path / "torch" / "hub" / "checkpoints"


@pytest.mark.parametrize(
    ("argument", "environment", "allowed"),
    [
        (None, None, False), (None, "1", True), (None, "0", False),
        (True, "0", True), (False, "1", False),
    ],
)  # fmt: skip
def test_what_is_asked_in_code_outweighs_the_environment(
    argument: bool | None, environment: str | None, allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if environment is not None:
        monkeypatch.setenv("PAI_DOWNLOAD", environment)
    assert may_download(argument) is allowed

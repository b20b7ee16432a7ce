"""Pre-trained image encoders, by the name of their weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pai_utils.data.images import INTERPOLATIONS, ImageTransform, check_image_size
from pai_utils.models.checkpoints import HUB, load_checkpoint
from pai_utils.models.clip import CLIP, ImageTower, load_towers
from pai_utils.models.encoders import Backbone
from pai_utils.models.published import BACKBONES, PRESETS, BackboneSpec
from pai_utils.support.common import may_download, unknown_name
from pai_utils.support.sampling import check_seed
from pai_utils.support.stored import located

_TIMM_FILES = ("model.safetensors", "pytorch_model.bin")


def load_backbone(
    name: str = "efficientnet_lite0",
    image_size: int | None = None,
    device: str | torch.device = "auto",
    *,
    pretrained: bool = True,
    seed: int = 0,
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
              `pai_utils.models.checkpoints` lists, of which all but the head's tensors must match.
        image_size: side of the square images, in pixels. Default: 84 for `vit_small_saliency`, 64
            for the other keys of `BACKBONES`, the model's own otherwise. A vision transformer
            needs a multiple of its patch size; its position embedding is interpolated.
        device: "auto" (CUDA if there is any, else CPU), "cpu", "cuda", "cuda:1", "mps".
        pretrained: `False` gives random weights, from `seed`.
        seed: the global random state is left as it was.
        download: fetch weights that are not on this computer. Default: whether `PAI_DOWNLOAD` is 1.

    Raises:
        ValueError: an unknown name, size or device; a file whose digest, format, names or
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
    check_seed(seed)
    if image_size is not None:
        check_image_size(image_size)
    report: str | None = None
    if name.startswith(CLIP):
        model, transform, provenance = load_towers(
            name, image_size=image_size, pretrained=pretrained, seed=seed, download=download
        )
        encoder: nn.Module = ImageTower(model.get_submodule("visual"))
        _check_patches(model.get_submodule("visual"), transform.image_size, name)
    else:
        spec = BACKBONES.get(name) or PRESETS.get(name) or _specify(name)
        path = spec.obtain(name, download=may_download(download)) if pretrained else None
        size = image_size or spec.transform.image_size
        transform = replace(spec.transform, image_size=size)
        encoder = _build(spec.architecture, size, seed, path if spec.fill is None else None)
        _check_patches(encoder, size, name)
        if path is not None and spec.fill is not None:
            report = spec.fill(encoder, path, spec.architecture)
        provenance = spec.provenance(path, seed)
    return Backbone(
        encoder.eval(),
        name=name,
        feature_dim=_count_features(encoder, transform.image_size, name),
        transform=transform,
        provenance=provenance,
        checkpoint=report,
    ).to(target)


def resolve_device(device: str | torch.device) -> torch.device:
    """Name a device that exists: of ``"auto"`` CUDA if there is any, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except RuntimeError as error:
        valid = ["auto", "cpu", "cuda", "cuda:<index>", "mps"]
        raise unknown_name("device", device, valid) from error
    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": torch.mps.device_count()}
    if (target.index or 0) >= counts.get(target.type, 0):
        usable = ", ".join(kind for kind, count in counts.items() if count)
        raise ValueError(f"device {str(device)!r} is not available here; choose auto or {usable}")
    return target


def _specify(name: str) -> BackboneSpec:
    """What a name means that is neither in a table nor of CLIP."""
    import timm

    local = name.startswith("file:")
    path, architecture = _split_file_name(name) if local else ("", name.removeprefix("timm:"))
    base, _, tag = architecture.partition(".")
    tagged = timm.models.get_arch_pretrained_cfgs(base) if timm.is_model(base) else {}
    if not timm.is_model(base) or (tag and architecture not in tagged):
        other = ("timm:<model>", "file:<path>@<timm model>", "clip:<model>@<weights>")
        valid = [*BACKBONES, *other, *PRESETS]
        raise unknown_name("backbone", architecture, valid, unlisted=[*timm.list_models(), *tagged])
    config: Any = timm.get_pretrained_cfg(architecture) or timm.models.PretrainedCfg()
    known = config.interpolation in INTERPOLATIONS
    size, interpolation = config.input_size[-1], config.interpolation if known else "bicubic"
    if local:
        addresses = [path]
    elif config.hf_hub_id:
        files = [config.hf_hub_filename] if config.hf_hub_filename else _TIMM_FILES
        addresses = [f"{HUB}{config.hf_hub_id}/{file}" for file in files]
    else:
        addresses = [config.url] if config.url else []
    return BackboneSpec(
        description="local file" if local else f"{architecture} of timm",
        architecture=architecture,
        transform=ImageTransform(size, config.mean, config.std, interpolation),
        licence="unknown" if local else config.license or "unknown",
        addresses=tuple(addresses),
        fill=load_checkpoint if local else None,
    )


def _split_file_name(name: str) -> tuple[str, str]:
    """Path and architecture of `file:<path>@<timm model>`."""
    text, separator, architecture = name.removeprefix("file:").rpartition("@")
    if not separator or not text or not architecture:
        raise ValueError(
            f"{name!r} does not say which architecture the file is for; write "
            "file:<path>@<timm model>"
        )
    path = located(text)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    return str(path), architecture


def _build(architecture: str, image_size: int, seed: int, weights: Path | None) -> nn.Module:
    """A timm encoder without classifier: of a file that timm published, or random from a seed."""
    import timm

    # Only models whose parameters depend on the resolution take it as an argument.
    fixed = timm.get_pretrained_cfg_value(architecture, "fixed_input_size")
    options: dict[str, Any] = {"img_size": image_size} if fixed else {}
    overlay = {"file": str(weights), "custom_load": False} if weights else {}
    # Seeding the CPU generator alone leaves those of other devices untouched.
    # The model's own pooling is kept. For the ViT-S/14 that is the class token, which a linear
    # probe prefers to the mean of the patch tokens (photos 78 and 75 %, glyphs 62 and 55 %).
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            encoder: nn.Module = timm.create_model(
                architecture,
                pretrained=weights is not None,
                pretrained_cfg_overlay=overlay,
                num_classes=0,
                **options,
            )
        except Exception as error:
            what = f"loaded from {weights}" if weights else f"built for {image_size} pixels"
            raise ValueError(f"{architecture} cannot be {what}: {error}") from error
    return encoder


def _check_patches(encoder: nn.Module, image_size: int, name: str) -> None:
    """Refuse an image size that does not divide into patches."""
    # timm's transformers cut them in a layer of their own, open_clip's in their first convolution.
    own = encoder.conv1 if hasattr(encoder, "patch_size") and hasattr(encoder, "conv1") else None
    cut = getattr(getattr(encoder, "patch_embed", None), "proj", own)
    side = cut.stride[0] if isinstance(cut, nn.Conv2d) else 1
    if image_size % side:
        below = image_size // side * side
        nearest = f"{below} and {below + side}" if below else f"{side}"
        raise ValueError(
            f"image_size {image_size} is not a multiple of the patch size {side} of {name}; "
            f"the nearest valid sizes: {nearest}"
        )


def _count_features(encoder: nn.Module, image_size: int, name: str) -> int:
    """Encode one blank image."""
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

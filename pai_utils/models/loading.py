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
import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pai_utils.data.images import INTERPOLATIONS, ImageTransform, check_image_size
from pai_utils.models.checkpoints import (
    SUFFIXES,
    CheckpointReport,
    check_digest,
    load_checkpoint,
    load_state,
    sha256_of,
)
from pai_utils.models.clip import CLIP, ImageTower, load_towers
from pai_utils.models.encoders import Backbone, Provenance
from pai_utils.models.published import (
    BACKBONES,
    NOT_APPLICABLE,
    PRESETS,
    TIMM_FILES,
    BackboneSpec,
    PresetSpec,
)
from pai_utils.support.common import may_download, unknown_name
from pai_utils.support.sampling import check_seed


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
              `pai_utils.models.checkpoints` lists: `.safetensors`, `.pth`, `.pt` or `.pth.tar`. The
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
    check_seed(seed)
    if image_size is not None:
        check_image_size(image_size)
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
        provenance = Provenance(source, NOT_APPLICABLE, None)
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
        provenance = Provenance(
            f"random initialisation of {model}, seed {seed}", NOT_APPLICABLE, None
        )
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
    files = [config.hf_hub_filename] if config.hf_hub_filename else TIMM_FILES
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
    known = config["interpolation"] in INTERPOLATIONS
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

"""CLIP's towers through open_clip: image encoders, and heads made of class names alone.

A head that was fitted on labelled images is not zero-shot in the strict sense. CLIP's text tower
gives one without any image: the embedding of sentences that name the class (Radford et al. 2021,
"Learning transferable visual models from natural language supervision", section 3.1).

Needs the optional extra `clip`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pai_utils.data.images import ImageTransform
from pai_utils.models.checkpoints import HUB, obtain_weights
from pai_utils.models.encoders import Backbone, Provenance, frozen_head
from pai_utils.support.common import device_of, may_download, package_folder, unknown_name
from pai_utils.support.stored import digest_of, located

CLIP = "clip:"
"""What the name of a CLIP backbone starts with."""
TEMPLATES = ("a photo of a {}.", "a picture of a {}.", "an image of the {}.")
"""Sentences that name a class; their embeddings are averaged."""
_HUB_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


class ImageTower(nn.Module):
    """Images [N, 3, S, S] to embeddings [N, D] of unit length, in which CLIP compares.

    A transformer's last matrix, a bare parameter [width, D], becomes a linear layer, so that it is
    scored, pruned and repaired as other matrices are; it is taken out of ``visual``.
    """

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual, self.proj = visual, nn.Identity()
        if isinstance(matrix := getattr(visual, "proj", None), nn.Parameter):
            self.proj = nn.utils.skip_init(nn.Linear, *matrix.shape, bias=False)
            self.proj.weight = nn.Parameter(matrix.detach().T.contiguous())
            visual.register_parameter("proj", None)

    def forward(self, images: Tensor) -> Tensor:
        """Embed float images."""
        pooled = self.visual(images)
        # CoCa's towers give their tokens as well.
        pooled = pooled[0] if isinstance(pooled, tuple) else pooled
        return F.normalize(self.proj(pooled), dim=-1)


def load_towers(
    name: str,
    *,
    image_size: int | None = None,
    pretrained: bool = True,
    seed: int = 0,
    download: bool | None = None,
) -> tuple[nn.Module, ImageTransform, Provenance]:
    """Both towers of `clip:<model>@<weights>`, what images they need, and whose weights they have.

    They are on the CPU, in evaluation mode. Arguments and errors are those of `load_backbone`.
    """
    package_folder("open_clip", "pai-utils[clip]", f"{name} is read")
    import open_clip

    model, _, tag = name.removeprefix(CLIP).partition("@")
    if model not in open_clip.list_models():
        raise unknown_name("CLIP model", model, open_clip.list_models())
    options: dict[str, Any] = {}
    path = located(tag) if pretrained else None
    if pretrained and (config := open_clip.get_pretrained_cfg(model, tag)):
        folder, _, file = str(config.get("hf_hub", "")).rpartition("/")
        files = (file,) if file else _HUB_FILES
        addresses = [f"{HUB}{folder}/{file}" for file in files] if folder else [config["url"]]
        path = obtain_weights(f"the weights of {name}", *addresses, download=may_download(download))
        given = {key: config[key] for key in ("mean", "std", "interpolation") if key in config}
        # Some weights were trained with an approximation of GELU that the model does not name.
        approximate = config.get("quick_gelu", False)
        options = {"force_preprocess_cfg": given, "force_quick_gelu": approximate}
    elif path is not None and not (tag and path.is_file()):
        tags = open_clip.list_pretrained_tags_by_model(model)
        raise unknown_name(f"weights in {name}:", tag, [*tags, "<path of a checkpoint>"])
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            towers = open_clip.create_model(
                model,
                pretrained=None if path is None else str(path),
                pretrained_image=False,
                pretrained_text=False,
                force_image_size=image_size,
                weights_only=True,
                **options,
            )
        except Exception as error:
            raise ValueError(
                f"{name} cannot be loaded{f' from {path}' if path else ''}: {error}"
            ) from error
    given = open_clip.get_model_preprocess_cfg(towers)
    size = given["size"][0] if isinstance(given["size"], (tuple, list)) else given["size"]
    transform = ImageTransform(size, given["mean"], given["std"], given["interpolation"])
    if path is None:
        return towers.eval(), transform, Provenance.random(model, seed)
    weights = path.name if Path(tag).name == path.name else f"weights {tag}"
    provenance = Provenance(
        f"CLIP {model} through open_clip; {weights}",
        "MIT" if tag == "openai" else "unknown",
        f"sha256:{digest_of(path)}",
    )
    return towers.eval(), transform, provenance


def zero_shot_head(
    backbone: Backbone,
    class_names: Sequence[str],
    templates: Sequence[str] = TEMPLATES,
    *,
    download: bool | None = None,
) -> nn.Linear:
    """Make a head of class names, with CLIP's text tower; no image is looked at.

    ``templates`` are sentences with `{}` in the place of the class name. The frozen head is on the
    encoder's device; its logits are CLIP's scaled cosine similarities.

    Raises:
        ValueError: another kind of backbone or one without pre-training, no class names or
            templates, names that repeat, or a template without `{}`.
        ModuleNotFoundError: the model's tokenizer needs transformers, which is not installed.
        FileNotFoundError: its tokenizer is not on this computer and may not be fetched.
        ConnectionError: it cannot be fetched.
    """
    if not backbone.name.startswith(CLIP) or backbone.provenance.checksum is None:
        raise ValueError(
            f"{backbone.name} has no text tower to make a head of class names; load a pre-trained "
            "clip:<model>@<weights>, or fit a head with fit_head"
        )
    if not class_names or len(set(class_names)) < len(class_names):
        raise ValueError(f"class names must be given and differ, got {list(class_names)}")
    if not templates or not all("{}" in template for template in templates):
        raise ValueError(f"templates need {{}} where the class name goes, got {list(templates)}")
    import open_clip

    architecture = backbone.name.removeprefix(CLIP).partition("@")[0]
    # Most models read text with the tokenizer that open_clip brings.
    published = open_clip.get_model_config(architecture)["text_cfg"].get("hf_tokenizer_name")
    if published:
        package_folder("transformers", "transformers", f"{backbone.name} reads text")
        what, address = f"the tokens of {backbone.name}", f"{HUB}{published}/tokenizer_config.json"
        obtain_weights(what, address, download=may_download(download))
    tokenizer = open_clip.get_tokenizer(architecture)
    towers, _, provenance = load_towers(backbone.name, download=download)
    if provenance != backbone.provenance:
        raise ValueError(f"the file of {backbone.name} changed since it was loaded; load it again")
    model: Any = towers
    with torch.inference_mode():
        embeddings = open_clip.build_zero_shot_classifier(model, tokenizer, class_names, templates)
        weight = model.logit_scale.exp() * embeddings.T
        bias = getattr(model, "logit_bias", None)
        bias = torch.zeros(len(weight)) if bias is None else bias.expand(len(weight))
    return frozen_head(weight, bias).to(device_of(backbone))

"""Weights that are published: those in installed packages, and those to be fetched."""

from __future__ import annotations

import importlib.metadata
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pai_utils.data.images import ImageTransform
from pai_utils.models.checkpoints import (
    load_checkpoint,
    load_state,
    obtain_weights,
    package_of,
    read_checkpoint,
)
from pai_utils.models.encoders import Provenance
from pai_utils.support.stored import digest_of

Fill = Callable[[nn.Module, Path, str], str | None]
"""Loads a file into an encoder of an architecture; may say what the file held."""


@dataclass(frozen=True)
class BackboneSpec:
    """A backbone and the file of its weights, as in `published.toml`."""

    description: str
    architecture: str  #: timm model name
    transform: ImageTransform  #: preprocessing at the default size, as the publisher evaluates
    licence: str
    addresses: tuple[str, ...]
    """Of the same weights in one file or several: ``package:<distribution>/<path>``,
    ``hub:<model>/<file>``, a URL or the path of a local file."""
    digest: str | None = None  #: the publisher's, or its first digits, as `check_digest` takes it
    fill: Fill | None = load_checkpoint  #: `None` if only timm itself can

    @property
    def package(self) -> str:
        """The distribution that ships the file; empty if none does."""
        return package_of(self.addresses[0])

    def obtain(self, name: str, *, download: bool) -> Path:
        """Find and check the file of the backbone `name`, or fetch it, by `obtain_weights`."""
        what = f"the weights of {name}"
        return obtain_weights(what, *self.addresses, download=download, digest=self.digest)

    def provenance(self, path: Path | None, seed: int) -> Provenance:
        """Say where weights come from: of a file, or without one of a seed."""
        if path is None:
            return Provenance.random(self.architecture, seed)
        file = path.name
        if self.package:
            version = importlib.metadata.version(self.package)
            file = f"package {self.package} {version}, file {file}"
        elif str(path) not in self.addresses:  # the folder of a local file is nobody else's
            file += f" from {next(place for place in self.addresses if place.endswith(file))}"
        digest = self.digest if self.package else digest_of(path)
        return Provenance(f"{self.description}; {file}", self.licence, f"sha256:{digest}")


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
    # fine-tuned with an interpolation that does not antialias, as timm's does by default.
    state["pos_embed"] = resample_abs_pos_embed(
        torch.cat([tensors["onnx::Concat_1957"], tensors["onnx::Reshape_1962"]], dim=1),
        new_size=list(encoder.get_submodule("patch_embed").grid_size),  # type: ignore[arg-type]
        antialias=False,
    )
    load_state(encoder, state, path.name, architecture)


_LAYOUTS: dict[str, Fill] = {
    "as_usual": load_checkpoint,
    "in_order": _fill_in_order,
    "from_onnx": _fill_from_onnx,
}


def _read_spec(entry: dict[str, Any]) -> BackboneSpec:
    mean, std, addresses = (tuple(entry.pop(key)) for key in ("mean", "std", "addresses"))
    size, interpolation = entry.pop("image_size"), entry.pop("interpolation", "bicubic")
    transform = ImageTransform(size, mean, std, interpolation)
    fill = _LAYOUTS[entry.pop("layout", "as_usual")]
    return BackboneSpec(transform=transform, addresses=addresses, fill=fill, **entry)


_FACTS = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
BACKBONES = {name: _read_spec(entry) for name, entry in _FACTS["shipped"].items()}
"""Backbones whose weights come with the environment, by name."""
PRESETS = {name: _read_spec(entry) for name, entry in _FACTS["fetched"].items()}
"""Backbones whose weights are fetched on request, by name."""

"""Encoders and classifiers: modules from images to features, and to logits."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from pai_utils.curvature.calls import CONVOLUTIONS, TRANSPOSED, Call, Calls
from pai_utils.data.images import ImageTransform
from pai_utils.support.common import copied
from pai_utils.support.contract import unwrapped


@dataclass(frozen=True)
class Provenance:
    """Where the weights of a backbone come from."""

    source: str  #: package and file, hub model, local file, or the seed of random weights
    licence: str  #: of the weights, as their publisher states it
    checksum: str | None  #: ``sha256:`` and the digest of their file; `None` if they are random

    @classmethod
    def random(cls, architecture: str, seed: int) -> Provenance:
        """That of weights drawn from a seed."""
        return cls(f"random initialisation of {architecture}, seed {seed}", "not applicable", None)


class Backbone(nn.Module):
    """An image encoder: float images [N, 3, S, S] to features [N, feature_dim].

    `name` is the one it was loaded by, `transform` the preprocessing that its weights expect.
    `checkpoint` says what the file of the weights held and what was left out of it; `None` unless
    they come from a checkpoint. Parameters are named `encoder.*`.
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        name: str,
        feature_dim: int,
        transform: ImageTransform,
        provenance: Provenance,
        checkpoint: str | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.name, self.feature_dim, self.transform = name, feature_dim, transform
        self.provenance, self.checkpoint = provenance, checkpoint
        self.train(encoder.training)

    @property
    def image_size(self) -> int:
        """Side of the images it takes, in pixels."""
        return self.transform.image_size

    def forward(self, images: Tensor) -> Tensor:
        """Encode images; a ValueError refuses another shape, or what is not normalised."""
        size = self.image_size
        if images.shape[1:] != (3, size, size) or not images.is_floating_point():
            raise ValueError(
                f"{self.name} takes normalised float images [N, 3, {size}, {size}], got "
                f"{images.dtype} {list(images.shape)}; apply backbone.transform"
            )
        features: Tensor = self.encoder(images)
        return features


class Classifier(nn.Module):
    """A backbone with a frozen linear head: float images [N, 3, S, S] to logits [N, classes].

    Freezes `head` in place, and keeps the backbone's mode (training or evaluation).

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


def image_shape(model: nn.Module, size: int | Sequence[int] | None = None) -> list[int]:
    """Channels, height and width of the images that a model takes.

    ``size`` is their side, (height, width) or all three, by default the model's or its backbone's
    ``image_size``. Channels that are not told are those of the first convolution, or else three.

    Raises:
        ValueError: if no size is known, or it is not positive.
    """
    if size is None:
        inner = unwrapped(model)
        size = getattr(getattr(inner, "backbone", inner), "image_size", None)
    sizes = list(size) if isinstance(size, Sequence) else [size or 0] * 2
    if len(sizes) == 2:
        first = next((m for m in model.modules() if isinstance(m, _ConvNd)), None)
        sizes.insert(0, 3 if first is None else first.in_channels)
    if len(sizes) != 3 or min(sizes) < 1:
        raise ValueError(
            f"image_size={size} must be a side, (height, width) or (channels, height, width), in "
            "pixels; a model that has no image_size of its own needs it"
        )
    return sizes


def frozen_head(weight: Tensor, bias: Tensor) -> nn.Linear:
    """A head on the CPU with copies of a weight [classes, features] and a bias [classes]."""
    classes, features = weight.shape
    head: nn.Linear = nn.utils.skip_init(nn.Linear, features, classes, dtype=weight.dtype)
    head.load_state_dict({"weight": weight, "bias": bias})
    return head.requires_grad_(False).eval()


_WEIGHTS: dict[type[nn.Module], tuple[str, ...]] = {
    _ConvNd: ("weight",),
    nn.Linear: ("weight",),
    nn.MultiheadAttention: ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"),
}


def prunable_parameters(
    model: nn.Module,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = (),
) -> list[str]:
    """Names of the weights that may be pruned, in the order of `model.named_parameters()`.

    These are the weights of convolutions (any dimension, transposed too) and linear layers, and
    the input projections of `nn.MultiheadAttention`. Of a `Classifier` the head is left out; any
    other module counts whole. A weight shared by two layers is listed once. `include` and
    `exclude` choose among them, as in `select_parameters`.

    Raises:
        ValueError: a chosen weight is computed from other parameters (under a parametrisation,
            weight normalisation or `torch.nn.utils.prune`), or as `select_parameters`.

    Examples:
        >>> from torch import nn
        >>> import pai_utils as pai
        >>> layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2)
        >>> pai.prunable_parameters(nn.Sequential(*layers))
        ['0.weight', '3.weight']
    """
    model = unwrapped(model)
    own, prefix = (model.backbone, "backbone") if isinstance(model, Classifier) else (model, "")
    stored = {
        f"{path}.{weight}" if path else weight: weight in module._parameters
        for path, module in own.named_modules(prefix=prefix)
        for kind, weights in _WEIGHTS.items()
        for weight in (weights if isinstance(module, kind) else ())
    }
    listed = [name for name, _ in model.named_parameters() if stored.get(name)]
    computed = [name for name, found in stored.items() if not found]
    chosen = select_parameters([*listed, *computed], include, exclude)
    for name in set(computed).intersection(chosen):
        raise ValueError(
            f"{name!r} is computed from other parameters, so that no mask can be applied to it: "
            "leave it out (exclude=), or make it a parameter again (torch.nn.utils.prune.remove, "
            "remove_weight_norm, parametrize.remove_parametrizations)"
        )
    return chosen


def check_masks_hold(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse weights of layers that apply something else, not zero where the weight is.

    Convolutions that standardise their weights do, and adapters that add to them. Layers of torch
    itself are known to apply their weights; others are tried on one input.
    """
    for name in names:
        path, _, kind = name.rpartition(".")
        layer = model.get_submodule(path)
        known = type(layer).__module__.startswith("torch.nn.modules.")
        if kind == "weight" and not known and not _applies_zeros(layer):
            raise ValueError(
                f"no mask holds in {name!r}: what {type(layer).__name__} applies is computed from "
                "this weight, and not zero where it is zero (standardised, say); leave it out "
                "(exclude=), or put a plain layer in its place"
            )


def _applies_zeros(layer: Any) -> bool:
    """Whether a layer hands zeros to torch where its weight has them, as far as a try can tell."""
    trial = torch.rand(layer.weight.shape, generator=torch.Generator().manual_seed(0))
    trial = trial.where(trial > 0.5, 0).to(layer.weight.device)
    applied: list[Tensor] = []

    def look(call: Call) -> Any:
        applied.append(call["weight"])
        return call.run()

    # Of a layer of another kind, or of several inputs, it cannot tell.
    handlers = dict.fromkeys((F.linear, *CONVOLUTIONS, *TRANSPOSED), look)
    with suppress(Exception), torch.no_grad(), Calls(handlers):
        tried = copied(layer).float()
        tried.weight.copy_(trial)
        if isinstance(layer, nn.Linear):
            shape = [layer.in_features]
        else:
            sides = zip(layer.kernel_size, layer.dilation, strict=True)
            shape = [layer.in_channels, *(kernel * dilation for kernel, dilation in sides)]
        tried.forward(trial.new_ones(1, *shape))
    alike = (weight for weight in applied if weight.shape == trial.shape)
    return not any(weight[trial == 0].any() for weight in alike)


def select_parameters(
    names: Sequence[str],
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = (),
) -> list[str]:
    """Choose parameters by patterns of their names, as of files in a shell (``fnmatch``).

    A pattern matches a parameter (``backbone.encoder.blocks.0.attn.qkv.weight``) or a module and so
    all in it (``backbone.encoder.blocks.0``, ``*.attn``); ``*`` crosses dots. One of ``include``
    must match (``None``: all do), and none of ``exclude``; each is one pattern or several.

    Raises:
        ValueError: if a pattern matches none of the names, or no name is left.

    Examples:
        >>> import pai_utils as pai
        >>> names = ["blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight", "blocks.1.mlp.weight"]
        >>> pai.select_parameters(names, include="*.mlp", exclude="blocks.1")
        ['blocks.0.mlp.fc1.weight']
    """
    chosen = set(names) if include is None else _matching(names, include)
    chosen -= _matching(names, exclude)
    if names and not chosen:
        raise ValueError(f"include={include!r} and exclude={exclude!r} leave no weight to prune")
    return [name for name in names if name in chosen]


def _matching(names: Sequence[str], patterns: str | Sequence[str]) -> set[str]:
    matched = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        # What matches a module's name matches the start of its weights' names.
        found = {n for n in names if any(fnmatchcase(n, p) for p in (pattern, f"{pattern}.*"))}
        if not found:
            near = difflib.get_close_matches(pattern.strip("*."), names, n=3, cutoff=0.4)
            raise ValueError(
                f"no prunable weight or module matches {pattern!r}; names near it: "
                + ", ".join(near or names[:3])
            )
        matched |= found
    return matched

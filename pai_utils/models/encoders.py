"""Encoders and classifiers: modules from images to features, and to logits."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from pai_utils.data.images import ImageTransform
from pai_utils.models.checkpoints import CheckpointReport


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

    `name` is the one it was loaded by, `transform` the preprocessing that its weights expect and
    `provenance` where they come from. `checkpoint` says what the file of the weights held and what
    was left out of it; `None` unless they come from a checkpoint. Parameters are named `encoder.*`.
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
        self.name, self.feature_dim, self.transform = name, feature_dim, transform
        self.provenance, self.checkpoint = provenance, checkpoint
        self.train(encoder.training)

    @property
    def image_size(self) -> int:
        """Side of the images it takes, in pixels."""
        return self.transform.image_size

    def forward(self, images: Tensor) -> Tensor:
        """Encode images; a ValueError says if they have another shape or are not floats."""
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


def frozen_head(weight: Tensor, bias: Tensor) -> nn.Linear:
    """A head on the CPU with copies of a weight [classes, features] and a bias [classes]."""
    classes, features = weight.shape
    head: nn.Linear = nn.utils.skip_init(nn.Linear, features, classes, dtype=weight.dtype)
    head.load_state_dict({"weight": weight, "bias": bias})
    return head.requires_grad_(False).eval()


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
    own, prefix = (model.backbone, "backbone.") if isinstance(model, Classifier) else (model, "")
    names: set[str] = set()
    for path, module in own.named_modules():
        kinds: tuple[str, ...] = ()
        if isinstance(module, (_ConvNd, nn.Linear)):
            kinds = ("weight",)
            if module._parameters.get("weight") is None:
                raise ValueError(
                    f"the weight of {path or 'the model'} is not a plain parameter; remove its "
                    "parametrisation first"
                )
        elif isinstance(module, nn.MultiheadAttention):
            kinds = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        names |= {f"{prefix}{path}.{kind}" if path else prefix + kind for kind in kinds}
    return [name for name, _ in model.named_parameters() if name in names]

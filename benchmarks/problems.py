"""What is measured on: networks with random weights, random images, and the unit of cost.

The unit, FB, is one forward and one backward pass of the mean cross-entropy of the same images:
the gradient of every parameter of the network in evaluation mode.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from pai_utils.models.encoders import prunable_parameters
from pai_utils.support.common import unknown_name
from pai_utils.support.contract import WholeBatches

CLASSES = 1000
LAYOUTS = ("contiguous", "channels-last images", "channels-last images and weights")


@dataclass(frozen=True)
class Network:
    """How to build one of the networks, and at what size of image it is measured."""

    timm_name: str
    image_size: int
    # Those without which random weights would leave residual branches at zero, among others.
    options: tuple[tuple[str, Any], ...] = ()
    convolutional: bool = True


NETWORKS: dict[str, Network] = {
    "resnet18": Network("resnet18", 96, (("zero_init_last", False),)),
    "resnet50": Network("resnet50", 96, (("zero_init_last", False),)),
    "efficientnet_lite0": Network("tf_efficientnet_lite0", 96),
    "convnext_tiny": Network("convnext_tiny", 96, (("ls_init_value", 1.0),)),
    # 65 tokens: fewer than at 224 px, so that per-sample squares weigh more against products.
    "vit_small_patch16_224": Network(
        "vit_small_patch16_224", 128, (("img_size", 128),), convolutional=False
    ),
}


class Images(WholeBatches):
    """Images and labels in memory, read in whole batches."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])

    def batch(self, indices: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Images ``[B, 3, H, W]`` and labels ``[B]`` at these positions."""
        return self.images[indices], self.labels[indices]


@dataclass(frozen=True)
class Problem:
    """A network in evaluation mode, and one batch of images with labels."""

    model: nn.Module
    images: Tensor  # [N, 3, H, W]
    labels: Tensor  # [N]
    names: list[str]  # the prunable parameters: what every contender is asked for

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The prunable parameters by name."""
        parameters = dict(self.model.named_parameters())
        return {name: parameters[name] for name in self.names}

    @property
    def data(self) -> Images:
        """The same batch as a dataset, on the CPU as datasets are."""
        return Images(self.images.cpu(), self.labels.cpu())

    @property
    def device(self) -> torch.device:
        """Where the network and the images are."""
        return self.images.device

    @property
    def memory_unit(self) -> None:
        """Memory is given in multiples of that of the unit of cost."""

    @property
    def loss(self) -> Tensor:
        """The mean cross-entropy, with its graph."""
        return F.cross_entropy(self.model(self.images), self.labels)

    def in_layout(self, layout: str) -> Problem:
        """The same in another memory layout, of :data:`LAYOUTS`.

        Raises:
            ValueError: if there is no such layout.
        """
        if layout not in LAYOUTS:
            raise unknown_name("layout", layout, LAYOUTS)
        # A network of its own, since contenders hang hooks on it.
        model = copy.deepcopy(self.model)
        if layout == "contiguous":
            return replace(self, model=model, images=self.images.contiguous())
        images = self.images.contiguous(memory_format=torch.channels_last)
        if layout == "channels-last images and weights":
            for parameter in model.parameters():
                if parameter.dim() == 4:
                    parameter.data = parameter.contiguous(memory_format=torch.channels_last)
        return replace(self, model=model, images=images)

    def to(self, target: torch.device | torch.dtype) -> Problem:
        """A copy on another device or in another floating-point type."""
        model = copy.deepcopy(self.model).to(target)
        labels = self.labels.to(target) if isinstance(target, torch.device) else self.labels
        return replace(self, model=model, images=self.images.to(target), labels=labels)

    def forward_backward(self) -> Callable[[], object]:
        """The unit of cost: the gradient of the mean loss for every parameter."""
        parameters = list(self.model.parameters())
        return lambda: torch.autograd.grad(self.loss, parameters)


def build(network: Network, count: int, *, classes: int = CLASSES, seed: int = 0) -> Problem:
    """A network with random weights and ``count`` random images, on the CPU.

    BatchNorm takes its statistics from these images, since with its initial ones the activations
    of a deep residual network grow from block to block until the softmax saturates.
    """
    # timm draws weights from the global generator; this process has no other use for it.
    torch.manual_seed(seed)
    options = dict(network.options)
    model = timm.create_model(network.timm_name, num_classes=classes, **options)
    side = network.image_size
    images = torch.randn(count, 3, side, side)
    labels = torch.randint(0, classes, (count,))
    return Problem(_settled(model, images), images, labels, prunable_parameters(model))


def _settled(model: nn.Module, images: Tensor) -> nn.Module:
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if norms:
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = None  # the plain average over the batches seen
        with torch.no_grad():
            model.train()(images)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    return model.eval()

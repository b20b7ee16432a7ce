"""What data and models must be for results to be right: said, checked and adapted here alone.

*Data* have a length and items by number. An item is a pair ``(image, label)``: a tensor or array,
and an integer of any width.

*A model* gives a tensor ``[N, C]`` for a batch of images, logits or features, wherever these are
looked at. While the library runs a model, each forward gets a copy of the images, in the model's
own type of number, so that one that works in place changes nothing that is looked at again.

*Wrappers* are looked through: results are those of the module inside, under its own names.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sized
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, default_collate

_ADAPT = (
    "data has a length and, by number, pairs (image, label) of a tensor and an integer; adapt "
    "other data, as in [(item['image'], int(item['label'])) for item in data]"
)


class WholeBatches(Dataset[tuple[Tensor, int]]):
    """Data that reads many items at once faster than one by one."""

    def batch(self, indices: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Images ``[B, 3, H, W]`` and int64 labels ``[B]`` at positions ``[B]``."""
        raise NotImplementedError


def count_items(data: Any) -> int:
    """How many items data has; refuses what is no collection of numbered items, or empty."""
    listed = isinstance(data, Sized) and hasattr(data, "__getitem__")
    if not listed or isinstance(data, (IterableDataset, Mapping)):
        inside = "; pass its .dataset" if hasattr(data, "dataset") else ""
        raise ValueError(f"the data is a {type(data).__name__}{inside}: {_ADAPT}")
    if len(data) == 0:
        raise ValueError("the dataset is empty; at least one sample is needed")
    return len(data)


def read_items(data: Any, indices: Iterable[int]) -> tuple[Tensor, Tensor]:
    """Images ``[B, ...]`` and int64 labels ``[B]`` of items that are pairs, read one by one."""
    images, labels = [], []
    for index in indices:
        item = data[index]
        pair = item if isinstance(item, (tuple, list)) else (item,)
        said = ", ".join(map(_described, pair))
        if len(pair) != 2 or not isinstance(pair[0], (Tensor, np.ndarray)):
            raise ValueError(f"item {index} of the data is ({said}): {_ADAPT}")
        try:
            label = operator.index(pair[1]) if np.ndim(pair[1]) == 0 else None
        except TypeError:
            label = None
        if label is None:
            raise ValueError(
                f"item {index} of the data is ({said}): a label is one integer, the number of the "
                "class; adapt others, as in [(image, int(label)) for image, label in data], or "
                "int(label.argmax()) of one-hot labels"
            )
        images.append(pair[0])
        labels.append(label)
    return default_collate(images), torch.tensor(labels)


def _described(value: object) -> str:
    name = type(value).__name__
    if isinstance(value, (Tensor, np.ndarray)):
        return f"{name} {value.dtype} {list(value.shape)}"
    return f"{name} of {list(value)}" if isinstance(value, Mapping) else name


def check_labels(labels: Tensor, classes: int) -> None:
    """Refuse labels that a model with so many classes cannot give."""
    lowest, highest = (int(bound) for bound in torch.aminmax(labels))
    if lowest < 0 or highest >= classes:
        raise ValueError(
            f"the data has a label {lowest if lowest < 0 else highest} but the model's classes are "
            f"0 to {classes - 1}; the head was made for another task"
        )


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside ``DataParallel``, ``DistributedDataParallel`` and ``torch.compile``."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif "_orig_mod" in model._modules:  # only what `torch.compile` returns has it
            model = model.get_submodule("_orig_mod")
        else:
            return model


def hold_(model: nn.Module, *, any_output: bool = False) -> nn.Module:
    """Hold a model to the contract from now on, by hooks on its forward, and return it.

    A forward then raises a ``ValueError`` for images that are whole numbers, and for an output that
    is no tensor ``[N, C]``, unless ``any_output`` will do.
    """
    types = dict.fromkeys(p.dtype for p in model.parameters() if p.is_floating_point())

    def own_images(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        images, *others = args
        if not images.is_floating_point():
            raise ValueError(
                f"the images are {images.dtype}; give floats as the model expects them, by "
                "backbone.transform, say, or as in image / 255 or image.float()"
            )
        cast = bool(types) and images.dtype not in types
        return images.to(next(iter(types))) if cast else images.clone(), *others

    def check_output(_: nn.Module, args: object, output: object) -> None:
        if not isinstance(output, Tensor) or output.dim() != 2:
            raise ValueError(
                f"the model gives {_described(output)}, not logits [N, C]; wrap it in a module "
                "whose forward picks them: def forward(self, x): return self.model(x)[0]  (or "
                '["logits"], .logits, .flatten(1))'
            )

    model.register_forward_pre_hook(own_images, prepend=True)
    if not any_output:
        model.register_forward_hook(check_output)
    return model

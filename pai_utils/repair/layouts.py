"""Layers as linear maps of rows, which a least-squares solve works on."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def is_plain(module: nn.Module) -> bool:
    """Whether it applies its weight as it is; convolutions that standardise theirs do not."""
    from timm.layers.conv2d_same import Conv2dSame
    from timm.layers.linear import Linear

    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv2dSame, Linear)
    return type(module).forward in {kind.forward for kind in kinds}


def is_norm(module: nn.Module) -> bool:
    """Whether it is a BatchNorm, or a LayerNorm over channels alone."""
    if isinstance(module, nn.LayerNorm):
        return len(module.normalized_shape) == 1
    return isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d))


def has_scale_and_shift(module: nn.Module) -> bool:
    """Whether a normalisation has both, so that it can give its channels any moments."""
    return all(module._parameters.get(name) is not None for name in ("weight", "bias"))


def keeps_its_scale(module: nn.Module) -> bool:
    """Whether it is a normalisation with a scale that ``moments`` does not repair."""
    scale = module._parameters.get("weight")
    if scale is None or (is_norm(module) and has_scale_and_shift(module)):
        return False
    # Normalisations share no class, and many are timm's own or another package's.
    named = scale.ndim == 1 and "norm" in type(module).__name__.lower()
    return named or isinstance(module, nn.LayerNorm)


def channel_axis(module: nn.Module, values: Tensor) -> int:
    """Where a layer's or normalisation's channels are."""
    from timm.layers.norm import LayerNorm2d

    last = isinstance(module, (nn.Linear, nn.LayerNorm)) and not isinstance(module, LayerNorm2d)
    return values.ndim - 1 if last else 1


def channels_last(values: Tensor, module: nn.Module) -> Tensor:
    """Values ``[rows, channels]``."""
    return values.movedim(channel_axis(module, values), -1).flatten(0, -2)


def standardised(module: Any, inputs: Tensor) -> Tensor:
    """What a normalisation multiplies by its scale."""
    if isinstance(module, nn.LayerNorm):
        axis = channel_axis(module, inputs)
        moved = inputs.movedim(axis, -1)
        return F.layer_norm(moved, module.normalized_shape, eps=module.eps).movedim(-1, axis)
    return F.batch_norm(inputs, module.running_mean, module.running_var, eps=module.eps)


def rows_of(module: Any, inputs: Tensor, chosen: Tensor) -> Tensor:
    """What the chosen rows of a layer's output are computed from: ``[groups, R, K]``."""
    if isinstance(module, nn.Linear):
        return inputs.flatten(0, -2)[chosen][None]
    patches = _padded(module, inputs)
    shapes = zip(module.kernel_size, module.stride, module.dilation, strict=True)
    for axis, (kernel, stride, dilation) in enumerate(shapes, start=2):
        patches = patches.unfold(axis, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    patches = patches.movedim(1, inputs.ndim - 1)  # [N, *sides, channels, *kernel], all views
    places = torch.unravel_index(chosen, patches.shape[: inputs.ndim - 1])
    return patches[places].reshape(len(chosen), module.groups, -1).transpose(0, 1)


def _padded(module: Any, inputs: Tensor) -> Tensor:
    """Images with the margin that the convolution adds."""
    from timm.layers.conv2d_same import Conv2dSame
    from timm.layers.padding import pad_same

    if isinstance(module, Conv2dSame):
        kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
        return cast(Tensor, pad_same(inputs, list(kernel), list(stride), list(dilation)))
    margins = module._reversed_padding_repeated_twice  # also of padding="same"
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return F.pad(inputs, margins, mode=mode)


def by_group(module: Any, weight: Tensor) -> Tensor:
    """A weight as ``[groups, outputs of one, inputs of one]``."""
    groups = 1 if isinstance(module, nn.Linear) else module.groups
    return weight.reshape(groups, weight.shape[0] // groups, -1)

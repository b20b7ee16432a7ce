"""How layers see their inputs as rows and their outputs as columns: what a solve works on."""

from __future__ import annotations

import math
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


def keeps_its_scale(module: nn.Module) -> bool:
    """Whether it is a normalisation with a scale that ``moments`` does not repair."""
    scale = module._parameters.get("weight")
    if scale is None:
        return False
    if is_norm(module):
        return module._parameters["bias"] is None
    if isinstance(module, nn.LayerNorm):
        return True
    # Normalisations share no class, and many are timm's own or another package's.
    return scale.ndim == 1 and "norm" in type(module).__name__.lower()


def channel_axis(module: nn.Module, values: Tensor) -> int:
    """Where a layer's or normalisation's channels are."""
    last = isinstance(module, nn.Linear) or (
        isinstance(module, nn.LayerNorm) and not _is_channels_first(module)
    )
    return values.ndim - 1 if last else 1


def _is_channels_first(module: nn.Module) -> bool:
    """Whether it is timm's LayerNorm over the channels of feature maps."""
    from timm.layers.norm import LayerNorm2d

    return isinstance(module, LayerNorm2d)


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


def count_rows(module: Any, inputs: Tensor) -> int:
    """Rows of a layer's output."""
    if isinstance(module, nn.Linear):
        return inputs.numel() // inputs.shape[-1]
    return len(inputs) * math.prod(_output_sides(module, inputs))


def _output_sides(module: Any, inputs: Tensor) -> list[int]:
    padded = _padded(module, inputs)
    return [
        (side - dilation * (kernel - 1) - 1) // stride + 1
        for side, kernel, stride, dilation in zip(
            padded.shape[2:], module.kernel_size, module.stride, module.dilation, strict=True
        )
    ]


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


def rows_of(module: Any, inputs: Tensor, chosen: Tensor) -> Tensor:
    """What the chosen outputs are computed from: ``[groups, R, K]``."""
    if isinstance(module, nn.Linear):
        return inputs.flatten(0, -2)[chosen][None]
    sides = _output_sides(module, inputs)
    padded = _padded(module, inputs)
    image = chosen // math.prod(sides)
    rest = chosen % math.prod(sides)
    index: list[Tensor] = []
    for axis in reversed(range(len(sides))):
        first = rest % sides[axis] * module.stride[axis]
        rest = rest // sides[axis]
        taps = torch.arange(module.kernel_size[axis], device=chosen.device) * module.dilation[axis]
        shape = [-1, *(1 for _ in sides)]
        shape[axis + 1] = len(taps)
        index.insert(0, first.view(-1, *(1 for _ in sides)) + taps.view([1, *shape[1:]]))
    where = image.view(-1, *(1 for _ in sides))
    # The channels' slice between advanced indices comes last: [R, *kernel, channels].
    at: tuple[Any, ...] = (where, slice(None), *index)
    patches = padded[at].movedim(-1, 1)
    by_group = patches.reshape(len(chosen), module.groups, -1)
    return by_group.transpose(0, 1)


def by_group(module: Any, weight: Tensor) -> Tensor:
    """A weight as ``[groups, outputs of one, inputs of one]``."""
    groups = 1 if isinstance(module, nn.Linear) else module.groups
    return weight.reshape(groups, weight.shape[0] // groups, -1)

"""Calls of layers and normalisations: their parameters, and their inputs as rows.

Whatever module makes a call, and however that module was called itself, torch's function gets the
weight, and has its channels at one place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pai_utils.curvature import calls
from pai_utils.curvature.calls import Call, Calls, Geometry

NORMS = (F.batch_norm, F.layer_norm)
_LAYERS = (F.linear, F.conv1d, F.conv2d, F.conv3d)


def watching(model: nn.Module, names: Sequence[str], visit: Callable[[str, Call], Tensor]) -> Calls:
    """As of calls; of layers, and of normalisations over channels if a weight has one dimension."""
    weights = {name: model.get_parameter(name) for name in names}
    return calls.watching(weights, (*_LAYERS, *NORMS), visit)


def channel_axis(call: Call) -> int:
    """Where the channels of what a call gives are, from the end."""
    if call.function is F.batch_norm:
        return 1 - int(call["input"].ndim)
    return -1 if call.function is F.layer_norm else 1 - int(call["weight"].ndim)


def channels_last(values: Tensor, axis: int) -> Tensor:
    """Values ``[rows, channels]``."""
    moved = values.movedim(axis, -1)
    return moved.reshape(-1, moved.shape[-1])


def rows_of(call: Call, chosen: Tensor) -> Tensor:
    """What the chosen rows of a layer's output are computed from: ``[groups, R, K]``."""
    if call.function is F.linear:
        return channels_last(call["input"], -1)[chosen][None]
    patches, sides = _patches(call, _batch(call)), call["weight"].ndim - 2
    places = torch.unravel_index(chosen, patches.shape[: 1 + sides])
    return patches[places].flatten(2).transpose(0, 1)


def mean_row(call: Call) -> Tensor:
    """The mean of what all rows are computed from: ``[groups, K]``, in float64."""
    if call.function is F.linear:
        return channels_last(call["input"], -1).mean(0, dtype=torch.float64)[None]
    # The kernel moves over all samples alike.
    patches = _patches(call, _batch(call).mean(0, keepdim=True, dtype=torch.float64))
    return patches.mean(tuple(range(call["weight"].ndim - 1))).flatten(1)


def _batch(call: Call) -> Tensor:
    inputs: Tensor = call["input"]
    return inputs[None] if inputs.ndim < call["weight"].ndim else inputs


def _patches(call: Call, inputs: Tensor) -> Tensor:
    """A view ``[N, *places, groups, channels, *kernel]``."""
    sides = call["weight"].ndim - 2
    return Geometry.of(call).windows(inputs).movedim((1, 2), (1 + sides, 2 + sides))


def by_group(weight: Tensor, groups: int) -> Tensor:
    """A weight as ``[groups, outputs of one, inputs of one]``."""
    return weight.reshape(groups, weight.shape[0] // groups, -1)

"""Rows and columns of layers."""

from typing import Any

import pytest
import torch
from timm.layers.conv2d_same import Conv2dSame
from torch import nn

from pai_utils.repair.layouts import by_group, channels_last, rows_of


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(5, 4),
        nn.Conv2d(4, 6, 3, padding=1),
        nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(0, 2), dilation=(1, 2)),
        nn.Conv2d(4, 8, 3, groups=4, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 3, (2, 3), padding="same", dilation=(2, 1)),
        Conv2dSame(4, 4, 5, stride=2, groups=2),
        nn.Conv1d(4, 3, 3, stride=2),
        nn.Conv3d(4, 2, 2),
    ],
    ids=str,
)
def test_rows_times_weights_are_the_layers_outputs(layer: Any) -> None:
    shape = {nn.Linear: (2, 3, 5), nn.Conv1d: (2, 4, 9), nn.Conv3d: (2, 4, 3, 5, 4)}
    inputs = torch.randn(shape.get(type(layer), (2, 4, 7, 8)), dtype=torch.float64)
    wanted = channels_last(layer.double()(inputs), layer)
    chosen = torch.tensor([0, 2, len(wanted) - 1])
    x, weight = rows_of(layer, inputs, chosen), by_group(layer, layer.weight)
    found = torch.einsum("grk,gmk->rgm", x, weight).flatten(1) + layer.bias
    torch.testing.assert_close(found, wanted[chosen])

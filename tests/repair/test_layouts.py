"""Rows and columns of layers."""

from typing import Any

import pytest
import torch
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn

from pai_utils.curvature.calls import Call
from pai_utils.repair.layouts import by_group, channel_axis, channels_last, rows_of, watching


@pytest.mark.parametrize("batched", [True, False])
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
def test_rows_times_weights_are_the_layers_outputs(layer: Any, batched: bool) -> None:
    shape = {nn.Linear: (2, 3, 5), nn.Conv1d: (2, 4, 9), nn.Conv3d: (2, 4, 3, 5, 4)}
    inputs = torch.randn(shape.get(type(layer), (2, 4, 7, 8)), dtype=torch.float64)
    if not batched and not isinstance(layer, Conv2dSame):  # which takes batches alone
        inputs = inputs[0]
    chosen = torch.tensor([0, 2])

    def check(name: str, call: Call) -> Tensor:
        output: Tensor = call.run()
        wanted = channels_last(output, channel_axis(call))
        assert wanted.shape[1] == len(layer.weight)
        x = rows_of(call, chosen)
        found = torch.einsum("grk,gmk->rgm", x, by_group(layer.weight, len(x))).flatten(1)
        torch.testing.assert_close(found + layer.bias, wanted[chosen])
        seen.append(name)
        return output

    seen: list[str] = []
    with watching(layer.double(), ["weight"], check):
        layer(inputs)
    assert seen == ["weight"]

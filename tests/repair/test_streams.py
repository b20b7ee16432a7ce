"""Residual streams: which layers end a branch, and where the stream is seen."""

from typing import Any

import pytest
import timm
import torch
from timm.layers.layer_scale import LayerScale
from torch import Tensor, nn

from pai_utils.repair.streams import Residual, find_residuals
from tests.cases import Layers, fingerprint


def tokens() -> Any:
    """A pre-norm block over tokens, with a scale for each channel."""
    scale = LayerScale(6)
    nn.init.uniform_(scale.gamma, 0.5, 2)
    return Layers(
        lambda m, x: x + m.scale(m.down(torch.tanh(m.up(m.norm(x))))),
        norm=nn.LayerNorm(6), up=nn.Linear(6, 9), down=nn.Linear(9, 6), scale=scale,
    )  # fmt: skip


def meeting(second_first: bool) -> Any:
    """Two branches that meet, in either order, then one added in place to what ReLU changed."""

    def call(m: Any, x: Tensor) -> Tensor:
        long, short = m.long_norm(m.long(x)), m.short(x)
        y: Tensor = (short + long if second_first else long + short).relu_()
        out: Tensor = m.last(y)
        out += y
        return out

    return Layers(
        call,
        long=nn.Conv2d(3, 4, 3, padding=1, bias=False), long_norm=nn.BatchNorm2d(4).eval(),
        short=nn.Conv2d(3, 4, 1, bias=False), last=nn.Conv2d(4, 4, 3, padding=1),
    )  # fmt: skip


def weights_of(model: nn.Module) -> list[str]:
    kinds = (nn.Conv2d, nn.Linear, nn.LayerNorm, nn.BatchNorm2d)
    return [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, kinds)]


def found_in(model: nn.Module, images: Tensor) -> dict[str, Residual]:
    before = fingerprint(model)
    found = find_residuals(model, weights_of(model), images)
    assert fingerprint(model) == before
    return {name.removesuffix(".weight"): residual for name, residual in found.items()}


def test_a_layer_that_is_used_twice_ends_no_branch() -> None:
    block = tokens()
    again = Layers(lambda m, x: m.block(m.block(x)), block=block)
    assert found_in(block, torch.randn(3, 5, 6))
    assert not found_in(again, torch.randn(3, 5, 6))


@pytest.mark.parametrize("second_first", [True, False])
def test_of_two_branches_the_later_one_is_found(second_first: bool) -> None:
    found = found_in(meeting(second_first), torch.randn(4, 3, 8, 8))
    assert {name: (r.place, r.side) for name, r in found.items()} == {
        "short": ("long_norm", "output"),
        "last": ("last", "input"),
    }


def test_a_stream_that_was_changed_since_it_was_seen_is_not_taken() -> None:
    # A layer's output is added to its input, which no module ever saw as it is by then.
    model = Layers(lambda m, x: m.layer(x) + x.mul_(2), layer=nn.Linear(6, 6))
    assert not found_in(model, torch.randn(7, 6))


@pytest.mark.parametrize(
    ("architecture", "ends"),
    [
        ("test_vit", ("attn.proj", "mlp.fc2")),
        ("convnext_atto", ("mlp.fc2",)),
        ("mobilenetv2_035", ("conv_pwl", "bn3")),
    ],
)
def test_every_block_of_an_encoder_ends_in_a_branch(
    architecture: str, ends: tuple[str, ...]
) -> None:
    torch.manual_seed(0)
    model = timm.create_model(architecture, pretrained=False).eval()
    found = found_in(model, torch.randn(2, 3, 160, 160))
    assert found
    assert {next(e for e in ends if name.endswith(e)) for name in found} == set(ends)

"""Residual streams: which layers end a branch, and where the stream is seen."""

from typing import Any

import pytest
import timm
import torch
from timm.layers.layer_scale import LayerScale
from torch import Tensor, nn

from pai_utils.repair.streams import Residual, find_residuals, shown
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


def test_a_branch_is_found_through_the_scale_of_its_channels() -> None:
    block = tokens().double()
    (name, residual), *others = found_in(block, torch.randn(3, 5, 6).double()).items()
    assert not others
    assert (name, residual.place, residual.side) == ("down", "norm", "input")
    torch.testing.assert_close(residual.scale, block.scale.gamma.detach())


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


def test_the_stream_is_shown_as_it_is_added() -> None:
    model, images = meeting(False), torch.randn(4, 3, 8, 8)
    found = found_in(model, images)
    streams = {}
    with torch.no_grad(), shown(model, found, lambda n, s: streams.update({n: s.clone()})):
        after = model(images)
        torch.testing.assert_close(streams["short"], model.long_norm(model.long(images)))
        torch.testing.assert_close(streams["last"] + model.last(streams["last"]), after)


def test_a_stream_that_was_changed_since_it_was_seen_is_not_taken() -> None:
    # A layer's output is added to its input, which no module ever saw as it is by then.
    model = Layers(lambda m, x: m.layer(x) + x.mul_(2), layer=nn.Linear(6, 6))
    assert not found_in(model, torch.randn(7, 6))


def test_a_normalisation_ends_a_branch_with_its_layer() -> None:
    model = timm.create_model("resnet18", pretrained=False, zero_init_last=False).eval()
    norms: dict[str, Any] = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)
    }
    for norm in norms.values():
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    found = found_in(model, torch.randn(4, 3, 64, 64))
    ends = [name for name in found if name in norms]
    assert ends
    for end in ends:
        norm = norms[end]
        torch.testing.assert_close(found[end].scale, torch.ones(norm.num_features).double())
        parent, _, last = end.rpartition(".")
        layer = found[f"{parent}.{'0' if last == '1' else last.replace('bn', 'conv')}"]
        expected = norm.weight.detach() / (norm.running_var + norm.eps).sqrt()
        torch.testing.assert_close(layer.scale, expected.double(), rtol=1e-4, atol=1e-6)


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

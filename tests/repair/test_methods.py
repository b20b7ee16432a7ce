"""Repairs of pruned networks against closed forms in float64."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.layer_scale import LayerScale
from timm.layers.norm import LayerNorm2d, RmsNorm
from timm.layers.norm_act import LayerNormAct2d
from timm.layers.std_conv import ScaledStdConv2d, StdConv2d
from torch import Tensor, nn
from torchvision.models.convnext import LayerNorm2d as TorchvisionNorm
from torchvision.ops import FrozenBatchNorm2d

import pai_utils as pai
from pai_utils.curvature.blocks import fisher_blocks
from pai_utils.masks import Mask
from pai_utils.repair.layouts import channels_last
from pai_utils.repair.methods import Repair, repair_
from pai_utils.support.common import NonFiniteError
from pai_utils.support.sampling import ALL
from tests.cases import (
    BatchNorm,
    Images,
    Layers,
    Limited,
    fingerprint,
    tiny_classifier,
    torch_attention,
)

LAYERS = (nn.Conv2d, nn.Linear)
NORMS = (nn.BatchNorm2d, nn.LayerNorm)


def random_mask(model: nn.Module, fraction: float = 0.5) -> Mask:
    generator = torch.Generator().manual_seed(0)
    return Mask(
        {
            name: torch.rand(p.shape, generator=generator) >= fraction
            for name, p in model.named_parameters()
            if name.endswith("weight") and p.ndim > 1
        }
    )


def convolutional() -> nn.Module:
    """Convolutions with their normalisations, one with a bias, one grouped."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False), BatchNorm(6), nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2, groups=2, bias=False), LayerNorm2d(8), nn.GELU(),
        nn.Conv2d(8, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4),
    )  # fmt: skip


def tokens() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 4, 4), nn.Flatten(2), nn.Linear(4, 5), nn.LayerNorm(5), nn.GELU(),
        nn.Linear(5, 5), nn.Flatten(), nn.Linear(30, 4),
    )  # fmt: skip


class Setting:
    """A dense network, its pruned copy, the mask, and images."""

    def __init__(self, make: Callable[[], nn.Module], whole: tuple[str, ...] = ()) -> None:
        torch.manual_seed(1)
        self.data = Images()
        self.dense: Any = make().double().eval()
        for module in self.dense.modules():
            if isinstance(module, NORMS) and module.bias is not None:
                nn.init.uniform_(module.weight, -2, 2)
                nn.init.normal_(module.bias)
        entries = random_mask(self.dense)
        self.prune(Mask({n: torch.ones_like(e) if n in whole else e for n, e in entries.items()}))

    def prune(self, mask: Mask) -> None:
        self.mask, self.pruned = mask, copy.deepcopy(self.dense)
        mask.apply_(self.pruned)

    def repair(self, method: str, seed: int = 0, **options: Any) -> Any:
        """The repaired model; the dense one is left as it was, and so are pruned weights."""
        # One that counts its calls cannot be as before.
        dense = self.dense.model if isinstance(self.dense, Limited) else self.dense
        model, before = copy.deepcopy(self.pruned), fingerprint(dense)
        repair = Repair(method, **{"samples": None, **options})
        repair_(model, self.dense, self.mask, self.data, repair, seed=seed)
        assert fingerprint(dense) == before
        for name, entry in self.mask.items():
            assert not model.get_parameter(name)[~entry].any()
        return model

    def outputs(self, model: nn.Module, kinds: tuple[type, ...]) -> list[tuple[Any, Tensor]]:
        """What every module of some kinds gives, ``[rows, channels]``."""
        found = []

        def keep(module: nn.Module, _: object, output: Tensor) -> None:
            if isinstance(module, kinds):
                last = isinstance(module, (nn.Linear, nn.LayerNorm))
                last = last and not isinstance(module, LayerNorm2d)
                found.append((module, channels_last(output, -1 if last else 1)))

        with torch.no_grad(), torch.nn.modules.module.register_module_forward_hook(keep):
            model(self.data.images)
        return found


both_kinds = pytest.mark.parametrize("make", [convolutional, tokens])


@both_kinds
def test_moments_gives_normalisations_and_biases_the_dense_moments(
    make: Callable[[], nn.Module],
) -> None:
    setting = Setting(make)
    repaired = setting.repair("moments")
    pairs = zip(
        setting.outputs(repaired, LAYERS + NORMS),
        setting.outputs(setting.dense, LAYERS + NORMS),
        strict=True,
    )
    for (module, after), (_, wanted) in pairs:
        if module.bias is not None:
            torch.testing.assert_close(after.mean(0), wanted.mean(0), rtol=1e-9, atol=1e-9)
        if isinstance(module, NORMS):
            torch.testing.assert_close(after.std(0), wanted.std(0), rtol=1e-9, atol=1e-9)
    for name, entry in setting.mask.items():
        weight = setting.dense.get_parameter(name)
        assert torch.equal(repaired.get_parameter(name), weight * entry)


def test_a_channel_without_any_spread_left_keeps_its_scale() -> None:
    setting = Setting(convolutional)
    gone = setting.mask["0.weight"].clone()
    gone[2] = False
    setting.prune(Mask({**setting.mask, "0.weight": gone}))
    repaired = setting.repair("moments")
    assert torch.equal(repaired[1].weight[2], setting.dense[1].weight[2])
    (_, after), (_, wanted) = (setting.outputs(m, NORMS)[0] for m in (repaired, setting.dense))
    torch.testing.assert_close(after.mean(0), wanted.mean(0))


@both_kinds
def test_nothing_is_changed_where_nothing_was_pruned(make: Callable[[], nn.Module]) -> None:
    setting = Setting(make)
    setting.prune(random_mask(setting.dense, fraction=0))
    same = setting.repair("layerwise+moments+obs", damping=1e-3)
    for name, parameter in same.named_parameters():
        wanted = setting.dense.get_parameter(name)
        torch.testing.assert_close(parameter, wanted, rtol=1e-6, atol=1e-8, msg=name)


def block(hidden: int, normalised: bool = False) -> nn.Module:
    """A layer that is pruned, and a branch that could make good for it."""

    def call(m: Any, images: Tensor) -> Tensor:
        stream: Tensor = m.stem(images.flatten(1)[:, :6])
        branch: Tensor = m.gain(m.norm(m.down(m.up(stream).tanh())))
        return stream + branch

    norm = nn.BatchNorm1d(5) if normalised else nn.Identity()
    layers = {"stem": nn.Linear(6, 5), "up": nn.Linear(5, hidden), "down": nn.Linear(hidden, 5)}
    gain = LayerScale(5)
    gain.gamma.data = torch.linspace(0.5, 2, 5)
    return Layers(call, **layers, norm=norm, gain=gain)


def block_of_tokens() -> nn.Module:
    """A residual block over tokens."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 4, 4), nn.Flatten(2),
        Layers(
            lambda m, x: x + m.down(m.norm(m.up(x)).tanh()),
            up=nn.Linear(4, 7), norm=nn.LayerNorm(7), down=nn.Linear(7, 4),
        ),
        nn.Flatten(), nn.Linear(24, 4),
    )  # fmt: skip


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).detach().abs().max())


@pytest.mark.parametrize("method", ["layerwise", "layerwise+moments"])
def test_a_branch_makes_good_what_its_stream_lost(method: str) -> None:
    # More hidden units than images, so that the branch can be anything on these images.
    setting = Setting(lambda: block(hidden=40), whole=("up.weight", "down.weight"))
    dense, images = setting.dense, setting.data.images
    assert distance(setting.repair(method, damping=1e-9)(images), dense(images)) < 1e-5
    # Looked at each for itself, the stem's loss stays.
    alone = setting.repair(method, damping=1e-9, streams=False)
    inputs = images.flatten(1)[:, :6]
    lost = alone.stem(inputs) - dense.stem(inputs)
    assert distance(alone(images) - dense(images), lost) < 1e-5
    assert float(lost.detach().abs().max()) > 0.01


@pytest.mark.parametrize("normalised", [True, False])
def test_moments_restores_the_mean_of_the_sum(normalised: bool) -> None:
    setting = Setting(lambda: block(7, normalised), whole=("up.weight", "down.weight"))
    with torch.no_grad():
        setting.pruned.stem.bias.add_(1)  # the stem is not repaired, so that its mean is off
    setting.mask = Mask({n: entry for n, entry in setting.mask.items() if n != "stem.weight"})
    images = setting.data.images
    found, wanted = (m(images).mean(0) for m in (setting.repair("moments"), setting.dense))
    assert distance(found, wanted) < 1e-9


def test_float32_solves_layers_nearly_alike() -> None:
    setting = Setting(tokens)
    exact, single = (setting.repair("layerwise", float32=fast) for fast in (False, True))
    error = distance(single(setting.data.images), exact(setting.data.images))
    assert 0 < error < 1e-4


def test_obs_moves_the_weights_of_each_block_by_its_update() -> None:
    setting = Setting(tokens)
    options: dict[str, Any] = {"block_size": 8, "damping": 1e-2}
    repaired = setting.repair("obs", **options)
    for block in fisher_blocks(setting.dense, list(setting.mask), setting.data, ALL, **options):
        weights = setting.dense.get_parameter(block.name).detach().flatten()
        moved = block.repair(weights, setting.mask[block.name].flatten())
        assert torch.equal(repaired.get_parameter(block.name).flatten(), moved)


def test_obs_moves_channels_last_weights_alike() -> None:
    setting = Setting(convolutional)
    repaired = setting.repair("obs")
    setting.pruned.to(memory_format=torch.channels_last)
    lasting = setting.repair("obs")
    assert not lasting[0].weight.is_contiguous()
    for name, parameter in lasting.named_parameters():
        assert torch.equal(parameter, repaired.get_parameter(name))


def test_rows_are_drawn_alike_in_both_networks_and_seeded() -> None:
    setting = Setting(convolutional)
    first, again, other = (
        setting.repair("layerwise", rows=50, seed=seed)[0].weight for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def twice() -> nn.Module:
    return Layers(lambda m, x: m.layer(m.layer(x.flatten(1)[:, :6]).relu()), layer=nn.Linear(6, 6))


def exact(x: Tensor, y: Tensor, setting: Setting, name: str, damping: float) -> Tensor:
    """The surviving weights of a layer, for its inputs ``[R, K]`` and wanted outputs ``[R, M]``.

    A dense least-squares problem for each output, with the ridge and the mean as further rows.
    """
    start = setting.dense.get_parameter(name).detach().flatten(1)
    keep = setting.mask[name].flatten(1)
    x, y = x - x.mean(0), y - y.mean(0)
    found = torch.zeros_like(start)
    ridge = (len(x) * damping * x.square().mean()).sqrt()
    for output, alive in enumerate(keep):
        rows = torch.cat([x[:, alive], ridge * torch.eye(int(alive.sum())).double()])
        wanted = torch.cat([y[:, output], ridge * start[output, alive]])
        found[output, alive] = torch.linalg.lstsq(rows, wanted[:, None]).solution[:, 0]
    return found


def test_a_layer_that_is_called_twice_is_solved_over_both_uses() -> None:
    setting = Setting(twice)
    x = setting.data.images.flatten(1)[:, :6]
    with torch.no_grad():
        inputs, wanted = (
            torch.cat([x, m.layer(x).relu()]) for m in (setting.pruned, setting.dense)
        )
        wanted = setting.dense.layer(wanted)
        repaired = setting.repair("layerwise", damping=0.01).layer
        weight = exact(inputs, wanted, setting, "layer.weight", 0.01)
        torch.testing.assert_close(repaired.weight, weight)
        torch.testing.assert_close(repaired(inputs).mean(0), wanted.mean(0))
        shifted = setting.repair("moments").layer
        lost = (wanted - setting.pruned.layer(inputs)).mean(0)
        torch.testing.assert_close(shifted.bias, setting.dense.layer.bias + lost)


def tied(bias: bool) -> nn.Module:
    one, two = nn.Linear(6, 6, bias=bias), nn.Linear(6, 6, bias=bias)
    two.weight = one.weight
    return Layers(lambda m, x: m.two(m.one(x.flatten(1)[:, :6]).tanh()), one=one, two=two)


def test_layers_that_share_a_weight_are_solved_together() -> None:
    setting = Setting(lambda: tied(bias=False))
    x = setting.data.images.flatten(1)[:, :6]
    with torch.no_grad():
        inputs, wanted = (torch.cat([x, m.one(x).tanh()]) for m in (setting.pruned, setting.dense))
        # So that the means of both are zero, which no bias carries.
        inputs, wanted = (
            torch.cat([inputs, -inputs]),
            setting.dense.one(torch.cat([wanted, -wanted])),
        )
    weight = exact(inputs, wanted, setting, "one.weight", 0.01)
    repaired = setting.repair("layerwise", damping=0.01)
    assert repaired.two.weight is repaired.one.weight
    torch.testing.assert_close(repaired.one.weight.detach(), weight)


@pytest.mark.parametrize("method", ["layerwise", "layerwise+moments"])
def test_a_bias_that_the_model_computes_is_kept(method: str) -> None:
    def call(m: Any, x: Tensor) -> Tensor:
        return nn.functional.linear(x.flatten(1)[:, :6], m.layer.weight, 2 * m.layer.bias)

    setting = Setting(lambda: Layers(call, layer=nn.Linear(6, 4)))
    x = setting.data.images.flatten(1)[:, :6]
    inputs = torch.cat([x, -x])  # of mean zero
    wanted = inputs @ setting.dense.layer.weight.detach().T
    weight = exact(inputs, wanted, setting, "layer.weight", 0.01)
    layer = setting.repair(method, damping=0.01).layer
    torch.testing.assert_close(layer.weight.detach(), weight)
    assert torch.equal(layer.bias, setting.dense.layer.bias)


class ByKeyword(nn.Module):
    """Calls a module with its input by keyword."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        called: Tensor = self.module(input=x)
        return called


class OneByOne(nn.Module):
    """Calls a module without a batch."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.module(each) for each in x])


@pytest.mark.parametrize("wrapper", [nn.Sequential, ByKeyword, OneByOne])
@pytest.mark.parametrize("method", ["layerwise", "moments", "layerwise+moments"])
def test_layers_are_repaired_however_they_are_called(
    wrapper: Callable[[nn.Module], nn.Module], method: str
) -> None:
    def make(wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
        norm = nn.Sequential(BatchNorm(6)) if wrap is OneByOne else wrap(BatchNorm(6))
        return nn.Sequential(
            wrap(nn.Conv2d(3, 6, 3)), norm, nn.ReLU(),
            wrap(nn.Conv2d(6, 6, 3, padding=1, groups=2)), nn.Flatten(), wrap(nn.Linear(216, 4)),
        )  # fmt: skip

    plain, setting = Setting(lambda: make(nn.Sequential)), Setting(lambda: make(wrapper))
    repaired = setting.repair(method, rows=10**6)
    wanted = plain.repair(method, rows=10**6).parameters()
    for found, expected in zip(repaired.parameters(), wanted, strict=True):
        torch.testing.assert_close(found, expected)
    if method == "layerwise":
        first = next(setting.dense.children())
        x = nn.functional.unfold(setting.data.images, 3).mT.flatten(0, 1)
        y = first(setting.data.images).detach().flatten(2).mT.flatten(0, 1)
        name, parameter = next(repaired.named_parameters())
        found, expected = parameter.detach().flatten(1), exact(x, y, setting, name, 0.1)
        torch.testing.assert_close(found, expected)


class Permuting(nn.LayerNorm):
    """Over the channels of images."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    "norm", [LayerNorm2d, partial(LayerNormAct2d, apply_act=False), TorchvisionNorm, Permuting]
)
@pytest.mark.parametrize("channels", [6, 5])  # the first as many as an image is wide
def test_moments_finds_the_channels_of_a_layer_norm_of_images(
    norm: Callable[[int], nn.Module], channels: int
) -> None:
    setting = Setting(lambda: nn.Sequential(nn.Conv2d(3, channels, 3, bias=False), norm(channels)))
    found, wanted = (m(setting.data.images) for m in (setting.repair("moments"), setting.dense))
    axes = (0, 2, 3)
    torch.testing.assert_close(found.mean(axes), wanted.mean(axes))
    torch.testing.assert_close(found.std(axes), wanted.std(axes))


def test_a_batch_norm_of_the_batch_is_left_and_layers_beside_it_are_solved(
    caplog: pytest.LogCaptureFixture,
) -> None:
    norm = nn.BatchNorm1d(5, track_running_stats=False)
    layers = nn.Flatten(), nn.Linear(192, 5), norm, nn.Linear(5, 5), nn.Linear(5, 4)
    setting = Setting(lambda: nn.Sequential(*layers))
    kept = [norm.weight.clone(), norm.bias.clone()]
    repaired = setting.repair("layerwise+moments", damping=0.01)
    assert caplog.messages == [f"2: {NO_NORM}"]
    torch.testing.assert_close(list(repaired[2].parameters()), kept)
    with torch.no_grad():
        x, y = repaired[:3](setting.data.images), setting.dense[:4](setting.data.images)
    found, expected = repaired[3].weight.detach(), exact(x, y, setting, "3.weight", 0.01)
    torch.testing.assert_close(found, expected)


def residual() -> nn.Module:
    """A convolution, then one that adds to it, and one that runs twice."""
    return Layers(
        lambda m, x: m.last(m.last((y := m.stem(x)) + m.branch(m.norm(y).tanh())).tanh()),
        stem=nn.Conv2d(3, 4, 3), branch=nn.Conv2d(4, 4, 1), norm=BatchNorm(4),
        last=nn.Conv2d(4, 4, 1),
    )  # fmt: skip


@pytest.mark.parametrize("make", [convolutional, tokens, residual, block_of_tokens])
@pytest.mark.parametrize("limit", [1, 4])
def test_repair_is_the_same_in_batches_that_fit_into_memory(
    make: Callable[[], nn.Module], limit: int
) -> None:
    def limited(largest: int) -> Setting:
        return Setting(lambda: Limited(make(), largest))

    setting = limited(limit)
    found, wanted = (s.repair("layerwise+moments", rows=40) for s in (setting, limited(10)))
    assert setting.dense.sizes[0] > limit
    for parameter, expected in zip(found.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-6, atol=1e-8)


def test_a_model_that_never_fits_is_left_as_it_was() -> None:
    # The dense network fits, the pruned one runs out in the middle.
    setting = Setting(convolutional)
    memory = [torch.OutOfMemoryError("full")] * 99
    setting.pruned[7].forward = Mock(side_effect=memory)
    before = fingerprint(setting.pruned)
    repair = Repair("layerwise", samples=None)
    with pytest.raises(torch.OutOfMemoryError):
        repair_(setting.pruned, setting.dense, setting.mask, setting.data, repair)
    assert fingerprint(setting.pruned) == before
    assert setting.pruned[7].forward.call_count > 1


def dropped(m: Any, x: Tensor) -> Tensor:
    """The second layer is used by the dense network alone."""
    y: Tensor = m.first(x.flatten(1))
    return m.second(y) if m.first.weight.all() else y


def test_a_layer_that_the_pruned_network_uses_less_often_is_left(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def make() -> nn.Module:
        return Limited(Layers(dropped, first=nn.Linear(192, 4), second=nn.Linear(4, 4)), 5)

    setting = Setting(make)
    repaired = setting.repair("layerwise", damping=0.01).model
    assert caplog.messages[-1] == (
        "model.second.weight is not used as often as in the dense network; it is not repaired"
    )
    assert torch.equal(repaired.second.weight, setting.pruned.model.second.weight)
    assert not torch.equal(repaired.first.weight, setting.pruned.model.first.weight)


def functional() -> nn.Module:
    """A layer whose weight alone is used."""
    return Layers(
        lambda m, x: m.used(x.flatten(1)) @ m.aside.weight.T,
        used=nn.Linear(192, 4),
        aside=nn.Linear(4, 4),
    )


def summed(layer: nn.Module) -> nn.Module:
    """A layer that adds what it computes to its inputs."""
    return Layers(lambda m, x: x + m.layer(x), layer=layer)


PLAIN = "no call of a linear layer or convolution takes them; not repaired by layerwise+moments"
NO_NORM = (
    "no BatchNorm with running statistics or LayerNorm of channels, with scale and shift; "
    "moments not restored"
)


@pytest.mark.parametrize(
    ("layers", "warnings"),
    [
        (
            [summed(StdConv2d(3, 3, 3, bias=True)), summed(ScaledStdConv2d(3, 3, 3, bias=True)),
             Conv2dSame(3, 4, 3)],
            [f"0.layer.weight, 1.layer.weight: {PLAIN}"],
        ),
        (
            [nn.ConvTranspose2d(3, 6, 2), nn.Flatten(2), nn.Linear(81, 6), torch_attention()],
            [f"0.weight, 3.attention.in_proj_weight, 3.attention.out_proj.weight: {PLAIN}"],
        ),
        (
            [nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.BatchNorm2d(4), nn.PReLU(4), nn.Flatten(2),
             nn.RMSNorm(36), nn.LayerNorm(36, bias=False), nn.LayerNorm(36), RmsNorm(36)],
            [f"1, 5, 6, 8: {NO_NORM}"],
        ),
        (
            [nn.Conv2d(3, 4, 3), FrozenBatchNorm2d(4), nn.BatchNorm2d(4, affine=False),
             nn.LocalResponseNorm(2)],
            [f"1, 2, 3: {NO_NORM}"],
        ),
        ([functional()], [f"0.aside.weight: {PLAIN}"]),
        (
            [tied(bias=True)],
            ["0.one.weight: several biases of one weight, or one bias of several; not repaired by "
             "layerwise+moments"],
        ),
    ],
)  # fmt: skip
def test_what_is_not_repaired_is_named_and_left(
    layers: list[nn.Module], warnings: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    # No mask would hold in layers that standardise their weights.
    standardised = ("0.layer.weight", "1.layer.weight")
    setting = Setting(lambda: nn.Sequential(*layers), standardised)
    setting.prune(random_mask(setting.dense, fraction=0))
    same = setting.repair("layerwise+moments")
    torch.testing.assert_close(same(setting.data.images), setting.dense(setting.data.images))
    assert caplog.messages == warnings


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("moment", {}, "unknown repair 'moment'; did you mean 'moments'"),
        ("none", {"damp": 1}, "unknown repair option 'damp'; did you mean 'damping'"),
        ("moments", {"samples": 0}, "samples=0: at least one"),
        ("layerwise", {"damping": 0.0}, "damping=0.0 must be a finite number above zero"),
        ("obs", {"block_size": 0}, "block_size=0: at least one weight a block"),
        ("obs", {"damping": 1e-12}, "damping=1e-12 must be a finite number of at least 1e-10"),
    ],
)
def test_impossible_repairs_are_refused(method: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Repair.of(method, options)


@pytest.mark.parametrize("method", ["moments", "layerwise", "obs"])
def test_images_that_are_not_finite_are_refused_and_the_model_left(method: str) -> None:
    setting = Setting(convolutional)
    setting.data.images[7, 1, 2, 3] = torch.nan
    before, repair = fingerprint(setting.pruned), Repair(method, samples=None)
    with pytest.raises(NonFiniteError, match="image 7 of the data to repair by is not finite"):
        repair_(setting.pruned, setting.dense, setting.mask, setting.data, repair, batch_size=3)
    assert fingerprint(setting.pruned) == before


def test_repair_without_samples_is_refused() -> None:
    with pytest.raises(ValueError, match="repair 'moments' needs samples"):
        pai.prune(tiny_classifier(), None, scorer="magnitude", repair="moments")

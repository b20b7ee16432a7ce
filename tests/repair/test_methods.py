"""Repairs of pruned networks against closed forms in float64."""

import copy
from typing import Any

import pytest
import torch
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.norm import LayerNorm2d, RmsNorm
from timm.layers.std_conv import ScaledStdConv2d, StdConv2d
from torch import Tensor, nn

import pai_utils as pai
from pai_utils.curvature.blocks import fisher_blocks
from pai_utils.masks import Mask
from pai_utils.repair.layouts import count_rows, rows_of
from pai_utils.repair.least_squares import solve_layer
from pai_utils.repair.methods import repair_
from pai_utils.studies import sweeps
from pai_utils.support.common import NonFiniteError
from tests.cases import Images, TorchAttention, fingerprint, tiny_backbone, tiny_task


class Batch(Images):
    """Ten images without structure, in float64."""


def random_mask(model: nn.Module, fraction: float = 0.5, seed: int = 0) -> Mask:
    generator = torch.Generator().manual_seed(seed)
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
        nn.Conv2d(3, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2, groups=2, bias=False),
        LayerNorm2d(8),
        nn.GELU(),
        nn.Conv2d(8, 5, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 4),
    )


def tokens() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 4, 4),
        nn.Flatten(2),
        nn.Linear(4, 5),
        nn.LayerNorm(5),
        nn.GELU(),
        nn.Linear(5, 5),
        nn.Flatten(),
        nn.Linear(30, 4),
    )


def build(kind: str) -> tuple[nn.Module, nn.Module, Mask, Batch]:
    """A dense network, its pruned copy, the mask, and images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        dense = {"convolutional": convolutional, "tokens": tokens}[kind]().double().eval()
        for module in dense.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                nn.init.uniform_(module.running_mean, -1, 1)
                nn.init.uniform_(module.running_var, 0.5, 2)
            if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
                nn.init.uniform_(module.weight, -2, 2)
                nn.init.normal_(module.bias)
    pruned = copy.deepcopy(dense)
    mask = random_mask(pruned)
    mask.apply_(pruned)
    return dense, pruned, mask, Batch(10)


def outputs_of(model: nn.Module, images: Tensor, kinds: Any) -> list[tuple[nn.Module, Tensor]]:
    """What every module of some kinds gives, ``[rows, channels]``."""
    found = []

    def keep(module: nn.Module, _: Any, output: Tensor) -> None:
        last = isinstance(module, nn.Linear) or type(module) is nn.LayerNorm
        found.append((module, output.movedim(-1 if last else 1, -1).flatten(0, -2)))

    handles = [m.register_forward_hook(keep) for m in model.modules() if isinstance(m, kinds)]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("kind", ["convolutional", "tokens"])
def test_moments_gives_normalisations_and_biases_the_dense_moments(kind: str) -> None:
    dense, pruned, mask, data = build(kind)
    before = fingerprint(dense)
    repair_(pruned, dense, mask, data, "moments", samples=None)
    assert fingerprint(dense) == before
    norms = (nn.BatchNorm2d, nn.LayerNorm)
    for (_, after), (_, wanted) in zip(
        outputs_of(pruned, data.images, norms), outputs_of(dense, data.images, norms), strict=True
    ):
        torch.testing.assert_close(after.mean(0), wanted.mean(0), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(after.std(0), wanted.std(0), rtol=1e-9, atol=1e-9)
    layers = (nn.Conv2d, nn.Linear)
    for (module, after), (_, wanted) in zip(
        outputs_of(pruned, data.images, layers), outputs_of(dense, data.images, layers), strict=True
    ):
        if module.bias is not None:
            torch.testing.assert_close(after.mean(0), wanted.mean(0), rtol=1e-9, atol=1e-9)
    for name, parameter in pruned.named_parameters():
        if name in mask:
            assert torch.equal(parameter, parameter * mask[name])
            assert torch.equal(parameter, dense.get_parameter(name) * mask[name])


def test_a_channel_without_any_spread_left_keeps_its_scale() -> None:
    dense, pruned, mask, data = build("convolutional")
    gone = mask["0.weight"].clone()
    gone[2] = False
    mask = Mask({**mask, "0.weight": gone})
    mask.apply_(pruned)
    repair_(pruned, dense, mask, data, "moments", samples=None)
    scale = pruned.get_parameter("1.weight")[2]
    assert torch.equal(scale, dense.get_parameter("1.weight")[2])
    (_, after), (_, wanted) = (
        outputs_of(m, data.images, nn.BatchNorm2d)[0] for m in (pruned, dense)
    )
    torch.testing.assert_close(after.mean(0), wanted.mean(0))


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("damping", [1e-6, 0.3])
@pytest.mark.parametrize("kept", [0.3, 0.5, 0.8])
def test_a_layer_is_solved_by_the_normal_equations(
    centred: bool, damping: float, kept: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    groups, rows, size, outputs = 2, 40, 7, 20
    x = torch.randn(groups, rows, size, generator=generator, dtype=torch.float64) + 1
    y = torch.randn(rows, groups * outputs, generator=generator, dtype=torch.float64) - 2
    start = torch.randn(groups, outputs, size, generator=generator, dtype=torch.float64)
    keep = torch.rand(groups, outputs, size, generator=generator) < kept
    keep[0, 0] = False  # an output that lost everything
    keep[1, 1] = True  # and one that lost nothing
    found, bias = solve_layer(x, y, start, keep, centred=centred, damping=damping)
    for group in range(groups):
        inner = x[group] - x[group].mean(0) if centred else x[group]
        ridge = damping * inner.square().mean()
        for output in range(outputs):
            column = group * outputs + output
            chosen = keep[group, output]
            a = inner[:, chosen]
            b = y[:, column] - y[:, column].mean() if centred else y[:, column]
            # The ridge as further rows of a least-squares problem.
            eye = (rows * ridge).sqrt() * torch.eye(int(chosen.sum()), dtype=x.dtype)
            wide = torch.cat([a, eye])
            tall = torch.cat([b, (rows * ridge).sqrt() * start[group, output, chosen]])
            expected = torch.zeros(size, dtype=x.dtype)
            if len(eye):
                expected[chosen] = torch.linalg.lstsq(wide, tall[:, None]).solution[:, 0]
            torch.testing.assert_close(found[group, output], expected, rtol=1e-9, atol=1e-9)
            mean = y[:, column].mean() - x[group].mean(0) @ expected if centred else 0
            assert float(bias[column]) == pytest.approx(float(mean), abs=1e-9)


@pytest.mark.parametrize("kind", ["convolutional", "tokens"])
def test_nothing_is_changed_where_nothing_was_pruned(kind: str) -> None:
    dense, _, mask, data = build(kind)
    same = copy.deepcopy(dense)
    whole = Mask({name: torch.ones_like(entry) for name, entry in mask.items()})
    repair_(same, dense, whole, data, "layerwise+moments+obs", samples=None, damping=1e-3)
    for name, parameter in same.named_parameters():
        torch.testing.assert_close(
            parameter, dense.get_parameter(name), rtol=1e-6, atol=1e-8, msg=name
        )


@pytest.mark.parametrize("kind", ["convolutional", "tokens"])
def test_layerwise_brings_the_first_layers_outputs_closest(kind: str) -> None:
    dense, pruned, mask, data = build(kind)
    layers = (nn.Conv2d, nn.Linear)

    def distance(model: nn.Module) -> float:
        (_, found), *_ = outputs_of(model, data.images, layers)
        (_, wanted), *_ = outputs_of(dense, data.images, layers)
        return float((found - wanted).square().mean())

    repair_(pruned, dense, mask, data, "layerwise", samples=None, damping=1e-9, rows=10**6)
    least = distance(pruned)
    generator = torch.Generator().manual_seed(3)
    weight = pruned.get_parameter("0.weight")
    for _ in range(20):  # no step among the survivors improves it
        with torch.no_grad():
            step = 1e-3 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
            step *= mask["0.weight"]
            weight.add_(step)
            assert distance(pruned) > least
            weight.sub_(step)
    for name in mask:
        parameter = pruned.get_parameter(name)
        assert torch.equal(parameter, parameter * mask[name])


class Block(nn.Module):
    """A layer that is pruned, and a branch that could make good for it."""

    def __init__(self, size: int, hidden: int, normalised: bool) -> None:
        super().__init__()
        self.stem = nn.Linear(6, size)
        self.up = nn.Linear(size, hidden)
        self.down = nn.Linear(hidden, size)
        self.norm = nn.BatchNorm1d(size) if normalised else nn.Identity()
        self.gain = nn.Parameter(torch.linspace(0.5, 2, size))

    def forward(self, images: Tensor) -> Tensor:
        stream = self.stem(images.flatten(1)[:, :6])
        result: Tensor = stream + self.gain * self.norm(self.down(self.up(stream).tanh()))
        return result


def block(hidden: int, normalised: bool = False) -> tuple[Block, Block, Mask, Batch]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        dense = Block(5, hidden, normalised).double().eval()
    pruned = copy.deepcopy(dense)
    mask = random_mask(dense)
    whole = torch.ones_like(mask["down.weight"])
    mask = Mask({**mask, "up.weight": torch.ones_like(mask["up.weight"]), "down.weight": whole})
    mask.apply_(pruned)
    return dense, pruned, mask, Batch(10)


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).detach().abs().max())


@pytest.mark.parametrize("repair", ["layerwise", "layerwise+moments"])
def test_a_branch_makes_good_what_its_stream_lost(repair: str) -> None:
    # More hidden units than images, so that the branch can be anything on these images.
    dense, pruned, mask, data = block(hidden=40)
    options: dict[str, Any] = {"samples": None, "damping": 1e-9}
    alone = copy.deepcopy(pruned)
    repair_(pruned, dense, mask, data, repair, **options)
    assert distance(pruned(data.images), dense(data.images)) < 1e-5
    # Looked at each for itself, the stem's loss stays.
    repair_(alone, dense, mask, data, repair, streams=False, **options)
    inputs = data.images.flatten(1)[:, :6]
    lost = alone.stem(inputs) - dense.stem(inputs)
    assert distance(alone(data.images) - dense(data.images), lost) < 1e-5
    assert float(lost.detach().abs().max()) > 0.01


@pytest.mark.parametrize("normalised", [True, False])
def test_moments_restores_the_mean_of_the_sum(normalised: bool) -> None:
    dense, pruned, mask, data = block(hidden=7, normalised=normalised)
    with torch.no_grad():
        pruned.stem.bias.add_(1)  # the stem is not repaired below, so that its mean is off
        mask = Mask({name: entry for name, entry in mask.items() if name != "stem.weight"})
    repair_(pruned, dense, mask, data, "moments", samples=None)
    found, wanted = (model(data.images).mean(0) for model in (pruned, dense))
    assert distance(found, wanted) < 1e-9


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
    layer = copy.deepcopy(layer).double()
    output = layer(inputs)
    axis = -1 if isinstance(layer, nn.Linear) else 1
    wanted = output.movedim(axis, -1).flatten(0, -2)
    assert count_rows(layer, inputs) == len(wanted)
    chosen = torch.tensor([0, 2, len(wanted) - 1])
    x = rows_of(layer, inputs, chosen)
    weight = layer.weight.reshape(x.shape[0], -1, x.shape[2])
    found = torch.einsum("grk,gmk->rgm", x, weight).flatten(1) + layer.bias
    torch.testing.assert_close(found, wanted[chosen])


def test_obs_moves_the_weights_of_each_block_by_its_update() -> None:
    dense, pruned, mask, data = build("tokens")
    repair_(pruned, dense, mask, data, "obs", samples=None, block_size=8, damping=1e-2)
    for block in fisher_blocks(dense, list(mask), data, block_size=8, damping=1e-2):
        part = slice(block.start, block.stop)
        weights = dense.get_parameter(block.name).detach().flatten()[part]
        moved = block.repair(weights, mask[block.name].flatten()[part])
        assert torch.equal(pruned.get_parameter(block.name).flatten()[part], moved)


def test_obs_moves_channels_last_weights_alike() -> None:
    dense, pruned, mask, data = build("convolutional")
    lasting: Any = copy.deepcopy(pruned).to(memory_format=torch.channels_last)
    assert not lasting[0].weight.is_contiguous()
    for model in (pruned, lasting):
        repair_(model, dense, mask, data, "obs", samples=None)
    for name, parameter in lasting.named_parameters():
        assert torch.equal(parameter, pruned.get_parameter(name))
    assert not lasting[0].weight.is_contiguous()


def test_rows_are_drawn_alike_in_both_networks_and_seeded() -> None:
    results = []
    for seed in (0, 0, 1):
        dense, pruned, mask, data = build("convolutional")
        repair_(pruned, dense, mask, data, "layerwise", samples=None, rows=50, seed=seed)
        results.append(pruned.get_parameter("0.weight").detach().clone())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_prune_repairs_on_its_own_samples_and_leaves_the_model() -> None:
    task = tiny_task()
    backbone = tiny_backbone()
    model = pai.Classifier(backbone, pai.fit_head(backbone, task))
    before = fingerprint(model)
    settings: dict[str, Any] = {"sparsity": 0.5, "samples": 20, "scorer": "magnitude"}
    plain = pai.prune(model, task.train, **settings)
    repaired = pai.prune(
        model, task.train, repair="layerwise+moments",
        repair_options={"damping": 1e-3}, **settings,
    )  # fmt: skip
    assert fingerprint(model) == before
    assert all(torch.equal(plain.mask[name], repaired.mask[name]) for name in plain.mask)
    images, _ = task.train.batch(slice(None))
    with torch.no_grad():
        dense, left, mended = (m(images) for m in (model, plain.model, repaired.model))
    assert float((mended - dense).square().mean()) < 0.5 * float((left - dense).square().mean())


def test_a_sweep_repairs_each_mask_on_its_source_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_backbone()
    tasks = {name: tiny_task(name) for name in ("first", "second")}
    heads = {name: pai.fit_head(backbone, task) for name, task in tasks.items()}
    seen: list[tuple[object, str, object]] = []

    def watch(
        model: nn.Module, dense: nn.Module, mask: Mask, data: Any, repair: str, **options: Any
    ) -> None:
        seen.append((data, repair, options["samples"]))
        repair_(model, dense, mask, data, repair, **options)

    monkeypatch.setattr(sweeps, "repair_", watch)
    settings: dict[str, Any] = {"sparsities": [0.5], "seeds": [0], "samples": 12}
    table = sweeps.retention_sweep(
        backbone, tasks, heads, ["first", "second"], scorers=["snip", "magnitude"],
        repairs=["none", "layerwise+moments"], repair_options={"samples": 16},
        **settings,
    )  # fmt: skip
    # A mask that looked at no data is repaired on both.
    assert [id(data) for data, *_ in seen] == [
        id(tasks[name].train) for name in ("first", "second", "first", "second")
    ]
    assert {entry[1:] for entry in seen} == {("layerwise+moments", 16)}
    rows = table.groupby(["scorer", "source"]).size().to_dict()
    assert rows == {
        ("dense", "none"): 2,
        ("magnitude", "none"): 2,
        ("magnitude + layerwise+moments", "first"): 2,
        ("magnitude + layerwise+moments", "second"): 2,
        ("snip", "first"): 2,
        ("snip", "second"): 2,
        ("snip + layerwise+moments", "first"): 2,
        ("snip + layerwise+moments", "second"): 2,
    }
    plain = sweeps.retention_sweep(
        backbone, tasks, heads, ["first", "second"], scorers=["snip", "magnitude"], **settings
    )
    kept = table[~table.scorer.str.contains("+", regex=False)].reset_index(drop=True)
    assert kept.accuracy.tolist() == plain.accuracy.tolist()


def test_a_sweep_in_rounds_reaches_the_masks_that_pruning_reaches() -> None:
    backbone = tiny_backbone()
    tasks = {name: tiny_task(name) for name in ("first", "second")}
    heads = {name: pai.fit_head(backbone, task) for name, task in tasks.items()}
    before = fingerprint(backbone)
    shared: dict[str, Any] = {"rounds": 3, "samples": 12, "repair_options": {"samples": 16}}
    table = sweeps.retention_sweep(
        backbone, tasks, heads, ["first", "second"], scorers=["snip", "magnitude"],
        sparsities=[0.6], seeds=[1], repairs=["none", "layerwise"], **shared,
    )  # fmt: skip
    assert fingerprint(backbone) == before
    rows = table[table.scorer != "dense"]
    assert len(rows) == (2 * 2 + 1 + 2) * 2
    for source, label, target, correct in rows[
        ["source", "scorer", "target", "correct"]
    ].itertuples(index=False):
        scorer, _, repair = label.partition(" + ")
        place = "first" if source == "none" else source
        pruned = pai.prune(
            pai.Classifier(backbone, heads[place]), tasks[place].train, scorer, 0.6,
            repair=repair or "none", seed=1, **shared,
        )  # fmt: skip
        model: Any = pruned.model
        alone = pai.Classifier(model.backbone, heads[target])
        assert pai.evaluate(alone, tasks[target].test).correct.tolist() == list(correct)


def test_a_sweep_in_rounds_hands_no_masks_out() -> None:
    task, backbone = tiny_task(), tiny_backbone()
    with pytest.raises(ValueError, match=r"masks of rounds=2 cannot be observed; use rounds=1"):
        sweeps.retention_sweep(
            backbone, {"dots": task}, {"dots": pai.fit_head(backbone, task)}, ["dots"],
            rounds=2, observe=lambda _: None,
        )  # fmt: skip


def test_a_layer_that_is_called_twice_is_shifted_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.layer(self.layer(x.flatten(1)[:, :6]).relu())
            return result

    dense = Twice().double()
    model = copy.deepcopy(dense)
    mask = random_mask(model)
    mask.apply_(model)
    data = Batch()
    repair_(model, dense, mask, data, "moments")
    inputs = data.batch(torch.arange(10))[0].flatten(1)[:, :6]
    torch.testing.assert_close(model.layer(inputs).mean(0), dense.layer(inputs).mean(0))


def test_a_layer_that_is_not_called_is_named(caplog: pytest.LogCaptureFixture) -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used = nn.Linear(48, 4)
            self.aside = nn.Linear(4, 4)

        def forward(self, images: Tensor) -> Tensor:
            return nn.functional.linear(self.used(images.flatten(1)), self.aside.weight)

    dense = Functional().double()
    pruned = copy.deepcopy(dense)
    mask = random_mask(dense)
    mask.apply_(pruned)
    data = Images(4)
    data.images = data.images[..., :4, :4]
    repair_(pruned, dense, mask, data, "layerwise", samples=None)
    assert "aside is not called as a layer" in caplog.text
    assert torch.equal(pruned.aside.weight, dense.aside.weight * mask["aside.weight"])


class Summed(nn.Module):
    """A layer that adds what it computes to its inputs."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.layer(x)
        return result


@pytest.mark.parametrize("kind", [StdConv2d, ScaledStdConv2d])
def test_convolutions_that_transform_their_weight_are_left_out_and_named(
    kind: Any, caplog: pytest.LogCaptureFixture
) -> None:
    dense = nn.Sequential(Summed(kind(3, 3, 3, bias=True)), Conv2dSame(3, 4, 3)).double().eval()
    same, data = copy.deepcopy(dense), Batch(10)
    whole = random_mask(dense, fraction=0)
    repair_(same, dense, whole, data, "layerwise+moments", samples=None)
    torch.testing.assert_close(same(data.images), dense(data.images))
    assert caplog.messages == [
        "0.layer.weight: no weights of plain linear layers or convolutions; "
        "not repaired by layerwise+moments"
    ]


def test_masked_weights_of_other_modules_are_named(caplog: pytest.LogCaptureFixture) -> None:
    dense = nn.Sequential(
        nn.ConvTranspose2d(3, 6, 2), nn.Flatten(2), nn.Linear(81, 6), TorchAttention()
    ).double()
    mask = random_mask(dense)
    pruned = copy.deepcopy(dense)
    mask.apply_(pruned)
    repair_(pruned, dense, mask, Batch(10), "moments", samples=None)
    assert (
        "0.weight, 3.attention.in_proj_weight: no weights of plain linear layers or convolutions"
    ) in caplog.text


def test_normalisations_whose_moments_are_not_restored_are_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    dense = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.BatchNorm2d(4), nn.PReLU(4), nn.Flatten(2),
        nn.RMSNorm(36), nn.LayerNorm(36, bias=False), nn.LayerNorm(36), RmsNorm(36),
        nn.LayerNorm((4, 36)),
    ).double().eval()  # fmt: skip
    mask = Mask({"0.weight": random_mask(dense)["0.weight"]})
    for repair in ("layerwise", "moments"):
        repair_(copy.deepcopy(dense), dense, mask, Batch(10), repair, samples=None)
    assert caplog.messages == [
        "1, 5, 6, 8, 9: no BatchNorm or LayerNorm of channels with scale and shift; moments "
        "not restored"
    ]


@pytest.mark.parametrize(
    ("repair", "options", "message"),
    [
        ("moment", {}, "unknown repair 'moment'; did you mean 'moments'"),
        ("moments+moments", {}, "names a part twice"),
        ("layerwise", {"damping": 0.0}, "damping=0.0 must be a finite number above zero"),
        ("layerwise", {"rows": 0}, "rows=0: at least one row"),
        ("moments", {"samples": 0}, "samples=0: at least one sample"),
    ],
)
def test_impossible_repairs_are_refused(repair: str, options: dict[str, Any], message: str) -> None:
    dense, pruned, mask, data = build("tokens")
    with pytest.raises(ValueError, match=message):
        repair_(pruned, dense, mask, data, repair, **options)


@pytest.mark.parametrize("repair", ["moments", "layerwise", "obs", "obs+moments"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_images_that_are_not_finite_are_refused_and_the_model_left(
    repair: str, value: float
) -> None:
    dense, pruned, mask, data = build("convolutional")
    data.images[7, 1, 2, 3] = value
    before = fingerprint(pruned)
    with pytest.raises(NonFiniteError, match="image 7 of the data to repair by is not finite"):
        repair_(pruned, dense, mask, data, repair, samples=None, batch_size=3)
    assert fingerprint(pruned) == before


def test_repair_without_samples_is_refused() -> None:
    with pytest.raises(ValueError, match="repair 'moments' needs samples"):
        pai.prune(tiny_backbone(), None, scorer="magnitude", repair="moments")

import itertools
from collections.abc import Callable, Sequence

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pai_utils as pai
from pai_utils.scorers.paths import px
from pai_utils.support.sampling import Draw
from tests.cases import (
    CASES,
    BatchNorm,
    Case,
    Images,
    build,
    fingerprint,
    flattened,
    relative_error,
    tiny_backbone,
)


def seeded(*layers: Callable[[], nn.Module]) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(*(layer() for layer in layers)).double()


def mlp() -> nn.Sequential:
    return seeded(
        nn.Flatten,
        lambda: nn.Linear(12, 5),
        nn.ReLU,
        lambda: nn.Linear(5, 4),
        nn.ReLU,
        lambda: nn.Linear(4, 3),
    )


def convolutional() -> nn.Sequential:
    """Grouped at the end, so that the logits do not share all paths."""
    return seeded(
        lambda: nn.Conv2d(3, 2, 2),
        nn.ReLU,
        lambda: nn.Conv2d(2, 4, 2, groups=2),
        nn.Flatten,
    )


def with_batch_norm() -> nn.Sequential:
    return seeded(
        lambda: nn.Conv2d(3, 4, 3, padding=1),
        lambda: BatchNorm(4),
        nn.ReLU,
        lambda: nn.Conv2d(4, 4, 3, padding=1, bias=False),
        lambda: BatchNorm(4),
        nn.ReLU,
        nn.Flatten,
        lambda: nn.Linear(4 * 64, 3),
    )


Edge = tuple[int, int, int]  # from, to, index of the weight


def edges_of(layer: nn.Module, shape: Sequence[int]) -> tuple[list[Edge], Sequence[int]]:
    """Connections of a layer that takes inputs of ``shape``, and the shape of its outputs."""
    if isinstance(layer, nn.Linear):
        found = [
            (i, o, o * layer.in_features + i)
            for o in range(layer.out_features)
            for i in range(layer.in_features)
        ]
        return found, (layer.out_features,)
    assert isinstance(layer, nn.Conv2d)
    _, height, width = shape
    out, inner, rows, columns = layer.weight.shape
    tall, wide = height - rows + 1, width - columns + 1
    per_group = out // layer.groups
    found = []
    for o, c, r, s, y, x in itertools.product(
        range(out), range(inner), range(rows), range(columns), range(tall), range(wide)
    ):
        channel = o // per_group * inner + c
        source = (channel * height + y + r) * width + x + s
        target = (o * tall + y) * wide + x
        found.append((source, target, ((o * inner + c) * rows + r) * columns + s))
    return found, (out, tall, wide)


def enumerated(
    model: nn.Sequential, images: Tensor, *, gated: bool
) -> tuple[dict[str, Tensor], Tensor]:
    """Scores of ``px`` by walking every path of a ReLU network, one after the other.

    Returns w² ∂R/∂(w²) and, by class, Σ_n Σ_p a_p² x².
    """
    layers = {
        f"{i}.weight": m for i, m in enumerate(model) if isinstance(m, (nn.Linear, nn.Conv2d))
    }
    shape: Sequence[int] = images.shape[1:]
    steps: list[dict[int, list[tuple[int, int]]]] = []
    for layer in layers.values():
        edges, shape = edges_of(layer, shape)
        leaving: dict[int, list[tuple[int, int]]] = {}
        for source, target, weight in edges:
            leaving.setdefault(source, []).append((target, weight))
        steps.append(leaving)
    gates = []  # of each layer's output, [N, nodes]
    with torch.no_grad():
        x = images
        for module in model:
            x = module(x)
            if isinstance(module, nn.ReLU):
                gates.append((x > 0).flatten(1))
    gates.append(torch.ones(len(images), x[0].numel(), dtype=torch.bool))
    squares = images.flatten(1).square()
    weights = [layer.weight.detach().flatten().square() for layer in layers.values()]

    paths: list[tuple[tuple[int, ...], int, Tensor, Tensor]] = []  # weights, class, x²c², v²

    def walk(depth: int, node: int, used: tuple[int, ...], active: Tensor, product: Tensor) -> None:
        if depth == len(steps):
            paths.append((used, node, active, product))
            return
        for target, weight in steps[depth].get(node, []):
            walk(
                depth + 1,
                target,
                (*used, weight),
                active * gates[depth][:, target],
                product * weights[depth][weight],
            )

    for node in range(squares.shape[1]):
        walk(0, node, (), squares[:, node], torch.ones((), dtype=torch.float64))
    activity = torch.zeros(x[0].numel(), dtype=torch.float64)
    for _, k, active, _ in paths:
        activity[k] += active.sum()
    scores = [torch.zeros_like(w) for w in weights]
    for used, k, active, product in paths:
        part = product * (active.sum() if gated else activity[k])
        for values, weight in zip(scores, used, strict=True):
            values[weight] += part
    named = {
        n: values.view_as(layer.weight)
        for (n, layer), values in zip(layers.items(), scores, strict=True)
    }
    return named, activity


@pytest.mark.parametrize("estimator", ["bound", "gated"])
@pytest.mark.parametrize(("make", "side"), [(mlp, 2), (convolutional, 3)])
def test_px_is_the_sum_over_all_paths_of_a_relu_network(
    make: Callable[[], nn.Sequential], side: int, estimator: str
) -> None:
    model = make()
    data = Images(5, classes=3, side=side)
    expected, _ = enumerated(model, data.images, gated=estimator == "gated")
    found = pai.score("px", model, data, samples=None, estimator=estimator)
    whole = next(iter(expected.values())).sum()  # every path has one weight of the first layer
    for name, values in expected.items():
        assert relative_error(found[name] * whole, values) <= 1e-10, name


def test_the_bound_is_one_on_the_trace_of_the_tangent_kernel() -> None:
    model = mlp()
    data = Images(5, classes=3, side=2)
    shares = px(model, pai.prunable_parameters(model), data, Draw(None))
    expected, _ = enumerated(model, data.images, gated=False)
    whole = expected["1.weight"].sum()
    bound = sum(
        float((whole * shares[n] / model.get_parameter(n).detach().square()).sum()) for n in shares
    )
    trace = 0.0
    # Without biases, whose paths have no input, but with the gates of the network with them.
    for image in data.images:
        logits = gated_linear(model, image[None])
        for k in range(3):
            weights = [model.get_parameter(n) for n in shares]
            for g in torch.autograd.grad(logits[0, k], weights, retain_graph=True):
                trace += float(g.square().sum())
    assert 0 < trace <= bound


def gated_linear(model: nn.Sequential, images: Tensor) -> Tensor:
    x, flow = images, images
    for module in model:
        if isinstance(module, nn.Linear):
            flow = F.linear(flow, module.weight)
        elif isinstance(module, nn.ReLU):
            flow = flow * (x > 0)
        else:
            flow = module(flow)
        x = module(x)
    return flow


def test_below_a_dense_last_layer_the_papers_bound_does_not_see_the_data() -> None:
    model = mlp()
    one, other = Images(5, classes=3, side=2), Images(5, classes=3, side=2, seed=1)
    _, activity = enumerated(model, one.images, gated=False)
    assert torch.allclose(activity, activity[0])
    for name, value in pai.score("px", model, one, samples=None).items():
        again = pai.score("px", model, other, samples=None)[name]
        assert relative_error(again, value) <= 1e-10
        gated, gated_again = (
            pai.score("px", model, d, samples=None, estimator="gated")[name] for d in (one, other)
        )
        assert relative_error(gated_again, gated) > 0.01


def folded(model: nn.Sequential) -> nn.Sequential:
    """The same function with each BatchNorm folded into the convolution before it."""
    layers: list[nn.Module] = []
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            before = layers[-1]
            assert isinstance(before, nn.Conv2d)
            layers[-1] = nn.utils.fuse_conv_bn_eval(before.eval(), module.eval())
        else:
            layers.append(module)
    return nn.Sequential(*layers)


@pytest.mark.parametrize(
    ("name", "options"), [("synflow", {}), ("px", {}), ("px", {"estimator": "gated"})]
)
def test_a_folded_batch_norm_gives_the_same_scores(name: str, options: dict[str, str]) -> None:
    # Squaring scale, shift and statistics of BatchNorm one by one, as public code does, would not.
    model, data = with_batch_norm(), Images(5, classes=3)
    plain = pai.score(name, model, data, samples=None, **options)  # type: ignore[arg-type]
    fused = pai.score(name, folded(model), data, samples=None, **options)  # type: ignore[arg-type]
    for one, other in zip(plain.values(), fused.values(), strict=True):
        assert relative_error(other, one) <= 1e-10


def test_synflow_is_the_product_of_absolute_weights() -> None:
    model = mlp()
    scores = pai.score("synflow", model, image_size=2)
    first, second, third = (model.get_parameter(n).detach().abs() for n in scores)
    whole = (third @ second @ first).sum()
    after = [(third @ second).sum(0), third.sum(0), torch.ones(3, dtype=torch.float64)]
    before = [torch.ones(12, dtype=torch.float64), first.sum(1), second @ first.sum(1)]
    for (name, found), a, b in zip(scores.items(), after, before, strict=True):
        expected = model.get_parameter(name).detach().abs() * a[:, None] * b[None] / whole
        assert relative_error(found, expected) <= 1e-12, name


def test_synflow_conserves_the_flow_of_every_neuron() -> None:
    model = mlp()
    one, two, three = pai.score("synflow", model, image_size=2).values()
    assert relative_error(two.sum(0), one.sum(1)) <= 1e-12
    assert relative_error(three.sum(0), two.sum(1)) <= 1e-12
    assert all(float(v.sum()) == pytest.approx(1, rel=1e-12) for v in (one, two, three))


def test_synflow_conserves_the_flow_of_every_channel_through_batch_norm() -> None:
    model = with_batch_norm()
    one, two, three = pai.score("synflow", model, image_size=8).values()
    assert relative_error(two.sum((0, 2, 3)), one.sum((1, 2, 3))) <= 1e-12
    assert relative_error(three.view(3, 4, 64).sum((0, 2)), two.sum((1, 2, 3))) <= 1e-12


@pytest.mark.parametrize(
    "name", ["conv", "LayerNorm", "eval BatchNorm", "in-place activation", "linear over tokens"]
)
def test_every_layer_of_a_chain_carries_the_whole_flow(name: str) -> None:
    case = build(name)
    for scorer in ("synflow", "px"):
        for values in pai.score(scorer, case.model, case.data, samples=None).values():
            assert float(values.sum()) == pytest.approx(1, rel=1e-12), scorer


class PlainAttention(nn.Module):
    """Attention by its formula, of the weights that the fused one has."""

    def __init__(self, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(6, 18)
        self.proj = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attention = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1)
        mixed: Tensor = self.proj((attention @ v).transpose(1, 2).reshape(batch, tokens, width))
        return mixed


ATTENTION_OPTIONS = [("synflow", {}), ("px", {}), ("px", {"estimator": "gated"})]


@pytest.mark.parametrize(("scorer", "options"), ATTENTION_OPTIONS)
def test_queries_and_keys_carry_a_quarter_each_and_values_a_half(
    scorer: str, options: dict[str, str]
) -> None:
    case = build("fused attention")
    scores = pai.score(scorer, case.model, case.data, samples=None, **options)  # type: ignore[arg-type]
    q, k, v = scores["1.qkv.weight"].chunk(3)
    assert [float(part.sum()) for part in (q, k, v)] == pytest.approx([0.25, 0.25, 0.5], rel=1e-12)
    others = [values for name, values in scores.items() if "qkv" not in name]
    assert [float(values.sum()) for values in others] == pytest.approx([1, 1, 1], rel=1e-12)


@pytest.mark.parametrize(("scorer", "options"), ATTENTION_OPTIONS)
def test_fused_and_plain_attention_have_the_same_scores(
    scorer: str, options: dict[str, str]
) -> None:
    case = build("fused attention")
    plain = PlainAttention().double()
    plain.load_state_dict(case.model.get_submodule("1").state_dict())
    other = nn.Sequential(case.model.get_submodule("0"), plain, case.model.get_submodule("2"))
    found = pai.score(scorer, other, case.data, samples=None, **options)  # type: ignore[arg-type]
    expected = pai.score(scorer, case.model, case.data, samples=None, **options)  # type: ignore[arg-type]
    assert relative_error(flattened(dict(found)), flattened(dict(expected))) <= 1e-12


@pytest.mark.parametrize(("scorer", "options"), ATTENTION_OPTIONS)
def test_torchs_attention_module_has_the_scores_of_its_formula(
    scorer: str, options: dict[str, str]
) -> None:
    case = build("nn.MultiheadAttention")
    module = case.model.get_submodule("1.attention")
    assert isinstance(module, nn.MultiheadAttention)
    plain = PlainAttention().double()
    with torch.no_grad():
        plain.qkv.weight.copy_(module.in_proj_weight)
        plain.qkv.bias.copy_(module.in_proj_bias)
        plain.proj.weight.copy_(module.out_proj.weight)
        plain.proj.bias.copy_(module.out_proj.bias)
    other = nn.Sequential(
        case.model.get_submodule("0"), Residual(plain), case.model.get_submodule("2")
    )
    found = pai.score(scorer, other, case.data, samples=None, **options)  # type: ignore[arg-type]
    expected = pai.score(scorer, case.model, case.data, samples=None, **options)  # type: ignore[arg-type]
    for one, values in zip(found.values(), expected.values(), strict=True):
        assert relative_error(one, values) <= 1e-12


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return x + y


def test_gates_of_attention_are_the_pattern_on_the_data() -> None:
    # By hand: x² through squared weights, mixed by the squared pattern of the network itself.
    case = build("fused attention")
    model, data = case.model.eval(), case.data
    scores = pai.score("px", model, data, samples=None, estimator="gated")
    weights = [model.get_parameter(n).detach().square().requires_grad_() for n in scores]
    patches, qkv, proj, out = weights
    with torch.no_grad():
        tokens = model.get_submodule("0")(data.images)
        q, k, _ = model.get_submodule("1.qkv")(tokens).reshape(-1, 4, 3, 2, 3).unbind(2)
        pattern = (torch.einsum("nihd,njhd->nhij", q, k) / 3**0.5).softmax(-1).square()
    flow = F.conv2d(data.images.square(), patches, stride=4).flatten(2).transpose(1, 2)
    q, k, v = (flow @ qkv.T).reshape(-1, 4, 3, 2, 3).unbind(2)

    def total(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        products = torch.einsum("nihd,njhd->nhij", q, k)
        mixed = torch.einsum("nhij,njhd->nihd", pattern * products / products.detach(), v)
        return ((mixed.flatten(2) @ proj.T).mean(1) @ out.T).sum()

    whole = total(q, k, v).detach()
    fixed = (q.detach(), k.detach(), v.detach())
    parts = [
        (0.25, total(q, fixed[1], fixed[2])),
        (0.25, total(fixed[0], k, fixed[2])),
        (0.5, total(fixed[0], fixed[1], v)),
    ]
    expected = [torch.zeros_like(w) for w in weights]
    for share, part in parts:  # the weights after the attention are in all three
        gradients = torch.autograd.grad(part, weights, retain_graph=True)
        for values, weight, gradient in zip(expected, weights, gradients, strict=True):
            values += (share * weight * gradient / whole).detach()
    for (name, found), values in zip(scores.items(), expected, strict=True):
        assert relative_error(found, values) <= 1e-10, name


def test_gates_of_normalisation_and_gelu_are_those_of_the_data() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(12, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 3)
    ).double()
    norm = model.get_submodule("2")
    nn.init.uniform_(model.get_parameter("2.weight"), 0.5, 2)
    data = Images(5, classes=3, side=2)
    scores = pai.score("px", model, data, samples=None, estimator="gated")
    first, last = (model.get_parameter(n).detach().square().requires_grad_() for n in scores)
    with torch.no_grad():
        inner = model.get_submodule("1")(data.images.flatten(1))
        deviation = (inner.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
        normalised = norm(inner)
        gates = (F.gelu(normalised) / normalised).square()
        gain = model.get_parameter("2.weight").square()
    flow = data.images.flatten(1).square() @ first.T / deviation.square() * gain * gates
    whole = (flow @ last.T).sum()
    gradients = torch.autograd.grad(whole, [first, last])
    for found, weight, gradient in zip(scores.values(), (first, last), gradients, strict=True):
        assert relative_error(found, (weight * gradient / whole).detach()) <= 1e-10


def vision_transformer() -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(
        "vit_tiny_patch16_224",
        pretrained=False,
        img_size=16,
        patch_size=8,
        embed_dim=12,
        depth=3,
        num_heads=2,
        num_classes=4,
        init_values=0.5,
    )
    return model.double()


def test_only_what_comes_from_the_image_flows() -> None:
    model = vision_transformer()
    before = pai.score("synflow", model, image_size=16)
    with torch.no_grad():
        model.get_parameter("pos_embed").mul_(1000)
        model.get_parameter("cls_token").mul_(-1000)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.uniform_(-9, 9)
    after = pai.score("synflow", model, image_size=16)
    assert relative_error(flattened(dict(after)), flattened(dict(before))) <= 1e-12


def test_a_vision_transformer_conserves_the_flow_through_every_block() -> None:
    model = vision_transformer()
    for scorer in ("synflow", "px"):
        scores = pai.score(scorer, model, Images(4, side=16), samples=None)
        sums = {name.removesuffix(".weight"): float(v.sum()) for name, v in scores.items()}
        assert sums["patch_embed.proj"] == pytest.approx(1, rel=1e-9)
        assert sums["head"] == pytest.approx(1, rel=1e-9)
        for block in (f"blocks.{i}" for i in range(3)):
            attention, projection = sums[f"{block}.attn.qkv"], sums[f"{block}.attn.proj"]
            assert attention == pytest.approx(projection, rel=1e-9)
            assert sums[f"{block}.mlp.fc1"] == pytest.approx(sums[f"{block}.mlp.fc2"], rel=1e-9)


def test_queries_and_keys_of_a_vision_transformer_are_not_pruned_first() -> None:
    model = vision_transformer()
    for scorer in ("synflow", "px"):
        data = Images(4, side=16)
        mask = pai.make_mask(pai.score(scorer, model, data, samples=None), 0.5)
        for block in range(3):
            q, k, _ = mask[f"blocks.{block}.attn.qkv.weight"].double().chunk(3)
            assert q.mean() > 0.02
            assert k.mean() > 0.02


def test_a_squeeze_and_excitation_gate_carries_half_of_its_products_flow() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Excitation(), nn.Flatten(), nn.Linear(144, 3))
    scores = pai.score("synflow", model.double(), image_size=8)
    sums = {name: float(values.sum()) for name, values in scores.items()}
    assert sums == pytest.approx(
        {"0.weight": 1, "1.down.weight": 0.5, "1.up.weight": 0.5, "3.weight": 1}, rel=1e-12
    )


class Excitation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(4, 2, 1)
        self.up = nn.Conv2d(2, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        squeezed: Tensor = self.up(F.silu(self.down(x.mean((2, 3), keepdim=True))))
        return x * squeezed.sigmoid()


def test_two_hundred_layers_overflow_nowhere() -> None:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Flatten(), nn.Linear(12, 64)]
    for _ in range(200):
        layers += [nn.ReLU(), nn.Linear(64, 64)]
        nn.init.normal_(layers[-1].get_parameter("weight"))
    model = nn.Sequential(*layers, nn.Linear(64, 3))
    values = torch.ones(12, dtype=torch.float64)
    for layer in model:
        if isinstance(layer, nn.Linear):
            values = layer.weight.detach().double().abs() @ values
    assert torch.isinf(values).all()  # as it would be without a low start
    for name, scores in pai.score("synflow", model, image_size=2).items():
        assert float(scores.double().sum()) == pytest.approx(1, rel=1e-4), name


def test_max_pooling_takes_the_entry_that_was_largest_on_the_data() -> None:
    model = seeded(
        lambda: nn.Conv2d(3, 2, 3), lambda: nn.MaxPool2d(2), nn.Flatten, lambda: nn.Linear(18, 3)
    )
    data = Images(4, classes=3)
    scores = pai.score("px", model, data, samples=None, estimator="gated")
    first, last = (model.get_parameter(n).detach().square().requires_grad_() for n in scores)
    inner = model.get_submodule("0")(data.images)
    _, indices = F.max_pool2d(inner, 2, return_indices=True)
    flow = F.conv2d(data.images.square(), first).flatten(2).gather(2, indices.flatten(2))
    whole = (flow.flatten(1) @ last.T).sum()
    gradients = torch.autograd.grad(whole, [first, last])
    for found, weight, gradient in zip(scores.values(), (first, last), gradients, strict=True):
        assert relative_error(found, (weight * gradient / whole).detach()) <= 1e-10


# Its gradient is its own, whatever the rules make of its value.
CUSTOM = "weight in a custom function"


@pytest.mark.parametrize("case", sorted(set(CASES) - {CUSTOM}), indirect=True)
@pytest.mark.parametrize("estimator", ["bound", "gated"])
def test_px_does_not_depend_on_the_batches_to_double_precision(case: Case, estimator: str) -> None:
    before = fingerprint(case.model)
    whole, parts = (
        flattened(
            dict(
                pai.score(
                    "px", case.model, case.data, samples=None, batch_size=b, estimator=estimator
                )
            )
        )
        for b in (64, 3)
    )
    assert fingerprint(case.model) == before
    assert relative_error(parts, whole) <= 1e-10


@pytest.mark.parametrize("case", sorted(set(CASES) - {CUSTOM}), indirect=True)
def test_synflow_of_every_case_is_not_negative_and_leaves_no_trace(case: Case) -> None:
    before = fingerprint(case.model)
    scores = pai.score("synflow", case.model, image_size=8)
    assert fingerprint(case.model) == before
    assert all(bool((v >= 0).all()) for v in scores.values())
    assert any(bool(v.any()) for v in scores.values())


@pytest.mark.parametrize("scorer", ["synflow", "px"])
def test_a_weight_that_is_not_used_or_behind_zeros_scores_zero(scorer: str) -> None:
    case = build("unused weight")
    assert not pai.score(scorer, case.model, case.data, samples=None)["1.unused.weight"].any()
    case = build("no gradient")
    scores = pai.score(scorer, case.model, case.data, samples=None)
    assert not scores["1.before.weight"].any()
    assert scores["2.out.weight"].all()


def test_a_network_that_nothing_flows_through_scores_zero() -> None:
    model = mlp()
    with torch.no_grad():
        model.get_parameter("3.weight").zero_()
    for scorer in ("synflow", "px"):
        scores = pai.score(scorer, model, Images(4, classes=3, side=2), samples=None)
        assert not any(bool(v.any()) for v in scores.values())


def test_the_size_of_the_image_comes_from_option_data_or_backbone() -> None:
    backbone = tiny_backbone()
    model = pai.Classifier(backbone, nn.Linear(6, 3))
    own = pai.score("synflow", model)
    given = pai.score("synflow", model, image_size=8)
    seen = pai.score("synflow", model, Images(2, dtype=torch.float32))
    for name in own:
        assert torch.equal(own[name], given[name])
        assert torch.equal(own[name], seen[name])
    with pytest.raises(ValueError, match="pass image_size, or data"):
        pai.score("synflow", mlp())
    with pytest.raises(ValueError, match="image_size=0"):
        pai.score("synflow", mlp(), image_size=0)


def test_an_unknown_estimator_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown estimator 'exact'.* Choose from: bound, gated"):
        pai.score("px", mlp(), Images(4, side=2), samples=None, estimator="exact")


@pytest.mark.parametrize("scorer", ["synflow", "px"])
def test_a_function_with_a_gradient_of_its_own_is_refused(scorer: str) -> None:
    case = build(CUSTOM)
    with pytest.raises(ValueError, match="no paths through _HiddenBackward"):
        pai.score(scorer, case.model, case.data, samples=None)


class Between(nn.Module):
    """A function of the output of one layer, before another."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.function = function
        self.last = nn.Linear(4, CLASSES_OUT)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.function(self.first(x)).mean((2, 3)))
        return y


CLASSES_OUT = 3
REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "instance norm": (F.instance_norm, "instance_norm"),
    "softplus": (F.softplus, "softplus"),
    "square": (lambda x: x**2, "__pow__"),
    "absolute value": (torch.abs, "abs"),
    "exponential": (torch.exp, "exp"),
    "threshold": (nn.Threshold(0.1, 0.0), "threshold"),
    "clamp": (lambda x: x.clamp(min=0), "clamp"),
    "maximum": (lambda x: torch.maximum(x, torch.zeros_like(x)), "maximum"),
    "GLU": (lambda x: F.glu(torch.cat([x, x], 1), 1), "glu"),
    "response norm": (lambda x: x * x.norm(dim=(2, 3), keepdim=True), "norm"),
    "division": (lambda x: x / (x.sum(1, keepdim=True) + 1e-6), "div by a stream"),
    "detached": (lambda x: x + x.detach(), "detach"),
    "indices of a pool": (lambda x: F.max_pool2d(x, 2, return_indices=True)[0], "with_indices"),
    "gated product": (lambda x: x + F.silu(x) * x, "product of streams"),
    "product alone": (lambda x: F.silu(x) * x, "product of two streams"),
}


@pytest.mark.parametrize("scorer", ["synflow", "px"])
@pytest.mark.parametrize("name", REFUSED)
def test_a_function_without_a_rule_is_refused_by_its_name(name: str, scorer: str) -> None:
    function, match = REFUSED[name]
    model = Between(function)
    with pytest.raises(ValueError, match=f"know no paths through .*{match}.*take another scorer"):
        pai.score(scorer, model, Images(4, classes=3, dtype=torch.float32), samples=None)


@pytest.mark.parametrize(("scorer", "options"), ATTENTION_OPTIONS)
def test_l2_normalisation_has_its_length_on_the_data_for_a_gate(
    scorer: str, options: dict[str, str]
) -> None:
    torch.manual_seed(0)
    model = Between(lambda x: F.normalize(x)).double()
    data = Images(4, classes=3)
    scores = pai.score(scorer, model, data, samples=None, **options)  # type: ignore[arg-type]
    first, last = (model.get_parameter(n).detach() for n in scores)
    power = 1 if scorer == "synflow" else 2
    first, last = (w.abs().pow(power).requires_grad_() for w in (first, last))
    images = torch.ones_like(data.images)
    gates = torch.ones(4, 1, 6, 6, dtype=torch.float64)
    if options:
        images = data.images.square()
        inner = model.first(data.images).detach()
        gates = inner.norm(dim=1, keepdim=True).reciprocal().square()
    whole = ((F.conv2d(images, first) * gates).mean((2, 3)) @ last.T).sum()
    gradients = torch.autograd.grad(whole, [first, last])
    for found, weight, gradient in zip(scores.values(), (first, last), gradients, strict=True):
        assert relative_error(found, (weight * gradient / whole).detach()) <= 1e-10

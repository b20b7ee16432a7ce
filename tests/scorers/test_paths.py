from collections.abc import Callable, Sequence
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pai_utils as pai
from tests.cases import (
    CASES,
    BatchNorm,
    Case,
    Images,
    Layers,
    build,
    fingerprint,
    flattened,
    relative_error,
    tiny_backbone,
)

CUSTOM = "weight in a custom function"
WITH_PATHS = sorted(set(CASES) - {CUSTOM})
SCORES: list[tuple[str, dict[str, Any]]] = [
    ("synflow", {}),
    ("px", {}),
    ("px", {"estimator": "gated"}),
]
each_score = pytest.mark.parametrize(("scorer", "options"), SCORES)


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
        lambda: nn.Conv2d(3, 2, 2), nn.ReLU, lambda: nn.Conv2d(2, 4, 2, groups=2), nn.Flatten
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


def gates_of(model: nn.Sequential, images: Tensor) -> list[Tensor]:
    """Whether each ReLU lets pass, of the network with its biases."""
    gates, x = [], images
    for module in model:
        x = module(x)
        if isinstance(module, nn.ReLU):
            gates.append((x > 0).double())
    return gates


def linear_map(
    model: nn.Sequential, weights: Sequence[Tensor], images: Tensor, gates: list[Tensor]
) -> Tensor:
    """A ReLU network with other weights, without biases and with given gates."""
    of_layers, of_gates, x = iter(weights), iter(gates), images
    for module in model:
        if isinstance(module, nn.Linear):
            x = F.linear(x, next(of_layers))
        elif isinstance(module, nn.Conv2d):
            x = F.conv2d(x, next(of_layers), groups=module.groups)
        elif isinstance(module, nn.ReLU):
            x = x * next(of_gates) if gates else x
        else:
            x = module(x)
    return x


def by_definition(model: nn.Sequential, images: Tensor, estimator: str) -> dict[str, Tensor]:
    """w² ∂R/∂(w²) of a ReLU network, R as in the docstring of ``px``."""
    names = pai.prunable_parameters(model)
    squares = [model.get_parameter(n).detach().square().requires_grad_() for n in names]
    ones = [torch.ones_like(w) for w in squares]
    gates = gates_of(model, images)
    if estimator == "gated":
        whole = linear_map(model, squares, images.square(), gates).sum()
    else:
        of_data = linear_map(model, ones, images.square(), gates).sum(0)
        whole = of_data @ linear_map(model, squares, torch.ones_like(images[:1]), [])[0]
    gradients = torch.autograd.grad(whole, squares)
    return {n: (w * g).detach() for n, w, g in zip(names, squares, gradients, strict=True)}


def assert_shares(scores: dict[str, Tensor], whole: Tensor, weights: list[Tensor]) -> None:
    """Scores are w ∂R/∂w / R."""
    gradients = torch.autograd.grad(whole, weights)
    for (name, found), weight, gradient in zip(scores.items(), weights, gradients, strict=True):
        assert relative_error(found, (weight * gradient / whole).detach()) <= 1e-10, name


@pytest.mark.parametrize("estimator", ["bound", "gated"])
@pytest.mark.parametrize(("make", "side"), [(mlp, 2), (convolutional, 3)])
def test_px_is_the_sum_over_all_paths_of_a_relu_network(
    make: Callable[[], nn.Sequential], side: int, estimator: str
) -> None:
    model, data = make(), Images(5, classes=3, side=side)
    expected = by_definition(model, data.images, estimator)
    found = pai.score("px", model, data, samples=None, estimator=estimator)
    whole = next(iter(expected.values())).sum()  # every path has one weight of the first layer
    for name, values in expected.items():
        assert relative_error(found[name] * whole, values) <= 1e-10, name


@each_score
def test_a_folded_batch_norm_gives_the_same_scores(scorer: str, options: dict[str, str]) -> None:
    # Squaring scale, shift and statistics of BatchNorm one by one, as public code does, would not.
    model, data = with_batch_norm().eval(), Images(5, classes=3)
    layers: list[nn.Module] = []
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            layers[-1] = nn.utils.fuse_conv_bn_eval(layers[-1], module)  # type: ignore[type-var]
        else:
            layers.append(module)
    plain = pai.score(scorer, model, data, samples=None, **options)  # type: ignore[arg-type]
    fused = pai.score(scorer, nn.Sequential(*layers), data, samples=None, **options)  # type: ignore[arg-type]
    for one, same in zip(plain.values(), fused.values(), strict=True):
        assert relative_error(same, one) <= 1e-10


@pytest.mark.parametrize(
    "name", ["conv", "LayerNorm", "eval BatchNorm", "in-place activation", "linear over tokens"]
)
def test_every_layer_of_a_chain_carries_the_whole_flow(name: str) -> None:
    case = build(name)
    for scorer in ("synflow", "px"):
        for values in pai.score(scorer, case.model, case.data, samples=None).values():
            assert float(values.sum()) == pytest.approx(1, rel=1e-12), scorer


def plain_attention(source: nn.Module) -> nn.Module:
    """Attention by its formula, with the weights of the fused one or of torch's own module."""

    def attend(m: Any, x: Tensor) -> Tensor:
        q, k, v = m.qkv(x).reshape(*x.shape[:2], 3, 2, -1).permute(2, 0, 3, 1, 4)
        pattern = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1)
        mixed: Tensor = m.proj((pattern @ v).transpose(1, 2).reshape(x.shape))
        return x + mixed if module is not None else mixed

    module = next((m for m in source.modules() if isinstance(m, nn.MultiheadAttention)), None)
    layers = Layers(attend, qkv=nn.Linear(6, 18), proj=nn.Linear(6, 6)).double()
    state = source.state_dict()
    if module is not None:
        names = {"in_proj_weight": "qkv.weight", "in_proj_bias": "qkv.bias"}
        state = {
            names.get(n, n.replace("out_proj", "proj")): v for n, v in module.state_dict().items()
        }
    layers.load_state_dict(state)
    return layers


@each_score
@pytest.mark.parametrize("name", ["fused attention", "nn.MultiheadAttention"])
def test_attention_has_the_scores_of_its_formula(
    name: str, scorer: str, options: dict[str, str]
) -> None:
    case = build(name)
    tokens, attention, head = case.model.children()
    plain = nn.Sequential(tokens, plain_attention(attention), head)
    expected = pai.score(scorer, plain, case.data, samples=None, **options)  # type: ignore[arg-type]
    found = pai.score(scorer, case.model, case.data, samples=None, **options)  # type: ignore[arg-type]
    for one, values in zip(found.values(), expected.values(), strict=True):
        assert relative_error(one, values) <= 1e-12


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

    fixed = (q.detach(), k.detach(), v.detach())
    parts = [
        (0.25, total(q, fixed[1], fixed[2])),
        (0.25, total(fixed[0], k, fixed[2])),
        (0.5, total(fixed[0], fixed[1], v)),
    ]
    # The value is the same in all three; the weights after the attention are in each.
    assert_shares(scores, sum((share * part for share, part in parts), torch.zeros(())), weights)


def between(function: Callable[[Tensor], Tensor]) -> nn.Module:
    """A function, or a module, of the output of one layer, before another."""
    torch.manual_seed(0)
    module = function if isinstance(function, nn.Module) else Layers(lambda m, x: function(x))
    return Layers(
        lambda m, x: m.last(m.function(m.first(x)).mean((2, 3))),
        first=nn.Conv2d(3, 4, 3),
        function=module,
        last=nn.Linear(4, 3),
    ).double()


NORM = nn.LayerNorm(6).requires_grad_(False)
NORM.weight.copy_(torch.linspace(0.5, 2, 6))


def layer_scale(x: Tensor) -> Tensor:
    return NORM.weight * (x.var(-1, correction=0, keepdim=True) + 1e-5).rsqrt()


def group_scale(x: Tensor) -> Tensor:
    variance: Tensor = x.unflatten(1, (2, 2)).var((2, 3, 4), correction=0)
    return (variance + 1e-5).rsqrt().repeat_interleave(2, 1)[..., None, None]


Function = Callable[[Tensor], Tensor]
GATES: dict[str, tuple[Function, Function]] = {
    "GELU": (F.gelu, lambda x: F.gelu(x) / x),
    "layer norm": (NORM, layer_scale),
    "group norm": (lambda x: F.group_norm(x, 2), group_scale),
    "RMS norm": (
        lambda x: F.rms_norm(x, (6,), eps=0.1),
        lambda x: (x.square().mean(-1, keepdim=True) + 0.1).rsqrt(),
    ),
    "L2 normalisation": (F.normalize, lambda x: 1 / x.norm(dim=1, keepdim=True)),
    "sigmoid gate": (lambda x: x * torch.sigmoid(x), torch.sigmoid),
}


@pytest.mark.parametrize(("function", "gate"), GATES.values(), ids=GATES)
def test_gates_are_those_of_the_data(function: Function, gate: Function) -> None:
    model, data = between(function), Images(4, classes=3)
    scores = pai.score("px", model, data, samples=None, estimator="gated")
    weights = [model.get_parameter(n).detach().square().requires_grad_() for n in scores]
    gates = gate(model.get_submodule("first")(data.images).detach()).square()
    flow = F.conv2d(data.images.square(), weights[0]) * gates
    assert_shares(scores, (flow.mean((2, 3)) @ weights[1].T).sum(), weights)


def test_max_pooling_takes_the_entry_that_was_largest_on_the_data() -> None:
    model, data = between(nn.MaxPool2d(2)), Images(4, classes=3)
    scores = pai.score("px", model, data, samples=None, estimator="gated")
    weights = [model.get_parameter(n).detach().square().requires_grad_() for n in scores]
    _, indices = F.max_pool2d(model.get_submodule("first")(data.images), 2, return_indices=True)
    flow = F.conv2d(data.images.square(), weights[0]).flatten(2).gather(2, indices.flatten(2))
    assert_shares(scores, (flow.mean(2) @ weights[1].T).sum(), weights)


REFUSED: dict[str, tuple[Function, str]] = {
    "instance norm": (F.instance_norm, "instance_norm"),
    "square": (lambda x: x**2, "__pow__"),
    "clamp": (lambda x: x.clamp(min=0), "clamp"),
    "response norm": (lambda x: x * x.norm(dim=(2, 3), keepdim=True), "norm"),
    "division": (lambda x: x / (x.sum(1, keepdim=True) + 1e-6), "div by a stream"),
    "detached": (lambda x: x + x.detach(), "detach"),
    "indices of a pool": (lambda x: F.max_pool2d(x, 2, return_indices=True)[0], "with_indices"),
    "gated product": (lambda x: x + F.silu(x) * x, "product of streams"),
    "product alone": (lambda x: F.silu(x) * x, "product of two streams"),
}


@pytest.mark.parametrize(("function", "match"), REFUSED.values(), ids=REFUSED)
def test_a_function_without_a_rule_is_refused_by_its_name(function: Function, match: str) -> None:
    model, data = between(function), Images(4, classes=3)
    for scorer in ("synflow", "px"):
        with pytest.raises(ValueError, match=f"no paths through .*{match}.*take another scorer"):
            pai.score(scorer, model, data, samples=None)
        custom = build(CUSTOM)  # with a gradient of its own
        with pytest.raises(ValueError, match="no paths through _HiddenBackward"):
            pai.score(scorer, custom.model, custom.data, samples=None)


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


def test_a_squeeze_and_excitation_gate_carries_half_of_its_products_flow() -> None:
    def excite(m: Any, x: Tensor) -> Tensor:
        squeezed: Tensor = m.up(F.silu(m.down(x.mean((2, 3), keepdim=True))))
        return x * squeezed.sigmoid()

    gate = Layers(excite, down=nn.Conv2d(4, 2, 1), up=nn.Conv2d(2, 4, 1))
    scores = pai.score("synflow", between(gate), image_size=8)
    assert list(scores) == [
        f"{n}.weight" for n in ("first", "function.down", "function.up", "last")
    ]
    sums = [float(values.sum()) for values in scores.values()]
    assert sums == pytest.approx([1, 0.5, 0.5, 1], rel=1e-12)


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


@pytest.mark.parametrize("case", WITH_PATHS, indirect=True)
def test_scores_are_not_negative_know_no_batches_and_leave_no_trace(case: Case) -> None:
    before = fingerprint(case.model)
    assert (flattened(pai.score("synflow", case.model, image_size=8)) >= 0).all()
    for estimator in ("bound", "gated"):
        options = {"samples": None, "estimator": estimator}
        whole, parts = (
            flattened(pai.score("px", case.model, case.data, batch_size=b, **options))  # type: ignore[arg-type]
            for b in (64, 3)
        )
        assert (whole >= 0).all()
        assert whole.any()
        assert relative_error(parts, whole) <= 1e-10
    assert fingerprint(case.model) == before


def test_weights_that_nothing_flows_through_score_zero() -> None:
    stopped = mlp()
    with torch.no_grad():
        stopped.get_parameter("3.weight").zero_()
    for scorer in ("synflow", "px"):
        case = build("unused weight")
        assert not pai.score(scorer, case.model, case.data, samples=None)["1.unused.weight"].any()
        case = build("no gradient")
        scores = pai.score(scorer, case.model, case.data, samples=None)
        assert not scores["1.before.weight"].any()
        assert scores["2.out.weight"].all()
        data = Images(4, classes=3, side=2)
        assert not flattened(pai.score(scorer, stopped, data, samples=None)).any()


def test_the_size_of_the_image_comes_from_option_data_or_backbone() -> None:
    model = pai.Classifier(tiny_backbone(), nn.Linear(6, 3))
    own = flattened(pai.score("synflow", model))
    assert torch.equal(flattened(pai.score("synflow", model, image_size=8)), own)
    seen = pai.score("synflow", model, Images(2, dtype=torch.float32))
    assert torch.equal(flattened(seen), own)
    with pytest.raises(ValueError, match="image_size=None must be a side"):
        pai.score("synflow", mlp())


@pytest.mark.parametrize("size", [(6, 9), (2, 6, 9)])
def test_synflow_takes_rectangles_and_as_many_channels_as_the_model(size: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(84, 3)).double()
    scores = pai.score("synflow", model, image_size=size)
    weights = [model.get_parameter(n).detach().abs().requires_grad_() for n in scores]
    ones = torch.ones(1, 2, 6, 9, dtype=torch.float64)
    assert_shares(scores, (F.conv2d(ones, weights[0]).flatten(1) @ weights[1].T).sum(), weights)

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pai_utils as pai
from pai_utils.curvature.blocks import DAMPING
from tests.cases import Images, Layers, build, relative_error, tiny_classifier, tiny_task

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(5, 3), (5,)),
    "linear over tokens": (lambda: nn.Linear(5, 3), (4, 5)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (4, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 0)), (3, 7, 6)),
    "conv2d, dilated": (lambda: nn.Conv2d(3, 4, 3, padding=2, dilation=2, bias=False), (3, 7, 7)),
    "conv2d, padded unevenly": (lambda: nn.Conv2d(3, 4, 2, padding="same"), (3, 5, 5)),
    "conv2d, circular": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (3, 5, 5)),
    "conv2d, grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (4, 6, 6)),
    "conv2d, depthwise": (lambda: nn.Conv2d(4, 8, 3, padding=1, groups=4), (4, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, stride=2), (2, 6, 4, 5)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 3, 3, stride=2, padding=1), (4, 6)),
    "transposed 2d, grouped": (
        lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, output_padding=1, groups=2, dilation=2),
        (4, 5, 4),
    ),
    "transposed 3d": (lambda: nn.ConvTranspose3d(2, 3, 2, stride=2), (2, 3, 2, 3)),
}


def dataset(inputs: Tensor) -> Images:
    """Samples that need not be images."""
    data = Images(len(inputs))
    data.images = inputs
    return data


def alone(name: str) -> tuple[nn.Module, Images]:
    """A layer in float64, and data for it."""
    make, shape = LAYERS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().double(), dataset(torch.randn(7, *shape).double())


def dense_matrix(layer: nn.Module, inputs: Tensor, outputs_a_row: int) -> Tensor:
    """JᵀJ over the number of rows, J the outputs' derivatives by the weight: ``[W, W]``."""
    others = {n: p.detach() for n, p in layer.named_parameters() if n != "weight"}

    def outputs(weight: Tensor) -> Tensor:
        found: Tensor = torch.func.functional_call(layer, {"weight": weight, **others}, (inputs,))
        return found.flatten()

    weight = layer.get_parameter("weight").detach()
    jacobian: Tensor = torch.func.jacrev(outputs)(weight).flatten(1)
    return jacobian.T @ jacobian / (len(jacobian) / outputs_a_row)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", LAYERS)
def test_scores_are_those_of_the_dense_matrix_of_each_kind_of_layer(name: str) -> None:
    layer, data = alone(name)
    weight = layer.get_parameter("weight").detach()
    channels = layer(data.images).movedim(-1 if isinstance(layer, nn.Linear) else 1, 0)
    matrix = dense_matrix(layer, data.images, len(channels))
    found = pai.score("wanda", layer, data, samples=None, batch_size=3)["weight"]
    expected = weight.abs() * matrix.diagonal().sqrt().view_as(weight)
    assert relative_error(found, expected) <= 1e-12
    for damping in (DAMPING, 1e-3):
        matrix_damped = matrix + damping * matrix.diagonal().mean() * torch.eye(
            len(matrix), dtype=torch.float64
        )
        inverse = torch.linalg.inv(matrix_damped).diagonal().view_as(weight)
        found = pai.score("obs_inputs", layer, data, samples=None, batch_size=3, damping=damping)[
            "weight"
        ]
        assert relative_error(found, weight.square() / (2 * inverse)) <= 1e-10


class Heads(nn.Module):
    """An attention of torch's own, of one stream or of three."""

    def __init__(self, call: Callable[[nn.Module, Tensor], Any], **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True, **options)
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.call(self.attention, x)[0]
        return output


@pytest.mark.parametrize("need_weights", [False, True])
def test_torchs_attention_is_scored_by_the_inputs_of_its_projections(need_weights: bool) -> None:
    x = torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(0)).double()
    data = dataset(x)
    model = Heads(lambda m, x: m(x, x, x, need_weights=need_weights)).double().eval()
    attention: Any = model.attention
    q, k, v = F.linear(x, attention.in_proj_weight, attention.in_proj_bias).chunk(3, -1)
    heads = (t.unflatten(-1, (2, 3)).transpose(1, 2) for t in (q, k, v))
    mixed = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
    scores = pai.score("wanda", model, data, samples=None, batch_size=2)
    for name, rows in (("in_proj_weight", x), ("out_proj.weight", mixed)):
        weight = attention.get_parameter(name).detach()
        expected = weight.abs() * rows.detach().flatten(0, 1).square().mean(0).sqrt()
        assert relative_error(scores[f"attention.{name}"], expected) <= 1e-12
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("options", [{}, {"kdim": 4, "vdim": 3}])
def test_projections_of_several_streams_have_the_rows_of_their_own(options: dict[str, int]) -> None:
    x = torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(0)).double()
    data = dataset(x)
    kdim, vdim = options.get("kdim", 6), options.get("vdim", 6)
    model = Heads(lambda m, x: m(x[:, :1], 2 * x[..., :kdim], x[..., :vdim]), **options).double()
    scores = pai.score("obs_inputs", model, data, samples=None, damping=0.1)
    streams = x[:, 0], 2 * x[..., :kdim].flatten(0, 1), x[..., :vdim].flatten(0, 1)
    attention: Any = model.attention
    if options:
        parts = [attention.get_parameter(f"{letter}_proj_weight") for letter in "qkv"]
        found = [scores[f"attention.{letter}_proj_weight"] for letter in "qkv"]
        ridges = [0.1 * rows.square().mean() for rows in streams]
    else:
        parts = attention.in_proj_weight.chunk(3)
        found = list(scores["attention.in_proj_weight"].chunk(3))
        ridges = [0.1 * torch.stack([rows.square().mean() for rows in streams]).mean()] * 3
    for rows, weight, score, ridge in zip(streams, parts, found, ridges, strict=True):
        matrix = rows.T @ rows / len(rows) + ridge * torch.eye(rows.shape[1], dtype=torch.float64)
        expected = weight.detach().square() / (2 * torch.linalg.inv(matrix).diagonal())
        assert relative_error(score, expected) <= 1e-10


def test_a_weight_used_twice_has_the_rows_of_both_uses() -> None:
    case = build("shared weight")
    layer: Any = case.model[1]  # type: ignore[index]
    seen = []
    with torch.no_grad():
        tokens = case.model.eval()[0](case.data.images)  # type: ignore[index]
        seen = [tokens, torch.tanh(layer.linear(tokens))]
    rows = torch.cat([x.flatten(0, 1) for x in seen])
    found = pai.score("wanda", case.model, case.data, samples=None)["1.linear.weight"]
    expected = layer.linear.weight.detach().abs() * rows.square().mean(0).sqrt()
    assert relative_error(found, expected) <= 1e-12


@pytest.mark.parametrize("scorer", ["wanda", "obs_inputs"])
@pytest.mark.parametrize("name", ["linear over tokens", "conv2d, grouped", "transposed 3d"])
def test_how_a_layer_is_called_changes_no_score(name: str, scorer: str) -> None:
    layer, data = alone(name)
    expected = pai.score(scorer, layer, data, samples=None)["weight"]
    model = Layers(lambda m, x: torch.stack([m.layer(input=each) for each in x]), layer=layer)
    found = pai.score(scorer, model, data, samples=None)["layer.weight"]
    assert relative_error(found, expected) <= 1e-12


@pytest.mark.parametrize("scorer", ["wanda", "obs_inputs"])
@pytest.mark.parametrize("name", ["reshaped weight", "weight in a custom function"])
def test_a_weight_that_no_layer_takes_is_refused_by_its_name(scorer: str, name: str) -> None:
    case = build(name)
    with pytest.raises(
        ValueError, match=r"'1\.\w+\.weight' has no inputs: no linear layer or conv"
    ):
        pai.score(scorer, case.model, case.data, samples=None)


def test_inputs_that_are_always_zero_are_free_and_singular_ones_need_damping() -> None:
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    x[:, 2] = 0
    layer, data = nn.Linear(4, 3), dataset(x)
    assert not pai.score("wanda", layer, data, samples=None)["weight"][:, 2].any()
    assert pai.score("obs_inputs", layer, data, samples=None)["weight"].min() > 0
    with pytest.raises(ValueError, match=r"'weight' are fewer .* damping=0\.0; choose a larger"):
        pai.score("obs_inputs", layer, data, samples=None, damping=0.0)
    nothing = dataset(torch.zeros(6, 4))
    assert not pai.score("obs_inputs", layer, nothing, samples=None)["weight"].any()


def test_the_score_of_inputs_knows_no_head() -> None:
    model, task = tiny_classifier(), tiny_task()
    scores = pai.score("wanda", model, task.train, samples=8)
    encoder = pai.score("wanda", model.backbone, task.train, samples=8)
    assert all(torch.equal(scores[f"backbone.{n}"], values) for n, values in encoder.items())

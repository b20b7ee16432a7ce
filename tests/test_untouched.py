"""Models that share, keep or count things are as before, and are never read out of date."""

import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pai_utils as pai
from pai_utils.curvature.products import GGNOperator, HessianOperator
from pai_utils.export import load_compressed, save_compressed
from pai_utils.landscape import predicted_and_measured
from pai_utils.support.sampling import Draw
from tests.cases import BatchNorm, Head, Images, Tokens, evaluating, fingerprint, relative_error

DATA = Images(6)


class TwoNames(nn.Module):
    """A module, a parameter and a buffer, each under two names."""

    def __init__(self) -> None:
        super().__init__()
        layer, self.last, self.head = nn.Linear(6, 6), nn.Linear(6, 6), Head(6)
        self.tokens, self.layers = Tokens(), nn.ModuleList([layer, layer])
        self.last.weight = layer.weight
        self.one = self.two = nn.Buffer(torch.full((6,), 0.5, dtype=torch.float64))

    def forward(self, images: Tensor) -> Tensor:
        x = self.tokens(images)
        for layer in self.layers:
            x = F.relu(layer(x) + self.one)
        logits: Tensor = self.head(self.last(x) + self.two)
        return logits


class Counting(nn.Module):
    """A forward that leaves its traces in all kinds of places."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), BatchNorm(4), Head(4)
        self.seen: Tensor = nn.Buffer(torch.zeros(()))
        self.replaced: Tensor = nn.Buffer(torch.zeros(()), persistent=False)
        self.number, self.plain, self.last = 0, torch.zeros(2), None
        self.kept: list[Tensor] = []
        self.nested: dict[str, dict[str, Tensor | list[Tensor]]] = {"x": {"list": []}}

    def forward(self, images: Tensor) -> Tensor:
        x = self.norm(self.conv(images))
        self.seen += 1
        self.replaced = self.replaced + 1
        self.number += 1
        self.plain.add_(1)
        self.last = x
        self.kept.append(x)
        self.nested["x"]["y"] = x
        self.nested["x"]["list"].append(x)  # type: ignore[union-attr]
        logits: Tensor = self.head(F.relu(x))
        return logits


class Keeping(nn.Module):
    """A layer whose effective weight and bias are kept in evaluation mode, or computed each time.

    In a dictionary at the first forward, as timm's LeViT keeps attention biases, or as an attribute
    that the change of mode sets, as the original LeViT and TinyViT do.
    """

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.kept = how, {}  # type: ignore[var-annotated]
        self.linear, self.offset = nn.Linear(6, 6), nn.Parameter(torch.randn(2, 6))

    def effective(self) -> tuple[Tensor, Tensor]:
        weight = self.linear.weight
        return weight - weight.mean(1, keepdim=True), self.linear.bias + self.offset.sum(0)

    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        # Returns nothing, as in timm.
        super().train(mode)
        if self.how == "attribute" and not mode:
            self.made = self.effective()
        elif self.how == "attribute" and hasattr(self, "made"):
            del self.made
        if mode:
            self.kept = {}

    def forward(self, x: Tensor) -> Tensor:
        if self.training or self.how == "nowhere":
            weight, bias = self.effective()
        elif self.how == "attribute":
            weight, bias = self.made
        else:
            weight, bias = self.kept.setdefault(x.device, self.effective())
        return F.linear(x, weight, bias)


class Merging(nn.Linear):
    """An adapter of low rank that evaluation mode merges into the weight, as loralib's."""

    def __init__(self) -> None:
        super().__init__(6, 6)
        self.up, self.down = nn.Parameter(torch.randn(6, 1)), nn.Parameter(torch.randn(1, 6))
        self.merged = False

    def train(self, mode: bool = True) -> "Merging":
        super().train(mode)
        if self.merged is mode:
            self.weight.data += (-1 if mode else 1) * self.up.data @ self.down.data
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if self.merged else y + x @ self.down.T @ self.up.T


def keeping(how: str) -> nn.Module:
    return build(lambda: nn.Sequential(Tokens(), Keeping(how), nn.ReLU(), Head(6)))


def build(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().double().eval()


def partly_trained() -> nn.Module:
    """Modes, flags and gradients that differ from part to part."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), BatchNorm(4), nn.Dropout(0.5), nn.ReLU(), Head(4))
    model.get_parameter("0.bias").requires_grad_(False)
    model.get_parameter("0.weight").grad = torch.ones(4, 3, 3, 3)
    return model.double()


AWKWARD: dict[str, Callable[[], nn.Module]] = {
    "two names": lambda: build(TwoNames),
    "traces of the forward": lambda: build(Counting),
    "kept in a dictionary": lambda: keeping("dictionary"),
    "kept as an attribute": lambda: keeping("attribute"),
    "partly trained": partly_trained,
    "adapter to merge": lambda: build(lambda: nn.Sequential(Tokens(), Merging(), Head(6))).train(),
    "adapter merged": lambda: build(lambda: nn.Sequential(Tokens(), Merging(), Head(6))),
}
each_model = pytest.mark.parametrize("model", AWKWARD)
each_keeping = pytest.mark.parametrize("how", ["dictionary", "attribute"])


def take_products(model: nn.Module) -> None:
    for kind in (HessianOperator, GGNOperator):
        operator = kind(model, pai.prunable_parameters(model), DATA, Draw(None, 4))
        operator(operator.parameters)


def move(model: nn.Module) -> None:
    step = {n: torch.ones_like(model.get_parameter(n)) for n in pai.prunable_parameters(model)}
    predicted_and_measured(model, {"ones": step}, DATA, Draw(None, 4), fractions=[0.1])


def prune_and_repair(model: nn.Module) -> None:
    options: dict[str, Any] = {"rounds": 2, "samples": None, "batch_size": 4}
    pai.prune(model, DATA, "snip", 0.3, repair="layerwise+moments", **options)


ACTIONS: dict[str, Callable[[nn.Module], object]] = {
    **{
        name: partial(pai.score, name, data=DATA, samples=None, batch_size=4)
        for name in pai.SCORERS
    },
    "products": take_products,
    "prune and repair": prune_and_repair,
    "evaluate": partial(pai.evaluate, data=DATA, batch_size=4),
    "move the weights": move,
}


@each_model
@pytest.mark.parametrize("action", ACTIONS)
def test_the_model_is_exactly_as_it_was(model: str, action: str) -> None:
    one, other = AWKWARD[model](), AWKWARD[model]()
    before = fingerprint(one)
    scorers = ("hessian_diag", "wanda", "obs_inputs")  # which refuse some of these models
    refused = action in scorers or (action == "prune and repair" and "adapter" in model)
    with contextlib.suppress(*[ValueError] * refused):
        ACTIONS[action](one)
    assert fingerprint(one) == before
    with evaluating(other):
        expected = other(DATA.images)
    with evaluating(one):
        assert torch.equal(one(DATA.images), expected)


@each_keeping
@pytest.mark.parametrize("name", pai.SCORERS)
def test_what_a_forward_kept_changes_no_score(how: str, name: str) -> None:
    scores = []
    for model in (keeping("nowhere"), keeping(how)):
        names = ["0.patches.weight", "1.linear.weight", "1.offset"]
        names = names[:1] if name in ("wanda", "obs_inputs", "hessian_diag") else names
        with torch.inference_mode():
            model(DATA.images)
        scores.append(pai.score(name, model, DATA, names=names, samples=None, batch_size=4))
    for found, expected in zip(*(each.values() for each in scores), strict=True):
        assert expected.any() or name in ("synflow", "px")
        assert relative_error(found, expected) <= 1e-12


@each_keeping
def test_pruning_training_and_loading_reach_what_a_forward_kept(how: str, tmp_path: Path) -> None:
    found = []
    for model in (keeping("nowhere"), keeping(how)):
        model(DATA.images)  # whose graph must not get into copies
        pruned = pai.prune(model, DATA, "magnitude", 0.5, samples=None)
        steps = [model(DATA.images), pruned.model(DATA.images)]
        pruned.mask.apply_(model)
        steps.append(model(DATA.images))
        save_compressed(model, pruned.mask, tmp_path / "m")
        pai.finetune(model, DATA, pruned.mask, steps=4, batch_size=3, learning_rate=0.1)
        steps.append(model(DATA.images))
        load_compressed(tmp_path / "m", model)
        steps.append(model(DATA.images))
        found.append(steps)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    dense, pruned, masked, tuned, loaded = found[0]
    assert torch.equal(pruned, masked)
    assert torch.equal(loaded, masked)
    assert not torch.equal(masked, dense)
    assert not torch.equal(tuned, masked)


def test_a_graph_of_the_callers_outlives_an_evaluation() -> None:
    model = partly_trained()
    loss = model(DATA.images).sum()
    pai.evaluate(model, DATA)
    loss.backward()
    assert model.get_parameter("0.weight").grad is not None


def test_an_adapter_is_scored_and_trained_as_it_computes_while_it_is_not_merged() -> None:
    model = AWKWARD["adapter to merge"]()
    names = ["0.patches.weight", "1.weight", "1.up"]
    gradients = torch.autograd.grad(
        F.cross_entropy(model(DATA.images), DATA.labels), list(map(model.get_parameter, names))
    )
    scores = pai.score("snip", model, DATA, names=names, samples=None)
    for name, gradient in zip(names, gradients, strict=True):
        expected = (gradient * model.get_parameter(name).detach()).abs()
        assert relative_error(scores[name], expected) <= 1e-12
    before = model.get_parameter("1.up").detach().clone()
    pai.finetune(model, DATA, steps=1, batch_size=6, learning_rate=0.1)
    step = before - 0.1 * gradients[2]
    assert relative_error(model.get_parameter("1.up").detach(), step) <= 1e-12

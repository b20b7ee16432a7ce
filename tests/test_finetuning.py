import copy
import math
import re
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pai_utils as pai
from pai_utils.finetuning import OPTIMISERS, FeaturePenalty, Penalty
from pai_utils.heads import features
from tests.cases import Images, fingerprint, tiny_backbone, tiny_classifier, tiny_task


def pruned_classifier(sparsity: float = 0.6) -> pai.Pruned:
    backbone = tiny_classifier().backbone
    model = pai.Classifier(backbone, pai.fit_head(backbone, tiny_task()))
    return pai.prune(model, None, "magnitude", sparsity)


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.0, 0.0), (0.9, 0.1)])
def test_pruned_weights_are_zero_after_every_step(
    optimiser: str, momentum: float, weight_decay: float
) -> None:
    mask = pruned_classifier().mask
    model = tiny_classifier()  # not pruned yet
    steps: list[int] = []

    def check(step: int) -> None:
        steps.append(step)
        for name, entry in mask.items():
            assert not model.get_parameter(name)[~entry].any()

    losses = pai.finetune(
        model, tiny_task().train, mask, steps=12, learning_rate=0.1, batch_size=7,
        optimiser=optimiser, momentum=momentum, weight_decay=weight_decay, on_step=check,
    )  # fmt: skip
    assert steps == list(range(13))
    assert len(losses) == 12
    for name, entry in mask.items():
        assert model.get_parameter(name)[entry].all()


@pytest.mark.parametrize("training", [False, True])
def test_head_statistics_and_modes_stay_and_the_rest_learns(training: bool) -> None:
    pruned = pruned_classifier()
    model = pruned.model.train(training)
    model.get_submodule("backbone.encoder.1").train(not training)
    before = copy.deepcopy(model.state_dict())
    modes = fingerprint(model)[3]
    pai.finetune(model, tiny_task().train, pruned.mask, steps=5, learning_rate=0.1)
    for name, value in model.state_dict().items():
        fixed = name.startswith("head.") or "running" in name or "num_batches" in name
        assert torch.equal(value, before[name]) == fixed, name
    assert fingerprint(model)[3] == modes
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_steps_equal_a_loop_written_by_hand(schedule: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    data = Images(7, classes=3, side=2)
    mask = pai.make_mask({"1.weight": torch.rand(5, 12)}, 0.5)
    mine = copy.deepcopy(model)
    mask.apply_(mine)
    momentum, decay = 0.9, 0.01
    rates = [0.3] * 5 if schedule == "constant" else [0.3, 0.24, 0.18, 0.12, 0.06]
    velocity = {n: torch.zeros_like(p) for n, p in mine.named_parameters()}
    seen: list[int] = []
    expected: list[float] = []
    for start in (0, 3):  # two epochs of three batches, each in an order of its own
        order = torch.randperm(7, generator=torch.Generator().manual_seed(5 * 1_000_003 + start))
        for rows in order.split(3)[: 5 - len(expected)]:
            seen += rows.tolist()
            loss = F.cross_entropy(mine(data.images[rows]), data.labels[rows])
            expected.append(loss.item())
            gradients = torch.autograd.grad(loss, list(mine.parameters()))
            with torch.no_grad():
                for (name, p), g in zip(mine.named_parameters(), gradients, strict=True):
                    velocity[name] = momentum * velocity[name] + g + decay * p
                    if name in mask:
                        velocity[name] *= mask[name]
                    p.sub_(rates[len(expected) - 1] * velocity[name])
    assert sorted(seen[:7]) == list(range(7))
    losses = pai.finetune(
        model, data, mask, steps=5, learning_rate=0.3, batch_size=3, momentum=momentum,
        weight_decay=decay, seed=5, schedule=schedule,
    )  # fmt: skip
    assert losses == pytest.approx(expected, rel=1e-12)
    for ours, theirs in zip(model.parameters(), mine.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("rate", [1e6, 1e38])
def test_divergence_is_an_error_and_leaves_the_last_sound_weights(rate: float) -> None:
    pruned = pruned_classifier()
    model = pruned.model.train()
    before = fingerprint(model)
    with pytest.raises(
        FloatingPointError, match=rf"at step \d+ with learning_rate={re.escape(str(rate))}"
    ):
        pai.finetune(model, tiny_task().train, pruned.mask, steps=200, learning_rate=rate)
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert math.isfinite(pai.evaluate(model, tiny_task().train).loss)
    assert fingerprint(model)[3] == before[3]
    assert all(not model.get_parameter(n)[~entry].any() for n, entry in pruned.mask.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimiser": "adamw"}, "unknown optimiser 'adamw'; did you mean 'adam'"),
        ({"schedule": "cosine"}, r"unknown schedule 'cosine'.*constant, linear"),
        ({"steps": -1}, "steps=-1"),
        ({"learning_rate": 0.0}, r"learning_rate=0\.0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"mask": pai.Mask({"other.weight": torch.ones(2, 2)})}, r"no other\.weight"),
        ({"data": Images(0)}, "dataset is empty"),
        ({"data": tiny_task(classes=5).train}, "label 4 but the model's classes are 0 to 2"),
    ],
)
def test_impossible_settings_are_refused(options: dict[str, Any], message: str) -> None:
    data = options.pop("data", tiny_task().train)
    with pytest.raises(ValueError, match=message):
        pai.finetune(tiny_classifier(), data, **options)
    with pytest.raises(ValueError, match="nothing to fine-tune"):
        pai.finetune(tiny_classifier().requires_grad_(False), tiny_task().train)
    with pytest.raises(TypeError, match="momentun"):
        pai.finetune(tiny_classifier(), tiny_task().train, momentun=0.5)


def test_the_penalty_is_the_proximal_step_in_closed_form() -> None:
    model = tiny_classifier().double()
    name = "backbone.encoder.0.weight"
    weight = model.get_parameter(name)
    generator = torch.Generator().manual_seed(0)
    anchor = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    curvature = torch.rand(weight.shape, generator=generator, dtype=torch.float64) * 1e3
    before = weight.detach().clone()
    with torch.no_grad():
        Penalty({name: anchor}, 0.7, {name: curvature}).pull_(dict(model.named_parameters()), 0.1)
    # The minimiser of ½ (w − before)² / η + ½ λ c (w − a)².
    expected = (before + 0.07 * curvature * anchor) / (1 + 0.07 * curvature)
    assert torch.allclose(weight, expected, rtol=1e-12, atol=0)


def test_a_penalty_holds_weights_at_their_anchor_and_pruned_ones_at_zero() -> None:
    def moved(penalty: Penalty | None) -> float:
        pruned = pruned_classifier()
        start = {n: p.detach().clone() for n, p in pruned.model.named_parameters()}
        pai.finetune(
            pruned.model, tiny_task().train, pruned.mask, steps=6, learning_rate=0.1,
            penalty=penalty,
        )  # fmt: skip
        after = dict(pruned.model.named_parameters())
        for name, entry in pruned.mask.items():
            assert not after[name][~entry].any()
        return max(float((after[n] - start[n]).detach().abs().max()) for n in pruned.mask)

    pruned = pruned_classifier()
    anchor = {n: pruned.model.get_parameter(n).detach().clone() for n in pruned.mask}
    free, weak, strong = moved(None), moved(Penalty(anchor, 1.0)), moved(Penalty(anchor, 1e6))
    assert moved(Penalty(anchor, 0.0)) == free
    assert strong < 1e-4 < weak < free
    # Anchored at the dense weights, which are not zero where it was pruned.
    dense = tiny_classifier()
    moved(Penalty({n: dense.get_parameter(n).detach() for n in pruned.mask}, 10.0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strength": -1.0}, r"strength=-1\.0 must be"),
        ({"strength": math.nan}, "strength=nan must be"),
        ({"anchor": {"other.weight": torch.zeros(1)}}, "penalty's anchor 'other.weight'"),
        ({"anchor": {"head.bias": torch.zeros(4)}}, r"anchor of 'head\.bias' has shape \[4\]"),
        ({"curvature": {"head.bias": torch.tensor([1.0, -1, 1])}}, "curvature of 'head.bias' must"),
        ({"curvature": {"head.bias": torch.tensor([1, math.inf, 1])}}, "must be finite"),
        ({"anchor": {"head.bias": torch.tensor([1, math.nan, 1])}}, "anchor .* must be finite"),
        ({"curvature": {}}, "no curvature for 'head.bias'"),
    ],
)
def test_an_impossible_penalty_is_refused(changes: dict[str, Any], message: str) -> None:
    settings = {"anchor": {"head.bias": torch.zeros(3)}, "strength": 1.0, **changes}
    model = tiny_classifier()
    before = fingerprint(model)
    with pytest.raises(ValueError, match=message):
        pai.finetune(model, tiny_task().train, penalty=Penalty(**settings))
    assert fingerprint(model) == before


def test_a_penalty_leaves_frozen_parameters_as_they_are() -> None:
    model = tiny_classifier()
    frozen = model.get_parameter("backbone.encoder.0.weight").requires_grad_(False)
    before = frozen.detach().clone()
    penalty = Penalty({"backbone.encoder.0.weight": torch.zeros_like(before)}, 5.0)
    pai.finetune(model, tiny_task().train, steps=2, learning_rate=0.1, penalty=penalty)
    assert torch.equal(frozen, before)


def test_an_image_that_is_not_finite_is_not_blamed_on_the_rate() -> None:
    data = Images(8, classes=3, side=tiny_backbone().image_size)
    data.images[3] = math.nan
    with pytest.raises(FloatingPointError, match=r"at step 0 .* before any update: look at images"):
        pai.finetune(tiny_classifier().double(), data, steps=1, batch_size=8)
    with pytest.raises(FloatingPointError, match="try a smaller one"):
        pai.finetune(tiny_classifier(), tiny_task().train, steps=5, learning_rate=1e30)


def test_the_pull_to_features_is_half_the_lost_share_of_their_variance() -> None:
    model, data = tiny_classifier().double(), Images(9, side=tiny_backbone().image_size)
    generator = torch.Generator().manual_seed(0)
    targets = torch.randn(9, model.backbone.feature_dim, generator=generator, dtype=torch.float64)
    penalty = FeaturePenalty(data, targets, 3.0)
    penalty.check(model)
    # As many draws as make the mean over images, within its standard error.
    losses = torch.stack([penalty.loss(model, 9, seed).detach() for seed in range(300)])
    with torch.no_grad():
        lost = (model.backbone(data.images) - targets).square().sum(1).mean()
    expected = 1.5 * lost / targets.var(0, correction=0).sum()
    assert abs(losses.mean() - expected) <= 4 * losses.std() / len(losses) ** 0.5
    assert torch.equal(penalty.loss(model, 9, 5), penalty.loss(model, 9, 5))


def test_a_strong_pull_to_features_keeps_them_and_pruned_weights_stay_zero() -> None:
    def drift(strength: float) -> float:
        pruned = pruned_classifier()
        assert isinstance(pruned.model, pai.Classifier)
        task = tiny_task()
        before = features(pruned.model.backbone, task.train)[0]
        pai.finetune(
            pruned.model, task.train, pruned.mask, steps=20, learning_rate=3e-3, optimiser="adam",
            penalty=FeaturePenalty(task.train, before, strength), schedule="linear",
        )  # fmt: skip
        for name, entry in pruned.mask.items():
            assert not pruned.model.get_parameter(name)[~entry].any()
        return float((features(pruned.model.backbone, task.train)[0] - before).square().mean())

    free, weak, strong = (drift(strength) for strength in (0.0, 0.3, 10.0))
    assert 10 * strong < weak < free


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strength": math.inf}, "strength=inf must be"),
        ({"targets": torch.zeros(5, 6)}, r"targets have shape \[5, 6\], expected \[60, 6\]"),
    ],
)
def test_an_impossible_pull_to_features_is_refused(changes: dict[str, Any], message: str) -> None:
    task = tiny_task(train=60)
    sound: Any = {"images": task.train, "targets": torch.zeros(60, 6), "strength": 1.0}
    with pytest.raises(ValueError, match=message):
        pai.finetune(tiny_classifier(), task.train, penalty=FeaturePenalty(**(sound | changes)))
    with pytest.raises(ValueError, match="needs a Classifier"):
        pai.finetune(nn.Linear(4, 2), task.train, penalty=FeaturePenalty(**sound))

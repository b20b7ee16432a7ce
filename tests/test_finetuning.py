import copy
import logging
import math
import re
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pai_utils as pai
from pai_utils.evaluation import Evaluation
from pai_utils.finetuning import OPTIMISERS, FeaturePenalty, Penalty
from pai_utils.heads import features
from pai_utils.studies.finetune_recovery import (
    chosen_on_validation,
    make_penalties,
    recovery_gains,
    recovery_results,
    recovery_study,
    recovery_sweep,
)
from tests.cases import Images, fingerprint, tiny_backbone, tiny_classifier, tiny_task


def pruned_classifier(sparsity: float = 0.6) -> pai.Pruned:
    backbone = tiny_classifier().backbone
    model = pai.Classifier(backbone, pai.fit_head(backbone, tiny_task()))
    return pai.prune(model, None, "magnitude", sparsity)


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_pruned_weights_are_zero_after_every_step(
    optimiser: str, momentum: float, weight_decay: float
) -> None:
    pruned = pruned_classifier()
    steps: list[int] = []

    def check(step: int) -> None:
        steps.append(step)
        for name, entry in pruned.mask.items():
            assert not pruned.model.get_parameter(name)[~entry].any()

    losses = pai.finetune(
        pruned.model, tiny_task().train, pruned.mask, steps=12, learning_rate=0.1, batch_size=7,
        optimiser=optimiser, momentum=momentum, weight_decay=weight_decay, on_step=check,
    )  # fmt: skip
    assert steps == list(range(13))
    assert len(losses) == 12
    for name, entry in pruned.mask.items():
        assert pruned.model.get_parameter(name)[entry].all()


def test_an_unpruned_model_is_pruned_first() -> None:
    pruned = pruned_classifier()
    model = tiny_classifier()
    pai.finetune(model, tiny_task().train, pruned.mask, steps=0)
    assert all(not model.get_parameter(n)[~entry].any() for n, entry in pruned.mask.items())


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


def test_training_lowers_the_loss() -> None:
    pruned = pruned_classifier(0.5)
    data = tiny_task().train
    before = pai.evaluate(pruned.model, data).loss
    pai.finetune(pruned.model, data, pruned.mask, steps=60, learning_rate=0.05)
    assert pai.evaluate(pruned.model, data).loss < 0.9 * before


def test_steps_equal_a_loop_written_by_hand() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    data = Images(7, classes=3, side=2)
    mask = pai.make_mask({"1.weight": torch.rand(5, 12)}, 0.5)
    mine = copy.deepcopy(model)
    mask.apply_(mine)
    rate, momentum, decay = 0.3, 0.9, 0.01
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
                    p.sub_(rate * velocity[name])
    assert sorted(seen[:7]) == list(range(7))
    losses = pai.finetune(
        model, data, mask, steps=5, learning_rate=rate, batch_size=3, momentum=momentum,
        weight_decay=decay, seed=5,
    )  # fmt: skip
    assert losses == pytest.approx(expected, rel=1e-12)
    for ours, theirs in zip(model.parameters(), mine.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-14)


def test_a_seed_sets_the_result() -> None:
    def run(seed: int) -> list[float]:
        pruned = pruned_classifier()
        return pai.finetune(
            pruned.model, tiny_task().train, pruned.mask, steps=8, batch_size=8, seed=seed
        )

    assert run(1) == run(1)
    assert run(1) != run(2)


@pytest.mark.parametrize("rate", [1e6, 1e20, 1e38])
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


def test_an_error_while_watching_restores_the_modes() -> None:
    pruned = pruned_classifier()
    modes = fingerprint(pruned.model.train())[3]

    def stop(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pai.finetune(pruned.model, tiny_task().train, pruned.mask, on_step=stop)
    assert fingerprint(pruned.model)[3] == modes


@pytest.mark.parametrize(
    ("options", "message"),
    [
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


def test_a_frozen_model_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to fine-tune"):
        pai.finetune(tiny_classifier().requires_grad_(False), tiny_task().train)


def sweep(rates: list[float], *, refit: bool = True) -> Any:
    pruned = pruned_classifier()
    assert isinstance(pruned.model, pai.Classifier)
    tasks = {"spots": tiny_task(), "other": tiny_task("other", classes=2)}
    dense = tiny_classifier().backbone
    heads = {name: pai.fit_head(dense, task) for name, task in tasks.items()}
    before = fingerprint(pruned.model)
    table = recovery_sweep(
        pruned.model, pruned.mask, tasks, heads, "spots", learning_rates=rates, at_steps=[0, 2, 5],
        batch_size=8, refit=refit,
    )  # fmt: skip
    assert fingerprint(pruned.model) == before
    return table


def test_a_recovery_sweep_watches_every_task_at_every_step() -> None:
    table = sweep([1e-3, 1e-1])
    validation = table[table.split == "validation"]
    assert set(zip(validation.target, validation["head"], strict=True)) == {("spots", "frozen")}
    assert len(validation) == 2 * 3
    frozen = table[(table["head"] == "frozen") & (table.split == "test")]
    assert len(frozen) == 2 * 3 * 2
    assert set(zip(frozen.learning_rate, frozen.step, frozen.target, strict=True)) == {
        (rate, step, target)
        for rate in (1e-3, 1e-1)
        for step in (0, 2, 5)
        for target in ("spots", "other")
    }
    refitted = table[table["head"] == "refitted"]
    assert len(refitted) == 2 * 2
    assert set(refitted.step) == {5}
    start = frozen[frozen.step == 0]
    assert start.groupby("target").loss.nunique().eq(1).all()
    assert len(sweep([1e-3], refit=False)) == 6 + 3


def test_a_recovery_sweep_goes_on_after_a_rate_that_diverges(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, "pai_utils"):
        table = sweep([1e30, 1e-3])
    assert set(table[table.learning_rate == 1e30].step) == {0}
    assert set(table[table.learning_rate == 1e-3].step) == {0, 2, 5}
    assert any("ends early" in message for message in caplog.messages)


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


def test_gains_leave_out_a_seed_that_diverged() -> None:
    def right(*values: int) -> np.ndarray[Any, Any]:
        return np.array(values, dtype=bool)

    ends = {0: {0: right(1, 0, 0, 0), 9: right(1, 1, 0, 0)}, 1: {0: right(1, 1, 1, 1)}}
    table = pd.DataFrame(
        [
            {"start": "pruned", "penalty": "none", "learning_rate": 0.1, "step": step, "seed": seed}
            | {"target": target, "split": split, "head": "frozen", "accuracy": found.mean()}
            | {"correct": found, "chance": 0.25}
            for seed, run in ends.items()
            for step, found in run.items()
            for target, split in (("s", "test"), ("s", "validation"), ("t", "test"))
        ]
    )
    row = recovery_gains(table, "s").iloc[0]
    assert (row.seeds, row.held_out_gain, row.source_gain, row.validation) == (1, 0.25, 0.25, 0.5)
    with pytest.raises(ValueError, match="no fine-tuning came to an evaluation"):
        recovery_gains(pd.DataFrame(), "s")


def test_gains_by_penalty_and_the_rate_chosen_on_validation() -> None:
    pruned = pruned_classifier()
    assert isinstance(pruned.model, pai.Classifier)
    tasks = {"spots": tiny_task(), "other": tiny_task("other", classes=2)}
    heads = {name: pai.fit_head(tiny_classifier().backbone, task) for name, task in tasks.items()}
    anchor = {n: pruned.model.get_parameter(n).detach().clone() for n in pruned.mask}
    table = recovery_sweep(
        pruned.model, pruned.mask, tasks, heads, "spots", learning_rates=[1e-3, 1e-1],
        at_steps=[0, 5], refit=False, penalties={"none": None, "held": Penalty(anchor, 1e9)},
    )  # fmt: skip
    gains = recovery_gains(table.assign(start="pruned"), "spots")
    assert set(gains.start) == {"pruned"}
    assert len(gains) == 4
    rows = table[(table.penalty == "none") & (table.learning_rate == 1e-1)]
    test = rows[(rows.split == "test") & (rows.target == "spots")].set_index("step").accuracy
    found = gains[(gains.penalty == "none") & (gains.learning_rate == 1e-1)].iloc[0]
    assert found.source == test[5]
    assert found.source_gain == pytest.approx(test[5] - test[0])
    assert found.source_low <= found.source_gain <= found.source_high
    validation = rows[(rows.split == "validation") & (rows.step == 5)].accuracy.item()
    assert found.validation == validation
    chosen = chosen_on_validation(gains)
    assert list(chosen.penalty) == ["none", "held"]
    best = gains.groupby("penalty").validation.max()
    assert (chosen.set_index("penalty").validation == best[chosen.penalty]).all()


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
        ({"targets": torch.zeros(60, 4)}, r"targets have shape \[60, 4\], expected \[60, 6\]"),
    ],
)
def test_an_impossible_pull_to_features_is_refused(changes: dict[str, Any], message: str) -> None:
    task = tiny_task(train=60)
    settings = {"images": task.train, "targets": torch.zeros(60, 6), "strength": 1.0, **changes}
    with pytest.raises(ValueError, match=message):
        pai.finetune(tiny_classifier(), task.train, penalty=FeaturePenalty(**settings))
    settings = {"images": task.train, "targets": torch.zeros(60, 6), "strength": 1.0}
    with pytest.raises(ValueError, match="needs a Classifier"):
        pai.finetune(nn.Linear(4, 2), task.train, penalty=FeaturePenalty(**settings))


def test_the_rate_falls_in_a_straight_line_to_its_last_step() -> None:
    # One weight without curvature: every step of plain SGD is the rate times one gradient.
    class Slope(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))

        def forward(self, images: Tensor) -> Tensor:
            flat = images.flatten(1)[:, :1].double() * 0 + 1
            return torch.cat([flat * self.weight, -flat * self.weight], 1)

    model, seen = Slope(), []
    data = Images(8, classes=1)
    pai.finetune(
        model, data, steps=4, learning_rate=1e-7, batch_size=8, momentum=0.0, schedule="linear",
        on_step=lambda step: seen.append(float(model.weight.detach())),
    )  # fmt: skip
    steps = torch.tensor(seen).diff()
    torch.testing.assert_close(steps / steps[0], torch.tensor([1.0, 0.75, 0.5, 0.25]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimiser": "adamw"}, "unknown optimiser 'adamw'; did you mean 'adam'"),
        ({"schedule": "cosine"}, r"unknown schedule 'cosine'.*constant, linear"),
    ],
)
def test_unknown_settings_are_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pai.finetune(tiny_classifier(), tiny_task().train, **options)  # type: ignore[arg-type]


def test_penalties_are_made_by_name_around_the_dense_encoder() -> None:
    encoder, task, pool = tiny_classifier().backbone, tiny_task(), tiny_task("other", train=20)
    names = pai.prunable_parameters(encoder)
    strengths = {"none": 0.0, "unweighted": 2.0, "source": 3.0, "pool": 4.0, "features": 5.0}
    made = make_penalties(encoder, names, strengths, task.train, pool.train)
    assert list(made) == list(strengths)
    assert made["none"] is None
    for name, strength in list(strengths.items())[1:]:
        penalty = made[name]
        assert penalty is not None
        assert penalty.strength == strength
        penalty.check(pai.Classifier(encoder, nn.Linear(6, 3)))
    source, mixture, held = made["source"], made["pool"], made["features"]
    assert isinstance(source, Penalty)
    assert isinstance(mixture, Penalty)
    assert isinstance(held, FeaturePenalty)
    for curvature in (source.curvature, mixture.curvature):
        assert curvature is not None
        mean = torch.cat([c.flatten() for c in curvature.values()]).mean()
        assert float(mean) == pytest.approx(1, rel=1e-5)
    assert torch.equal(held.targets, features(encoder, pool.train)[0])
    with pytest.raises(ValueError, match="unknown penalty 'sources'; did you mean 'source'"):
        make_penalties(encoder, names, {"sources": 1.0}, task.train, pool.train)


def test_a_study_runs_every_start_and_all_penalties_on_the_first() -> None:
    encoder = tiny_classifier().backbone
    tasks = {name: tiny_task(name) for name in ("spots", "other")}
    heads = {name: pai.fit_head(encoder, task) for name, task in tasks.items()}
    before = fingerprint(encoder)
    settings: dict[str, Any] = {
        "starts": ["repaired", "random", "dense"], "sparsities": [0.5, 0.7], "seeds": [0, 1],
        "scorer": "feature_ggn_diag", "prune_by": "spots+noise", "samples": 20,
        "penalties": {"none": 0.0, "features": 1.0}, "learning_rates": [1e-3], "at_steps": [0, 2],
        "refit": False, "finetune_batch_size": 8,
    }  # fmt: skip
    table = recovery_study(encoder, tasks, heads, "spots", **settings)
    assert fingerprint(encoder) == before
    keys = ["start", "sparsity", "penalty", "seed"]
    expected = {
        *{(start, s, "none", seed) for start in ("repaired", "random") for s in (0.5, 0.7)
          for seed in (0, 1)},
        *{("repaired", 0.5, "features", seed) for seed in (0, 1)},
        *{("dense", 0.0, "none", seed) for seed in (0, 1)},
    }  # fmt: skip
    assert set(table[keys].itertuples(index=False, name=None)) == expected
    start = table[(table.step == 0) & (table.split == "test")].groupby(["start", "target"]).accuracy
    dense = {n: pai.evaluate(pai.Classifier(encoder, heads[n]), t.test) for n, t in tasks.items()}
    assert all(start.mean()["dense"][name] == dense[name].accuracy for name in tasks)
    with pytest.raises(ValueError, match="unknown start 'prunde'; did you mean 'pruned'"):
        recovery_study(encoder, tasks, heads, "spots", **{**settings, "starts": ["prunde"]})


def test_a_study_scores_with_the_head_that_belongs_to_the_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoder = tiny_classifier().backbone
    tasks = {"spots": tiny_task(), "other": tiny_task("other", classes=2)}
    heads = {name: pai.fit_head(encoder, task) for name, task in tasks.items()}
    seen = []

    def watched(model: pai.Classifier, images: Any, *rest: Any, **options: Any) -> pai.Pruned:
        seen.append((model.head, images, options["samples"], options["rounds"]))
        return pai.prune(model, images, *rest, **options)

    monkeypatch.setattr("pai_utils.studies.suite.prune", watched)
    table = recovery_study(
        encoder, tasks, heads, "spots", starts=["pruned"], sparsities=[0.5], seeds=[0],
        scorer="snip", prune_by="other", samples=1_000_000, rounds=2, learning_rates=[1e-3],
        at_steps=[0], refit=False,
    )  # fmt: skip
    ((head, images, samples, rounds),) = seen
    assert head is heads["other"]
    assert images is tasks["other"].train
    assert samples == len(images)
    assert rounds == 2
    assert set(table.target) == {"spots", "other"}
    with pytest.raises(ValueError, match="samples=0"):
        recovery_study(
            encoder, tasks, heads, "spots", starts=["pruned"], sparsities=[0.5], seeds=[0],
            scorer="snip", samples=0, learning_rates=[1e-3], at_steps=[0],
        )  # fmt: skip


def test_results_of_a_recovery_are_those_before_and_after() -> None:
    def right(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.bool)

    dense = {"t": Evaluation(1.0, 0.0, 4, (0.5, 1.0), right(1, 1, 1, 1))}
    common = {"target": "t", "split": "test", "head": "frozen", "penalty": "none", "seed": 0}
    common |= {"learning_rate": 0.1, "chance": 0.0, "count": 4, "loss": 0.0, "sparsity": 0.5}
    table = pd.DataFrame(
        [
            common | {"start": start, "step": step, "accuracy": found.float().mean().item()}
            | {"correct": found.numpy()}
            for start, step, found in (
                ("pruned", 0, right(1, 0, 0, 0)),
                ("pruned", 5, right(1, 1, 0, 0)),
                ("pruned", 9, right(1, 1, 1, 0)),
                ("random", 0, right(0, 0, 0, 0)),
                ("random", 5, right(0, 0, 0, 1)),  # and diverged
            )
        ]
    )  # fmt: skip
    found = recovery_results(table, dense, "pool", "snip", steps=9)
    rows = found[["stage", "source", "scorer", "accuracy", "retention"]].to_numpy().tolist()
    assert rows == [
        ["pruned, fine-tuned (none, 0.1)", "pool", "snip", 0.75, 0.75],
        ["pruned", "pool", "snip", 0.25, 0.25],
        ["random", "none", "random", 0.0, 0.0],
    ]
    assert recovery_results(table, dense, "pool", "magnitude", steps=9).source.unique() == ["none"]
    with pytest.raises(ValueError, match="neither at step 0 nor at step 7"):
        recovery_results(table[table.step == 9], dense, "pool", "snip", steps=7)

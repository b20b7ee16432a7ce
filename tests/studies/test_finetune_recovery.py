import logging
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn

import pai_utils as pai
from pai_utils.evaluation import Evaluation
from pai_utils.finetuning import FeaturePenalty, Penalty
from pai_utils.heads import features
from pai_utils.studies import finetune_recovery as study
from pai_utils.support.sampling import Draw
from tests.cases import fingerprint, tiny_suite, tiny_task


@pytest.fixture
def suite() -> pai.Suite:
    return tiny_suite(digits=tiny_task("digits"), photos=tiny_task("photos", classes=2))


def parameters(**changes: Any) -> study.Parameters:
    given = {
        "backbone": "tiny", "source": "digits", "targets": ["photos"], "scorer": "magnitude",
        "sparsities": [0.6], "starts": ["pruned"], "learning_rates": [1e-3], "steps": [0, 2],
        "seeds": [0], "samples": 20, "finetune_batch_size": 8, "repair": "moments", "out": "out",
    }  # fmt: skip
    return study.Parameters(**{**given, **changes})


def test_every_task_is_watched_at_every_step(suite: pai.Suite) -> None:
    config = parameters(learning_rates=[1e-3, 1e-1], steps=[0, 2, 5])
    before = fingerprint(suite.encoder)
    table = study.run(suite, config)
    assert fingerprint(suite.encoder) == before
    kinds = table.groupby(["split", "head", "target"]).step.apply(list).to_dict()
    assert kinds == {
        ("test", "frozen", "digits"): [0, 2, 5] * 2,
        ("test", "frozen", "photos"): [0, 2, 5] * 2,
        ("test", "refitted", "digits"): [5] * 2,
        ("test", "refitted", "photos"): [5] * 2,
        ("validation", "frozen", "digits"): [0, 2, 5] * 2,
    }
    start = table[(table.step == 0) & (table.split == "test")]
    assert start.groupby("target").loss.nunique().eq(1).all()
    dense = {name: found.accuracy for name, found in suite.evaluate().items()}
    gains = study.recovery_gains(table, "digits", dense)
    assert len(gains) == 2
    rows = table[(table.learning_rate == 1e-1) & (table.target == "digits")]
    ends: Any = rows[rows["head"] == "frozen"].set_index(["split", "step"]).accuracy
    found = gains[gains.learning_rate == 1e-1].iloc[0]
    assert (found.source, found.validation) == (ends["test", 5], ends["validation", 5])
    assert found.source_gain == pytest.approx(ends["test", 5] - ends["test", 0])
    assert found.source_low <= found.source_gain <= found.source_high
    chosen = study.chosen_on_validation(gains)
    assert chosen.validation.tolist() == [gains.validation.max()]


def test_a_rate_that_diverges_does_not_end_the_others(
    suite: pai.Suite, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "pai_utils"):
        table = study.run(suite, parameters(learning_rates=[1e30, 1e-3]))
    steps = table.groupby("learning_rate").step.agg(set)
    assert steps.to_dict() == {1e30: {0}, 1e-3: {0, 2}}
    assert any("ends early" in message for message in caplog.messages)
    with pytest.raises(ValueError, match="no fine-tuning came to its last step; try smaller"):
        study.run(suite, parameters(learning_rates=[1e30], steps=[1, 2]))


def test_every_start_is_run_and_all_penalties_on_the_first(suite: pai.Suite) -> None:
    config = parameters(
        scorer="feature_ggn_diag", starts=["repaired", "shuffled", "dense"], sparsities=[0.5, 0.7],
        seeds=[0, 1], prune_by="digits+noise", penalties={"none": 0.0, "features": 1.0},
        samples=1_000_000,  # of the images there are
    )  # fmt: skip
    table = study.run(suite, config)
    keys = ["start", "sparsity", "penalty", "seed"]
    runs = [
        *(
            (start, sparsity, "none")
            for start in ("repaired", "shuffled")
            for sparsity in (0.5, 0.7)
        ),
        ("repaired", 0.5, "features"),
        ("dense", 0.0, "none"),
    ]
    found = set(table[keys].itertuples(index=False, name=None))
    assert found == {(*run, seed) for run in runs for seed in (0, 1)}
    start = table[(table.step == 0) & (table.split == "test") & (table.start == "dense")]
    dense = {name: found.accuracy for name, found in suite.evaluate().items()}
    assert start.groupby("target").accuracy.mean().to_dict() == dense


def right(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.bool)


def test_gains_leave_out_a_seed_that_diverged() -> None:
    ends = {0: {0: right(1, 0, 0, 0), 9: right(1, 1, 0, 0)}, 1: {0: right(1, 1, 1, 1)}}
    table = pd.DataFrame(
        [
            {"start": "pruned", "penalty": "none", "learning_rate": 0.1, "step": step, "seed": seed}
            | {"target": target, "split": split, "head": "frozen", "chance": 0.25}
            | {"correct": found.numpy(), "accuracy": found.float().mean().item()}
            for seed, run in ends.items()
            for step, found in run.items()
            for target, split in (("s", "test"), ("s", "validation"), ("t", "test"))
        ]
    )
    row = study.recovery_gains(table.assign(sparsity=0.5), "s", {"s": 0.75, "t": 1.0}).iloc[0]
    assert (row.seeds, row.held_out_gain, row.source_gain, row.validation) == (1, 0.25, 0.25, 0.5)
    assert (row.source_retention, row.source_retention_before) == (0.5, 0)


@pytest.mark.parametrize("name", study.PENALTIES)
def test_penalties_are_made_by_name_around_the_dense_encoder(suite: pai.Suite, name: str) -> None:
    images = {"source": suite.tasks["digits"].train, "pool": tiny_task("other", train=20).train}
    penalty = study.make_penalty(name, 2.0, suite.encoder, images, Draw(256))
    if name == "none":
        assert penalty is None
        return
    assert penalty is not None
    assert penalty.strength == 2
    penalty.check(pai.Classifier(suite.encoder, nn.Linear(6, 3)))
    if name == "features":
        assert isinstance(penalty, FeaturePenalty)
        assert torch.equal(penalty.targets, features(suite.encoder, images["pool"])[0])
    else:
        assert isinstance(penalty, Penalty)
        curvature = penalty.curvature or {"none": torch.ones(1)}
        mean = torch.cat([c.flatten() for c in curvature.values()]).mean()
        assert (penalty.curvature is None) == (name == "unweighted")
        assert float(mean) == pytest.approx(1, rel=1e-5)


def test_results_are_those_before_and_after() -> None:
    suite = tiny_suite(digits=tiny_task("digits"))
    dense = {"digits": Evaluation(1.0, 0.0, 4, (0.5, 1.0), right(1, 1, 1, 1))}
    chance = suite.tasks["digits"].chance
    common = {"target": "digits", "split": "test", "head": "frozen", "penalty": "none", "seed": 0}
    common |= {"learning_rate": 0.1, "sparsity": 0.5}
    table = pd.DataFrame(
        common
        | {"start": start, "step": step}
        | Evaluation(found.float().mean().item(), 0.0, 4, (0, 1), found).row(chance)
        for start, step, found in (
            ("pruned", 0, right(1, 0, 0, 0)),
            ("pruned", 5, right(1, 1, 0, 0)),
            ("pruned", 9, right(1, 1, 1, 0)),
            ("shuffled", 0, right(0, 0, 0, 0)),
            ("shuffled", 5, right(0, 0, 0, 1)),  # and diverged
        )
    )
    config = parameters(scorer="snip", steps=[0, 9])
    found = study.recovery_results(table, suite, dense, config)
    assert found[["stage", "source", "scorer", "accuracy"]].to_numpy().tolist() == [
        ["pruned, fine-tuned (none, 0.1)", "digits", "snip", 0.75],
        ["pruned", "digits", "snip", 0.25],
        ["shuffled", "digits", "random@snip", 0.0],
    ]
    assert found.retention[0] == pytest.approx((0.75 - chance) / (1 - chance))
    blind = study.recovery_results(table, suite, dense, parameters(steps=[0, 9]))
    assert blind.source.unique() == ["none"]

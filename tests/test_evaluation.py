import logging
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional as F

import pai_utils as pai
from pai_utils.evaluation import (
    Evaluation,
    evaluate_heads,
    gain_replicates,
    held_out_retention,
    interval,
    retention,
    retention_replicates,
    summarise_retention,
)
from tests.cases import (
    Case,
    Images,
    Limited,
    fingerprint,
    logits_of,
    tiny_backbone,
    tiny_classifier,
    tiny_task,
)


@pytest.mark.parametrize("batch_size", [1, 4, 128])
@pytest.mark.parametrize("case", ["eval BatchNorm", "nn.MultiheadAttention"], indirect=True)
def test_accuracy_and_loss_are_those_of_the_logits(case: Case, batch_size: int) -> None:
    logits = logits_of(case.model, case.data.images)
    before = fingerprint(case.model)
    result = pai.evaluate(case.model, case.data, batch_size=batch_size)
    assert fingerprint(case.model) == before
    assert result.loss == pytest.approx(float(F.cross_entropy(logits, case.data.labels)), 1e-12)
    right = logits.argmax(1) == case.data.labels
    assert torch.equal(result.correct, right)
    assert result.accuracy == int(right.sum()) / 10
    assert result.count == 10


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision_changes_logits_by_its_rounding_only(precision: str) -> None:
    model, task = tiny_classifier(), tiny_task()
    exact = pai.evaluate(model, task.test)
    rounded = pai.evaluate(model, task.test, precision=precision)
    digits = torch.finfo(getattr(torch, precision)).eps
    assert rounded.loss != exact.loss
    assert rounded.loss == pytest.approx(exact.loss, abs=20 * digits)
    heads, data = {"mine": model.head}, {"mine": task.test}
    again = evaluate_heads(model.backbone, heads, data, precision=precision)
    assert again["mine"].loss == pytest.approx(exact.loss, abs=20 * digits)
    # A caller's own autocast stays in force.
    with torch.autocast("cpu", getattr(torch, precision)):
        assert pai.evaluate(model, task.test).loss == rounded.loss
    with pytest.raises(ValueError, match=r"unknown precision 'float61'; did you mean 'float16'"):
        pai.evaluate(model, task.test, precision="float61")


def test_the_interval_is_wilsons() -> None:
    labels = torch.tensor([0] * 8 + [1] * 2)
    found = Evaluation.of(torch.tensor([[1.0, 0.0]] * 10), labels)
    assert found.interval == pytest.approx((0.4901625, 0.9433178), abs=1e-6)


def test_bad_labels_logits_and_empty_data_are_refused() -> None:
    model = tiny_classifier(2)
    with pytest.raises(ValueError, match="label 2 but the model's classes are 0 to 1"):
        pai.evaluate(model, tiny_task().test)
    with pytest.raises(ValueError, match="dataset is empty"):
        pai.evaluate(model, Images(0))
    with torch.no_grad():
        model.get_parameter("head.weight").fill_(torch.nan)
    before = fingerprint(model)
    with pytest.raises(ValueError, match="loss on 24 samples is nan"):
        pai.evaluate(model, tiny_task(classes=2).test)
    assert fingerprint(model) == before


def test_running_out_of_memory_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    model, data = tiny_classifier(), tiny_task().test
    expected = pai.evaluate(model, data)
    with caplog.at_level(logging.WARNING, "pai_utils"):
        found = pai.evaluate(Limited(model, 5), data)
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    assert torch.equal(found.correct, expected.correct)
    assert any("out of memory" in message for message in caplog.messages)
    with pytest.raises(torch.OutOfMemoryError):
        pai.evaluate(Limited(model, 0), data)


def test_heads_on_one_encoder_equal_the_classifiers() -> None:
    backbone = tiny_backbone()
    tasks = {"two": tiny_task(classes=2), "three": tiny_task(classes=3)}
    heads = {name: pai.fit_head(backbone, task) for name, task in tasks.items()}
    results = evaluate_heads(backbone, heads, {name: task.test for name, task in tasks.items()})
    for name, task in tasks.items():
        expected = pai.evaluate(pai.Classifier(backbone, heads[name]), task.test)
        assert torch.equal(results[name].correct, expected.correct)
        assert results[name].loss == pytest.approx(expected.loss, rel=1e-6)
    with pytest.raises(ValueError, match="unknown head of task 'four'"):
        evaluate_heads(backbone, heads, {"four": tasks["two"].test})


def test_retention_is_the_kept_part_above_chance() -> None:
    assert retention(0.8, 0.8, 0.1) == 1
    assert retention(0.1, 0.8, 0.1) == 0
    assert retention(0.45, 0.8, 0.1) == pytest.approx(0.5)
    assert retention(0.03, 0.8, 0.1) == pytest.approx(-0.1)
    assert math.isnan(retention(0.5, 0.1, 0.1))


def test_intervals_are_percentiles() -> None:
    assert interval(np.arange(101.0), 0.9) == pytest.approx((5.0, 95.0))
    # A few undefined replicates are left out; more leave no interval.
    few, many = np.arange(101.0), np.arange(101.0)
    few[:5], many[:6] = np.nan, np.nan
    assert interval(few) == pytest.approx((7.375, 97.625))
    assert np.isnan(interval(many)).all()


def test_replicates_of_certain_outcomes_are_certain() -> None:
    right, wrong = np.ones(20, dtype=bool), np.zeros(20, dtype=bool)
    replicates = retention_replicates(
        [np.stack([right, right]), np.stack([wrong, wrong])], [right, right], [0.0, 0.0]
    )
    assert replicates.shape == (1000,)
    assert np.allclose(replicates, 0.5)
    assert np.allclose(gain_replicates([wrong, right], [right, right]), 0.5)
    # Where a dense model is not above chance there is nothing to retain.
    assert np.isnan(retention_replicates([wrong[None]], [wrong], [0.1])).all()


def test_a_gain_of_nothing_is_exactly_zero() -> None:
    before = np.full(6, 1 / 3)  # shares of three models
    after = np.array([2 / 3, 2 / 3, 0, 2 / 3, 2 / 3, -1 / 3]) + 0.1
    gains = gain_replicates([before + 0.1], [after])
    assert (gains == 0).any()
    assert (np.abs(gains[gains != 0]) > 1e-9).all()


def test_bootstrap_intervals_cover_the_truth() -> None:
    random = np.random.default_rng(0)
    covered = {"retention": 0, "gain": 0}
    estimates, widths = [], []
    for trial in range(100):
        items, difficulty = 150, random.random((2, 150))
        # Per task: dense right with 0.8; pruned, on the same items, with 0.6 whatever the seed.
        dense = [row < 0.8 for row in difficulty]
        pruned = [
            np.stack([(row < 0.8) & (random.random(items) < 0.75) for _ in range(8)])
            for row in difficulty
        ]
        replicates = retention_replicates(pruned, dense, [0.1, 0.1], resamples=200, seed=trial)
        low, high = interval(replicates)
        covered["retention"] += low <= (0.6 - 0.1) / (0.8 - 0.1) <= high
        widths.append(high - low)
        each = [(p.mean() - 0.1) / (d.mean() - 0.1) for p, d in zip(pruned, dense, strict=True)]
        estimates.append(np.mean(each))
        gains = gain_replicates([p[0] for p in pruned], dense, resamples=200, seed=trial)
        low, high = interval(gains)
        covered["gain"] += low <= 0.2 <= high
    assert min(covered.values()) >= 90, covered
    # Not by being as wide as can be: noise of item and seed counts twice, no more.
    assert np.mean(widths) <= 2 * (2 * 1.96 * np.std(estimates))


def closed_form_table() -> pd.DataFrame:
    """Ten items a task; the number right is given for each row."""
    right = {
        ("none", "dense", 0): (9, 8, 6),
        ("a", "ggn_diag", 0): (9, 6, 4),
        ("a", "ggn_diag", 1): (9, 8, 2),
        ("b", "ggn_diag", 0): (1, 8, 2),
        ("none", "magnitude", 0): (5, 5, 4),
    }
    return pd.DataFrame(
        {"source": source, "target": target, "scorer": scorer, "seed": seed}
        | {"sparsity": 0.0 if scorer == "dense" else 0.5, "accuracy": count / 10, "chance": 0.2}
        | {"loss": 1.0, "count": 10, "correct": np.arange(10) < count}
        for (source, scorer, seed), counts in right.items()
        for target, count in zip("abc", counts, strict=True)
    )


def test_the_summary_of_a_sweep_has_its_closed_form() -> None:
    summary: Any = summarise_retention(closed_form_table()).set_index(
        ["source", "target", "scorer"]
    )
    row = summary.loc[("a", "b", "ggn_diag")]
    assert row.accuracy == pytest.approx(0.7)
    assert row.retention == pytest.approx((0.7 - 0.2) / (0.8 - 0.2))
    assert (row.seeds, row["count"]) == (2, 10)
    assert row.low <= row.retention <= row.high
    assert (row.dense_accuracy, row.chance) == (0.8, 0.2)
    certain = summary.loc[("a", "a", "ggn_diag")]
    assert certain.retention == pytest.approx(1)
    assert (certain.low, certain.high) == (pytest.approx(1), pytest.approx(1))
    assert summary.loc[("none", "c", "magnitude")].retention == pytest.approx(0.5)


def test_held_out_retention_leaves_out_the_source() -> None:
    summary: Any = held_out_retention(closed_form_table(), ["a", "b"]).set_index(
        ["source", "scorer"]
    )
    row = summary.loc[("a", "ggn_diag")]
    b, c = (0.7 - 0.2) / (0.8 - 0.2), (0.3 - 0.2) / (0.6 - 0.2)
    assert row.retention == pytest.approx((b + c) / 2)
    assert row.accuracy == pytest.approx((0.7 + 0.3) / 2)
    assert (row.tasks, row["count"], row.seeds) == (2, 20, 2)
    assert row.low <= row.retention <= row.high
    # A mask that saw no data counts beside each source, on that source's held-out tasks.
    assert summary.loc[("a", "magnitude")].retention == pytest.approx((0.5 + 0.5) / 2)
    assert summary.loc[("b", "magnitude")].retention == pytest.approx((0.3 / 0.7 + 0.5) / 2)
    a, c = (0.1 - 0.2) / (0.9 - 0.2), 0.0
    assert summary.loc[("b", "ggn_diag")].retention == pytest.approx((a + c) / 2)
    assert summary.loc[("b", "dense")].retention == pytest.approx(1)

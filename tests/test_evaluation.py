import logging
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional as F

import pai_utils as pai
from benchmarks.coverage import simulate, truth
from pai_utils.evaluation import (
    Estimate,
    Evaluation,
    estimate,
    evaluate_heads,
    held_out_retention,
    paired,
    retention,
    summarise_retention,
    verdicts,
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


@pytest.mark.parametrize("effect", [0.0, 0.3])
@pytest.mark.parametrize("seeds", [3, 10])
def test_intervals_cover_the_truth_with_few_seeds(seeds: int, effect: float) -> None:
    random, trials, covered = np.random.default_rng(seeds), 200, 0
    for _ in range(trials):
        low, high = estimate(*simulate(random, seeds, effect=effect)).interval()
        covered += low <= truth(effect) <= high
    error = math.sqrt(0.95 * 0.05 / trials)  # of 93 to 97 % in the long run
    assert 0.93 - 3 * error <= covered / trials <= 0.97 + 3 * error


def test_an_estimate_has_its_closed_form() -> None:
    table, dense = simulate(np.random.default_rng(0), seeds=4, sources="abc")
    found = estimate(table, dense)
    whole = dense.correct[table.target].map(np.mean).to_numpy()
    each = (table.correct.map(np.mean).to_numpy() - 0.1) / (whole - 0.1)
    assert found.value == pytest.approx(np.mean(each))
    assert (found.over, found.degrees) == ("images and sources", 2)
    two = estimate(table[table.source != "c"], dense)
    assert (two.over, two.degrees) == ("images and seeds", 2 * 3)
    pair = table[(table.source == "a") & (table.seed < 2)]
    assert estimate(pair, dense).over == "images"  # two seeds tell nothing of seeds
    # One mask, one task, and no dense encoder: the binomial variance.
    one = estimate(table[:1])
    p = table.correct[0].mean()
    assert one.images == pytest.approx(p * (1 - p) / 149)
    assert (one.repeats, one.degrees, one.over) == (0, 0, "images")
    low, high = one.interval()
    assert (low + high) / 2 == pytest.approx(p)
    assert high - low == pytest.approx(2 * 1.959964 * math.sqrt(one.images), rel=1e-6)
    # The dense encoder beside itself keeps all, for certain.
    same = estimate(table[:3].assign(correct=[*dense.correct]), dense)
    assert same.value == pytest.approx(1)
    assert same.images == pytest.approx(0, abs=1e-30)
    # Without anything above chance there is nothing to keep.
    assert math.isnan(estimate(table, dense.assign(chance=1.0)).value)


def test_a_difference_is_paired() -> None:
    random = np.random.default_rng(0)
    ours, dense = simulate(random, seeds=3, sources="abc")
    same = paired(ours, ours.sample(frac=1, random_state=0))
    assert estimate(same, dense).interval() == pytest.approx((0, 0), abs=1e-12)
    blind = ours[ours.seed == 0]  # a mask without seeds stands beside every seed
    found = estimate(paired(ours, blind), dense)
    assert found.value == pytest.approx(estimate(ours, dense).value - estimate(blind, dense).value)
    # On the same images a difference varies less than both sides together.
    assert found.images < estimate(ours, dense).images + estimate(blind, dense).images
    with pytest.raises(ValueError, match=r"nothing to compare with .*\('c', 'x', 0\)"):
        paired(ours, ours[ours.source != "c"])


def test_verdicts_are_corrected_for_their_number() -> None:
    def known(value: float) -> Estimate:
        return Estimate(value, images=0.01**2, repeats=0.0, degrees=0, over="images")

    values = [0.95, 0.85, 0.901, 0.9 + 0.0205]
    assert verdicts([known(value) for value in values], 0.9) == [
        "holds", "reversed", "undecided", "undecided",
    ]  # fmt: skip
    assert verdicts([known(values[-1])], 0.9) == ["holds"]  # by itself p is 0.04
    assert verdicts([known(math.nan)], 0.9) == ["undecided"]


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

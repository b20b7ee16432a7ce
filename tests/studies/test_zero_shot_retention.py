import pandas as pd
import pytest
import torch

import pai_utils as pai
from pai_utils.studies import zero_shot_retention as study
from tests.cases import tiny_suite, tiny_task


def test_the_gap_between_protocols_is_what_the_leak_gains() -> None:
    task = tiny_task(train=60, test=40)
    generator = torch.Generator().manual_seed(0)
    for part in (task.train, task.test):  # nothing to learn: whatever is above chance is the leak
        part.labels.copy_(part.labels[torch.randperm(len(part), generator=generator)])
    suite = tiny_suite(spots=task)
    table = study.protocol_gap(suite)
    for protocol, row in table.set_index("protocol").iterrows():
        head = pai.fit_head(suite.encoder, task, protocol=str(protocol))
        found = pai.evaluate(pai.Classifier(suite.encoder, head), task.test)
        expected = (found.accuracy, 40, *found.interval)
        assert (row.accuracy, row["count"], row.low, row.high) == expected
    clean, leaking = table.accuracy
    assert table.gain.tolist() == [0, leaking - clean]
    assert leaking > clean


def pairs(**retention: list[float]) -> pd.DataFrame:
    """A summary of pairs ``source__target``, at sparsities 0.2, 0.4, 0.6."""
    return pd.DataFrame(
        dict(zip(("source", "target"), pair.split("__"), strict=True))
        | {"scorer": "snip", "sparsity": sparsity}
        | {"retention": value, "low": value - 0.05, "high": value + 0.05}
        for pair, values in retention.items()
        for sparsity, value in zip((0.2, 0.4, 0.6), values, strict=True)
    )


def test_the_sparsity_of_90_percent_lies_on_the_line_of_the_first_crossing() -> None:
    summary = pairs(a__b=[0.95, 0.83, 0.95], a__c=[0.8, 0.7, 0.6], b__c=[1.0, 0.98, 0.96])
    found = study.sparsity_kept(summary).set_index(["source", "target"])
    assert found.loc[("a", "b"), "sparsity"] == pytest.approx(0.2 + 0.2 * 5 / 12)
    assert found.loc[("a", "b"), "low"] == pytest.approx(0.2)  # 0.90 at 0.2 on the lower bound
    assert found.loc[("a", "b"), "high"] == pytest.approx(0.2 + 0.2 * 10 / 12)
    # From a retention of 1 at sparsity 0.
    assert found.loc[("a", "c"), "sparsity"] == pytest.approx(0.1)
    assert found.crossed.tolist() == [True, True, False]
    assert found.loc[("b", "c"), "sparsity"] == 0.6


def test_donors_are_compared_on_the_same_targets_and_never_on_their_own() -> None:
    summary = pairs(
        easy__easy=[1, 1, 1], easy__hard=[0.5, 0.2, 0], hard__easy=[1, 0.9, 0.8],
        hard__hard=[0, 0, 0], third__easy=[0.8, 0.7, 0.6], third__hard=[0.7, 0.6, 0.4],
    )  # fmt: skip
    found = study.rank_donors(summary, "snip", 0.4).set_index("source")
    # Means on the same target: 0.8 on easy, 0.4 on hard.
    assert found.advantage.round(9).to_dict() == {"hard": 0.1, "third": 0.05, "easy": -0.2}
    assert list(found.index) == ["hard", "third", "easy"]
    assert found.targets.to_dict() == {"hard": 1, "third": 2, "easy": 1}
    assert found.loc["third", "low"] == pytest.approx(0.05 - 1.96 * 0.15)

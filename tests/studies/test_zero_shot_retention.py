from typing import Any

import numpy as np
import pandas as pd
import pytest

from pai_utils.studies import zero_shot_retention as study


def parameters(**changes: Any) -> study.Parameters:
    given: dict[str, Any] = {
        "backbone": "efficientnet_lite0", "source": "digits", "targets": ["photos"],
        "scorers": ["ggn_diag", "magnitude"], "sparsities": [0.5], "seeds": [0], "out": "out",
    }  # fmt: skip
    return study.Parameters(**{**given, **changes})


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


def test_the_verdict_is_on_the_mean_over_all_sources() -> None:
    kept = {0.1: (89, 89, 88), 0.3: (82, 81, 86), 0.5: (48, 50, 52)}  # of 100, by source
    tasks = "abc"
    rows = [
        {"target": t, "source": "none", "scorer": "dense", "sparsity": 0.0, "right": 90}
        for t in tasks
    ] + [
        {"target": t, "source": source, "scorer": "snip", "sparsity": sparsity, "right": right}
        for sparsity, each in kept.items()
        for source, right in zip(tasks, each, strict=True)
        for t in tasks
    ]
    table = pd.DataFrame(rows).assign(seed=0, chance=0.1)
    table["correct"] = [np.arange(100) < right for right in table.right]
    found = study.retention_verdict(table, list(tasks), "snip").set_index("sparsity")
    assert found.verdict.tolist() == ["holds", "undecided", "reversed"]
    assert set(found.over) == {"images and sources"}
    assert found.retention[0.3] == pytest.approx((83 - 10) / 80)
    assert found.worst[0.3] == pytest.approx((81 - 10) / 80)
    assert (found.low <= found.retention).all()
    assert (found.retention <= found.high).all()


def test_options_of_a_scorer_reach_its_recipes_and_unknown_ones_are_refused() -> None:
    config = parameters(options={"ggn_diag": {"damping": 0}})
    options = {recipe.scorer: recipe.options for recipe in config.recipes}
    assert options == {"ggn_diag": {"damping": 0}, "magnitude": {}}
    with pytest.raises(ValueError, match=r"'ggn_diag' has no option 'dampng'.* damping"):
        parameters(options={"ggn_diag": {"dampng": 0}})
    with pytest.raises(ValueError, match="unknown scorer of options 'snip'"):
        parameters(options={"snip": {}})

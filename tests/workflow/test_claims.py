"""Claims are judged by what is stored, and left out where nothing is."""

from pathlib import Path

import pandas as pd
import pytest
from claims import CLAIMS, claims
from summarise import BACKBONES as STORED
from summarise import RESULTS

from tests.workflow.conftest import store_record

BACKBONES = {"small": "Small"}


def _store(path: Path, rows: list[dict[str, object]], **parameters: object) -> None:
    store_record(path.parent, parameters=parameters)
    pd.DataFrame(rows).to_csv(path, index=False)


def test_nothing_stored_gives_no_rows(tmp_path: Path) -> None:
    assert claims(tmp_path, BACKBONES).empty


def test_every_claim_is_judged_on_the_stored_results() -> None:
    assert len(claims(RESULTS, STORED)) == len(CLAIMS) * len(STORED)


@pytest.mark.parametrize(
    ("kept", "verdict"),
    [((0.95, 0.92), "reproduced"), ((0.95, 0.5), "in part"), ((0.6, 0.5), "not reproduced")],
)
def test_retention_is_judged_at_every_sparsity(
    kept: tuple[float, float], verdict: str, tmp_path: Path
) -> None:
    rows: list[dict[str, object]] = [
        {"source": "a", "scorer": "ggn_diag", "sparsity": s, "retention": r,
         "low": r - 0.1, "high": r + 0.1}
        for s, r in zip((0.1, 0.3), kept, strict=True)
    ]  # fmt: skip
    _store(tmp_path / "real" / "zero_shot_retention-small" / "held_out.csv", rows)
    (row,) = claims(tmp_path, BACKBONES).to_dict("records")
    assert (row["encoder"], row["verdict"]) == ("Small", verdict)
    assert f"10%: {kept[0]:.2f} ({kept[0] - 0.1:.2f} to {kept[0] + 0.1:.2f})" in row["measured"]


def test_recovery_is_judged_by_its_interval_at_the_best_rate(tmp_path: Path) -> None:
    for name, gains in {"one": (0.1, 0.02), "two": (-0.1, -0.2)}.items():
        rows: list[dict[str, object]] = [
            {"start": "pruned", "sparsity": 0.5 if name == "one" else 0.7, "penalty": penalty,
             "held_out_gain": gain, "held_out_low": gain - 0.01, "held_out_high": gain + 0.01,
             "source_low": source}
            for penalty, gain, source in (
                ("none", gains[0], 0.1), ("none", gains[1], 0.1), ("features", 9.0, 0.1),
                ("none", 8.0, -0.1),  # did not improve the source
            )
        ]  # fmt: skip
        path = tmp_path / "recovery" / f"finetune_recovery-small-{name}" / "gains.csv"
        _store(path, rows, rounds=1 if name == "one" else 6)
    (row,) = claims(tmp_path, BACKBONES).to_dict("records")
    assert row["verdict"] == "in part"
    assert (
        "pruned at 50%: +0.10 (+0.09 to +0.11); pruned at 70% in 6 rounds: -0.10" in row["measured"]
    )


def test_a_small_loss_is_no_negative_zero(tmp_path: Path) -> None:
    path = tmp_path / "recovery" / "finetune_recovery-small" / "gains.csv"
    _store(
        path,
        [{"start": "repaired", "sparsity": 0.7, "penalty": "none", "held_out_gain": -0.001,
          "held_out_low": -0.012, "held_out_high": -0.004, "source_low": 0.01}],
    )  # fmt: skip
    (row,) = claims(tmp_path, BACKBONES).to_dict("records")
    assert row["measured"].endswith("repaired at 70%: +0.00 (-0.01 to +0.00)")
    assert row["verdict"] == "not reproduced"


def test_where_no_rate_improves_the_source_nothing_is_said_of_others(tmp_path: Path) -> None:
    _store(
        tmp_path / "recovery_real" / "finetune_recovery-small" / "gains.csv",
        [{"start": "repaired", "sparsity": 0.7, "penalty": "none", "held_out_gain": 0.5,
          "held_out_low": 0.4, "held_out_high": 0.6, "source_low": 0.0}],
    )  # fmt: skip
    (row,) = claims(tmp_path, BACKBONES).to_dict("records")
    assert row["measured"].endswith("at the best rate, no rate improved the source in 1 of 1 runs")
    assert row["verdict"] == "not tested"


def test_the_quadratic_model_is_judged_on_held_out_tasks(tmp_path: Path) -> None:
    _store(
        tmp_path / "landscape" / "landscape_analysis-small" / "losses.csv",
        [{"source": "a", "target": target, "sparsity": 0.2, "fraction": fraction,
          "measured": 1.0, "taylor": taylor}
         for target, fraction, taylor in (
             ("a", 1.0, 0.0), ("b", 1.0, 1.4), ("c", 1.0, 0.6), ("d", 1.0, 1.6), ("b", 0.5, 9.0)
         )],
    )  # fmt: skip
    (row,) = claims(tmp_path, BACKBONES).to_dict("records")
    assert row["measured"].endswith("held-out tasks at 20%: 67%; own tasks at 20%: 0%")
    assert row["verdict"] == "reproduced"


@pytest.mark.parametrize(
    ("increase", "overlap", "verdicts"),
    [(1.0, 0.3, ["reproduced", "in part"]), (3.0, 0.1, ["in part", "not reproduced"])],
)
def test_pre_training_is_judged_by_less_of_one_thing_and_more_of_another(
    increase: float, overlap: float, verdicts: list[str], tmp_path: Path
) -> None:
    values = {
        "loss increase (nats)": (increase, 2.0),
        "error of the quadratic model, as a share": (0.4, 0.5),
        "overlap of masks above chance": (overlap, 0.2),
        "overlap of top eigenspaces": (0.01, 0.02),
        "rank correlation of diagonals": (0.5, 0.6),
    }
    rows: list[dict[str, object]] = [
        {"quantity": quantity, "weights": weights, "value": value}
        for quantity, pair in values.items()
        for weights, value in zip(("pre-trained", "random"), pair, strict=True)
    ]
    _store(tmp_path / "landscape" / "landscape_analysis-small" / "compared.csv", rows)
    table = claims(tmp_path, BACKBONES)
    assert table.verdict.to_list() == verdicts
    assert f"loss increase (nats): {increase:.3g} against 2;" in table.measured[0]

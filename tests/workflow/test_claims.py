"""Claims are judged by what is stored, and left out where nothing is."""

import re
from pathlib import Path

import pandas as pd
import pytest
from claims import CLAIMS, claims
from summarise import BACKBONES, RESULTS

from tests.workflow.conftest import store_record


def judged(results: Path, run: str, rows: list[dict[str, object]], **parameters: object) -> str:
    """Store a table of a run, and return the verdicts and what was measured, a line each."""
    path = results / run
    store_record(path.parent, parameters=parameters)
    pd.DataFrame(rows).to_csv(path, index=False)
    table = claims(results, {"small": "Small"})
    return "\n".join(f"{row.verdict}; {row.measured}" for row in table.itertuples())


def test_every_claim_is_judged_on_the_stored_results_and_none_without(tmp_path: Path) -> None:
    assert len(claims(RESULTS, BACKBONES)) == len(CLAIMS) * len(BACKBONES)
    assert claims(tmp_path, BACKBONES).empty


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
    found = judged(tmp_path, "real/zero_shot_retention-small/held_out.csv", rows)
    assert found.startswith(f"{verdict}; ")
    assert f"10%: {kept[0]:.2f} ({kept[0] - 0.1:.2f} to {kept[0] + 0.1:.2f})" in found


@pytest.mark.parametrize(
    ("magnitudes", "verdict"),
    [((0.5, 0.5), "reproduced"), ((0.5, 0.8), "in part"), ((0.95, 0.8), "not reproduced")],
)
def test_second_order_is_judged_against_both_magnitudes(
    magnitudes: tuple[float, float], verdict: str, tmp_path: Path
) -> None:
    kept = {"ggn_diag": (0.95, 0.8), "magnitude": magnitudes[:1] * 2}
    kept["magnitude@layer"] = (0.5, magnitudes[1])
    rows: list[dict[str, object]] = [
        {"source": "a", "scorer": scorer, "sparsity": s, "retention": r,
         "low": r - 0.05, "high": r + 0.05}
        for scorer, values in kept.items()
        for s, r in zip((0.1, 0.3), values, strict=True)
    ]  # fmt: skip
    found = judged(tmp_path, "damping/zero_shot_retention-small/held_out.csv", rows)
    assert found.startswith(f"{verdict}; ")
    assert f"30%: 0.80 against {magnitudes[0]:.2f} and {magnitudes[1]:.2f}" in found


@pytest.mark.parametrize(
    ("gains", "source", "found"),
    [
        ((-0.1, 0.1), 0.1, "reproduced; .* at 70% in 6 rounds: [+]0.10 .[+]0.09 to [+]0.11.$"),
        ((-0.001, -0.002), 0.1, "not reproduced; .*: [+]0.00 .-0.01 to [+]0.01.$"),
        ((0.1, 0.2), 0.0, "not tested; .* no rate improved the source in 1 of 1 runs$"),
    ],
)
def test_recovery_is_judged_by_its_interval_at_the_best_rate_that_improves_the_source(
    gains: tuple[float, float], source: float, found: str, tmp_path: Path
) -> None:
    rows: list[dict[str, object]] = [
        {"start": "pruned", "sparsity": 0.7, "penalty": penalty, "held_out_gain": gain,
         "held_out_low": gain - 0.01, "held_out_high": gain + 0.01, "source_low": low}
        for penalty, gain, low in (
            *(("none", gain, source) for gain in gains), ("features", 9.0, 0.1), ("none", 8.0, -0.1)
        )
    ]  # fmt: skip
    run = "recovery/finetune_recovery-small/gains.csv"
    assert re.match(found, judged(tmp_path, run, rows, rounds=6))


def test_the_quadratic_model_is_judged_on_held_out_tasks(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"source": "a", "target": target, "sparsity": 0.2, "fraction": fraction,
         "measured": 1.0, "taylor": taylor}
        for target, fraction, taylor in (
            ("a", 1.0, 0.0), ("b", 1.0, 1.4), ("c", 1.0, 0.6), ("d", 1.0, 1.6), ("b", 0.5, 9.0)
        )
    ]  # fmt: skip
    found = judged(tmp_path, "landscape/landscape_analysis-small/losses.csv", rows)
    assert found.startswith("reproduced; ")
    assert found.endswith("held-out tasks at 20%: 67%; own tasks at 20%: 0%")


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
    found = judged(tmp_path, "landscape/landscape_analysis-small/compared.csv", rows)
    assert [line.partition(";")[0] for line in found.splitlines()] == verdicts
    assert f"loss increase (nats): {increase:.3g} against 2;" in found

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

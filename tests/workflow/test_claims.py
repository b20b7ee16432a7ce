"""Claims are judged by results of single images, which plain NumPy recomputes."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from claims import LOCKED, Results, claims, judged
from summarise import RESULTS

RUN = "transfer/zero_shot_retention-efficientnet_lite0"


def store(folder: Path, **right: int) -> None:
    """Store accuracies of six sources and a locked task, by method: how many of 100 are right."""
    tasks = [*"abcdef", LOCKED]
    random = np.random.default_rng(0)
    rows = [
        {
            "target": target, "source": source, "scorer": method, "sparsity": 0.3, "seed": 0,
            "count": 100, "chance": 0.1,
            "correct": np.packbits(random.permutation(100) < count).tobytes().hex(),
        }
        for method, count in {"dense": 90, **right}.items()
        for source in (["none"] if method in ("dense", "magnitude") else tasks[:-1])
        for target in tasks
    ]  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(folder / "accuracies.csv", index=False)


def test_verdicts_need_an_interval_beyond_the_criterion(tmp_path: Path) -> None:
    assert judged(Results(tmp_path)).empty  # what is not stored is left out
    store(tmp_path / RUN, ggn_diag=89, feature_ggn_diag=60, magnitude=80)
    store(tmp_path / f"{RUN}-undamped", ggn_diag=82)
    table = judged(Results(tmp_path)).set_index("claim")
    said = table.verdict.to_dict()
    assert said["P1, damped curvature of the loss"] == "holds"
    assert said["P1, damped curvature of the features"] == "reversed"
    assert said["P1, the paper's score: no damping"] == "undecided"
    assert said["damping adds"] == "holds"
    assert said["curvature of the loss over magnitude over all layers"] == "holds"
    assert said["curvature of the loss over curvature of the features"] == "holds"
    assert said["the locked task"] == "reversed"
    shown = claims(table.reset_index(), "EfficientNet-Lite0").set_index("claim")
    assert shown.loc["P1, damped curvature of the loss", "at 30%"] == "0.99 ✓"
    value = table.loc["curvature of the loss over magnitude over all layers", "value"]
    assert value == pytest.approx((89 - 80) / 80, abs=1e-12)


def test_plain_numpy_recomputes_every_number() -> None:
    script = RESULTS / "recompute.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr
    rows = pd.read_csv(RESULTS / "summary" / "judged.csv")
    assert done.stdout.count("\n") == len(rows) + 1
    assert "import pai_utils" not in script.read_text("utf-8")

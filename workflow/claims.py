"""The paper's claims beside what was measured: `claims(results)` is a table of `results/summary/`.

Every row is judged by a rule that stands beside it, on tables of other folders of `results/`.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from pai_utils.runs import read_record

KEPT = 0.9  # of the accuracy above chance
REPRODUCED, PARTLY, NOT = "reproduced", "in part", "not reproduced"
UNTESTED = "not tested"  # where what the claim presumes did not come about
BEYOND = "beyond the paper"
RECOVERIES = {"recovery": "embedded", "recovery_real": "larger"}
"""What tasks the grids of fine-tuning are on."""


class Judged(NamedTuple):
    """What was measured, in words with numbers, and what it makes of the claim."""

    measured: str
    verdict: str


def _interval(row: pd.Series, value: str, low: str, high: str, sign: str = "") -> str:
    form = f"{sign}z.2f"  # z: no "-0.00"
    return f"{row[value]:{form}} ({row[low]:{form}} to {row[high]:{form}})"


def _at(table: pd.DataFrame, value: str, low: str, high: str, sign: str = "") -> str:
    return "; ".join(
        f"{row.sparsity:.0%}: {_interval(row, value, low, high, sign)}"
        for _, row in table.sort_values("sparsity").iterrows()
    )


def _judge(supported: "pd.Series[bool]") -> str:
    if supported.all():
        return REPRODUCED
    return PARTLY if supported.any() else NOT


def _held_out(results: Path, grid: str, backbone: str) -> pd.DataFrame:
    return pd.read_csv(results / grid / f"zero_shot_retention-{backbone}" / "held_out.csv")


def retention(results: Path, backbone: str) -> Judged:
    """P1 for the paper's score: kept at every sparsity, at some, at none."""
    table = pd.read_csv(results / "real" / f"zero_shot_retention-{backbone}" / "verdict.csv")
    return Judged(
        f"held-out retention at {_at(table, 'retention', 'low', 'high')}",
        _judge(table.retention >= KEPT),
    )


def second_order(results: Path, backbone: str) -> Judged:
    """The diagonal's interval lies above those of both magnitudes at every sparsity, at some."""
    table = _held_out(results, "damping", backbone)
    means = table.groupby(["scorer", "sparsity"])[["retention", "low", "high"]].mean()
    names = ["ggn_diag", "magnitude", "magnitude@layer"]
    ours, overall, by_layer = (means.loc[name] for name in names)
    kept = pd.concat([ours, overall, by_layer], axis=1, keys=names).xs("retention", axis=1, level=1)
    found = ", ".join(
        f"{sparsity:.0%}: {mine:z.2f} against {one:z.2f} and {other:z.2f}"
        for sparsity, (mine, one, other) in zip(kept.index, kept.to_numpy(), strict=True)
    )
    apart = ours.low > np.maximum(overall.high, by_layer.high)
    return Judged(f"held-out retention at {found} within layers", _judge(apart))


def recovery(results: Path, backbone: str) -> Judged:
    """P2: of rates that improve the source, one improves held-out tasks: in all runs, in some."""
    paths = sorted(results.glob(f"recovery*/finetune_recovery-{backbone}*/gains.csv"))
    if not paths:
        raise FileNotFoundError(f"no recovery of {backbone} is stored")
    table = pd.concat(
        (pd.read_csv(path).assign(where=_where(path.parent)) for path in paths), ignore_index=True
    ).round(12)  # sums of thirds that are zero, in older runs a trifle above it
    table = table[table.penalty == "none"]
    keys = ["where", "start", "sparsity"]
    better = table[table["source_low"] > 0]
    best = better.loc[better.groupby(keys).held_out_gain.idxmax()].sort_values(keys)
    found = [
        f"{row.start} at {row.sparsity:.0%}{row['where']}: "
        f"{_interval(row, 'held_out_gain', 'held_out_low', 'held_out_high', '+')}"
        for _, row in best.iterrows()
    ]
    others = len(table.groupby(keys)) - len(best)
    if others:
        found.append(f"no rate improved the source in {others} of {others + len(best)} runs")
    return Judged(
        f"gain in accuracy at the best rate, {'; '.join(found)}",
        _judge(best.held_out_low > 0) if len(best) else UNTESTED,
    )


def _where(run: Path) -> str:
    larger = " on larger data sets" if RECOVERIES[run.parent.name] == "larger" else ""
    rounds = rounds_of(read_record(run).parameters)
    return larger + (f" in {in_words(rounds)}" if rounds > 1 else "")


def rounds_of(parameters: Mapping[str, Any]) -> int:
    """In how many rounds the masks of a run were reached; older records do not say so."""
    return int(parameters.get("rounds", 1))


def in_words(rounds: int) -> str:
    """As "1 round" or "6 rounds"."""
    return f"{rounds} round" + ("" if rounds == 1 else "s")


def pre_training(
    results: Path, backbone: str, *, quantities: Mapping[str, str], rises: bool
) -> Judged:
    """Medians over pairs of tasks are better than with random weights: all of them, some.

    Args:
        results: the folder of stored results.
        backbone: its name.
        quantities: names in `compared.csv`, each with the format of its numbers.
        rises: whether more is better, instead of less.
    """
    path = results / "landscape" / f"landscape_analysis-{backbone}" / "compared.csv"
    medians = pd.read_csv(path).pivot_table(
        index="quantity", columns="weights", values="value", aggfunc="median"
    )
    rows = medians.loc[list(quantities)]
    found = "; ".join(
        f"{quantity}: {ours:{form}} against {random:{form}}"
        for (quantity, form), ours, random in zip(
            quantities.items(), rows["pre-trained"], rows["random"], strict=True
        )
    )
    gain = (rows["pre-trained"] - rows["random"]) * (1 if rises else -1)
    return Judged(f"pre-trained against random weights, {found}", _judge(gain > 0))


def quadratic(results: Path, backbone: str) -> Judged:
    """With gradient and Hessian, held-out tasks are predicted within half: most cells, or not."""
    path = results / "landscape" / f"landscape_analysis-{backbone}" / "losses.csv"
    losses = pd.read_csv(path)
    full = losses[losses.fraction == 1]
    right = (full.taylor - full.measured).abs() <= 0.5 * full.measured.abs()
    own = full.source == full.target
    held_out, also = (right[cells].groupby(full.sparsity[cells]).mean() for cells in (~own, own))
    found = "; ".join(
        f"{tasks} tasks at {_shares(shares)}"
        for tasks, shares in (("held-out", held_out), ("own", also))
        if len(shares)
    )
    return Judged(f"cells predicted within half, {found}", _judge(held_out > 0.5))


def _shares(shares: "pd.Series[Any]") -> str:
    return ", ".join(f"{sparsity:.0%}: {share:.0%}" for sparsity, share in shares.items())


def repair(results: Path, backbone: str) -> Judged:
    """What a feature score with a repair keeps."""
    name = "feature_ggn_diag + layerwise+moments"
    held_out = _held_out(results, "retention", backbone)
    rows = held_out[held_out.scorer == name].groupby("sparsity", as_index=False)
    table = rows[["retention", "low", "high"]].mean()
    return Judged(f"held-out retention at {_at(table, 'retention', 'low', 'high')}", BEYOND)


CLAIMS: dict[str, Callable[[Path, str], Judged]] = {
    "A mask of one task, by the diagonal alone, keeps 90 % of unseen tasks (P1)": retention,
    "Second-order masks keep more of unseen tasks than magnitude": second_order,
    "Fine-tuning on the source recovers unseen tasks (P2)": recovery,
    "Around the weights a quadratic model predicts the loss": quadratic,
    "Pre-training makes the landscape favourable": partial(
        pre_training,
        quantities={
            "loss increase (nats)": "z.3g",
            "error of the quadratic model, as a share": "z.3g",
        },
        rises=False,
    ),
    "Pre-training makes tasks alike": partial(
        pre_training,
        quantities={
            "overlap of masks above chance": "z.2f",
            "overlap of top eigenspaces": "z.2f",
            "rank correlation of diagonals": "z.2f",
        },
        rises=True,
    ),
    "Score of the features and repair without training": repair,
}


def claims(results: Path, backbones: dict[str, str]) -> pd.DataFrame:
    """One row a claim and encoder; what is not stored is left out.

    Args:
        results: the folder of stored results.
        backbones: labels by name.
    """
    rows = []
    for claim, judge in CLAIMS.items():
        for backbone, label in backbones.items():
            try:
                found = judge(results, backbone)
            except (FileNotFoundError, KeyError):  # no table, or not with these rows
                continue
            rows.append(
                {
                    "claim": claim,
                    "encoder": label,
                    "verdict": found.verdict,
                    "measured": found.measured,
                }
            )
    return pd.DataFrame(rows)

"""The answer at the head of a chapter, in numbers from the stored results.

`answers(stored)` gives a paragraph for each chapter whose numbers come from `results/`;
`summarise.py` writes them to `results/summary/answers/`, where the chapters include them. Chapters
on the book's own runs take their numbers from the executed notebooks instead.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from claims import BEYOND, KEPT, NOT, PARTLY, REPRODUCED, UNTESTED, in_words

from pai_utils.runs import read_record
from pai_utils.studies.zero_shot_retention import retention_verdict

FURTHER_BACKBONES = {"efficientnet_lite2": "EfficientNet-Lite2", "mobilenetv2": "MobileNetV2"}
PAPERS_SCORE = "ggn_diag"
REPAIRED = " + "  # between a score and its repair


class Stored(NamedTuple):
    """The folder of results, and what `summarise.py` has set side by side of it."""

    results: Path
    backbones: dict[str, str]  # labels by name
    runs: pd.DataFrame
    repaired: pd.DataFrame
    gains: pd.DataFrame
    recovery: pd.DataFrame
    explorer: pd.DataFrame
    claims: pd.DataFrame


def held_out(results: Path, grid: str, backbone: str) -> pd.DataFrame:
    """What the main run of a grid keeps of held-out tasks, and the same in rounds if it is stored.

    Raises:
        FileNotFoundError: if the main run is not stored.
    """
    main = results / grid / f"zero_shot_retention-{backbone}"
    parts = [pd.read_csv(main / "held_out.csv")]
    again = main.with_name(f"{main.name}-rounds")
    if again.is_dir():
        rounds = read_record(again).parameters["rounds"]
        table = pd.read_csv(again / "held_out.csv")
        # Without a repair, and without pre-training, rounds are no method of this book.
        table = table[table.scorer.str.contains(REPAIRED, regex=False)]
        parts.append(table.assign(scorer=table.scorer + f", {rounds} rounds"))
    return pd.concat(parts, ignore_index=True)


def answers(stored: Stored) -> dict[str, str]:
    """A paragraph for each chapter; chapters of what is not stored are left out."""
    found = {}
    for chapter, answer in ANSWERS.items():
        try:
            found[chapter] = f"**Answer.** {answer(stored)}\n"
        except (FileNotFoundError, KeyError):  # no table, or not with these rows
            continue
    return found


def index(stored: Stored) -> str:
    """What masks keep of unseen tasks on larger data sets, alone and with a repair."""
    table = overview(stored)
    masks = table[table.method == PAPERS_SCORE]
    repaired = table[table.method.str.contains(REPAIRED, regex=False)]
    repaired = repaired[repaired.sparsity == repaired.sparsity.min()]
    alone = _listed(
        f"{_series(own)} on {encoder}" for encoder, own in masks.groupby("encoder", sort=False)
    )
    mended = _listed(f"{_interval(row)} on {row.encoder}" for _, row in repaired.iterrows())
    sparsities = _listed(f"{sparsity:.0%}" for sparsity in sorted(set(masks.sparsity)))
    return (
        f"At {sparsities} sparsity, a second-order mask made on one task keeps, of the accuracy "
        f"above chance of tasks that it has not seen, {alone}. At {repaired.sparsity.min():.0%}, "
        "with the surviving weights re-solved, without training and still without these tasks, "
        f"it is {mended}."
    )


def overview(stored: Stored) -> pd.DataFrame:
    """Retention on larger data sets, means over the sources: `encoder, method, sparsity, …`.

    Raises:
        FileNotFoundError: if an encoder has no run on them.
    """
    parts = []
    for backbone, label in stored.backbones.items():
        path = stored.results / "real" / f"zero_shot_retention-{backbone}" / "held_out.csv"
        table = pd.read_csv(path)
        masks = [
            retention_verdict(table, name, threshold=KEPT).assign(method=name)
            for name in (PAPERS_SCORE, "magnitude", "random")
        ]
        repairs = stored.repaired[
            (stored.repaired["encoder"] == label)
            & (stored.repaired["tasks"] == "larger")
            & stored.repaired["method"].str.contains(REPAIRED, regex=False)
        ]
        parts.append(pd.concat([*masks, repairs]).assign(encoder=label))
    return pd.concat(parts, ignore_index=True)[
        ["encoder", "method", "sparsity", "retention", "low", "high"]
    ]


def scorer_atlas(stored: Stored) -> str:
    """The best score at each sparsity, the costs, and how far masks agree."""
    return " ".join(_atlas(stored.results, *item) for item in stored.backbones.items())


def _atlas(results: Path, backbone: str, label: str) -> str:
    folder = results / "atlas" / f"scorer_atlas-{backbone}"
    left = pd.read_csv(folder / "left.csv")
    left = left[left.tasks == "held-out"]
    best = left.loc[left.groupby("sparsity").retention.idxmax()]
    kept = _listed(
        f"at {row.sparsity:.0%} sparsity by `{row.scorer}`, {_interval(row)}"
        for _, row in best.iterrows()
    )
    cost = pd.read_csv(folder / "costs.csv").set_index("scorer").fb
    dearest = str(cost.idxmax())
    scorers = [name for name in cost.index if name != "random"]
    overlap, chance = (
        pd.read_csv(folder / f"{name}.csv", index_col="scorer").loc[scorers, scorers]
        for name in ("overlap_scorers", "overlap_scorers_chance")
    )
    pairs = np.triu_indices(len(overlap), 1)
    middle = sorted(set(left.sparsity))[left.sparsity.nunique() // 2]  # as in the notebook
    return (
        f"On {label}, the highest retention on held-out tasks is left {kept}. The paper's score, "
        f"`{PAPERS_SCORE}`, costs {cost[PAPERS_SCORE]:.1f} forward and backward passes (FB), the "
        f"dearest, `{dearest}`, {cost[dearest]:.0f}. At {middle:.0%} sparsity, masks of two scores "
        f"share {np.median(overlap.to_numpy()[pairs]):.2f} of the weights that either keeps, in "
        f"the median over pairs; by chance it would be "
        f"{np.median(chance.to_numpy()[pairs]):.2f}, with as many weights kept in each layer."
    )


def real_data(stored: Stored) -> str:
    """Where second-order masks keep enough, and what others keep, encoder by encoder."""
    enough, lines = {}, []
    for backbone, label in (stored.backbones | FURTHER_BACKBONES).items():
        path = stored.results / "real" / f"zero_shot_retention-{backbone}" / "held_out.csv"
        if not path.is_file():
            continue
        table = pd.read_csv(path)
        own = retention_verdict(table, PAPERS_SCORE, threshold=KEPT).sort_values("sparsity")
        kept = own[own.verdict == "kept"].sparsity
        enough[label] = f"up to {kept.max():.0%} sparsity on {label}" if len(kept) else ""
        others = _listed(
            f"{name} ones {_series(retention_verdict(table, name, threshold=KEPT))}"
            for name in ("magnitude", "random")
        )
        sparsities = _listed(f"{sparsity:.0%}" for sparsity in own.sparsity)
        lines.append(
            f"- {label}: at {sparsities} sparsity second-order masks keep {_series(own)}, {others}."
        )
    if not lines:
        raise FileNotFoundError("no run on real data sets is stored")
    somewhere = _listed(text for text in enough.values() if text)
    nowhere = _listed(label for label, text in enough.items() if not text)
    return (
        f"Second-order masks keep {KEPT:.0%} of what held-out tasks have above chance "
        + (somewhere or "nowhere")
        + (f"; on {nowhere} at no sparsity measured" if somewhere and nowhere else "")
        + ".\n\n"
        + "\n".join(lines)
    )


def repair(stored: Stored) -> str:
    """The best repaired mask beside the best scores without a repair, and the spread of sources."""
    kinds = stored.repaired["tasks"]
    embedded, larger = (
        dict(stored.repaired[kinds == kind].set_index(["encoder", "sparsity", "method"]).iterrows())
        for kind in ("embedded", "larger")
    )
    sentences = []
    for sparsity, rows in stored.gains.groupby("sparsity"):
        parts = []
        for _, row in rows.iterrows():
            key = (row.encoder, sparsity, row["best here"])
            also = f"{larger[key].retention:z.2f} on larger data sets; " if key in larger else ""
            parts.append(
                f"{_interval(embedded[key])} on {row.encoder} ({also}without a repair "
                f"`{row['best of six']}` {row['of six']:z.2f}, the best of six scores, and "
                f"`{row['best of all']}` {row['of all']:z.2f}, the best of all)"
            )
        methods = _listed(f"`{name}`" for name in dict.fromkeys(rows["best here"]))
        sentences.append(
            f"At {sparsity:.0%} sparsity, {methods} keeps, of the accuracy above chance of tasks "
            f"that neither the score nor the repair has seen, {_listed(parts)}."
        )
    highest = stored.gains[stored.gains.sparsity == stored.gains.sparsity.max()]
    spread = []
    for backbone, label in stored.backbones.items():
        table = held_out(stored.results, "retention", backbone)
        best = highest.set_index("encoder").loc[label]
        table = table[(table.scorer == best["best here"]) & (table.sparsity == best.sparsity)]
        ends = table.sort_values("retention").iloc[[0, -1]]
        low, high = (
            f"{row.retention:z.2f} around {row.source.split('+')[0]}" for _, row in ends.iterrows()
        )
        spread.append(f"from {low} to {high} on {label}")
    return " ".join(sentences) + (
        f" It depends on the source: at {highest.sparsity.iloc[0]:.0%}, {_listed(spread)}."
    )


def finetune_recovery(stored: Stored) -> str:
    """What plain fine-tuning does by the rule of the claim, and from repaired masks a held one."""
    table = stored.recovery[stored.recovery["start"] == "repaired"]
    if table.empty:
        raise FileNotFoundError("no recovery from repaired masks is stored")
    judged = stored.claims[stored.claims["claim"].str.endswith("(P2)")]
    verdicts = "; ".join(
        f"on {row.encoder} {row.verdict} ({row.measured})" for _, row in judged.iterrows()
    )
    lines = []
    for (encoder, tasks, sparsity), runs in table.groupby(["encoder", "tasks", "sparsity"]):
        run = runs[(runs["rounds"] == runs["rounds"].max()) & (runs["chosen"] == "yes")]
        parts = [
            f"{row['held-out after']:z.2f} with "
            + ("no penalty" if row["penalty"] == "none" else f"the penalty `{row['penalty']}`")
            + f" ({row['gain']:+z.3f}, {row['low']:+z.3f} to {row['high']:+z.3f})"
            for _, row in run.iterrows()
        ]
        first = run.iloc[0]
        lines.append(
            f"- on {encoder}, {tasks} tasks, at {sparsity:.0%} sparsity "
            f"in {in_words(first['rounds'])}: "
            f"{first['held-out before']:z.2f} before; {_listed(parts)}"
        )
    return (
        f"That plain fine-tuning recovers unseen tasks: {verdicts}.\n\n"
        "From repaired masks, those of most rounds, what is kept of the accuracy of held-out tasks "
        "above chance, before fine-tuning and after it, each at the rate that the source's "
        "validation part chooses; in brackets the change in accuracy, with its 95% interval over "
        "test images:\n\n" + ";\n".join(lines) + "."
    )


def explorer(stored: Stored) -> str:
    """How many retentions there are, and their medians with and without a repair."""
    pairs = stored.explorer
    # A mask and the same with a repair: others differ in scores, tasks and sources, and in rounds
    # each has its own masks.
    mask = ["grid", "backbone", "variant", "source", "target", "scorer", "sparsity"]
    unseen = pairs[(pairs["task"] == "held-out") & (pairs["variant"] != "rounds")]
    unseen = unseen[unseen.groupby(mask).repair.transform("nunique") > 1]
    repaired = unseen.repair != "none"
    medians = []
    for sparsity in sorted(set(unseen[repaired].sparsity) & set(unseen[~repaired].sparsity)):
        here = unseen.sparsity == sparsity
        alone, mended = (unseen[here & which].retention for which in (~repaired, repaired))
        medians.append(
            f"Of masks that are stored with and without a repair, one of {sparsity:.0%} sparsity "
            f"keeps {alone.median():z.2f} of a held-out task alone, in the median over "
            f"{len(alone)} of them, and {mended.median():z.2f} with a repair."
        )
    runs = pairs.groupby(["grid", "backbone", "variant"]).ngroups
    counts = [
        f"{pairs[column].nunique()} {name}"
        for column, name in (("backbone", "encoders"), ("scorer", "scores"))
    ]
    return f"There are {len(pairs):,} retentions of {runs} runs, {_listed(counts)}. " + " ".join(
        medians
    )


def benchmarks(stored: Stored) -> str:
    """What was measured against the targets, and which of them are not met."""
    table = pd.read_csv(stored.results / "benchmarks" / "cpu" / "page" / "targets.csv")
    measured = {name: rows.measured for name, rows in table.groupby("target")}
    peers = table[table.target.str.startswith("times faster than the fastest correct peer")]
    first, further = (
        _range(measured[f"{which} Hessian product, time in FB"]) for which in ("first", "further")
    )
    rank_one = measured["block_fisher, times faster than the rank-one recursion"]
    missed = table[table.met == "no"]
    return (
        "In forward and backward passes (FB), the diagonal of the Gauss–Newton matrix costs "
        f"{_range(measured['diagonal of the GGN, time in FB'])}, by network; the fastest correct "
        f"routine of another package takes {_range(peers.measured)} times as long. A first "
        f"product with the Hessian costs {first}, a further one {further}. "
        f"Rank-one updates of Fisher blocks take {rank_one.iloc[0]:.0f} times as long as one "
        "factorisation. "
        f"Of {len(table)} targets {len(table) - len(missed)} are met"
        + (
            "; not met are: "
            + "; ".join(
                f"{row.target}, on {row.on} ({row.measured:.2f}, "
                + (
                    f"at least {row['at least']:.2f})"
                    if pd.notna(row["at least"])
                    else f"at most {row['at most']:.2f})"
                )
                for _, row in missed.iterrows()
            )
            if len(missed)
            else ""
        )
        + "."
    )


def claims(stored: Stored) -> str:
    """How many of the paper's claims were reproduced on each encoder."""
    judged = stored.claims[stored.claims["verdict"] != BEYOND]
    counts = [
        f"On {encoder}, of {len(rows)} claims: "
        + ", ".join(
            f"{verdict} {(rows.verdict == verdict).sum()}"
            for verdict in (REPRODUCED, PARTLY, NOT, UNTESTED)
            if verdict != UNTESTED or verdict in set(rows.verdict)
        )
        for encoder, rows in judged.groupby("encoder", sort=False)
    ]
    return (
        f"{'. '.join(counts)}. The table gives the numbers behind each. They are read from the "
        "stored runs, and each verdict follows from them by the rule below, not by hand."
    )


def status(stored: Stored) -> str:
    """How many larger runs there are, and what they took."""
    runs = stored.runs
    minutes, days = runs["minutes"], runs["started, UTC"].str[:10]
    return (
        f"The larger results come from {len(runs)} runs, which took {minutes.sum() / 60:.1f} hours "
        f"in all, {minutes.max():.0f} minutes the longest, and at most "
        f"{runs['memory, MiB'].max() / 1024:.1f} GiB of memory. They were started from "
        f"{days.min()} to {days.max()}. What the book itself ran is in the first table; its last "
        "column says what went wrong."
    )


ANSWERS: dict[str, Callable[[Stored], str]] = {
    "index": index,
    "scorer_atlas": scorer_atlas,
    "real_data": real_data,
    "repair": repair,
    "finetune_recovery": finetune_recovery,
    "explorer": explorer,
    "benchmarks": benchmarks,
    "claims": claims,
    "status": status,
}


def _interval(row: pd.Series) -> str:
    return f"{row.retention:z.2f} ({row.low:z.2f} to {row.high:z.2f})"


def _series(verdicts: pd.DataFrame) -> str:
    """Retentions in the order of the sparsities."""
    return _listed(f"{value:z.2f}" for value in verdicts.sort_values("sparsity").retention)


def _range(values: "pd.Series[float]") -> str:
    return f"{values.min():.2f} to {values.max():.2f}"


def _listed(texts: Iterable[str]) -> str:
    """`a, b and c`."""
    *others, last = list(texts) or [""]
    return f"{', '.join(others)} and {last}" if others else last

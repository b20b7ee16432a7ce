"""How often the intervals of `pai_utils.evaluation.estimate` hold the truth, where it is known.

``python -m benchmarks.coverage`` simulates masks and writes table, figure and record to
``results/benchmarks/coverage``; about five minutes on one core.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from benchmarks.storing import ROOT, store
from pai_utils.evaluation import estimate, paired

IMAGES, NOISE, CHANCE = 150, 0.5, 0.1  # of each of three tasks; of a mask's own; per task
LOSS = 0.8  # what pruning takes from an image's margin, which is 1.5 ± 1 in the dense encoder
TRIALS = 1000
REPETITIONS = (3, 5, 10)
EFFECTS = (0.0, 0.1, 0.3, 1.0)  # by which the margin differs between repetitions


def simulate(
    random: np.random.Generator,
    seeds: int,
    sources: str = "a",
    effect: float = 0.3,
    methods: Sequence[str] = ("ours",),
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows of masks, and of the dense encoder, as :func:`~pai_utils.evaluation.estimate` takes.

    An image is right where its margin is above zero. The shift of the margin is one of a source and
    seed, that of the source twice that of the seed where there are several sources.
    """
    margins = {task: random.normal(1.5, 1, IMAGES) for task in "xyz"}
    dense = pd.DataFrame(
        {"target": task, "chance": CHANCE, "correct": margin + random.normal(0, NOISE, IMAGES) > 0}
        for task, margin in margins.items()
    ).set_index("target")
    rows = []
    several = len(sources) > 1
    by_seed = effect / 2 if several else effect
    for source in sources:
        of_source = random.normal(0, effect) if several else 0.0
        for seed, method in itertools.product(range(seeds), methods):
            shift = of_source + random.normal(0, by_seed)
            for task, margin in margins.items():
                right = margin - LOSS + shift + random.normal(0, NOISE, IMAGES) > 0
                place = {"source": source, "target": task, "seed": seed, "method": method}
                rows.append({**place, "correct": right})
    return pd.DataFrame(rows), dense


def truth(effect: float = 0.3, *, sources: bool = False) -> float:
    """The retention that infinitely many images, seeds and sources would give."""
    spread = math.hypot(effect, effect / 2) if sources else effect
    pruned = NormalDist().cdf((1.5 - LOSS) / math.hypot(1, NOISE, spread))
    return (pruned - CHANCE) / (NormalDist().cdf(1.5 / math.hypot(1, NOISE)) - CHANCE)


def measure(trials: int = TRIALS) -> pd.DataFrame:
    """One row a kind of estimate, number of repetitions and effect, with its coverage."""
    rows = []
    for kind, count, effect in itertools.product(
        ("retention, seeds", "retention, sources", "difference, seeds"), REPETITIONS, EFFECTS
    ):
        random, covered, widths = np.random.default_rng(0), 0, []
        several, two = kind.endswith("sources"), kind.startswith("difference")
        sources, seeds = ("abcdefghij"[:count], 2) if several else ("a", count)
        methods = ("ours", "theirs") if two else ("ours",)
        right = 0.0 if two else truth(effect, sources=several)
        for _ in range(trials):
            table, dense = simulate(random, seeds, sources, effect, methods)
            if two:
                table = paired(*(table[table.method == method] for method in methods))
            low, high = estimate(table, dense).interval()
            covered += low <= right <= high
            widths.append(high - low)
        place = {"estimate": kind, "repetitions": count, "effect": effect}
        rows.append({**place, "coverage": covered / trials, "width": float(np.median(widths))})
    return pd.DataFrame(rows)


def plot(table: pd.DataFrame) -> Figure:
    """Coverage against repetitions, one panel a kind, one line an effect."""
    import seaborn as sns

    grid = sns.relplot(
        table, x="repetitions", y="coverage", hue="effect", col="estimate", kind="line",
        marker="o", palette="crest", height=2.6, aspect=1,
    )  # fmt: skip
    for axes in grid.axes.flat:
        axes.axhspan(0.93, 0.97, color="0.9", zorder=0)
        axes.axhline(0.95, color="0.4", linewidth=0.8)
        axes.set(ylim=(0.88, 1), xticks=REPETITIONS)
    grid.set_titles("{col_name}")
    figure: Figure = grid.figure
    return figure


def main() -> None:
    """Simulate, and store."""
    out = ROOT / "results" / "benchmarks" / "coverage"
    table = measure()
    store(table, out, "coverage", trials=TRIALS, images=IMAGES)
    plot(table).savefig(Path(out) / "coverage.png", dpi=150, bbox_inches="tight")


if __name__ == "__main__":
    main()

"""Recompute every number that the book's claims rest on, from the stored results of single images.

    python results/recompute.py

It needs NumPy and nothing else: no code of the library is used. `summary/judged.csv` has a row for
each number. A row names a run, and the masks in its table `accuracies.csv` (or, of fine-tuning, the
start and rate in `recovery.csv`); those tables say which test images each network was right on, as
bits in hexadecimal digits. Printed is the largest difference from what the book says; it must be
below 1e-9.

A mean over pairs of source and target has two variances: by test images, each counted once for all
masks and for the dense network, and by repetition, of sources if there are three or more, else of
seeds. The interval adds the two, less half of what both contain, each with its own quantile, of the
normal distribution and of Student's t. Retention is a ratio, whose two sides vary together.
"""

import csv
import math
import sys
from collections import defaultdict
from functools import cache
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent
NODES = np.polynomial.legendre.leggauss(60)


@cache
def read(path):
    """The rows of a table, with which images each network was right on as ones and zeros."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        if "correct" in row:
            packed = np.frombuffer(bytes.fromhex(row["correct"]), np.uint8)
            row["correct"] = np.unpackbits(packed, count=int(row["count"])).astype(float)
    return rows


def tail(value, degrees):
    """Probability of Student's t above a value; of a normal variable without degrees."""
    if not degrees:
        return 0.5 * math.erfc(value / math.sqrt(2))
    # With t = sqrt(degrees) tan(a) the density is that of cos(a) ** (degrees - 1).
    nodes, weights = NODES
    end = math.atan(value / math.sqrt(degrees))
    inside = end / 2 * np.sum(weights * np.cos(end / 2 * (nodes + 1)) ** (degrees - 1))
    scale = math.gamma((degrees + 1) / 2) / math.gamma(degrees / 2) / math.sqrt(math.pi)
    return 0.5 - scale * inside


@cache
def quantile(degrees, above=0.025):
    """Where :func:`tail` is ``above``."""
    low, high = 0.0, 1000.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if tail(middle, degrees) > above else (low, middle)
    return low


def spread(parts):
    """Variance of a sum of parts that are alike."""
    count = len(parts)
    return count / (count - 1) * np.sum((parts - np.mean(parts, 0)) ** 2) if count > 1 else 0.0


def interval(rows, dense):
    """Mean and bounds of rows (source, target, seed, sign, right); `dense` is None for accuracy."""
    pairs, seeds = defaultdict(set), defaultdict(int)
    for source, target, _, sign, _ in rows:
        pairs[source].add(target)
        seeds[source, target, sign] += 1
    many = len(pairs) >= 3
    repetitions = sorted({source if many else (source, seed) for source, _, seed, _, _ in rows})
    index = {name: place for place, name in enumerate(repetitions)}
    by_target = defaultdict(list)
    for source, target, seed, sign, right in rows:
        weight = sign / (len(pairs) * len(pairs[source]) * seeds[source, target, sign])
        by_target[target].append((index[source if many else (source, seed)], weight, right))
    groups = [np.arange(len(index))]
    if not many:
        groups = [np.array([index[n] for n in index if n[0] == source]) for source in pairs]
    effects, images, both = np.zeros(len(index)), 0.0, 0.0
    for target, parts in by_target.items():
        count = len(parts[0][2])
        influence = np.zeros((len(index), count))
        for place, weight, right in parts:
            value, own = right.mean(), right - right.mean()
            if dense is not None:
                reference, chance = dense[target]
                above = reference.mean() - chance
                value = (value - chance) / above
                own = (own - value * (reference - reference.mean())) / above
            effects[place] += weight * value
            influence[place] += weight * own / count
        corrected = count / (count - 1)
        images += corrected * np.sum(influence.sum(0) ** 2)
        seen = {place for place, _, _ in parts}
        both += corrected * sum(
            spread(influence[[g for g in group if g in seen]]) for group in groups
        )
    repeats = max(0.0, sum(spread(effects[group]) for group in groups) - both / 2)
    degrees = sum(len(group) - 1 for group in groups)
    half = quantile(0) ** 2 * images + (quantile(degrees) ** 2 * repeats if degrees > 1 else 0.0)
    mean = effects.sum()
    return mean, mean - math.sqrt(half), mean + math.sqrt(half)


def of_masks(run, method, sparsity, images, tasks):
    """Which images are right, by source, target and seed; and the same of the dense network."""
    table = read(ROOT / run / "accuracies.csv")
    dense = {
        row["target"]: (row["correct"], float(row["chance"]))
        for row in table
        if row["scorer"] == "dense"
    }
    sources = {row["source"] for row in table} - {"none"}
    if images:
        sources = {name for name in sources if ("+" in name) == ("mixture" in images)}
    rows = {}
    for row in table:
        if row["scorer"] != method or float(row["sparsity"]) != sparsity:
            continue
        for source in sources if row["source"] == "none" else sources & {row["source"]}:
            # Parts of a mixture are joined by +, and may be altered or have random labels.
            seen = {
                source,
                *(
                    p.removesuffix(":altered").removesuffix(":random_labels")
                    for p in source.split("+")
                ),
            }
            own = row["target"] in seen
            if own == (tasks == "own") and tasks in ("own", "held-out", row["target"]):
                around = source.partition("+")[0]  # the task that a mixture is around
                rows[around, row["target"], int(row["seed"])] = row["correct"]
    return rows, dense


def recompute(row):
    """Mean and bounds of a row of `judged.csv`."""
    sparsity = float(row["sparsity"])
    if row["rate"]:
        rows = [
            (
                "",
                found["target"],
                int(found["seed"]),
                1 if float(found["step"]) else -1,
                found["correct"],
            )
            for found in read(ROOT / row["run"] / "recovery.csv")
            if f"{found['start']}, {found['penalty']}" == row["method"]
            and found["target"] == row["tasks"]
            and (found["head"], found["split"]) == ("frozen", "test")
            and float(found["learning_rate"]) == float(row["rate"])
            and float(found["sparsity"]) == sparsity
        ]
        return interval(rows, None)
    rows, dense = of_masks(row["run"], row["method"], sparsity, row["images"], row["tasks"])
    signed = [(*key, 1, right) for key, right in rows.items()]
    if row["against"]:
        beside = row["against_run"], row["against"], sparsity, row["against_images"], row["tasks"]
        others, _ = of_masks(*beside)
        for source, target, seed in rows:
            same = {s: right for (a, b, s), right in others.items() if (a, b) == (source, target)}
            right = same[seed] if seed in same else next(iter(same.values()))
            signed.append((source, target, seed, -1, right))
    return interval(signed, dense)


def main():
    """Compare all; 0 if every number is the same."""
    worst = 0.0
    for row in read(ROOT / "summary" / "judged.csv"):
        found = recompute(row)
        differences = [
            abs(a - float(row[b])) for a, b in zip(found, ("value", "low", "high"), strict=True)
        ]
        worst = max(worst, *differences)
        print(
            "{:.4f} ({:.4f} to {:.4f})".format(*found),
            row["encoder"],
            row["claim"],
            row["sparsity"],
            row["tasks"],
            sep="\t",
        )
    print(f"largest difference from summary/judged.csv: {worst:.1e}")
    return 0 if worst < 1e-9 else 1


if __name__ == "__main__":
    sys.exit(main())

"""Set the stored results side by side: `summarise.py` fills `results/summary/`.

Every number is read from a table of another folder of `results/`. What is not stored is left out.
"""

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import pandas as pd
import seaborn as sns
from cells import commit_of
from claims import (
    ALONE,
    DAMPED,
    ENCODERS,
    JOINT,
    MIXTURE,
    MOMENTS,
    SHUFFLED,
    SOLVED,
    Masks,
    Question,
    Results,
    claims,
    judged,
)
from matplotlib.figure import Figure

from pai_utils import plots
from pai_utils.data.mixtures import is_held_out
from pai_utils.evaluation import judged_rows, summarise_retention
from pai_utils.runs import read_record
from pai_utils.studies.landscape_analysis import PREDICTORS, transfer_correlations
from pai_utils.studies.zero_shot_retention import sparsity_kept
from pai_utils.support.stored import write_atomically

RESULTS = Path(__file__).resolve().parents[1] / "results"
BACKBONES = {name: ENCODERS[name] for name in ("efficientnet_lite0", "vit_small_saliency")}
METHODS = {
    "feature_ggn_diag": "curvature of the features",
    "ggn_diag": "curvature of the loss",
    "ggn_diag, undamped": "curvature of the loss, undamped",
    "magnitude": "magnitude over all layers",
    "magnitude@layer": "magnitude within layers",
    "lamp": "LAMP",
    "wanda": "Wanda",
    "snip": "SNIP",
    "random@ggn_diag": "shuffle of a mask in each layer",
}
"""Of masks alone, in words."""
EXPLORED = (
    "grid", "backbone", "variant", "source", "target", "task", "scorer", "repair", "sparsity",
    "retention", "low", "high", "count", "seeds", "interval",
)  # fmt: skip


def runs(results: Path) -> pd.DataFrame:
    """When, where and how long every stored run of a notebook took place."""
    rows = []
    for path in sorted(results.glob("*/*/record.json")):
        if path.parts[-3] == "benchmarks":
            continue
        record = read_record(path.parent)
        rows.append(
            {
                "run": "/".join(path.parts[-3:-1]),
                "started, UTC": f"{record.started:%Y-%m-%d %H:%M}",
                "minutes": round(record.seconds / 60, 1),
                "memory, MiB": record.peak_memory_mib,
                "device": record.device,
                "threads": record.threads,
                "commit": commit_of(record.model_dump()),
            }
        )
    return pd.DataFrame(rows)


def _pairs_of_the_atlas(table: pd.DataFrame) -> pd.DataFrame:
    """Retention of every pair of tasks, with the range over the seeds, which is all it stores."""
    dense = table[table.scorer == "dense"].groupby("target").accuracy.mean()
    pruned = table[table.scorer != "dense"]
    reference = pruned.target.map(dense)
    kept = (pruned.accuracy - pruned.chance) / (reference - pruned.chance)
    groups = pruned.assign(retention=kept).groupby(
        ["source", "target", "scorer", "sparsity"], as_index=False, sort=False
    )
    return groups.agg(
        retention=("retention", "mean"),
        low=("retention", "min"),
        high=("retention", "max"),
        count=("count", "first"),
        seeds=("seed", "nunique"),
    )


def atlas(results: Path, backbone: str) -> pd.DataFrame:
    """What every scorer of the atlas leaves: means over the sources, with their range.

    Columns ``scorer, sparsity, tasks, retention, low, high``; nothing where it is not stored.
    """
    path = results / "atlas" / f"scorer_atlas-{backbone}" / "accuracies.csv"
    if not path.is_file():
        return pd.DataFrame()
    pairs = _pairs_of_the_atlas(pd.read_csv(path))
    sources = [name for name in pairs.source.unique() if name != "none"]
    parts = []
    for tasks, own in (("source", True), ("held-out", False)):
        judged = judged_rows(pairs, sources, own=own)
        each = judged.groupby(["scorer", "sparsity", "source"], sort=False).retention.mean()
        groups = each.groupby(["scorer", "sparsity"], sort=False)
        ends = groups.agg(retention="mean", low="min", high="max")
        parts.append(ends.reset_index().assign(tasks=tasks))
    return pd.concat(parts, ignore_index=True)


def atlas_table(left: pd.DataFrame, costs: Path) -> pd.DataFrame:
    """One row a scorer, the best at the middle sparsity first, with its cost."""
    if left.empty:
        return left
    wide = left.pivot(index="scorer", columns=["tasks", "sparsity"], values="retention")
    sparsities = sorted(set(left.sparsity))
    middle = sparsities[len(sparsities) // 2]
    table = pd.DataFrame({f"at {s:.0%}": wide["held-out", s] for s in sparsities})
    table[f"its source at {middle:.0%}"] = wide["source", middle]
    table = table.map("{:z.2f}".format)
    table["cost (FB)"] = pd.read_csv(costs).set_index("scorer").fb.map("{:.2g}".format)
    order = wide["held-out", middle].sort_values(ascending=False).index
    ranked: pd.DataFrame = table.loc[order].reset_index()
    return ranked


def explorer(results: Results) -> pd.DataFrame:
    """Retention of every pair of tasks in every stored run: what the retention explorer shows.

    ``interval`` says what ``low`` and ``high`` are: a 95 % interval over test images and
    seeds, or the range over the seeds.
    """
    parts = []
    for path in sorted(results.root.glob("*/*/accuracies.csv")):
        grid, cell = path.parts[-3:-1]
        notebook, backbone, *variant = cell.split("-", 2)
        table, interval = results.table(f"{grid}/{cell}", "accuracies"), "interval"
        if notebook == "scorer_atlas":
            table, interval = _pairs_of_the_atlas(table), "range"
        elif "correct" in table:
            table = summarise_retention(table)
        else:  # older runs kept no results of single images
            table = results.table(f"{grid}/{cell}", "retention")
        place = {"grid": grid, "backbone": backbone, "variant": "".join(variant)}
        parts.append(table[table.scorer != "dense"].assign(**place, interval=interval))
    if not parts:
        return pd.DataFrame()
    table = pd.concat(parts, ignore_index=True)
    method = table.scorer.str.partition(" + ")
    held_out = [
        is_held_out(target, source)
        for source, target in zip(table.source, table.target, strict=True)
    ]
    table = table.assign(
        scorer=method[0],
        repair=method[2].replace("", "none"),
        task=pd.Series(held_out).map({True: "held-out", False: "own"}),
    )
    return table[list(EXPLORED)]


def _landscape(results: Path, name: str) -> pd.DataFrame:
    """One table of the landscape analysis, of all encoders."""
    parts = []
    for backbone, label in BACKBONES.items():
        path = results / "landscape" / f"landscape_analysis-{backbone}" / f"{name}.csv"
        if path.is_file():
            table = pd.read_csv(path)
            table.insert(0, "encoder", label)
            parts.append(table)
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def reach(results: Path) -> pd.DataFrame:
    """Median predicted increase of each quadratic model, and in how many cells it is right.

    A prediction is right here if it is within half of what was measured. All shares of the step at
    the largest sparsity, all of it at the others; a mask's own task and others apart.
    """
    losses = _landscape(results, "losses")
    if losses.empty:
        return losses
    tasks = losses.source.eq(losses.target).map({True: "own", False: "held-out"})
    rows = []
    for (encoder, kind, step, sparsity), cells in losses.groupby(
        ["encoder", tasks, "fraction", "sparsity"]
    ):
        if step != 1 and sparsity != losses[losses.encoder == encoder].sparsity.max():
            continue
        row: dict[str, object] = {
            "encoder": encoder,
            "task": kind,
            "step": step,
            "sparsity": sparsity,
            "measured": f"{cells.measured.median():.3g}",
        }
        for column in ("taylor", "ggn", "tensors", "blocks", "diagonal"):
            right = (cells[column] - cells.measured).abs() <= 0.5 * cells.measured.abs()
            row[PREDICTORS[column]] = f"{cells[column].median():.2g} ({right.mean():.0%})"
        rows.append(row | {"cells": len(cells)})
    return pd.DataFrame(rows)


def transfer(results: Path) -> pd.DataFrame:
    """What correlates with retention on held-out tasks."""
    cells = _landscape(results, "cells")
    if cells.empty:
        return cells
    table = pd.concat(
        transfer_correlations(own).assign(encoder=encoder)
        for encoder, own in cells.groupby("encoder", sort=False)
    )
    shown = {"encoder": table.encoder, "predictor": table.predictor.map(PREDICTORS)}
    for kind, label in {"pooled": "all cells", "within": "one scorer and sparsity"}.items():
        shown[label] = _with_interval(table[kind], table[f"{kind}_low"], table[f"{kind}_high"])
    return pd.DataFrame(shown | {"cells": table.cells, "pairs": table.pairs})


def weights(results: Path) -> pd.DataFrame:
    """Medians over pairs of tasks for the encoder's weights and others of the architecture."""
    table = _landscape(results, "compared")
    if table.empty:
        return table
    medians = table.pivot_table(
        index=["encoder", "quantity"],
        columns="weights",
        values="value",
        sort=False,
        aggfunc="median",
    )
    return _significant(medians.reset_index())


def _significant(table: pd.DataFrame) -> pd.DataFrame:
    """Numbers of any size with three digits, as text."""
    table = table.copy()
    for name in table.select_dtypes("float"):
        table[name] = table[name].map("{:.3g}".format)
    return table


def _with_interval(
    value: "pd.Series[float]",
    low: "pd.Series[float]",
    high: "pd.Series[float]",
    form: str = "z.2f",  # z: no "-0.00"
) -> "pd.Series[str]":
    """Each value with its interval in brackets, where there is one."""
    texts = [
        f"{v:{form}}" if pd.isna(a) else f"{v:{form}} ({a:{form}} to {b:{form}})"
        for v, a, b in zip(value, low, high, strict=True)
    ]
    return pd.Series(texts, index=value.index)


def masks_alone(results: Results) -> pd.DataFrame:
    """What masks alone keep of unseen tasks: the mean over sources, with its interval.

    Columns ``encoder, method, sparsity, retention, low, high``.
    """
    rows = []
    for backbone, label in ENCODERS.items():
        for suffix in ("", "-undamped"):
            run = f"transfer/zero_shot_retention-{backbone}{suffix}"
            if not (results.root / run).is_dir():
                continue
            for method in results.table(run, "accuracies").scorer.unique():
                name = method + suffix.replace("-", ", ")
                if name in METHODS:
                    answers = results.answer(Question("", Masks(run, method)))
                    rows += [
                        [label, name, sparsity, found.value, *found.interval()]
                        for sparsity, found in answers.items()
                    ]
    columns = ["encoder", "method", "sparsity", "retention", "low", "high"]
    table = pd.DataFrame(rows, columns=columns)
    order = table.method.map(list(METHODS).index)
    return table.assign(order=order).sort_values("order", kind="stable").drop(columns="order")


def kept_up_to(alone: pd.DataFrame) -> pd.DataFrame:
    """The sparsity up to which nine tenths are kept, of each method and encoder."""
    named = alone.rename(columns={"encoder": "target", "method": "scorer"}).assign(source="")
    found = sparsity_kept(named, threshold=0.9)
    found["scorer"] = found.scorer.map(METHODS)
    return found.rename(columns={"target": "encoder", "scorer": "method"}).drop(columns="source")


def steps(results: Results) -> pd.DataFrame:
    """From the paper's mask to the best without training, at 70 %: one step more a row.

    Columns ``step, encoder, retention, low, high``.
    """
    rows = []
    for backbone, label in BACKBONES.items():
        run = f"factorial/zero_shot_retention-{backbone}"
        if not (results.root / run).is_dir():
            continue
        for step, masks in {
            "curvature, undamped": Masks(f"{run}-undamped", DAMPED, ALONE),
            "+ damping": Masks(run, DAMPED, ALONE),
            "+ a mixture of images": Masks(run, DAMPED, MIXTURE),
            "+ moments": Masks(run, DAMPED + MOMENTS, MIXTURE),
            "+ layers solved anew": Masks(run, DAMPED + SOLVED, MIXTURE),
            "+ joint score": Masks(run, JOINT + SOLVED, MIXTURE),
        }.items():
            (found,) = results.answer(Question("", masks)).values()
            rows.append([step, label, found.value, *found.interval()])
    return pd.DataFrame(rows, columns=["step", "encoder", "retention", "low", "high"])


def factorial(results: Results, backbone: str) -> pd.DataFrame:
    """Every score by both kinds of images at 70 %, with intervals: one column a repair."""
    run = f"factorial/zero_shot_retention-{backbone}"
    if not (results.root / run).is_dir():
        return pd.DataFrame()
    rows = []
    for score, masks in {
        "undamped": Masks(f"{run}-undamped", DAMPED),
        "damped": Masks(run, DAMPED),
        "joint": Masks(run, JOINT),
        "damped, shuffled in each layer": Masks(run, SHUFFLED),
        "magnitude over all layers": Masks(run, "magnitude"),
        "magnitude within layers": Masks(run, "magnitude@layer"),
    }.items():
        for images in (ALONE, MIXTURE):
            row = {"score": score, "images": images}
            repairs = {"layers solved anew": SOLVED, "moments": MOMENTS, "no repair": ""}
            for label, repair in repairs.items():  # the one that decides first, for narrow pages
                same = masks._replace(method=masks.method + repair, images=images)
                row[label] = _mean(results, same)
            rows.append(row)
    return pd.DataFrame(rows)


def _mean(results: Results, masks: Masks, sparsity: float = 0.7) -> str:
    """What masks keep, with its interval, as text."""
    found = results.answer(Question("", masks)).get(sparsity)
    if found is None:
        return ""
    low, high = found.interval()
    return f"{found.value:z.2f} ({low:z.2f}–{high:z.2f})"


SEEN_BY = {
    "MNIST": "MNIST",
    "FashionMNIST": "Fashion-MNIST",
    "folder:cifar10-jpeg": "cifar10-jpeg",
    "photos": "photos",
    "folder:tiny-imagenet-b": "Tiny-ImageNet, locked half",
}
"""Tasks that masks are measured on by the images that made them, in words."""


def by_images(results: Results) -> pd.DataFrame:
    """What repaired masks keep at 70 %, by the images that made them; their own task in brackets.

    One row a source, one column a task, means over the seeds.
    """
    run = "sources/zero_shot_retention-efficientnet_lite0"
    if not (results.root / run).is_dir():
        return pd.DataFrame()
    table = summarise_retention(results.table(run, "accuracies"))
    table = table[(table.scorer == DAMPED + SOLVED) & (table.sparsity == 0.7)]
    table = table[table.target.isin(SEEN_BY)]
    own = [not is_held_out(*pair) for pair in zip(table.target, table.source, strict=True)]
    texts = table.retention.map("{:z.2f}".format)
    table["text"] = texts.where(~pd.Series(own, table.index), "(" + texts + ")")
    table["images"] = table.source.map(_in_words)
    wide = table.pivot(index="images", columns="target", values="text")[list(SEEN_BY)]
    return wide.rename(columns=SEEN_BY).loc[table.images.unique()].reset_index()


def by_images_and_score(results: Results) -> pd.DataFrame:
    """What masks and their controls keep of unseen tasks at 70 %, repaired by the same images."""
    run = "sources/zero_shot_retention-efficientnet_lite0"
    if not (results.root / run).is_dir():
        return pd.DataFrame()
    table = results.table(run, "accuracies")
    methods = {
        "by curvature": DAMPED,
        "shuffled": SHUFFLED,
        "magnitude": "magnitude",
        "magnitude within layers": "magnitude@layer",
    }
    rows = []
    for source in table.source[table.source != "none"].unique():
        row = {"images": _in_words(source)}
        for column, method in methods.items():
            row[column] = _mean(results, Masks(run, method + SOLVED, source))
        rows.append(row)
    return pd.DataFrame(rows)


def _in_words(source: str) -> str:
    return source.replace("folder:", "").replace("+", " and ").replace("_", " ")


def spans(results: Results) -> pd.DataFrame:
    """What every mask of the features' curvature keeps, beside how far its images span the task."""
    path, parts = results.root / "benchmarks/span/span.csv", []
    if not path.is_file():
        return pd.DataFrame()
    for run, own in pd.read_csv(path).groupby("run", sort=False):
        kept = summarise_retention(results.table(str(run), "accuracies"))
        kept = kept[kept.scorer.isin([DAMPED, DAMPED + SOLVED])]
        encoder = ENCODERS[str(run).partition("retention-")[2]]
        parts.append(kept.merge(own, on=["source", "target"]).assign(encoder=encoder))
    return pd.concat(parts, ignore_index=True).assign(held_out=True)


def spanned(cells: pd.DataFrame) -> pd.DataFrame:
    """Rank correlations of retention with what the images span, at each sparsity."""
    rows = []
    keys = ["run", "encoder", "scorer", "sparsity"]
    for (run, encoder, scorer, sparsity), own in cells.groupby(keys, sort=False):
        found = transfer_correlations(own, ["outside", "alike"])
        texts = _with_interval(found.pooled, found.pooled_low, found.pooled_high)
        masks = "repaired" if scorer == DAMPED + SOLVED else "alone"
        run = f"{run}".partition("/")[0]
        rows.append([f"{encoder}, {run}", masks, f"{sparsity:.0%}", *texts, found.pairs[0]])
    columns = ["run", "masks", "sparsity", "outside", "alike", "pairs"]
    return pd.DataFrame(rows, columns=columns)


def tuning(table: pd.DataFrame, encoder: str) -> pd.DataFrame:
    """Gains in accuracy by fine-tuning, in points, with intervals: one column a task."""
    rows = table[table.claim.str.startswith("P2") & (table.encoder == encoder)]
    if rows.empty:
        return rows
    points = 100 * rows[["value", "low", "high"]]
    named = rows.assign(
        text=_with_interval(points.value, points.low, points.high, "+z.1f"),
        task=rows.tasks.str.replace("folder:", ""),
        start=rows.method.str.removesuffix(", none"),
        rate=rows.rate.map("{:g}".format),
    )
    wide = named.pivot(index=["start", "rate"], columns="task", values="text")
    return wide[named.task.unique()].reset_index()


def refitted(results: Results, backbone: str) -> pd.DataFrame:
    """Accuracy of every task before and after fine-tuning, with its old head and a new one.

    At the rate that the source's validation part chooses, from the first start of the run.
    """
    run = f"adaptation/finetune_recovery-{backbone}"
    if not (results.root / run).is_dir():
        return pd.DataFrame()
    chosen, table = results.table(run, "chosen"), results.table(run, "refitted")
    table = table[table.learning_rate == chosen.learning_rate.iloc[0]]
    columns = {
        "target": "task", "dense": "dense", "pruned": "pruned",
        "frozen": "fine-tuned", "refitted": "fine-tuned, new head",
    }  # fmt: skip
    shown = {name: table[column] for column, name in columns.items()}
    tasks = shown.pop("task").str.replace("folder:", "")
    texts = {name: values.map("{:.2f}".format) for name, values in shown.items()}
    return pd.DataFrame({"task": tasks, **texts})


def summarise(folder: Path) -> list[Path]:
    """Write all tables and figures; return their paths."""
    results, written = Results(folder), []

    def write(name: str, content: str | bytes) -> None:
        path = folder / "summary" / name
        write_atomically(path, content.encode() if isinstance(content, str) else content)
        written.append(path)

    found, alone, cells = judged(results), masks_alone(results), spans(results)
    if len(found):
        write("judged.csv", found.to_csv(index=False))  # with all digits, to be recomputed
    limits = kept_up_to(alone)
    for name, table in {
        "runs": runs(folder),
        **{f"claims-{name}": claims(found, label) for name, label in BACKBONES.items()},
        "masks_alone": alone,
        "kept_up_to": _wide(_in_percent(limits), "sparsity", ["method"], ".0f"),
        **{f"factorial-{name}": factorial(results, name) for name in BACKBONES},
        "by_images": by_images(results),
        "by_images_and_score": by_images_and_score(results),
        "spans": spanned(cells) if len(cells) else cells,
        **{
            f"atlas-{name}": atlas_table(
                atlas(folder, name), folder / "atlas" / f"scorer_atlas-{name}" / "costs.csv"
            )
            for name in BACKBONES
        },
        **{f"tuning-{name}": tuning(found, label) for name, label in BACKBONES.items()},
        "refitted": refitted(results, "efficientnet_lite0"),
        "reach": reach(folder),
        "transfer": transfer(folder),
        "weights": weights(folder),
        "barriers": _significant(_landscape(folder, "barriers")),
        "spectra": _significant(_landscape(folder, "spectra")),
    }.items():
        if not table.empty:
            write(f"{name}.csv", table.to_csv(index=False, float_format="%.3f"))
    pairs = explorer(results)
    if not pairs.empty:
        # As an inert script, since a page opened from disk may not fetch a file.
        text = pairs.to_csv(index=False, float_format="%.3g")
        script = f'<script type="text/csv" id="explorer-data">\n{text}</script>\n'
        write("explorer.html", script)
    for name, figure in _figures(results, alone, limits, cells):
        image = BytesIO()
        figure.savefig(image, format="png", dpi=150, bbox_inches="tight")
        write(f"{name}.png", image.getvalue())
    return written


def _wide(table: pd.DataFrame, value: str, index: list[str], form: str = "z.2f") -> pd.DataFrame:
    """Values with their intervals as text, one column an encoder."""
    if table.empty:
        return table
    text = _with_interval(table[value], table.low, table.high, form)
    text = text.str.replace(" to ", "–")
    wide = table.assign(text=text).pivot(index=index, columns="encoder", values="text")
    rows = table[index].drop_duplicates()
    return rows.merge(wide[table.encoder.unique()].reset_index(), on=index).fillna("")


def _in_percent(limits: pd.DataFrame) -> pd.DataFrame:
    numbers = limits.select_dtypes("float")
    return limits.assign(**100 * numbers)


def _figures(
    results: Results, alone: pd.DataFrame, limits: pd.DataFrame, cells: pd.DataFrame
) -> Iterator[tuple[str, Figure]]:
    """The figures of what is stored, with their names."""
    if len(alone):
        panels = alone.rename(columns={"encoder": "source", "method": "scorer"})
        yield "masks_alone", plots.retention_curves(panels, title="{}", words=METHODS)
        named = limits.rename(columns={"method": "row", "sparsity": "value"})
        words = "sparsity up to which nine tenths are kept"
        yield "kept_up_to", plots.estimates(named, "encoder", words, lines={0: ":"})
    climb = steps(results)
    if len(climb):
        named = climb.rename(columns={"step": "row", "retention": "value"})
        yield "overview", plots.estimates(named, "encoder", "kept of unseen tasks at 70 % sparsity")
    if len(cells):
        repaired = cells[cells.scorer.eq(DAMPED + SOLVED) & cells.sparsity.eq(0.7)]
        repaired = repaired.assign(task=repaired.target.map(SEEN_BY))
        grid = sns.relplot(
            repaired, x="outside", y="retention", hue="task", style="task", s=60, height=3.6,
            aspect=1.2, palette="colorblind",
        )  # fmt: skip
        grid.set_axis_labels("share of the task that the images do not span", "retention")
        yield "spans", grid.figure
    for backbone in BACKBONES:
        left = atlas(results.root, backbone)
        if len(left):
            yield f"atlas-{backbone}", plots.accuracy_left(left)
        path = results.root / "landscape" / f"landscape_analysis-{backbone}" / "cells.csv"
        if path.is_file():
            correlations = transfer_correlations(pd.read_csv(path))
            yield f"transfer-{backbone}", plots.transfer_correlations(correlations)


if __name__ == "__main__":
    for path in summarise(RESULTS):
        print(path.relative_to(RESULTS.parent))

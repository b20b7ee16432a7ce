"""Set the stored results side by side: `summarise.py` fills `results/summary/`.

Every number is read from a table of another folder of `results/`. What is not stored is left out.
"""

import itertools
from collections.abc import Iterator
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import pandas as pd
from cells import commit_of
from claims import RECOVERIES, claims, in_words, rounds_of
from matplotlib.figure import Figure

from pai_utils import plots
from pai_utils.data.mixtures import is_held_out
from pai_utils.runs import read_record
from pai_utils.studies.finetune_recovery import chosen_on_validation
from pai_utils.studies.landscape_analysis import PREDICTORS, transfer_correlations
from pai_utils.support.stored import write_atomically

RESULTS = Path(__file__).resolve().parents[1] / "results"
ENCODERS = {
    "efficientnet_lite0": "EfficientNet-Lite0",
    "efficientnet_lite1": "EfficientNet-Lite1",
    "efficientnet_lite2": "EfficientNet-Lite2",
    "mobilenetv2": "MobileNetV2",
    "vit_small_saliency": "ViT-S/14",
}
BACKBONES = {name: ENCODERS[name] for name in ("efficientnet_lite0", "vit_small_saliency")}
SAID = {
    "magnitude@layer": "magnitude, by layer",
    "random@ggn_diag": "ggn_diag, shuffled in each layer",
    "feature_ggn_diag+obs_inputs@feature_ggn_diag": "feature_ggn_diag, joint with obs_inputs",
}
TASKS = {"retention": "embedded", "retention_real": "larger"}
EXPLORED = (
    "grid", "backbone", "variant", "source", "target", "task", "scorer", "repair", "sparsity",
    "retention", "low", "high", "count", "seeds", "interval",
)  # fmt: skip
REPAIRED = " + "  # between a score and its repair
SIX = ("magnitude", "snip", "grasp", "synflow", "px", "ntk_sap")


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


def _held_out(results: Path, grid: str, backbone: str) -> pd.DataFrame:
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


def over_sources(held_out: pd.DataFrame) -> pd.DataFrame:
    """Retention at each sparsity, of one method: the mean over its sources and their range.

    For runs without results of single images. Of a single source, the interval of its run.
    """
    ends = {"low": ("retention", "min"), "high": ("retention", "max")}
    if held_out.source.nunique() == 1:
        ends = {"low": ("low", "min"), "high": ("high", "max")}
    return held_out.groupby("sparsity", as_index=False).agg(retention=("retention", "mean"), **ends)


def repaired(results: Path) -> pd.DataFrame:
    """Retention on held-out tasks of every mask and repair, means over the sources."""
    parts = []
    for (grid, tasks), (backbone, label) in itertools.product(TASKS.items(), BACKBONES.items()):
        with suppress(FileNotFoundError):
            table = _held_out(results, grid, backbone)
            for method, own in table.groupby("scorer", sort=False):
                shared: dict[str, Any] = {"encoder": label, "tasks": tasks, "method": method}
                parts.append(over_sources(own).assign(**shared, seeds=own.seeds.max()))
    columns = ["encoder", "tasks", "method", "sparsity", "retention", "low", "high", "seeds"]
    return pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame()


def kept(results: Path, grid: str) -> pd.DataFrame:
    """What damped masks and their controls keep in a grid of retention, means over the sources.

    Columns ``encoder, masks by``, and for each sparsity the retention of held-out tasks; that of a
    mask's own source stands in brackets, where it has one.
    """
    rows = []
    for path in sorted((results / grid).glob("zero_shot_retention-*")):
        made = read_record(path).parameters
        table = pd.read_csv(path / "retention.csv")
        table = table[~table.scorer.str.contains("dense|no pre-training")]
        for method, group in table.groupby("scorer", sort=False):
            held_out = [is_held_out(*pair) for pair in zip(group.target, group.source, strict=True)]
            sides = group.assign(side=held_out).groupby(["sparsity", "side"]).retention.mean()
            row = {"encoder": ENCODERS[made["backbone"]], "masks by": in_full(str(method))}
            if rounds_of(made) > 1:
                row["masks by"] += f", {in_words(rounds_of(made))}"
            for sparsity in group.sparsity.unique():
                own = f" ({sides[sparsity, False]:z.2f})" if (sparsity, False) in sides else ""
                row[f"at {sparsity:.0%}"] = f"{sides[sparsity, True]:z.2f}{own}"
            rows.append(row)
    return pd.DataFrame(rows)


def in_full(method: str) -> str:
    """A method with what its score stands for, where that is joint, and its repair in short."""
    scorer, plus, _ = method.partition(REPAIRED)
    return SAID.get(scorer, scorer) + (", repaired" if plus else "")


def _methods(table: pd.DataFrame) -> pd.DataFrame:
    """Without the control: an encoder that was not pre-trained."""
    return table[~table.method.str.contains("no pre-training")]


def _atlas(results: Path) -> pd.DataFrame:
    """What every score of the scorer atlas keeps on held-out tasks."""
    parts = []
    for backbone, label in BACKBONES.items():
        table = pd.read_csv(results / "atlas" / f"scorer_atlas-{backbone}" / "left.csv")
        parts.append(table[table.tasks == "held-out"].assign(encoder=label))
    return pd.concat(parts, ignore_index=True).rename(columns={"scorer": "method"})


def gains(left: pd.DataFrame, results: Path) -> pd.DataFrame:
    """The best repaired mask beside the best of six scores, and of all scores of the atlas."""
    rows = []
    atlas = _atlas(results)
    for label in BACKBONES.values():
        ours = _methods(left)
        ours = ours[(ours.encoder == label) & (ours.tasks == "embedded")]
        for sparsity, group in ours.groupby("sparsity"):
            every = atlas[(atlas.encoder == label) & (atlas.sparsity == sparsity)]
            six = every[every.method.isin(SIX)]
            if six.empty:
                continue
            best, peer, any_peer = (
                table.sort_values("retention").iloc[-1] for table in (group, six, every)
            )
            rows.append(
                {
                    "encoder": label,
                    "sparsity": sparsity,
                    "retention": best.retention,
                    "of six": peer.retention,
                    "gain": 100 * (best.retention - peer.retention),
                    "of all": any_peer.retention,
                    "gain over all": 100 * (best.retention - any_peer.retention),
                    "best of six": peer.method,
                    "best of all": any_peer.method,
                    "best here": best.method,
                }
            )
    return pd.DataFrame(rows)


def what_to_use(left: pd.DataFrame, results: Path) -> pd.DataFrame:
    """The score and repair that kept most at each sparsity, of all that were measured."""
    ours = left[left.tasks == "embedded"].drop(columns=["tasks", "seeds"])
    table = _methods(pd.concat([ours, _atlas(results)[ours.columns]], ignore_index=True))
    best = table.loc[table.groupby(["encoder", "sparsity"]).retention.idxmax()]
    return best.sort_values(["encoder", "sparsity"])[
        ["encoder", "sparsity", "method", "retention", "low", "high"]
    ]


def levers(results: Path) -> pd.DataFrame:
    """What one change each gave, beside the main runs, source by source."""
    rows = []
    for grid, tasks in TASKS.items():
        for folder in sorted((results / grid).glob("zero_shot_retention-*")):
            table = pd.read_csv(folder / "held_out.csv").rename(columns={"scorer": "method"})
            run = folder.name.removeprefix("zero_shot_retention-")
            rows.append(_methods(table).assign(run=run, tasks=tasks))
    if not rows:
        return pd.DataFrame()
    shown = ["source", "method", "sparsity", "retention", "low", "high", "count", "seeds"]
    return pd.concat(rows)[["run", "tasks", *shown]]


def _recoveries(results: Path, file: str) -> Iterator[tuple[pd.DataFrame, dict[str, Any]]]:
    """One table of every stored run of fine-tuning, and the run's parameters."""
    for (grid, tasks), (backbone, label) in itertools.product(
        RECOVERIES.items(), BACKBONES.items()
    ):
        for path in sorted((results / grid).glob(f"finetune_recovery-{backbone}*/{file}.csv")):
            used = read_record(path.parent).parameters
            shared: dict[str, Any] = {"encoder": label, "tasks": tasks, "rounds": rounds_of(used)}
            yield pd.read_csv(path).assign(**shared), used


def _named(parts: list[pd.DataFrame], columns: dict[str, str]) -> pd.DataFrame:
    """Some columns of tables under each other, by other names."""
    if not parts:
        return pd.DataFrame()
    table = pd.concat(parts)[list(columns)].rename(columns=columns)
    return table.assign(rate=[f"{rate:.0e}" for rate in table.rate])


def recovery(results: Path) -> pd.DataFrame:
    """Fine-tuning at every rate, and which one the source's validation part chose."""
    keys = ["start", "sparsity", "penalty", "learning_rate"]
    parts = []
    for table, used in _recoveries(results, "gains"):
        table = table.assign(optimiser=used["optimiser"])
        best = chosen_on_validation(table)[keys].assign(chosen="yes")
        marked = table.merge(best, on=keys, how="left").fillna({"chosen": ""})
        strengths = {name: f" {value:g}" for name, value in used["penalties"].items() if value}
        marked["penalty"] = [name + strengths.get(name, "") for name in marked.penalty]
        parts.append(marked)
    same = ("encoder", "tasks", "start", "rounds", "optimiser", "penalty", "sparsity")
    return _named(
        parts,
        {
            **dict(zip(same, same, strict=True)),
            "learning_rate": "rate",
            "chosen": "chosen",
            "source_retention_before": "source before",
            "source_retention": "source after",
            "held_out_retention_before": "held-out before",
            "held_out_retention": "held-out after",
            "held_out_gain": "gain",
            "held_out_low": "low",
            "held_out_high": "high",
        },
    )


def refitted(results: Path) -> pd.DataFrame:
    """Accuracy on every task before and after plain fine-tuning, with both kinds of head.

    Of runs from repaired masks, at the first sparsity, which is the one that the notebook re-fits
    heads for, and the largest rate.
    """
    parts = [
        table[table.learning_rate == table.learning_rate.max()]
        for table, used in _recoveries(results, "refitted")
        if used["starts"][0] == "repaired"
    ]
    return _named(
        parts,
        {
            "encoder": "encoder",
            "rounds": "rounds",
            "target": "task",
            "dense": "dense",
            "pruned": "before",
            "frozen": "after",
            "refitted": "re-fitted",
            "learning_rate": "rate",
        },
    )


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


def explorer(results: Path) -> pd.DataFrame:
    """Retention of every pair of tasks in every stored run: what the retention explorer shows.

    ``interval`` says what ``low`` and ``high`` are: a 95 % bootstrap interval over test images and
    seeds, or the range over the seeds.
    """
    parts = []
    for path in sorted(results.glob("*/*/*.csv")):
        grid, (notebook, _, run) = path.parts[-3], path.parent.name.partition("-")
        if (notebook, path.name) == ("zero_shot_retention", "retention.csv"):
            table, interval = pd.read_csv(path), "bootstrap"
        elif (notebook, path.name) == ("scorer_atlas", "accuracies.csv"):
            table, interval = _pairs_of_the_atlas(pd.read_csv(path)), "range"
        else:
            continue
        backbone, _, variant = run.partition("-")
        parts.append(
            table[table.scorer != "dense"].assign(
                grid=grid, backbone=backbone, variant=variant, interval=interval
            )
        )
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


def _shown(table: pd.DataFrame) -> pd.DataFrame:
    """Rounded, with the interval beside its value and long names last, for narrow pages."""
    numbers = table.select_dtypes("float").round(2) + 0.0  # no "-0.00"
    table = table.assign(**numbers)
    if {"retention", "low", "high"} <= set(table):
        table["retention"] = _with_interval(table.retention, table.low, table.high)
        table = table.drop(columns=["low", "high"])
    long = [name for name in ("method", "source") if name in table]
    return table[[*(name for name in table if name not in long), *long]]


def _recovery_shown(table: pd.DataFrame, label: str) -> pd.DataFrame:
    """The rows of one encoder, what matters first, for narrow pages."""
    if table.empty:
        return table
    rows = table[table.encoder == label]

    def change(name: str) -> list[str]:
        pairs = zip(rows[f"{name} before"], rows[f"{name} after"], strict=True)
        return [f"{before:z.2f} → {after:z.2f}" for before, after in pairs]

    masks = [
        f"{sparsity:.0%}, {in_words(rounds) if start == 'repaired' else start}"
        for sparsity, rounds, start in zip(rows.sparsity, rows["rounds"], rows.start, strict=True)
    ]
    return pd.DataFrame(
        {
            "tasks": rows.tasks,
            "penalty": rows.penalty,
            "rate": rows.rate,
            "held-out": change("held-out"),
            "gain": _with_interval(rows.gain, rows.low, rows.high, "+z.3f"),
            "masks": masks,
            "chosen": rows.chosen,
            "optimiser": rows.optimiser,
            "source": change("source"),
        }
    )


def summarise(results: Path) -> list[Path]:
    """Write all tables and figures; return their paths."""
    left, recovered = repaired(results), recovery(results)
    written = []

    def write(name: str, content: str | bytes) -> None:
        path = results / "summary" / name
        write_atomically(path, content.encode() if isinstance(content, str) else content)
        written.append(path)

    for name, table in {
        "runs": runs(results),
        "masks_alone": kept(results, "damping"),
        "joint": kept(results, "joint"),
        "larger": kept(results, "real"),
        "repaired": left,
        "gains": gains(left, results),
        "what_to_use": what_to_use(left, results),
        "levers": levers(results),
        **{
            f"recovery-{backbone}": _recovery_shown(recovered, label)
            for backbone, label in BACKBONES.items()
        },
        "refitted": refitted(results),
        "reach": reach(results),
        "transfer": transfer(results),
        "weights": weights(results),
        "barriers": _significant(_landscape(results, "barriers")),
        "spectra": _significant(_landscape(results, "spectra")),
        "claims": claims(results, BACKBONES),
    }.items():
        if not table.empty:
            write(f"{name}.csv", _shown(table).to_csv(index=False, float_format="%.2f"))
    pairs = explorer(results)
    if not pairs.empty:
        # As an inert script, since a page opened from disk may not fetch a file.
        text = pairs.to_csv(index=False, float_format="%.3g")
        script = f'<script type="text/csv" id="explorer-data">\n{text}</script>\n'
        write("explorer.html", script)
    for name, figure in _figures(results, left):
        image = BytesIO()
        figure.savefig(image, format="png", dpi=150, bbox_inches="tight")
        write(f"{name}.png", image.getvalue())
    return written


def _larger(results: Path) -> pd.DataFrame:
    """Retention on larger data sets by masks alone and their controls, means over the sources."""
    parts = []
    for path in sorted((results / "real").glob("zero_shot_retention-*")):
        table = pd.read_csv(path / "held_out.csv")
        label = ENCODERS[path.name.partition("-")[2]]
        parts += [
            over_sources(table[table.scorer == name]).assign(method=in_full(name), encoder=label)
            for name in ("ggn_diag", "magnitude", "magnitude@layer", "random@ggn_diag")
        ]
    return pd.concat(parts, ignore_index=True)


def _overview(alone: pd.DataFrame, left: pd.DataFrame) -> pd.DataFrame:
    """The same for the two encoders of this book, with a repair too."""
    ours = left[(left.tasks == "larger") & left.method.str.contains(REPAIRED, regex=False)]
    # In short, so that the legend is low; which repair it is stands in the table of them.
    method = ours.method.str.replace(r" \+ [^,]*", ", repaired", regex=True)
    return pd.concat([alone[alone.encoder.isin(BACKBONES.values())], ours.assign(method=method)])


def _figures(results: Path, left: pd.DataFrame) -> Iterator[tuple[str, Figure]]:
    """The figures of what is stored, with their names."""
    if all((results / grid).is_dir() for grid in ("real", "retention_real")):
        alone = _larger(results)
        for name, table in {"larger": alone, "overview": _overview(alone, left)}.items():
            panels = table.rename(columns={"encoder": "source", "method": "scorer"})
            yield name, plots.retention_curves(panels, title="{}")
    for backbone in BACKBONES:
        for grid in TASKS:
            with suppress(FileNotFoundError):
                yield (
                    f"{grid}-{backbone}",
                    plots.retention_curves(_held_out(results, grid, backbone)),
                )
        path = results / "landscape" / f"landscape_analysis-{backbone}" / "cells.csv"
        if path.is_file():
            correlations = transfer_correlations(pd.read_csv(path))
            yield f"transfer-{backbone}", plots.transfer_correlations(correlations)


if __name__ == "__main__":
    for path in summarise(RESULTS):
        print(path.relative_to(RESULTS.parent))

"""Every figure of the book. Each function takes a tidy table and returns a matplotlib figure.

Series differ by marker and line style as well as by colour, so that every figure reads without
colour. A scorer looks the same in all figures.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from pai_utils.scorers import SCORERS
from pai_utils.studies.landscape_analysis import PREDICTORS

if TYPE_CHECKING:
    from torch import Tensor

    from pai_utils.data.tasks import Task

Data = TypeVar("Data")
Looks = dict[str, dict[str, Any]]  # properties of a line with markers, by the name of the series

_MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")
_DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (6, 2, 1, 2)))
# The scorers met most often take the colours that differ most.
_SCORERS = [*dict.fromkeys(("feature_ggn_diag", "magnitude", "ggn_diag", "random", *SCORERS))]
_PREDICTIONS = {name: PREDICTORS[name] for name in ("taylor", "ggn", "blocks", "diagonal")}
_DENSE_AND_CHANCE = {1.0: "-", 0.0: ":"}  # their retention, and how its line is drawn


def retention_curves(
    held_out: pd.DataFrame, *, title: str = "mask from {}", words: Mapping[str, str] | None = None
) -> Figure:
    """Retention on held-out tasks against sparsity, one panel a source, with intervals.

    The table is as from :func:`~pai_utils.evaluation.held_out_retention`. The source takes the
    place of the braces in ``title``; scorers are called by their names, or by ``words``.
    """
    looks = _looks(held_out.scorer)

    def draw(axes: Axes, rows: pd.DataFrame) -> None:
        _lines(axes, rows, "sparsity", "retention", "scorer", looks)
        for scorer, line in _groups(rows.sort_values("sparsity"), "scorer").items():
            ends, color = (line.sparsity, line.low, line.high), looks[scorer]["color"]
            axes.fill_between(*ends, color=color, alpha=0.15, linewidth=0)
            if len(line) == 1:  # a band of no width is not seen
                axes.vlines(*ends, color=color, alpha=0.4, linewidth=2)
        for value, style in _DENSE_AND_CHANCE.items():
            axes.axhline(value, color="0.2", linewidth=0.8, linestyle=style)

    panels = {title.format(source): rows for source, rows in _groups(held_out, "source").items()}
    legend = {(words or {}).get(name, name): look for name, look in looks.items()}
    labels = ("sparsity", "retention on held-out tasks")
    return _panels(panels, draw, legend, labels, share=True)


def validation_choice(candidates: pd.DataFrame, choice: pd.Series, tolerance: float) -> Figure:
    """Retention on the validation part against sparsity; what was chosen is in a square.

    Candidates and choice are as from :mod:`pai_utils.studies.prune_your_own`; a dashed line is at
    what must be kept by the ``tolerance``.
    """
    figure = retention_curves(candidates.assign(source="validation part"), title="{}")
    (axes,) = figure.axes
    least = 1 - tolerance
    axes.set_ylabel("retention")
    axes.axhline(least, color="0.2", linewidth=1.2, linestyle="--")
    axes.text(axes.get_xlim()[0], least, f" kept at least: {least:g}", va="top", fontsize="small")
    axes.plot(choice.sparsity, choice.retention, "s", markersize=14, color="0.1", fillstyle="none")
    return figure


def stages_compared(table: pd.DataFrame, source: str) -> Figure:
    """Retention after each stage, from :func:`~pai_utils.studies.prune_your_own.compare_stages`."""
    rows = table.sort_values("target", key=lambda names: names != source, kind="stable")
    rows = rows.assign(row=_with_source(rows.target, source), value=rows.retention)
    return estimates(rows, "stage", "retention on test images", width=4.6)


def accuracy_left(table: pd.DataFrame) -> Figure:
    """Retention of every scorer, from :func:`~pai_utils.studies.scorer_atlas.accuracy_left`."""
    rows = table.assign(tasks=table.tasks + " tasks", panel=_sparsities(table))
    rows = rows.assign(row=rows.scorer, value=rows.retention).sort_values("sparsity", kind="stable")
    return estimates(rows, "tasks", "retention", width=3.4, hollow="held-out tasks", color="black")


def transfer_correlations(table: pd.DataFrame) -> Figure:
    """Intervals from :func:`~pai_utils.studies.landscape_analysis.transfer_correlations`."""
    kinds = {"pooled": "all cells", "within": "cells of one scorer and sparsity"}
    rows = pd.concat(
        table.rename(columns={kind: "value", f"{kind}_low": "low", f"{kind}_high": "high"}).assign(
            row=table.predictor.map(PREDICTORS), kind=label
        )
        for kind, label in kinds.items()
    )
    xlabel = "rank correlation with retention on held-out tasks"
    look: Any = {"hollow": kinds["within"], "color": "black"}
    figure = estimates(rows, "kind", xlabel, lines={0: "-"}, width=6.2, **look)
    figure.axes[0].set_xlim(-1.05, 1.05)
    return figure


def estimates(
    table: pd.DataFrame,
    series: str,
    xlabel: str,
    *,
    lines: Mapping[float, str] = _DENSE_AND_CHANCE,
    width: float = 6.4,
    start: str = "",
    **look: Any,
) -> Figure:
    """Estimates with their intervals: columns ``row, value, low, high``, and the series.

    There is one panel a ``panel``, if the table has such a column, of a ``width`` in inches. The
    first row is on top. There are vertical ``lines``, each with its style: by default those of
    dense and of chance. ``start`` is a marker at the lower ends, and ``look`` is of all series.
    """
    names = list(dict.fromkeys(table.row))
    looks = _looks(table[series], linewidth=1, linestyle="-", **look)
    shifts = dict(zip(looks, np.linspace(-0.15, 0.15, len(looks)), strict=True))

    def draw(axes: Axes, rows: pd.DataFrame) -> None:
        for name, points in _groups(rows, series).items():
            height = points.row.map(names.index) + shifts[name]
            color = looks[name]["color"]
            axes.hlines(height, points.low, points.high, color=color, linewidth=1)
            if start:
                axes.plot(points.low, height, start, color=color, markersize=8)
            axes.plot(points.value, height, **looks[name] | {"linestyle": "none"})
        for value, style in lines.items():
            axes.axvline(value, color="0.2", linewidth=0.8, linestyle=style)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.4, -0.6)

    panels = _groups(table) if "panel" in table else {"": table}
    size = (width, 0.9 + 0.32 * len(names))
    return _panels(panels, draw, looks, (xlabel, ""), size=size, share=True)


def recovery_arrows(gains: pd.DataFrame) -> Figure:
    """What fine-tuning changed, from each start: a line from retention before to after.

    The table is as from :func:`~pai_utils.studies.finetune_recovery.chosen_on_validation`. One
    panel a sparsity.
    """
    penalised = gains.start + ", penalty: " + gains.penalty
    rows = pd.concat(
        gains.assign(
            row=penalised.where(gains.penalty != "none", gains.start),
            panel=_sparsities(gains),
            tasks=label,
            low=gains[f"{part}_retention_before"],
            high=gains[f"{part}_retention"],
            value=gains[f"{part}_retention"],
        )
        for part, label in {"held_out": "held-out tasks", "source": "source"}.items()
    )
    xlabel = "retention, from before (|) to after"
    return estimates(rows, "tasks", xlabel, lines={1: "-"}, width=4.0, start="|")


def recovery_curves(recovery: pd.DataFrame, dense: Mapping[str, float], source: str) -> Figure:
    """Accuracy over fine-tuning steps, one panel a learning rate, one line a task.

    The table is as from :func:`pai_utils.studies.finetune_recovery.run`, of one start and penalty.
    Hollow marks are those of refitted heads, and dense accuracies are at the right edge.
    """
    table = recovery[recovery.split == "test"].sort_values("learning_rate", kind="stable")
    table = table.assign(
        task=_with_source(table.target, source),
        panel="learning rate " + table.learning_rate.map("{:g}".format),
    )
    looks = _looks(table.task)
    hollow = {"markersize": 9, "markerfacecolor": "none", "linestyle": "none"}
    refitted = {task: look | hollow for task, look in looks.items()}
    right = 1.06 * table.step.max()

    def draw(axes: Axes, rows: pd.DataFrame) -> None:
        _lines(axes, rows[rows["head"] == "frozen"], "step", "accuracy", "task", looks)
        _lines(axes, rows[rows["head"] == "refitted"], "step", "accuracy", "task", refitted)
        for target, task in dict(zip(rows.target, rows.task, strict=True)).items():
            axes.plot(right, dense[target], "_", markersize=12, color=looks[task]["color"])

    return _panels(_groups(table), draw, looks, ("fine-tuning steps", "accuracy"), share=True)


def predicted_and_measured(table: pd.DataFrame) -> Figure:
    """Loss increase along the pruning direction, measured and as each quadratic model predicts it.

    The table is as from :func:`~pai_utils.landscape.predicted_and_measured`, with a column
    ``panel``.
    """
    series = {"measured": PREDICTORS["measured"]} | _PREDICTIONS
    looks = _looks(series.values())

    def draw(axes: Axes, rows: pd.DataFrame) -> None:
        for column, label in series.items():
            axes.plot([0, *rows.fraction], [0, *rows[column]], **looks[label])

    labels = ("fraction α of the pruning step", "loss increase (nats)")
    return _panels(_groups(table), draw, looks, labels)


def predictions(cells: pd.DataFrame) -> Figure:
    """Predicted against measured loss increase; filled markers are held-out tasks.

    The cells are those of a :class:`~pai_utils.studies.landscape_analysis.Landscape`.
    """
    kinds = cells.held_out.map({True: ", held-out task", False: ", own task"})
    cells = cells.assign(kind=cells.scorer + kinds)
    looks = _looks(cells.kind, hollow="own task", linestyle="none")
    positive = cells.measured[cells.measured > 0]
    step = 10.0 ** math.floor(math.log10(positive.min())) if len(positive) else 1.0
    diagonal = (step, step), (10 * step, 10 * step)

    def draw(axes: Axes, column: str) -> None:
        _lines(axes, cells, column, "measured", "kind", looks)
        axes.set_xscale("symlog", linthresh=step)
        axes.set_yscale("symlog", linthresh=step)
        axes.axline(*diagonal, color="0.3", linewidth=0.8, linestyle="--")

    panels = {label: column for column, label in _PREDICTIONS.items()}
    labels = ("predicted (nats)", "measured increase (nats)")
    return _panels(panels, draw, looks, labels, share=True)


def weights_compared(table: pd.DataFrame) -> Figure:
    """One quantity a panel for several weights of one architecture, one marker a pair of tasks.

    The table has the columns ``weights, quantity, pair, value``.
    """
    looks = _looks(table.pair, linewidth=0.8)
    weights = list(dict.fromkeys(table.weights))
    table = table.assign(place=table.weights.map(weights.index))

    def draw(axes: Axes, rows: pd.DataFrame) -> None:
        _lines(axes, rows, "place", "value", "pair", looks)
        axes.axhline(0, color="0.2", linewidth=0.8, linestyle=":")
        axes.set_xticks(range(len(weights)), weights, rotation=20)
        axes.set_xlim(-0.3, len(weights) - 0.7)

    return _panels(_groups(table, "quantity"), draw, looks)


def spectra(density: pd.DataFrame) -> Figure:
    """Densities, the second table of :func:`~pai_utils.studies.landscape_analysis.spectra`."""
    looks = _looks(density.name, linewidth=1.1)
    for index, look in enumerate(looks.values()):  # few marks, apart from those of the next line
        look["markevery"] = (0.1 * (index % 2), 0.2)
    visible = density.density[density.density > 1e-12]
    heights = max(float(visible.quantile(0.02)), 1e-9), 3 * float(visible.max())
    positive = density.assign(density=density.density.clip(lower=1e-12))
    draw = partial(_lines, x="eigenvalue", y="density", series="name", looks=looks)
    labels = ("eigenvalue of the Hessian", "density")
    how: Any = {"size": (6.4, 3.2), "yscale": "log", "ylim": heights}
    return _panels({"": positive}, draw, looks, labels, **how)


def path_losses(path: pd.DataFrame, source: str) -> Figure:
    """Losses on lines between networks, from :func:`~pai_utils.landscape.losses_on_path`."""
    path = path.assign(task=_with_source(path.task, source))
    looks = _looks(path.task)
    segments = [segment.split(" → ") for segment in dict.fromkeys(path.segment)]
    stations = [segments[0][0], *(end for _, end in segments)]

    def draw(axes: Axes, column: str) -> None:
        _lines(axes, path, "position", column, "task", looks)
        axes.set_xticks(range(len(stations)), stations)
        axes.grid(axis="x", color="0.2", linestyle=":")

    return _panels({"loss (nats)": "loss", "accuracy": "accuracy"}, draw, looks, size=(3.8, 3.0))


def layer_sparsities(table: pd.DataFrame) -> Figure:
    """Sparsity of each layer from input to output, one panel a scorer, one line a source.

    The table has the columns ``scorer, source, layer, sparsity``, layers in order of depth.
    """
    made = ("mask from " + table.source).where(table.source != "none", "no data")
    table = table.assign(made=made, depth=pd.factorize(table.layer)[0])
    looks = _looks(made, markersize=2.5, linewidth=1)
    draw = partial(_lines, x="depth", y="sparsity", series="made", looks=looks)
    labels = ("layer, input to output", "sparsity")
    how: Any = {"size": (4.6, 3.0), "share": True, "ylim": (-0.02, 1.02)}
    return _panels(_groups(table, "scorer"), draw, looks, labels, **how)


def transfer_heatmap(summary: pd.DataFrame, sparsity: float) -> Figure:
    """Retention of every target under the mask of every source at one sparsity, one panel a scorer.

    The table is as from :func:`~pai_utils.evaluation.summarise_retention`.
    """
    shown = summary[np.isclose(summary.sparsity, sparsity) & (summary.scorer != "dense")]
    blind = shown.scorer.isin(shown.scorer[shown.source == "none"])
    # What looks at no task stands below, in brackets, in every panel.
    below = shown[blind].assign(source=lambda rows: "(" + rows.scorer + ")")
    panels = {}
    for scorer, own in _groups(shown[~blind], "scorer").items():
        rows = pd.concat([own, below])
        cells = rows.pivot(index="source", columns="target", values="retention")
        cells = cells.reindex(index=rows.source.unique(), columns=shown.target.unique())
        panels[f"{scorer}, sparsity {sparsity:g}"] = cells.rename(index=_wrapped)
    return _panels(panels, _matrix, labels=("evaluated on", "mask from"), size=(4.2, 3.2))


def alignment(table: pd.DataFrame) -> Figure:
    """How alike tasks are, a matrix a measure, from :func:`~pai_utils.landscape.task_alignment`."""
    tasks = table.source.unique()
    matrices = {}
    for measure in ("eigenspace_overlap", "rank_correlation", "weighted_correlation"):
        matrix = table.pivot(index="source", columns="target", values=measure)
        matrix = matrix.reindex(index=tasks, columns=tasks)
        matrices[PREDICTORS[measure]] = matrix.mask(np.eye(len(tasks), dtype=bool), 1)
    return _panels(matrices, _matrix, size=(3.2, 3.2))


def pre_activations(table: pd.DataFrame, alone: float) -> Figure:
    """What a unit's ReLU is given on images of each task, and what without the unit's weights.

    The table is as from :func:`~pai_utils.studies.worked_examples.pre_activations`.
    """

    def draw(axes: Axes, rows: pd.DataFrame) -> None:
        sns.histplot(rows, x="value", hue="task", stat="density", common_norm=False, ax=axes)
        axes.axvline(alone, color="0.1", linestyle="--")
        axes.annotate("without its weights ", (alone, 0.9 * axes.get_ylim()[1]), ha="right")
        left = axes.get_xlim()[0]
        axes.axvspan(left, 0, color="0.9", zorder=0)
        axes.set_xlim(left, None)

    labels = ("what ReLU6 is given (grey: it gives zero)", "density")
    return _panels({"": table}, draw, labels=labels, size=(5.5, 2.5))


def damping_curve(table: pd.DataFrame) -> Figure:
    """Retention of every task, from :func:`~pai_utils.studies.worked_examples.damping_curve`."""
    looks = _looks(table.task)
    smallest = table.damping[table.damping > 0].min()

    def draw(axes: Axes, rows: pd.DataFrame) -> None:
        _lines(axes, rows, "damping", "retention", "task", looks)
        axes.set_xscale("symlog", linthresh=smallest)

    panels = {f"sparsity {s:g}": rows for s, rows in table.groupby("sparsity")}
    return _panels(panels, draw, looks, ("damping", "retention"), share=True)


def mask_overlaps(overlap: pd.DataFrame, chance: pd.DataFrame | None = None) -> Figure:
    """Overlaps of pairs of masks as a matrix, and those by chance in brackets below."""
    labels = overlap.map("{:.2f}".format)
    if chance is not None:
        labels += chance.map("\n({:.2f})".format)
    side = 1.6 + 0.62 * len(overlap)
    return _panels({"": overlap}, partial(_matrix, labels=labels), size=(side + 0.6, side))


def error_parts(parts: pd.DataFrame) -> Figure:
    """Bars of :func:`~pai_utils.studies.landscape_analysis.error_parts`, with a ``panel``."""

    def draw(axes: Axes, rows: pd.DataFrame) -> None:
        hatches = ["///" if part == "diagonal" else "" for part in rows.part]
        bars = axes.barh(rows.part, rows.nats, hatch=hatches, color="0.75", edgecolor="black")
        axes.bar_label(bars, fmt="{:+.2g}", padding=3, fontsize=7)
        axes.margins(x=0.3)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_ylim(len(rows) - 0.4, -0.6)  # the first part on top

    size = (3.6, 1.0 + 0.28 * parts.part.nunique())
    return _panels(_groups(parts), draw, labels=("nats", ""), size=size, share=True)


def score_distributions(scores: Mapping[str, Tensor], sparsity: float) -> Figure:
    """Distribution of each scorer's positive scores (flat), with the threshold at a sparsity."""
    panels = {}
    for name, tensor in scores.items():
        values = tensor.double().cpu().numpy()
        below = " or below" if values.min() < 0 else ""
        panels[f"{name} ({(values <= 0).mean():.1%} zero{below})"] = values

    def draw(axes: Axes, values: Any) -> None:
        axes.hist(np.log10(values[values > 0]), bins=80, color="0.45")
        threshold = np.quantile(values, sparsity)
        if threshold > 0:
            axes.axvline(np.log10(threshold), color="C3", linestyle="--", linewidth=1.5)

    return _panels(panels, draw, labels=("log₁₀ score", "weights"))


def plane_contours(
    grid: pd.DataFrame, points: Mapping[str, tuple[float, float]], unit: str = "distance"
) -> Figure:
    """Contours of every task's loss over one plane of weights, side by side.

    The grid is as from :func:`~pai_utils.landscape.losses_on_plane`, with networks on the plane by
    name and the ``unit`` of the axes. Levels are those of each task, evenly spaced in the logarithm
    of the loss above its least.
    """
    white: Any = {"color": "white", "markeredgecolor": "black", "markersize": 7}
    looks = _looks(points, linestyle="none", **white)

    def draw(axes: Axes, rows: pd.DataFrame) -> None:
        own = rows.pivot(index="y", columns="x", values="loss").replace(np.inf, np.nan)
        base = own.min().min()
        height = np.log10(1 + own.fillna(own.max().max()).fillna(0) - base)
        levels = np.linspace(0, max(height.max().max(), 1e-6), 9)
        axes.contourf(own.columns, own.index, height, levels=levels, cmap="cividis")
        lines = axes.contour(
            own.columns, own.index, height, levels=levels[1:-1], colors="white", linewidths=0.7
        )
        axes.clabel(lines, fmt=lambda level: f"{base + 10**level - 1:.3g}", fontsize=6)
        for name, (x, y) in points.items():
            axes.plot(x, y, **looks[name])
        axes.grid(visible=False)

    panels = {f"{task}: loss (nats)": rows for task, rows in _groups(grid, "task").items()}
    return _panels(panels, draw, looks, (f"x ({unit})", f"y ({unit})"), size=(3.6, 3.2))


def sample_images(tasks: Mapping[str, Task]) -> Figure:
    """The first test images of each task, one row a task."""
    from torchvision.utils import make_grid

    def draw(axes: Axes, task: Task) -> None:
        strip = make_grid(task.test.images[:8], pad_value=255)
        axes.imshow(strip.permute(1, 2, 0).numpy())
        axes.set_axis_off()

    return _panels(tasks, draw, size=(7.6, 1.2), most=1)


def _groups(table: pd.DataFrame, column: str = "panel") -> dict[str, pd.DataFrame]:
    """The rows of each value of a column, in the order in which values come."""
    return {str(value): rows for value, rows in table.groupby(column, sort=False)}


def _sparsities(table: pd.DataFrame) -> pd.Series[str]:
    return "sparsity " + table.sparsity.map("{:g}".format)


def _with_source(tasks: pd.Series[str], source: str) -> pd.Series[str]:
    return tasks.replace(source, f"{source} (source)")


def _wrapped(text: str) -> str:
    """A title over several lines, which end at a space or after the ``+`` of a mixture."""
    lines = textwrap.fill(text.replace("+", "+ "), 32, break_long_words=False)
    return lines.replace("+ ", "+")


def _looks(names: Iterable[str], *, hollow: str = "", **same: Any) -> Looks:
    """How each series is drawn: a scorer by its name, then its repair; others by their order.

    Where ``hollow`` is given, the series that end so have hollow markers, and no others.
    """
    palette = sns.color_palette("colorblind")
    looks: Looks = {}
    endings: dict[str, int] = {}
    for place, name in enumerate(dict.fromkeys(names)):
        scorer = re.split("[ ,@+]", name, maxsplit=1)[0]
        index = dashes = place
        if scorer in _SCORERS:
            index = _SCORERS.index(scorer)
            dashes = endings.setdefault(name.removeprefix(scorer), len(endings))
        color = same.get("color", palette[index % len(palette)])
        white = name.endswith(hollow) if hollow else scorer in _SCORERS and dashes % 2
        looks[name] = {
            "color": color,
            "marker": _MARKERS[index % len(_MARKERS)],
            "markersize": 5,
            "markerfacecolor": "white" if white else color,
            "linestyle": _DASHES[dashes % len(_DASHES)],
            "linewidth": 2.6 if name.endswith(" (source)") else 1.6,
            **same,
        }
    return looks


def _panels(
    panels: Mapping[str, Data],
    draw: Callable[[Axes, Data], None],
    looks: Looks | None = None,
    labels: tuple[str, str] = ("", ""),
    *,
    size: tuple[float, float] = (3.1, 2.9),
    share: bool = False,
    most: int = 3,
    **properties: Any,
) -> Figure:
    """One panel a title, of a size in inches, ``most`` in a row, and one legend below them.

    Every panel has the ``labels`` of x and y, and the ``properties`` that ``Axes.set`` takes.
    """
    columns = 2 if len(panels) == 4 and most > 2 else min(most, len(panels))
    rows = -(-len(panels) // columns)
    size = (size[0] * columns, size[1] * rows + 0.4)
    with sns.axes_style("whitegrid"), sns.plotting_context("paper", font_scale=1.1):
        figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False, sharey=share)
        for place, axes in enumerate(grid.flat):
            axes.set_visible(place < len(panels))
        for axes, (title, data) in zip(grid.flat, panels.items(), strict=False):
            draw(axes, data)
            ylabel = labels[1] if axes in grid[:, 0] else ""
            axes.set(title=_wrapped(title), xlabel=labels[0], ylabel=ylabel, **properties)
        figure.tight_layout()
        if looks:
            # As wide as the panels: long names stand in fewer columns.
            fitting = 34 * columns // max(map(len, looks))
            figure.legend(
                handles=[Line2D([], [], label=name, **look) for name, look in looks.items()],
                loc="upper center",
                bbox_to_anchor=(0.5, 0.0),
                ncols=max(1, min(4, len(looks), fitting)),
                frameon=False,
            )
    plt.close(figure)  # out of pyplot's hands, so that a notebook shows it once: as the result
    return figure


def _lines(axes: Axes, rows: pd.DataFrame, x: str, y: str, series: str, looks: Looks) -> None:
    """One line a value of the column ``series``, through its rows from left to right."""
    for name, line in _groups(rows.sort_values(x, kind="stable"), series).items():
        axes.plot(line[x], line[y], **looks[name])


def _matrix(axes: Axes, values: pd.DataFrame, labels: Any = True) -> None:
    """Values from 0 to 1 as an annotated matrix."""
    style = {"vmin": 0, "vmax": 1, "cmap": "cividis", "cbar": False, "linewidths": 0.5}
    fmt = ".2f" if labels is True else ""
    sns.heatmap(values.astype(float), ax=axes, annot=labels, fmt=fmt, **style)
    axes.tick_params(axis="y", rotation=0)
    axes.tick_params(axis="x", rotation=45)

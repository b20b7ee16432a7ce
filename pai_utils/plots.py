"""Every figure of the book. Each function takes a tidy table and returns a matplotlib figure.

Series differ by marker and line style as well as by colour, so that every figure reads without
colour; backgrounds are white, so that it reads in light and dark pages alike.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from pai_utils.landscape import PREDICTORS
from pai_utils.studies.prune_your_own import Choice

_MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")
_STYLES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (6, 2, 1, 2)))
_PANEL = (3.1, 2.9)  # inches
_TITLE = 32  # characters of a panel's title on one line
_MATRIX: dict[str, Any] = {
    "vmin": 0, "vmax": 1, "cmap": "cividis", "cbar": False, "linewidths": 0.5
}  # fmt: skip
_PREDICTIONS = ("taylor", "ggn", "blocks", "diagonal")


def retention_curves(held_out: pd.DataFrame, *, title: str = "mask from {}") -> Figure:
    """Retention on held-out tasks against sparsity, one panel a source, with intervals.

    Args:
        held_out: as from :func:`~pai_utils.evaluation.held_out_retention`; further scorers, such
            as one for an encoder without pre-training, are further lines.
        title: of a panel, with the source in the place of the braces.
    """
    sources = list(dict.fromkeys(held_out.source))
    scorers = list(dict.fromkeys(held_out.scorer))

    def draw(axes: Axes, source: str) -> None:
        for index, scorer in enumerate(scorers):
            line = held_out[(held_out.source == source) & (held_out.scorer == scorer)]
            line = line.sort_values("sparsity")
            style = _style(index)
            axes.plot(line.sparsity, line.retention, label=scorer, **style)
            color = style["color"]
            ends = (line.sparsity, line.low, line.high)
            axes.fill_between(*ends, color=color, alpha=0.15, linewidth=0)
            if len(line) == 1:  # a band of no width is not seen
                axes.vlines(*ends, color=color, alpha=0.4, linewidth=2)
        axes.axhline(1, color="0.2", linewidth=0.8)
        axes.axhline(0, color="0.2", linewidth=0.8, linestyle=":")
        axes.set_title(_wrapped(title.format(source)))
        axes.set_xlabel("sparsity")

    with _look():
        return _panels(sources, draw, "retention on held-out tasks")


def validation_choice(candidates: pd.DataFrame, choice: Choice, tolerance: float) -> Figure:
    """Retention on the validation part against sparsity; what was chosen is in a square.

    Args:
        candidates: as from :func:`~pai_utils.studies.prune_your_own.validation_sweep`.
        choice: as from :func:`~pai_utils.studies.prune_your_own.choose`.
        tolerance: as given to it; a dashed line is at what must be kept.
    """
    with _look():
        figure = retention_curves(candidates.assign(source=""), title="validation part{}")
        (axes,) = figure.axes
        axes.set_ylabel("retention")
        axes.axhline(1 - tolerance, color="0.2", linewidth=1.2, linestyle="--")
        axes.annotate(
            f"kept at least: {1 - tolerance:g}",
            (axes.get_xlim()[0], 1 - tolerance),
            xytext=(3, -3),
            textcoords="offset points",
            va="top",
            fontsize="small",
        )
        axes.plot(
            choice.sparsity,
            choice.retention,
            marker="s",
            markersize=14,
            markerfacecolor="none",
            markeredgecolor="0.1",
            linestyle="none",
        )
    return figure


def stages_compared(table: pd.DataFrame, source: str) -> Figure:
    """Retention of every task after each stage of a pruning, with intervals.

    Args:
        table: as from :func:`~pai_utils.studies.prune_your_own.compare_stages`.
        source: the task that was looked at; it stands on top.
    """
    others = [name for name in dict.fromkeys(table.target) if name != source]
    rows = {name: height for height, name in enumerate([*reversed(others), source])}
    stages = list(dict.fromkeys(table.stage))

    def draw(axes: Axes, _: str) -> None:
        for index, stage in enumerate(stages):
            part = table[table.stage == stage]
            height = part.target.map(rows) - 0.12 * (index - (len(stages) - 1) / 2)
            style = {**_style(index), "linestyle": "none"}
            spans = np.abs([part.retention - part.low, part.high - part.retention])
            axes.errorbar(part.retention, height, xerr=spans, label=stage, **style)
        axes.axvline(1, color="0.2", linewidth=0.8)
        axes.axvline(0, color="0.2", linewidth=0.8, linestyle=":")
        axes.set_yticks(list(rows.values()), [*reversed(others), f"{source} (source)"])
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.set_xlabel("retention on test images")

    with _look():
        return _panels([""], draw, "", size=(4.6, 1.1 + 0.4 * len(rows)))


def transfer_heatmap(summary: pd.DataFrame, sparsity: float) -> Figure:
    """Retention of every target under the mask of every source, one panel a scorer.

    Args:
        summary: as from :func:`~pai_utils.evaluation.summarise_retention`.
        sparsity: the one shown.
    """
    shown = summary[np.isclose(summary.sparsity, sparsity)]
    targets = list(dict.fromkeys(shown.target))
    sourced = [
        s for s in dict.fromkeys(shown.scorer) if (shown[shown.scorer == s].source != "none").all()
    ]
    blind = shown[~shown.scorer.isin([*sourced, "dense"])]

    def draw(axes: Axes, scorer: str) -> None:
        own = shown[shown.scorer == scorer]
        cells = own.pivot(index="source", columns="target", values="retention")
        cells = cells.reindex(index=list(dict.fromkeys(own.source)), columns=targets)
        for name in dict.fromkeys(blind.scorer):
            row = blind[blind.scorer == name].set_index("target").retention
            cells.loc[f"({name})"] = row.reindex(targets)
        cells.index = pd.Index([_wrapped(str(name)) for name in cells.index])
        sns.heatmap(
            cells.astype(float),
            ax=axes,
            annot=True,
            fmt=".2f",
            **_MATRIX,
        )
        axes.set_title(_wrapped(f"{scorer}, sparsity {sparsity:g}"))
        axes.set_xlabel("evaluated on")
        axes.tick_params(axis="y", rotation=0)

    with _look():
        return _panels(sourced, draw, "mask from", size=(4.2, 3.0), share=False)


def recovery_arrows(gains: pd.DataFrame) -> Figure:
    """What fine-tuning changed, from each start: an arrow from retention before to after.

    Args:
        gains: as from `recovery_gains` of the study of recovery, with dense accuracies, one row
            a start, sparsity and penalty, such as `chosen_on_validation` leaves. One panel a
            sparsity.
    """
    labelled = gains.assign(
        label=[
            start if penalty == "none" else f"{start}, penalty: {penalty}"
            for start, penalty in zip(gains.start, gains.penalty, strict=True)
        ]
    )
    labels = list(dict.fromkeys(labelled.label))[::-1]
    parts = {"held_out": "held-out tasks", "source": "source"}

    def draw(axes: Axes, sparsity: str) -> None:
        rows = labelled[labelled.sparsity == float(sparsity)].set_index("label")
        for index, (part, name) in enumerate(parts.items()):
            style = {"color": _style(index)["color"], "linestyle": "none"}
            height = np.array([labels.index(label) for label in rows.index]) + 0.15 - 0.3 * index
            before, after = rows[f"{part}_retention_before"], rows[f"{part}_retention"]
            for y, start, end in zip(height, before, after, strict=True):
                axes.plot([start, end], [y, y], color=style["color"], linewidth=1)
            axes.plot(before, height, marker="|", markersize=8, label=f"{name}, before", **style)
            marker = _style(index)["marker"]
            axes.plot(after, height, marker=marker, label=f"{name}, after", **style)
        axes.axvline(1, color="0.2", linewidth=0.8)
        axes.set_yticks(range(len(labels)), labels)
        axes.set_xlabel("retention")
        axes.set_title(f"sparsity {float(sparsity):g}")

    with _look():
        panels = [repr(float(value)) for value in dict.fromkeys(gains.sparsity)]
        return _panels(panels, draw, "", size=(4.0, 0.42 * len(labels) + 1.4))


def recovery_curves(recovery: pd.DataFrame, dense: Mapping[str, float], source: str) -> Figure:
    """Accuracy over fine-tuning steps, one panel a learning rate, one line a task.

    Args:
        recovery: as from `recovery_sweep` of the study of recovery, of one start and penalty.
        dense: dense accuracy of each task, drawn at the right edge.
        source: the task fine-tuned on, drawn thicker.
    """
    rates = sorted(set(recovery.learning_rate))
    recovery = recovery[recovery.split == "test"]
    frozen = recovery[recovery["head"] == "frozen"]
    targets = list(dict.fromkeys(frozen.target))
    last = max(frozen.step)

    def draw(axes: Axes, rate: str) -> None:
        for index, target in enumerate(targets):
            line = frozen[(frozen.learning_rate == float(rate)) & (frozen.target == target)]
            style = _style(index)
            is_source = target == source
            axes.plot(
                line.step,
                line.accuracy,
                label=f"{target} (source)" if is_source else target,
                **style | {"linewidth": 2.6 if is_source else 1.5},
            )
            axes.plot(last * 1.06, dense[target], marker="_", markersize=12, color=style["color"])
            refit = recovery[
                (recovery["head"] == "refitted")
                & (recovery.learning_rate == float(rate))
                & (recovery.target == target)
            ]
            axes.plot(
                refit.step,
                refit.accuracy,
                linestyle="none",
                marker=style["marker"],
                markersize=9,
                markerfacecolor="none",
                color=style["color"],
            )
        axes.set_title(f"learning rate {float(rate):g}")
        axes.set_xlabel("fine-tuning steps")

    with _look():
        return _panels([repr(rate) for rate in rates], draw, "accuracy")


def predicted_and_measured(table: pd.DataFrame) -> Figure:
    """Loss increase along the pruning direction, measured and as each quadratic model predicts it.

    Args:
        table: rows of :func:`~pai_utils.landscape.predicted_and_measured` with a column
            ``panel`` naming task, scorer or sparsity.
    """
    panels = list(dict.fromkeys(table.panel))
    series = {name: PREDICTORS[name] for name in ("measured", *_PREDICTIONS)}

    def draw(axes: Axes, panel: str) -> None:
        rows = table[table.panel == panel]
        for index, (column, label) in enumerate(series.items()):
            axes.plot([0, *rows.fraction], [0, *rows[column]], label=label, **_style(index))
        axes.set_title(_wrapped(panel))
        axes.set_xlabel("fraction α of the pruning step")

    with _look():
        return _panels(panels, draw, "loss increase (nats)", share=False)


def error_parts(parts: pd.DataFrame) -> Figure:
    """What the diagonal model drops of the measured increase, part by part.

    Args:
        parts: as from :func:`~pai_utils.landscape.error_parts`, with a column ``panel``.
    """
    names = list(dict.fromkeys(parts.part))[::-1]

    def draw(axes: Axes, panel: str) -> None:
        rows = parts[parts.panel == panel].set_index("part").nats.reindex(names)
        hatches = ["///" if name == "diagonal" else None for name in names]
        axes.barh(
            range(len(names)), rows, color="0.75", hatch=hatches, edgecolor="black", linewidth=0.6
        )
        visible = 0.02 * float(rows.abs().max())
        for place, value in enumerate(rows):
            right = value > -visible  # also beside a bar that is too short to be seen
            axes.annotate(
                f"{value:+.2g}" if value else "0",
                (value, place),
                xytext=(3 if right else -3, 0),
                textcoords="offset points",
                ha="left" if right else "right",
                va="center",
                fontsize=7,
            )
        axes.margins(x=0.3)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(names)), names)
        axes.set_title(_wrapped(panel))
        axes.set_xlabel("nats")

    with _look():
        size = (3.6, 1.0 + 0.28 * len(names))
        return _panels(list(dict.fromkeys(parts.panel)), draw, "", size=size)


def predictions(cells: pd.DataFrame) -> Figure:
    """Predicted against measured loss increase, one panel a prediction, one marker a scorer.

    Args:
        cells: of a `Study` of the landscape; filled markers are held-out tasks.
    """
    scorers = list(dict.fromkeys(cells.scorer))
    positive = cells.measured[cells.measured > 0]
    step = 10.0 ** math.floor(math.log10(float(positive.min()))) if len(positive) else 1.0

    def draw(axes: Axes, label: str) -> None:
        column = next(name for name in _PREDICTIONS if PREDICTORS[name] == label)
        for index, scorer in enumerate(scorers):
            for held_out in (True, False):
                rows = cells[(cells.scorer == scorer) & (cells.held_out == held_out)]
                if rows.empty:
                    continue
                style = _style(index)
                axes.plot(
                    rows[column],
                    rows.measured,
                    linestyle="none",
                    marker=style["marker"],
                    color=style["color"],
                    markerfacecolor=style["color"] if held_out else "white",
                    label=f"{scorer}, {'held-out task' if held_out else 'own task'}",
                )
        for set_scale in (axes.set_xscale, axes.set_yscale):
            set_scale("symlog", linthresh=step)
        ends = axes.get_xlim()
        axes.plot(ends, ends, color="0.3", linewidth=0.8, linestyle="--")
        axes.set_xlim(*ends)
        axes.set_title(label)
        axes.set_xlabel("predicted (nats)")

    with _look():
        return _panels(
            [PREDICTORS[name] for name in _PREDICTIONS], draw, "measured increase (nats)"
        )


def alignment(table: pd.DataFrame) -> Figure:
    """How alike the curvature of each two tasks is, one matrix a measure.

    Args:
        table: as from :func:`~pai_utils.landscape.task_alignment`.
    """
    names = ("eigenspace_overlap", "rank_correlation", "weighted_correlation")
    measures = {name: PREDICTORS[name] for name in names}
    tasks = list(dict.fromkeys(table.source))

    def draw(axes: Axes, title: str) -> None:
        measure = next(name for name, text in measures.items() if text == title)
        matrix = table.pivot(index="source", columns="target", values=measure)
        matrix = matrix.reindex(index=tasks, columns=tasks).astype(float)
        np.fill_diagonal(values := matrix.to_numpy().copy(), 1.0)
        sns.heatmap(
            pd.DataFrame(values, index=tasks, columns=tasks),
            ax=axes,
            annot=True,
            fmt=".2f",
            **_MATRIX,
            square=True,
        )
        axes.set_title(title, fontsize=9)
        axes.tick_params(axis="y", rotation=0)
        axes.tick_params(axis="x", rotation=45)

    with _look():
        return _panels([*measures.values()], draw, "", size=(3.2, 3.0), share=False)


def transfer_correlations(table: pd.DataFrame) -> Figure:
    """Correlation of each predictor with held-out retention, with intervals.

    Args:
        table: as from :func:`~pai_utils.studies.landscape_analysis.transfer_correlations`.
    """
    rows = table[::-1]
    kinds = {
        "pooled": ("all cells", "o", "black"),
        "within": ("cells of one scorer and sparsity", "s", "white"),
    }
    with _look():
        figure, axes = plt.subplots(figsize=(6.2, 1.2 + 0.34 * len(rows)))
        for offset, (kind, (label, marker, face)) in zip((0.15, -0.15), kinds.items(), strict=True):
            value = rows[kind].to_numpy()
            low, high = (rows[f"{kind}_{end}"].to_numpy() for end in ("low", "high"))
            # A percentile interval need not hold the estimate itself.
            errors = np.nan_to_num(np.clip([value - low, high - value], 0, None))
            axes.errorbar(
                value,
                np.arange(len(rows)) + offset,
                xerr=errors,
                linestyle="none",
                color="black",
                marker=marker,
                markerfacecolor=face,
                markersize=5,
                elinewidth=1,
                label=label,
            )
        axes.axvline(0, color="0.2", linewidth=0.8)
        axes.set_xlim(-1.05, 1.05)
        axes.set_yticks(range(len(rows)), [PREDICTORS[name] for name in rows.predictor])
        axes.set_xlabel("rank correlation with retention on held-out tasks")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2, frameon=False)
        figure.tight_layout()
    return _finished(figure)


def weights_compared(table: pd.DataFrame) -> Figure:
    """One quantity a panel for several weights of one architecture, one marker a pair of tasks.

    Args:
        table: columns ``weights, quantity, pair, value``.
    """
    weights = list(dict.fromkeys(table.weights))
    pairs = list(dict.fromkeys(table.pair))

    def draw(axes: Axes, quantity: str) -> None:
        rows = table[table.quantity == quantity]
        for index, pair in enumerate(pairs):
            line = rows[rows.pair == pair].set_index("weights").reindex(weights)
            style = _style(index)
            axes.plot(range(len(weights)), line.value, label=pair, **style | {"linewidth": 0.8})
        axes.axhline(0, color="0.2", linewidth=0.8, linestyle=":")
        axes.set_xticks(range(len(weights)), weights, rotation=20)
        axes.set_xlim(-0.3, len(weights) - 0.7)
        axes.set_title(quantity, fontsize=9)

    with _look():
        return _panels(list(dict.fromkeys(table.quantity)), draw, "", share=False)


def spectra(density: pd.DataFrame) -> Figure:
    """Densities of eigenvalues on a logarithmic axis, one line a network.

    Args:
        density: second part of :func:`~pai_utils.studies.landscape_analysis.spectra`.
    """
    with _look():
        figure, axes = plt.subplots(figsize=(6.4, 3.6))
        for index, name in enumerate(dict.fromkeys(density.name)):
            line = density[density.name == name]
            style = _style(index)
            places = np.linspace(0, len(line) - 1, 14).astype(int)
            axes.semilogy(
                line.eigenvalue,
                line.density.clip(lower=1e-12),
                label=name,
                markevery=places[index % 2 :: 2].tolist(),
                **style | {"linewidth": 1.1},
            )
        visible = density.density[density.density > 1e-12]
        axes.set_ylim(max(float(visible.quantile(0.02)), 1e-9), float(visible.max()) * 3)
        axes.set_xlabel("eigenvalue of the Hessian")
        axes.set_ylabel("density")
        axes.legend(loc="upper right")
        figure.tight_layout()
    return _finished(figure)


def path_losses(path: pd.DataFrame, source: str) -> Figure:
    """Loss and accuracy of every task along the straight lines between networks.

    Args:
        path: as from :func:`~pai_utils.landscape.losses_on_path`.
        source: the task pruned and trained on, drawn thicker.
    """
    segments = list(dict.fromkeys(path.segment))
    stations = [segments[0].split(" → ")[0], *(segment.split(" → ")[1] for segment in segments)]
    panels = {"loss (nats)": "loss", "accuracy": "accuracy"}

    def draw(axes: Axes, title: str) -> None:
        for index, task in enumerate(dict.fromkeys(path.task)):
            line = path[path.task == task]
            axes.plot(
                line.position,
                line[panels[title]],
                label=f"{task} (source)" if task == source else task,
                **_style(index) | {"linewidth": 2.6 if task == source else 1.5},
            )
        for place in range(1, len(stations) - 1):
            axes.axvline(place, color="0.2", linewidth=0.8, linestyle=":")
        axes.set_xticks(range(len(stations)), stations)
        axes.set_title(title)

    with _look():
        return _panels([*panels], draw, "", size=(3.8, 3.0), share=False)


def plane_contours(
    grid: pd.DataFrame, points: Mapping[str, tuple[float, float]], unit: str
) -> Figure:
    """Contours of every task's loss over one plane of weights, side by side.

    Levels are those of each task, evenly spaced in the logarithm of the loss above its least.

    Args:
        grid: as from :func:`~pai_utils.landscape.losses_on_plane`.
        points: networks on the plane, by name.
        unit: of the axes.
    """

    def draw(axes: Axes, task: str) -> None:
        own = grid[grid.task == task].pivot(index="y", columns="x", values="loss")
        loss = own.to_numpy(dtype=float)
        finite = loss[np.isfinite(loss)] if np.isfinite(loss).any() else np.zeros(1)
        base = float(finite.min())
        height = np.log10(1 + np.where(np.isfinite(loss), loss, finite.max()) - base)
        levels = np.linspace(0, max(float(height.max()), 1e-6), 9)
        axes.contourf(own.columns, own.index, height, levels=levels, cmap="cividis")
        lines = axes.contour(
            own.columns, own.index, height, levels=levels[1:-1], colors="white", linewidths=0.7
        )
        axes.clabel(lines, fmt=lambda level: f"{base + 10**level - 1:.3g}", fontsize=6)
        for index, (name, (x, y)) in enumerate(points.items()):
            axes.plot(
                x, y,
                linestyle="none", marker=_MARKERS[index], markersize=7, color="white",
                markeredgecolor="black", label=name,
            )  # fmt: skip
        axes.set_title(f"{task}: loss (nats)", fontsize=9)
        axes.set_xlabel(f"x ({unit})")
        axes.set_ylabel(f"y ({unit})")
        axes.grid(visible=False)

    with _look():
        return _panels(list(dict.fromkeys(grid.task)), draw, "", size=(3.6, 3.2), share=False)


def layer_sparsities(table: pd.DataFrame) -> Figure:
    """Sparsity of each layer from input to output, one panel a scorer, one line a source.

    Args:
        table: columns ``scorer, source, layer, sparsity``, layers in order of depth.
    """
    layers = list(dict.fromkeys(table.layer))

    def draw(axes: Axes, scorer: str) -> None:
        own = table[table.scorer == scorer]
        for index, source in enumerate(dict.fromkeys(own.source)):
            line = own[own.source == source].set_index("layer").reindex(layers)
            style = _style(index)
            axes.plot(
                range(len(layers)),
                line.sparsity,
                label="no data" if source == "none" else f"mask from {source}",
                **style | {"markersize": 2.5, "linewidth": 1},
            )
        axes.set_title(scorer)
        axes.set_xlabel("layer, input to output")
        axes.set_ylim(-0.02, 1.02)

    with _look():
        return _panels(list(dict.fromkeys(table.scorer)), draw, "sparsity", size=(4.6, 3.0))


def mask_overlaps(overlap: pd.DataFrame, chance: pd.DataFrame | None = None) -> Figure:
    """Overlap (intersection over union of kept weights) of pairs of masks as a labelled matrix.

    Args:
        overlap: square, symmetric, names on both axes.
        chance: the overlap by chance, of the same form, written below each value in brackets.
    """
    labels = overlap.map("{:.2f}".format)
    if chance is not None:
        labels += chance.map("\n({:.2f})".format)
    with _look():
        side = 1.6 + 0.62 * len(overlap)
        figure, axes = plt.subplots(figsize=(side + 0.6, side))
        sns.heatmap(
            overlap,
            ax=axes,
            annot=labels,
            fmt="",
            **_MATRIX,
            square=True,
        )
        axes.tick_params(axis="y", rotation=0)
        axes.tick_params(axis="x", rotation=45)
        figure.tight_layout()
    return _finished(figure)


def accuracy_left(table: pd.DataFrame) -> Figure:
    """Retention of every scorer on source and held-out tasks, one panel a sparsity.

    Args:
        table: as from :func:`~pai_utils.studies.scorer_atlas.accuracy_left`.
    """
    scorers = list(dict.fromkeys(table.scorer))[::-1]
    series = {"source": ("o", "black"), "held-out": ("s", "white")}

    def draw(axes: Axes, sparsity: str) -> None:
        shown = table[table.sparsity == float(sparsity)].set_index(["tasks", "scorer"])
        for offset, (tasks, (marker, face)) in zip((0.15, -0.15), series.items(), strict=True):
            rows = shown.loc[tasks].reindex(scorers)
            axes.errorbar(
                rows.retention,
                np.arange(len(scorers)) + offset,
                xerr=[rows.retention - rows.low, rows.high - rows.retention],
                linestyle="none",
                color="black",
                marker=marker,
                markerfacecolor=face,
                markersize=5,
                elinewidth=1,
                label=f"{tasks} tasks",
            )
        axes.axvline(1, color="0.2", linewidth=0.8)
        axes.axvline(0, color="0.2", linewidth=0.8, linestyle=":")
        axes.set_yticks(range(len(scorers)), scorers)
        axes.set_title(f"sparsity {float(sparsity):g}")
        axes.set_xlabel("retention")

    with _look():
        size = (3.4, 1.2 + 0.27 * len(scorers))
        return _panels([repr(float(s)) for s in sorted(set(table.sparsity))], draw, "", size=size)


def score_distributions(scores: Mapping[str, Tensor], sparsity: float) -> Figure:
    """Distribution of the positive scores of each scorer, with the threshold at a sparsity.

    Args:
        scores: one flat tensor a scorer.
        sparsity: the fraction of all scores left of the drawn threshold.
    """

    def draw(axes: Axes, name: str) -> None:
        values: NDArray[Any] = scores[name].double().cpu().numpy()
        positive = values[values > 0]
        zero = 1 - len(positive) / len(values)
        axes.hist(np.log10(positive), bins=80, color="0.45")
        threshold = np.quantile(values, sparsity)
        if threshold > 0:
            axes.axvline(np.log10(threshold), color="C3", linestyle="--", linewidth=1.5)
        axes.set_title(f"{name} ({zero:.1%} zero{' or below' if values.min() < 0 else ''})")
        axes.set_xlabel("log₁₀ score")

    with _look():
        return _panels(list(scores), draw, "weights", share=False)


def sample_images(tasks: Mapping[str, Any], columns: int = 8) -> Figure:
    """The first test images of each task, one row a task.

    Args:
        tasks: name to :class:`~pai_utils.data.tasks.Task`.
        columns: images a row.
    """
    with _look():
        figure, grid = plt.subplots(
            len(tasks), columns, figsize=(columns * 0.95, len(tasks) * 1.05), squeeze=False
        )
        for row, (name, task) in zip(grid, tasks.items(), strict=True):
            for axes, image in zip(row, task.test.images[:columns], strict=False):
                axes.imshow(image.permute(1, 2, 0).numpy())
            for axes in row:
                axes.set_xticks([])
                axes.set_yticks([])
                axes.grid(visible=False)
            row[0].set_ylabel(name, rotation=0, ha="right", va="center")
        figure.tight_layout(pad=0.3)
    return _finished(figure)


def cost_multiples(table: pd.DataFrame) -> Figure:
    """Cost of each contender as a multiple of one forward and backward, one panel a model.

    Args:
        table: columns ``model, contender, role, status, fb``; bars of ``role`` "ours" are hatched,
            and a ``status`` other than "ok" is written beside the bar or in its place.
    """
    names = list(dict.fromkeys(table.sort_values("role", kind="stable").contender))
    positions = {name: place for place, name in enumerate(reversed(names))}
    highest = float(table.fb.max())

    def draw(axes: Axes, model: str) -> None:
        for _, row in table[table.model == model].iterrows():
            place, ours, measured = positions[row.contender], row.role == "ours", row.fb > 0
            label = f" {row.fb:.2f}" if measured else " fails"
            if measured and row.status != "ok":
                label += f" {row.status}"
            if measured:
                axes.barh(
                    place,
                    row.fb,
                    color="0.85" if ours else "0.55",
                    hatch="///" if ours else None,
                    edgecolor="black",
                    linewidth=0.6,
                )
            axes.text(row.fb if measured else 0.5, place, label, va="center", fontsize=7)
        axes.axvline(1, color="black", linewidth=1, linestyle="--")
        axes.set_xscale("log")
        axes.set_xlim(0.5, 3 * highest)
        axes.set_xticks([1, 3, 10, 30], ["1", "3", "10", "30"])
        axes.minorticks_off()
        axes.set_yticks(list(positions.values()), list(positions))
        axes.tick_params(axis="y", labelsize=8)
        axes.grid(visible=False, axis="y")
        axes.set_title(model)
        axes.set_xlabel("forward and backward passes")

    with _look():
        size = (3.6, 1.0 + 0.24 * len(names))
        return _panels(list(dict.fromkeys(table.model)), draw, "", size=size)


def _look() -> Any:
    """Context of the book's style; leaves the reader's own settings alone."""
    return plt.rc_context(
        {
            **sns.axes_style("whitegrid"),
            **sns.plotting_context("paper", font_scale=1.1),
            "axes.prop_cycle": cycler(color=sns.color_palette("colorblind")),
            "figure.facecolor": "white",
            "savefig.facecolor": "white",
        }
    )


def _wrapped(text: str) -> str:
    """A title over several lines, of which mixtures need some; lines end after a ``+``."""
    lines = [""]
    for part in re.split(r"(?<=\+)", text):
        if len(lines[-1] + part) > _TITLE and lines[-1]:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def _style(index: int) -> dict[str, Any]:
    return {
        "color": sns.color_palette("colorblind")[index % 10],
        "marker": _MARKERS[index % len(_MARKERS)],
        "linestyle": _STYLES[index % len(_STYLES)],
        "markersize": 5,
        "linewidth": 1.6,
    }


def _panels(
    names: Sequence[str],
    draw: Callable[[Axes, str], None],
    ylabel: str,
    *,
    size: tuple[float, float] = _PANEL,
    share: bool = True,
) -> Figure:
    """One panel a name, two or three a row, and one legend for all below them."""
    columns = 2 if len(names) == 4 else min(3, len(names))
    rows = -(-len(names) // columns)
    figure, grid = plt.subplots(
        rows,
        columns,
        figsize=(size[0] * columns, size[1] * rows + 0.4),
        squeeze=False,
        sharey=share,
    )
    for axes, name in zip(grid.flat, names, strict=False):
        draw(axes, name)
    for axes in grid.flat[len(names) :]:
        axes.set_visible(False)
    for row in grid if ylabel else []:
        row[0].set_ylabel(ylabel)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.tight_layout()
    if handles:
        figure.legend(
            handles,
            labels,
            loc="upper center",
            bbox_to_anchor=(0.5, 0.0),
            # As wide as the panels: long names stand in fewer columns.
            ncols=max(1, min(4, len(labels), 34 * columns // max(map(len, labels)))),
            frameon=False,
        )
    return _finished(figure)


def _finished(figure: Figure) -> Figure:
    """Take the figure out of pyplot's hands, so that a notebook shows it once: as the result."""
    plt.close(figure)
    return figure

"""What a figure shows, where the executed notebooks cannot tell."""

import numpy as np
import pandas as pd
from matplotlib.lines import Line2D

from pai_utils.plots import (
    error_parts,
    plane_contours,
    predictions,
    recovery_arrows,
    retention_curves,
    stages_compared,
    transfer_heatmap,
    validation_choice,
)
from pai_utils.studies.prune_your_own import Choice

MIXED = "mnist5k+mnist5k:altered+photographs+contours"


def test_long_names_of_mixtures_are_wrapped_and_whole() -> None:
    rows = [
        {"source": source, "scorer": scorer, "sparsity": s, "retention": 0.5, "low": 0, "high": 1}
        for source in ("photos", MIXED)
        for scorer in ("feature_ggn_diag + layerwise+moments", "magnitude")
        for s in (0.5, 0.7)
    ]
    figure = retention_curves(pd.DataFrame(rows))
    short, long = (axes.get_title() for axes in figure.axes)
    assert short == "mask from photos"
    assert long.replace("\n", "") == f"mask from {MIXED}"
    assert max(map(len, long.split("\n"))) <= 32
    # The legend is no wider than the panels.
    assert vars(figure.legends[0])["_ncols"] == 1


def test_a_heatmap_names_every_mixture() -> None:
    rows = [
        {"source": MIXED, "target": target, "scorer": "snip", "sparsity": 0.5, "retention": 0.25}
        for target in ("digits", "photos")
    ]
    (axes,) = transfer_heatmap(pd.DataFrame(rows), 0.5).axes
    (label,) = (text.get_text() for text in axes.get_yticklabels())
    assert label.replace("\n", "") == MIXED
    assert [text.get_text() for text in axes.texts] == ["0.25", "0.25"]


def test_arrows_lead_from_before_to_after() -> None:
    gains = pd.DataFrame(
        [
            {"start": "repaired", "penalty": penalty, "sparsity": 0.7, "held_out_retention": after,
             "held_out_retention_before": 0.8, "source_retention": 1.0,
             "source_retention_before": 0.9}
            for penalty, after in (("none", 0.6), ("features", 0.85))
        ]
    )  # fmt: skip
    (axes,) = recovery_arrows(gains).axes
    assert axes.get_title() == "sparsity 0.7"
    labels = [text.get_text() for text in axes.get_yticklabels()]
    assert labels == ["repaired, penalty: features", "repaired"]
    spans = {tuple(np.asarray(line.get_xdata()).tolist()) for line in axes.lines}
    assert {(0.8, 0.6), (0.8, 0.85), (0.9, 1.0)} <= spans


def test_the_parts_of_an_error_are_labelled_in_order() -> None:
    parts = pd.DataFrame(
        {
            "panel": ["a", "a", "b", "b"],
            "part": ["diagonal", "gradient"] * 2,
            "nats": [0.5, -0.25, 0.0, 3.0],
        }
    )
    first, second = error_parts(parts).axes
    assert [text.get_text() for text in first.get_yticklabels()] == ["gradient", "diagonal"]
    assert [text.get_text() for text in first.texts] == ["-0.25", "+0.5"]
    assert [text.get_text() for text in second.texts] == ["+3", "0"]


def test_contours_mark_the_networks_and_bear_losses_without_end() -> None:
    grid = pd.DataFrame(
        [
            {"task": task, "x": x, "y": y, "loss": np.inf if x == y == 2 else x + y}
            for task in ("digits", "photos")
            for x in (0.0, 1.0, 2.0)
            for y in (0.0, 1.0, 2.0)
        ]
    )
    figure = plane_contours(grid, {"dense": (0, 0), "pruned": (1, 0)}, "distance")
    assert [axes.get_title() for axes in figure.axes] == [
        "digits: loss (nats)", "photos: loss (nats)"
    ]  # fmt: skip
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["dense", "pruned"]


def test_predictions_tell_held_out_tasks_by_their_fill() -> None:
    cells = pd.DataFrame(
        {
            "scorer": "snip", "held_out": [True, False], "measured": [0.1, 2.0], "taylor": 1.0,
            "ggn": 1.0, "blocks": 0.5, "diagonal": 0.25,
        }
    )  # fmt: skip
    figure = predictions(cells)
    assert len(figure.axes) == 4
    held, own = (line for line in figure.axes[0].lines if line.get_marker() == "o")
    assert held.get_markerfacecolor() != "white"
    assert own.get_markerfacecolor() == "white"
    assert list(np.asarray(held.get_ydata())) == [0.1]


def _points(line: Line2D) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in np.asarray(line.get_xydata())]


def test_the_chosen_candidate_and_what_must_be_kept_are_marked() -> None:
    rows = pd.DataFrame(
        [
            {"scorer": scorer, "sparsity": s, "retention": 1 - s, "low": 0.9 - s, "high": 1.1 - s}
            for scorer in ("snip", "magnitude")
            for s in (0.2, 0.4)
        ]
    )
    chosen = Choice("snip", 0.2, 0.8, 0.7, 0.9, tried=4)
    (axes,) = validation_choice(rows, chosen, 0.25).axes
    square = next(line for line in axes.lines if line.get_markerfacecolor() == "none")
    assert _points(square) == [(0.2, 0.8)]
    dashed = [line for line in axes.lines if [y for _, y in _points(line)] == [0.75, 0.75]]
    assert [line.get_linestyle() for line in dashed] == ["--"]
    assert [text.get_text() for text in axes.texts] == ["kept at least: 0.75"]
    # Lines differ without colour.
    lines = [line for line in axes.lines if len(_points(line)) == 2 and line not in dashed]
    marks = {str(line.get_marker()) for line in lines if line.get_marker() not in ("None", "")}
    assert len(marks) == 2


def test_stages_stand_in_one_row_a_task_the_source_on_top() -> None:
    rows = pd.DataFrame(
        [
            {"stage": stage, "target": target, "retention": r, "low": r - 0.1, "high": r + 0.1}
            for stage in ("pruned", "fine-tuned")
            for target, r in (("photos", 0.9), ("digits", 0.5), ("glyphs", 0.7))
        ]
    )
    (axes,) = stages_compared(rows, "photos").axes
    labels = [text.get_text() for text in axes.get_yticklabels()]
    assert labels == ["glyphs", "digits", "photos (source)"]
    # Of each stage, in the order of the tasks: the height of its row, up to the shift of stages.
    points = [line for line in axes.lines if len(_points(line)) == 3]
    assert len(points) >= 2
    assert [round(y) for _, y in _points(points[0])] == [2, 1, 0]
    assert len({str(line.get_marker()) for line in points if str(line.get_marker()) in "osD"}) == 2

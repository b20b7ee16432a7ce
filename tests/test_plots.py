"""What a figure shows, where the executed notebooks cannot tell."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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

MIXED = "mnist5k+mnist5k:altered+photographs+contours"
LONG = "feature_ggn_diag + layerwise+moments"


def held_out(sources: list[str], scorers: list[str], sparsities: list[float]) -> pd.DataFrame:
    return pd.DataFrame(
        {"source": source, "scorer": scorer, "sparsity": s, "retention": 1 - s, "low": 0, "high": 1}
        for source in sources
        for scorer in scorers
        for s in sparsities
    )


def labels(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.get_yticklabels()]


def marks(figure: Figure) -> dict[str, tuple[str, ...]]:
    """Colour, marker, fill and dashes of each series, read off the legend."""
    return {
        str(line.get_label()): tuple(
            str(line.properties()[name])
            for name in ("color", "marker", "markerfacecolor", "linestyle")
        )
        for line in figure.legends[0].get_lines()
    }


def test_long_names_of_mixtures_are_wrapped_and_whole() -> None:
    figure = retention_curves(held_out(["photos", MIXED], [LONG, "magnitude"], [0.5, 0.7]))
    short, long = (axes.get_title() for axes in figure.axes)
    assert short == "mask from photos"
    assert long.replace("\n", "") == f"mask from {MIXED}"
    assert max(map(len, long.split("\n"))) <= 32
    assert vars(figure.legends[0])["_ncols"] == 1, "the legend is wider than the panels"


def test_a_scorer_looks_the_same_in_every_figure_and_alike_with_a_repair() -> None:
    one = marks(retention_curves(held_out(["a"], ["feature_ggn_diag", LONG, "snip"], [0.5])))
    two = marks(retention_curves(held_out(["a"], ["magnitude", "snip", LONG], [0.5])))
    assert one["snip"] == two["snip"]
    assert one[LONG][:2] == two[LONG][:2] == one["feature_ggn_diag"][:2]
    assert len(set(one.values())) == 3
    assert len({look[1:] for look in one.values()}) == 3, "series differ without colour"


def test_a_heatmap_names_every_mixture_and_puts_masks_of_no_task_below() -> None:
    rows = [
        {"source": source, "target": target, "scorer": scorer, "sparsity": 0.5, "retention": 0.25}
        for source, scorer in ((MIXED, "snip"), ("none", "random"))
        for target in ("digits", "photos")
    ]
    (axes,) = transfer_heatmap(pd.DataFrame(rows), 0.5).axes
    assert [label.replace("\n", "") for label in labels(axes)] == [MIXED, "(random)"]
    assert [text.get_text() for text in axes.texts] == ["0.25"] * 4


def test_arrows_lead_from_before_to_after() -> None:
    gains = pd.DataFrame(
        {
            "start": "repaired", "penalty": ["none", "features"], "sparsity": 0.7,
            "held_out_retention_before": 0.8, "held_out_retention": [0.6, 0.85],
            "source_retention_before": 0.9, "source_retention": 1.0,
        }
    )  # fmt: skip
    (axes,) = recovery_arrows(gains).axes
    assert axes.get_title() == "sparsity 0.7"
    assert labels(axes) == ["repaired", "repaired, penalty: features"]
    spans = [tuple(segment[:, 0]) for c in axes.collections for segment in c.get_segments()]  # type: ignore[attr-defined]
    assert spans == [(0.8, 0.6), (0.8, 0.85), (0.9, 1.0), (0.9, 1.0)]


def test_the_parts_of_an_error_are_labelled_in_order() -> None:
    names = ["diagonal", "gradient"]
    parts = pd.DataFrame({"panel": [*"aabb"], "part": names * 2, "nats": [0.5, -0.25, 0.0, 3.0]})
    first, second = error_parts(parts).axes
    assert labels(first) == names
    assert first.yaxis_inverted(), "the first part is on top"
    assert [text.get_text() for text in first.texts] == ["+0.5", "-0.25"]
    assert [text.get_text() for text in second.texts] == ["0", "+3"]


@pytest.mark.parametrize("worst", [np.inf, np.nan, 4.0])
def test_contours_mark_the_networks_and_bear_losses_without_end(worst: float) -> None:
    grid = pd.DataFrame(
        {"task": task, "x": x, "y": y, "loss": worst if x == y == 2 else x + y}
        for task in ("digits", "photos")
        for x in (0.0, 1.0, 2.0)
        for y in (0.0, 1.0, 2.0)
    )
    figure = plane_contours(grid, {"dense": (0, 0), "pruned": (1, 0)}, "distance")
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["digits: loss (nats)", "photos: loss (nats)"]
    assert list(marks(figure)) == ["dense", "pruned"]


def test_predictions_tell_held_out_tasks_by_their_fill() -> None:
    cells = pd.DataFrame(
        {
            "scorer": "snip", "held_out": [True, False], "measured": [0.1, 2.0], "taylor": 1.0,
            "ggn": 1.0, "blocks": 0.5, "diagonal": 0.25,
        }
    )  # fmt: skip
    figure = predictions(cells)
    assert len(figure.axes) == 4
    looks = marks(figure)
    assert looks["snip, held-out task"][2] != "white"
    assert looks["snip, own task"][2] == "white"
    held, own, _ = (np.asarray(line.get_ydata()).tolist() for line in figure.axes[0].lines)
    assert (held, own) == ([0.1], [2.0])


def test_the_chosen_candidate_and_what_must_be_kept_are_marked() -> None:
    rows = held_out(["photos"], ["snip", "magnitude"], [0.2, 0.4])
    chosen = pd.Series({"sparsity": 0.2, "retention": 0.8})
    (axes,) = validation_choice(rows, chosen, 0.25).axes
    square = next(line for line in axes.lines if line.get_fillstyle() == "none")
    assert np.asarray(square.get_xydata()).tolist() == [[0.2, 0.8]]
    heights = {str(line.get_linestyle()): np.unique(line.get_ydata()) for line in axes.lines}
    assert heights["--"].tolist() == [0.75]
    assert [text.get_text().strip() for text in axes.texts] == ["kept at least: 0.75"]


def test_stages_stand_in_one_row_a_task_the_source_on_top() -> None:
    rows = pd.DataFrame(
        {"stage": stage, "target": target, "retention": r, "low": r - 0.1, "high": r + 0.1}
        for stage in ("pruned", "fine-tuned")
        for target, r in (("digits", 0.5), ("photos", 0.9), ("glyphs", 0.7))
    )
    (axes,) = stages_compared(rows, "photos").axes
    assert labels(axes) == ["photos (source)", "digits", "glyphs"]
    pruned, tuned = (np.asarray(line.get_xydata()) for line in axes.lines[:2])
    assert pruned[:, 0].tolist() == tuned[:, 0].tolist() == [0.9, 0.5, 0.7]
    assert pruned[:, 1].round().tolist() == [0, 1, 2]

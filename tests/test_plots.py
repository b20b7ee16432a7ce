"""What a figure shows, where the executed notebooks cannot tell."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pai_utils.plots import (
    plane_contours,
    recovery_arrows,
    retention_curves,
    validation_choice,
)

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


def test_a_scorer_looks_the_same_in_every_figure_and_alike_with_a_repair() -> None:
    one = marks(retention_curves(held_out(["a"], ["feature_ggn_diag", LONG, "snip"], [0.5])))
    two = marks(retention_curves(held_out(["a"], ["magnitude", "snip", LONG], [0.5])))
    assert one["snip"] == two["snip"]
    assert one[LONG][:2] == two[LONG][:2] == one["feature_ggn_diag"][:2]
    assert len(set(one.values())) == 3
    assert len({look[1:] for look in one.values()}) == 3, "series differ without colour"


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


def test_the_chosen_candidate_and_what_must_be_kept_are_marked() -> None:
    rows = held_out(["photos"], ["snip", "magnitude"], [0.2, 0.4])
    chosen = pd.Series({"sparsity": 0.2, "retention": 0.8})
    (axes,) = validation_choice(rows, chosen, 0.25).axes
    square = next(line for line in axes.lines if line.get_fillstyle() == "none")
    assert np.asarray(square.get_xydata()).tolist() == [[0.2, 0.8]]
    heights = {str(line.get_linestyle()): np.unique(line.get_ydata()) for line in axes.lines}
    assert heights["--"].tolist() == [0.75]
    assert [text.get_text().strip() for text in axes.texts] == ["kept at least: 0.75"]

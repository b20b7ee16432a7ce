"""What a figure shows, where the executed notebooks cannot tell."""

import numpy as np
import pandas as pd

from pai_utils.plots import recovery_arrows, retention_curves, transfer_heatmap

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

"""Tables over several stored results."""

from pathlib import Path

import pandas as pd
import pytest
from summarise import (
    RESULTS,
    explorer,
    gains,
    levers,
    repaired,
    runs,
    summarise,
    what_to_use,
)

from tests.workflow.conftest import store_record

ENCODER = "efficientnet_lite0"


def write(folder: Path, name: str, columns: str, rows: list[list[object]]) -> None:
    """Store one table of a run."""
    folder.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame(rows, columns=columns.split())
    table.to_csv(folder / f"{name}.csv", index=False)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """One encoder's masks and repairs from two sources, and the scores of others."""
    folder = tmp_path / "retention" / f"zero_shot_retention-{ENCODER}"
    columns = "source scorer sparsity retention low high count seeds"
    rows: list[list[object]] = [
        ["a", "ours", 0.5, 0.5, 0.4, 0.6, 9, 3],
        ["b", "ours", 0.5, 0.7, 0.6, 0.8, 9, 3],
        ["a", "ours + moments", 0.5, 0.9, 0.8, 1.0, 9, 3],
        ["b", "ours + moments", 0.5, 0.8, 0.7, 0.9, 9, 3],
        ["a", "ours, no pre-training", 0.5, 1.4, 0.1, 2.0, 9, 3],
    ]
    write(folder, "held_out", columns, rows)
    rounds = folder.with_name(f"{folder.name}-rounds")
    write(rounds, "held_out", columns, rows)
    store_record(rounds, parameters={"rounds": 4})
    for encoder in (ENCODER, "vit_small_saliency"):
        write(
            tmp_path / "atlas" / f"scorer_atlas-{encoder}",
            "left",
            "scorer sparsity retention low high tasks",
            [
                ["snip", 0.3, 0.95, 0.9, 1.0, "held-out"],
                ["snip", 0.5, 0.3, 0.2, 0.4, "held-out"],
                ["snip", 0.5, 0.99, 0.9, 1.0, "source"],
                ["px", 0.5, 0.1, 0.0, 0.2, "held-out"],
                ["ggn_diag", 0.5, 0.6, 0.5, 0.7, "held-out"],
            ],
        )
    return tmp_path


def test_the_stored_tables_are_those_of_the_stored_results(tmp_path: Path) -> None:
    for folder in RESULTS.iterdir():
        if folder.name != "summary":
            (tmp_path / folder.name).symlink_to(folder)
    stored = {path.name: path for path in (RESULTS / "summary").iterdir()}
    written = {path.name: path for path in summarise(tmp_path)}
    assert set(written) == set(stored)
    for name, path in written.items():
        if path.suffix == ".png":  # libraries draw letters in more than one way
            assert path.read_bytes().startswith(b"\x89PNG"), name
        else:
            assert path.read_text("utf-8") == stored[name].read_text("utf-8"), name
    assert written["explorer.html"].stat().st_size < 250_000


def test_what_is_not_stored_is_left_out(results: Path) -> None:
    written = {path.stem for path in summarise(results)}
    assert {"gains", "levers", "repaired", "what_to_use", f"retention-{ENCODER}"} <= written
    assert not {"reach", "refitted", "transfer", "explorer", "overview"} & written


def test_runs_are_listed_from_their_records(tmp_path: Path) -> None:
    assert runs(tmp_path).empty
    for name, clean in (("one", True), ("two", False)):
        store_record(tmp_path / "grid" / name, clean=clean)
    first, second = runs(tmp_path).to_dict("records")
    assert (first["run"], first["started, UTC"]) == ("grid/one", "2026-01-02 03:04")
    assert (first["minutes"], first["commit"]) == (1.5, "0123456789")
    assert second["commit"] == "0123456789, changed"


def test_retention_is_the_mean_over_sources_and_rounds_count_where_they_are_repaired(
    results: Path,
) -> None:
    left = repaired(results).set_index("method").retention
    assert left["ours"] == pytest.approx(0.6)
    assert left["ours + moments"] == pytest.approx(0.85)
    assert left["ours + moments, 4 rounds"] == left["ours + moments"]
    assert "ours, 4 rounds" not in left


def test_the_gain_is_over_the_best_of_six_scores_and_of_all_on_held_out_tasks(
    results: Path,
) -> None:
    (row,) = gains(repaired(results), results).to_dict("records")
    assert (row["encoder"], row["best of six"]) == ("EfficientNet-Lite0", "snip")
    assert row["of six"] == 0.3
    assert (row["best of all"], row["of all"]) == ("ggn_diag", 0.6)
    # An encoder without pre-training is a control, and no method.
    assert row["best here"].startswith("ours + moments")
    assert row["gain"] == pytest.approx(55)
    assert row["gain over all"] == pytest.approx(25)
    assert not levers(results).method.str.contains("no pre-training").any()


def test_what_to_use_is_the_best_of_all_that_was_measured(results: Path) -> None:
    table = what_to_use(repaired(results), results).set_index(["encoder", "sparsity"]).method
    assert table.to_dict() == {
        ("EfficientNet-Lite0", 0.3): "snip",
        ("EfficientNet-Lite0", 0.5): "ours + moments",
        ("ViT-S/14", 0.3): "snip",
        ("ViT-S/14", 0.5): "ggn_diag",
    }


def test_the_explorer_takes_the_range_over_seeds_from_the_atlas(results: Path) -> None:
    write(
        results / "atlas" / "scorer_atlas-vit_small_saliency",
        "accuracies",
        "source target scorer sparsity seed accuracy chance count",
        [
            ["none", "b", "dense", 0.0, 0, 0.9, 0.1, 60],
            ["a", "b", "snip", 0.5, 0, 0.5, 0.1, 60],
            ["a", "b", "snip", 0.5, 1, 0.7, 0.1, 60],
        ],
    )
    (row,) = explorer(results).to_dict("records")
    assert (row["task"], row["seeds"], row["interval"]) == ("held-out", 2, "range")
    assert [row[name] for name in ("low", "retention", "high")] == pytest.approx([0.5, 0.625, 0.75])


def test_the_explorer_tells_scores_repairs_and_own_tasks_apart(tmp_path: Path) -> None:
    write(
        tmp_path / "retention" / f"zero_shot_retention-{ENCODER}-alone",
        "retention",
        "source target scorer sparsity retention low high count seeds",
        [
            ["a+a:altered", "a", "ours + moments", 0.5, 0.9, 0.8, 1.0, 9, 3],
            ["a+a:altered", "b", "ours", 0.5, 0.7, 0.6, 0.8, 9, 3],
            ["none", "b", "dense", 0.0, 1.0, 1.0, 1.0, 9, 3],
        ],
    )
    table = explorer(tmp_path)
    assert table[["task", "scorer", "repair"]].to_numpy().tolist() == [
        ["own", "ours", "moments"],
        ["held-out", "ours", "none"],
    ]
    assert set(table.backbone + "-" + table.variant) == {f"{ENCODER}-alone"}

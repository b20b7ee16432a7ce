"""Tables over several stored results."""

import itertools
from pathlib import Path

import pandas as pd
import pytest
from summarise import (
    RESULTS,
    explorer,
    gains,
    levers,
    reach,
    recovery,
    refitted,
    repaired,
    runs,
    summarise,
    transfer,
    weights,
    what_to_use,
)

from pai_utils.studies.landscape_analysis import PREDICTORS
from tests.workflow.conftest import store_record


def test_runs_are_listed_from_their_records(tmp_path: Path) -> None:
    assert runs(tmp_path).empty
    for name, clean in (("one", True), ("two", False)):
        folder = tmp_path / "grid" / name
        store_record(folder, clean=clean)
    first, second = runs(tmp_path).to_dict("records")
    assert (first["run"], first["started, UTC"]) == ("grid/one", "2026-01-02 03:04")
    assert (first["minutes"], first["commit"]) == (1.5, "0123456789")
    assert second["commit"] == "0123456789, changed"


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """One encoder's masks and repairs from two sources, and the scores of others."""
    folder = tmp_path / "retention" / "zero_shot_retention-efficientnet_lite0"
    folder.mkdir(parents=True)
    columns = ["source", "scorer", "sparsity", "retention", "low", "high", "count", "seeds"]
    held_out = pd.DataFrame(
        [
            ["a", "ours", 0.5, 0.5, 0.4, 0.6, 9, 3], ["b", "ours", 0.5, 0.7, 0.6, 0.8, 9, 3],
            ["a", "ours + moments", 0.5, 0.9, 0.8, 1.0, 9, 3],
            ["b", "ours + moments", 0.5, 0.8, 0.7, 0.9, 9, 3],
            ["a", "ours, no pre-training", 0.5, 1.4, 0.1, 2.0, 9, 3],
        ],
        columns=columns,
    )  # fmt: skip
    held_out.to_csv(folder / "held_out.csv", index=False)
    lever = folder.with_name("zero_shot_retention-efficientnet_lite0-alone")
    lever.mkdir()
    held_out.iloc[:1].to_csv(lever / "held_out.csv", index=False)
    for encoder in ("efficientnet_lite0", "vit_small_saliency"):
        atlas = tmp_path / "atlas" / f"scorer_atlas-{encoder}"
        atlas.mkdir(parents=True)
        pd.DataFrame(
            [
                ["snip", 0.3, 0.95, 0.9, 1.0, "held-out"], ["snip", 0.5, 0.3, 0.2, 0.4, "held-out"],
                ["snip", 0.5, 0.99, 0.9, 1.0, "source"], ["px", 0.5, 0.1, 0.0, 0.2, "held-out"],
                ["ggn_diag", 0.5, 0.6, 0.5, 0.7, "held-out"],
            ],
            columns=["scorer", "sparsity", "retention", "low", "high", "tasks"],
        ).to_csv(atlas / "left.csv", index=False)  # fmt: skip
    tuned = tmp_path / "recovery" / "finetune_recovery-efficientnet_lite0"
    tuned.mkdir(parents=True)
    parts = [
        f"{part}_retention{when}" for part in ("source", "held_out") for when in ("_before", "")
    ]
    gained = ["held_out_gain", "held_out_low", "held_out_high", "source_low"]
    row = dict.fromkeys([*parts, *gained], 0.25)
    row |= {"start": "repaired", "penalty": "none", "sparsity": 0.7, "learning_rate": 3e-6}  # type: ignore[dict-item]
    pd.DataFrame(
        [row | {"validation": 0.9}, row | {"validation": 0.8, "learning_rate": 1e-4}]
    ).to_csv(tuned / "gains.csv", index=False)
    store_record(tuned, parameters={"penalties": {"none": 0.0}, "optimiser": "adam"})
    _landscape(tmp_path / "landscape" / "landscape_analysis-efficientnet_lite0")
    return tmp_path


def _landscape(folder: Path) -> None:
    """Four cells at two shares of the step; and what correlates with retention."""
    folder.mkdir(parents=True)
    columns = ["gradient", "taylor", "hessian", "ggn", "tensors", "blocks", "diagonal"]
    cells = [
        {
            "sparsity": 0.2,
            "fraction": fraction,
            "measured": fraction * k,
            "source": "a" if k < 4 else "none",
            "target": "a" if k == 1 else "b",
            **dict.fromkeys(columns, fraction * k * 2),
        }
        for fraction in (0.25, 0.5, 1.0)
        for k in (1.0, 2.0, 3.0, 4.0)
    ]
    table = pd.DataFrame(cells)
    table["ggn"] = table.measured * 1.25
    table["diagonal"] = -table.measured
    table.to_csv(folder / "losses.csv", index=False)
    names = [name for name in PREDICTORS if name != "measured"]
    pd.DataFrame(
        {
            "source": source,
            "target": target,
            "scorer": "snip",
            "sparsity": 0.2,
            "held_out": source != target,
            "retention": -value,
            "measured": value,
            **dict.fromkeys(names, 1.0),
        }
        for value, (source, target) in enumerate(itertools.permutations("abcd", 2))
    ).to_csv(folder / "cells.csv", index=False)
    pd.DataFrame(
        {
            "weights": ["pre-trained", "random"] * 3,
            "quantity": "retention",
            "pair": ["a → b"] * 2 + ["b → a"] * 2 + ["b → c"] * 2,
            "value": [0.5, 0.25, 0.75, 0.001234, 0.9, 0.0001],
        }
    ).to_csv(folder / "compared.csv", index=False)
    for name in ("barriers", "spectra"):
        pd.DataFrame({"name": ["dense"], "smallest": [-0.0012345]}).to_csv(
            folder / f"{name}.csv", index=False
        )


def test_retention_is_the_mean_over_sources(results: Path) -> None:
    left = repaired(results).set_index("method")
    assert left.retention["ours"] == pytest.approx(0.6)
    assert left.retention["ours + moments"] == pytest.approx(0.85)
    assert set(left.tasks) == {"embedded"}


def test_masks_in_rounds_stand_beside_those_of_one(results: Path) -> None:
    main = results / "retention" / "zero_shot_retention-efficientnet_lite0"
    again = main.with_name(f"{main.name}-rounds")
    again.mkdir()
    store_record(again, parameters={"rounds": 4})
    pd.read_csv(main / "held_out.csv").to_csv(again / "held_out.csv", index=False)
    left = repaired(results).set_index("method").retention
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
    assert row["best here"] == "ours + moments"
    assert row["gain"] == pytest.approx(55)
    assert row["gain over all"] == pytest.approx(25)


def test_heads_are_re_fitted_at_the_largest_rate_of_each_run(results: Path) -> None:
    columns = ["learning_rate", "target", "frozen", "refitted", "pruned", "dense"]
    for (grid, variant), rates in {
        ("recovery", ""): (1e-5, 1e-4),
        ("recovery_real", ""): (1e-6,),
        ("recovery_real", "-rounds"): (1e-7,),
    }.items():
        folder = results / grid / f"finetune_recovery-efficientnet_lite0{variant}"
        parameters = {"starts": ["repaired"], **({"rounds": 4} if variant else {})}
        store_record(folder, parameters=parameters)
        rows = [[rate, "digits", 0.5, 0.75, 0.25, 1.0] for rate in rates]
        pd.DataFrame(rows, columns=columns).to_csv(folder / "refitted.csv", index=False)
    unrepaired = results / "recovery" / "finetune_recovery-efficientnet_lite0-sparsities"
    store_record(unrepaired, parameters={"starts": ["pruned", "repaired"]})
    pd.DataFrame(rows, columns=columns).to_csv(unrepaired / "refitted.csv", index=False)
    table = refitted(results)
    assert table["rate"].to_list() == ["1e-04", "1e-06", "1e-07"]
    assert table["rounds"].to_list() == [1, 1, 4]
    assert table["re-fitted"].to_list() == [0.75, 0.75, 0.75]


def test_what_to_use_is_the_best_of_all_that_was_measured(results: Path) -> None:
    table = what_to_use(repaired(results), results)
    first = table[table.encoder == "EfficientNet-Lite0"].set_index("sparsity").method
    assert first.to_dict() == {0.3: "snip", 0.5: "ours + moments"}
    second = table[table.encoder != "EfficientNet-Lite0"].set_index("sparsity").method
    assert second.to_dict() == {0.3: "snip", 0.5: "ggn_diag"}


def test_levers_stand_beside_the_main_runs(results: Path) -> None:
    table = levers(results)
    assert table.run.value_counts().to_dict() == {
        "efficientnet_lite0": 4, "efficientnet_lite0-alone": 1
    }  # fmt: skip
    assert not table.method.str.contains("no pre-training").any()


def test_the_explorer_takes_the_range_over_seeds_from_the_atlas(results: Path) -> None:
    folder = results / "atlas" / "scorer_atlas-vit_small_saliency"
    rows = [["none", "b", "dense", 0.0, 0, 0.9], ["a", "b", "snip", 0.5, 0, 0.5],
            ["a", "b", "snip", 0.5, 1, 0.7]]  # fmt: skip
    columns = ["source", "target", "scorer", "sparsity", "seed", "accuracy"]
    table = pd.DataFrame(rows, columns=columns).assign(chance=0.1, count=60)
    table.to_csv(folder / "accuracies.csv", index=False)
    (row,) = explorer(results).to_dict("records")
    assert (row["task"], row["seeds"], row["interval"]) == ("held-out", 2, "range")
    assert [row[name] for name in ("low", "retention", "high")] == pytest.approx([0.5, 0.625, 0.75])


def test_the_explorer_tells_scores_repairs_and_own_tasks_apart(results: Path) -> None:
    folder = results / "retention" / "zero_shot_retention-efficientnet_lite0-alone"
    columns = ["source", "target", "scorer", "sparsity", "retention", "low", "high"]
    pd.DataFrame(
        [["a+a:altered", "a", "ours + moments", 0.5, 0.9, 0.8, 1.0],
         ["a+a:altered", "b", "ours", 0.5, 0.7, 0.6, 0.8],
         ["none", "b", "dense", 0.0, 1.0, 1.0, 1.0]],
        columns=columns,
    ).assign(count=9, seeds=3).to_csv(folder / "retention.csv", index=False)  # fmt: skip
    own, other = explorer(results).to_dict("records")
    assert (own["task"], own["scorer"], own["repair"]) == ("own", "ours", "moments")
    assert (other["task"], other["scorer"], other["repair"]) == ("held-out", "ours", "none")
    assert (own["backbone"], own["variant"]) == ("efficientnet_lite0", "alone")


def test_the_explorers_data_are_those_of_the_stored_results() -> None:
    text = (RESULTS / "summary" / "explorer.html").read_text()
    assert explorer(RESULTS).to_csv(index=False, float_format="%.3g") in text
    assert len(text) < 150_000


def test_recovery_marks_the_rate_that_validation_chose(results: Path) -> None:
    table = recovery(results)
    assert list(zip(table.rate, table.chosen, strict=True)) == [("3e-06", "yes"), ("1e-04", "")]
    assert set(table.encoder) == {"EfficientNet-Lite0"}
    assert (table["held-out before"] == 0.25).all()


def test_the_page_shows_recovery_of_one_encoder_before_and_after(results: Path) -> None:
    summarise(results)
    shown = pd.read_csv(results / "summary" / "recovery-efficientnet_lite0.csv").iloc[0]
    assert (shown.masks, shown.rate, shown.optimiser) == ("70%, 1 round", 3e-6, "adam")
    assert shown["held-out"] == shown["source"] == "0.25 → 0.25"
    assert shown.gain == "+0.250 (+0.250 to +0.250)"
    assert not (results / "summary" / "recovery-vit_small_saliency.csv").exists()


def test_recovery_names_rounds_optimiser_and_strength(results: Path) -> None:
    first = results / "recovery" / "finetune_recovery-efficientnet_lite0"
    again = first.with_name(f"{first.name}-rounds")
    used = {"penalties": {"none": 0.0, "features": 30.0}, "optimiser": "sgd", "rounds": 4}
    store_record(again, parameters=used)
    rows = pd.read_csv(first / "gains.csv")
    rows["penalty"] = ["none", "features"]
    rows.to_csv(again / "gains.csv", index=False)
    shown = recovery(results)[["rounds", "optimiser", "penalty"]].to_numpy().tolist()
    assert shown == [
        [1, "adam", "none"], [1, "adam", "none"], [4, "sgd", "none"], [4, "sgd", "features 30"],
    ]  # fmt: skip


def test_the_reach_of_a_model_is_its_error_on_own_and_held_out_tasks(results: Path) -> None:
    rows = {(row["task"], row["step"]): row for row in reach(results).to_dict("records")}
    assert set(rows) == {(t, step) for t in ("own", "held-out") for step in (0.25, 0.5, 1.0)}
    full = rows["held-out", 1.0]
    assert full["measured"] == "3"
    assert full["½ δᵀGδ"] == "3.8 (100%)"
    assert full["gᵀδ + ½ δᵀHδ"] == "6 (0%)"
    assert full["½ δᵀ diag(G) δ"] == "-3 (0%)"
    assert full["cells"] == 3
    assert rows["own", 1.0]["measured"] == "1"


def test_correlations_stand_with_their_intervals(results: Path) -> None:
    rows = {row["predictor"]: row for row in transfer(results).to_dict("records")}
    row = rows["measured increase"]
    assert row["all cells"] == "-1.00 (-1.00 to -1.00)"
    assert row["one scorer and sparsity"] == "-1.00 (-1.00 to -1.00)"
    assert (row["encoder"], row["cells"], row["pairs"]) == ("EfficientNet-Lite0", 12, 12)
    assert rows["½ δᵀGδ"]["all cells"] == "nan"


def test_weights_are_compared_by_medians_with_all_their_digits(results: Path) -> None:
    (row,) = weights(results).to_dict("records")
    assert row == {
        "encoder": "EfficientNet-Lite0", "quantity": "retention", "pre-trained": "0.75",
        "random": "0.00123",
    }  # fmt: skip
    summarise(results)
    spectra = pd.read_csv(results / "summary" / "spectra.csv")
    assert spectra.smallest[0] == -0.00123


def test_what_is_not_stored_is_left_out(results: Path) -> None:
    (results / "landscape").rename(results / "elsewhere")
    written = {path.stem for path in summarise(results)}
    assert "reach" not in written
    assert "gains" in written


def test_every_table_is_written(results: Path) -> None:
    written = summarise(results)
    tables = [path for path in written if path.suffix == ".csv"]
    names = [
        "barriers", "claims", "gains", "levers", "reach", "recovery-efficientnet_lite0",
        "repaired", "runs", "spectra", "transfer", "weights", "what_to_use",
    ]  # fmt: skip
    assert sorted(path.stem for path in tables) == names
    assert all(path.read_text().count("\n") > 1 for path in tables)
    figures = sorted(set(written) - set(tables))
    names = ["retention-efficientnet_lite0.png", "transfer-efficientnet_lite0.png"]
    assert [figure.name for figure in figures] == names
    assert all(figure.read_bytes().startswith(b"\x89PNG") for figure in figures)

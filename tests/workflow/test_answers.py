"""The answers of chapters say what is stored, and nothing where it is not."""

from pathlib import Path

import pandas as pd
import pytest
from answers import ANSWERS, Stored, answers, overview
from summarise import RESULTS, repaired, stored_in

ENCODER = "Small"


def _stored(results: Path, **tables: pd.DataFrame) -> Stored:
    given = {
        name: tables.get(name, pd.DataFrame())
        for name in ("runs", "repaired", "gains", "recovery", "explorer", "claims")
    }
    return Stored(results=results, backbones={"small": ENCODER}, **given)


def _write(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(path, index=False)


def test_nothing_stored_gives_no_answers(tmp_path: Path) -> None:
    assert answers(_stored(tmp_path)) == {}


def test_the_books_answers_are_those_of_the_stored_results() -> None:
    found = answers(stored_in(RESULTS, repaired(RESULTS)))
    assert set(found) == set(ANSWERS)
    folder = RESULTS / "summary" / "answers"
    assert {path.stem: path.read_text("utf-8") for path in folder.iterdir()} == found


def test_an_atlas_is_summed_up_by_its_best_scores_costs_and_overlaps(tmp_path: Path) -> None:
    folder = tmp_path / "atlas" / "scorer_atlas-small"
    kept = {
        ("ggn_diag", 0.3): 0.5,
        ("snip", 0.3): 0.75,
        ("ggn_diag", 0.5): 0.25,
        ("snip", 0.5): -0.001,
    }
    _write(
        folder / "left.csv",
        [
            {"scorer": scorer, "sparsity": s, "retention": r, "low": r, "high": r, "tasks": tasks}
            for tasks in ("held-out", "source")
            for (scorer, s), r in kept.items()
        ],
    )
    costs = {"ggn_diag": 1.25, "snip": 0.96, "px": 2.4, "random": 99.0}
    _write(folder / "costs.csv", [{"scorer": name, "fb": cost} for name, cost in costs.items()])
    for name, of_random in (("overlap_scorers", 1.0), ("overlap_scorers_chance", 0.0)):
        values = {
            "ggn_diag": [1.0, 0.2, 0.3, of_random], "snip": [0.2, 1.0, 0.9, of_random],
            "px": [0.3, 0.9, 1.0, of_random], "random": [of_random] * 4,
        }  # fmt: skip
        _write(
            folder / f"{name}.csv",
            [{"scorer": n, **dict(zip(values, v, strict=True))} for n, v in values.items()],
        )
    assert answers(_stored(tmp_path)) == {
        "scorer_atlas": "**Answer.** On Small, the highest retention on held-out tasks is left at "
        "30% sparsity by `snip`, 0.75 (0.75 to 0.75) and at 50% sparsity by `ggn_diag`, 0.25 "
        "(0.25 to 0.25). The paper's score, `ggn_diag`, costs 1.2 forward and backward passes "
        "(FB), the dearest, `random`, 99. At 50% sparsity, masks of two scores share 0.30 of "
        "the weights that either keeps, in the median over pairs; by chance it would be 0.30, "
        "with as many weights kept in each layer.\n"
    }


@pytest.mark.parametrize(
    ("kept", "first"),
    [
        ((0.95, 0.92), "chance up to 30% sparsity on Small."),
        ((0.95, 0.5), "chance up to 10% sparsity on Small."),
        ((0.6, 0.5), "chance nowhere."),
    ],
)
def test_real_data_are_summed_up_by_the_sparsity_up_to_which_enough_is_kept(
    kept: tuple[float, float], first: str, tmp_path: Path
) -> None:
    values = {"ggn_diag": kept, "magnitude": (0.4, 0.2), "random": (0.1, -0.001)}
    rows: list[dict[str, object]] = [
        {"source": "a", "scorer": scorer, "sparsity": s, "retention": r, "low": r, "high": r}
        for scorer, pair in values.items()
        for s, r in zip((0.1, 0.3), pair, strict=True)
    ]
    _write(tmp_path / "real" / "zero_shot_retention-small" / "held_out.csv", rows)
    text = answers(_stored(tmp_path))["real_data"]
    assert text.splitlines()[0].endswith(first)
    assert text.splitlines()[-1] == (
        f"- Small: at 10% and 30% sparsity second-order masks keep {kept[0]:.2f} and "
        f"{kept[1]:.2f}, magnitude ones 0.40 and 0.20 and random ones 0.10 and 0.00."
    )


def test_the_first_page_has_masks_alone_and_with_a_repair(tmp_path: Path) -> None:
    values = {"ggn_diag": (0.95, 0.75), "magnitude": (0.5, 0.25), "random": (0.0, 0.0)}
    rows: list[dict[str, object]] = [
        {"source": source, "scorer": scorer, "sparsity": s, "retention": r + shift,
         "low": 0.0, "high": 1.0}
        for source, shift in (("a", 0.05), ("b", -0.05))
        for scorer, pair in values.items()
        for s, r in zip((0.1, 0.3), pair, strict=True)
    ]  # fmt: skip
    _write(tmp_path / "real" / "zero_shot_retention-small" / "held_out.csv", rows)
    left = [
        {"encoder": ENCODER, "tasks": tasks, "method": method, "sparsity": s, "retention": r,
         "low": r, "high": r}
        for tasks, method, s, r in (
            ("larger", "ours + moments", 0.7, 0.5), ("larger", "ours + moments", 0.5, 0.75),
            ("larger", "ours", 0.5, 0.25), ("embedded", "ours + moments", 0.5, 1.0),
        )
    ]  # fmt: skip
    stored = _stored(tmp_path, repaired=pd.DataFrame(left))
    assert answers(stored)["index"] == (
        "**Answer.** At 10% and 30% sparsity, a second-order mask made on one task keeps, of the "
        "accuracy above chance of tasks that it has not seen, 0.95 and 0.75 on Small. At 50%, "
        "with the surviving weights re-solved, without training and still without these tasks, "
        "it is 0.75 (0.75 to 0.75) on Small.\n"
    )
    assert len(overview(stored)) == 3 * 2 + 2


def test_a_repair_is_set_beside_scores_without_one_and_followed_over_sources(
    tmp_path: Path,
) -> None:
    rows: list[dict[str, object]] = [
        {"source": source, "scorer": "ours", "sparsity": 0.7, "retention": kept}
        for source, kept in (("a+a:altered", 0.75), ("b", 0.25), ("c", 0.5))
    ]
    _write(tmp_path / "retention" / "zero_shot_retention-small" / "held_out.csv", rows)
    left = [
        {"encoder": ENCODER, "tasks": tasks, "method": "ours", "sparsity": 0.7, "retention": kept,
         "low": kept - 0.1, "high": kept + 0.1}
        for tasks, kept in (("embedded", 0.5), ("larger", 0.6))
    ]  # fmt: skip
    best = {"encoder": ENCODER, "sparsity": 0.7, "best here": "ours", "best of six": "snip",
            "of six": 0.05, "best of all": "ggn_diag", "of all": 0.1}  # fmt: skip
    stored = _stored(tmp_path, repaired=pd.DataFrame(left), gains=pd.DataFrame([best]))
    assert answers(stored)["repair"] == (
        "**Answer.** At 70% sparsity, `ours` keeps, of the accuracy above chance of tasks that "
        "neither the score nor the repair has seen, 0.50 (0.40 to 0.60) on Small (0.60 on larger "
        "data sets; without a repair `snip` 0.05, the best of six scores, and `ggn_diag` 0.10, the "
        "best of all). It depends on the source: at 70%, "
        "from 0.25 around b to 0.75 around a on Small.\n"
    )


def test_the_explorer_counts_pairs_with_and_without_a_repair(tmp_path: Path) -> None:
    columns = ["task", "repair", "sparsity", "retention", "scorer"]
    pairs = pd.DataFrame(
        [
            ["held-out", "none", 0.5, 0.1, "a"], ["held-out", "none", 0.5, 0.3, "b"],
            ["held-out", "moments", 0.5, 0.8, "a"], ["held-out", "none", 0.9, 0.0, "a"],
            ["own", "moments", 0.5, 0.9, "a"],
            ["held-out", "none", 0.5, 0.5, "a"], ["held-out", "moments", 0.5, 0.6, "a"],
        ],
        columns=columns,
    ).assign(
        grid="g", backbone=[*"xxxyyxx"], variant=[""] * 5 + ["rounds"] * 2, source="s", target="t"
    )  # fmt: skip
    assert answers(_stored(tmp_path, explorer=pairs))["explorer"] == (
        "**Answer.** There are 7 retentions of 3 runs, 2 encoders and 2 scores. Of masks that are "
        "stored with and without a repair, one of 50% sparsity keeps 0.10 of a held-out task "
        "alone, in the median over 1 of them, and 0.80 with a repair.\n"
    )


def test_recovery_is_told_by_the_claim_and_from_the_masks_of_most_rounds(tmp_path: Path) -> None:
    columns = [
        "encoder", "start", "rounds", "penalty", "chosen", "held-out before", "held-out after",
        "gain", "low", "high",
    ]  # fmt: skip
    table = pd.DataFrame(
        [
            ["Small", "repaired", 1, "none", "yes", 0.5, 0.1, -0.5, -0.6, -0.4],
            ["Small", "repaired", 6, "none", "yes", 0.75, 0.7, -0.01, -0.02, 0.003],
            ["Small", "repaired", 6, "none", "", 0.75, 0.8, 0.02, 0.01, 0.03],
            ["Small", "repaired", 6, "features 30", "yes", 0.75, 0.85, 0.04, -0.01, 0.05],
            ["Small", "pruned", 9, "none", "yes", 0.3, 0.2, -0.5, -0.6, -0.4],
            ["Large", "repaired", 1, "none", "yes", 0.5, 0.4, -0.05, -0.06, -0.04],
        ],
        columns=columns,
    ).assign(tasks="larger", sparsity=0.7)
    claims = pd.DataFrame(
        [["Others", "Small", "in part", "x"], ["This (P2)", "Small", "reproduced", "gain: 1"],
         ["This (P2)", "Large", "in part", "gain: 2"]],
        columns=["claim", "encoder", "verdict", "measured"],
    )  # fmt: skip
    stored = _stored(tmp_path, recovery=table, claims=claims)
    assert answers(stored)["finetune_recovery"] == (
        "**Answer.** That plain fine-tuning recovers unseen tasks: on Small reproduced (gain: 1); "
        "on Large in part (gain: 2).\n\n"
        "From repaired masks, those of most rounds, what is kept of the accuracy of held-out tasks "
        "above chance, before fine-tuning and after it, each at the rate that the source's "
        "validation part chooses; in brackets the change in accuracy, with its 95% interval over "
        "test images:\n\n"
        "- on Large, larger tasks, at 70% sparsity in 1 round: 0.50 before; 0.40 with no penalty "
        "(-0.050, -0.060 to -0.040);\n"
        "- on Small, larger tasks, at 70% sparsity in 6 rounds: 0.75 before; 0.70 with no penalty "
        "(-0.010, -0.020 to +0.003) and 0.85 with the penalty `features 30` (+0.040, -0.010 to "
        "+0.050).\n"
    )


def test_targets_that_are_not_met_are_named(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"target": target, "on": "net", "at most": most, "at least": least, "measured": measured,
         "met": met}
        for target, most, least, measured, met in (
            ("diagonal of the GGN, time in FB", 1.5, None, 1.25, "yes"),
            ("times faster than the fastest correct peer (hooks)", None, 2.5, 2.0, "no"),
            ("first Hessian product, time in FB", 3.1, None, 2.5, "yes"),
            ("further Hessian product, time in FB", 2.1, None, 2.25, "no"),
            ("block_fisher, times faster than the rank-one recursion", None, 10.0, 19.1, "yes"),
        )
    ]  # fmt: skip
    _write(tmp_path / "benchmarks" / "cpu" / "page" / "targets.csv", rows)
    text = answers(_stored(tmp_path))["benchmarks"]
    assert "take 19 times as long" in text
    assert text.endswith(
        "Of 5 targets 3 are met; not met are: times faster than the fastest correct peer (hooks), "
        "on net (2.00, at least 2.50); further Hessian product, time in FB, on net (2.25, at most "
        "2.10).\n"
    )


def test_verdicts_are_counted_and_runs_are_added_up(tmp_path: Path) -> None:
    verdicts = ["reproduced", "in part", "in part", "beyond the paper"]
    judged = pd.DataFrame({"encoder": ENCODER, "verdict": verdicts})
    runs = pd.DataFrame(
        {
            "minutes": [30.0, 90.0],
            "memory, MiB": [512, 1536],
            "started, UTC": ["2026-01-03 09:00", "2026-01-02 10:00"],
        }
    )
    found = answers(_stored(tmp_path, claims=judged, runs=runs))
    assert "On Small, of 3 claims: reproduced 1, in part 2, not reproduced 0." in found["claims"]
    assert "from 2 runs, which took 2.0 hours in all, 90 minutes the longest" in found["status"]
    assert "1.5 GiB of memory. They were started from 2026-01-02 to 2026-01-03." in found["status"]

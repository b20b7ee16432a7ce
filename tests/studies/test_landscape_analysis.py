import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr

import pai_utils as pai
from pai_utils.landscape import predicted_and_measured, pruning_direction
from pai_utils.studies import landscape_analysis as study
from tests.cases import dense_hessian, fingerprint, logistic_regression, tiny_suite, tiny_task


@pytest.fixture
def suite() -> pai.Suite:
    return tiny_suite(digits=tiny_task("digits"), photos=tiny_task("photos", classes=4))


def parameters(**changes: Any) -> study.Parameters:
    given = {
        "backbone": "tiny", "source": "digits", "targets": ["photos"], "samples": 8, "seed": 1,
        "scorers": ["ggn_diag", "magnitude"], "sparsities": [0.3, 0.6], "fractions": [0.5, 1.0],
        "eigenvectors": 2, "out": "out",
    }  # fmt: skip
    return study.Parameters(**{**given, **changes})


def cells(count: int = 4) -> pd.DataFrame:
    """Pairs of tasks at two sparsities.

    "ggn" orders the pairs, "taylor" only the sparsities, and "blocks" is known of some.
    """
    names = [f"task {i}" for i in range(count)]
    rows = [
        dict.fromkeys(study.PREDICTORS, math.nan)
        | {
            "source": one, "target": other, "scorer": "s", "sparsity": sparsity,
            "held_out": one != other, "retention": 1 - sparsity - 0.01 * (i * count + j),
            "ggn": -0.01 * (i * count + j) - 10 * (sparsity - 0.5), "taylor": -sparsity,
            "blocks": float(i) if j else math.nan,
        }
        for sparsity in (0.2, 0.8)
        for i, one in enumerate(names)
        for j, other in enumerate(names)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_correlations_with_transfer_are_pooled_and_within_groups() -> None:
    table = study.transfer_correlations(cells()).set_index("predictor")
    assert list(table.index) == list(study.PREDICTORS)
    held = cells()[lambda t: t.source != t.target]
    assert table.pooled["ggn"] == table.pooled_low["ggn"] == pytest.approx(1)
    assert table.within["ggn"] == pytest.approx(1)
    assert table.pooled["taylor"] == pytest.approx(spearmanr(held.taylor, held.retention).statistic)
    assert math.isnan(table.within["taylor"])
    one = held[(held.sparsity == 0.2) & held.blocks.notna()]
    expected = spearmanr(one.blocks, one.retention).statistic
    assert table.within["blocks"] == pytest.approx(expected)
    # By hand: the variance of a jackknife, and three degrees of freedom of four tasks.
    fewer = [held[(held.source != name) & (held.target != name)] for name in held.target.unique()]
    left = np.array([spearmanr(part.taylor, part.retention).statistic for part in fewer])
    variance = 3 / 4 * ((left - left.mean()) ** 2).sum()
    half = 3.182446 * variance**0.5
    assert table.pooled_low["taylor"] == pytest.approx(max(-1, table.pooled["taylor"] - half))
    known = table.loc[["ggn", "taylor", "blocks", "diagonal"]]
    assert list(known.cells) == [24, 24, 18, 0]
    assert list(known.pairs) == [12, 12, 9, 0]
    assert known.loc["diagonal", ["pooled", "pooled_low", "within"]].isna().all()
    few = study.transfer_correlations(cells(2), ["ggn"])
    assert few.pooled.notna().all()
    assert few.pooled_low.isna().all()


def test_a_landscape_holds_predictions_retention_and_alignment(suite: pai.Suite) -> None:
    config = parameters()
    before = fingerprint(suite.encoder)
    found = study.measure(suite, config, config.recipes, config.fractions)
    assert fingerprint(suite.encoder) == before
    # Of ggn_diag two sources, of magnitude none; two sparsities and targets, two fractions.
    assert len(found.losses) == 3 * 2 * 2 * 2
    assert len(found.cells) == 3 * 2 * 2
    places = found.eigenvalues[["task", "rank"]].itertuples(index=False, name=None)
    assert list(places) == [("digits", 1), ("digits", 2), ("photos", 1), ("photos", 2)]
    cells = found.cells.query("source == 'digits' and target == 'photos' and scorer == 'ggn_diag'")
    cell = cells.set_index("sparsity").loc[0.6]
    assert cell.held_out
    model = suite.classifier("photos")
    one, other = (
        pai.prune(suite.classifier(n), t.train, "ggn_diag", 0.6, samples=8, seed=1).mask
        for n, t in suite.tasks.items()
    )
    assert cell.mask_overlap == pytest.approx(one.overlap(other))
    assert cell.mask_overlap_excess == pytest.approx(
        one.overlap(other) - one.expected_overlap(other)
    )
    alone = predicted_and_measured(
        model, {"v": pruning_direction(model, one)}, suite.tasks["photos"].train, config.draw,
        fractions=[1.0],
    ).iloc[0]  # fmt: skip
    for column in ("taylor", "ggn", "diagonal", "measured"):
        assert cell[column] == pytest.approx(alone[column], rel=1e-4)
    one.apply_(model)
    assert cell.accuracy == pai.evaluate(model, suite.tests["photos"]).accuracy
    own = found.cells[found.cells.source == found.cells.target]
    assert not own.held_out.any()
    assert own[["mask_overlap", "eigenspace_overlap"]].isna().all(axis=None)
    blind = found.cells[found.cells.scorer == "magnitude"]
    assert (blind.source == "none").all()
    assert blind.held_out.all()

    table = study.compared({"given": found, "again": found}, config.close)
    assert list(dict.fromkeys(table.quantity)) == [*study.QUANTITIES.values()]
    values = table[(table.weights == "given") & (table.pair == "digits → photos")]
    by_name = values.set_index("quantity").value
    assert by_name[study.QUANTITIES["measured"]] == cell.measured
    error = abs(cell.measured - cell.taylor) / max(abs(cell.measured), abs(cell.taylor))
    assert by_name[study.QUANTITIES["left_out"]] == pytest.approx(error)


def test_networks_share_a_mask_and_the_repaired_one_is_that_of_prune(suite: pai.Suite) -> None:
    networks = study.networks(suite, parameters(learning_rate=1e-3))
    repaired = pai.prune(
        networks["dense"], suite.tasks["digits"].train, "ggn_diag", 0.6, repair="moments",
        samples=8, seed=1,
    )  # fmt: skip
    pairs = zip(networks["repaired"].parameters(), repaired.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    for name in ("pruned", "fine-tuned"):
        assert not any(
            networks[name].get_parameter(n)[~kept].any() for n, kept in repaired.mask.items()
        )
    losses = {n: pai.evaluate(m, suite.tasks["digits"].train).loss for n, m in networks.items()}
    assert losses["dense"] < losses["fine-tuned"] < losses["pruned"]


def test_spectra_of_a_quadratic_loss_are_its_eigenvalues() -> None:
    model, data = logistic_regression()
    hessian = dense_hessian(model, ["1.weight"], data)
    values = torch.linalg.eigvalsh(hessian)
    config = parameters(spectrum_samples=None, probes=6, lanczos_steps=36)
    summary, density = study.spectra({"here": model}, data, config)
    row = summary.iloc[0]
    assert row.largest == pytest.approx(float(values[-1]), rel=1e-8)
    assert row.smallest == pytest.approx(float(values[0]), abs=1e-8)
    # Signs as start vectors: each probe's estimate is Hutchinson's.
    off = hessian - hessian.diag().diag()
    error = math.sqrt(2 * float(off.square().sum()) / 6)
    assert abs(row.trace - float(values.sum())) < 4 * error
    assert 0.2 * error < row.trace_standard_error < 3 * error
    integral = np.trapezoid(density.density, density.eigenvalue)
    assert integral == pytest.approx(1, abs=1e-6)
    assert set(density.name) == {"here"}


def test_barriers_are_above_the_line_between_the_ends() -> None:
    path = pd.DataFrame({"position": [0, 0.5, 1, 1.5, 2], "loss": [1.0, 4.0, 3.0, 1.0, 2.0]})
    path = path.assign(segment=["a → b"] * 3 + ["b → c"] * 2, task="t")
    found = study.barriers(path)
    assert found.to_dict("records") == [
        {"segment": "a → b", "task": "t", "start": 1, "end": 3, "barrier": 2},
        {"segment": "b → c", "task": "t", "start": 3, "end": 2, "barrier": 0},
    ]
    path.loc[4, "loss"] = math.inf
    assert study.barriers(path).barrier.isna().tolist() == [False, True]

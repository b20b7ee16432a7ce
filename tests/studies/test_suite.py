from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import pai_utils as pai
from pai_utils.masks import Mask
from pai_utils.pruning import Recipe
from pai_utils.studies.parameters import combine
from pai_utils.studies.suite import SweepMask, sweep
from pai_utils.studies.zero_shot_retention import Parameters
from pai_utils.support.sampling import Draw
from tests.cases import fingerprint, tiny_dataset, tiny_suite, tiny_task

DRAW = Draw(8, 64, 0)


@pytest.fixture
def suite() -> pai.Suite:
    return tiny_suite(
        first=tiny_task("first", classes=2), second=tiny_task("second"), third=tiny_task("third")
    )


def test_a_suite_is_loaded_from_a_notebooks_parameters_and_without_pre_training() -> None:
    config = Parameters(
        backbone="efficientnet_lite0", image_size=32, train_size=60, test_size=20, device="cpu",
        source="digits+noise", targets=["photos"], scorers=["snip"], sparsities=[0.5], seeds=[0],
        out="results", seed=3,
    )  # fmt: skip
    suite = pai.Suite.load(config)
    assert list(suite.tasks) == list(suite.heads) == ["digits", "photos"]
    assert {len(test) for test in suite.tests.values()} == {20}
    assert suite.encoder.image_size == 32
    head = pai.fit_head(suite.encoder, suite.tasks["photos"])
    torch.testing.assert_close(suite.heads["photos"].weight, head.weight)
    untrained = suite.untrained(seed=3)
    blank = pai.load_backbone("efficientnet_lite0", 32, "cpu", pretrained=False, seed=3)
    for one, other in zip(untrained.encoder.parameters(), blank.parameters(), strict=True):
        assert torch.equal(one, other)
    assert untrained.tasks is suite.tasks


def test_a_source_comes_with_the_labels_and_head_of_its_first_task(suite: pai.Suite) -> None:
    own, mixture, noise = map(suite.source, ("first", "noise+first:altered+second", "noise"))
    assert own.images is own.labelled is mixture.labelled is suite.tasks["first"].train
    assert own.head is mixture.head is suite.heads["first"]
    assert len(mixture.images) == 3 * 30
    assert (len(noise.images), noise.head, noise.labelled) == (512, None, None)


def test_random_labels_are_a_permutation_with_a_head_of_their_own(suite: pai.Suite) -> None:
    source = suite.source("first:random_labels", seed=1)
    assert source.labelled is not None
    assert source.head is not None
    true = suite.tasks["first"].train
    assert torch.equal(source.labelled.images, true.images)
    assert not torch.equal(source.labelled.labels, true.labels)
    assert torch.equal(source.labelled.labels.sort().values, true.labels.sort().values)
    assert not torch.equal(source.head.weight, suite.heads["first"].weight)


def test_fine_tuning_leaves_the_encoder_and_lowers_the_loss(suite: pai.Suite) -> None:
    before, data = fingerprint(suite.encoder), suite.tasks["first"].train
    tuned = suite.fine_tuned(suite.encoder, "first", None, steps=30, learning_rate=1e-2)
    assert fingerprint(suite.encoder) == before
    assert pai.evaluate(tuned, data).loss < 0.8 * pai.evaluate(suite.classifier("first"), data).loss


@pytest.mark.parametrize(
    ("scorer", "repair", "scored", "repaired"),
    [
        ("feature_ggn_diag", "moments", "all", "all"),
        ("snip", "moments", "labelled", "all"),
        ("feature_ggn_diag", "obs", "all", "labelled"),
    ],
)
def test_pruning_looks_at_the_images_that_suit_scorer_and_repair(
    suite: pai.Suite, scorer: str, repair: str, scored: str, repaired: str
) -> None:
    source = suite.source("first+noise")
    parts: dict[str, Any] = {"all": source.images, "labelled": source.labelled}
    recipe = Recipe(scorer, 0.5, repair=repair)
    draw = Draw(len(source.images))  # more than the first task has, and then all of it
    encoder, mask = suite.prune(recipe, source, draw)
    expected: Any = pai.prune(
        suite.classifier("first"), parts[scored], scorer, 0.5, samples=len(parts[scored]),
        repair=repair, repair_data=parts[repaired],
    )  # fmt: skip
    scores = suite.score(recipe, source, draw)
    for found in (mask, suite.prune(recipe, source, draw, scores=scores)[1]):
        assert all(torch.equal(found[name], keep) for name, keep in expected.mask.items())
    wanted = expected.model.backbone.parameters()
    assert all(map(torch.equal, encoder.parameters(), wanted))
    assert mask.metadata["source"] == "first+noise"


def test_a_sweep_has_a_row_for_each_cell_and_leaves_encoder_and_heads(suite: pai.Suite) -> None:
    before = [fingerprint(module) for module in (suite.encoder, *suite.heads.values())]
    masks: list[SweepMask] = []
    table = sweep(
        suite, ["first", "second"], combine(["ggn_diag", "magnitude", "random"], [0.3, 0.6]), DRAW,
        seeds=[0, 1], observe=masks.append,
    )  # fmt: skip
    assert [fingerprint(m) for m in (suite.encoder, *suite.heads.values())] == before
    assert list(table.columns) == [
        "target", "source", "scorer", "sparsity", "seed", "accuracy", "loss", "count", "chance",
        "correct",
    ]  # fmt: skip
    assert table.groupby(["scorer", "source"]).size().to_dict() == {
        ("dense", "none"): 3,
        ("ggn_diag", "first"): 2 * 2 * 3,
        ("ggn_diag", "second"): 2 * 2 * 3,
        ("magnitude", "none"): 2 * 3,
        ("random", "none"): 2 * 2 * 3,
    }
    for row in table.to_dict("records"):
        assert row["accuracy"] == np.mean(row["correct"])
        assert row["chance"] == pytest.approx(1 / 2 if row["target"] == "first" else 1 / 3)
    dense: Any = table[table.scorer == "dense"].set_index("target")
    for name, task in suite.tasks.items():
        assert dense.accuracy[name] == pai.evaluate(suite.classifier(name), task.test).accuracy
    assert len(masks) == 2 * (4 + 1 + 2)
    assert masks[0].mask.sparsity == pytest.approx(0.3, abs=0.01)
    assert (masks[-1].recipe.scorer, masks[-1].source, masks[-1].seed) == ("random", "none", 1)


@pytest.mark.parametrize("rounds", [1, 3])
def test_rows_are_those_of_the_pruned_and_repaired_classifier(
    suite: pai.Suite, rounds: int
) -> None:
    options = {"samples": 16}
    recipes = combine(
        ["snip", "magnitude"], [0.6, 0.2], ["none", "layerwise+moments"],
        rounds=rounds, repair_options=options,
    )  # fmt: skip
    table = sweep(suite, ["first", "second"], recipes, replace(DRAW, seed=3))
    rows = table[table.scorer != "dense"]
    # A mask that looked at no data is repaired on both sources.
    assert rows.groupby(["scorer", "source"]).size().to_dict() == {
        ("magnitude", "none"): 6,
        **{
            (scorer, source): 6
            for scorer in ("snip", "snip + layerwise+moments", "magnitude + layerwise+moments")
            for source in ("first", "second")
        },
    }
    for (source, label, sparsity), group in rows.groupby(["source", "scorer", "sparsity"]):
        scorer, _, repair = str(label).partition(" + ")
        place = "first" if source == "none" else str(source)
        model: Any = pai.prune(
            suite.classifier(place), suite.tasks[place].train, scorer, float(str(sparsity)),
            rounds=rounds, repair=repair or "none", repair_options=options, samples=8, seed=3,
        ).model  # fmt: skip
        for target, found in suite.evaluate(model.backbone).items():
            row = group[group.target == target].iloc[0]
            assert row.accuracy == found.accuracy
            assert row.loss == pytest.approx(found.loss, rel=1e-6)


@pytest.mark.parametrize("source", ["first", "first+noise", "noise"])
def test_a_mask_depends_on_the_training_part_of_its_source_alone(
    suite: pai.Suite, source: str
) -> None:
    def masks(suite: pai.Suite) -> list[Mask]:
        found: list[SweepMask] = []
        recipes = combine(["feature_ggn_diag", "random"], [0.5], ["none", "layerwise"], rounds=2)
        sweep(suite, [source], recipes, DRAW, observe=found.append)
        return [step.mask for step in found]

    first, third = (
        replace(suite.tasks[name], validation=tiny_dataset(9, 2, 7), test=tiny_dataset(9, 2, 8))
        for name in ("first", "third")
    )
    others = {"first": first, "third": replace(third, train=tiny_dataset(30, 2, 9))}
    pairs = zip(masks(suite), masks(replace(suite, tasks=others)), strict=True)
    assert all(torch.equal(one[name], other[name]) for one, other in pairs for name in one)


@pytest.mark.parametrize(
    ("source", "recipe", "message"),
    [
        ("first", {"rounds": 0}, "rounds=0"),
        ("first", {"repair": "obs", "repair_options": {"damping": 0}}, "damping=0 must be"),
        ("frist", {}, "unknown source 'frist'; did you mean 'first'"),
        ("noise", {}, r"'ggn_diag' needs a task's head, and source 'noise' has none"),
        ("noise", {"scorer": "magnitude", "repair": "obs"}, "'obs' needs labels, and source"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(
    suite: pai.Suite, source: str, recipe: dict[str, Any], message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(
        "pai_utils.studies.suite.progress", lambda *_, **__: pytest.fail("ran first")
    )
    with pytest.raises(ValueError, match=message):
        sweep(suite, [source], [Recipe(**recipe)], DRAW)

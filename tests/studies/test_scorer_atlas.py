import numpy as np
import pytest
import torch
from torch import Tensor

import pai_utils as pai
from pai_utils.evaluation import held_out_retention
from pai_utils.pruning import Recipe
from pai_utils.scorers import Scores
from pai_utils.studies import scorer_atlas as study
from pai_utils.studies.suite import SweepMask
from tests.cases import tiny_suite, tiny_task


def step(
    kept: list[bool], scorer: str = "snip", source: str = "first", seed: int = 0,
    sparsity: float = 0.5, seconds: float = 1.0,
) -> SweepMask:  # fmt: skip
    entry: Tensor = torch.tensor(kept)
    mask = pai.Mask({"backbone.encoder.a": entry[:2], "backbone.encoder.b": entry[2:]})
    scores = Scores({"a": entry.double()}, scorer, seconds=seconds)
    return SweepMask(Recipe(scorer, sparsity), source, seed, scores, mask)


def collected(*steps: SweepMask) -> study.Atlas:
    atlas = study.Atlas(0.5)
    for each in steps:
        atlas(each)
    return atlas


A = [True, True, False, False]
B = [True, False, True, False]


def test_overlaps_between_scorers_are_means_over_the_same_sources() -> None:
    snip, px = [step(A), step(A, source="second")], [step(A, "px"), step(B, "px", "second")]
    atlas = collected(*snip, *px, step(B, "random", "none"))
    overlap, chance = atlas.between_scorers()
    assert list(overlap) == list(overlap.index) == ["snip", "px", "random"]
    # Of A and B one weight is kept by both and three by either.
    assert overlap.loc["snip", "px"] == pytest.approx((1 + 1 / 3) / 2)
    assert overlap.loc["snip", "random"] == pytest.approx(1 / 3)
    assert overlap.loc["px", "random"] == pytest.approx((1 / 3 + 1) / 2)
    assert (overlap.to_numpy() == overlap.to_numpy().T).all()
    assert (np.diag(overlap) == 1).all()
    one, other = (atlas.masks["snip", "first", 0], atlas.masks["random", "none", 0])
    assert chance.loc["snip", "random"] == pytest.approx(one.expected_overlap(other))


def test_draws_differ_between_sources_and_between_seeds() -> None:
    atlas = collected(
        step(A),
        step(B, source="second"),
        step(A, seed=1),
        step(B, source="second", seed=1),  # neither the first source nor the first seed
        step(A, "magnitude", "none"),
    )
    assert len(atlas.masks) == 4
    draws = atlas.between_draws().set_index(["scorer", "between"])
    assert draws.overlap.to_dict() == {
        ("snip", "sources"): pytest.approx(1 / 3),
        ("snip", "seeds"): pytest.approx(1),
    }
    assert (draws.pairs == 1).all()


def test_the_atlas_follows_a_sweep() -> None:
    suite = tiny_suite(digits=tiny_task("digits", classes=2), photos=tiny_task("photos"))
    config = study.Parameters(
        backbone="tiny", sources=["digits", "photos"], scorers=["snip", "synflow", "random"],
        sparsities=[0.3, 0.5], seeds=[0, 1], samples=8, out="o",
    )  # fmt: skip
    table, atlas = study.run(suite, config)
    assert list(atlas.masks) == [
        ("snip", "digits", 0), ("snip", "digits", 1), ("snip", "photos", 0),
        ("synflow", "none", 0), ("random", "none", 0), ("random", "none", 1),
    ]  # fmt: skip
    assert all(mask.sparsity == pytest.approx(0.5, abs=0.01) for mask in atlas.masks.values())
    train = suite.tasks["photos"].train
    pruned = pai.prune(suite.classifier("photos"), train, "snip", 0.5, samples=8)
    for name, entry in atlas.masks["snip", "photos", 0].items():
        assert torch.equal(entry, pruned.mask[name])
    assert set(atlas.distributions) == {"snip", "synflow", "random"}

    left = study.accuracy_left(table, config.sources).set_index(["scorer", "sparsity", "tasks"])
    assert len(left) == 3 * 2 * 2
    for tasks, own in (("source", True), ("held-out", False)):
        rows = held_out_retention(table, config.sources, own=own)
        rows = rows[(rows.scorer == "snip") & (rows.sparsity == 0.5)]
        assert left.retention["snip", 0.5, tasks] == pytest.approx(rows.retention.mean())
    assert left.low.le(left.retention + 1e-9).all()
    assert left.retention.le(left.high + 1e-9).all()

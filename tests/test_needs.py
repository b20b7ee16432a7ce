"""What runs have in common: foreseen from their parameters, made once, and found by the runs."""

import json
from pathlib import Path
from typing import Any

import pytest

import pai_utils as pai
from pai_utils.needs import Need, make, needs
from pai_utils.studies import zero_shot_retention
from pai_utils.studies.parameters import EncoderParameters, RunParameters, read_parameters
from pai_utils.support import cache
from pai_utils.support.cache import keeping, used_files

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


def _config(notebook: str, **values: Any) -> RunParameters:
    return read_parameters(NOTEBOOKS / f"{notebook}.ipynb", values)


def _listed(config: RunParameters, kind: str) -> list[tuple[str, str, int, int | None]]:
    return [(n.source, n.scorer, n.seed, n.samples) for n in needs(config) if n.kind == kind]


def test_everything_made_is_what_a_run_then_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAI_SHARED", str(tmp_path))
    monkeypatch.setattr(cache, "_used", {})
    config = _config(
        "zero_shot_retention",
        source=["digits", "photos+noise", "leaves"],
        targets=["digits", "photos"],
        scorers=["feature_ggn_diag", "magnitude"],
        sparsities=[0.5],
        seeds=[0],
        samples=8,
        train_size=60,
        test_size=40,
    )
    assert isinstance(config, zero_shot_retention.Parameters)
    made = set()
    for need in needs(config):
        with keeping() as names:
            make(need)
        made |= set(names)
    cache._used.clear()

    suite = pai.Suite.load(config)
    zero_shot_retention.protocol_gap(suite)
    zero_shot_retention.run(suite, config)
    read = set(used_files())
    # Features of training images serve to make the heads.
    left = made - read
    assert sorted(name.split("-")[0] for name in left) == ["features", "features"]
    assert sum(name.startswith("scores") for name in read) == 3


def test_seeds_and_scorers_that_look_at_no_data_are_not_listed_twice() -> None:
    config = _config(
        "zero_shot_retention",
        source=["digits", "photos"],
        targets=["digits", "photos"],
        scorers=["fisher_diag", "px", "magnitude", "random"],
        seeds=[0, 1],
        samples=8,
    )
    listed = _listed(config, "scores")
    expected = [
        (source, scorer, seed, 8)
        for scorer in ("fisher_diag", "px")
        for source in ("digits", "photos")
        for seed in ((0, 1) if pai.SCORERS[scorer].seeded else (0,))
    ]
    assert listed == expected


def test_the_atlas_measures_scores_and_so_shares_none() -> None:
    config = _config("scorer_atlas")
    assert not _listed(config, "scores")
    assert _listed(config, "head")


@pytest.mark.parametrize(
    ("notebook", "values", "scores"),
    [
        ("prune_per_task", {"sources": ["digits", "photos"], "scorers": ["snip", "random"]}, 2),
        ("landscape_analysis", {"targets": ["photos"], "scorers": ["ggn_diag", "magnitude"]}, 2),
        ("finetune_recovery", {"source": "digits", "prune_by": None, "seeds": [0, 1]}, 2),
        ("finetune_recovery", {"source": "digits", "prune_by": "noise+digits"}, 0),
        ("prune_your_own", {"scorers": ["snip", "px", "magnitude"], "prune_by": None}, 2),
        ("prune_your_own", {"scorers": ["snip"], "prune_by": "photos+noise"}, 1),
    ],
)
def test_each_notebook_lists_its_scores(notebook: str, values: dict[str, Any], scores: int) -> None:
    assert len(_listed(_config(notebook, **values), "scores")) == scores


def test_a_notebook_without_an_encoder_shares_nothing() -> None:
    assert needs(_config("worked_examples")) == []


def test_names_tell_needs_apart_and_say_what_they_are() -> None:
    small = _config("prune_per_task", scorers=["snip"], sources=["digits", "photos"])
    other = _config("prune_per_task", scorers=["snip"], sources=["digits", "photos"], seed=1)
    names = [need.name for config in (small, other) for need in needs(config)]
    assert len(set(names)) == len(names)
    assert any(name.startswith("efficientnet_lite0-digits-snip-") for name in names)
    # The test images are of no matter to what is made of training images.
    less = _config("prune_per_task", scorers=["snip"], sources=["digits", "photos"], test_size=50)
    assert [need.name for need in needs(less)] == [need.name for need in needs(small)]


def test_scores_are_made_from_heads_and_heads_from_features() -> None:
    config = _config("prune_per_task", scorers=["snip"], sources=["digits", "photos"])
    listed = needs(config)
    names = {need.name for need in listed}
    for need in listed:
        assert {before.name for before in need.before} <= names
    kinds = {need.kind: [before.kind for before in need.before] for need in listed}
    assert kinds == {"features": [], "head": ["features"], "scores": ["head"]}


def test_a_notebook_without_a_list_is_refused() -> None:
    config = EncoderParameters(backbone="efficientnet_lite0", out="x")
    with pytest.raises(ValueError, match="no list of needs for EncoderParameters"):
        needs(config)


def test_a_need_survives_json() -> None:
    need = needs(_config("scorer_atlas"))[0]
    assert Need(**json.loads(json.dumps(need.parameters))) == need

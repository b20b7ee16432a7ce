"""Sources of a mask, and sweeps over them."""

import pytest
import torch

import pai_utils as pai
from pai_utils.data.mixtures import load_mixture
from pai_utils.evaluation import held_out_retention
from pai_utils.studies.suite import load_source, prune_source
from pai_utils.studies.sweeps import retention_sweep
from tests.cases import tiny_backbone, tiny_task

TASKS = {
    "spots": tiny_task("spots", train=30),
    "dots": tiny_task("dots", train=20),
    "rings": tiny_task("rings", train=24),
}


def test_a_task_is_its_own_source() -> None:
    heads = {name: pai.fit_head(tiny_backbone(), task) for name, task in TASKS.items()}
    source = load_source("spots", tiny_backbone(), TASKS, heads)
    assert source.images is TASKS["spots"].train
    assert source.labelled is TASKS["spots"].train
    assert source.head is heads["spots"]


def test_a_mixture_comes_with_the_labels_and_head_of_its_first_task() -> None:
    backbone = tiny_backbone()
    heads = {name: pai.fit_head(backbone, task) for name, task in TASKS.items()}
    for name, first in (("leaves+spots+dots", "spots"), ("dots:altered", "dots")):
        source = load_source(name, backbone, TASKS, heads, seed=3)
        training = {known: task.train for known, task in TASKS.items()}
        expected = load_mixture(name, training, backbone.transform, seed=3)
        assert torch.equal(source.images.images, expected.images)
        assert source.labelled is TASKS[first].train
        assert source.head is heads[first]


def test_images_alone_come_without_a_head() -> None:
    source = load_source("noise", tiny_backbone(), TASKS, {}, count=7)
    assert len(source.images) == 7
    assert source.head is None
    assert source.labelled is None


def test_random_labels_are_a_permutation_with_a_head_of_their_own() -> None:
    backbone = tiny_backbone()
    heads = {name: pai.fit_head(backbone, task) for name, task in TASKS.items()}
    source = load_source("spots:random_labels", backbone, TASKS, heads, seed=1)
    assert source.labelled is not None
    assert source.head is not None
    true = TASKS["spots"].train
    assert torch.equal(source.labelled.images, true.images)
    assert not torch.equal(source.labelled.labels, true.labels)
    assert torch.equal(source.labelled.labels.sort().values, true.labels.sort().values)
    assert not torch.equal(source.head.weight, heads["spots"].weight)


def test_a_sweep_over_mixed_sources() -> None:
    backbone = tiny_backbone()
    heads = {name: pai.fit_head(backbone, task) for name, task in TASKS.items()}
    sources = ["spots", "spots+noise", "spots:random_labels"]
    table = retention_sweep(
        backbone, TASKS, heads, sources, scorers=["feature_ggn_diag", "fisher_diag"],
        sparsities=[0.5], seeds=[0], samples=10, repairs=["none", "moments"],
        repair_options={"samples": 12},
    )  # fmt: skip
    pruned = table[table.scorer != "dense"]
    assert set(pruned.groupby(["source", "scorer"]).size()) == {len(TASKS)}
    assert len(pruned) == len(sources) * 2 * 2 * len(TASKS)
    summary = held_out_retention(table, sources)
    assert set(summary[summary.scorer != "dense"].tasks) == {2}
    # A scorer that needs labels looks at the task's own images, whatever else is in the source.
    fisher = pruned[pruned.scorer == "fisher_diag"].groupby("source").accuracy.apply(list)
    assert fisher["spots"] == fisher["spots+noise"]


@pytest.mark.parametrize(
    ("scorer", "repair", "scored", "repaired"),
    [
        ("feature_ggn_diag", "moments", "all", "all"),
        ("snip", "moments", "labelled", "all"),
        ("feature_ggn_diag", "obs", "all", "labelled"),
    ],
)
def test_pruning_looks_at_the_images_that_suit_scorer_and_repair(
    scorer: str, repair: str, scored: str, repaired: str
) -> None:
    backbone = tiny_backbone()
    heads = {name: pai.fit_head(backbone, task) for name, task in TASKS.items()}
    source = load_source("spots+noise", backbone, TASKS, heads)
    assert source.labelled is not None
    assert source.head is not None
    parts = {"all": source.images, "labelled": source.labelled}
    model = pai.Classifier(backbone, source.head)
    samples = len(source.images)  # more than the first task has, and then all of it
    found = prune_source(scorer, model, source, 0.5, samples=samples, repair=repair)
    expected = pai.prune(
        model, parts[scored], scorer, 0.5, samples=len(parts[scored]),
        repair=repair, repair_data=parts[repaired],
    )  # fmt: skip
    assert all(torch.equal(found.mask[name], keep) for name, keep in expected.mask.items())
    for one, other in zip(found.model.parameters(), expected.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert found.mask.metadata["source"] == "spots+noise"


def test_no_source_is_pruned_on_for_a_task_it_holds_out() -> None:
    backbone = tiny_backbone()
    heads = {name: pai.fit_head(backbone, task) for name, task in TASKS.items()}
    options = {"samples": 10, "seeds": [0], "sparsities": [0.5]}
    only = {name: TASKS[name] for name in ("spots", "rings")}
    for source in ("spots+leaves", "leaves"):
        with_all, without = (
            retention_sweep(
                backbone, tasks, heads, [source], scorers=["feature_ggn_diag"],
                repairs=["none", "layerwise+moments"], **options,  # type: ignore[arg-type]
            )
            for tasks in (TASKS, only)
        )  # fmt: skip
        keys = ["scorer", "target"]
        kept = with_all[with_all.target != "dots"].set_index(keys).loss
        assert kept.equals(without.set_index(keys).loss)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scorers": ["ggn_diag"]}, r"'ggn_diag' needs a task's head, and source 'noise' has none"),
        (
            {"scorers": ["feature_ggn_diag"], "repairs": ["obs"]},
            "'obs' needs labels, and source 'noise' has none",
        ),
        ({"scorers": ["magnitude"], "sources": ["noize"]}, "unknown source 'noize'"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_at_once(
    options: dict[str, list[str]], message: str
) -> None:
    backbone = tiny_backbone()
    heads = {name: pai.fit_head(backbone, task) for name, task in TASKS.items()}
    sources = options.pop("sources", ["noise"])
    with pytest.raises(ValueError, match=message):
        retention_sweep(backbone, TASKS, heads, sources, **options)  # type: ignore[arg-type]

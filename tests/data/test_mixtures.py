"""What a mask is computed on."""

import pytest
import torch

import pai_utils as pai
from pai_utils.data.images import ImageTransform
from pai_utils.data.mixtures import IMAGE_SETS, is_held_out, load_images, source_parts
from pai_utils.evaluation import held_out_retention
from pai_utils.studies.suite import load_source, prune_source
from pai_utils.studies.sweeps import retention_sweep
from tests.cases import tiny_backbone, tiny_task

TRANSFORM = ImageTransform(16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
TASKS = {
    "spots": tiny_task("spots", train=30),
    "dots": tiny_task("dots", train=20),
    "rings": tiny_task("rings", train=24),
}


@pytest.mark.parametrize("name", IMAGE_SETS)
def test_images_of_no_task_are_seeded_varied_and_unlabelled(name: str) -> None:
    images, again, other = (load_images(name, TRANSFORM, count=6, seed=seed) for seed in (1, 1, 2))
    assert images.images.shape == (6, 3, 16, 16)
    assert (images.labels == -1).all()
    assert torch.equal(images.images, again.images)
    assert not torch.equal(images.images, other.images)
    flat = images.images.float().flatten(1)
    assert (flat.std(1) > 4).all()
    assert (torch.pdist(flat) > 0).all()


def test_one_photograph_is_one_of_two() -> None:
    one, two = (IMAGE_SETS[name].make for name in ("one_photograph", "photographs"))
    import numpy as np

    first, both = (make(4, np.random.default_rng(0)) for make in (one, two))
    assert np.array_equal(first[0], both[0])
    assert not np.array_equal(first[1], both[1])


def test_a_task_is_its_own_source() -> None:
    heads = {name: pai.fit_head(tiny_backbone(), task) for name, task in TASKS.items()}
    source = load_source("spots", tiny_backbone(), TASKS, heads)
    assert source.images is TASKS["spots"].train
    assert source.labelled is TASKS["spots"].train
    assert source.head is heads["spots"]


def test_parts_are_pooled_in_equal_numbers_without_labels() -> None:
    backbone = tiny_backbone()
    heads = {name: pai.fit_head(backbone, task) for name, task in TASKS.items()}
    source = load_source("spots+leaves+dots", backbone, TASKS, heads, seed=3)
    assert len(source.images) == 3 * 20
    assert (source.images.labels == -1).all()
    assert source.labelled is TASKS["spots"].train
    assert source.head is heads["spots"]
    # Every training image of the smallest task, and as many of the larger one.
    for part, task in ((source.images.images[:20], "spots"), (source.images.images[40:], "dots")):
        known = {image.numpy().tobytes() for image in TASKS[task].train.images}
        found = {image.numpy().tobytes() for image in part}
        assert len(found) == 20
        assert found <= known


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


def test_altered_copies_are_of_the_tasks_images_but_none_of_them() -> None:
    backbone = tiny_backbone()
    heads = {name: pai.fit_head(backbone, task) for name, task in TASKS.items()}
    source, again = (
        load_source("dots:altered", backbone, TASKS, heads, seed=seed) for seed in (2, 2)
    )
    assert torch.equal(source.images.images, again.images.images)
    assert source.labelled is TASKS["dots"].train
    assert source.head is heads["dots"]
    true = {image.numpy().tobytes() for image in TASKS["dots"].train.images}
    assert not true & {image.numpy().tobytes() for image in source.images.images}
    both = load_source("dots+dots:altered", backbone, TASKS, heads, seed=2)
    assert len(both.images) == 2 * len(TASKS["dots"].train)


def test_what_a_source_saw_is_not_held_out() -> None:
    assert is_held_out("dots", "spots+leaves")
    assert not is_held_out("spots", "spots+leaves")
    assert not is_held_out("dots", "spots+dots")
    assert not is_held_out("spots", "spots:random_labels")
    assert not is_held_out("spots", "dots+spots:altered")
    assert not is_held_out("folder:a+b", "folder:a+b")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("spot", r"unknown source 'spot'.*spots"),
        ("spots+leafs", r"unknown source 'leafs'.*leaves"),
        ("spots:random", r"unknown source 'spots:random'"),
        ("spots+spots", r"'spots\+spots' names a part twice"),
    ],
)
def test_an_impossible_source_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        source_parts(name, TASKS)


def test_impossible_images_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown image set 'photo'"):
        load_images("photo", TRANSFORM)
    with pytest.raises(ValueError, match="count=0: at least one image"):
        load_images("noise", TRANSFORM, count=0)


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

from typing import Any

import pytest
import torch

import pai_utils as pai
from pai_utils.finetuning import Training
from pai_utils.pruning import Recipe
from pai_utils.studies.zero_shot_retention import Parameters
from pai_utils.support.sampling import Draw
from tests.cases import fingerprint, tiny_suite, tiny_task


@pytest.fixture(scope="module")
def suite() -> pai.Suite:
    return tiny_suite(
        spots=tiny_task("spots", train=30), dots=tiny_task("dots", train=20),
        rings=tiny_task("rings", train=24),
    )  # fmt: skip


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
    own, mixture, noise = map(suite.source, ("spots", "noise+spots:altered+dots", "noise"))
    assert own.images is own.labelled is mixture.labelled is suite.tasks["spots"].train
    assert own.head is mixture.head is suite.heads["spots"]
    assert len(mixture.images) == 3 * 20
    assert (len(noise.images), noise.head, noise.labelled) == (512, None, None)


def test_random_labels_are_a_permutation_with_a_head_of_their_own(suite: pai.Suite) -> None:
    source = suite.source("spots:random_labels", seed=1)
    assert source.labelled is not None
    assert source.head is not None
    true = suite.tasks["spots"].train
    assert torch.equal(source.labelled.images, true.images)
    assert not torch.equal(source.labelled.labels, true.labels)
    assert torch.equal(source.labelled.labels.sort().values, true.labels.sort().values)
    assert not torch.equal(source.head.weight, suite.heads["spots"].weight)


def test_fine_tuning_leaves_the_encoder_and_lowers_the_loss(suite: pai.Suite) -> None:
    before, data = fingerprint(suite.encoder), suite.tasks["spots"].train
    training = Training(30, 1e-2, 32, "adam", "linear")
    tuned = suite.fine_tuned(suite.encoder, "spots", None, training)
    assert fingerprint(suite.encoder) == before
    assert pai.evaluate(tuned, data).loss < 0.8 * pai.evaluate(suite.classifier("spots"), data).loss


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
    source = suite.source("spots+noise")
    parts: dict[str, Any] = {"all": source.images, "labelled": source.labelled}
    recipe = Recipe(scorer, 0.5, repair=repair)
    draw = Draw(len(source.images))  # more than the first task has, and then all of it
    encoder, mask = suite.prune(recipe, source, draw)
    expected: Any = pai.prune(
        suite.classifier("spots"), parts[scored], scorer, 0.5, samples=len(parts[scored]),
        repair=repair, repair_data=parts[repaired],
    )  # fmt: skip
    scores = suite.score(recipe, source, draw)
    for found in (mask, suite.prune(recipe, source, draw, scores=scores)[1]):
        assert all(torch.equal(found[name], keep) for name, keep in expected.mask.items())
    wanted = expected.model.backbone.parameters()
    assert all(map(torch.equal, encoder.parameters(), wanted))
    assert mask.metadata["source"] == "spots+noise"

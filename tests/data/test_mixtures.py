import pytest
import torch

from pai_utils.data.images import ImageTransform
from pai_utils.data.mixtures import IMAGE_SETS, is_held_out, load_mixture, source_parts
from tests.cases import SIDE, tiny_task

TRANSFORM = ImageTransform(SIDE, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
TASKS = {
    name: tiny_task(name, train=count).train
    for name, count in (("spots", 30), ("dots", 20), ("rings", 24))
}


def pictures(images: torch.Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


@pytest.mark.parametrize("name", IMAGE_SETS)
def test_images_of_no_task_are_seeded_varied_and_unlabelled(name: str) -> None:
    images, again, other = (
        load_mixture(name, {}, TRANSFORM, count=6, seed=seed) for seed in (1, 1, 2)
    )
    assert images.images.shape == (6, 3, SIDE, SIDE)
    assert (images.labels == -1).all()
    assert torch.equal(images.images, again.images)
    assert not torch.equal(images.images, other.images)
    flat = images.images.float().flatten(1)
    assert (flat.std(1) > 4).all()
    assert (torch.pdist(flat) > 0).all()


def test_parts_are_pooled_in_equal_numbers_without_labels() -> None:
    mixture = load_mixture("spots+leaves+dots", TASKS, TRANSFORM, seed=3)
    assert len(mixture) == 3 * 20
    assert (mixture.labels == -1).all()
    # Every training image of the smallest task, and as many of the larger one.
    assert pictures(mixture.images[40:]) == pictures(TASKS["dots"].images)
    assert len(pictures(mixture.images[:20])) == 20
    assert pictures(mixture.images[:20]) < pictures(TASKS["spots"].images)
    assert len(load_mixture("leaves+noise", TASKS, TRANSFORM, count=7)) == 14


def test_altered_copies_are_none_of_the_tasks_images() -> None:
    one, again, other = (
        load_mixture("dots:altered", TASKS, TRANSFORM, seed=seed) for seed in (2, 2, 3)
    )
    assert len(one) == len(TASKS["dots"])
    assert torch.equal(one.images, again.images)
    assert not torch.equal(one.images, other.images)
    assert not pictures(TASKS["dots"].images) & pictures(one.images)


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
    with pytest.raises(ValueError, match="samples=0: at least one"):
        load_mixture("noise", {}, TRANSFORM, count=0)

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from pai_utils.data.datasets import check_task_name
from pai_utils.data.images import ImageDataset, ImageTransform
from pai_utils.data.tasks import load_task

TRANSFORM = ImageTransform(16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def pictures(data: ImageDataset) -> set[bytes]:
    return {image.numpy().tobytes() for image in data.images}


# --- what sizes and seeds choose ---


def test_the_seed_draws_the_subset_and_nothing_else() -> None:
    full = load_task("digits", TRANSFORM)
    small, large = (load_task("digits", TRANSFORM, train_size=n).train for n in (60, 300))
    assert pictures(small) < pictures(large)
    one = load_task("digits", TRANSFORM, train_size=100, test_size=80, seed=1)
    two = load_task("digits", TRANSFORM, train_size=100, test_size=80, seed=2)
    assert not torch.equal(one.train.images, two.train.images)
    assert not torch.equal(one.test.images, two.test.images)
    for task in (one, two):
        assert torch.equal(task.validation.images, full.validation.images)
        assert pictures(task.train) <= pictures(full.train)
        assert pictures(task.test) <= pictures(full.test)
    for size in (None, 988):
        again = load_task("digits", TRANSFORM, train_size=size, seed=7)
        assert torch.equal(again.train.images, full.train.images)


@pytest.mark.parametrize("size", [10, 37, 200])
def test_a_subset_keeps_the_proportions_of_the_classes(size: int) -> None:
    full = load_task("mnist5k", TRANSFORM).train.labels.bincount()
    part = load_task("mnist5k", TRANSFORM, train_size=size, seed=5).train.labels.bincount(
        minlength=10
    )
    assert int(part.sum()) == size
    assert float((part - size * full / full.sum()).abs().max()) <= 1


def test_chance_is_the_share_of_the_most_frequent_test_class() -> None:
    task = load_task("glyphs", TRANSFORM)
    assert task.chance == pytest.approx(1 / 26)
    images = torch.zeros(4, 3, 16, 16, dtype=torch.uint8)
    skewed = ImageDataset(images, torch.tensor([0, 1, 1, 1]), TRANSFORM)
    assert dataclasses.replace(task, test=skewed).chance == 0.75


def test_changing_a_dataset_does_not_change_the_next_load() -> None:
    raw = ImageTransform(8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # of the images' own size
    first = load_task("digits", raw)
    before = first.test.images.clone()
    first.test.images.zero_()
    first.test.labels.zero_()
    second = load_task("digits", raw)
    assert torch.equal(second.test.images, before)
    assert int(second.test.labels.max()) == 9


def test_a_callable_transform_is_given_the_raw_images() -> None:
    data = load_task("mnist5k", lambda image: torch.zeros(3, *image.size), train_size=10).train
    assert data[0][0].shape == (3, 28, 28)


# --- bad input ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_size": 989}, "train_size must be between 1 and 988.*digits; got 989"),
        ({"test_size": 540}, "test_size must be between 1 and 539"),
        ({"test_size": 0}, "got 0"),
        ({"train_size": 1.5}, r"got 1\.5"),
        ({"train_size": True}, "got True"),
        ({"seed": -1}, "seed must be an integer"),
        ({"transform": None}, r"transform must be callable.*backbone\.transform"),
        ({"on_error": "ignore"}, "unknown on_error 'ignore'"),
    ],
)
def test_impossible_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_task("digits", **{"transform": TRANSFORM, **options})


def test_an_unknown_task_is_refused_with_the_choices() -> None:
    for name in ("digits", "FashionMNIST", "ImageNet", "folder:photos"):
        check_task_name(name)
    with pytest.raises(ValueError, match=r"'digit'; did you mean 'digits'.* photos, glyphs$"):
        load_task("digit", TRANSFORM)
    for wrong, meant in (("FashionMNST", "FashionMNIST"), ("cifar10", "CIFAR10")):
        with pytest.raises(ValueError, match=f"unknown task '{wrong}'; did you mean '{meant}'"):
            check_task_name(wrong)

